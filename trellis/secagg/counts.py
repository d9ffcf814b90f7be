"""Additive counts as words of 64 bits: what leaves a node beside its update, masked like it.

Whole numbers travel as they are.  Others travel in units of 2^e, the smallest in which all members' together stay
below 2^62: a sum is off by at most half a unit a member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trellis.errors import ConfigError, SecAggError
from trellis.types import CountField, Counts
from trellis.vectors import CountSpec, TensorSpec

BITS = 62
LEAST_EXPONENT = -30

LOSS, CLIPPED, FAILED = "train_loss", "num_clipped", "num_failed"
"""Sums beside the splits': of the members' training losses, and how many of their updates were clipped, or are zeros
because their app failed."""

MAX_SIZE = 1 << 22
"""Words of one count."""
DTYPES = frozenset({"int32", "int64", "uint32", "uint64", "float32", "float64"})

Word = npt.NDArray[np.uint64]


def field_of(name: str, spec: TensorSpec, *, most: float, num_members: int) -> CountField:
    """How one count travels where no node's is above `most`.  Raises ConfigError where it cannot."""
    total = float(num_members * most)
    exponent = 0
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        exponent = max(math.ceil(math.log2(total)) - BITS if total > 0 else LEAST_EXPONENT, LEAST_EXPONENT)
    elif total >= 2**BITS:
        raise ConfigError(f"{name}: {num_members} nodes with up to {most:.3g} each do not fit 64 bits: ask fewer rows")
    return CountField(name, spec.shape, spec.dtype, exponent, float(most))


def layout(
    specs: Mapping[str, CountSpec], splits: Sequence[str], *, most_rows: float, num_members: int
) -> tuple[CountField, ...]:
    """The counts of each split, in order; a node scores at most `most_rows` rows of it."""
    return tuple(
        field_of(f"{split}/{name}", spec, most=spec.per_row * most_rows, num_members=num_members)
        for split in splits
        for name, spec in specs.items()
    )


def size(fields: Sequence[CountField]) -> int:
    """Words of all counts."""
    return sum(field.size for field in fields)


def encode(fields: Sequence[CountField], values: Mapping[str, Any]) -> Word:
    """A node's counts as words; what is missing is 0.

    Never refuses: a count above what is told, or not finite, is brought within 0 and `most`, since an error would tell
    the server which rows a node has.
    """
    for field in fields:
        _require(field)
    words = np.zeros(size(fields), np.uint64)
    at = 0
    for field in fields:
        value = values.get(field.name)
        if value is not None and np.shape(value) == field.shape:
            words[at : at + field.size] = _scaled(field, value).reshape(-1)
        at += field.size
    return words


def _scaled(field: CountField, value: Any) -> Word:
    most = min(math.ldexp(field.most, -field.exponent), 2.0**BITS)
    try:
        scaled: npt.NDArray[Any] = np.asarray(value)
        scaled = scaled if np.issubdtype(scaled.dtype, np.integer) else scaled.astype(np.float64)
    except (TypeError, ValueError, OverflowError):  # no number at all
        scaled = np.full(field.shape, field.most)
    if _floating(field) or not np.issubdtype(scaled.dtype, np.integer):
        numbers = np.nan_to_num(scaled.astype(np.float64), nan=field.most, posinf=field.most, neginf=0.0)
        scaled = np.rint(np.ldexp(numbers, -field.exponent))
    words: Word = np.clip(scaled, 0, int(most)).astype(np.uint64)
    return words


def decode(fields: Sequence[CountField], words: Word, *, num_members: int) -> dict[str, npt.NDArray[Any]]:
    """The sums of `num_members` nodes' counts, by name.

    Raises SecAggError("counts") where one is above what they can have: somebody masked garbage.
    """
    found, at = {}, 0
    for field in fields:
        part = words[at : at + field.size]
        at += field.size
        most = math.ldexp(field.most * (1 + 1e-9), -field.exponent) + 1
        if part.size and int(part.max()) > num_members * most:
            raise SecAggError("counts", f"the sum of {field.name} is above what {num_members} nodes can have")
        numbers = np.ldexp(part.astype(np.float64), field.exponent) if _floating(field) else part
        found[field.name] = numbers.astype(field.dtype).reshape(field.shape)
    return found


def by_split(values: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, Counts], dict[str, float]]:
    """Counts by split and name, and what belongs to no split."""
    counts: dict[str, Counts] = {}
    others: dict[str, float] = {}
    for name, value in values.items():
        split, divided, count = name.partition("/")
        if divided:
            counts.setdefault(split, {})[count] = value
        else:
            others[name] = float(value)
    return counts, others


def _require(field: CountField) -> None:
    """Raises SecAggError("counts") for a field that nothing could be told in, whether or not there is anything."""
    known = field.dtype in DTYPES and all(n >= 0 for n in field.shape) and field.size <= MAX_SIZE
    told = -1000 <= field.exponent <= 1000 and 0 <= field.most <= 2.0**64
    if not known or not told or field.most > math.ldexp(1.0, field.exponent + BITS + 1):
        raise SecAggError(
            "counts", f"no count can be told as {field.name[:40]!r}: {field.dtype[:20]}, 2^{field.exponent}"
        )


def _floating(field: CountField) -> bool:
    return bool(np.issubdtype(np.dtype(field.dtype), np.floating))
