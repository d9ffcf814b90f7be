"""The mean: federated averaging of updates.  McMahan et al., AISTATS 2017.  https://arxiv.org/abs/1602.05629"""

from __future__ import annotations

import numpy as np

from strategies.rows import Updates, combine, rows_of
from trellis.errors import CohortTooSmall
from trellis.types import Aggregated, RuleSpec


def mean(updates_nd: Updates, *, num_byzantine: int = 0, weights: object = None) -> Aggregated:
    """Weighted mean of the rows, summed in float64 in the order of the rows.  (n, d) -> (d,)

    `weights` (n,) are coefficients the server holds, not negative, not all zero; None is uniform.  One liar moves the
    mean anywhere: it tolerates num_byzantine = 0 only.  Raises CohortTooSmall for n = 0.
    """
    rows = rows_of(updates_nd)
    n = rows.num_rows
    if n == 0:
        raise CohortTooSmall("the mean needs at least 1 row, found 0")
    w = np.full(n, 1.0 / n) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (n,) or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise ValueError(f"weights must be {n} finite numbers, none negative, not all zero; found {w}")
    w = w / w.sum()
    return Aggregated(combine(rows, w), weights_n=w)


MEAN = RuleSpec(
    name="mean",
    fn=mean,
    needs=("weights",),
    min_rows=lambda num_byzantine: 1,
    tolerates=False,
    sensitivity=lambda n: 1.0 / n,
)
