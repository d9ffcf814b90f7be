"""The recipe for a federation that does not know what will attack it: ARC, then NNM, then the trimmed mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from strategies.preaggregators import arc, arc_kappa, nnm, nnm_kappa
from strategies.rows import Updates, require_rows, rows_of
from strategies.rules.coordinate import trimmed_mean, trimmed_mean_kappa
from trellis.types import RuleSpec


def robust(updates_nd: Updates, *, num_byzantine: int = 0) -> npt.NDArray[np.float32]:
    """trimmed_mean(nnm(arc(rows))).  (n, d) -> (d,)

    With f = 0 it is the mean.  Needs n >= 2 f + 1, else CohortTooSmall.
    Allouah et al., AISTATS 2023 (https://arxiv.org/abs/2302.01772) and ICLR 2025 (https://arxiv.org/abs/2405.14432).
    """
    f = num_byzantine
    require_rows("robust", updates_nd, 2 * f + 1, f)
    rows = nnm(arc(rows_of(updates_nd), num_byzantine=f), num_byzantine=f)
    return trimmed_mean(rows, num_byzantine=f)


def _kappa(n: int, f: int) -> float:
    return arc_kappa(nnm_kappa(trimmed_mean_kappa(n, f), n, f), n, f)


ROBUST = RuleSpec("robust", robust, lambda f: 2 * f + 1, kappa=_kappa)
