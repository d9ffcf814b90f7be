"""What the study of privacy against utility says of its numbers: recipes, published constants, targets, a small run."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from conf.load import load
from conf.schema import RunConfig
from experiments.studies import privacy_utility
from experiments.studies.privacy_utility import TASKS, Found, Outcome, Task
from server import build, statistics
from trellis.types import Privacy

SMALL = Task("healthcare_wisconsin", "five", privacy_utility.five(), {"rounds": 1, "batch": 64, "lr": 0.5}, {8.0: 0.98})


def found(at_1: float, at_8: float, spent: float = 7.9) -> Found:
    return {1.0: [Outcome("auc", at_1, 0.9)], 8.0: [Outcome("auc", at_8, spent), Outcome("auc", at_8 + 0.01, spent)]}


# ---------------------------------------------------------------- recipes


@cache
def composed(task: Task) -> RunConfig:
    config: RunConfig = load(task.settings(3.0))
    return config


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_private_recipe_composes_and_fits_nothing_on_rows(task: Task) -> None:
    config = composed(task)
    sector = build.check(config)
    assert sector.name == task.sector
    assert (config.privacy.name, config.privacy.target_epsilon) == (Privacy.dp, 3.0)
    assert {spec.policy.dp.delta for spec in config.nodes.expand()} == {1e-5}
    assert not sector.statistic_specs() or statistics.given(config, sector)


def test_without_privacy_the_recipe_is_the_shipped_one() -> None:
    for task in TASKS:
        assert task.settings(None) == [f"sector={task.sector}", *task.federation, "privacy=none"]


def test_constants_follow_from_declared_ranges() -> None:
    # age 0 to 120, oldpeak -5 to 10
    options = composed(next(task for task in TASKS if task.sector == "healthcare_heart")).sector.options
    centre, scale = options["centre"], options["scale"]
    assert (centre[0], centre[4]) == (60, 2.5)
    assert (scale[0], scale[4]) == pytest.approx((120 / np.sqrt(12), 15 / np.sqrt(12)), abs=1e-3)
    assert privacy_utility.published("banks") == []


# ---------------------------------------------------------------- what is said


def test_a_mean_below_its_target_is_said_and_so_is_a_budget_overspent() -> None:
    assert privacy_utility.misses(SMALL, found(0.5, 0.976)) == []
    assert privacy_utility.misses(SMALL, found(0.5, 0.97)) == [
        "healthcare_wisconsin/five: 0.9750 at epsilon 8, and 0.98 is the target"
    ]
    assert "epsilon 8.1 was spent" in privacy_utility.misses(SMALL, found(0.5, 0.99, spent=8.1))[0]


def test_a_line_of_the_table_has_means_ranges_and_the_recipe() -> None:
    heads, _, line = privacy_utility.table({SMALL: found(0.5, 0.9)})
    assert heads == "| sector | nodes | metric | epsilon 1 | epsilon 8 | private recipe |"
    assert "| auc | 0.5000 (0.5000 to 0.5000) | 0.9050 (0.9000 to 0.9100) | rounds 1, batch 64, lr 0.5 |" in line


# ---------------------------------------------------------------- a small run


def test_a_private_run_is_scored_on_either_split_and_can_be_made_again() -> None:
    settings = [*SMALL.settings(8.0), "data=synthetic"]
    first, again = (privacy_utility.outcome(settings, 0) for _ in range(2))
    validation = privacy_utility.outcome(settings, 0, "validation")
    assert first == again
    assert first.metric == "auc"
    assert first.epsilon is not None
    assert 7 < first.epsilon <= 8
    assert 0.5 < first.value <= 1
    assert 0.5 < validation.value <= 1
    assert validation.value != first.value
