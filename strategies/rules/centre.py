"""Rules that look for a centre of the rows: geometric median, centered clipping.

Both move a point that is always a combination of rows, so they iterate on n coefficients with the matrix of products
and touch the rows only twice: once for the products, once for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from strategies.rows import (
    Float64,
    Updates,
    about_middle,
    combine,
    products,
    require_rows,
    rows_of,
    single_threaded_blas,
)
from trellis.errors import ConfigError
from trellis.types import Aggregated, RuleSpec

State = Mapping[str, npt.NDArray[np.generic]]

MAX_HALVINGS = 12
"""Of a Newton step, which overshoots where many rows lie in one place."""


def geometric_median(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    smoothing: float = 1e-6,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
    sketch_dim: int = 0,
    rng: np.random.Generator | None = None,
) -> Aggregated:
    """argmin_z sum_i ||z - x_i||, to convergence.  (n, d) -> (d,)

    The paper's smoothed sum: distances below nu count as ||z - x||^2 / (2 nu) + nu / 2.  nu is `smoothing` times the
    median distance of the middle row to the others, and a step of `tolerance` of that distance ends it; it starts at
    the mean of the nearer half: f liars, however far, move none of these.  Needs n >= 2 f + 1, else CohortTooSmall.
    Pillutla et al., IEEE TSP 2022, Section IV.  https://arxiv.org/abs/1912.13445
    """
    rows, f = rows_of(updates_nd), num_byzantine
    require_rows("geometric_median", rows, 2 * f + 1, f)
    about_nn, squared_nn = about_middle(rows, sketch_dim=sketch_dim, rng=rng)
    medians = np.median(np.sqrt(squared_nn), axis=1)
    middle, scale = int(np.argmin(medians)), float(medians.min())
    half = np.argsort(squared_nn[middle], kind="stable")[: rows.num_rows // 2 + 1]
    weights_n = np.bincount(half, minlength=rows.num_rows) / len(half)
    if scale > 0:  # else most rows are in one place, and that is the median
        with single_threaded_blas():
            weights_n = minimised(
                about_nn, weights_n, nu=smoothing * scale, least_step=tolerance * scale, max_iterations=max_iterations
            )
    return Aggregated(combine(rows, weights_n), weights_n)


def minimised(about_nn: Float64, weights: Float64, *, nu: float, least_step: float, max_iterations: int) -> Float64:
    """Coefficients, adding up to 1, of the point with the least smoothed sum of distances.  (n, n), (n,) -> (n,)

    Newton's steps where they help, else Weiszfeld's, which always does but converges like (f / (n - f))^k.  With
    r_i = max(||z - x_i||, nu), v_i = (z - x_i) / r_i and s = sum 1 / r_i the gradient is V 1 and the Hessian
    s I - V R^-1 V^T (without the rows nearer than nu), so both steps are combinations of z - x_i:
    -V 1 / s, and by Woodbury -V (1 + (s R - K)^-1 K 1) / s with K = V^T V.
    """
    point = _Point.of(about_nn, weights, nu)
    for _ in range(max_iterations):
        better = _step(about_nn, point, nu)
        if not better.total < point.total:
            break
        change = better.weights - point.weights
        point = better
        if change @ about_nn @ change <= least_step**2:
            break
    return point.weights


def _step(about_nn: Float64, point: _Point, nu: float) -> _Point:
    """Newton's step, halved until it does better than Weiszfeld's; else that one."""
    sure, newton = _Point.of(about_nn, point.moved(point.weiszfeld()), nu), point.newton()
    for halvings in range(MAX_HALVINGS):
        bold = _Point.of(about_nn, point.moved(newton / 2**halvings), nu)
        if bold.total < sure.total:
            return bold
    return sure


@dataclass(frozen=True, slots=True)
class _Point:
    """A combination of rows, and how it lies to them."""

    weights: Float64
    between_nn: Float64
    """(z - x_i) . (z - x_j)"""
    radii: Float64
    """r_i"""
    total: float
    """The smoothed sum of distances."""

    @classmethod
    def of(cls, about_nn: Float64, weights: Float64, nu: float) -> _Point:
        along = about_nn @ weights
        between = about_nn - along[:, None] - along[None, :] + weights @ along
        distances = np.sqrt(np.maximum(between.diagonal(), 0.0))
        total = np.where(distances < nu, distances**2 / (2 * nu) + nu / 2, distances).sum()
        return cls(weights, between, np.maximum(distances, nu), float(total))

    def weiszfeld(self) -> Float64:
        """b of the step sum_i b_i (z - x_i)."""
        pull = 1.0 / self.radii
        step: Float64 = -pull / pull.sum()
        return step

    def newton(self) -> Float64:
        """b of the step sum_i b_i (z - x_i)."""
        r = self.radii
        s = (1.0 / r).sum()
        k = self.between_nn / (r[:, None] * r[None, :])
        gradient = k.sum(axis=1)
        curved = k.diagonal() > 1.0 - 1e-9  # not nearer than nu: there the sum is a plain square
        bent = k * curved[:, None] * curved[None, :]
        try:
            more = np.linalg.solve(np.diag(s * r) - bent, gradient * curved)
        except np.linalg.LinAlgError:
            more = np.zeros_like(r)
        step: Float64 = -(1.0 + more * curved) / (s * r)
        return step

    def moved(self, b: Float64) -> Float64:
        """The weights after the step."""
        after: Float64 = self.weights * (1.0 + b.sum()) - b
        return after


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
