"""A model as a vector and as a digest: small cases by hand, then the laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trellis.vectors import Layout, TensorSpec, digest, norm

FINITE16 = st.floats(width=16, allow_nan=False, allow_infinity=False)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSOR = st.one_of(
    npst.arrays(np.float32, npst.array_shapes(min_dims=0, max_dims=3, max_side=3), elements=FINITE32),
    npst.arrays(np.float16, npst.array_shapes(min_dims=0, max_dims=2, max_side=3), elements=FINITE16),
    npst.arrays(np.int64, npst.array_shapes(min_dims=0, max_dims=2, max_side=3)),
)
MODELS = st.dictionaries(st.text("abc.", min_size=1, max_size=4), TENSOR, max_size=4)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def test_a_layout_by_hand() -> None:
    arrays = {
        "w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
        "steps": np.array(7, np.int64),
        "b": np.array(5.0, np.float32),
    }
    layout = Layout.of(arrays)
    assert layout.dim == 5
    assert layout.flatten(arrays).tolist() == [1, 2, 3, 4, 5]
    assert layout.kept == (TensorSpec("steps", (), "int64"),)
    moved = layout.apply(arrays, np.array([1, 0, 0, 0, -5], np.float64))
    assert moved["w"].tolist() == [[2, 2], [3, 4]]
    assert (moved["b"], moved["steps"]) == (0, 7)
    assert list(moved) == ["w", "steps", "b"]


@given(MODELS)
def test_unflatten_undoes_flatten_on_floating_tensors(arrays: dict[str, Any]) -> None:
    layout = Layout.of(arrays)
    floating = {k: a for k, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    assert same(layout.unflatten(layout.flatten(arrays)), floating)


@given(MODELS)
def test_no_step_changes_nothing(arrays: dict[str, Any]) -> None:
    layout = Layout.of(arrays)
    moved = layout.apply(arrays, np.zeros(layout.dim))
    assert list(moved) == list(arrays)
    assert all(np.array_equal(moved[k], arrays[k]) and moved[k].dtype == arrays[k].dtype for k in arrays)


@given(MODELS)
def test_a_model_less_itself_is_zero(arrays: dict[str, Any]) -> None:
    assert not Layout.of(arrays).subtract(arrays, arrays).any()


def test_close_params_are_subtracted_exactly_and_the_step_leads_back() -> None:
    base = {"w": np.array([1.0, 1e6, 0.1], np.float32)}
    local = {"w": np.nextafter(base["w"], np.float32(np.inf))}
    layout = Layout.of(base)
    update_d = layout.subtract(local, base)
    assert update_d.tolist() == (local["w"].astype(np.float64) - base["w"].astype(np.float64)).tolist()
    assert same(layout.apply(base, update_d), local)


def test_flatten_and_subtract_write_where_they_are_told() -> None:
    arrays = {"w": np.array([1.0, 2.0], np.float32)}
    matrix = np.full((3, 2), 9, np.float32)
    Layout.of(arrays).flatten(arrays, out=matrix[1])
    Layout.of(arrays).subtract(arrays, arrays, out=matrix[2])
    assert matrix.tolist() == [[9, 9], [1, 2], [0, 0]]


# ---------------------------------------------------------------- digests

MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    "other",
    [
        {"v": MODEL["w"], "b": MODEL["b"]},
        {"w": MODEL["w"].astype(np.float64), "b": MODEL["b"]},
        {"w": MODEL["w"].view(np.int32), "b": MODEL["b"]},
        {"w": MODEL["w"].reshape(3, 2), "b": MODEL["b"]},
        {"w": MODEL["w"].reshape(6), "b": MODEL["b"]},
        {"w": np.nextafter(MODEL["w"], np.float32(9)), "b": MODEL["b"]},
        {"w": MODEL["w"], "b": np.array([0.0, -0.0], np.float32)},
        {"w": MODEL["w"]},
        {**MODEL, "c": np.zeros(0, np.float32)},
        {},
    ],
    ids=[
        "name",
        "dtype",
        "same bytes, other dtype",
        "shape",
        "rank",
        "one bit",
        "sign of zero",
        "less",
        "more",
        "none",
    ],
)
def test_a_digest_binds_names_dtypes_shapes_and_bytes(other: dict[str, Any]) -> None:
    assert digest(other) != digest(MODEL)


def test_a_digest_binds_a_scalar_from_a_vector_of_one() -> None:
    assert digest({"a": np.zeros((), np.float32)}) != digest({"a": np.zeros(1, np.float32)})


def test_a_digest_does_not_depend_on_order_layout_or_byte_order() -> None:
    assert digest(dict(reversed(MODEL.items()))) == digest(MODEL)
    assert digest({**MODEL, "w": np.asfortranarray(MODEL["w"])}) == digest(MODEL)
    assert digest({**MODEL, "w": MODEL["w"].astype(">f4")}) == digest(MODEL)


def test_bytes_cannot_move_from_one_tensor_to_the_next() -> None:
    one = {"a": np.array([1, 2], np.uint8), "b": np.array([3], np.uint8)}
    two = {"a": np.array([1], np.uint8), "b": np.array([2, 3], np.uint8)}
    assert digest(one) != digest(two)


# ---------------------------------------------------------------- norm


def test_the_norm_by_hand() -> None:
    assert norm(np.array([3, -4], np.float32)) == 5.0
    assert norm(np.zeros(0, np.float32)) == 0.0


def test_the_norm_of_huge_values_does_not_overflow() -> None:
    assert norm(np.full(4, 1e30, np.float32)) == pytest.approx(2e30)


def test_the_norm_of_a_long_vector_counts_every_block() -> None:
    assert norm(np.ones((1 << 20) * 2 + 5, np.float32)) == pytest.approx(((1 << 20) * 2 + 5) ** 0.5, rel=1e-12)
