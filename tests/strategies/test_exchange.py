"""The matrix of a round is memory that is used again, and never under someone's hands."""

from __future__ import annotations

import numpy as np

from strategies.exchange import _Matrix


def test_a_matrix_nobody_holds_is_handed_out_again() -> None:
    pool = _Matrix()
    address = pool.take((3, 5)).ctypes.data
    assert pool.take((3, 5)).ctypes.data == address


def test_a_matrix_with_a_row_still_held_is_left_alone() -> None:
    pool = _Matrix()
    first = pool.take((3, 5))
    first[:] = 7.0
    row = first[1]
    del first
    pool.take((3, 5))[:] = 0.0
    assert np.array_equal(row, np.full(5, 7.0, np.float32))


def test_an_evaluation_takes_no_memory_from_the_next_round() -> None:
    pool = _Matrix()
    address = pool.take((3, 5)).ctypes.data
    assert pool.take((0, 5)).shape == (0, 5)
    assert pool.take((3, 5)).ctypes.data == address


def test_a_cohort_of_another_size_gets_a_matrix_of_its_own() -> None:
    pool = _Matrix()
    pool.take((3, 5))
    assert pool.take((2, 5)).shape == (2, 5)
