"""Updates as integers whose sum cannot wrap.

Masks live in the integers mod 2^32 (or 2^64), so an update is clipped in L2 to C, scaled and rounded to integers before
it is masked.  Rounding is stochastic, up with the probability of the fraction, so that the mean is unbiased
(Suresh et al., ICML 2017, https://arxiv.org/abs/1611.00429; in secure aggregation: Bonawitz et al., CCS 2017).

    scale     = floor(((2^(bits-1) - 1) / n - 1 - noise_tail) / (W C))
    quantise  : x_i = floor(w_i scale clip(delta_i) + u),  u uniform on [0, 1),  |x_i| <= ceil(w_i C scale)
    dequantise: (sum of x_i) / (scale * sum of w_i)

**Nothing wraps.**  |sum of x_i| <= `largest_sum` < 2^(bits-1) whatever the updates and the draws: the -1 in `scale` is
the ceiling of stochastic rounding, and without it 56 of the 130 (n, C) of the test can wrap.

**The error.**  Rounding moves each x_i by less than 1, so each coordinate of the mean is within
n / (scale * sum of w_i), that is 1 / (scale * mean weight), of the weighted mean of the clipped updates, and is
unbiased.  Products are float64 (one ulp of float32 at 2^28 is 16 units) and u has 32 bits: with uint32 the expectation
of a rounding is off by less than 2^-21 of a unit.  With uint64, values beyond 2^53 have no fraction left in float64:
there the error is that of float64, a relative 2^-53 an operation, and not of the rounding.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from trellis.errors import ConfigError, SecAggError
from trellis.secagg.prg import Stream

Quantised = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

_CHUNK = 1 << 16
"""Coordinates at a time: as float64 they stay in a core's L2 cache."""

_SIGNED: dict[np.dtype[np.unsignedinteger], type[np.signedinteger]] = {
    np.dtype(np.uint32): np.int32,
    np.dtype(np.uint64): np.int64,
}


def scale_for(num_members: int, clip_norm: float, max_weight: int, *, bits: int = 32, noise_tail: float = 0.0) -> int:
    """Units per 1.0 of an update: the most that `num_members` can use without a wrap.

    `noise_tail` is what each member's noise may add to a coordinate, in units (0 without distributed DP).
    Exact in rationals.  ConfigError when the scale would be below 1.
    """
    is_possible = num_members >= 1 and max_weight >= 1 and 0 < clip_norm < math.inf and 0 <= noise_tail < math.inf
    if bits not in (32, 64) or not is_possible:
        raise ValueError(f"{bits=}, {num_members=}, {max_weight=}, {clip_norm=}, {noise_tail=}")
    share = Fraction(2 ** (bits - 1) - 1, num_members) - 1 - Fraction(noise_tail)
    scale = share / (max_weight * Fraction(clip_norm))
    if scale < 1:
        raise ConfigError(
            f"{bits} bits hold {float(scale):.3g} units per 1.0 of an update, 1 is needed: {num_members} members, "
            f"weights up to {max_weight}, clip_norm={clip_norm:g}, noise_tail={noise_tail:g}; take smaller groups, a "
            f"smaller max_weight or clip_norm{', or 64 bits' if bits == 32 else ''}"
        )
    return math.floor(scale)


def quantise(
    update_d: npt.NDArray[np.float32],
    *,
    clip_norm: float,
    weight: int,
    scale: int,
    dtype: npt.DTypeLike,
    rng: np.random.Generator | Stream,
    out: Quantised | None = None,
) -> tuple[Quantised, bool]:
    """Clipped, weighted, scaled and rounded, in two's complement, and whether it was clipped.  (d,) -> (d,)

    `dtype` is uint32 or uint64; `out`, when given, is written and returned.  ValueError when `update_d` is no float32
    vector or not finite, or when one update alone would wrap.  Memory beyond the result does not grow with d.
    """
    if update_d.dtype != np.float32 or update_d.ndim != 1:
        raise ValueError(f"an update is a float32 vector, not {update_d.dtype} of shape {update_d.shape}")
    vector = _room(update_d.size, dtype, out)
    bound = _bound(weight, clip_norm, scale)
    if bound > np.iinfo(_SIGNED[vector.dtype]).max:
        raise ValueError(f"{weight=}, {clip_norm=}, {scale=}: values up to {bound} do not fit {vector.dtype}")
    length, peak = _norm_and_peak(update_d)
    if not math.isfinite(length):
        raise ValueError("an update with NaN or infinities cannot be quantised")
    was_clipped = length > clip_norm
    factor = weight * scale * (clip_norm / length if was_clipped else 1.0)
    # Only a coordinate beside the bound can be rounded past it: most updates are spared the pass.
    clamp = bound if peak * factor + 2 > bound else None
    _round(update_d, factor, rng, vector.view(_SIGNED[vector.dtype]), clamp=clamp)
    return vector, was_clipped


def largest_sum(total_weight: int, clip_norm: float, scale: int, num_members: int) -> int:
    """The largest coordinate, in units, that honest members of that total weight can add up to.

    = ceil(total_weight C scale) + num_members - 1: each is at most ceil(w_i C scale), and n ceilings exceed the ceiling
    of the sum by n - 1 at most.  Below 2^(bits-1) - 1 for the scale of `scale_for`.  Under distributed DP noise comes
    on top, `num_members * noise_tail`.
    """
    return _bound(total_weight, clip_norm, scale) + num_members - 1


def dequantise(
    total_d: Quantised, *, scale: int, total_weight: int, num_members: int, most: int
) -> npt.NDArray[np.float32]:
    """The weighted mean that a sum of quantised updates stands for.  (d,) uint32 or uint64 -> (d,) float32

    Divided in float64, rounded once to float32.  `most` is the `largest_sum` of these members:
    SecAggError("out_of_range") for any coordinate beyond it, which no honest members add up to.
    """
    if total_d.dtype not in _SIGNED or scale < 1 or total_weight < 1:
        raise ValueError(f"{total_d.dtype=}, {scale=}, {total_weight=}")
    signed_d = total_d.view(_SIGNED[total_d.dtype])
    # Python's integers: |-2^31| does not exist in int32.
    largest = max(int(signed_d.max(initial=0)), -int(signed_d.min(initial=0)))
    if largest > most:
        raise SecAggError(
            "out_of_range",
            f"a coordinate of the sum of {num_members} members is {largest}, honest ones reach {most} at most",
        )
    mean_d = np.empty(total_d.shape, np.float32)
    for at in range(0, signed_d.size, _CHUNK):
        mean_d[at : at + _CHUNK] = signed_d[at : at + _CHUNK] / float(scale * total_weight)
    return mean_d


def _bound(weight: int, clip_norm: float, scale: int) -> int:
    """ceil(weight * clip_norm * scale), exactly: the largest value of one clipped update."""
    if weight < 0 or scale < 1 or not 0 < clip_norm < math.inf:
        raise ValueError(f"{weight=}, {scale=}, {clip_norm=}")
    return math.ceil(weight * scale * Fraction(clip_norm))


def _room(size: int, dtype: npt.DTypeLike, out: Quantised | None) -> Quantised:
    wanted = np.dtype(dtype)
    if wanted not in _SIGNED:
        raise ValueError(f"updates are quantised to uint32 or uint64, not {wanted}")
    vector: Quantised = np.empty(size, wanted) if out is None else out
    if vector.dtype != wanted or vector.shape != (size,):
        raise ValueError(f"{size} coordinates of {wanted} do not fit {vector.dtype} of shape {vector.shape}")
    return vector


def _norm_and_peak(update_d: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Euclidean norm and largest absolute coordinate.  Squares are exact in float64, so is each sum to 1e-12."""
    wide = np.empty(min(_CHUNK, update_d.size))
    squares, peak = 0.0, 0.0
    for at in range(0, update_d.size, _CHUNK):
        chunk = update_d[at : at + _CHUNK]
        part = wide[: chunk.size]
        part[:] = chunk
        # einsum, not `@`: a BLAS would start its threads for this, and its sum would depend on their number
        squares += float(np.einsum("i,i->", part, part))
        peak = max(peak, float(chunk.max()), -float(chunk.min()))
    return math.sqrt(squares), peak


def _round(
    update_d: npt.NDArray[np.float32],
    factor: float,
    rng: np.random.Generator | Stream,
    signed_d: npt.NDArray[np.signedinteger],
    *,
    clamp: int | None,
) -> None:
    """signed = floor(factor * update + u), kept within +-clamp.  u = r / 2^32 with r uniform on 32 bits.

    As floor((2^32 factor * update + r) / 2^32), the same in float64 and one pass over the data less.  The clamp is
    there for the last bit of a product; None where no coordinate comes near it.
    """
    wide = np.empty(min(_CHUNK, update_d.size))
    for at in range(0, update_d.size, _CHUNK):
        chunk = update_d[at : at + _CHUNK]
        x = wide[: chunk.size]
        x[:] = chunk
        x *= factor * 2.0**32
        x += _uniform_words(chunk.size, rng)
        x *= 2.0**-32
        np.floor(x, out=x)
        if clamp is not None:
            np.clip(x, -_float_up_to(clamp), _float_up_to(clamp), out=x)
        signed_d[at : at + _CHUNK] = x


def _uniform_words(size: int, rng: np.random.Generator | Stream) -> npt.NDArray[np.uint32]:
    """(size,) uniform 32-bit words; from numpy two of each 64-bit draw, half the time of as many floats."""
    if isinstance(rng, Stream):
        return rng.words(size)
    pairs = rng.integers(0, 2**64 - 1, endpoint=True, size=(size + 1) // 2, dtype=np.uint64)
    return pairs.view(np.uint32)[:size]


def _float_up_to(bound: int) -> float:
    """The largest float64 that is not above `bound`: float(2**63 - 1) would be 2^63, which no int64 holds."""
    nearest = float(bound)
    return nearest if nearest <= bound else math.nextafter(nearest, 0.0)
