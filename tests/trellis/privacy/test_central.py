"""Noise at the server: by hand, its law, then a clip norm that finds the quantile it is sent for.

Statistics are at fixed seeds; with fresh ones each would fail once in the number of times that it states.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats  # type: ignore[import-untyped]

from trellis.errors import ConfigError
from trellis.privacy.central import gaussian_noise, next_clip, noise_split, noisy_fraction, std_for

# ---------------------------------------------------------------- by hand


def test_the_deviation_by_hand() -> None:
    assert std_for(1.5, 2.0, 1.0, 10) == pytest.approx(0.3)
    assert std_for(1.5, 2.0, 1 / 10, 1) == pytest.approx(0.3)  # a mean's RuleSpec.sensitivity(10)
    assert std_for(0.0, 2.0, 1.0, 10) == 0


def test_the_next_clip_by_hand() -> None:
    assert next_clip(2.0, 0.5, target=0.5, learning_rate=0.2) == 2.0
    assert next_clip(2.0, 1.0, target=0.5, learning_rate=0.2) == pytest.approx(2 * math.exp(-0.1))
    assert next_clip(2.0, 0.0, target=0.5, learning_rate=0.2) == pytest.approx(2 * math.exp(0.1))


def test_the_split_by_hand() -> None:
    """1 / 0.64 = 1 / z^2 + 1 / 1^2 has z = 4 / 3: 25 / 16 - 16 / 16 = 9 / 16."""
    assert noise_split(0.8, 0.5) == pytest.approx(4 / 3)
    assert noise_split(0.0, 0.5) == 0
    assert noise_split(1.0, 1e9) == pytest.approx(1.0)
    assert noise_split(1e-200, 1.0) == pytest.approx(1e-200)


def test_the_fraction_by_hand() -> None:
    rng = np.random.default_rng(0)
    assert noisy_fraction(3, 10, 10, sigma_b=0, rng=rng) == pytest.approx(0.3)
    assert noisy_fraction(3, 4, 10, sigma_b=0, rng=rng) == pytest.approx((3 - 2) / 10 + 0.5)
    assert noisy_fraction(0, 0, 10, sigma_b=0, rng=rng) == 0.5  # who is silent says neither


def test_one_node_moves_the_count_by_a_half() -> None:
    rng = np.random.default_rng(0)
    without = noisy_fraction(3, 8, 10, sigma_b=0, rng=rng)
    for below in (0, 1):
        moved = noisy_fraction(3 + below, 9, 10, sigma_b=0, rng=rng) - without
        assert abs(moved) == pytest.approx(0.5 / 10)


def test_a_count_that_spends_it_all_is_refused() -> None:
    for z, sigma_b in ((1.0, 0.5), (1.0, 0.4), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="larger sigma_b"):
            noise_split(z, sigma_b)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_noise(3, -1.0, np.random.default_rng(0)),
        lambda: gaussian_noise(3, math.nan, np.random.default_rng(0)),
        lambda: std_for(-1.0, 1.0, 1.0, 1),
        lambda: std_for(1.0, 0.0, 1.0, 1),
        lambda: std_for(1.0, math.inf, 1.0, 1),
        lambda: std_for(1.0, 1.0, 1.0, 0),
        lambda: next_clip(0.0, 0.5, target=0.5, learning_rate=0.2),
        lambda: next_clip(1.0, 0.5, target=1.5, learning_rate=0.2),
        lambda: next_clip(1.0, 0.5, target=0.5, learning_rate=0.0),
        lambda: next_clip(1.0, math.nan, target=0.5, learning_rate=0.2),
        lambda: next_clip(1.0, -1e6, target=0.5, learning_rate=0.2),
        lambda: next_clip(1.0, 1e6, target=0.5, learning_rate=0.2),
        lambda: noise_split(-1.0, 1.0),
        lambda: noise_split(1.0, math.nan),
        lambda: noisy_fraction(3, 2, 10, sigma_b=1, rng=np.random.default_rng(0)),
        lambda: noisy_fraction(0, 0, 0, sigma_b=1, rng=np.random.default_rng(0)),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object]) -> None:
    with np.errstate(over="ignore"), pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- noise


def test_noise_is_normal_with_the_deviation_that_was_asked_for() -> None:
    """Kolmogorov and Smirnov on 100 000 draws: once in 1000."""
    noise_d = gaussian_noise(100_000, 0.25, np.random.default_rng(0))
    assert noise_d.dtype == np.float64
    assert stats.kstest(noise_d, "norm", args=(0, 0.25)).pvalue > 1e-3
    assert not gaussian_noise(5, 0.0, np.random.default_rng(0)).any()


def test_the_fraction_is_unbiased_with_noise_sigma_b_over_n() -> None:
    """4.5 standard errors of 20 000 draws: once in 74 000 for both."""
    rng = np.random.default_rng(0)
    found = np.array([noisy_fraction(30, 50, 50, sigma_b=5, rng=rng) for _ in range(20_000)])
    assert abs(found.mean() - 0.6) < 4.5 * 0.1 / math.sqrt(20_000)
    assert abs(found.var() / 0.01 - 1) < 4.5 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize(("z", "sigma_b"), [(0.5, 1.0), (1.0, 0.6), (1.0, 5.0), (4.0, 2.5)])
def test_both_queries_spend_what_the_multiplier_alone_would(z: float, sigma_b: float) -> None:
    def spent(event: DpEvent) -> float:
        accountant = RdpAccountant()
        accountant.compose(event)
        return float(accountant.get_epsilon(1e-5))

    together = ComposedDpEvent([GaussianDpEvent(noise_split(z, sigma_b)), GaussianDpEvent(2 * sigma_b)])
    assert spent(together) == pytest.approx(spent(GaussianDpEvent(z)), rel=1e-9)


# ---------------------------------------------------------------- the clip norm


def clips(
    start: float, *, target: float, num_rounds: int, num_nodes: int, sigma_b: float, seed: int, growth: float = 1.0
) -> list[float]:
    """C of each round, over updates of log-normal length (median 1, times `growth` a round)."""
    rng = np.random.default_rng(seed)
    clip, found = start, []
    for number in range(num_rounds):
        norms = rng.lognormal(0.0, 0.5, num_nodes) * growth**number
        fraction = noisy_fraction(int((norms <= clip).sum()), num_nodes, num_nodes, sigma_b=sigma_b, rng=rng)
        clip = next_clip(clip, fraction, target=target, learning_rate=0.2)
        found.append(clip)
    return found


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("sigma_b", [0.0, 5.0])
def test_the_clip_norm_converges_to_the_quantile(sigma_b: float, start: float, target: float) -> None:
    """The last 200 of 700 rounds of 100 nodes stay about the log-normal's quantile: the mean of ln C within 0.1.

    From 1e-3 towards the tenth percentile a step is 0.2 * 0.1 in ln C at most, 320 rounds.
    """
    found = clips(start, target=target, num_rounds=700, num_nodes=100, sigma_b=sigma_b, seed=1)
    quantile = 0.5 * float(stats.norm.ppf(target))
    settled = np.log(found[-200:])
    assert abs(settled.mean() - quantile) < 0.1
    assert np.abs(settled - quantile).max() < 0.4


def test_the_clip_norm_is_within_a_tenth_after_sixty_rounds_without_noise() -> None:
    """The median, from a tenth of it and from ten times it: a step is 0.1 at most."""
    for start in (0.1, 10.0):
        found = clips(start, target=0.5, num_rounds=60, num_nodes=10_000, sigma_b=0.0, seed=2)
        assert abs(math.log(found[-1])) < 0.1


def test_the_clip_norm_follows_updates_that_grow_and_shrink() -> None:
    for growth in (0.99, 1.01):
        found = clips(1.0, target=0.5, num_rounds=300, num_nodes=1000, sigma_b=20.0, seed=3, growth=growth)
        assert abs(math.log(found[-1] / growth**300)) < 0.2
