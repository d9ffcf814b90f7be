"""What the studies of federated against pooled say of their numbers: gaps, bars, intervals, tables."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import sectors
from conf.load import load
from conf.schema import RunConfig
from experiments import baselines
from experiments.studies import central_gap, heterogeneity, hospitals
from experiments.studies.central_gap import Outcome, Task
from sectors import training
from sectors.base import Place, num_rows
from sectors.healthcare_wisconsin import HealthcareWisconsin


def outcome(federated: float, pooled: float, direction: str = "max", **nodes: dict[str, float | None]) -> Outcome:
    return Outcome("auc", direction, federated, pooled, 0.5, 0.75, nodes, 1.0)


# ---------------------------------------------------------------- bars


@pytest.mark.parametrize(("federated", "holds"), [(0.881, True), (0.879, False), (0.95, True)])
def test_a_metric_may_be_two_points_below_the_pooled_one(federated: float, holds: bool) -> None:
    assert central_gap.within([outcome(federated, 0.90)]) is holds


@pytest.mark.parametrize(("federated", "holds"), [(13.91, True), (13.93, False), (12.0, True)])
def test_an_error_may_be_the_pooled_one_over_097(federated: float, holds: bool) -> None:
    assert central_gap.within([outcome(federated, 13.5, "min")]) is holds


def test_a_gap_is_what_federating_costs_whichever_way_is_better() -> None:
    assert central_gap.gap([outcome(0.8, 0.9), outcome(0.9, 0.9)]) == pytest.approx(0.05)
    assert central_gap.gap([outcome(14.0, 13.0, "min")]) == pytest.approx(1.0)


def test_the_bar_is_of_means_over_seeds_and_a_line_says_so() -> None:
    many = [outcome(0.85, 0.90), outcome(0.92, 0.90)]
    assert central_gap.within(many)
    line = central_gap.row(Task("banks", "pilot"), many)
    assert "| 0.8850 (0.8500 to 0.9200) | 0.9000 (0.9000 to 0.9000) |" in line
    assert "| +0.0150 | yes |" in line


def test_every_shipped_sector_is_measured_and_an_experiment_of_its_name_is_its_recipe() -> None:
    assert sorted(central_gap.TASKS) == sectors.names()
    assert Task("retail", "countries").settings == ["experiment=retail", "nodes=countries"]
    assert Task("banks", "pilot").settings == ["sector=banks", "nodes=pilot"]
    assert [t.nodes for t in central_gap.tasks_of("banks")] == ["pilot", "consortium"]
    assert central_gap.tasks_of("banks/pilot") == [Task("banks", "pilot")]


# ---------------------------------------------------------------- tables by node


def test_a_node_without_a_score_is_a_dash_and_the_best_of_a_line_is_bold() -> None:
    one = outcome(0.9, 0.9, a={"local_only": 0.5, "pooled": 0.7, "federated": 0.6, "tuned": 0.6}, b={"federated": None})
    lines = central_gap.node_table([one])
    assert lines[0] == "| node | local_only | pooled | federated | tuned |"
    assert lines[2:] == ["| a | 0.5000 | 0.7000 | 0.6000 | 0.6000 |", "| b | - | - | - | - |"]
    table = heterogeneity.table(Task("banks", "pilot"), {k: [one] for k in ("fine_tune", "fedprox", "local_head")})
    assert "| a | 0.5000 | **0.7000** | 0.6000 | 0.6000 | 0.6000 | 0.6000 |" in table
    assert table[-1] == "| all | 0.5000 | **0.9000** | **0.9000** | **0.9000** | **0.9000** | 0.7500 |"


# ---------------------------------------------------------------- intervals of repeated cross-validation


def test_an_interval_by_hand() -> None:
    # J = 4, s^2 = 0.02 / 3; of 5 folds, 1 in 10 of the rest validates: n_test / n_train = 1 / (4 * 0.9)
    mean, low, high = hospitals.interval([0.0, 0.1, 0.0, -0.1], num_folds=5, validation_fraction=0.1)
    half = stats.t.ppf(0.975, 3) * np.sqrt((1 / 4 + 1 / 3.6) * 0.02 / 3)
    assert (mean, low, high) == pytest.approx((0.0, -half, half))


def test_a_fold_that_cannot_be_scored_does_not_count() -> None:
    known = hospitals.interval([0.1, 0.2, 0.3])
    assert hospitals.interval([0.1, float("nan"), 0.2, 0.3]) == known


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    # of 25 folds of the same 100 rows: taken for independent, their intervals would hold the truth in 6 of 10 cases
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        rows = rng.normal(size=100)
        differences = []
        for _ in range(5):
            for fold in np.array_split(rng.permutation(100), 5):
                differences.append(rows[fold].mean())
        _, low, high = hospitals.interval(differences)
        held += low <= 0.0 <= high
    # 95 % of 300 is 285; four standard errors are 15
    assert held >= 270


def test_the_hospitals_of_the_study_are_those_of_the_data() -> None:
    found = hospitals.classes()
    assert found["switzerland"] == (8, 115)
    assert sum(map(sum, found.values())) == 920


# ---------------------------------------------------------------- the baselines' budget


def test_pooled_training_takes_as_many_rows_a_round_as_the_nodes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config: RunConfig = load(
        ["data=synthetic", "rounds=3", "sector.training.max_examples=40", "sector.training.epochs=2"]
    )
    sector = HealthcareWisconsin()
    data = [sector.load(Place(part, 3, synthetic=True)) for part in range(3)]
    asked: list[tuple[int, int | None, int]] = []
    train = training.train

    def watched(*arguments: object, seed: int, **options: object) -> training.Trained:
        asked.append((arguments[1].epochs, arguments[1].max_examples, seed))  # type: ignore[attr-defined]
        return train(*arguments, seed=seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", watched)
    baselines.pooled(config, sector, config.nodes.expand(), data)
    together = sum(min(num_rows(each.train), 40) for each in data)
    assert 40 < together < 120
    assert [each[:2] for each in asked] == [(2, together)] * 3
    assert len({seed for *_, seed in asked}) == 3, "each round draws other rows"
    asked.clear()
    whole: RunConfig = load(["data=synthetic", "rounds=3", "sector.training.epochs=2"])
    baselines.pooled(whole, sector, whole.nodes.expand(), data)
    assert [each[:2] for each in asked] == [(6, None)]
