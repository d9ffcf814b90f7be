"""The mean: by hand, then what every run relies on."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import rules
from strategies.rows import BLOCK_BYTES
from strategies.rules.mean import MEAN, mean
from trellis.errors import CohortTooSmall, ConfigError

ROWS = np.array([[1, 2], [3, 6], [5, 1]], np.float32)


def test_the_mean_by_hand() -> None:
    result = mean(ROWS)
    assert result.update_d.tolist() == [3.0, 3.0]
    assert result.weights_n is not None
    assert result.weights_n.tolist() == pytest.approx([1 / 3] * 3)


def test_the_weighted_mean_by_hand() -> None:
    result = mean(ROWS, weights=[1, 2, 1])
    assert result.update_d.tolist() == [3.0, 3.75]
    assert result.weights_n is not None
    assert result.weights_n.tolist() == [0.25, 0.5, 0.25]


def test_a_row_of_no_weight_counts_for_nothing() -> None:
    rows = np.array([[1, 2], [1e30, -1e30]], np.float32)
    assert mean(rows, weights=[3, 0]).update_d.tolist() == [1, 2]


def test_the_mean_of_one_row_is_the_row() -> None:
    assert np.array_equal(mean(ROWS[:1]).update_d, ROWS[0])


def test_columns_beyond_one_block_are_averaged_too() -> None:
    d = 2 * BLOCK_BYTES // 8 + 3
    rows = np.stack([np.arange(d), np.arange(d) + 2]).astype(np.float32)
    assert np.array_equal(mean(rows).update_d, np.arange(d, dtype=np.float32) + 1)


def test_the_sum_is_kept_in_float64() -> None:
    # 1 + 1000 * 2^-24: float32 drops every addend, float64 none
    column = np.full((1001, 1), 2.0**-24, np.float32)
    column[0] = 1.0
    in_float32 = np.float32(0)
    for row in column:
        in_float32 = np.float32(in_float32 + row[0])
    true = (1 + 1000 * 2.0**-24) / 1001
    assert abs(mean(column).update_d[0] - true) < 1e-10 < abs(float(in_float32) / 1001 - true)


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_rows_are_left_as_they_were(n: int, d: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    weights = np.arange(1.0, n + 1)
    before = (rows.tobytes(), weights.tobytes())
    mean(rows, weights=weights)
    assert (rows.tobytes(), weights.tobytes()) == before


@given(st.floats(0.125, 8), st.integers(0, 2**32 - 1))
def test_weights_count_only_by_their_ratio(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, weights = rng.normal(size=(4, 3)).astype(np.float32), rng.uniform(0.1, 1, 4)
    assert np.allclose(mean(rows, weights=weights * scale).update_d, mean(rows, weights=weights).update_d, rtol=1e-6)


def test_equal_rows_in_equal_order_give_equal_bits() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32)
    assert hashlib.sha256(mean(rows).update_d.tobytes()).digest() == (
        hashlib.sha256(mean(np.asfortranarray(rows)).update_d.tobytes()).digest()
    )


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must be 3"):
        mean(ROWS, weights=weights)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(CohortTooSmall):
        mean(np.zeros((0, 3), np.float32))


def test_the_catalogue_knows_the_mean_and_says_what_it_knows() -> None:
    assert rules.get("mean") is MEAN
    assert not MEAN.tolerates
    with pytest.raises(ConfigError, match=r"no rule 'median_of_moods'.*mean"):
        rules.get("median_of_moods")
