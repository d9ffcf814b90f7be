"""Owners and splits: small numbers by hand, then laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectors import partition
from trellis.errors import DataError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bands_have_equal_counts_and_ties_follow_the_order_of_the_rows() -> None:
    assert partition.by_quantile(np.array([5.0, 1.0, 3.0, 9.0]), 2).tolist() == [1, 0, 0, 1]
    assert partition.by_quantile(np.zeros(5), 2).tolist() == [0, 0, 0, 1, 1]


def test_blocks_do_not_divide_equal_values() -> None:
    assert partition.by_block(np.array([3, 1, 2, 2, 2, 9]), 2).tolist() == [1, 0, 0, 0, 0, 1]


def test_uniform_parts_have_equal_counts() -> None:
    assert np.bincount(partition.uniform(10, 3, rng())).tolist() == [4, 3, 3]


def test_small_alpha_gives_parts_of_one_label_and_large_alpha_equal_shares() -> None:
    labels = np.repeat([0, 1], 1000)

    def spread(alpha: float) -> float:
        owners = partition.by_dirichlet(labels, 10, alpha, rng(1), 1)
        return float(np.std([labels[owners == p].mean() for p in range(10)]))

    assert spread(1000.0) < 0.03 < 0.25 < spread(0.1)


@pytest.mark.parametrize(("num_parts", "min_rows"), [(3, 50), (100, 5), (113, 5)])
def test_every_dirichlet_part_has_its_least_rows(num_parts: int, min_rows: int) -> None:
    owners = partition.by_dirichlet((np.arange(569) < 212).astype(int), num_parts, 1.0, rng(), min_rows)
    assert np.bincount(owners, minlength=num_parts).min() >= min_rows


def test_more_parts_than_rows_is_a_data_error_with_the_numbers() -> None:
    with pytest.raises(DataError, match="569 rows cannot be divided into 1000 parts of at least 2: 2000 rows"):
        partition.by_dirichlet(np.zeros(569), 1000, 1.0, rng(), 2)
    for call in (lambda: partition.by_quantile(np.zeros(2), 3), lambda: partition.uniform(2, 3, rng())):
        with pytest.raises(DataError, match="2 rows cannot be divided into 3 parts"):
            call()


def test_a_group_goes_where_its_first_row_is() -> None:
    assert partition.together(np.array([1, 0, 2, 0]), np.array([7, 8, 7, 8])).tolist() == [1, 0, 1, 0]


def test_parts_list_the_rows_of_each_owner() -> None:
    parts = partition.parts_of(np.array([2, 0, 2]), 4)
    assert [p.tolist() for p in parts] == [[1], [], [0, 2], []]


def test_a_split_of_twenty_and_ten_rows_by_hand() -> None:
    labels = np.repeat([0, 1], [20, 10])
    train, validation, test = partition.stratified_split(labels, (0.2, 0.2), rng())
    assert [np.bincount(labels[s]).tolist() for s in (train, validation, test)] == [[12, 6], [4, 2], [4, 2]]


def test_rare_positives_reach_every_split_of_a_federation_of_tiny_nodes() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1])
    seen = np.array(
        [[(s == 5).any() for s in partition.stratified_split(labels, (0.2, 0.2), rng(i))] for i in range(500)]
    )
    assert np.allclose(seen.mean(axis=0), [0.6, 0.2, 0.2], atol=0.08)  # 3.6 standard errors


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    fractions=st.tuples(st.floats(0, 0.49), st.floats(0, 0.49)),
    seed=st.integers(0, 1000),
)
def test_splits_are_disjoint_covering_reproducible_and_hold_every_class(
    counts: list[int], fractions: tuple[float, float], seed: int
) -> None:
    labels = rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    splits = partition.stratified_split(labels, fractions, rng(seed))
    again = partition.stratified_split(labels, fractions, rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(splits, again, strict=True))
    assert sorted(np.concatenate(splits)) == list(range(len(labels)))
    if len(labels):
        assert len(splits[0])
    for label, count in enumerate(counts):
        if count >= 3:
            wanted = [True, *(f > 0 for f in fractions)]
            assert [bool((labels[s] == label).any()) for s in splits] == wanted


@given(seed=st.integers(0, 1000), num_groups=st.integers(1, 30))
def test_a_split_never_divides_a_group(seed: int, num_groups: int) -> None:
    groups = rng(seed).integers(0, num_groups, 60)
    splits = partition.stratified_split((groups % 2).astype(int), (0.2, 0.2), rng(seed), groups)
    assert sorted(np.concatenate(splits)) == list(range(60))
    sets = [set(groups[s]) for s in splits]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]
