"""SIGKILL at any point, then resume: the same final model as if nothing had happened."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sectors
from experiments.simulate import simulate
from trellis.errors import ResumeError

DRIVER = Path(__file__).with_name("kill_and_resume.py")


def drive(folder: Path, tracking: str, points: str) -> dict[str, Any]:
    command = [sys.executable, str(DRIVER), str(folder), tracking, points]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_run_killed_before_any_of_its_renames_resumes_to_the_same_model(tmp_path: Path) -> None:
    found = drive(tmp_path, "none", "all")
    outcomes = found["outcomes"]
    assert len(outcomes) == found["steps"] > 20
    assert all(o["killed"] for o in outcomes)
    assert sum(o["resumed"] for o in outcomes) > 20, "most kills leave a run to resume"
    assert [o["point"] for o in outcomes if not o["same"]] == []


def test_a_killed_and_resumed_run_registers_every_round_once(tmp_path: Path) -> None:
    found = drive(tmp_path, "mlflow", "18")
    assert all(o["killed"] and o["same"] for o in found["outcomes"])
    with sqlite3.connect(tmp_path / "killed-018" / "mlflow.db") as store:
        rounds = store.execute("select value from model_version_tags where key = 'fl.round'").fetchall()
        runs = store.execute("select count(*) from tags where key = 'fl.role' and value = 'federation'").fetchone()
    assert len(rounds) == len(set(rounds)), "a round was registered twice"
    assert {("1",), ("2",)} <= set(rounds)
    assert runs == (1,)


def test_a_lengthened_run_that_is_killed_stays_lengthened(tmp_path: Path) -> None:
    assert drive(tmp_path, "none", "lengthened:8") == {"killed": True, "same": {"digest": True, "metrics": True}}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    simulate(["rounds=2", "tracking=none", "run_name=short", f"runs_dir={runs}"])
    return runs


def test_a_lengthened_run_is_the_run_that_was_longer_from_the_start(ended: Path, tmp_path: Path) -> None:
    lengthened = simulate(["resume=short", "rounds=4", f"runs_dir={ended}"])
    longer = simulate(["rounds=4", "tracking=none", "run_name=long", f"runs_dir={tmp_path}"])
    assert lengthened.model_digest == longer.model_digest
    assert lengthened.metrics == longer.metrics
    assert lengthened.rounds == 4
    assert (lengthened.bytes_up, lengthened.bytes_down) == (longer.bytes_up, longer.bytes_down), "nothing counts twice"


def test_rounds_that_were_trained_cannot_be_undone(ended: Path) -> None:
    with pytest.raises(ResumeError, match=r"has 4 rounds already; rounds=3 cannot undo any"):
        simulate(["resume=short", "rounds=3", f"runs_dir={ended}"])


def test_a_resumed_run_cannot_become_another_run(ended: Path) -> None:
    with pytest.raises(ResumeError, match="seed=7 would make it another run"):
        simulate(["resume=short", "seed=7", f"runs_dir={ended}"])


def test_resuming_what_is_not_there_names_the_runs_that_are(ended: Path) -> None:
    with pytest.raises(ResumeError, match=r"no run 'shirt'.*short"):
        simulate(["resume=shirt", f"runs_dir={ended}"])


def test_a_name_that_is_taken_is_not_overwritten(ended: Path) -> None:
    with pytest.raises(ResumeError, match="holds a run already"):
        simulate(["rounds=1", "tracking=none", "run_name=short", f"runs_dir={ended}"])


def test_a_damaged_state_is_refused(ended: Path, tmp_path: Path) -> None:
    simulate(["rounds=1", "tracking=none", "run_name=torn", f"runs_dir={tmp_path}"])
    state = tmp_path / "torn" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(ResumeError, match="damaged"):
        simulate(["resume=torn", "rounds=2", f"runs_dir={tmp_path}"])


def test_another_engine_or_tracker_takes_the_old_ones_settings_away(tmp_path: Path) -> None:
    first = ["rounds=1", "engine.workers=1", "tracking.every=2", "tracking.uri=http://127.0.0.1:9", "run_name=moved"]
    simulate([*first, "tracking.close_timeout_s=0", f"runs_dir={tmp_path}"])
    again = simulate(["resume=moved", "engine=local", "tracking=none", "rounds=2", f"runs_dir={tmp_path}"])
    assert again.rounds == 2
    assert again.tracking_uri is None


def test_a_damaged_description_is_refused_with_its_name(tmp_path: Path) -> None:
    simulate(["rounds=1", "tracking=none", "run_name=torn", f"runs_dir={tmp_path}"])
    record = tmp_path / "torn" / "records" / "round-00001-train.json"
    record.write_bytes(record.read_bytes()[:40])
    with pytest.raises(ResumeError, match=r"round-00001-train\.json is damaged"):
        simulate(["resume=torn", "rounds=2", f"runs_dir={tmp_path}"])
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ResumeError, match=r"config\.json is damaged"):
        simulate(["resume=torn", "rounds=2", f"runs_dir={tmp_path}"])


def test_a_run_is_not_continued_on_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data" / "banks" / "creditcard.csv"
    file.parent.mkdir(parents=True)
    table = sectors.get("banks", {"synthetic_rows": 300}).generate()
    table.to_csv(file, index=False)
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path / "data"))
    settings = ["sector=banks", "rounds=1", "tracking=none", "run_name=fed", f"runs_dir={tmp_path / 'runs'}"]
    simulate(settings)
    table.iloc[::2].to_csv(file, index=False)
    with pytest.raises(ResumeError, match="are not those fed was started with"):
        simulate(["resume=fed", "rounds=2", f"runs_dir={tmp_path / 'runs'}"])
