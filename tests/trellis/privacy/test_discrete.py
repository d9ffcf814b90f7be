"""Noise of integers: small numbers by hand, the law that is drawn, its tail, what it costs, then a noised masked sum.

Statistics are at fixed seeds; with fresh ones each would fail once in the number of times that it states.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy import special, stats  # type: ignore[import-untyped]

from trellis.errors import ConfigError
from trellis.privacy import discrete
from trellis.privacy.discrete import (
    ALPHAS,
    LARGEST_VARIANCE,
    Floats,
    Integers,
    epsilon,
    epsilon_of,
    l1_sensitivity,
    l2_sensitivity,
    noise_tail,
    noise_variance_for,
    noisy_scale_for,
    rdp_skellam,
    share_variance,
    skellam,
)
from trellis.secagg.prg import keystream
from trellis.secagg.quantise import Quantised, dequantise, largest_sum, quantise, scale_for

TABLE = (0.01, 0.3, 7.0, 1000.0, 4095.0)
REJECTION = (4096.0, 1e5, 1e9, 1e14, LARGEST_VARIANCE)
NUM_DRAWS = 1_000_000


def seeded(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


@functools.cache
def draws(variance: float) -> Integers:
    return skellam(NUM_DRAWS, variance, seeded(7))


@functools.cache
def log_law(variance: float, last: int) -> Floats:
    """ln P(k) for k = -last .. last, by the ratios of Bessel functions and P's sum: nothing of the module's."""
    ratio, ratios = 0.0, np.empty(last)
    for k in range(last + 300, -1, -1):
        ratio = 1 / (2 * (k + 1) / variance + ratio)
        if k < last:
            ratios[k] = ratio
    side = np.cumsum(np.log(ratios))
    both = np.concatenate([side[::-1], [0.0], side])
    normalised: Floats = both - special.logsumexp(both)
    return normalised


def law(variance: float, last: int) -> Floats:
    return np.exp(log_law(variance, last))


def chi_square(found: Integers, variance: float) -> float:
    """The p-value of these draws: an integer a bin where 50 are expected, the rest in two; wider bins, when large."""
    if variance > 1e6:  # the normal law is within 1 / (8 v) of it
        edges = stats.norm.ppf(np.linspace(0, 1, 201))
        observed = np.histogram(found / math.sqrt(variance), edges)[0]
        return float(stats.chisquare(observed).pvalue)
    last = int(12 * math.sqrt(variance)) + 60
    expected = law(variance, last) * found.size
    inner = int(np.count_nonzero(expected >= 50)) // 2
    counts = np.bincount(np.clip(found + inner + 1, 0, 2 * inner + 2), minlength=2 * inner + 3)
    tail = expected[: last - inner].sum()
    wanted = np.concatenate([[tail], expected[last - inner : last + inner + 1], [tail]])
    if tail < 5:  # nothing but the tails is rare at variance 0.01
        counts, wanted = counts[1:-1], wanted[1:-1] * counts[1:-1].sum() / wanted[1:-1].sum()
    return float(stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue)


# ---------------------------------------------------------------- by hand


def test_shares_by_hand() -> None:
    assert share_variance(12.0, 4) == 3.0
    assert share_variance(0.0, 1) == 0.0


def test_sensitivities_by_hand() -> None:
    assert l2_sensitivity(2.0, 50, 16) == pytest.approx(104, rel=1e-9)
    assert l1_sensitivity(2.0, 50, 16) == pytest.approx(4 * 104, rel=1e-9)
    assert l1_sensitivity(0.25, 1, 1) == pytest.approx(1.25, rel=1e-9)


def test_the_divergence_by_hand() -> None:
    assert rdp_skellam(2, l1=1, l2=1, variance=10) == pytest.approx(0.1 + 9 / 400)
    assert rdp_skellam(2, l1=1, l2=1, variance=1) == pytest.approx(1 + 1.5)
    assert rdp_skellam([2, 3], l1=0, l2=0, variance=1).tolist() == [0, 0]
    assert rdp_skellam(2, l1=1, l2=1, variance=0) == math.inf


def test_the_tail_by_hand() -> None:
    """L = ln 2 + 40 ln 2 = 28.42: sqrt(200 L) + L / 3 = 75.39 + 9.47."""
    assert noise_tail(100.0, dim=1) == 84
    assert noise_tail(0.0, dim=9) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: skellam(-1, 1.0),
        lambda: skellam(1, -1.0),
        lambda: skellam(1, math.nan),
        lambda: skellam(1, 1.01 * LARGEST_VARIANCE),
        lambda: share_variance(1.0, 0),
        lambda: noise_tail(1.0, dim=0),
        lambda: noise_tail(math.inf, dim=1),
        lambda: noise_tail(1.0, dim=1, log2_probability=1),
        lambda: l2_sensitivity(0.0, 1, 1),
        lambda: l1_sensitivity(1.0, 0, 1),
        lambda: rdp_skellam(1, l1=1, l2=1, variance=1),
        lambda: rdp_skellam(2.5, l1=1, l2=1, variance=1),
        lambda: rdp_skellam(2, l1=-1, l2=1, variance=1),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- the law


def test_noise_comes_from_the_bytes_it_is_given_and_else_from_the_operating_system() -> None:
    for variance in (9.0, 1e10):
        again = [skellam(200, variance, seeded(s)).tolist() for s in (1, 1, 2)]
        assert again[0] == again[1] != again[2]
        assert skellam(200, variance).tolist() != skellam(200, variance).tolist()


def test_no_key_is_used_for_two_stretches_of_noise() -> None:
    asked: list[int] = []

    def counting(num_bytes: int) -> bytes:
        asked.append(num_bytes)
        return bytes([len(asked)]) * num_bytes

    noise_d = skellam(3 * 65536 + 1, 9.0, counting)
    assert asked == [32] * 4
    assert not np.array_equal(noise_d[:65536], noise_d[65536 : 2 * 65536])


@pytest.mark.parametrize("variance", [0.0, 5e-324, 1e-30, 9.0, 1e10])
@pytest.mark.parametrize("size", [0, 1, 65536, 65537])
def test_any_size_is_filled(size: int, variance: float) -> None:
    noise_d = skellam(size, variance, seeded(0))
    assert noise_d.shape == (size,)
    assert noise_d.dtype == np.int64
    assert size < 2 or noise_d[-2:].any() == (variance > 1)


def test_the_table_is_the_law_of_two_poissons() -> None:
    for variance in (0.01, 0.3, 7.0, 60.0):
        one = stats.poisson.pmf(np.arange(200), variance / 2)
        difference = np.convolve(one, one[::-1])[199:]  # P(k), k from 0
        tails = discrete._tails(variance)[0][::-1] / 2.0**63
        wanted = 2 * np.cumsum(difference[:0:-1])[::-1][: tails.size]
        np.testing.assert_allclose(tails, wanted, rtol=1e-12, atol=2**-62)


@pytest.mark.parametrize("variance", TABLE)
def test_the_table_is_the_law_of_bessel(variance: float) -> None:
    tails, _ = discrete._tails(variance)
    wanted = 2 * np.cumsum(special.ive(np.arange(tails.size + 150, 0, -1), variance))[150:]
    np.testing.assert_allclose(tails / 2.0**63, wanted, rtol=1e-12, atol=2**-62)


@pytest.mark.parametrize("variance", TABLE)
def test_the_guide_gives_what_a_search_in_the_table_gives(variance: float) -> None:
    tails, guide = discrete._tails(variance)
    words = keystream(bytes(range(32)), 65536, np.uint64)
    size = tails.size - np.searchsorted(tails, words >> np.uint64(1), side="right")
    assert np.array_equal(
        skellam(65536, variance, lambda n: bytes(range(n))), np.where(words & np.uint64(1), -size, size)
    )
    assert (guide >= 0).mean() > 0.98


@pytest.mark.parametrize("variance", [4096.0, 5000.0, 1e6])
def test_the_formula_is_the_law_of_bessel(variance: float) -> None:
    k = np.arange(-180, 181.0) * round(math.sqrt(variance) / 20)
    wanted = np.log(special.ive(np.abs(k), variance))
    np.testing.assert_allclose(discrete._log_probability(k, variance), wanted, rtol=0, atol=3e-11)  # scipy's own error


@pytest.mark.parametrize("variance", [4096.0, 5000.0])
def test_the_formula_is_the_law_of_the_ratios(variance: float) -> None:
    last = int(14 * math.sqrt(variance))
    found = discrete._log_probability(np.arange(-last, last + 1.0), variance)
    np.testing.assert_allclose(found, log_law(variance, last), rtol=2e-14, atol=3e-12)


@pytest.mark.parametrize("variance", REJECTION)
def test_the_formula_sums_to_one(variance: float) -> None:
    step = max(1.0, math.sqrt(variance) / 64)  # a trapezoid of a smooth bell is exact far beyond float64
    k: Floats = np.arange(-2000, 2001) * np.float64(step)
    assert step * np.exp(discrete._log_probability(k, variance)).sum() == pytest.approx(1, abs=5e-12)


@pytest.mark.parametrize("variance", [*REJECTION, 4 * 4096.0 - 1e-6, 4 * 4096.0])
def test_the_hat_covers_the_law_and_what_is_kept_at_once_lies_below_it(variance: float) -> None:
    """For every u of a fine grid and out to the last one, and any k of its block and the next ones."""
    b = 2.53 * math.sqrt(variance)
    a = 0.02483 * b
    block = 2 ** math.floor(math.log2(math.sqrt(variance) / 64))
    us = np.concatenate([np.linspace(0.5, 1e-4, 200_001), np.geomspace(1e-4, 2.0**-54, 3000)])
    x, density = (2 * a / us + b) * (0.5 - us), a / us**2 + b
    with np.errstate(divide="ignore"):
        ratios = [np.exp(discrete._log_probability(x + s * block, variance)) * density for s in (-1, 0, 1)]
    assert np.max(ratios) < discrete._HAT
    assert np.min([r[us >= 0.07] for r in ratios]) > discrete._AT_ONCE * discrete._HAT


@pytest.mark.parametrize("variance", TABLE + REJECTION)
def test_draws_follow_the_law(variance: float) -> None:
    """Chi-square over 5 to 500 bins: fails once in 1000, ten of these once in 100."""
    assert chi_square(draws(variance), variance) > 1e-3


@pytest.mark.parametrize("variance", TABLE + REJECTION)
def test_draws_have_the_moments_of_the_law(variance: float) -> None:
    """Mean 0, variance v, skewness 0, kurtosis 3 + 1 / v, no correlation with the next: each within 4.5 standard
    errors, so once in 147 000 for each, once in 2900 for all."""
    x = draws(variance).astype(np.float64)
    n = x.size
    fourth = variance + 3 * variance**2  # every even cumulant is v
    sixth = variance + 15 * variance**2 + 15 * variance**3
    assert abs(x.mean()) < 4.5 * math.sqrt(variance / n)
    assert abs((x**2).mean() - variance) < 4.5 * math.sqrt((fourth - variance**2) / n)
    assert abs((x**3).mean()) < 4.5 * math.sqrt(sixth / n)
    assert abs((x**4).mean() - fourth) < 4.5 * float(np.std(x**4)) / math.sqrt(n)
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 * variance / math.sqrt(n)


@pytest.mark.parametrize("variance", REJECTION[2:])
def test_large_draws_prefer_no_residue(variance: float) -> None:
    """A law this wide has none, to 1e-80.  Once in 1000 for each of 9."""
    for modulus in (3, 64, 1000):
        counts = np.bincount(draws(variance) % modulus, minlength=modulus)
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    "variances", [(5.0, 5.0, 5.0, 5.0), (0.1, 0.7, 3.2), (5000.0, 5000.0, 3000.0), (1e13, 3e13, 6e13)]
)
def test_a_sum_of_shares_is_noise_of_the_sum_of_variances(variances: tuple[float, ...]) -> None:
    """Chi-square: once in 1000 for each."""
    source = seeded(3)
    total = sum(skellam(NUM_DRAWS // 2, v, source) for v in variances)
    assert isinstance(total, np.ndarray)
    assert chi_square(total, sum(variances)) > 1e-3


@pytest.mark.parametrize("variance", [7.0, 4095.0, 1e14])
def test_a_million_draws_take_60_ms(variance: float) -> None:
    """Of the processor, the best of five; 20 and 40 on the machine it was written on."""
    taken = []
    for _ in range(5):
        before = time.process_time()
        skellam(1_000_000, variance)
        taken.append(time.process_time() - before)
    assert min(taken) < 0.06


# ---------------------------------------------------------------- the tail


@pytest.mark.parametrize("variance", [1e-3, 0.1, 1.0, 10.0, 100.0, 1000.0, 4000.0])
def test_the_tail_holds_exactly_at_small_variances(variance: float) -> None:
    """The probability itself, from the law; and the bound is at most 1.2 times the least one, plus 12."""
    last = int(20 * math.sqrt(variance)) + 90
    beyond = np.append(np.cumsum(law(variance, last)[::-1])[: last + 1][::-1], 0.0)  # P(X >= k), k from 0
    for dim in (1, 10, 1000, 10**6):
        for log2_probability in (-1, -10, -20, -40):
            tail = noise_tail(variance, dim=dim, log2_probability=log2_probability)
            assert 2 * dim * beyond[min(tail + 1, last)] <= 2.0**log2_probability
            least = int(np.argmax(2 * dim * beyond <= 2.0**log2_probability)) - 1
            assert tail <= 1.2 * least + 12 or log2_probability > -20


@pytest.mark.parametrize("variance", [0.3, 50.0, 1e5, 1e14])
def test_draws_do_not_leave_the_tail(variance: float) -> None:
    """At 2^-40 never, in 1e6 draws; at 2^-3 fewer than 1000 vectors in 8000 do (a bound: they are fewer)."""
    assert np.abs(draws(variance)).max() <= noise_tail(variance, dim=NUM_DRAWS)
    vectors = draws(variance).reshape(8000, 125)
    outside = np.abs(vectors).max(axis=1) > noise_tail(variance, dim=125, log2_probability=-3)
    assert np.count_nonzero(outside) <= 1000


# ---------------------------------------------------------------- sensitivity


def test_no_rounded_update_is_longer_than_the_sensitivity() -> None:
    rng = np.random.default_rng(0)
    for dim, clip_norm, scale in ((1, 0.3, 7), (50, 1.0, 1), (1000, 0.1, 1000), (3000, 2.0, 10**8)):
        l1, l2 = l1_sensitivity(clip_norm, scale, dim), l2_sensitivity(clip_norm, scale, dim)
        for spread in (1e-6, 0.01, 1.0, 100.0):
            update_d = (spread * rng.standard_normal(dim)).astype(np.float32)
            vector, _ = quantise(update_d, clip_norm=clip_norm, weight=1, scale=scale, dtype=np.uint32, rng=rng)
            x = vector.view(np.int32).astype(np.float64)
            assert np.linalg.norm(x) <= l2
            assert np.abs(x).sum() <= l1


# ---------------------------------------------------------------- what it costs


def divergence(shifts: tuple[int, ...], variance: float, alpha: int) -> float:
    """Renyi's divergence of noise from noise moved by `shifts`, summed over everything that can happen."""
    last = int(40 * math.sqrt(variance)) + 300 + 6 * alpha * max(shifts)
    total = 0.0
    for shift in shifts:
        full = log_law(variance, last + shift)
        moved, still = full[: full.size - 2 * shift], full[shift : full.size - shift]
        exponent = alpha * moved + (1 - alpha) * still
        assert max(exponent[0], exponent[-1]) < exponent.max() - 60
        total += float(special.logsumexp(exponent)) / (alpha - 1)
    return total


@pytest.mark.parametrize("variance", [0.03, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0])
def test_no_shift_diverges_more_than_the_bound(variance: float) -> None:
    for alpha in (2, 3, 5, 16, 64):
        for shift in (1, 2, 5, 20):
            bound = rdp_skellam(alpha, l1=shift, l2=shift, variance=variance)
            assert divergence((shift,), variance, alpha) <= bound


def test_no_vector_diverges_more_than_the_bound() -> None:
    for shifts in ((1, 1, 1, 1), (3, 1), (5, 2, 2, 1)):
        l1, l2 = sum(shifts), math.hypot(*shifts)
        for variance in (2.0, 30.0, 500.0):
            for alpha in (2, 8, 32):
                assert divergence(shifts, variance, alpha) <= rdp_skellam(alpha, l1=l1, l2=l2, variance=variance)


def test_divergences_of_coordinates_add() -> None:
    """Over a plane of outcomes, as a check of the check."""
    variance, alpha, last = 3.0, 4, 40
    p = law(variance, last + 2)
    still, one, two = p[2:-2], p[1:-3], p[:-4]
    plane = (np.outer(one, two) ** alpha * np.outer(still, still) ** (1 - alpha)).sum()
    assert math.log(plane) / (alpha - 1) == pytest.approx(divergence((1, 2), variance, alpha), rel=1e-9)


def test_the_bound_is_tight_and_v_is_the_variance() -> None:
    """Within 0.3 % at 1000.  Read with v as the mean of one Poisson it would promise half of what is spent."""
    for alpha in (2, 4, 16):
        for shift in (1, 3, 10):
            spent = divergence((shift,), 1000.0, alpha)
            bound = float(rdp_skellam(alpha, l1=shift, l2=shift, variance=1000.0))
            assert 0.95 * bound < spent <= bound
            assert rdp_skellam(alpha, l1=shift, l2=shift, variance=2000.0) < spent


def test_epsilon_keeps_its_promise_exactly() -> None:
    """delta(epsilon) = sum of max(0, P - e^epsilon Q), of one coordinate, once: below the delta that was asked for."""
    for variance, shift in ((2.0, 1), (50.0, 3), (400.0, 20)):
        full = law(variance, 500 + shift)
        moved, still = full[: full.size - 2 * shift], full[shift : full.size - shift]
        for delta in (1e-2, 1e-5, 1e-9):
            promised = epsilon(delta, 1, l1=shift, l2=shift, variance=variance)
            spent = np.maximum(0, moved - math.exp(promised) * still).sum()
            assert spent <= delta
            too_little = np.maximum(0, moved - math.exp(promised / 2) * still).sum()
            assert too_little > delta or variance == 2.0


def test_epsilon_of_much_noise_is_that_of_the_gaussian() -> None:
    z, rounds = 3.0, 20
    accountant = RdpAccountant(orders=[float(a) for a in ALPHAS])
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(z), rounds))
    for delta in (1e-3, 1e-6):
        found = epsilon(delta, rounds, l1=1e6, l2=1e6, variance=(z * 1e6) ** 2)
        assert found == pytest.approx(accountant.get_epsilon(delta), rel=1e-5)


def test_the_conversion_is_that_of_dp_accounting() -> None:
    for factor in (1e-3, 0.1, 2.0):
        rdp_m = factor * ALPHAS.astype(np.float64)
        wanted, _ = compute_epsilon(ALPHAS.astype(float), rdp_m, 1e-5)
        assert epsilon_of(rdp_m, 1e-5) == pytest.approx(wanted, rel=1e-12)


def test_the_grid_of_orders_loses_little() -> None:
    every = np.arange(2, 20_000)
    for variance in (10.0, 1e3, 1e5, 1e6):
        fine = epsilon(1e-5, 10, l1=5, l2=3, variance=variance, alphas=every)
        assert fine <= epsilon(1e-5, 10, l1=5, l2=3, variance=variance) + 1e-12 <= 1.001 * fine + 1e-12


def test_epsilon_is_monotone() -> None:

    def spent(delta: float = 1e-5, rounds: int = 10, l1: float = 30, l2: float = 10, variance: float = 400) -> float:
        return epsilon(delta, rounds, l1=l1, l2=l2, variance=variance)

    assert 0 == spent(rounds=0) < spent(rounds=9) < spent() < spent(delta=1e-6)
    assert spent(variance=401) < spent() < spent(l1=31) < spent(l1=31, l2=10.1)
    assert spent(variance=0) == math.inf
    curve = [spent(variance=v) for v in np.geomspace(1e-3, 1e12, 200)]
    assert curve == sorted(curve, reverse=True)


def test_rounds_of_different_noise_add_their_divergences() -> None:
    kinds = [(3, 100.0), (2, 900.0)]
    rdp_m = sum(n * rdp_skellam(ALPHAS, l1=5, l2=3, variance=v) for n, v in kinds)
    together = epsilon_of(np.asarray(rdp_m), 1e-5)
    assert epsilon(1e-5, 3, l1=5, l2=3, variance=100.0) < together < epsilon(1e-5, 5, l1=5, l2=3, variance=100.0)


@pytest.mark.parametrize("target", [1e-3, 0.5, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("rounds", [1, 200])
def test_the_least_noise_keeps_the_budget_and_little_less_does_not(rounds: int, target: float) -> None:
    for dim, scale in ((1, 1), (1000, 100), (10**6, 10**7)):
        l1, l2 = l1_sensitivity(1.0, scale, dim), l2_sensitivity(1.0, scale, dim)
        variance = noise_variance_for(target, 1e-6, rounds, l1, l2)
        assert epsilon(1e-6, rounds, l1=l1, l2=l2, variance=variance) <= target
        assert epsilon(1e-6, rounds, l1=l1, l2=l2, variance=variance * (1 - 3e-6)) > target


def test_what_no_noise_can_keep_is_refused() -> None:
    assert noise_variance_for(1.0, 1e-5, 1, 0.0, 0.0) == 0
    for target, delta, rounds in ((1e-7, 1e-12, 1), (0.0, 1e-5, 1), (1.0, 0.0, 1), (1.0, 1.0, 1), (1.0, 1e-5, 0)):
        with pytest.raises(ConfigError):
            noise_variance_for(target, delta, rounds, 1.0, 1.0)
    with pytest.raises(ConfigError, match="rounds=-1"):
        epsilon(1e-5, -1, l1=1, l2=1, variance=1)


# ---------------------------------------------------------------- room for the noise, and the whole story


def multiplier(z: float) -> Callable[[float, float], float]:
    return lambda l1, l2: (z * l2) ** 2


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    ("n", "t", "clip_norm", "weight", "dim", "z"),
    [(3, 2, 1.0, 1, 10, 0.5), (10, 6, 0.3, 4, 10**6, 2.0), (50, 26, 5.0, 1, 1000, 1.0)],
)
def test_the_scale_is_the_largest_that_leaves_room_for_its_noise(
    n: int, t: int, clip_norm: float, weight: int, dim: int, z: float, bits: int
) -> None:
    def share_and_room(scale: int) -> tuple[float, int]:
        share = (z * l2_sensitivity(weight * clip_norm, scale, dim)) ** 2 / t
        return share, scale_for(n, clip_norm, weight, bits=bits, noise_tail=noise_tail(share, dim=dim))

    scale, share = noisy_scale_for(
        n, clip_norm, weight, dim=dim, num_contributing=t, variance_for=multiplier(z), bits=bits
    )
    assert share == pytest.approx(share_and_room(scale)[0], rel=1e-12)
    assert scale <= share_and_room(scale)[1]
    too_much, too_little = share_and_room(scale + 1)
    assert too_much > LARGEST_VARIANCE if bits == 64 else too_little < scale + 1
    most = largest_sum(n * weight, clip_norm, scale, n) + n * noise_tail(share, dim=dim)
    assert most < 2 ** (bits - 1)


def test_where_noise_leaves_no_room_it_says_so() -> None:
    with pytest.raises(ConfigError, match="noise_tail"):
        noisy_scale_for(10, 1.0, 1, dim=10, num_contributing=6, variance_for=multiplier(3e7))
    with pytest.raises(ConfigError, match="noise of variance"):
        noisy_scale_for(10, 1.0, 1, dim=10, num_contributing=6, variance_for=multiplier(1e10), bits=64)


def noised_sum(updates: list[Floats], scale: int, share: float, seed: int, dtype: Any) -> Quantised:
    """What a server unmasks: each update quantised, noised, added mod 2^bits."""
    source, rng = seeded(seed), np.random.default_rng(seed)
    total: Quantised = np.zeros(updates[0].size, dtype)
    for update_d in updates:
        vector, _ = quantise(update_d.astype(np.float32), clip_norm=1.0, weight=1, scale=scale, dtype=dtype, rng=rng)
        vector += skellam(vector.size, share, source).astype(dtype)
        total += vector
    return total


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_noised_sum_is_the_mean_with_the_noise_that_was_asked_for(dtype: Any) -> None:
    """Five nodes, three survive.  The errors of 200 000 coordinates have mean 0 and the variance of the survivors'
    noise within 4.5 standard errors, once in 74 000; they are on both sides of every update's sign."""
    dim, n, survivors = 200_000, 5, 3
    scale, share = noisy_scale_for(
        n,
        1.0,
        1,
        dim=dim,
        num_contributing=survivors,
        variance_for=lambda l1, l2: noise_variance_for(4.0, 1e-5, 50, l1, l2),
        bits=8 * np.dtype(dtype).itemsize,
    )
    rng = np.random.default_rng(1)
    updates = [rng.standard_normal(dim) for _ in range(survivors)]
    updates = [u / np.linalg.norm(u) for u in updates]
    total_d = noised_sum(updates, scale, share, 5, dtype)
    most = largest_sum(survivors, 1.0, scale, survivors) + survivors * noise_tail(share, dim=dim)
    mean_d = dequantise(total_d, scale=scale, total_weight=survivors, num_members=survivors, most=most)
    errors = (mean_d - np.mean(updates, axis=0)) * scale * survivors
    std = math.sqrt(survivors * share)
    assert std > 1e4  # rounding and float32 are nothing beside it
    assert abs(errors.mean()) < 4.5 * std / math.sqrt(dim)
    assert abs((errors**2).mean() / std**2 - 1) < 4.5 * math.sqrt(2 / dim)
    assert abs((errors * np.sign(updates[0])).mean()) < 4.5 * std / math.sqrt(dim)
    l1, l2 = l1_sensitivity(1.0, scale, dim), l2_sensitivity(1.0, scale, dim)
    assert epsilon(1e-5, 50, l1=l1, l2=l2, variance=std**2) <= 4.0


@pytest.mark.parametrize("sign", [1, -1])
def test_noised_members_all_at_the_bound_do_not_wrap(sign: int) -> None:
    """All length in one coordinate, 1000 rounds; then noise at its very tail."""
    for n in (2, 3, 10, 50):
        scale, share = noisy_scale_for(n, 1.0, 1, dim=1000, num_contributing=n, variance_for=multiplier(1.0))
        tail = noise_tail(share, dim=1000)
        at_bound = np.full(1000, sign * math.ceil(scale), np.int64)
        sums = sum(at_bound + skellam(1000, share, seeded(n + i)) for i in range(n))
        assert isinstance(sums, np.ndarray)
        assert np.array_equal(sums.astype(np.uint32).view(np.int32), sums)
        extreme = np.array([n * sign * (scale + tail)])
        assert np.array_equal(extreme.astype(np.uint32).view(np.int32), extreme)
