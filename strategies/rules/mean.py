"""The mean: federated averaging of updates.  McMahan et al., AISTATS 2017.  https://arxiv.org/abs/1602.05629"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trellis.errors import CohortTooSmall
from trellis.types import Aggregated, RuleSpec

BLOCK = 1 << 16
"""Columns summed at a time: a float64 block and its rows stay in cache."""


def mean(updates_nd: npt.NDArray[np.float32], *, num_byzantine: int = 0, weights: object = None) -> Aggregated:
    """Weighted mean of the rows, summed in float64 in the order of the rows.  (n, d) -> (d,)

    `weights` (n,) are coefficients the server holds, not negative, not all zero; None is uniform.  One liar moves the
    mean anywhere: it tolerates num_byzantine = 0 only.  Raises CohortTooSmall for n = 0.
    """
    n, d = updates_nd.shape
    if n == 0:
        raise CohortTooSmall("the mean needs at least 1 row, found 0")
    w = np.full(n, 1.0 / n) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (n,) or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise ValueError(f"weights must be {n} finite numbers, none negative, not all zero; found {w}")
    w = w / w.sum()
    uniform = bool((w == w[0]).all())
    mean_d = np.empty(d, np.float32)
    for start in range(0, d, BLOCK):
        columns = slice(start, start + BLOCK)
        total = np.zeros(mean_d[columns].shape, np.float64)
        # Row by row, not a matrix product: the sum depends on no BLAS, no thread, no memory layout.
        for i in range(n):
            total += updates_nd[i, columns] if uniform else w[i] * updates_nd[i, columns]
        mean_d[columns] = total * w[0] if uniform else total
    return Aggregated(mean_d, weights_n=w)


MEAN = RuleSpec(
    name="mean",
    fn=mean,
    needs=("weights",),
    min_rows=lambda num_byzantine: 1,
    tolerates=False,
    sensitivity=lambda n: 1.0 / n,
)
