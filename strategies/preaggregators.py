"""What rows pass before the rule.  `name(updates_nd, *, num_byzantine, ...)`: (n, d) -> (m, d).

Every pre-aggregator combines rows linearly with a small matrix of coefficients, so nothing of size (m, d) need be
written: given `Rows` it returns `Rows`, given an array an array.  They are applied in the order they are configured in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from strategies.rows import Rows, require_rows, rows_of, squared_distances, squared_norms
from trellis.errors import ConfigError
from trellis.types import PreAggregatorSpec


def nnm(updates: Any, *, num_byzantine: int) -> Any:
    """Nearest-neighbour mixing: every row becomes the mean of the n - f rows nearest to it, itself among them.

    Ties go to the earlier row.  Allouah et al., AISTATS 2023, Algorithm 2.  https://arxiv.org/abs/2302.01772
    """
    rows = rows_of(updates)
    n = require_rows("nnm", rows, 2 * num_byzantine + 1, num_byzantine)
    squared_nn = squared_distances(rows)
    np.fill_diagonal(squared_nn, -1.0)  # by index: another row may be at distance 0 too
    nearest = np.argsort(squared_nn, axis=1, kind="stable")[:, : n - num_byzantine]
    mix = np.zeros((n, n))
    np.put_along_axis(mix, nearest, 1.0 / (n - num_byzantine), axis=1)
    return _like(updates, rows.combined(mix))


def bucketing(updates: Any, *, num_byzantine: int, size: int = 2, rng: np.random.Generator | None = None) -> Any:
    """Means of random buckets of `size` rows: (n, d) -> (ceil(n / size), d).

    The variance falls by `size`; up to f buckets hold a liar, so the rule must survive f among the buckets.
    Karimireddy et al., ICLR 2022, Algorithm 1.  https://arxiv.org/abs/2006.09365
    """
    rows = rows_of(updates)
    n = rows.num_rows
    mix = np.zeros((_num_buckets(n, size), n))
    order = (rng or np.random.default_rng(0)).permutation(n)
    for bucket, start in enumerate(range(0, n, size)):
        members = order[start : start + size]
        mix[bucket, members] = 1.0 / len(members)
    return _like(updates, rows.combined(mix))


def clip(updates: Any, *, num_byzantine: int, max_norm: float = 2.0) -> Any:
    """Every row longer than `max_norm` is cut to it: x min(1, C / ||x||)."""
    if not max_norm > 0:
        raise ConfigError(f"preaggregator=clip: max_norm is {max_norm}; it must be above 0")
    rows = rows_of(updates)
    return _like(updates, _clipped(rows, np.sqrt(squared_norms(rows)), max_norm))


def arc(updates: Any, *, num_byzantine: int) -> Any:
    """Adaptive robust clipping: the k = floor(2 f (n - f) / n) longest rows are cut to the length of the next.

    Allouah et al., ICLR 2025, Algorithm 1.  https://arxiv.org/abs/2405.14432
    """
    rows = rows_of(updates)
    n = require_rows("arc", rows, num_byzantine + 1, num_byzantine)
    k = 2 * num_byzantine * (n - num_byzantine) // n
    norms = np.sqrt(squared_norms(rows))
    return _like(updates, rows if k == 0 else _clipped(rows, norms, float(np.sort(norms)[n - k - 1])))


def nnm_kappa(kappa: float, n: int, f: int) -> float:
    """Robustness constant of a rule of constant `kappa` behind nnm: Lemma 1 of its paper."""
    return 8 * f / (n - f) * (1 + kappa)


def arc_kappa(kappa: float, n: int, f: int) -> float:
    """Robustness constant of a rule of constant `kappa` behind arc: Theorem 3.2 of its paper."""
    return kappa + 2 * f / (n - 2 * f)


def _clipped(rows: Rows, norms: Any, most: float) -> Rows:
    if (norms <= most).all():
        return rows
    return rows.combined(
        np.diag(np.where(norms > most, most / np.maximum(norms, max(most, np.finfo(np.float64).tiny)), 1.0))
    )


def _like(given: Any, rows: Rows) -> Any:
    return rows if isinstance(given, Rows) else rows.materialised()


def _num_buckets(n: int, size: int = 2) -> int:
    if size < 1:
        raise ConfigError(f"preaggregator=bucketing: size is {size}; it must be at least 1")
    return ceil(n / size)


PREAGGREGATORS: dict[str, PreAggregatorSpec] = {
    spec.name: spec
    for spec in (
        PreAggregatorSpec("nnm", nnm, kappa=nnm_kappa),
        PreAggregatorSpec("bucketing", bucketing, needs=("rng",), num_rows=_num_buckets),
        PreAggregatorSpec("clip", clip, mixes=False),
        PreAggregatorSpec("arc", arc, kappa=arc_kappa, mixes=False),
    )
}


def get(name: str, options: Mapping[str, Any] | None = None) -> PreAggregatorSpec:
    """The spec of a pre-aggregator with its options bound.  Raises ConfigError naming the catalogue or the options."""
    if name not in PREAGGREGATORS:
        raise ConfigError(f"there is no preaggregator {name!r}; choose among: {', '.join(sorted(PREAGGREGATORS))}")
    spec = PREAGGREGATORS[name]
    own = set(inspect.signature(spec.fn).parameters) - {"updates", "num_byzantine", *spec.needs}
    given = dict(options or {})
    if odd := sorted(set(given) - own):
        raise ConfigError(f"preaggregator={name} has no options {odd}; it takes: {', '.join(sorted(own)) or 'none'}")
    num_rows = partial(spec.num_rows, **given) if "size" in given else spec.num_rows
    return replace(spec, fn=partial(spec.fn, **given), num_rows=num_rows)
