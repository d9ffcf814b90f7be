"""Quantised updates: small numbers by hand, that nothing wraps, then the error that the module states."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import ConfigError, SecAggError
from trellis.secagg.quantise import Quantised, dequantise, largest_sum, quantise, scale_for

NUM_MEMBERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 50, 100)
CLIP_NORMS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 10.0)
GRID = [(n, c) for n in NUM_MEMBERS for c in CLIP_NORMS]
BITS: dict[int, Any] = {32: np.uint32, 64: np.uint64}


class Draws(np.random.Generator):
    """Every draw the same 64-bit word."""

    def __init__(self, word: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.word = word

    def integers(self, *args: Any, size: Any = None, dtype: Any = None, **_: Any) -> Any:
        return np.full(size, self.word, dtype)


UP, DOWN = Draws(2**64 - 1), Draws(0)
"""The draws that round up whatever has a fraction, and down."""


def signed(vector: Quantised) -> list[int]:
    return [int(x) for x in vector.view(np.int32 if vector.dtype == np.uint32 else np.int64)]


def quantised(*update: float, rng: np.random.Generator | None = None, **given: Any) -> tuple[list[int], bool]:
    settings: dict[str, Any] = {"clip_norm": 10.0, "weight": 1, "scale": 100, "dtype": np.uint32} | given
    vector, was_clipped = quantise(np.array(update, np.float32), rng=rng or np.random.default_rng(0), **settings)
    return signed(vector), was_clipped


# ---------------------------------------------------------------- by hand


def test_whole_units_are_kept_and_fractions_go_either_way() -> None:
    assert quantised(1.0, -2.5, 0.0) == ([100, -250, 0], False)
    assert quantised(1.0, -2.5, rng=UP) == ([100, -250], False)
    assert quantised(0.125, -0.125, rng=UP) == ([13, -12], False)
    assert quantised(0.125, -0.125, rng=DOWN) == ([12, -13], False)


def test_negative_values_are_twos_complement() -> None:
    for dtype in (np.uint32, np.uint64):
        vector, _ = quantise(np.array([-1.0], np.float32), clip_norm=1.0, weight=1, scale=3, dtype=dtype, rng=DOWN)
        assert vector.dtype == dtype
        assert int(vector[0]) == 2 ** (8 * vector.itemsize) - 3


def test_an_update_is_clipped_to_its_norm_and_weighted() -> None:
    assert quantised(3.0, -4.0, clip_norm=5.0) == ([300, -400], False)
    assert quantised(3.0, -4.0, clip_norm=2.5) == ([150, -200], True)
    assert quantised(3.0, -4.0, clip_norm=2.5, weight=7) == ([1050, -1400], True)
    assert quantised(3.0, -4.0, clip_norm=2.5, weight=0) == ([0, 0], True)


def test_the_scale_by_hand() -> None:
    assert scale_for(10, 1.0, 1) == math.floor((2**31 - 1) / 10 - 1) == 214748363
    assert scale_for(10, 2.0, 50, noise_tail=1000.0) == math.floor((214748364.7 - 1001) / 100)
    assert scale_for(3, 1.0, 1, bits=64) == (2**63 - 1) // 3 - 1 == 3074457345618258601


def test_the_scale_is_exact_where_floats_are_not() -> None:
    """(2^63 - 1) / 7 / 3 / 0.3 in float64 misses by hundreds of units."""
    exact = (Fraction(2**63 - 1, 7) - 1) / (3 * Fraction(0.3))
    assert scale_for(7, 0.3, 3, bits=64) == math.floor(exact)
    assert abs(int(((2**63 - 1) / 7 - 1) / (3 * 0.3)) - math.floor(exact)) > 100


def test_a_mean_by_hand() -> None:
    total = np.array([600, 2**32 - 300, 0], np.uint32)
    mean_d = dequantise(total, scale=100, total_weight=3, num_members=2, most=600)
    assert mean_d.dtype == np.float32
    assert mean_d.tolist() == [2.0, -1.0, 0.0]


def test_the_largest_sum_by_hand() -> None:
    assert largest_sum(2, 1.0, 100, 2) == 201
    assert largest_sum(3, 0.125, 100, 2) == 38 + 1
    # weights 1 and 2, and all that goes up goes up: 12.5 -> 13, 25 -> 25
    assert quantised(0.125, clip_norm=0.125, rng=UP)[0] == [13]
    assert quantised(0.125, clip_norm=0.125, weight=2, rng=UP)[0] == [25]


def test_nothing_in_nothing_out() -> None:
    assert quantised() == ([], False)
    assert dequantise(np.zeros(0, np.uint32), scale=1, total_weight=1, num_members=1, most=0).size == 0


def test_the_result_is_written_where_it_is_told() -> None:
    matrix = np.full((3, 2), 9, np.uint32)
    update_d = np.array([1.0, 2.0], np.float32)
    vector, _ = quantise(update_d, clip_norm=9.0, weight=1, scale=1, dtype=np.uint32, rng=DOWN, out=matrix[1])
    assert matrix.tolist() == [[9, 9], [1, 2], [9, 9]]
    assert np.shares_memory(vector, matrix)


def test_the_update_itself_is_not_changed() -> None:
    update_d = np.array([3.0, -4.0], np.float32)
    quantise(update_d, clip_norm=1.0, weight=1, scale=9, dtype=np.uint32, rng=DOWN)
    assert update_d.tolist() == [3.0, -4.0]


# ---------------------------------------------------------------- nothing wraps


def test_without_the_ceiling_of_rounding_sums_would_wrap() -> None:
    def worst_sum(n: int, clip_norm: float, ceiling: int) -> int:
        scale = math.floor((Fraction(2**31 - 1, n) - ceiling) / Fraction(clip_norm))
        return n * math.ceil(Fraction(clip_norm) * scale)

    assert len(GRID) == 130
    assert sum(worst_sum(n, c, ceiling=0) > 2**31 - 1 for n, c in GRID) == 56
    assert sum(worst_sum(n, c, ceiling=1) > 2**31 - 1 for n, c in GRID) == 0


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("max_weight", [1, 3])
def test_the_largest_sum_never_wraps(max_weight: int, bits: int) -> None:
    for n, clip_norm in GRID:
        scale = scale_for(n, clip_norm, max_weight, bits=bits)
        assert largest_sum(n * max_weight, clip_norm, scale, n) < 2 ** (bits - 1) - 1
        one_more = n * math.ceil(max_weight * Fraction(clip_norm) * (scale + 1))
        assert one_more + n > 2 ** (bits - 1) - 1  # and no larger scale is safe


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_members_all_at_the_bound_and_rounded_outwards_do_not_wrap(sign: int, bits: int) -> None:
    """One coordinate at the clip bound, or far beyond it, for every (n, C) of the grid."""
    for n, clip_norm in GRID:
        scale = scale_for(n, clip_norm, 1, bits=bits)
        most = largest_sum(n, clip_norm, scale, n)
        for length in (np.float32(clip_norm), np.float32(1e30)):
            update_d = np.array([sign * length, 0.0], np.float32)
            vector, _ = quantise(
                update_d, clip_norm=clip_norm, weight=1, scale=scale, dtype=BITS[bits], rng=UP if sign > 0 else DOWN
            )
            honest = n * signed(vector)[0]
            assert abs(honest) <= most < 2 ** (bits - 1)
            total = vector * BITS[bits](n)
            assert signed(total)[0] == honest
            mean_d = dequantise(total, scale=scale, total_weight=n, num_members=n, most=most)
            assert mean_d[0] == pytest.approx(sign * clip_norm, rel=1e-6)


@pytest.mark.parametrize("bits", [32, 64])
def test_one_member_alone_at_the_bound_of_the_type_does_not_wrap(bits: int) -> None:
    """n = 1: the bound is 2^(bits-1) - 2, and in float64 one ulp more is a wrap."""
    scale = scale_for(1, 1.0, 1, bits=bits)
    for sign, rng in ((1.0, UP), (-1.0, DOWN)):
        update_d = np.array([sign], np.float32)
        vector, _ = quantise(update_d, clip_norm=1.0, weight=1, scale=scale, dtype=BITS[bits], rng=rng)
        assert sign * signed(vector)[0] == pytest.approx(2.0 ** (bits - 1), rel=1e-9)
        assert abs(signed(vector)[0]) <= largest_sum(1, 1.0, scale, 1)


def test_a_draw_that_float64_rounds_up_is_clamped() -> None:
    """u < 1, but 2^30 + u is 2^30 + 1 once it has 53 bits."""
    assert math.floor(2.0**30 + (1 - 2.0**-32)) == 2**30 + 1
    assert quantised(1.0, clip_norm=1.0, scale=2**30, rng=UP)[0] == [2**30]


def test_a_product_that_float64_rounds_up_is_clamped() -> None:
    """-length * (scale / length) is below -scale for some lengths, and its floor a whole unit."""
    over = 0
    for length in np.random.default_rng(0).uniform(1.0, 1e6, 300).astype(np.float32).tolist():
        over += math.floor(-length * (10**9 * (1.0 / length))) < -(10**9)
        assert -quantised(-length, clip_norm=1.0, scale=10**9, rng=DOWN)[0][0] in (10**9, 10**9 - 1)
    assert over > 0


MEMBERS = st.lists(
    st.tuples(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), st.integers(0, 9), st.integers(0, 2**32)
    ),
    min_size=1,
    max_size=6,
)


def group_sum(members: list[tuple[list[float], int, int]], clip_norm: float, bits: int) -> tuple[Quantised, int, int]:
    """The masked sum as the server has it, its scale, and its weight."""
    scale = scale_for(len(members), clip_norm, 9, bits=bits)
    total: Quantised = np.zeros(4, BITS[bits])
    for update, weight, seed in members:
        rng = np.random.default_rng(seed)
        update_d = np.array(update, np.float32)
        total += quantise(update_d, clip_norm=clip_norm, weight=weight, scale=scale, dtype=BITS[bits], rng=rng)[0]
    return total, scale, sum(weight for _, weight, _ in members)


@given(MEMBERS, st.floats(1e-3, 1e3), st.sampled_from([32, 64]))
def test_sums_of_members_stay_below_the_largest(
    members: list[tuple[list[float], int, int]], clip_norm: float, bits: int
) -> None:
    total, scale, total_weight = group_sum(members, clip_norm, bits)
    most = largest_sum(total_weight, clip_norm, scale, len(members))
    assert max(abs(x) for x in signed(total)) <= most < 2 ** (bits - 1)


# ---------------------------------------------------------------- the error


def clipped_mean(members: list[tuple[list[float], int, int]], clip_norm: float) -> npt.NDArray[np.float64]:
    updates = np.array([update for update, _, _ in members], np.float32).astype(np.float64)
    norms = np.linalg.norm(updates, axis=1)
    factors = np.minimum(1, clip_norm / np.maximum(norms, 1e-300))
    weights = np.array([weight for _, weight, _ in members], np.float64)
    mean: npt.NDArray[np.float64] = weights @ (updates * factors[:, None]) / weights.sum()
    return mean


@given(MEMBERS, st.floats(1e-3, 1e3), st.sampled_from([32, 64]))
def test_the_error_of_a_mean_is_below_one_unit_over_the_mean_weight(
    members: list[tuple[list[float], int, int]], clip_norm: float, bits: int
) -> None:
    total, scale, total_weight = group_sum(members, clip_norm, bits)
    if total_weight == 0:
        return
    most = largest_sum(total_weight, clip_norm, scale, len(members))
    mean_d = dequantise(total, scale=scale, total_weight=total_weight, num_members=len(members), most=most)
    error = np.abs(mean_d - clipped_mean(members, clip_norm))
    stated = len(members) / (scale * total_weight)
    # and the result is rounded to float32, products to float64
    assert (error <= stated + 2.0**-24 * np.abs(mean_d) + 1e-14 * clip_norm).all()


def test_the_error_bound_is_nearly_reached() -> None:
    """All up by almost a unit: scale 100 and 0.12001 -> 13, three members of weight 1."""
    total = np.array([3 * quantised(0.12001, rng=UP)[0][0]], np.uint32)
    mean_d = dequantise(total, scale=100, total_weight=3, num_members=3, most=9999)
    assert 0.99 / 100 < mean_d[0] - 0.12001 < 1 / 100


@pytest.mark.parametrize("value", [0.0025, -0.0025, 0.0003, 12345.6789, -0.00999])
def test_rounding_is_unbiased(value: float) -> None:
    """The mean of 10^6 roundings, in standard errors; beyond 5 once in 10^6 seeds."""
    update_d = np.full(10**6, value, np.float32)
    vector, _ = quantise(update_d, clip_norm=2e7, weight=1, scale=100, dtype=np.uint32, rng=np.random.default_rng(11))
    exact = float(np.float32(value)) * 100
    fraction = exact - math.floor(exact)
    x = vector.view(np.int32)
    assert set(np.unique(x)) == {math.floor(exact), math.floor(exact) + 1}
    z = (x.mean() - exact) / math.sqrt(fraction * (1 - fraction) / x.size)
    assert abs(z) < 5


def test_roundings_of_neighbours_are_independent() -> None:
    """Both halves of a 64-bit draw are used: the correlation at lags 1 and 2; |z| > 5 once in 10^6 seeds."""
    update_d = np.full(10**6, 0.005, np.float32)
    vector, _ = quantise(update_d, clip_norm=2e7, weight=1, scale=100, dtype=np.uint32, rng=np.random.default_rng(2))
    x = vector.astype(np.float64) - vector.mean()
    for lag in (1, 2):
        z = (x[lag:] * x[:-lag]).mean() / x.var() * math.sqrt(x.size)
        assert abs(z) < 5


def test_one_seed_gives_the_same_bytes() -> None:
    update = np.random.default_rng(0).normal(size=200_001).astype(np.float32)
    one, two, other = (
        quantise(update, clip_norm=9.0, weight=2, scale=50, dtype=np.uint32, rng=np.random.default_rng(seed))[0]
        for seed in (4, 4, 5)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("clip_norm", [1e6, 3.0])
def test_a_long_vector_is_quantised_over_every_chunk(clip_norm: float) -> None:
    update_d = np.random.default_rng(0).normal(size=200_001).astype(np.float32)
    wide = update_d.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    vector, was_clipped = quantise(update_d, clip_norm=clip_norm, weight=2, scale=1000, dtype=np.uint32, rng=DOWN)
    assert was_clipped == (norm > clip_norm)
    exact = 2000 * wide * min(1.0, clip_norm / norm)
    assert np.abs(vector.view(np.int32) - np.floor(exact)).max() <= 1
    assert (vector.view(np.int32) == np.floor(exact)).mean() > 0.9999


# ---------------------------------------------------------------- what is refused


def test_a_scale_below_one_is_refused_with_the_numbers_and_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"1000 members, weights up to 10000, clip_norm=1000.*or 64 bits"):
        scale_for(1000, 1000.0, 10_000)
    assert scale_for(1000, 1000.0, 10_000, bits=64) > 1
    with pytest.raises(ConfigError, match="64 bits hold -"):
        scale_for(10, 1.0, 1, bits=64, noise_tail=1e30)
    assert scale_for(1, 1.0, 2**31 - 2) == 1
    with pytest.raises(ConfigError):
        scale_for(1, 1.0, 2**31 - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 16},
        {"num_members": 0},
        {"max_weight": 0},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_tail": -1.0},
        {"noise_tail": math.nan},
    ],
)
def test_impossible_settings_have_no_scale(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scale_for(**{"num_members": 2, "clip_norm": 1.0, "max_weight": 1} | wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinities"):
        quantised(1.0, value)


@pytest.mark.parametrize("update", [np.zeros(3), np.zeros((3, 1), np.float32), np.zeros(3, np.int32)])
def test_only_float32_vectors_are_quantised(update: Any) -> None:
    with pytest.raises(ValueError, match="float32 vector"):
        quantise(update, clip_norm=1.0, weight=1, scale=1, dtype=np.uint32, rng=DOWN)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float64, np.dtype(np.uint32).newbyteorder()])
def test_only_words_are_quantised_to(dtype: Any) -> None:
    with pytest.raises(ValueError, match="uint32 or uint64"):
        quantised(1.0, dtype=dtype)


@pytest.mark.parametrize("out", [np.zeros(2, np.uint32), np.zeros(3, np.uint64), np.zeros((3, 1), np.uint32)])
def test_a_result_goes_only_where_it_fits(out: Any) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        quantised(1.0, 2.0, 3.0, out=out)


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"scale": 0}, {"clip_norm": 0.0}, {"clip_norm": math.nan}])
def test_impossible_settings_quantise_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quantised(1.0, **wrong)


def test_a_scale_too_large_for_the_type_is_refused() -> None:
    assert quantised(0.5, clip_norm=1.0, scale=2**31 - 1)
    with pytest.raises(ValueError, match="do not fit uint32"):
        quantised(0.5, clip_norm=1.0, scale=2**31)
    with pytest.raises(ValueError, match="do not fit uint64"):
        quantised(0.5, clip_norm=1.0, scale=2**63, dtype=np.uint64)


@pytest.mark.parametrize("value", [601, -601, -(2**31), 2**31 - 1])
def test_a_sum_that_no_honest_members_have_is_refused(value: int) -> None:
    total = np.array([0, value % 2**32], np.uint32)
    with pytest.raises(SecAggError, match=f"out_of_range: .* 2 members is {abs(value)}, honest ones reach 600"):
        dequantise(total, scale=100, total_weight=3, num_members=2, most=600)


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"total_weight": 0}])
def test_a_mean_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dequantise(np.zeros(1, np.uint32), **{"scale": 1, "total_weight": 1, "num_members": 1, "most": 1} | wrong)
    with pytest.raises(ValueError, match="int32"):
        dequantise(np.zeros(1, np.int32), scale=1, total_weight=1, num_members=1, most=1)  # type: ignore[arg-type]
