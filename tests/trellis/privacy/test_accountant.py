"""The accountant: exact where the truth is known, above it everywhere, and never much.

`python tests/trellis/privacy/test_accountant.py` writes golden.json anew, after a change that is meant.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from trellis.errors import BudgetError, ConfigError
from trellis.privacy.accountant import Entry, epsilon, epsilon_rdp, noise_multiplier_for, warn_delta

GOLDEN = Path(__file__).with_name("golden.json")

ENTRIES = st.builds(
    Entry,
    noise_multiplier=st.sampled_from([0.8, 1.0, 2.5]),
    sample_rate=st.sampled_from([0.02, 0.25, 1.0]),
    steps=st.integers(0, 40),
)


def root(delta_of: Callable[[float], float], delta: float) -> float:
    """The least epsilon >= 0 at which a decreasing delta is small enough."""
    if delta_of(0.0) <= delta:
        return 0.0
    above = 1.0
    while delta_of(above) > delta:
        above *= 2
    return float(brentq(lambda e: delta_of(e) - delta, 0, above, xtol=1e-12))


def epsilon_analytic_gaussian(sigma: float, delta: float, steps: int) -> float:
    """Balle & Wang, ICML 2018, Theorem 8, for steps of sensitivity 1: one of sensitivity sqrt(steps)."""
    mu = math.sqrt(steps) / sigma
    return root(
        lambda e: float(norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu))),
        delta,
    )


def epsilon_of_one_step(sigma: float, q: float, delta: float) -> float:
    """A step on a sample, its delta by hand: the tail beyond the point where the losses are epsilon."""

    def removed(e: float) -> float:
        x = sigma**2 * math.log1p(math.expm1(e) / q) + 0.5
        return float((1 - q) * norm.sf(x, scale=sigma) + q * norm.sf(x - 1, scale=sigma)) - float(
            math.exp(e + norm.logsf(x, scale=sigma))
        )

    def added(e: float) -> float:
        if e >= -math.log1p(-q):
            return 0.0
        x = sigma**2 * math.log1p(math.expm1(-e) / q) + 0.5
        mixed = (1 - q) * norm.cdf(x, scale=sigma) + q * norm.cdf(x - 1, scale=sigma)
        return float(norm.cdf(x, scale=sigma) - math.exp(e) * mixed)

    return root(lambda e: max(removed(e), added(e)), delta)


def epsilon_of_two_steps(sigma: float, q: float, delta: float) -> float:
    """By adding up what lies above e^epsilon times the other density, on a square."""
    x, width = np.linspace(-8 * sigma, 8 * sigma + 1, 1001, retstep=True)
    without = norm.pdf(x, scale=sigma) * width
    mixed = (1 - q) * without + q * norm.pdf(x - 1, scale=sigma) * width
    both_without, both_mixed = np.multiply.outer(without, without), np.multiply.outer(mixed, mixed)
    return max(
        root(lambda e: float(np.maximum(both_mixed - math.exp(e) * both_without, 0).sum()), delta),
        root(lambda e: float(np.maximum(both_without - math.exp(e) * both_mixed, 0).sum()), delta),
    )


# ------------------------------------------------------------ by hand


def test_nothing_spent_is_nothing() -> None:
    assert epsilon([], 1e-5) == epsilon_rdp([], 1e-5) == 0
    assert epsilon([Entry(1.0, 0.1, 0), Entry(0.0, 1.0, 0)], 1e-5) == 0


def test_a_step_without_noise_is_without_privacy() -> None:
    for rate in (0.1, 1.0):
        assert epsilon([Entry(5.0, 0.1, 3), Entry(0.0, rate, 1)], 1e-5) == math.inf
        assert epsilon_rdp([Entry(0.0, rate, 1)], 1e-5) == math.inf


def test_plain_steps_are_one_step_by_hand() -> None:
    """1 / 0.6^2 + 1 / 0.8^2 = 1 / 0.48^2"""
    assert epsilon([Entry(0.6, 1.0, 1), Entry(0.8, 1.0, 1)], 1e-5) == pytest.approx(
        epsilon([Entry(0.48, 1.0, 1)], 1e-5)
    )
    assert epsilon([Entry(3.0, 1.0, 9)], 1e-5) == epsilon([Entry(1.0, 1.0, 1)], 1e-5)


# ------------------------------------------------------------ against the truth


@pytest.mark.parametrize("sigma", [0.3, 0.7, 2.0, 10.0, 60.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_plain_gaussian_steps_are_exact_to_a_hundredth(sigma: float, delta: float, steps: int) -> None:
    exact = epsilon_analytic_gaussian(sigma, delta, steps)
    assert exact * (1 - 1e-9) <= epsilon([Entry(sigma, 1.0, steps)], delta) <= 1.01 * exact + 1e-9


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("q", [0.001, 0.03, 0.5, 0.95])
@pytest.mark.parametrize("delta", [1e-8, 1e-4])
def test_one_sampled_step_is_exact_to_a_hundredth(sigma: float, q: float, delta: float) -> None:
    exact = epsilon_of_one_step(sigma, q, delta)
    assert exact * (1 - 1e-7) <= epsilon([Entry(sigma, q, 1)], delta) <= 1.01 * exact + 1e-9


@pytest.mark.parametrize(("sigma", "q", "delta"), [(1.0, 0.1, 1e-5), (0.7, 0.3, 1e-4), (3.0, 0.05, 1e-4)])
def test_two_sampled_steps_are_exact_to_a_hundredth(sigma: float, q: float, delta: float) -> None:
    exact = epsilon_of_two_steps(sigma, q, delta)
    assert exact * (1 - 1e-4) <= epsilon([Entry(sigma, q, 2)], delta) <= 1.01 * exact


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "published"),
    [
        # Abadi et al., CCS 2016, section 3.2: the moments accountant.  https://arxiv.org/abs/1607.00133
        (4.0, 0.01, 10_000, 1.26),
        # TensorFlow Privacy, tutorials/README.md: MNIST, 60,000 rows in batches of 256, by Rényi's bound
        (1.12, 256 / 60_000, 60 * 60_000 // 256, 2.92),
        (0.6, 256 / 60_000, 30 * 60_000 // 256, 9.74),
        (1.2, 256 / 60_000, 10 * 60_000 // 256, 1.20),
    ],
)
def test_published_bounds_are_not_exceeded(sigma: float, q: float, steps: int, published: float) -> None:
    found = epsilon([Entry(sigma, q, steps)], 1e-5)
    assert 0.5 * published < found <= published


GRID = [
    *([Entry(sigma, q, steps)] for sigma in (0.5, 1.0, 4.0) for q, steps in ((0.001, 5000), (0.05, 300), (0.5, 20))),
    [Entry(1.0, 0.032, 1600)],
    [Entry(1.1, 0.1, 40), Entry(0.9, 0.2, 10), Entry(2.0, 1.0, 1)],
]


@pytest.mark.parametrize("entries", GRID, ids=str)
def test_renyi_is_above(entries: list[Entry]) -> None:
    for delta in (1e-7, 1e-4):
        assert epsilon(entries, delta) <= 1.005 * epsilon_rdp(entries, delta)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entries", GRID[2:], ids=str)  # the first two take it 3 s each
def test_opacus_finds_the_same(entries: list[Entry]) -> None:
    """Its PRV accountant gives the upper end of an interval of 0.01 to either side."""
    from opacus.accountants import PRVAccountant

    opacus = PRVAccountant()
    opacus.history = [(entry.noise_multiplier, entry.sample_rate, entry.steps) for entry in entries]
    upper = opacus.get_epsilon(1e-5, eps_error=0.01)
    assert abs(epsilon(entries, 1e-5) - upper) <= max(0.01 * upper, 0.02)


# ------------------------------------------------------------ laws


@settings(max_examples=8)
@given(st.lists(ENTRIES, max_size=6), st.randoms(use_true_random=False))
def test_order_and_division_into_rounds_do_not_matter(entries: list[Entry], random: object) -> None:
    rounds = [
        Entry(e.noise_multiplier, e.sample_rate, n) for e in entries for n in (e.steps // 3, e.steps - e.steps // 3)
    ]
    random.shuffle(rounds)  # type: ignore[attr-defined]
    assert epsilon(rounds, 1e-5) == epsilon(entries, 1e-5)


@settings(max_examples=8)
@given(st.lists(ENTRIES, min_size=1, max_size=4), st.integers(0, 3))
def test_more_steps_never_cost_less(entries: list[Entry], which: int) -> None:
    more = entries[which % len(entries)]
    with_more = [*entries, Entry(more.noise_multiplier, more.sample_rate, 1)]
    for delta in (1e-7, 1e-3):
        assert epsilon(entries, delta) <= epsilon(with_more, delta) * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-6, 1e-9, 1e-11])
def test_more_steps_never_cost_less_where_the_grid_widens_and_where_rounding_ends_it(delta: float) -> None:
    costs = [epsilon([Entry(1.0, 0.05, steps)], delta) for steps in (1, 10, 99, 100, 101, 10**3, 10**4, 10**5, 10**6)]
    assert costs == sorted(costs)
    assert all(map(math.isfinite, costs))


def test_where_rounding_would_tell_renyi_is_asked() -> None:
    """2e-15 a step: for 10^5 steps a fifth of a delta of 1e-9, a fiftieth of one of 1e-8."""
    entries = [Entry(4.0, 0.01, 10**5)]
    assert epsilon(entries, 1e-9) == epsilon_rdp(entries, 1e-9)
    assert epsilon(entries, 1e-8) < 0.95 * epsilon_rdp(entries, 1e-8)


def test_more_noise_fewer_rows_and_a_greater_delta_cost_less() -> None:
    base = epsilon([Entry(1.0, 0.1, 100)], 1e-5)
    assert epsilon([Entry(1.1, 0.1, 100)], 1e-5) < base
    assert epsilon([Entry(1.0, 0.09, 100)], 1e-5) < base
    assert epsilon([Entry(1.0, 0.1, 100)], 2e-5) < base


@pytest.mark.parametrize(
    ("entry", "delta"),
    [
        (Entry(1e300, 1.0, 1000), 1e-5),
        (Entry(1e6, 1e-12, 10**6), 1e-5),
        (Entry(1.0, 0.01, 10**9), 1e-5),
        (Entry(1.0, 1e-6, 10**4), 1e-5),
        (Entry(1e-300, 0.5, 1), 1e-5),
        (Entry(1e-3, 0.5, 10**5), 1e-5),
        (Entry(0.01, 1.0, 10), 1e-5),
        (Entry(1.0, 1 - 1e-12, 3), 1e-5),
        (Entry(0.5140939897810934, 0.23130823796327257, 7101), 0.254206288736278),
        (Entry(1.0, 0.1, 10), 1e-300),
        (Entry(1.0, 0.1, 10), 1 - 1e-9),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_extreme_numbers_are_answered_in_time(entry: Entry, delta: float) -> None:
    epsilon([Entry(1.0, 0.5, 1)], 0.1)
    started = time.process_time()
    found = epsilon([entry], delta)
    assert time.process_time() - started < 2
    assert 0 <= found <= epsilon_rdp([entry], delta) * 1.01


def test_a_thousand_rounds_cost_no_more_than_one() -> None:
    epsilon([Entry(1.0, 0.5, 1)], 0.1)
    started = time.process_time()
    spent = epsilon([Entry(1.2, 0.02, 30)] * 1000, 1e-5)
    assert time.process_time() - started < 0.3
    assert spent == epsilon([Entry(1.2, 0.02, 30_000)], 1e-5)


# ------------------------------------------------------------ planning


@pytest.mark.parametrize(
    ("target", "q", "steps", "spent"),
    [
        (8.0, 0.032, 1600, ()),
        (0.5, 0.2, 50, ()),
        (3.0, 1.0, 10, ()),
        (3.0, 0.1, 100, (Entry(1.5, 0.02, 30), Entry(20.0, 1.0, 2))),
        (60.0, 0.01, 5, ()),
    ],
)
def test_the_noise_suffices_and_a_little_less_does_not(
    target: float, q: float, steps: int, spent: tuple[Entry, ...]
) -> None:
    noise = noise_multiplier_for(target, 1e-5, sample_rate=q, steps=steps, spent=spent)
    assert epsilon([*spent, Entry(noise, q, steps)], 1e-5) <= target
    assert epsilon([*spent, Entry(noise / 1.0015, q, steps)], 1e-5) > target


def test_a_plan_is_kept_to_its_last_step() -> None:
    spent = [Entry(1.3, 0.05, 200)]
    noise = noise_multiplier_for(4.0, 1e-5, sample_rate=0.1, steps=30, spent=spent)
    assert all(epsilon([*spent, Entry(noise, 0.1, done)], 1e-5) <= 4.0 for done in (0, 1, 14, *range(25, 31)))


def test_nodes_of_85_and_86_rows_need_different_noise() -> None:
    """Batches of 17: five a round or six, the rates 1/5 and 1/6 (facts: the noise of the first gave 8.80 for 8)."""
    five = noise_multiplier_for(8.0, 1e-3, sample_rate=1 / 5, steps=50)
    six = noise_multiplier_for(8.0, 1e-3, sample_rate=1 / 6, steps=60)
    assert abs(five - six) > 0.01


def test_what_is_spent_may_leave_nothing() -> None:
    spent = [Entry(1.0, 0.1, 200)]
    with pytest.raises(BudgetError, match=r"epsilon \d+\.\d+ is spent .* budget is 2: nothing is left"):
        noise_multiplier_for(2.0, 1e-5, sample_rate=0.1, steps=1, spent=spent)
    exactly = epsilon(spent, 1e-5)
    with pytest.raises(BudgetError, match="any noise up to 10000; plan fewer"):
        noise_multiplier_for(exactly, 1e-5, sample_rate=1.0, steps=10**6, spent=spent)
    assert noise_multiplier_for(exactly, 1e-5, sample_rate=1.0, steps=0, spent=spent) == 0


def test_no_noise_is_enough_for_a_very_small_budget() -> None:
    with pytest.raises(BudgetError, match="1000 more steps"):
        noise_multiplier_for(1e-3, 1e-9, sample_rate=1.0, steps=1000)


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, -1),
        (1.0, 0.1, 1.5),
        (1.0, 0.1, True),
    ],
)
def test_an_entry_that_is_none_is_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        Entry(noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    for ask in (epsilon, epsilon_rdp):
        with pytest.raises(ConfigError, match="delta is"):
            ask([Entry(1.0, 0.1, 1)], delta)
    with pytest.raises(ConfigError, match="delta is"):
        noise_multiplier_for(1.0, delta, sample_rate=0.1, steps=1)
    with pytest.raises(ConfigError, match="delta is"):
        warn_delta(delta, 10)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="epsilon is"):
        noise_multiplier_for(target, 1e-5, sample_rate=0.1, steps=1)


def test_a_plan_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_rate is 0"):
        noise_multiplier_for(1.0, 1e-5, sample_rate=0, steps=1)
    with pytest.raises(ConfigError, match="steps is -1"):
        noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=-1)
    with pytest.raises(ConfigError, match="tolerance is 0"):
        noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=1, tolerance=0)


def test_a_delta_that_publishes_a_row_is_warned_of() -> None:
    assert warn_delta(1e-5, 85) is None
    assert warn_delta(0.01, 99) is None
    said = warn_delta(0.01, 100)
    assert said is not None
    assert "delta is 0.01, and 1 / 100 rows is 0.01" in said
    assert "take 0.001 or less" in said


# ------------------------------------------------------------ what was found before

PLANS = [
    ([Entry(1.0, 0.032, 1600)], 1e-5),
    ([Entry(4.0, 0.01, 10_000)], 1e-5),
    ([Entry(1.1, 0.2, 50)], 1e-3),
    ([Entry(0.6, 0.1, 100)], 1e-6),
    ([Entry(0.3, 0.001, 100)], 1e-5),
    ([Entry(2.0, 0.5, 100)], 1e-8),
    ([Entry(10.0, 1e-4, 10**5)], 1e-5),
    ([Entry(1.0, 0.01, 10**6)], 1e-5),
    ([Entry(1.0, 1.0, 1)], 1e-5),
    ([Entry(8.0, 1.0, 40), Entry(60.0, 1.0, 3)], 1e-7),
    ([Entry(1.1, 0.1, 40), Entry(0.9, 0.2, 10), Entry(20.0, 1.0, 5)], 1e-5),
    ([Entry(1.0, 0.1, 10)], 1e-14),
    ([Entry(1.0, 0.01, 10**8)], 1e-5),
]


def test_the_numbers_are_those_of_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert [(case["entries"], case["delta"]) for case in golden] == [
        (_bare(entries), delta) for entries, delta in PLANS
    ]
    for case, (entries, delta) in zip(golden, PLANS, strict=True):
        assert epsilon(entries, delta) == pytest.approx(case["epsilon"], rel=1e-6)


def _bare(entries: list[Entry]) -> list[list[float]]:
    return [[entry.noise_multiplier, entry.sample_rate, entry.steps] for entry in entries]


if __name__ == "__main__":
    cases = [{"entries": _bare(e), "delta": delta, "epsilon": epsilon(e, delta)} for e, delta in PLANS]
    GOLDEN.write_text("[\n" + ",\n".join("  " + json.dumps(case) for case in cases) + "\n]\n")
