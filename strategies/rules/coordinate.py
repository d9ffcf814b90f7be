"""Rules that look at each coordinate alone: median, trimmed mean, mean around the median.  All of one sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from strategies.rows import Updates, by_column, require_rows
from trellis.types import RuleSpec


def median(updates_nd: Updates, *, num_byzantine: int = 0) -> npt.NDArray[np.float32]:
    """Median of each coordinate; of an even number of rows, the mean of the two in the middle.  (n, d) -> (d,)

    Needs n >= 2 f + 1, else CohortTooSmall.  Yin et al., ICML 2018, Definition 1.  https://arxiv.org/abs/1803.01498
    """
    require_rows("median", updates_nd, 2 * num_byzantine + 1, num_byzantine)

    def middle(ranked: Any, xp: Any) -> Any:
        low, high = ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]
        return low + (high - low) / 2 if low is not high else low

    return by_column(updates_nd, middle)


def trimmed_mean(updates_nd: Updates, *, num_byzantine: int = 0) -> npt.NDArray[np.float32]:
    """Mean of each coordinate without its f smallest and f largest values.  (n, d) -> (d,)

    Needs n >= 2 f + 1, else CohortTooSmall.  Yin et al., ICML 2018, Definition 2.  https://arxiv.org/abs/1803.01498
    """
    f = num_byzantine
    n = require_rows("trimmed_mean", updates_nd, 2 * f + 1, f)
    return by_column(updates_nd, lambda ranked, xp: _mean(ranked[f : n - f], xp))


def meamed(updates_nd: Updates, *, num_byzantine: int = 0) -> npt.NDArray[np.float32]:
    """Mean of the n - f values of each coordinate that are nearest to its median.  (n, d) -> (d,)

    Needs n >= 2 f + 1, else CohortTooSmall.  Xie et al., 2018, Section 3.2.  https://arxiv.org/abs/1802.10116
    """
    f = num_byzantine
    n = require_rows("meamed", updates_nd, 2 * f + 1, f)
    return by_column(updates_nd, lambda ranked, xp: nearest_to_median(ranked, n - f, xp))


def nearest_to_median(ranked: Any, kept: int, xp: Any) -> Any:
    """Mean of the `kept` values nearest to the median of each ascending column.  (m, B) -> (B,)

    They are neighbours, x_s .. x_{s + kept - 1}.  Value k gives way to value k + kept when it is further from the
    median; distances fall with k on the left and grow on the right, so that is so for exactly the first s.
    """
    m = len(ranked)
    dropped = m - kept
    if dropped > kept:  # pairs (k, k + kept) would overlap: few are kept, so each start is tried
        return _nearest_few(ranked, kept, xp)
    low, high = ranked[(m - 1) // 2], ranked[m // 2]
    middle = low + (high - low) / 2
    left, right = ranked[:dropped], ranked[kept:]
    chosen = xp.where((middle - left) > (right - middle), right, left)
    total = _sum(ranked[dropped:kept], xp) + _sum(chosen, xp)
    return total / kept


def _nearest_few(ranked: Any, kept: int, xp: Any) -> Any:
    m = len(ranked)
    low, high = ranked[(m - 1) // 2], ranked[m // 2]
    middle = low + (high - low) / 2
    # the window's start is the number of values on the left that are further out than the value that would replace them
    start = ((middle - ranked[: m - kept]) > (ranked[kept:] - middle)).sum(0)
    total = 0.0
    for k in range(kept):
        total = total + _picked(ranked, start + k, xp)
    return total / kept


def _picked(ranked: Any, index: Any, xp: Any) -> Any:
    picked = xp.take_along_axis(ranked, index[None], 0) if xp is np else ranked.gather(0, index[None])
    return picked[0].astype(np.float64) if xp is np else picked[0].double()


def _mean(ranked: Any, xp: Any) -> Any:
    return _sum(ranked, xp) / len(ranked)


def _sum(ranked: Any, xp: Any) -> Any:
    return ranked.sum(0, dtype=xp.float64)


def trimmed_mean_kappa(n: int, f: int) -> float:
    """Robustness constant: Allouah et al., AISTATS 2023, Proposition 2 and Table 1."""
    ratio = f / (n - 2 * f)
    return 6 * ratio * (1 + ratio)


def _median_kappa(n: int, f: int) -> float:
    """Of the median: the same table.  That of meamed is not proven there, only never seen violated."""
    return 4 * (1 + f / (n - 2 * f)) ** 2


MEDIAN = RuleSpec("median", median, lambda f: 2 * f + 1, kappa=_median_kappa)
TRIMMED_MEAN = RuleSpec("trimmed_mean", trimmed_mean, lambda f: 2 * f + 1, kappa=trimmed_mean_kappa)
MEAMED = RuleSpec("meamed", meamed, lambda f: 2 * f + 1, kappa=_median_kappa)
