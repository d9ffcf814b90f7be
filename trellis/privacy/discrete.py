"""Distributed differential privacy: integer noise that every node adds before it masks, and what it buys.

Under secure aggregation nobody sees one node's update, so no node needs the whole noise: each adds a share to its
quantised update, and the sum over the survivors carries enough.  The noise is Skellam's, the law of a difference of
two Poisson variables of mean variance / 2 (Agarwal, Kairouz, Liu, NeurIPS 2021, https://arxiv.org/abs/2110.04995),
because it is closed under sums: shares add up to exactly the law that is accounted, whoever drops out.  Shares of the
discrete Gaussian (Kairouz, Liu, Steinke, ICML 2021, https://arxiv.org/abs/2102.06387) do not, which costs a term that
grows with the members and falls only with the noise of each.

    vector += skellam(vector.size, share, ...).astype(vector.dtype)     after `quantise`, before the masks: mod 2^bits

**The unit is a node's update of a round.**  Neighbours differ by one node's vector being there or zero: the roster and
who survived are public.  For one vector in place of another double both sensitivities.

**Who must be honest.**  `num_contributing` nodes: the threshold less the colluders, who know their own noise and can
take it off.  More survivors, and members that add more, only add independent noise: post-processing.

**What wraps costs accuracy, never privacy**: the sum mod 2^bits is post-processing too, so noise is never cut off at
`noise_tail`, which would not be.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trellis.errors import ConfigError
from trellis.secagg.prg import keystream
from trellis.secagg.quantise import scale_for

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ALPHAS: Integers = np.unique(np.rint(np.concatenate([np.arange(2, 65), np.geomspace(64, 2**20, 150)]))).astype(np.int64)
"""Renyi orders: integers, for which the bound is proven, close enough together to lose less than 0.1 % of epsilon."""

LARGEST_VARIANCE = 1e18
"""Of one `skellam`: 32 bits have no room for more than 1e17, and more than that hides no more."""

_CHUNK = 1 << 16
_INVERTED_BELOW = 4096.0
_LOG_2 = math.log(2)


# ---------------------------------------------------------------- the noise


def skellam(size: int, variance: float, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> Integers:
    """Independent integers, each a Poisson(variance / 2) less another.  -> (size,) int64

    `random_bytes(32)` keys AES-256 in counter mode for every few ten thousand of them: the operating system's entropy
    unless a test brings a seeded one, `np.random.default_rng(7).bytes`.

    Drawn from the law itself, P(k) = e^-v I_|k|(v), not from two Poisson variables: numpy's take twice the time, and
    large ones are wrong (at 1e14 the variance is 2 % short: the terms of ln P, 1e15, no longer resolve 0.1).
    Below 4096 a 64-bit word is looked up in a table of tails: P(k) is off by a relative 1e-13 and an absolute 2^-63.
    Above by rejection: by a relative 1e-12 (at 8 standard deviations 1e-11), which over a million coordinates is 1e-6
    of epsilon; by more beyond 9, a probability of 2^-62.  ValueError beyond `LARGEST_VARIANCE`.
    """
    if size < 0 or not 0 <= variance <= LARGEST_VARIANCE:
        raise ValueError(f"{size=}, {variance=}: a variance is 0 to {LARGEST_VARIANCE:g}")
    noise_d = np.zeros(size, np.int64)
    fill = _by_inversion if variance < _INVERTED_BELOW else _by_rejection
    for at in range(0, size if variance else 0, _CHUNK):
        fill(noise_d[at : at + _CHUNK], variance, random_bytes)
    return noise_d


def share_variance(total_variance: float, num_contributing: int) -> float:
    """What each node adds, so that the noise of `num_contributing` of them has the total variance."""
    if num_contributing < 1 or not 0 <= total_variance < math.inf:
        raise ValueError(f"{total_variance=}, {num_contributing=}")
    return total_variance / num_contributing


def noise_tail(variance: float, *, dim: int, log2_probability: float = -40.0) -> int:
    """The T that no coordinate of one node's noise exceeds, but with probability 2^log2_probability.

    T = floor(sqrt(2 v L) + L / 3) with L = ln(2 dim) - ln(2) log2_probability.  Proof: ln E e^tX = v (cosh t - 1), and
    cosh t - 1 = (t^2 / 2)(1 + t^2 / 12 + ...) <= (t^2 / 2) / (1 - t / 3) for 0 <= t < 3, term by term, so X is
    sub-gamma with factor v and scale 1/3 and P(X > sqrt(2 v L) + L / 3) <= e^-L (Boucheron, Lugosi, Massart,
    Concentration Inequalities, 2013, section 2.4); two sides, `dim` coordinates.
    """
    if dim < 1 or not 0 <= variance < math.inf or not -math.inf < log2_probability <= 0:
        raise ValueError(f"{variance=}, {dim=}, {log2_probability=}")
    level = math.log(2 * dim) - _LOG_2 * log2_probability
    return math.floor(math.sqrt(2 * variance * level) + level / 3) if variance else 0


# ---------------------------------------------------------------- what one node can change


def l2_sensitivity(clip_norm: float, scale: int, dim: int) -> float:
    """Euclidean length, in units, that no clipped and rounded update exceeds: clip_norm scale + sqrt(dim).

    x = y + e where y is the clipped update in units, |y| <= clip_norm scale, and rounding moves a coordinate by at most
    1, |e| <= sqrt(dim), whatever the draws; |x| <= |y| + |e|.  2^-32 of the first term is added for float64 in
    `quantise` (1e-11 in the norm, 2^-53 an operation).  With weights `clip_norm` is W C.
    """
    _require_update(clip_norm, scale, dim)
    return clip_norm * scale * (1 + 2.0**-32) + math.sqrt(dim)


def l1_sensitivity(clip_norm: float, scale: int, dim: int) -> float:
    """Sum of absolute values, in units, that no clipped and rounded update exceeds: sqrt(dim) times `l2_sensitivity`.

    Cauchy and Schwarz: |x|_1 <= sqrt(dim) |x|_2.  That integers have |x|_1 <= |x|_2^2 is no better: l2 >= sqrt(dim).
    """
    return math.sqrt(dim) * l2_sensitivity(clip_norm, scale, dim)


# ---------------------------------------------------------------- what it costs


def rdp_skellam(alpha: npt.ArrayLike, *, l1: float, l2: float, variance: float) -> Floats:
    """Renyi divergence of integer order alpha > 1 that one sum with this noise spends.  (m,) -> (m,), or one number

        alpha l2^2 / (2 v) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v))

    Agarwal, Kairouz, Liu, Theorem 3.5 (a coordinate) and Corollary 3.6 (vectors); v is the variance there, too.  The
    first term is the Gaussian's; with l1 <= l2^2 the second is at most 2.25 / v of it.  inf without noise.
    """
    order = np.asarray(alpha, np.float64)
    if not (order >= 2).all() or not (order == np.floor(order)).all():
        raise ValueError(f"orders are whole and 2 at least: {order}")
    if not (0 <= l1 < math.inf and 0 <= l2 < math.inf and 0 <= variance < math.inf):
        raise ValueError(f"{l1=}, {l2=}, {variance=}")
    if variance == 0:
        return order * math.inf
    excess = np.minimum(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance) / variance, 3 * l1 / (2 * variance))
    bound: Floats = order * l2**2 / (2 * variance) + excess
    return bound


def epsilon_of(rdp_m: Floats, delta: float, alphas: Integers = ALPHAS) -> float:
    """(m,) divergences at these orders -> the epsilon that goes with delta.  Those of several rounds are added before.

    The least of rdp + ln(1 - 1 / alpha) - (ln delta + ln alpha) / (alpha - 1).
    Canonne, Kamath, Steinke, NeurIPS 2020, Proposition 12.  https://arxiv.org/abs/2004.00010
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: a probability between 0 and 1 is needed, below 1 / (number of nodes)")
    slack = np.log1p(-1 / alphas) - (math.log(delta) + np.log(alphas)) / (alphas - 1)
    return max(0.0, float(np.min(rdp_m + slack)))


def epsilon(delta: float, rounds: int, *, l1: float, l2: float, variance: float, alphas: Integers = ALPHAS) -> float:
    """What `rounds` sums with this total variance spend together, at delta."""
    if rounds < 0:
        raise ConfigError(f"rounds={rounds}")
    if rounds == 0:
        return 0.0
    return epsilon_of(rounds * rdp_skellam(alphas, l1=l1, l2=l2, variance=variance), delta, alphas)


def noise_variance_for(target_epsilon: float, delta: float, rounds: int, l1: float, l2: float) -> float:
    """The least total variance, to 1e-6 from above, with which `rounds` sums spend `target_epsilon` at most.

    ConfigError when no noise is enough: the orders of `ALPHAS` reach down to 1e-5 for a small delta.
    """
    if not 0 < target_epsilon < math.inf or rounds < 1:
        raise ConfigError(f"{target_epsilon=}, {rounds=}: both are above 0")
    least = epsilon_of(np.zeros(ALPHAS.size), delta)
    if least >= target_epsilon:
        raise ConfigError(f"epsilon={target_epsilon:g} at delta={delta:g}: no noise is accounted below {least:.2g}")
    if l2 == 0:
        return 0.0

    def is_enough(variance: float) -> bool:
        return epsilon(delta, rounds, l1=l1, l2=l2, variance=variance) <= target_epsilon

    enough = rounds * l2**2
    while not is_enough(enough):
        enough *= 2
    short = enough / 2
    while is_enough(short):
        short /= 2
    enough = 2 * short
    while enough > short * (1 + 1e-6):
        middle = (short + enough) / 2
        short, enough = (short, middle) if is_enough(middle) else (middle, enough)
    return enough


def noisy_scale_for(
    num_members: int,
    clip_norm: float,
    max_weight: int,
    *,
    dim: int,
    num_contributing: int,
    variance_for: Callable[[float, float], float],
    bits: int = 32,
) -> tuple[int, float]:
    """The most units per 1.0 that leave room for their own noise, and each node's share of the variance.

    Noise is as wide as the update is long, in units, so `scale_for` needs a tail that needs the scale: the largest
    that fits is searched.  `variance_for(l1, l2)` is the total, growing with both: `noise_variance_for` of a budget.
    ConfigError when not even one unit fits.
    """

    def share(scale: int) -> float:
        l1, l2 = (f(max_weight * clip_norm, scale, dim) for f in (l1_sensitivity, l2_sensitivity))
        return share_variance(variance_for(l1, l2), num_contributing)

    def room(scale: int) -> int:
        if share(scale) > LARGEST_VARIANCE:
            raise ConfigError(f"noise of variance {share(scale):.3g} a node, {LARGEST_VARIANCE:g} at most are drawn")
        tail = noise_tail(share(scale), dim=dim)
        return scale_for(num_members, clip_norm, max_weight, bits=bits, noise_tail=tail)

    def fits(scale: int) -> bool:
        try:
            return scale <= room(scale)
        except ConfigError:
            return False

    fitting, above = 1, scale_for(num_members, clip_norm, max_weight, bits=bits) + 1
    room(fitting)  # or it says what is missing
    while above - fitting > 1:
        middle = (fitting + above) // 2
        fitting, above = (middle, above) if fits(middle) else (fitting, middle)
    return fitting, share(fitting)


# ---------------------------------------------------------------- how it is drawn


def _by_inversion(noise_n: Integers, variance: float, random_bytes: Callable[[int], bytes]) -> None:
    """One word each: a bit of sign, and 63 of how many tails P(|X| >= k) they lie below, k = 1, 2, ...

    The first 16 of them decide all but the few whose interval holds a tail: a third of the time of a search for each.
    """
    words = keystream(random_bytes(32), noise_n.size, np.uint64)
    tails, guide = _tails(variance)
    noise_n[:] = guide[words >> np.uint64(48)]
    unsure = np.flatnonzero(noise_n < 0)
    noise_n[unsure] = tails.size - np.searchsorted(tails, words[unsure] >> np.uint64(1), side="right")
    np.negative(noise_n, out=noise_n, where=(words & np.uint64(1)).astype(bool))


@functools.lru_cache(maxsize=8)
def _tails(variance: float) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int16]]:
    """2^63 P(|X| >= k), k falling to 1, and the |X| of each of 2^16 intervals, -1 where more than one is possible.

    By the ratios I_k+1 / I_k = 1 / (2 (k + 1) / v + I_k+2 / I_k+1), from far out inwards, which is stable (Gautschi,
    SIAM Review 1967): an error shrinks by the ratio's square a step.  What is left out is below 2^-64.
    """
    last = noise_tail(variance, dim=1, log2_probability=-64)
    ratio, ratios = 0.0, []
    for k in range(last + 200, -1, -1):
        ratio = 1 / (2 * (k + 1) / variance + ratio)
        ratios.append(ratio)
    relative = np.cumprod(ratios[: -last - 1 : -1])  # P(k) / P(0), k from 1
    sides = 2 * np.cumsum(relative[::-1])
    tails: npt.NDArray[np.uint64] = np.rint(sides / (1 + sides[-1]) * 2.0**63).astype(np.uint64)
    firsts = np.arange(2**16, dtype=np.uint64) << np.uint64(47)
    most, least = (
        tails.size - np.searchsorted(tails, u, side="right") for u in (firsts, firsts + np.uint64(2**47 - 1))
    )
    return tails, np.where(most == least, most, -1).astype(np.int16)


_HAT = 1.16
_AT_ONCE = 0.88
"""P(k) x'(u) is _HAT at most, and _AT_ONCE _HAT at least where |u| <= 0.43: there most tries need no logarithm."""


def _by_rejection(noise_n: Integers, variance: float, random_bytes: Callable[[int], bytes]) -> None:
    filled = 0
    while filled < noise_n.size:
        missing = noise_n.size - filled
        found = _accepted(math.ceil(1.2 * missing) + 16, variance, random_bytes)[:missing]
        noise_n[filled : filled + found.size] = found
        filled += found.size


def _accepted(num_tries: int, variance: float, random_bytes: Callable[[int], bytes]) -> Integers:
    """Transformed rejection (Hörmann, Insurance: Mathematics and Economics 1993: numpy's Poisson, its constants too).

    u uniform on (-1/2, 1/2) goes to x(u) = (2 a / (1/2 - |u|) + b) u, whose density has tails of 1 / x^2, and k there
    is kept with probability P(k) x'(u) / _HAT.  The 53 bits of u pick a block of integers, other bits one in the block:
    alone they would prefer some integers where the deviation is large.  Blocks are a 64th of the standard deviation at
    most, over which P hardly changes: the tests check both constants.
    """
    words = keystream(random_bytes(32), 3 * num_tries, np.uint64).reshape(3, num_tries)
    std = math.sqrt(variance)
    block = 2 ** math.floor(math.log2(std / 64))
    b = 2.53 * std
    a = 0.02483 * b
    u = ((words[0].view(np.int64) >> 11) + 0.5) * 2.0**-53
    us = 0.5 - np.abs(u)
    k = np.floor((2 * a / us + b) * u / block) * block + (words[1] & np.uint64(block - 1))
    v = (words[2] + 0.5) * 2.0**-64
    keep = (us >= 0.07) & (v <= _AT_ONCE)
    rest = np.flatnonzero(~keep)
    keep[rest] = np.log(v[rest] * _HAT / (a / us[rest] ** 2 + b)) <= _log_probability(k[rest], variance)
    found: Integers = k[keep].astype(np.int64)
    return found


def _log_probability(k: Floats, variance: float) -> Floats:
    """ln(e^-v I_|k|(v)), off by less than 2e-12, and 1e-15 of itself, for v >= 4096.

    Debye's expansion (DLMF 10.41.3) with w = sqrt(k^2 + v^2), p = k / w.  The exponent as w - v = k^2 / (w + v), where
    nothing cancels.
    """
    w = np.sqrt(k * k + variance * variance)
    p2 = (k / w) ** 2
    terms = 1 + (3 - 5 * p2) / (24 * w) + (81 - 462 * p2 + 385 * p2**2) / (1152 * w * w)
    value: Floats = k * k / (w + variance) - k * np.arcsinh(k / variance) + np.log(terms / np.sqrt(2 * np.pi * w))
    return value


def _require_update(clip_norm: float, scale: int, dim: int) -> None:
    if not 0 < clip_norm < math.inf or scale < 1 or dim < 1:
        raise ValueError(f"{clip_norm=}, {scale=}, {dim=}")
