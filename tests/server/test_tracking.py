"""Every test delivers to a real MLflow store."""

from __future__ import annotations

import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from conf.schema import TrackingConfig, TrackingName
from server import shelf, store, tracking
from server.folder import RunFolder, read_record
from server.tracking import Delivery, NoTracker, git_digest, make_tracker, sync
from trellis.errors import TrackingError
from trellis.types import Refusal

MODEL = "trellis-healthcare_wisconsin"


class Seen:
    """What a store holds, as a user of MLflow would ask for it."""

    def __init__(self, uri: str, experiment: str = "healthcare_wisconsin") -> None:
        self.client = MlflowClient(uri, uri)
        self.experiment = self.client.get_experiment_by_name(experiment)

    def runs(self, role: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment.experiment_id], f"tags.`fl.role` = '{role}'"))

    @property
    def run(self) -> Run:
        (run,) = self.runs("federation")
        return run

    def node(self, name: str) -> Run:
        (run,) = [r for r in self.runs("node") if r.data.tags["fl.node"] == name]
        return run

    def history(self, key: str, run: Run | None = None) -> list[tuple[int, float]]:
        """(step, value), every point that was ever sent."""
        points = self.client.get_metric_history((run or self.run).info.run_id, key)
        return sorted((p.step, p.value) for p in points)

    def versions(self) -> dict[int, Any]:
        """By round; fails when a round is registered twice."""
        found = self.client.search_model_versions(f"name = '{MODEL}'", max_results=1000)
        rounds = [int(v.tags["fl.round"]) for v in found]
        assert len(rounds) == len(set(rounds))
        return dict(zip(rounds, found, strict=True))

    def alias(self, name: str) -> int:
        return int(self.client.get_model_version_by_alias(MODEL, name).tags["fl.round"])

    def logged_models(self) -> list[Any]:
        return list(self.client.search_logged_models([self.experiment.experiment_id]))

    def everything(self) -> dict[str, Any]:
        """A value that changes when anything is written twice."""
        every = {**self.run.data.metrics}
        return {
            "points": {key: self.history(key) for key in every},
            "nodes": {
                r.data.tags["fl.node"]: {k: self.history(k, r) for k in r.data.metrics} for r in self.runs("node")
            },
            "versions": sorted((r, int(v.version)) for r, v in self.versions().items()),
            "models": sorted(m.name for m in self.logged_models()),
            "outputs": sorted(o.step for o in self.run.outputs.model_outputs),
        }


@contextmanager
def hung_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def wait_until(holds: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def deliver(written: Any) -> Delivery:
    with written.tracker() as tracker:
        return tracker.close(60)


def test_a_run_is_recorded_while_it_goes_on(written: Any) -> None:
    with written.tracker() as tracker:
        for round_ in (1, 2, 3):
            written.write_round(round_, auc=0.5 + round_ / 10)
            tracker.notify()
        written.write_end(3, auc=0.9)
        tracker.notify()
        done = tracker.close(60)
    seen = Seen(written.uri)
    assert done == Delivery(4, 0, seen.run.info.run_id, written.uri, MODEL, {1: 1, 2: 2, 3: 3})
    assert done.complete
    assert seen.history("val/auc") == [(0, 0.6), (1, 0.7), (2, 0.8), (3, 0.9)]
    assert seen.history("test/auc") == [(3, 0.77)]
    assert seen.history("train/loss") == [(1, 0.4), (2, 0.4), (3, 0.4)]
    assert seen.history("update/norm_p50") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert seen.history("comm/bytes_up") == [(1, 3000.0), (2, 3000.0), (3, 3000.0)]
    assert seen.history("closing/comm_bytes_up") == [(4, 3000.0)], "the closing evaluation has charts of its own"
    assert seen.history("round/seconds_collect")[0] == (1, 0.5)
    assert seen.history("nodes/auc_max")[0] == (0, pytest.approx(0.62))


def test_the_federations_run_says_what_was_run(written: Any) -> None:
    written.config.tracking.uri = "https://alice:secret@tracking.example"
    written.write_rounds({0: 0.5, 1: 0.6})
    deliver(written)
    seen = Seen(written.uri)
    tags, params = seen.run.data.tags, seen.run.data.params
    expected = {
        "fl.role": "federation",
        "fl.run": "id-of-demo-1",
        "fl.sector": "healthcare_wisconsin",
        "fl.rule": "mean",
        "fl.privacy": "none",
        "fl.attack": "none",
        "fl.engine": "local",
        "fl.data": "real",
        "fl.git_digest": "a" * 40,
        "fl.config_digest": written.info.config_digest,
        "mlflow.runName": "demo-1",
    }
    assert {k: tags.get(k) for k in expected} == expected
    assert tags["mlflow.runColor"].startswith("#")
    assert "Best: round 1, val/auc 0.6" in tags["mlflow.note.content"]
    assert params["sector.training.lr"] == "0.05"
    assert params["rule.weighted"] == "false"
    assert params["tracking.uri"] == "https://***@tracking.example"
    assert json.loads(params["nodes.items"])[0]["name"] == "alba"
    config = mlflow.artifacts.load_dict(f"{seen.run.info.artifact_uri}/config/resolved.json")
    assert config["sector"]["name"] == "healthcare_wisconsin"
    assert "secret" not in json.dumps(config)
    assert seen.run.inputs.dataset_inputs[0].dataset.name == "healthcare_wisconsin"
    assert seen.run.info.status == "FINISHED"


def test_each_node_has_a_child_run(written: Any) -> None:
    refused = (Refusal("cadmus", "norm", "1e9"),)
    epsilon = {"alba": 0.5, "borealis": 0.7}
    written.write_round(1, refusals=refused, epsilon=epsilon)
    written.write_end(1, auc=0.6)
    deliver(written)
    seen = Seen(written.uri)
    assert sorted(r.data.tags["fl.node"] for r in seen.runs("node")) == ["alba", "borealis", "cadmus"]
    assert {r.data.tags["mlflow.parentRunId"] for r in seen.runs("node")} == {seen.run.info.run_id}
    assert {r.info.status for r in seen.runs("node")} == {"FINISHED"}
    assert seen.history("val/auc", seen.node("borealis")) == [(0, 0.51), (1, 0.61)]
    assert seen.history("update/norm", seen.node("borealis")) == [(1, 2.0)]
    assert seen.history("refused", seen.node("cadmus"))[0] == (1, 1.0)
    assert seen.history("privacy/epsilon", seen.node("alba")) == [(1, 0.5)]
    assert seen.history("privacy/epsilon_max") == [(1, 0.7)]
    assert seen.history("refusals/total") == [(1, 1.0)]
    assert seen.history("closing/refusals_total") == [(2, 0.0)]
    assert seen.history("refusals/norm") == [(1, 1.0)]


def test_a_large_federation_has_a_table_a_round_instead_of_child_runs(runs_dir: Path, written: Any) -> None:
    large = type(written)(runs_dir, nodes=tuple(f"n{i:03d}" for i in range(70)), name="large")
    large.write_rounds({0: 0.5, 1: 0.6})
    deliver(large)
    seen = Seen(large.uri)
    assert seen.runs("node") == []
    table = mlflow.artifacts.load_dict(f"{seen.run.info.artifact_uri}/nodes/round-00001.json")
    assert len(table["nodes"]) == 70
    assert table["nodes"]["n001"]["update/norm"] == 2.0
    assert seen.history("nodes/auc_min")[0] == (0, 0.5)


def test_every_rounds_model_is_registered_with_its_lineage(written: Any) -> None:
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.9, 3: 0.7})
    deliver(written)
    seen = Seen(written.uri)
    assert sorted(seen.versions()) == [1, 2, 3]
    version = seen.versions()[2]
    assert version.run_id == seen.run.info.run_id
    assert version.tags["fl.run"] == "id-of-demo-1"
    assert version.tags["fl.digest"] == written.digests[2]
    assert version.tags["fl.nodes"] == "alba, borealis, cadmus"
    assert json.loads(version.tags["fl.metrics"])["val/auc"] == 0.9
    assert (seen.alias("best"), seen.alias("final")) == (2, 3)
    assert (version.tags["fl.best"], seen.versions()[3].tags["fl.final"]) == ("true", "true")
    model = seen.client.get_logged_model(version.tags["fl.model_id"])
    assert {m.key: m.value for m in model.metrics}["val/auc"] == 0.9
    assert model.status == "READY"
    # MLflow's pages fill the column "Registered models" from this tag.
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": MODEL, "version": version.version}]
    assert sorted(o.step for o in seen.run.outputs.model_outputs) == [1, 2, 3]


def test_a_registered_version_loads_back_and_predicts(written: Any) -> None:
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.9})
    deliver(written)
    table = written.sector.generate().drop(columns="target").head(5)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(written.uri)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{MODEL}@best")
        predicted = loaded.predict(table)
        place = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}/1"))
        (place / "model.safetensors").write_bytes((written.folder.version_path(2) / "model.safetensors").read_bytes())
        with pytest.raises(Exception, match="changed after it was written"):
            mlflow.pyfunc.load_model(str(place))
    finally:
        mlflow.set_tracking_uri(before)
    assert predicted.shape == (5,)
    assert loaded.metadata.metadata["digest"] == written.digests[2]


def test_thinned_versions_still_hold_the_last_and_the_best(written: Any) -> None:
    written.tracking.every = 3
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.9, 3: 0.7, 4: 0.75, 5: 0.8, 6: 0.8, 7: 0.78})
    deliver(written)
    seen = Seen(written.uri)
    assert sorted(seen.versions()) == [2, 3, 6, 7]
    assert (seen.alias("best"), seen.alias("final")) == (2, 7)
    late = seen.client.get_logged_model(seen.versions()[2].tags["fl.model_id"])
    assert {m.key: m.value for m in late.metrics}["val/auc"] == 0.9
    assert seen.history("val/auc")[2:4] == [(2, 0.9), (3, 0.7)]


def test_best_follows_the_run_and_the_first_of_equals_wins(written: Any) -> None:
    with written.tracker() as tracker:
        for round_, auc in ((1, 0.5), (2, 0.8), (3, 0.8), (4, math.nan)):
            written.write_round(round_, auc)
        tracker.notify()
        marks = written.folder.tracking_path
        wait_until(lambda: marks.exists() and "round-00004-train" in marks.read_text())
        seen = Seen(written.uri)
        assert seen.alias("best") == 1
        tracker.close(60)
    assert seen.alias("best") == 1
    assert math.isnan(seen.history("val/auc")[-1][1])


def test_the_initial_model_is_kept_when_training_only_made_it_worse(written: Any) -> None:
    written.write_rounds({0: 0.9, 1: 0.6})
    deliver(written)
    seen = Seen(written.uri)
    assert sorted(seen.versions()) == [0, 1]
    assert seen.alias("best") == 0


def test_a_server_that_is_down_loses_nothing(
    written: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FIRST_DELAY_S", 0.05)
    written.tracking.uri = closed_port()
    with written.tracker() as tracker:
        written.write_rounds({0: 0.5, 1: 0.6, 2: 0.9})
        tracker.notify()
        began = time.monotonic()
        done = tracker.close(20)
    assert time.monotonic() - began < 15
    assert (done.delivered, done.pending) == (0, 3)
    assert done.error is not None
    assert "trellis sync demo-1" in caplog.text
    later = sync(written.folder, written.uri)
    assert (later.delivered, later.pending, later.error) == (3, 0, None)
    first = Seen(written.uri).everything()
    assert sync(written.folder, written.uri) == later
    assert Seen(written.uri).everything() == first
    assert first["points"]["val/auc"] == [(0, 0.5), (1, 0.6), (2, 0.9)]


def test_a_server_that_hangs_delays_neither_rounds_nor_the_end(written: Any) -> None:
    with hung_server() as uri:
        written.tracking.uri = uri
        tracker = written.tracker()
        began = time.monotonic()
        tracker.start()
        for round_ in (1, 2):
            written.write_round(round_)
            tracker.notify()
        assert time.monotonic() - began < 0.5
        time.sleep(0.5)  # the thread is in its first request by now
        began = time.monotonic()
        done = tracker.close(1.0)
        assert time.monotonic() - began < 2.0
        assert (done.delivered, done.pending) == (0, 2)
        assert "1 s" in str(done.error)
        # The stuck thread holds nothing back.
        assert sync(written.folder, written.uri).complete


def test_delivery_goes_on_by_itself_when_the_server_comes_back(
    written: Any, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FIRST_DELAY_S", 0.05)
    kept = (runs_dir / "mlflow.db").read_bytes()
    (runs_dir / "mlflow.db").write_bytes(b"no database at all, for now")
    with written.tracker() as tracker:
        written.write_rounds({0: 0.5, 1: 0.6})
        tracker.notify()
        wait_until(lambda: tracker._error is not None)
        (runs_dir / "mlflow.db").write_bytes(kept)
        assert tracker.close(60).complete
    assert Seen(written.uri).history("val/auc") == [(0, 0.5), (1, 0.6)]


def test_a_kill_between_a_write_and_its_mark_repeats_nothing(written: Any) -> None:
    path = written.folder.tracking_path
    for round_ in (1, 2, 3):
        written.write_round(round_, 0.5 + round_ / 10)
        sync(written.folder)
    marks = path.read_bytes()
    written.write_end(3, 0.9)
    sync(written.folder)
    once = Seen(written.uri).everything()
    path.write_bytes(marks)  # as if killed just before the last mark
    assert sync(written.folder).complete
    assert Seen(written.uri).everything() == once
    path.unlink()  # as if the ledger was lost
    assert sync(written.folder).complete
    assert Seen(written.uri).everything() == once


def test_a_round_sent_before_a_kill_and_then_done_again_is_sent_once(written: Any) -> None:
    written.write_round(1, 0.5)
    sync(written.folder)
    marks = written.folder.tracking_path.read_bytes()
    written.write_round(2, 0.6)
    sync(written.folder)
    once = Seen(written.uri).everything()
    written.folder.tracking_path.write_bytes(marks)
    written.started_at += 500.0
    written.write_round(2, 0.6, seconds={"collect": 0.9})
    assert sync(written.folder).complete
    assert Seen(written.uri).everything() == once


@pytest.mark.parametrize("step", ["_create_version", "_link", "point_best"])
def test_a_kill_in_the_middle_of_a_version_registers_it_once(
    written: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls = []
    real = getattr(shelf.Shelf, step)

    def dies_once(self: shelf.Shelf, *arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(shelf.Shelf, step, dies_once)
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8})
    with pytest.raises(KeyboardInterrupt):
        sync(written.folder)
    assert sync(written.folder).complete
    found = Seen(written.uri)
    assert sorted(found.versions()) == [1, 2, 3]
    assert len(found.logged_models()) == 3
    assert all("mlflow.modelVersions" in m.tags for m in found.logged_models())
    assert found.history("val/auc") == [(0, 0.5), (1, 0.6), (2, 0.7), (3, 0.8)]
    assert found.history("round/num_asked") == [(1, 3.0), (2, 3.0), (3, 3.0)]


def test_a_round_done_again_with_the_same_result_is_sent_once(written: Any) -> None:
    written.write_round(1, 0.5)
    sync(written.folder)
    once = Seen(written.uri).everything()
    written.started_at += 500.0
    written.write_round(1, 0.5)
    assert sync(written.folder).complete
    assert Seen(written.uri).everything() == once


def test_a_round_done_again_with_other_params_supersedes_its_version(written: Any) -> None:
    written.write_round(1, 0.5)
    sync(written.folder)
    old = Seen(written.uri).versions()[1]
    written.write_round(1, 0.5, salt=1)
    done = sync(written.folder)
    seen = Seen(written.uri)
    new = seen.client.get_model_version(MODEL, str(done.versions[1]))
    assert new.tags["fl.digest"] == written.digests[1] != old.tags["fl.digest"]
    assert seen.client.get_model_version(MODEL, old.version).tags["fl.superseded_by"] == str(new.version)


def test_a_prolonged_run_goes_on_in_the_same_runs(written: Any) -> None:
    written.write_rounds({0: 0.5, 1: 0.6})
    deliver(written)
    written.config.rounds = 20
    written.started_at += 1000.0
    written.write_round(2, 0.6)
    written.write_end(2, 0.7)
    assert deliver(written).complete
    seen = Seen(written.uri)
    assert seen.history("val/auc") == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert sorted(seen.versions()) == [1, 2]
    assert "fl.final" not in seen.versions()[1].tags
    assert seen.run.info.status == "FINISHED"


def prolonged(written: Any) -> None:
    """Two rounds and an end, delivered; then two rounds more and another end."""
    written.config.rounds = 2
    NoTracker(written.folder, written.tracking, written.info).start()
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.7})
    assert deliver(written).complete
    written.config.rounds = 4
    written.started_at += 1000.0
    for round_, auc in ((3, 0.7), (4, 0.8)):
        written.write_round(round_, auc)
    written.write_end(4, 0.9)


def stands_once(seen: Seen) -> None:
    """Every point of every run stands at its step once."""
    for run in (seen.run, *seen.runs("node")):
        for key in run.data.metrics:
            steps = [step for step, _ in seen.history(key, run)]
            assert len(steps) == len(set(steps)), (run.info.run_name, key, steps)


def test_a_prolonged_run_says_everything_of_a_version_once(written: Any) -> None:
    prolonged(written)
    assert deliver(written).complete
    seen = Seen(written.uri)
    stands_once(seen)
    assert seen.history("val/auc") == [(0, 0.5), (1, 0.6), (2, 0.7), (3, 0.8), (4, 0.9)]
    assert [s for s, _ in seen.history("nodes/auc_max")] == [0, 1, 2, 3, 4]
    alba = seen.node("alba")
    assert seen.history("val/auc", alba) == seen.history("val/auc")
    assert [s for s, _ in seen.history("update/norm", alba)] == [1, 2, 3, 4]
    assert [s for s, _ in seen.history("closing/refused", alba)] == [3, 5]
    assert seen.history("test/auc") == [(2, 0.77), (4, 0.77)]


def test_a_prolonged_run_sent_as_a_whole_says_everything_once(written: Any, tmp_path: Path, template_db: Path) -> None:
    prolonged(written)
    assert deliver(written).complete
    second = tmp_path / "second.db"
    second.write_bytes(template_db.read_bytes())
    assert sync(written.folder, f"sqlite:///{second}").complete
    seen = Seen(f"sqlite:///{second}")
    stands_once(seen)
    assert seen.history("val/auc", seen.node("alba")) == Seen(written.uri).history("val/auc")
    assert seen.history("test/auc") == [(2, 0.77), (4, 0.77)]


def test_a_run_prolonged_before_its_end_was_marked_says_everything_once(written: Any) -> None:
    written.write_rounds({0: 0.5, 1: 0.6})
    (end,) = (written.folder.path / "records").glob("*-evaluate.json")
    kept = end.read_bytes()
    end.unlink()
    sync(written.folder)
    marks = written.folder.tracking_path.read_bytes()
    end.write_bytes(kept)
    sync(written.folder)
    written.folder.tracking_path.write_bytes(marks)  # as if killed just before the mark of the end
    written.started_at += 1000.0
    written.write_round(2, 0.6)
    written.write_end(2, 0.7)
    assert sync(written.folder).complete
    seen = Seen(written.uri)
    stands_once(seen)
    assert seen.history("val/auc", seen.node("alba")) == [(0, 0.5), (1, 0.6), (2, 0.7)]


def test_what_a_node_says_first_in_the_later_record_of_a_round_is_kept(written: Any) -> None:
    """The closing evaluation asks every node, a round only those it drew."""
    written.write_rounds({0: 0.5, 1: 0.6})
    end = read_record(written.folder.record_path(2, "evaluate"))
    some = {name: metrics for name, metrics in end.node_metrics.items() if name != "alba"}
    written.folder.write_record(replace(end, node_metrics=some))
    assert deliver(written).complete
    written.started_at += 1000.0
    written.write_round(2, 0.6)
    assert deliver(written).complete
    seen = Seen(written.uri)
    stands_once(seen)
    assert [seen.history("val/auc", seen.node(n))[-1][0] for n in ("alba", "borealis")] == [1, 1]


def test_a_prolonged_large_federation_has_one_table_a_record(runs_dir: Path, written: Any) -> None:
    large = type(written)(runs_dir, nodes=tuple(f"n{i:03d}" for i in range(70)), name="large")
    prolonged(large)
    assert deliver(large).complete
    seen = Seen(large.uri)
    tables = [Path(a.path).name for a in seen.client.list_artifacts(seen.run.info.run_id, "nodes")]
    trained = [f"round-{r:05d}.json" for r in (1, 2, 3, 4)]
    assert sorted(tables) == sorted([*trained, "round-00003-evaluate.json", "round-00005-evaluate.json"])
    stands_once(seen)


def test_the_tag_of_rounds_follows_a_prolonged_run(written: Any) -> None:
    prolonged(written)
    seen = Seen(written.uri)
    assert (seen.run.data.params["rounds"], seen.run.data.tags["fl.rounds"]) == ("2", "2")
    assert deliver(written).complete
    assert (seen.run.data.params["rounds"], seen.run.data.tags["fl.rounds"]) == ("2", "4")


@pytest.mark.parametrize("content", [b'{"run": "id-of-', b"", b"[1]", b"{}", b"\xff"])
def test_a_damaged_record_is_named_and_holds_back_no_other(
    written: Any, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    written.write_rounds({0: 0.5, 1: 0.6, 2: 0.9})
    path = written.folder.record_path(2, "train")
    whole = path.read_bytes()
    path.write_bytes(content)
    for done in (deliver(written), sync(written.folder)):
        assert (done.delivered, done.pending) == (2, 1)
        assert str(path) in str(done.error)
        assert "damaged" in str(done.error)
        assert not done.complete
    assert str(path) in caplog.text
    path.write_bytes(whole)
    assert sync(written.folder).complete
    seen = Seen(written.uri)
    stands_once(seen)
    assert seen.history("val/auc") == [(0, 0.5), (1, 0.6), (2, 0.9)]


def test_a_damaged_ledger_is_named_and_can_be_removed(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FIRST_DELAY_S", 0.01)
    written.write_rounds({0: 0.5, 1: 0.6})
    assert deliver(written).complete
    once = Seen(written.uri).everything()
    path = written.folder.tracking_path
    path.write_bytes(path.read_bytes()[:40])
    for done in (deliver(written), sync(written.folder)):
        assert (done.delivered, done.pending) == (0, 2)
        assert str(path) in str(done.error)
    path.unlink()
    assert sync(written.folder).complete
    assert Seen(written.uri).everything() == once


@pytest.mark.parametrize("content", ['{"info": {', '{"info": {}}', "[]", '{"info": {"primary": {"name": 1}}}'])
def test_a_damaged_description_of_a_run_is_named(written: Any, content: str) -> None:
    written.folder.run_path.write_text(content)
    with pytest.raises(TrackingError, match=r"run\.json is damaged"):
        sync(written.folder)


def test_an_interrupted_run_says_so_until_it_is_resumed(written: Any) -> None:
    def interrupted() -> None:
        with written.tracker():
            written.write_round(1, 0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    seen = Seen(written.uri)
    assert seen.run.info.status == "FAILED"
    assert sorted(seen.versions()) == [1]
    written.write_end(1, 0.6)
    assert deliver(written).complete
    assert seen.run.info.status == "FINISHED"


def test_a_run_can_be_sent_to_a_second_store(written: Any, tmp_path: Path, template_db: Path) -> None:
    written.write_rounds({0: 0.5, 1: 0.6})
    deliver(written)
    second = tmp_path / "second.db"
    second.write_bytes(template_db.read_bytes())
    done = sync(written.folder, f"sqlite:///{second}")
    assert done.complete
    assert done.delivered == 2
    assert Seen(f"sqlite:///{second}").history("val/auc") == Seen(written.uri).history("val/auc")


def test_two_runs_share_the_experiment_and_the_registered_model(written: Any, runs_dir: Path) -> None:
    other = type(written)(runs_dir, name="demo.2")
    both = [written, other]
    for run in both:
        run.tracking.experiment = "comparison"
        run.write_rounds({0: 0.5, 1: 0.6})
    trackers = [run.tracker() for run in both]
    for tracker in trackers:
        tracker.start()
    done = [tracker.close(60) for tracker in trackers]
    assert all(d.complete for d in done), done
    seen = Seen(written.uri, "comparison")
    assert len(seen.runs("federation")) == 2
    assert sorted(version for d in done for version in d.versions.values()) == [1, 2]


def test_a_folder_is_delivered_by_one_at_a_time(written: Any) -> None:
    written.write_round(1)
    with written.tracker() as tracker:
        wait_until(lambda: tracker._lock._descriptor is not None)
        with pytest.raises(TrackingError, match="another process"):
            sync(written.folder)
        assert tracker.close(60).complete is True


def test_without_tracking_the_folder_can_still_be_sent(written: Any) -> None:
    config = TrackingConfig(name=TrackingName.none)
    tracker = make_tracker(written.folder, config, written.info)
    assert isinstance(tracker, NoTracker)
    with tracker:
        written.write_rounds({0: 0.5, 1: 0.6})
        tracker.notify()
        assert tracker.close() == Delivery(0, 0, None, None, None)
    assert not written.folder.tracking_path.exists()
    assert sync(written.folder).delivered == 2


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no run"):
        sync(RunFolder(tmp_path))


def test_odd_names_and_values_are_recorded(runs_dir: Path, written: Any) -> None:
    odd = type(written)(runs_dir, nodes=("банк/№1", "b@2"), name="odd (1).x")
    odd.write_round(1, findings={"suspicion/b@2": 0.5}, epsilon={"b@2": math.inf})
    odd.write_end(1)
    done = deliver(odd)
    assert done.complete, done.error
    seen = Seen(odd.uri)
    assert seen.history("suspicion/b_2") == [(1, 0.5)]
    assert seen.history("privacy/epsilon", seen.node("b@2")) == []


def test_a_new_store_survives_a_kill_and_two_starts_at_once(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.tmp").write_bytes(b"a process was killed while it made the store")
    uri = store.embedded_uri(tmp_path)
    code = "import sys; from server import store; print(len(store.connect(sys.argv[1]).search_experiments()))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip(), err) == (0, "1", "")
    assert not list(tmp_path.glob(".mlflow.db.tmp*"))


def test_the_store_is_in_wal_mode_and_the_users_mlflow_is_left_alone(written: Any) -> None:
    import sqlite3

    before = mlflow.get_tracking_uri()
    written.write_rounds({0: 0.5, 1: 0.6})
    assert deliver(written).complete
    assert sqlite3.connect(written.runs_dir / "mlflow.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    assert logging.getLogger("alembic").level == logging.WARNING


def test_starting_does_not_wait_for_mlflow(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, go_on = threading.Event(), threading.Event()
    real = store.connect

    def slow(uri: str) -> Any:
        opened.set()
        go_on.wait(10)
        return real(uri)

    monkeypatch.setattr(store, "connect", slow)
    began = time.monotonic()
    with written.tracker() as tracker:
        written.write_rounds({0: 0.5, 1: 0.6})
        tracker.notify()
        assert time.monotonic() - began < 0.5
        assert opened.wait(5)
        go_on.set()
        assert tracker.close(60).complete


def test_git_digest_names_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    assert git_digest(tmp_path) is None
    assert git_digest(tmp_path / "missing") is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_digest(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_digest(tmp_path) == f"{commit}-dirty"


def test_records_wait_in_order_whatever_their_age(written: Any) -> None:
    first = written.write_round(1)
    second = written.write_round(2)
    written.folder.write_record(replace(first, bytes_up=1))
    written.folder.write_record(second)
    deliver(written)
    assert Seen(written.uri).history("comm/bytes_up") == [(1, 1.0), (2, 3000.0)]
