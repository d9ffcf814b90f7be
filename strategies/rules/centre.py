"""Rules that look for a centre of the rows: geometric median, centered clipping.

Both move a point that is always a combination of rows, so they iterate on n coefficients with the matrix of products
and touch the rows only twice: once for the products, once for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from strategies.rows import Float64, Updates, combine, products, require_rows, rows_of, squared_distances
from trellis.errors import ConfigError
from trellis.types import Aggregated, RuleSpec

State = Mapping[str, npt.NDArray[np.generic]]


def geometric_median(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    smoothing: float = 1e-6,
    max_iterations: int = 1000,
    tolerance: float = 1e-10,
    sketch_dim: int = 0,
    rng: np.random.Generator | None = None,
) -> Aggregated:
    """argmin_z sum_i ||z - x_i|| by smoothed Weiszfeld from the mean, to convergence.  (n, d) -> (d,)

    Distances below `smoothing` times the median distance to the mean count as that (the paper's nu, in units of the
    rows themselves); it stops when a step changes the sum by less than `tolerance` of it.  Needs n >= 2 f + 1, else
    CohortTooSmall.  Pillutla et al., IEEE TSP 2022, Algorithm 2.  https://arxiv.org/abs/1912.13445
    """
    rows, f = rows_of(updates_nd), num_byzantine
    require_rows("geometric_median", rows, 2 * f + 1, f)
    squared_nn = squared_distances(rows, sketch_dim=sketch_dim, rng=rng)
    weights_n = weiszfeld(squared_nn, smoothing=smoothing, max_iterations=max_iterations, tolerance=tolerance)
    return Aggregated(combine(rows, weights_n), weights_n)


def weiszfeld(squared_nn: Float64, *, smoothing: float, max_iterations: int, tolerance: float) -> Float64:
    """Coefficients, adding up to 1, of the geometric median of points with these squared distances.  (n, n) -> (n,)"""
    n = len(squared_nn)
    weights = np.full(n, 1.0 / n)
    distances = _to_combination(squared_nn, weights)
    least = smoothing * float(np.median(distances))
    if least == 0.0:  # most points are in one place: that is where the median is
        nearest = distances <= 0.0
        return np.where(nearest, 1.0 / nearest.sum(), 0.0) if nearest.any() else weights
    before = np.inf
    for _ in range(max_iterations):
        pull = 1.0 / np.maximum(distances, least)
        weights = pull / pull.sum()
        distances = _to_combination(squared_nn, weights)
        total = float(np.maximum(distances, least).sum())
        if before - total <= tolerance * total:
            break
        before = total
    return weights


def _to_combination(squared_nn: Float64, weights: Float64) -> Float64:
    """||x_i - sum_j w_j x_j||, where the weights add up to 1.  (n, n), (n,) -> (n,)"""
    to_each = squared_nn @ weights
    return np.sqrt(np.maximum(to_each - weights @ to_each / 2, 0.0))


def centered_clipping(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    state: State | None = None,
    radius: float | None = None,
    iterations: int = 3,
) -> Aggregated:
    """v <- v + mean_i clip(x_i - v, radius), `iterations` times, from the last round's answer.  (n, d) -> (d,)

    In the first round v is 0.  `radius` None: the median distance of the rows from v, so that it follows their lengths
    down as training settles (the paper leaves the radius to the user).  Needs n >= 2 f + 1, else CohortTooSmall.
    Karimireddy et al., ICML 2021, Algorithm 2.  https://arxiv.org/abs/2012.10333
    """
    rows, f = rows_of(updates_nd), num_byzantine
    d = rows.shape[1]
    n = require_rows("centered_clipping", rows, 2 * f + 1, f)
    if iterations < 1 or (radius is not None and not radius > 0):
        raise ConfigError(f"centered_clipping: iterations={iterations} and radius={radius} must be above 0")
    last = (state or {}).get("last")
    v = np.zeros(d, np.float32) if last is None else np.asarray(last, np.float32)
    about_nn = products(rows, centre_d=v)
    moves = np.zeros(n)  # v + sum_i moves_i (x_i - v)
    for _ in range(iterations):
        along = about_nn @ moves
        distances = np.sqrt(np.maximum(about_nn.diagonal() - 2 * along + moves @ along, 0.0))
        most = float(np.median(distances)) if radius is None else radius
        shares = np.minimum(1.0, most / np.maximum(distances, 1e-300)) / n
        moves = (1.0 - shares.sum()) * moves + shares
    update_d = (combine(rows, moves) + (1.0 - moves.sum()) * v.astype(np.float64)).astype(np.float32)
    return Aggregated(update_d, moves, state={"last": update_d})


GEOMETRIC_MEDIAN = RuleSpec(
    "geometric_median", geometric_median, lambda f: 2 * f + 1, needs=("rng",),
    kappa=lambda n, f: 4 * (1 + f / (n - 2 * f)) ** 2,
)  # fmt: skip
CENTERED_CLIPPING = RuleSpec("centered_clipping", centered_clipping, lambda f: 2 * f + 1, needs=("state",))
