"""What the server does with the aggregate: pure functions `(state, aggregate_d) -> (state, step_d)`.

The aggregate plays the part of a negative gradient.  Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
https://arxiv.org/abs/2003.00295  State and arithmetic are float64; there is no bias correction, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from trellis.errors import ConfigError

Float = npt.NDArray[np.floating]
State = Mapping[str, npt.NDArray[np.generic]]
ServerOptimizer = Callable[[State, Float], tuple[State, Float]]


def plain(*, lr: float = 1.0) -> ServerOptimizer:
    """step = lr * aggregate (FedAvg for lr = 1)."""

    def update(state: State, aggregate_d: Float) -> tuple[State, Float]:
        return state, lr * aggregate_d.astype(np.float64)

    return update


def momentum(*, lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """m = beta m + aggregate; step = lr m.  FedAvgM, Hsu et al. 2019.  https://arxiv.org/abs/1909.06335"""

    def update(state: State, aggregate_d: Float) -> tuple[State, Float]:
        m = beta * _slot(state, "m", aggregate_d) + aggregate_d
        return {"m": m}, lr * m

    return update


def adam(*, lr: float = 0.02, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam: v = beta2 v + (1 - beta2) g^2;  step = lr m / (sqrt(v) + tau)."""

    def second_moment(v: Float, g: Float) -> Float:
        return beta2 * v + (1 - beta2) * g * g

    return _adaptive(second_moment, lr=lr, beta1=beta1, tau=tau)


def yogi(*, lr: float = 0.02, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedYogi: v = v - (1 - beta2) g^2 sign(v - g^2);  step = lr m / (sqrt(v) + tau)."""

    def second_moment(v: Float, g: Float) -> Float:
        return v - (1 - beta2) * g * g * np.sign(v - g * g)

    return _adaptive(second_moment, lr=lr, beta1=beta1, tau=tau)


def _adaptive(
    second_moment: Callable[[Float, Float], Float], *, lr: float, beta1: float, tau: float
) -> ServerOptimizer:
    def update(state: State, aggregate_d: Float) -> tuple[State, Float]:
        g = aggregate_d.astype(np.float64)
        m = beta1 * _slot(state, "m", g) + (1 - beta1) * g
        # v starts at tau^2 (Algorithm 2: v_{-1} >= tau^2)
        v = second_moment(_slot(state, "v", g, fill=tau * tau), g)
        return {"m": m, "v": v}, lr * m / (np.sqrt(v) + tau)

    return update


def _slot(state: State, name: str, like: Float, *, fill: float = 0.0) -> Float:
    return state[name].astype(np.float64) if name in state else np.full(like.shape, fill, np.float64)


def get(name: str, *, lr: float, momentum: float, beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    """The optimizer of a config.  Raises ConfigError naming the catalogue."""
    makers: dict[str, Callable[[], ServerOptimizer]] = {
        "none": lambda: plain(lr=lr),
        "momentum": lambda: _momentum(lr=lr, beta=momentum),
        "adam": lambda: adam(lr=lr, beta1=beta1, beta2=beta2, tau=tau),
        "yogi": lambda: yogi(lr=lr, beta1=beta1, beta2=beta2, tau=tau),
    }
    if name not in makers:
        raise ConfigError(f"there is no server optimizer {name!r}; choose one of: {', '.join(makers)}")
    return makers[name]()


_momentum = momentum
