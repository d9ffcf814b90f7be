"""The command line: results on stdout, the rest on stderr, 0 yes, 1 no, 2 misuse."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.load import load
from server.run import RunResult
from trellis.cli import COMMANDS, main
from trellis.cli import simulate as simulate_command
from trellis.errors import ConfigError
from trellis.types import RoundRecord, ServerState

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
    for text in ("shown", "test auc", "model ", "digest ", "next:", "trellis compare", "resume="):
        assert text in captured.out
    assert "3 nodes, real data" in captured.err


def next_steps(out: str) -> list[list[str]]:
    """The commands that were printed, as a shell would read them."""
    return [shlex.split(line)[1:] for line in out.splitlines() if line.strip().startswith("trellis ")]


@pytest.mark.parametrize("name", ["elsewhere", "my [runs] of 'may'"])
def test_the_next_steps_that_are_printed_work(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    where = str(folder).replace("'", "\\'")
    assert main(["simulate", *FAST, "run_name=first", f"runs_dir='{where}'"]) == 0
    compare, resume, other = next_steps(capsys.readouterr().out)
    assert compare[:1] == ["compare"]
    assert main(compare) == 0
    assert "first" in capsys.readouterr().out
    assert resume[0] == "simulate"
    assert main([*resume, "--json"]) == 0
    continued = json.loads(capsys.readouterr().out)
    assert (continued["run_name"], continued["rounds"]) == ("first", 2)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert other == ["simulate", "sector=banks", "nodes=consortium"]


def test_the_next_steps_are_short_where_runs_are_in_their_usual_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *FAST, "run_name=first"]) == 0
    compare, resume, _ = next_steps(capsys.readouterr().out)
    assert (compare, resume) == (["compare"], ["simulate", "resume=first", "rounds=2"])
    assert main(compare) == 0
    assert main([*resume, "--json"]) == 0


@pytest.mark.parametrize("name", ["1e5", "007", "null", "NaN", "a-1"])
def test_the_run_to_continue_is_named_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (resume,) = (step for step in simulate_command._next(made(tmp_path / "runs" / name, [])) if "resume" in step)
    assert load([shlex.split(resume)[2]]).resume == name


def test_the_ui_is_a_next_step_where_its_database_is(tmp_path: Path) -> None:
    result = made(tmp_path / "runs" / "one", [])
    assert not any(step.startswith("trellis ui") for step in simulate_command._next(result))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    assert f"trellis ui --runs-dir {tmp_path / 'runs'}" in simulate_command._next(result)


# ---------------------------------------------------------------- texts written by others

FOREIGN = "[/x]\x1b[31m\r\u202e"
"""Markup that closes nothing, a colour, a carriage return, and an order to write from right to left."""


def made(folder: Path, refusals: list[dict[str, Any]], **changes: Any) -> RunResult:
    result = RunResult(
        run_id="r", run_name=folder.name, run_dir=str(folder), tracking_uri=None, sector="banks", data_source="real",
        engine="local", rounds=1, primary_metric={"name": "ap", "split": "test", "value": 0.5}, baselines=None,
        model_digest="d", model_version=None, refusals=refusals, seconds=1.0, bytes_up=1, bytes_down=1,
        epsilon_max=None,
    )  # fmt: skip
    return replace(result, **changes)


def assert_harmless(text: str) -> None:
    assert "[/x]" in text, "brackets are shown as they are"
    assert not {c for c in text if not c.isprintable()} - {"\n"}


def test_what_nodes_say_is_shown_as_plain_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refusal = {"round": 1, "node": f"a{FOREIGN}", "reason": f"b{FOREIGN}", "evidence": FOREIGN}
    alone = {"pooled": {"ap": 0.5}, "local_only": {"nodes": {f"n{FOREIGN}": None}}}
    first = made(tmp_path / "one", [refusal], baselines=alone, run_name=f"one{FOREIGN}")
    simulate_command._show([first])
    assert_harmless(capsys.readouterr().out)
    simulate_command._show([first, made(tmp_path / "two", [refusal])])
    out = capsys.readouterr().out
    assert_harmless(out)
    assert "two" in out, "a run that is shown after it"


def test_a_refusal_cannot_stop_a_run_that_follows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(overrides: list[str], on_round: Any) -> RunResult:
        state = ServerState(run="r", round=1, params={})
        record = RoundRecord("r", 1, "train", 0.0, "d", "d", (), (), (), closed=FOREIGN)
        on_round(state, record)
        refusal = {"round": 1, "node": "a", "reason": "error", "evidence": FOREIGN}
        return made(tmp_path / overrides[-1].partition("=")[2], [refusal])

    monkeypatch.setattr("experiments.simulate.simulate", run)
    arguments = ["--multirun", "sector.options.hidden=[8]", "run_name=one,two"]
    assert main(["simulate", *arguments]) == 0
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    assert "one" in captured.out
    assert "two" in captured.out
    assert_harmless(captured.err)
    assert "sector.options.hidden=[8] run_name=two" in captured.err


def test_runs_and_settings_are_compared_as_plain_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        result = made(tmp_path / name, [], run_name=f"{name}{FOREIGN}", model_digest=FOREIGN)
        (tmp_path / name / "result.json").write_text(json.dumps(asdict(result)))
        config = {"sector": {"options": {FOREIGN: f"{name}{FOREIGN}"}}}
        (tmp_path / name / "config.json").write_text(json.dumps({"config": config}))
    assert main(["compare", "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert_harmless(out)
    assert "two[/x]" in out


def test_a_federation_is_shown_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nodes", "show", f'nodes.items.0.organisation="a{FOREIGN}"']) == 0
    assert_harmless(capsys.readouterr().out)


def test_a_delivery_is_told_as_plain_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    found = SimpleNamespace(delivered=1, pending=1, complete=False, uri=FOREIGN, error=FOREIGN)
    monkeypatch.setattr("server.tracking.sync", lambda folder, uri: found)
    assert main(["sync", "one", "--runs-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    assert_harmless(captured.err)


def test_an_error_is_told_as_plain_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", FOREIGN, "--runs-dir", str(tmp_path)]) == 2
    assert_harmless(capsys.readouterr().err)


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("measured", "best", "shown"),
    [
        ({"val/auc": 0.98123, "val/loss": 0.2}, 0.985, "val auc 0.9812 (best 0.9850)"),
        ({"val/auc": 0.98123}, None, "val auc 0.9812"),
        ({"val/loss": 0.25}, 0.985, "val loss 0.2500 (best 0.9850)"),
        ({}, 0.985, "(best 0.9850)"),
        ({}, None, ""),
    ],
)
def test_progress_shows_what_the_round_measured_beside_the_best(
    measured: dict[str, float], best: float | None, shown: str
) -> None:
    record = RoundRecord("r", 1, "train", 0.0, "d", "d", (), (), (), base_metrics=measured)
    assert simulate_command._metric(record, "auc", best) == shown


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
        (["rule=krumm"], "choose one of: bulyan, centered_clipping"),
        (["sector=bank"], "banks, healthcare_heart"),
        (["rouns=3"], "did you mean rounds"),
        (["rounds=many"], "could not be converted to Integer"),
        (["rounds=0"], "must be at least 1"),
        (["rounds"], "write key=value"),
        (["seed=0,1"], "use --multirun to run all of seed=0,1"),
        (["--multirun", "rounds"], "write key=value"),
        (["run_name=../escaped"], "it must be 1 to 64 letters"),
        (["nodes.items.0.name=../../x"], "it must be 1 to 64 letters"),
        (["device=meta"], "device=meta cannot be used"),
        (["sector=../../elsewhere"], "choose one of: banks"),
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


def test_help_says_what_runs_without_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    assert "without overrides, experiment=demo" in capsys.readouterr().out


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
    out = capsys.readouterr().out
    assert "creditcard_sample" in out.replace("\n", "")
    assert "data (under $TRELLIS_DATA)" in out
    assert main(["sectors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {s["name"]: s["primary_metric"]["name"] for s in listed} == {
        "banks": "ap",
        "healthcare_heart": "auc",
        "healthcare_pneumonia": "auc",
        "healthcare_retina": "dice",
        "healthcare_wisconsin": "auc",
        "production": "rmse",
        "retail": "hr10",
    }


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


def test_a_masked_run_says_what_it_gives_line_by_line_and_nothing_where_it_cannot_be() -> None:
    said = simulate_command._masked(load(["nodes=consortium", "privacy=secagg"]))
    assert said[0] == "secure aggregation (malicious_server), groups: 1 of 10 nodes"
    assert "7 nodes at least, of 3 organisations" in said[1]
    assert "3 colluders and 3 dropouts" in said[2]
    assert "simulated" in said[-1]
    with pytest.raises(ConfigError, match="loses its round when a single member is missing"):
        simulate_command._masked(load(["nodes=pilot", "privacy=secagg"]))
