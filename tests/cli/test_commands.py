"""The command line: results on stdout, the rest on stderr, 0 yes, 1 no, 2 misuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trellis.cli import COMMANDS, main

FAST = ["rounds=1", "tracking=none"]

KEYS = {
    "run_id", "run_name", "run_dir", "tracking_uri", "sector", "data_source", "engine", "rounds", "primary_metric",
    "baselines", "model_digest", "model_version", "refusals", "seconds", "bytes_up", "bytes_down", "epsilon_max",
}  # fmt: skip
"""Promised to users: keys are added, never renamed."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["simulate", "--json", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one object on stdout and nothing else"
    return json.loads(out)


def test_simulate_prints_one_object_with_every_promised_key(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    result = simulated(capsys, *FAST, "run_name=one", f"runs_dir={runs}")
    assert set(result) >= KEYS
    assert (result["sector"], result["data_source"], result["engine"]) == ("healthcare_wisconsin", "real", "local")
    assert result["primary_metric"]["name"] == "auc"
    assert 0.5 < result["primary_metric"]["value"] <= 1
    assert len(result["model_digest"]) == 64
    assert result["refusals"] == []
    assert result["bytes_up"] > result["bytes_down"] > 0
    assert result["epsilon_max"] is None
    assert result["tracking_uri"] is None
    assert result["baselines"] is None


def test_simulate_with_baselines_says_what_federating_gained(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    result = simulated(capsys, *FAST, "baselines=true", f"runs_dir={runs}")
    assert 0.5 < result["baselines"]["pooled"]["auc"] <= 1
    assert set(result["baselines"]["local_only"]["nodes"]) == {"north", "south", "west"}


def test_a_sweep_runs_every_combination(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    results = simulated(capsys, "--multirun", *FAST, "seed=0,1", f"runs_dir={runs}")
    assert len(results) == 2
    assert results[0]["model_digest"] != results[1]["model_digest"]


def test_the_same_seed_gives_the_same_model(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    first, second = (simulated(capsys, *FAST, "seed=5", f"runs_dir={runs}") for _ in range(2))
    assert first["model_digest"] == second["model_digest"]
    assert first["run_id"] != second["run_id"]


def test_people_get_a_table_and_what_to_try_next(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["simulate", *FAST, "run_name=shown", f"runs_dir={runs}"]) == 0
    captured = capsys.readouterr()
    for text in ("shown", "test auc", "model ", "digest ", "trellis ui", "resume=shown"):
        assert text in captured.out
    assert "3 nodes, real data" in captured.err


def test_synthetic_rows_are_named_wherever_a_result_is_shown(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["simulate", *FAST, "data=synthetic", "run_name=made-up", f"runs_dir={runs}"]) == 0
    captured = capsys.readouterr()
    assert "SYNTHETIC" in captured.out
    assert "SYNTHETIC" in captured.err
    card = json.loads((runs / "made-up" / "versions" / "round-00001" / "card.json").read_text())
    assert card["data_source"] == "synthetic"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rule=krumm"], "choose one of: mean"),
        (["sector=bank"], "banks, healthcare_wisconsin"),
        (["rouns=3"], "did you mean rounds"),
        (["rounds=many"], "could not be converted to Integer"),
        (["rounds=0"], "must be at least 1"),
        (["num_byzantine=1"], "tolerates no liar"),
        (["min_replies=4"], "at most 3 of 3 training nodes"),
        (["device=cuda:99"], "device=cuda:99 cannot be used"),
        (["sector.options.partition=none"], "partition"),
        (["x._target_=os.system"], "never names code"),
        (["data=synthetic", "nodes=cross_device"], "569 rows"),
    ],
)
def test_misuse_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], runs: Path, overrides: list[str], said: str
) -> None:
    before = set(runs.iterdir())
    assert main(["simulate", *overrides, f"runs_dir={runs}"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert set(runs.iterdir()) == before, "nothing is written"


def test_a_missing_file_names_the_file_the_data_set_and_the_variable(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    assert main(["simulate", "sector=banks", f"runs_dir={runs}"]) == 2
    said = capsys.readouterr().err
    for text in ("creditcard", "mlg-ulb/creditcardfraud", "TRELLIS_DATA", "data=synthetic"):
        assert text in said


def test_a_refusing_node_is_named_with_its_reason(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    only_banks = "nodes.items.2.policy.sectors=[banks]"
    assert main(["simulate", *FAST, only_banks, f"runs_dir={runs}"]) == 0
    out = capsys.readouterr().out
    assert "west, 2 times: policy.sector (" in out
    assert "not in healthcare_wisconsin" in out


def test_a_run_in_which_every_node_refuses_fails_and_says_why(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    refusing = [f"nodes.items.{i}.policy.least_privacy=dp" for i in range(3)]
    result_code = main(["simulate", *FAST, *refusing, f"runs_dir={runs}"])
    captured = capsys.readouterr()
    assert result_code == 1
    assert "the model stays" in captured.err
    assert "policy.privacy" in captured.out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"trellis {command}" in capsys.readouterr().out


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_an_unknown_command_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulat"])
    assert left.value.code == 2
    assert "simulate" in capsys.readouterr().err


def test_sectors_lists_task_metric_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sectors"]) == 0
    assert "creditcard_sample" in capsys.readouterr().out.replace("\n", "")
    assert main(["sectors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {s["name"]: s["primary_metric"]["name"] for s in listed} == {"banks": "ap", "healthcare_wisconsin": "auc"}


def test_nodes_show_describes_who_owns_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes", "show"]) == 0
    assert "North Trust" in capsys.readouterr().out
    assert main(["nodes", "show", "nodes=cross_device"]) == 0
    assert "and 980 more" in capsys.readouterr().out
    assert main(["nodes", "show", "nodes=consortium", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)
    assert [n["part"] for n in nodes] == list(range(10))
    assert set(nodes[0]) >= {"name", "organisation", "region", "link", "policy"}


def test_compare_shows_where_runs_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        simulated(capsys, *FAST, f"seed={seed}", f"run_name=s{seed}", f"runs_dir={tmp_path}")
    assert main(["compare", "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "s0" in out
    assert "s1" in out
    assert "\nseed " in out
    assert "lr" not in out, "settings in which the runs agree are not shown"
    assert main(["compare", "s0", "--json", "--runs-dir", str(tmp_path)]) == 0
    assert [row["run_name"] for row in json.loads(capsys.readouterr().out)] == ["s0"]
    assert main(["compare", "s9", "--runs-dir", str(tmp_path)]) == 2
    assert "s0, s1" in capsys.readouterr().err


def test_compare_without_runs_says_how_to_make_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "--runs-dir", str(tmp_path)]) == 0
    assert "trellis simulate" in capsys.readouterr().out


def test_the_ui_needs_a_recorded_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ui", "--runs-dir", str(tmp_path)]) == 2
    assert "record a run first" in capsys.readouterr().err


def test_sync_needs_a_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sync", "nothing", "--runs-dir", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
