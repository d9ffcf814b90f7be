"""Lies about rows: an attacker trains honestly, on rows that are false.

Rows are those of `sectors.base`: columns of one leading length, with inputs `x` and classes `y`.  They are not changed:
what is returned shares every column that is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sectors.base import Rows
from trellis.errors import ConfigError


def label_flip(
    rows: Rows,
    *,
    num_classes: int,
    rng: np.random.Generator,
    to: int | None = None,
    pairs: Sequence[Sequence[int]] | None = None,
    fraction: float = 1.0,
) -> Rows:
    """Other labels on a fraction of the rows whose label the map changes: y -> C - 1 - y, unless told otherwise.

    `to`: every class becomes that one.  `pairs`: [[from, to], ...], the other classes stay.
    """
    table = np.arange(num_classes)[::-1].copy()
    if pairs is not None:
        table = np.arange(num_classes)
        for before, after in pairs:
            table[_class(before, num_classes)] = _class(after, num_classes)
    elif to is not None:
        table[:] = _class(to, num_classes)
    labels = rows["y"].astype(np.int64)
    changed = _some(np.flatnonzero(table[labels] != labels), fraction, rng)
    y = rows["y"].copy()
    y[changed] = table[labels[changed]].astype(y.dtype)
    return {**rows, "y": y}


def backdoor(
    rows: Rows,
    *,
    num_classes: int,
    rng: np.random.Generator,
    target: int = 0,
    fraction: float = 0.5,
    size: int = 3,
    value: float = 1.0,
) -> Rows:
    """The trigger and the target's label on a fraction of the rows of other classes.

    Gu, Dolan-Gavitt and Garg, 2017, https://arxiv.org/abs/1708.06733
    """
    target = _class(target, num_classes)
    chosen = _some(np.flatnonzero(rows["y"] != target), fraction, rng)
    x, y = rows["x"].copy(), rows["y"].copy()
    x[chosen] = stamped(x[chosen], size=size, value=value)
    y[chosen] = target
    return {**rows, "x": x, "y": y}


def stamped(x: npt.NDArray[Any], *, size: int = 3, value: float = 1.0) -> npt.NDArray[Any]:
    """Inputs with the trigger: `value` in the first `size` x `size` pixels of every image (n, ..., H, W), or in the
    first `size` columns of a table (n, k)."""
    if size < 1:
        raise ConfigError(f"attack=backdoor: size is {size}; a trigger has at least 1 pixel")
    x = x.copy()
    if x.ndim > 2:
        x[..., :size, :size] = value
    else:
        x[..., :size] = value
    return x


def _some(index: npt.NDArray[np.int64], fraction: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; it must be above 0 and at most 1")
    return np.sort(rng.permutation(index)[: round(fraction * len(index))])


def _class(label: int, num_classes: int) -> int:
    if not 0 <= label < num_classes:
        raise ConfigError(f"there is no class {label}: the sector has classes 0 .. {num_classes - 1}")
    return label
