"""Lies that are searched for: as far from the honest mean as distances, or the run's own rule, let them go.

m = mu + gamma p, with p one of -mu / ||mu||, -sign(mu), -sigma.  Shejwalkar and Houmansadr, NDSS 2021,
https://www.ndss-symposium.org/ndss-paper/manipulating-the-byzantine-optimizing-model-poisoning-attacks-and-defenses-for-federated-learning/
Their code halves gamma from 10; where the constraint is on distances gamma is the root of a quadratic, and is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from experiments.attacks.view import View
from strategies import rows
from trellis.errors import CohortTooSmall, ConfigError, NotFinite
from trellis.types import Aggregated
from trellis.vectors import Vector, norm

Float64 = npt.NDArray[np.float64]

UNSEEN = 10.0
"""Where the search for a tailored gamma starts, in units of the gamma of min_max."""


def min_max(view: View, *, direction: str = "std") -> Vector:
    """The largest gamma with max_i ||m - x_i|| <= max_ij ||x_i - x_j||.  -> (d,)"""
    mu_d, p_d = view.mean(), perturbation(view, direction)
    return _moved(mu_d, _min_max_gamma(view, mu_d, p_d), p_d)


def min_sum(view: View, *, direction: str = "std", bound: str = "max") -> Vector:
    """The largest gamma with sum_i ||m - x_i||^2 <= max_i sum_j ||x_i - x_j||^2.  -> (d,)

    `bound="min"`: <= min_i, as the authors' code has it.  As sum_i (mu - x_i) = 0, both sides less sum_i ||x_i - mu||^2
    are h gamma^2 ||p||^2 and h max_i ||x_i - mu||^2.
    """
    extreme = {"max": np.max, "min": np.min}.get(bound)
    if extreme is None:
        raise ConfigError(f"attack=min_sum: bound is {bound!r}; choose max or min")
    mu_d, p_d = view.mean(), perturbation(view, direction)
    c = norm(p_d) ** 2
    spread_h = rows.products(view.honest_hd, centre_d=mu_d).diagonal()
    return _moved(mu_d, float(np.sqrt(extreme(spread_h) / c)) if c else 0.0, p_d)


def agr_tailored(view: View, *, direction: str = "std", evaluations: int = 20) -> Vector:
    """The gamma with which the run's own rule goes furthest from the honest mean.  -> (d,)

    Three searches, and the best of them: the largest gamma at which the rule still counts all attackers (as in the
    authors' code), the largest at which it counts one (their rows are equal: Krum takes one of them), both where it
    says whom it counts, and a line search for the damage itself.
    """
    mu_d, p_d = view.mean(), perturbation(view, direction)
    unit = _min_max_gamma(view, mu_d, p_d)
    trial = Trial(view, mu_d)

    def damage(gamma: float) -> float:
        return trial.damage(_moved(mu_d, gamma * unit, p_d))

    found = [line_maximum(damage, step=1.0, most=UNSEEN, evaluations=evaluations)]
    if trial.selects:
        for counts in (trial.counts_all, trial.counts_one):
            found.append(
                largest(
                    lambda gamma, counts=counts: counts(_moved(mu_d, gamma * unit, p_d)),  # type: ignore[misc]
                    start=UNSEEN,
                    evaluations=evaluations,
                )
            )
    return _moved(mu_d, max(found, key=damage) * unit, p_d)


def perturbation(view: View, direction: str) -> Vector:
    """p, the direction in which a lie leaves the mean.  -> (d,)"""
    match direction:
        case "unit":
            mu_d = view.mean()
            length = norm(mu_d)
            return -mu_d / np.float32(length) if length else mu_d
        case "sign":
            return -np.sign(view.mean())
        case "std":
            return -view.deviation()
    raise ConfigError(f"direction is {direction!r}; choose unit, sign or std")


def _min_max_gamma(view: View, mu_d: Vector, p_d: Vector) -> float:
    """||mu + gamma p - x_i||^2 = a_i + 2 gamma b_i + gamma^2 c <= D^2 for every i: the least of the larger roots."""
    about_hh = rows.products(view.honest_hd, centre_d=mu_d)
    a_h = about_hh.diagonal()
    b_h = float(mu_d.astype(np.float64) @ p_d.astype(np.float64)) - rows.dots(view.honest_hd, p_d)
    c = norm(p_d) ** 2
    if not c:
        return 0.0
    diameter = float((a_h[:, None] + a_h[None, :] - 2 * about_hh).max())
    room_h = np.maximum(diameter - a_h, 0.0)
    return max(float(((np.sqrt(b_h**2 + c * room_h) - b_h) / c).min()), 0.0)


def _moved(mu_d: Vector, gamma: float, p_d: Vector) -> Vector:
    return (mu_d + gamma * p_d.astype(np.float64)).astype(np.float32)


class Trial:
    """The run's own rule, asked what it would make of a lie that all attackers send."""

    def __init__(self, view: View, mu_d: Vector) -> None:
        if view.aggregate is None:
            raise ConfigError("this attack tries its lies on the run's own rule, and the view has no `aggregate`")
        self._aggregate, self._mu_d, self._num_honest = view.aggregate, mu_d, len(view.honest_hd)
        self._rows_nd = np.empty((self._num_honest + view.num_attackers, len(mu_d)), np.float32)
        self._rows_nd[: self._num_honest] = view.honest_hd

    @property
    def selects(self) -> bool:
        """Whether the rule says who counted."""
        return self._weights(self._mu_d) is not None

    def counts_all(self, lie_d: Vector) -> bool:
        """Whether every attacker has a weight above 0."""
        weights = self._weights(lie_d)
        return weights is not None and bool((weights > 0).all())

    def counts_one(self, lie_d: Vector) -> bool:
        """Whether an attacker has a weight above 0."""
        weights = self._weights(lie_d)
        return weights is not None and bool((weights > 0).any())

    def damage(self, lie_d: Vector) -> float:
        """How far the aggregate is from the honest mean."""
        return norm(self._asked(lie_d).update_d - self._mu_d)

    def _weights(self, lie_d: Vector) -> Float64 | None:
        """The attackers' weights."""
        weights = self._asked(lie_d).weights_n
        if weights is None or len(weights) != len(self._rows_nd):
            return None
        return weights[self._num_honest :]

    def _asked(self, lie_d: Vector) -> Aggregated:
        self._rows_nd[self._num_honest :] = lie_d
        try:
            answer = self._aggregate(self._rows_nd)
        except (CohortTooSmall, NotFinite):  # the round would close: no harm done
            return Aggregated(self._mu_d)
        return answer if isinstance(answer, Aggregated) else Aggregated(answer)


def largest(holds: Callable[[float], bool], *, start: float, evaluations: int) -> float:
    """The largest place in 0 .. 2 start at which `holds`, by halving steps; 0 where it never does."""
    found, at, step = 0.0, start, start / 2
    for _ in range(evaluations):
        if holds(at):
            found, at = at, at + step
        else:
            at -= step
        step /= 2
    return found


def line_maximum(value: Callable[[float], float], *, step: float, most: float, evaluations: int) -> float:
    """Where `value` is largest in 0 .. most, as far as so many calls can tell.

    Steps double while it grows, then shrink around the best place; as the line search that Opt-IPM and Opt-ALIE have in
    byzfl.
    """
    best, highest, left = 0.0, value(0.0), evaluations - 1

    def better(at: float) -> bool:
        nonlocal best, highest, left
        if left <= 0 or at == best:
            return False
        left -= 1
        found = value(at)
        if found <= highest:
            return False
        best, highest = at, found
        return True

    while better(min(best + step, most)):
        step *= 2
    while left > 0 and step > 1e-6 * most:
        step *= 0.6
        if not better(min(best + step, most)):
            better(max(best - step, 0.0))
    return best
