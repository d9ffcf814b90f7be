"""Central differential privacy: noise on the aggregate, at a server that is trusted with the updates.

Each update is clipped to C, so that one node moves the aggregate by a known length, and Gaussian noise in proportion to
that length hides which nodes took part (McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963).

A fixed C cuts too much or hides too little.  Adaptive clipping follows a quantile of the updates' lengths, from nothing
but how many were no longer than C, noised as well (Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021, Algorithm 1,
https://arxiv.org/abs/1905.03871).

`rng` is seeded with 256 bits from the operating system for each round: numpy's generators are not cryptographic, and
who knew much of one round's noise could foresee the rest of it.  Floating-point noise also has gaps in its low bits
(Mironov, CCS 2012); the noise of `discrete` has neither weakness.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trellis.errors import ConfigError

Floats = npt.NDArray[np.float64]


def gaussian_noise(dim: int, std: float, rng: np.random.Generator) -> Floats:
    """Independent normal coordinates.  -> (d,) float64, to be added before the aggregate is rounded to float32"""
    if not 0 <= std < math.inf:
        raise ValueError(f"{std=}")
    return std * rng.standard_normal(dim)


def std_for(noise_multiplier: float, clip_norm: float, sensitivity_factor: float, denominator: float) -> float:
    """Noise of each coordinate of an aggregate that one update moves by sensitivity_factor clip_norm / denominator.

    A sum divided by n has factor 1 and denominator n; a rule whose `RuleSpec.sensitivity(n)` holds the division has
    that factor and denominator 1.  The denominator is public: how many were asked, not how many came out.
    """
    are_known = 0 <= noise_multiplier < math.inf and 0 < clip_norm < math.inf and 0 < sensitivity_factor < math.inf
    if not are_known or not 0 < denominator < math.inf:
        raise ValueError(f"{noise_multiplier=}, {clip_norm=}, {sensitivity_factor=}, {denominator=}")
    return noise_multiplier * clip_norm * sensitivity_factor / denominator


def next_clip(clip: float, fraction_below: float, *, target: float, learning_rate: float) -> float:
    """The next round's C: clip exp(-learning_rate (fraction_below - target)).

    Steps are geometric, so that a start wrong by orders of magnitude is left in tens of rounds; at rest `target` of the
    updates are not clipped.  The paper's choice is target 0.5, learning_rate 0.2.
    """
    if not 0 < clip < math.inf or not 0 <= target <= 1 or not 0 < learning_rate < math.inf:
        raise ValueError(f"{clip=}, {target=}, {learning_rate=}")
    moved = clip * float(np.exp(-learning_rate * (fraction_below - target)))
    if not 0 < moved < math.inf:
        raise ValueError(f"{clip=} and {fraction_below=} lead to {moved}: a clip norm stays finite and above 0")
    return moved


def noisy_fraction(
    num_below: int, num_answered: int, num_asked: int, *, sigma_b: float, rng: np.random.Generator
) -> float:
    """How many of the updates were not clipped, as a noised fraction of those asked; it may leave [0, 1].

    (num_below - num_answered / 2 + N(0, sigma_b^2)) / num_asked + 1/2: each node adds +1/2 or -1/2 or, absent, nothing,
    so one node moves the count by 1/2 where 0 or 1 would move it by 1 (Andrew et al., section 3.1).
    """
    if not 0 <= num_below <= num_answered <= num_asked or num_asked < 1 or not 0 <= sigma_b < math.inf:
        raise ValueError(f"{num_below=}, {num_answered=}, {num_asked=}, {sigma_b=}")
    count = num_below - num_answered / 2 + sigma_b * rng.standard_normal()
    return float(count / num_asked + 0.5)


def noise_split(z: float, sigma_b: float) -> float:
    """The updates' noise multiplier, with which they and the count together are as private as multiplier z alone.

    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2): the count of sensitivity 1/2 has multiplier 2 sigma_b, and two Gaussian
    queries are as one whose z^-2 is their sum (Andrew et al., Theorem 1).  The paper's choice is sigma_b = n / 20 for n
    updates a round.  ConfigError when the count alone spends more than z.
    """
    if not 0 <= z < math.inf or not 0 <= sigma_b < math.inf:
        raise ValueError(f"{z=}, {sigma_b=}")
    if z == 0:
        return 0.0
    if 2 * sigma_b <= z:
        raise ConfigError(
            f"sigma_b={sigma_b:g}: counting the unclipped updates with less noise than {z / 2:g} spends more than "
            f"noise multiplier {z:g} allows in all; take a larger sigma_b"
        )
    return z / math.sqrt(1 - (z / (2 * sigma_b)) ** 2)
