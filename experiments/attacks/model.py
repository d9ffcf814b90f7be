"""Lies about an update: mu and sigma are mean and deviation of the honest updates, and all attackers send the same.

Sources: byzfl (LPD-EPFL), byzantine-robust-noniid-optimizer (EPFML), FL-Byzantine-Library (CRYPTO-KU), and the papers
that each function names.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from experiments.attacks.search import Trial, line_maximum
from experiments.attacks.view import State, View
from strategies import rows
from trellis.errors import ConfigError
from trellis.vectors import Vector, norm


def sign_flip(view: View, *, of: str = "own") -> Vector:
    """-x, of the own update or of the honest mean.  -> (d,)"""
    match of:
        case "own":
            return -view.own_d
        case "mean":
            return -view.mean()
    raise ConfigError(f"attack=sign_flip: of is {of!r}; choose own or mean")


def gaussian(view: View, *, std: float = 0.5) -> Vector:
    """The global model and noise of its own: the update is N(0, std^2 I).  -> (d,)"""
    return _noise(view, std)


def infinity(view: View, *, coordinates: str = "all") -> Vector:
    """Infinity in all coordinates, or in one that all attackers agree on.  -> (d,)"""
    return _replaced(view, np.float32(np.inf), coordinates)


def not_a_number(view: View, *, coordinates: str = "all") -> Vector:
    """NaN in all coordinates, or in one that all attackers agree on.  -> (d,)"""
    return _replaced(view, np.float32(np.nan), coordinates)


def ipm(view: View, *, tau: float = 0.1, optimised: bool = False, most: float = 100.0, evaluations: int = 20) -> Vector:
    """Inner product manipulation, -tau mu; `optimised` searches tau in 0 .. most.  -> (d,)

    Xie, Koyejo and Gupta, UAI 2019, https://arxiv.org/abs/1903.03936
    """
    mu_d = view.mean()
    if optimised:
        trial = Trial(view, mu_d)
        tau = line_maximum(
            lambda at: trial.damage(np.float32(-at) * mu_d), step=1.0, most=most, evaluations=evaluations
        )
    return np.float32(-tau) * mu_d


def alie(
    view: View, *, z: float | None = None, optimised: bool = False, most: float = 10.0, evaluations: int = 20
) -> Vector:
    """A little is enough, mu - z sigma; `optimised` searches z in 0 .. most.  -> (d,)

    Baruch, Baruch and Goldberg, NeurIPS 2019, https://arxiv.org/abs/1902.06156
    """
    mu_d, sigma_d = view.mean(), view.deviation()
    if optimised:
        trial = Trial(view, mu_d)
        z = line_maximum(
            lambda at: trial.damage(mu_d - np.float32(at) * sigma_d), step=0.5, most=most, evaluations=evaluations
        )
    elif z is None:
        z = alie_z(view.n, view.num_attackers)
    return mu_d - np.float32(z) * sigma_d


def alie_z(n: int, num_attackers: int) -> float:
    """z = Phi^-1((n - f - s) / (n - f)), with s = floor(n/2 + 1) - f honest nodes to be won for a majority.

    Attackers that are a majority need win no one: s is taken as 1.
    """
    h = n - num_attackers
    s = max(n // 2 + 1 - num_attackers, 1)
    return NormalDist().inv_cdf((h - s) / h) if 0 < s < h else 0.0


def mimic(view: View) -> Vector:
    """A copy of the honest x_i furthest along z, the direction in which nodes differ most.  -> (d,)

    z is remembered (`top_direction`).  Karimireddy, He and Jaggi, ICLR 2022, https://arxiv.org/abs/2006.09365
    """
    z_d = view.state["z"].astype(np.float32)
    target = int(np.argmax(rows.dots(view.honest_hd, z_d)))
    return np.array(view.honest_hd[target])


def top_direction(view: View) -> State:
    """z by Oja's rule, about the running mean of the updates.  -> {"z": (d,), "mean": (d,), "rounds": ()}

    z <- t/(t+1) z + 1/(t+1) v/||v||, v = sum_i <x_i - mean, z> (x_i - mean); the first z is drawn.
    """
    mu_d = view.mean()
    t = int(view.state.get("rounds", np.asarray(0)))
    drawn = view.rng.standard_normal(len(mu_d), np.float32)
    z_d = view.state.get("z", drawn).astype(np.float32)
    mean_d = (t * view.state.get("mean", mu_d).astype(np.float64) + mu_d) / (t + 1)
    along_h = rows.dots(view.honest_hd, z_d) - float(mean_d @ z_d.astype(np.float64))
    v_d = rows.combine(view.honest_hd, along_h) - along_h.sum() * mean_d
    moved_d = (t * z_d.astype(np.float64) + _unit(v_d)) / (t + 1)
    return {
        "z": _unit(moved_d).astype(np.float32),
        "mean": mean_d.astype(np.float32),
        "rounds": np.asarray(t + 1, np.int64),
    }


def free_rider(view: View, *, mode: str = "zero", std: float = 0.01) -> Vector:
    """An update that cost no training: zero, noise, the last step of the global model, or that step with noise on it.

    The noise is N(0, std^2 I), on the last step with that step's own deviation.  -> (d,)
    Lin, Du and Liu, 2019, https://arxiv.org/abs/1911.12560
    """
    previous_d = np.zeros_like(view.own_d) if view.previous_step_d is None else view.previous_step_d
    match mode:
        case "zero":
            return np.zeros_like(view.own_d)
        case "noise":
            return _noise(view, std)
        case "previous":
            return previous_d.copy()
        case "previous_noise":
            return previous_d + _noise(view, float(previous_d.std(dtype=np.float64)))
    raise ConfigError(f"attack=free_rider: mode is {mode!r}; choose zero, noise, previous or previous_noise")


def scaling(view: View, *, gamma: float | None = None, max_norm: float | None = None) -> Vector:
    """Model replacement: gamma times the own update, n / f unless given, cut to a norm.  -> (d,)

    Bagdasaryan et al., AISTATS 2020, https://arxiv.org/abs/1807.00459
    """
    return boosted(view.own_d, scale=view.n / view.num_attackers if gamma is None else gamma, max_norm=max_norm)


def boosted(update_d: Vector, *, scale: float = 1.0, max_norm: float | None = None) -> Vector:
    """scale times the update, shortened to max_norm where it is longer.  (d,) -> (d,)"""
    length = abs(scale) * norm(update_d)
    if max_norm is not None and length > max_norm:
        scale *= max_norm / length
    return np.float32(scale) * update_d


def rop(view: View, *, angle: float = 90.0, location: float = 1.0, blend: float = 0.9, length: float = 1.0) -> Vector:
    """Relocated orthogonal perturbation, against clipping about a centre.  -> (d,)

    With c the last step of the global model (the centre), v = blend c + (1 - blend) mu, and r all ones made orthogonal
    to v:  location c + (1 - location) mu + length ||mu|| (sin(angle) r/||r|| + cos(angle) v/||v||).  The first time
    c = 0 and v = mu.  Ozfatura et al., IEEE TIFS 2024, https://arxiv.org/abs/2208.09894; there lengths are absolute.
    """
    mu_d = view.mean().astype(np.float64)
    c_d = np.zeros_like(mu_d) if view.previous_step_d is None else view.previous_step_d.astype(np.float64)
    v_d = _unit(blend * c_d + (1 - blend) * mu_d) if c_d.any() else _unit(mu_d)
    r_d = _unit(1.0 - v_d.sum() * v_d)
    turn = math.radians(angle)
    offset_d = length * np.linalg.norm(mu_d) * (math.sin(turn) * r_d + math.cos(turn) * v_d)
    return (location * c_d + (1 - location) * mu_d + offset_d).astype(np.float32)


def _noise(view: View, std: float) -> Vector:
    if not (math.isfinite(std) and std >= 0):
        raise ConfigError(f"std is {std}; it must be at least 0, and finite")
    return view.private_rng.standard_normal(len(view.own_d), np.float32) * np.float32(std)


def _replaced(view: View, value: np.float32, coordinates: str) -> Vector:
    match coordinates:
        case "all":
            return np.full_like(view.own_d, value)
        case "one":
            lie_d = view.own_d.copy()
            lie_d[view.rng.integers(len(lie_d))] = value
            return lie_d
    raise ConfigError(f"coordinates is {coordinates!r}; choose all or one")


def _unit(vector_d: np.ndarray) -> np.ndarray:
    """The vector at length 1; 0 stays 0."""
    length = float(np.linalg.norm(vector_d))
    return vector_d / length if length else vector_d
