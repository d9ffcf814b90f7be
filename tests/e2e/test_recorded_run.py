"""A whole run, as a user finds it in MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient, pyfunc

import sectors
from experiments.simulate import simulate
from server.run import RunResult

OVERRIDES = ["sector=banks", "data=synthetic", "rounds=2", "sector.options.synthetic_rows=900", "seed=3"]


@pytest.fixture(scope="module")
def recorded(template_db: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, MlflowClient]:
    runs = tmp_path_factory.mktemp("runs")
    shutil.copy(template_db, runs / "mlflow.db")
    result = simulate([*OVERRIDES, f"runs_dir={runs}", "nodes.items.1.policy.sectors=[healthcare_wisconsin]"])
    return result, MlflowClient(result.tracking_uri, result.tracking_uri)


def runs_of(client: MlflowClient, role: str) -> list[Any]:
    experiment = client.get_experiment_by_name("banks")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`fl.role` = '{role}'"))


def test_the_federations_run_says_what_it_was(recorded: tuple[RunResult, MlflowClient]) -> None:
    result, client = recorded
    (run,) = runs_of(client, "federation")
    tags, params = run.data.tags, run.data.params
    assert tags["fl.run"] == result.run_id
    found = {k: tags[f"fl.{k}"] for k in ("sector", "rule", "privacy", "attack", "engine", "data")}
    assert found == {
        "sector": "banks",
        "rule": "mean",
        "privacy": "none",
        "attack": "none",
        "engine": "local",
        "data": "synthetic",
    }
    assert len(tags["fl.config_digest"]) == 64
    assert (params["seed"], params["sector.training.momentum"], params["data"]) == ("3", "0.9", "synthetic")
    assert run.info.status == "FINISHED"


def test_its_charts_hold_every_round_and_the_closing_evaluation(recorded: tuple[RunResult, MlflowClient]) -> None:
    result, client = recorded
    (run,) = runs_of(client, "federation")

    def steps(key: str) -> list[int]:
        return [m.step for m in client.get_metric_history(run.info.run_id, key)]

    assert steps("val/ap") == [0, 1, 2]
    assert steps("test/ap") == [2]
    for key in ("train/loss", "update/norm_max", "comm/bytes_up", "comm/bytes_down", "refusals/policy_sector"):
        assert steps(key) == [1, 2], key
    assert steps("round/seconds_exchange") == [1, 2]
    assert run.data.metrics["test/ap"] == result.metrics["test/ap"]
    assert run.data.metrics["refusals/policy_sector"] == 1


def test_each_node_has_a_child_run_and_the_refusing_one_says_so(recorded: tuple[RunResult, MlflowClient]) -> None:
    _, client = recorded
    (parent,) = runs_of(client, "federation")
    nodes = {run.data.tags["fl.node"]: run for run in runs_of(client, "node")}
    assert set(nodes) == {"north", "south", "west"}
    assert {run.data.tags["mlflow.parentRunId"] for run in nodes.values()} == {parent.info.run_id}
    assert nodes["south"].data.metrics["refused"] == 1
    assert nodes["north"].data.metrics["refused"] == 0
    assert nodes["north"].data.metrics["update/weight"] == 0.5


def test_every_rounds_version_is_registered_with_its_lineage(recorded: tuple[RunResult, MlflowClient]) -> None:
    result, client = recorded
    versions = sorted(client.search_model_versions("name='trellis-banks'"), key=lambda v: int(v.version))
    assert [v.tags["fl.round"] for v in versions] == ["1", "2"]
    assert versions[-1].tags["fl.digest"] == result.model_digest
    assert versions[-1].tags["fl.run"] == result.run_id
    assert "north" in versions[-1].tags["fl.nodes"]
    assert "south" not in versions[-1].tags["fl.nodes"], "a node that refused contributed nothing"
    assert result.model_version == int(versions[-1].version)
    assert int(client.get_model_version_by_alias("trellis-banks", "final").version) == result.model_version


def test_a_registered_version_loads_back_and_predicts(recorded: tuple[RunResult, MlflowClient]) -> None:
    _, client = recorded
    source = client.get_model_version_by_alias("trellis-banks", "final").source
    table = sectors.get("banks", {"synthetic_rows": 900}).generate()
    predicted = pyfunc.load_model(source).predict(table.drop(columns="Class"))
    assert predicted.shape == (len(table),)
    frauds = table["Class"].to_numpy() == 1
    assert np.mean(predicted[frauds]) > 3 * np.mean(predicted[~frauds]), "it learned something"


def test_a_server_that_is_down_costs_a_run_nothing_but_the_wait(tmp_path: Path) -> None:
    settings = ["tracking.uri=http://127.0.0.1:9", "tracking.close_timeout_s=1", f"runs_dir={tmp_path}"]
    result = simulate(["rounds=1", *settings])
    alone = simulate(["rounds=1", "tracking=none", f"runs_dir={tmp_path}"])
    assert result.records_pending == 2
    assert result.model_digest == alone.model_digest
