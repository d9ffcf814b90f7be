"""What the README promises: two of ten banks lie, the mean is lost and the recipe is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.simulate import simulate
from server.run import RunResult
from trellis.errors import MissingData

BANKS = ["sector=banks", "nodes=consortium", "rounds=5", "tracking=none", "engine.links=false"]


def run(tmp_path: Path, *overrides: str) -> RunResult:
    try:
        return simulate([*BANKS, f"runs_dir={tmp_path}", *overrides])
    except MissingData as error:
        pytest.skip(str(error))


def test_two_of_ten_banks_cannot_spoil_the_model_of_the_recipe_which_costs_nothing_else(tmp_path: Path) -> None:
    lying = ["attack=scaling", "attack.options.gamma=-10", "attack.num_attackers=2"]
    calm = run(tmp_path, "run_name=calm").primary_metric["value"]
    assert run(tmp_path, "run_name=mean", *lying).primary_metric["value"] < calm - 0.5
    assert (
        run(tmp_path, "run_name=robust", "rule=robust", "num_byzantine=2", *lying).primary_metric["value"] > calm - 0.05
    )
    recipe = run(tmp_path, "run_name=recipe", "rule=robust").primary_metric["value"]
    assert recipe == pytest.approx(calm, abs=0.01)
