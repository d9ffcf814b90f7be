"""Two steps of every server optimizer, by the formulas of Reddi et al. (ICLR 2021), Algorithm 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from strategies import server_optimizers as so
from trellis.errors import ConfigError

G1, G2 = np.array([1.0, -2.0], np.float32), np.array([3.0, 0.0], np.float32)


def two_steps(optimizer: so.ServerOptimizer) -> list[list[float]]:
    state, first = optimizer({}, G1)
    _, second = optimizer(state, G2)
    return [first.tolist(), second.tolist()]


def test_plain_moves_by_the_aggregate() -> None:
    assert two_steps(so.plain()) == [[1, -2], [3, 0]]
    assert two_steps(so.plain(lr=0.5)) == [[0.5, -1], [1.5, 0]]


def test_momentum_by_hand() -> None:
    # m1 = g1;  m2 = 0.9 m1 + g2 = (3.9, -1.8);  step = 0.5 m
    assert np.allclose(two_steps(so.momentum(lr=0.5, beta=0.9)), [[0.5, -1.0], [1.95, -0.9]], rtol=1e-12)


def test_adam_by_hand() -> None:
    # beta1 = 0.5, beta2 = 0.75, tau = 0.1, v0 = tau^2 = 0.01
    # m1 = (0.5, -1)          v1 = 0.75 * 0.01 + 0.25 * (1, 4) = (0.2575, 1.0075)
    # m2 = (1.75, -0.5)       v2 = 0.75 * v1 + 0.25 * (9, 0) = (2.443125, 0.755625)
    first = [0.2 * 0.5 / (0.2575**0.5 + 0.1), 0.2 * -1 / (1.0075**0.5 + 0.1)]
    second = [0.2 * 1.75 / (2.443125**0.5 + 0.1), 0.2 * -0.5 / (0.755625**0.5 + 0.1)]
    found = two_steps(so.adam(lr=0.2, beta1=0.5, beta2=0.75, tau=0.1))
    assert np.allclose(found, [first, second], rtol=1e-12)


def test_yogi_by_hand() -> None:
    # v1 = 0.01 - 0.25 * (1, 4) * sign(0.01 - (1, 4)) = (0.26, 1.01)
    # v2 = v1 - 0.25 * (9, 0) * sign(v1 - (9, 0)) = (2.51, 1.01): where g is 0, v stays
    first = [0.2 * 0.5 / (0.26**0.5 + 0.1), 0.2 * -1 / (1.01**0.5 + 0.1)]
    second = [0.2 * 1.75 / (2.51**0.5 + 0.1), 0.2 * -0.5 / (1.01**0.5 + 0.1)]
    found = two_steps(so.yogi(lr=0.2, beta1=0.5, beta2=0.75, tau=0.1))
    assert np.allclose(found, [first, second], rtol=1e-12)


def test_yogis_second_moment_falls_where_the_gradient_is_small() -> None:
    yogi = so.yogi(beta2=0.75)
    state: Any = {"m": np.zeros(1), "v": np.ones(1)}
    state, _ = yogi(state, np.array([0.5], np.float32))
    assert state["v"].tolist() == [1 - 0.25 * 0.25]


ALL = {"plain": so.plain(), "momentum": so.momentum(), "adam": so.adam(), "yogi": so.yogi()}


@pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL.keys())
def test_an_optimizer_is_a_pure_function_in_float64(optimizer: so.ServerOptimizer) -> None:
    state, step = optimizer({}, G1)
    before = {k: v.tobytes() for k, v in state.items()}
    again = optimizer(state, G2)[1]
    assert np.array_equal(again, optimizer(state, G2)[1])
    assert {k: v.tobytes() for k, v in state.items()} == before
    assert step.dtype == np.float64
    assert all(v.dtype == np.float64 for v in state.values())
    assert G1.tolist() == [1, -2]


@pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL.keys())
def test_no_aggregate_from_the_start_is_no_step(optimizer: so.ServerOptimizer) -> None:
    assert not optimizer({}, np.zeros(3, np.float32))[1].any()


def test_the_catalogue_hands_every_setting_on() -> None:
    settings = {"lr": 0.2, "momentum": 0.5, "beta1": 0.5, "beta2": 0.75, "tau": 0.1}
    expected = {
        "none": so.plain(lr=0.2),
        "momentum": so.momentum(lr=0.2, beta=0.5),
        "adam": so.adam(lr=0.2, beta1=0.5, beta2=0.75, tau=0.1),
        "yogi": so.yogi(lr=0.2, beta1=0.5, beta2=0.75, tau=0.1),
    }
    for name, optimizer in expected.items():
        assert two_steps(so.get(name, **settings)) == two_steps(optimizer)
    with pytest.raises(ConfigError, match="none, momentum, adam, yogi"):
        so.get("lion", **settings)
