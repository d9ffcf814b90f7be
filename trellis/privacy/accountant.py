"""What has been spent: epsilon at a delta, of steps of the Poisson-subsampled Gaussian mechanism.

A step adds Gaussian noise of standard deviation noise_multiplier * clip_norm to a sum of rows, each clipped to
clip_norm and taken with probability sample_rate.  Neighbours differ in one row that is added or removed.  Every number
here is an upper bound: distributions of the privacy loss are rounded so that they dominate the true one, and composed
by FFT.

    Koskela, Jälkö, Honkela, AISTATS 2020.  https://arxiv.org/abs/1906.03049
    Doroshenko, Ghazi, Kamath, Kumar, Manurangsi ("connect the dots"), PoPETs 2022.  https://arxiv.org/abs/2207.04380

The grid.  Rounding to a grid of width h adds at most h^2 / 4 to the variance of a step's loss, so h is a tenth of the
least standard deviation of any step, or less: epsilon is at most 0.5 % too large (measured, epsilon below 1000).  Time
stays bounded because h is widened where the loss of one step would span more than 2^14 points, or the deviation of all
steps more than 2^12: a wider grid loosens the bound, and it stays one.  h is a power of two that more of the same steps
only widen, and every point of a wide grid is on a narrow one: more steps never cost less.

Rounding errors of the FFT grow with the number of steps (2e-16 a step were measured).  Ten times that is taken off
delta.  Where it would be a tenth of delta, and where h would be above 64, Rényi's bound is given instead; where h was
widened, the lesser of the two (Mironov, CSF 2017, https://arxiv.org/abs/1702.07476).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from trellis.errors import BudgetError, ConfigError

# dp_accounting is imported where it is called: it brings scipy.stats, 1.3 s, and a ledger is read without it.

MOST_NOISE = 1e4
LEAST_NOISE = 2.0**-7
"""Noise multipliers outside are not looked for: epsilon is in the thousands below, and nothing is learned above."""

STEP_POINTS = 2**14
TOTAL_POINTS = 2**12
FINEST, WIDEST = 2.0**-20, 64.0
ROUNDING = 2e-15

COUNTED_NOISE = (1e-4, 1e6)
COUNTED_RATE = 1e-9
"""Less noise counts as none, more as the most, a smaller rate as the least: each costs no less, and floats carry it."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """`steps` of the Gaussian mechanism on a Poisson sample.  A sample_rate of 1 is every row: the plain mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0,
            f"noise_multiplier is {self.noise_multiplier}; it must be at least 0, and finite",
        )
        _require_rate(self.sample_rate)
        _require_steps(self.steps)


# ------------------------------------------------------------ what was spent


def epsilon(entries: Iterable[Entry], delta: float) -> float:
    """The least epsilon known to hold at this delta, an upper bound.  Nothing spent: 0; a step without noise: inf."""
    _require_delta(delta)
    merged = _merged(entries)
    return _epsilon(merged, float(delta)) if _is_finite(merged) else math.inf


def epsilon_rdp(entries: Iterable[Entry], delta: float) -> float:
    """The same by Rényi divergences: looser, and computed without a grid.  A check on `epsilon`."""
    _require_delta(delta)
    merged = _merged(entries)
    return _epsilon_rdp(merged, float(delta)) if _is_finite(merged) else math.inf


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    *,
    sample_rate: float,
    steps: int,
    spent: Iterable[Entry] = (),
    tolerance: float = 1e-3,
) -> float:
    """The least noise with which these steps, on top of what is spent, stay within the target.

    epsilon((*spent, Entry(result, sample_rate, steps)), delta) <= target_epsilon, and `result` is more than the least
    such noise by a part of `tolerance` at most.  Raises BudgetError where no noise does.
    """
    _require(math.isfinite(target_epsilon) and target_epsilon > 0, f"epsilon is {target_epsilon}; it must be above 0")
    _require(0 < tolerance < 1, f"tolerance is {tolerance}; it must be above 0 and below 1")
    _require_delta(delta)
    _require_rate(sample_rate)
    _require_steps(steps)
    known = tuple(spent)
    already = epsilon(known, delta)
    if already > target_epsilon:
        raise BudgetError(
            f"epsilon {already:.4g} is spent at delta {delta:g}, and the budget is {target_epsilon:g}: nothing is left"
        )
    if steps == 0:
        return 0.0

    def suffices(noise: float) -> bool:
        return epsilon((*known, Entry(noise, sample_rate, steps)), delta) <= target_epsilon

    enough = 1.0
    while not suffices(enough):
        if enough >= MOST_NOISE:
            raise BudgetError(
                f"epsilon {already:.4g} of {target_epsilon:g} is spent at delta {delta:g}: {steps} more steps of "
                f"sample rate {sample_rate:g} exceed it with any noise up to {MOST_NOISE:g}; plan fewer"
            )
        enough = min(2 * enough, MOST_NOISE)
    too_little = enough / 2
    while enough <= 1.0 and enough > LEAST_NOISE and suffices(too_little):
        enough, too_little = too_little, too_little / 2
    if enough <= LEAST_NOISE:
        return enough
    while enough > (1 + tolerance) * too_little:
        middle = math.sqrt(enough * too_little)
        enough, too_little = (middle, too_little) if suffices(middle) else (enough, middle)
    return enough


def warn_delta(delta: float, num_rows: int) -> str | None:
    """What is wrong with a delta that lets one of the rows be published as it is; None if nothing."""
    _require_delta(delta)
    if delta * num_rows < 1:
        return None
    return (
        f"delta is {delta:g}, and 1 / {num_rows} rows is {1 / num_rows:.3g}: publishing a row at random satisfies it; "
        f"take {0.1 / num_rows:.1g} or less"
    )


# ------------------------------------------------------------ the composition

Merged = tuple[Entry, ...]


def _merged(entries: Iterable[Entry]) -> Merged:
    """One entry a pair of noise and rate, sorted.  Plain Gaussian steps are one: 1 / s^2 is the sum of k / s_i^2."""
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for entry in entries:
        steps[_counted(entry)] += int(entry.steps)
    merged = sorted(Entry(noise, rate, count) for (noise, rate), count in steps.items() if count)
    plain = [entry for entry in merged if entry.sample_rate == 1]
    sampled = [entry for entry in merged if entry.sample_rate < 1]
    return (*sampled, Entry(_one_gaussian(plain), 1.0, 1)) if plain else tuple(sampled)


def _counted(entry: Entry) -> tuple[float, float]:
    none, most = COUNTED_NOISE
    noise = min(float(entry.noise_multiplier), most)
    return noise if noise >= none else 0.0, max(float(entry.sample_rate), COUNTED_RATE)


def _one_gaussian(plain: Sequence[Entry]) -> float:
    if not _is_finite(plain):
        return 0.0
    return 1 / math.sqrt(math.fsum(entry.steps / entry.noise_multiplier**2 for entry in plain))


def _is_finite(entries: Sequence[Entry]) -> bool:
    return all(entry.noise_multiplier > 0 for entry in entries)


@lru_cache(maxsize=1024)
def _epsilon(merged: Merged, delta: float) -> float:
    if not merged:
        return 0.0
    rounding = ROUNDING * sum(entry.steps for entry in merged)
    asked, width = _widths(merged)
    if rounding > delta / 10 or width > WIDEST:
        return _epsilon_rdp(merged, delta)
    with np.errstate(over="ignore"):  # e^-loss underflows where epsilon is above 700: found is inf, and not taken
        found = float(_composed(merged, width).get_epsilon_for_delta(delta - rounding))
    if width == asked and math.isfinite(found):
        return found
    return min(_epsilon_rdp(merged, delta), found)  # the first, should the second not be a number


@lru_cache(maxsize=1024)
def _epsilon_rdp(merged: Merged, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if not merged:
        return 0.0
    accountant = RdpAccountant()
    with _unsaid("absl"):  # orders that do not converge are left out, each with a warning
        for entry in merged:
            step = PoissonSampledDpEvent(entry.sample_rate, GaussianDpEvent(entry.noise_multiplier))
            accountant.compose(step, entry.steps)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _unsaid(name: str) -> Iterator[None]:
    """Warnings of a logger are not said."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _widths(merged: Merged) -> tuple[float, float]:
    """The grid's width that accuracy asks for, and the one that time allows.  Powers of two."""
    asked = min(min(map(_deviation, merged)) / 10, 0.25)
    total = math.sqrt(math.fsum(entry.steps * _deviation(entry) ** 2 for entry in merged))
    span = max(_span(entry.noise_multiplier, entry.sample_rate) for entry in merged)
    allowed = max(asked, total / TOTAL_POINTS, span / STEP_POINTS, FINEST)
    return _power_of_two(asked), _power_of_two(allowed)


def _power_of_two(width: float) -> float:
    return float(2.0 ** math.floor(math.log2(width)))


def _deviation(entry: Entry) -> float:
    """About the standard deviation of a step's privacy loss.

    With little noise it is made by the steps that take the row, whose loss is about log(1 + q (e^x - 1)); with much, it
    is the root of the chi-square divergence, q sqrt(e^(1/s^2) - 1).
    """
    inverse, rate = 1 / entry.noise_multiplier, entry.sample_rate
    if rate == 1:
        return inverse
    taken = float(np.logaddexp(math.log1p(-rate), math.log(rate) + inverse**2 / 2 + inverse))
    return math.sqrt(rate**2 * math.expm1(min(inverse**2, 1.0)) + rate * taken**2)


@lru_cache(maxsize=1024)
def _span(noise_multiplier: float, sample_rate: float) -> float:
    """From the least to the greatest loss of a step, up to a probability of e^-50."""
    bounds = _loss(noise_multiplier, sample_rate, added=False).connect_dots_bounds()
    return float(bounds.epsilon_upper - bounds.epsilon_lower)


@lru_cache(maxsize=128)
def _composed(merged: Merged, width: float) -> Any:
    """The distribution of the loss of all steps, a PrivacyLossDistribution.  Cached: a search changes one entry."""
    *others, last = merged
    if others:
        return _composed(tuple(others), width).compose(_composed((last,), width))
    step = _step(last.noise_multiplier, last.sample_rate, width)
    return step if last.steps == 1 else step.self_compose(last.steps)


@lru_cache(maxsize=64)
def _step(noise_multiplier: float, sample_rate: float, width: float) -> Any:
    """The distribution of the loss of one step, dense: composing a sparse one takes its size to the power of steps."""
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    def dominating(added: bool) -> Any:
        loss = _loss(noise_multiplier, sample_rate, added=added)
        bounds = loss.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / width), math.ceil(bounds.epsilon_upper / width)
        deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * width)
        return create_pmf_pessimistic_connect_dots_fixed_gap(width, low, high, deltas).to_dense_pmf()

    removed = dominating(added=False)
    return PrivacyLossDistribution(removed, None if sample_rate == 1 else dominating(added=True))


def _loss(noise_multiplier: float, sample_rate: float, *, added: bool) -> Any:
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    adjacency = AdjacencyType.ADD if added else AdjacencyType.REMOVE
    return GaussianPrivacyLoss(noise_multiplier, sampling_prob=sample_rate, adjacency_type=adjacency)


# ------------------------------------------------------------ what is accepted


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_delta(delta: float) -> None:
    _require(0 < delta < 1, f"delta is {delta}; it must be above 0 and below 1")


def _require_rate(sample_rate: float) -> None:
    _require(0 < sample_rate <= 1, f"sample_rate is {sample_rate}; it must be above 0 and at most 1")


def _require_steps(steps: int) -> None:
    _require(
        isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0,
        f"steps is {steps}; it must be a whole number, at least 0",
    )
