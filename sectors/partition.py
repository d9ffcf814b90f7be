"""Who owns which row, and which rows train.

Partitions are pure functions: (n,) values -> (n,) owners in 0..num_parts-1.  Equal inputs and generators give equal
owners.  They stand in for the borders between real owners, so they are kept apart from the split inside a node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trellis.errors import DataError

Index = npt.NDArray[np.int64]

_REDRAWS = 50


def by_quantile(values: npt.NDArray[Any], num_parts: int) -> Index:
    """Bands of a column with equal counts (they differ by at most one); ties go in the order of the rows."""
    _enough(len(values), num_parts, 1)
    owners = np.empty(len(values), np.int64)
    owners[np.argsort(values, kind="stable")] = np.arange(len(values)) * num_parts // len(values)
    return owners


def by_block(values: npt.NDArray[Any], num_parts: int) -> Index:
    """Contiguous blocks of a sorted column, such as time, that never divide equal values.

    Counts are equal but for ties; a value that fills a whole block leaves the next part empty.
    """
    owners = by_quantile(values, num_parts)
    _, inverse = np.unique(values, return_inverse=True)
    first = np.full(inverse.max() + 1, num_parts, np.int64)
    np.minimum.at(first, inverse, owners)
    return first[inverse]


def uniform(n: int, num_parts: int, rng: np.random.Generator) -> Index:
    """Random parts with equal counts (they differ by at most one)."""
    _enough(n, num_parts, 1)
    return rng.permutation(np.arange(n, dtype=np.int64) * num_parts // n)


def by_dirichlet(
    labels: npt.NDArray[Any], num_parts: int, alpha: float, rng: np.random.Generator, min_rows: int = 1
) -> Index:
    """Every class is dealt to the parts in proportions drawn from Dirichlet(alpha); each part gets `min_rows` or more.

    Redrawn until it holds.  With many small parts no draw would, so after 50 the short parts of the last one are filled
    from the largest.  Raises DataError when there are fewer than `num_parts * min_rows` rows.
    Hsu et al., 2019, https://arxiv.org/abs/1909.06335; redraws as in Li et al., ICDE 2022.
    """
    _enough(len(labels), num_parts, min_rows)
    for _ in range(_REDRAWS):
        owners = _draw(labels, num_parts, alpha, rng)
        if np.bincount(owners, minlength=num_parts).min() >= min_rows:
            return owners
    return _fill(owners, num_parts, min_rows, rng)


def _draw(labels: npt.NDArray[Any], num_parts: int, alpha: float, rng: np.random.Generator) -> Index:
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        bounds = np.cumsum(rng.dirichlet(np.full(num_parts, alpha))) * len(members)
        owners[members] = np.minimum(np.searchsorted(bounds, np.arange(len(members)), side="right"), num_parts - 1)
    return owners


def _fill(owners: Index, num_parts: int, min_rows: int, rng: np.random.Generator) -> Index:
    sizes = np.bincount(owners, minlength=num_parts)
    for short in np.flatnonzero(sizes < min_rows):
        while sizes[short] < min_rows:
            largest = int(sizes.argmax())
            owners[rng.choice(np.flatnonzero(owners == largest))] = short
            sizes[largest] -= 1
            sizes[short] += 1
    return owners


def _enough(n: int, num_parts: int, min_rows: int) -> None:
    if num_parts < 1 or n < num_parts * min_rows:
        raise DataError(
            f"{n} rows cannot be divided into {num_parts} parts of at least {min_rows}: "
            f"{num_parts * min_rows} rows are needed; use fewer nodes, or generated rows"
        )


def parts_of(owners: Index, num_parts: int) -> tuple[Index, ...]:
    """Rows of each part, ascending.  (n,) owners -> num_parts index arrays, disjoint and covering."""
    order = np.argsort(owners, kind="stable")
    return tuple(np.split(order, np.searchsorted(owners[order], np.arange(1, num_parts))))


def together(owners: Index, groups: npt.NDArray[Any]) -> Index:
    """Owners such that a group is never divided: all of it goes where its first row is."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return owners[first[inverse]]


def stratified_split(
    labels: npt.NDArray[Any],
    fractions: tuple[float, float],
    rng: np.random.Generator,
    groups: npt.NDArray[Any] | None = None,
) -> tuple[Index, Index, Index]:
    """Train, validation and test rows, class by class.  (n,) labels -> three index arrays, ascending and disjoint.

    `fractions` are the shares of validation and test.  A class of three rows or more has one in every split whose share
    is above 0.  Each row of a smaller class is drawn by the shares: always training on it would leave a federation of
    many small nodes without a positive to test on.  Train is never empty while there is a row.
    With `groups` the units are whole groups, each with the label of its first row.
    """
    if groups is not None:
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        if len(first) < len(labels):
            return _members(_split_of(labels[first], fractions, rng)[inverse])
    return _members(_split_of(labels, fractions, rng))


def fold_split(
    labels: npt.NDArray[Any],
    num_folds: int,
    fold: int,
    validation_fraction: float,
    rng: np.random.Generator,
    groups: npt.NDArray[Any] | None = None,
) -> tuple[Index, Index, Index]:
    """Fold `fold` tests, the rest validates and trains.  (n,) labels -> three index arrays, ascending and disjoint.

    The folds of one generator state are disjoint and cover the rows, class by class with counts that differ by at most
    one: k-fold stratified cross-validation.  With `groups` whole groups are dealt.
    """
    _, first, inverse = np.unique(
        np.arange(len(labels)) if groups is None else groups, return_index=True, return_inverse=True
    )
    of_group = np.empty(len(first), np.int64)
    dealt = 0
    for label in np.unique(labels[first]):
        members = rng.permutation(np.flatnonzero(labels[first] == label))
        # classes go on where the last one stopped, so that small classes do not all end in the first folds
        of_group[members] = (dealt + np.arange(len(members))) % num_folds
        dealt += len(members)
    tests = of_group[inverse] == fold
    rest = np.flatnonzero(~tests)
    shares = (validation_fraction, 0.0)
    train, validation, _ = stratified_split(labels[rest], shares, rng, None if groups is None else groups[rest])
    return rest[train], rest[validation], np.flatnonzero(tests)


def by_owner(owner: npt.NDArray[np.int64], num_parts: int, what: str, num_owners: int = 0) -> Index:
    """Natural owners as parts.  (n,) owner 0..k-1 of each row -> (n,) part.

    With as many parts as owners each has its own, in their order.  With fewer the smallest owners share the last part
    and the others keep their order.  Raises DataError when there are more parts than owners; `what` names the owners
    ("hospitals") and what to do about it; `num_owners` counts owners without rows too.
    """
    sizes = np.bincount(owner, minlength=num_owners)
    if num_parts > len(sizes):
        raise DataError(f"{len(owner)} rows cannot be divided into {num_parts} parts: they have {len(sizes)} {what}")
    largest = np.sort(np.argsort(-sizes, kind="stable")[: num_parts - 1]) if num_parts < len(sizes) else None
    if largest is None:
        return np.asarray(owner, np.int64)
    part = np.full(len(sizes), num_parts - 1, np.int64)
    part[largest] = np.arange(num_parts - 1)
    return part[owner]


def _members(split: npt.NDArray[np.int8]) -> tuple[Index, Index, Index]:
    return np.flatnonzero(split == 0), np.flatnonzero(split == 1), np.flatnonzero(split == 2)


def _split_of(
    labels: npt.NDArray[Any], fractions: tuple[float, float], rng: np.random.Generator
) -> npt.NDArray[np.int8]:
    """0 train, 1 validation, 2 test for each row."""
    split = np.zeros(len(labels), np.int8)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 3:
            split[members] = rng.choice(3, len(members), p=[1.0 - sum(fractions), *fractions])
            continue
        num_validation, num_test = _shares(len(members), fractions)
        split[members[:num_validation]] = 1
        split[members[num_validation : num_validation + num_test]] = 2
    if len(split) and split.all():
        split[rng.integers(len(split))] = 0
    return split


def _shares(n: int, fractions: tuple[float, float]) -> tuple[int, int]:
    """Rows of validation and of test among n >= 3 of a class, leaving one or more to train."""
    shares = [max(1, int(n * f + 0.5)) if f > 0 else 0 for f in fractions]
    while sum(shares) >= n:
        shares[shares.index(max(shares))] -= 1
    return shares[0], shares[1]
