"""Masked runs from end to end: the same model, nothing of a single node, liars named, crashes survived."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engines.links import Links
from experiments.simulate import simulate
from server import checkpoint, points, statistics
from server.folder import RunFolder
from server.run import RunResult
from strategies.exchange import MAX_EVIDENCE
from strategies.observers.regrouping import GroupTest, increments
from trellis.cli import main
from trellis.errors import BaseSpent
from trellis.secagg import quantise
from trellis.types import RoundRecord

BIN, DRIVER = Path(sys.executable).parent, Path(__file__).with_name("kill_masked.py")
TEN = ("sector=healthcare_wisconsin", "nodes=consortium", "engine.links=false", "tracking=none", "rounds=2")
SECAGG = ("privacy=secagg", "privacy.secagg.insecure_rng=true")
FIVES = (*TEN, *SECAGG, "nodes.group_size=5")
GROUPS = {
    "train-000": ["aster", "cedar", "elm", "ginkgo", "iris"],
    "train-001": ["birch", "dahlia", "fir", "hazel", "juniper"],
}


class Ran:
    """A run and its folder."""

    def __init__(self, result: RunResult) -> None:
        self.result, self.folder = result, RunFolder(Path(result.run_dir))

    @property
    def records(self) -> list[RoundRecord]:
        return list(self.folder.records())

    @property
    def rounds(self) -> list[RoundRecord]:
        return [record for record in self.records if record.purpose == "train"]

    @property
    def params(self) -> Any:
        """All params, flattened."""
        return np.concatenate([a.reshape(-1) for a in checkpoint.load(self.folder.state_path).params.values()])


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`ran(*overrides)`: the run, made once."""

    @cache
    def run(*overrides: str) -> Ran:
        return Ran(simulate([*overrides, f"runs_dir={tmp_path_factory.mktemp('runs')}"]))

    return run


# ---------------------------------------------------------------- the same model


def test_a_masked_rounds_model_is_that_of_the_clear_one_within_the_quantisation_step(ran: Run) -> None:
    clear, masked = ran(*TEN, "rounds=1"), ran(*TEN, "rounds=1", *SECAGG)
    step = 1 / quantise.scale_for(10, 10.0, 1)
    assert step < 5e-8
    # beside it what float32 rounds: the mean, and the params it is added to
    rounding = 2.0**-23 * np.abs(clear.params).max()
    assert np.abs(masked.params - clear.params).max() <= step + rounding
    assert masked.result.model_digest != clear.result.model_digest


@pytest.mark.parametrize(("options", "groups"), [((), ()), (("server_optimizer=momentum",), ("nodes.group_size=5",))])
def test_a_masked_run_scores_on_test_rows_as_a_clear_one(
    options: tuple[str, ...], groups: tuple[str, ...], ran: Run
) -> None:
    clear, masked = ran(*TEN, *options), ran(*TEN, *SECAGG, *options, *groups)
    found, expected = masked.result.metrics, clear.result.metrics
    names = {name for name in expected if name.startswith("test/")}
    assert (
        names
        == {name for name in found if name.startswith("test/")}
        == {f"test/{m}" for m in ("accuracy", "ap", "auc", "loss")}
    )
    assert all(found[name] == pytest.approx(expected[name], abs=1e-6) for name in names)
    assert np.abs(masked.params - clear.params).max() < 1e-6
    assert masked.result.refusals == []
    assert [r.base_metrics["train/loss"] for r in masked.rounds] == pytest.approx(
        [r.base_metrics["train/loss"] for r in clear.rounds], abs=1e-6
    )


def test_validation_scores_of_a_masked_run_are_of_half_the_rows(ran: Run) -> None:
    clear, masked = ran(*TEN), ran(*TEN, *SECAGG)
    assert masked.result.metrics["val/loss"] != clear.result.metrics["val/loss"]
    assert masked.result.metrics["val/loss"] == pytest.approx(clear.result.metrics["val/loss"], rel=0.2)
    assert masked.result.best is not None


def test_a_study_gives_the_same_model_and_metrics_every_time(ran: Run, tmp_path: Path) -> None:
    again = simulate([*FIVES, f"runs_dir={tmp_path}"])
    assert (again.model_digest, again.metrics) == (ran(*FIVES).result.model_digest, ran(*FIVES).result.metrics)


def test_secrets_from_the_os_change_no_model(ran: Run, tmp_path: Path) -> None:
    other = simulate([*(o for o in FIVES if "insecure" not in o), f"runs_dir={tmp_path}"])
    assert other.model_digest == ran(*FIVES).result.model_digest
    assert other.metrics != ran(*FIVES).result.metrics, "halves are drawn by the OS"


@pytest.mark.slow
def test_ray_gives_the_local_engines_masked_model(ran: Run, quiet_environment: dict[str, str], tmp_path: Path) -> None:
    local = ran(*FIVES).result
    command = [BIN / "trellis", "simulate", "--json", *FIVES, "engine=ray", f"runs_dir={tmp_path}", "run_name=ray"]
    done = subprocess.run(
        [*map(str, command)], env=quiet_environment, capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = json.loads(done.stdout)
    assert printed["engine"] == "ray"
    assert (printed["model_digest"], printed["metrics"], printed["refusals"]) == (
        local.model_digest, local.metrics, local.refusals
    )  # fmt: skip
    assert printed["secagg"] == local.secagg


# ---------------------------------------------------------------- nothing of a single node


def floats_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from floats_in(item)
    elif isinstance(value, float):
        yield value


def test_no_number_of_a_single_node_is_written_down(ran: Run) -> None:
    clear, masked = ran(*TEN), ran(*FIVES)
    of_nodes = {
        v
        for record in clear.records
        for v in (*floats_in([dict(m) for m in record.node_metrics.values()]), *record.update_norms.values())
        if v != round(v, 4)  # what a setting may be as well
    }
    assert len(of_nodes) > 50
    files = [p for p in masked.folder.path.rglob("*.json") if "nodes" not in p.relative_to(masked.folder.path).parts]
    assert len(files) > 5
    written = [v for path in files for v in floats_in(json.loads(path.read_bytes()))]
    assert not [v for v in written if any(abs(v - w) <= 1e-9 * abs(w) for w in of_nodes)]


def test_a_record_knows_groups_and_of_nodes_only_who_was_there(ran: Run) -> None:
    for record in ran(*FIVES).records:
        assert record.node_metrics == {}
        assert record.num_examples == {}
        assert record.update_norms == {}
        assert len(record.answered) == len(record.asked) == 10
        assert record.groups is not None
        assert {name: group["members"] for name, group in record.groups.items()} == GROUPS
        assert all(group["survivors"] == group["members"] for group in record.groups.values())
        assert all(
            set(group) == {"members", "survivors", "lost", "voided", "trains", "num_clipped", "num_failed"}
            for group in record.groups.values()
        )
        for name in record.asked:
            told = {point.key for point in points.of_node(record, name)}
            assert not [key for key in told if key.startswith(("val/", "test/", "train/", "update/", "num_examples"))]
        table = points.node_table(record)["nodes"]
        assert all(
            set(row) == {"comm/seconds", "comm/bytes_down", "comm/bytes_up", "refused"} for row in table.values()
        )
    trained = ran(*FIVES).rounds[0]
    assert set(trained.weights) <= {"+".join(members) for members in GROUPS.values()}
    assert trained.findings["secagg/num_groups"] == 2
    assert ran(*FIVES).result.nodes == {}


def test_what_was_masked_is_said_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["nodes=pilot", "privacy.secagg.allow_no_dropout=true", "rounds=1", f"runs_dir={tmp_path}"]
    assert main(["simulate", "--json", *TEN, *SECAGG, *options]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["secagg"]
    assert found["groups"] == [["north", "south", "west"]]
    assert (found["threat"], found["threshold"], found["colluders"], found["dropouts"]) == ("malicious_server", 3, 1, 0)
    assert (found["keys"], found["insecure_rng"], found["privacy_set"]) == ("simulated", True, 3)
    assert json.loads((next(tmp_path.iterdir()) / "result.json").read_bytes())["secagg"] == found


HELD_OUT = ("nodes=cross_device", "nodes.count=24", "nodes.held_out.validation=0.17", "nodes.held_out.test=0.17")


def test_held_out_nodes_judge_masked(ran: Run) -> None:
    for record in ran(*TEN, *SECAGG, *HELD_OUT).rounds:
        assert record.groups is not None
        trains = {name: group["trains"] for name, group in record.groups.items()}
        assert trains == {"train-000": True, "validation-000": False}
        assert record.node_metrics == {}
        assert 0 < record.base_metrics["val/auc"] <= 1
        judges = record.groups["validation-000"]["survivors"]
        assert len(judges) == 5
        assert set(judges) < set(record.answered)


def test_held_out_nodes_judge_the_last_model_masked(ran: Run) -> None:
    closing = ran(*TEN, *SECAGG, *HELD_OUT).records[-1]
    assert closing.groups is not None
    told = {name: (group["lost"], group["voided"]) for name, group in closing.groups.items()}
    assert told == {"validation-000": (None, None), "test-000": (None, None)}
    assert {"val/auc", "test/auc"} <= set(closing.base_metrics)
    assert closing.refusals == ()


@pytest.mark.parametrize(("sector", "nodes"), [("production", "plants"), ("retail", "countries")])
def test_a_statistics_round_works_masked(sector: str, nodes: str, ran: Run) -> None:
    options = [f"sector={sector}", f"nodes={nodes}", "data=synthetic", "sector.training.max_examples=50"]
    options += ["sector.options.synthetic_rows=3000", "sector.options.partition=uniform"]
    options += ["engine.links=false", "tracking=none", "rounds=1"]
    clear, masked = (statistics.of_run(ran(*options, *more).folder) for more in ((), SECAGG))
    assert clear is not None
    assert masked is not None
    assert (masked.rows, masked.nodes, masked.refusals) == (clear.rows, clear.nodes, ())
    assert set(masked.options) == set(clear.options)
    for name, expected in clear.options.items():
        if isinstance(expected, str):
            assert masked.options[name] == expected
        else:
            assert np.allclose(masked.options[name], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- liars


def attacked(ran: Run, attack: str, *more: str) -> Ran:
    return ran(*FIVES, f"attack={attack.split()[0]}", "attack.nodes=[cedar]", *attack.split()[1:], *more)


@pytest.mark.parametrize(
    ("attack", "reason", "first"),
    [("malformed", "wrong_shape", 1), ("malformed attack.options.kind=oversize", "oversize", 1),
     ("malformed attack.options.kind=empty", "wrong_records", 1), ("replay", "wrong_request", 2)],
)  # fmt: skip
def test_who_lies_about_the_protocol_is_named_and_its_group_goes_on(
    attack: str, reason: str, first: int, ran: Run
) -> None:
    found = attacked(ran, attack)
    for record in found.rounds:
        lied = record.round >= first
        assert [(r.node, r.reason) for r in record.refusals] == ([("cedar", reason)] if lied else [])
        assert all(len(r.evidence) <= MAX_EVIDENCE for r in record.refusals)
        assert record.groups is not None
        assert ("cedar" in record.groups["train-000"]["survivors"]) is not lied
        assert record.closed is None
        assert len(record.answered) == 10 - lied


@pytest.mark.parametrize("attack", ["ipm attack.options.tau=10", "label_flip"])
def test_who_lies_with_its_update_moves_its_group_and_no_one_can_tell_who(attack: str, ran: Run) -> None:
    honest, found = ran(*FIVES), attacked(ran, attack)
    assert found.result.model_digest != honest.result.model_digest
    assert found.result.refusals == []
    assert found.result.attack is not None
    assert found.result.attack["nodes"] == ["cedar"]
    assert all(record.groups["train-000"]["survivors"] == GROUPS["train-000"] for record in found.rounds)  # type: ignore[index]


def test_an_attacker_sees_what_others_trained_before_it_is_masked(ran: Run) -> None:
    """Minus ten times the honest mean is what one of five then adds: its group goes the other way."""
    options = ["rounds=1", "privacy.secagg.clip_norm=1000"]
    clear = ran(*TEN, *options[:1], "attack=ipm", "attack.options.tau=10", "attack.nodes=[cedar]")
    masked = ran(*TEN, *SECAGG, *options, "attack=ipm", "attack.options.tau=10", "attack.nodes=[cedar]")
    assert np.abs(masked.params - clear.params).max() < 1e-5


def test_an_update_that_is_no_number_is_counted_and_adds_nothing(ran: Run) -> None:
    found = attacked(ran, "not_a_number", "rounds=1")
    (record,) = found.rounds
    assert record.groups is not None
    assert [group["num_failed"] for group in record.groups.values()] == [1, 0]
    assert record.findings["secagg/num_failed"] == 1
    assert record.refusals == ()
    assert np.isfinite(found.params).all()


def test_a_robust_rule_over_three_groups_survives_a_liar(ran: Run) -> None:
    thirds = [*TEN, *SECAGG, "rounds=1", "nodes.group_size=3", "privacy.secagg.allow_no_dropout=true"]
    robust = [*thirds, "rule=median", "num_byzantine=1", "privacy.secagg.num_lost_groups=0"]
    attack = ["attack=gaussian", "attack.options.std=3", "attack.nodes=[elm]"]
    honest, lied, naive = ran(*robust), ran(*robust, *attack), ran(*thirds, *attack)
    assert lied.result.refusals == []
    far = [np.linalg.norm(run.params - honest.params) for run in (lied, naive)]
    assert far[0] < 0.2 * far[1]
    assert honest.result.secagg is not None
    assert (honest.result.secagg["liars"], len(honest.result.secagg["groups"])) == (1, 3)


SIXTEEN = (
    *TEN, *SECAGG, "nodes=cross_device", "nodes.count=16",
    "nodes.held_out.validation=0", "nodes.held_out.test=0", "nodes.group_size=4",
)  # fmt: skip


def test_audits_tell_liars_from_those_beside_them_and_other_rounds_say_nothing(ran: Run) -> None:
    found = ran(
        *SIXTEEN, "rounds=4", "suspicion=sequential", "privacy.secagg.audit_every=2", "rule=median", "num_byzantine=1",
        "privacy.secagg.num_lost_groups=0", "attack=gaussian", "attack.nodes=[device-0005]",
    )  # fmt: skip
    unflagged, flagged = increments(16, 1, 4, GroupTest(0.1, 0.05))
    before: dict[str, float] = {}
    for record in found.rounds:
        assert record.groups is not None
        if record.round % 2:
            assert dict(record.suspicion) == before, "a pinned group accuses nobody"
            assert all(name.startswith("train-") for name in record.groups)
        else:
            beside = next(g["members"] for g in record.groups.values() if "device-0005" in g["members"])
            assert all(name.startswith("drawn-") for name in record.groups)
            assert len(record.suspicion) == 16
            for name, llr in record.suspicion.items():
                x = flagged if name in beside else unflagged
                assert llr == pytest.approx(max(0.0, before.get(name, 0.0) + x))
        before = dict(record.suspicion)
    assert max(before, key=lambda name: before[name]) == "device-0005" or list(before.values()).count(2 * flagged) > 1
    assert before["device-0005"] == pytest.approx(2 * flagged)
    assert flagged > 1


# ---------------------------------------------------------------- rounds that close


def test_a_round_below_its_quorum_closes_and_the_next_asks_only_the_group_that_was_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, str]] = []

    def away(links: Links, index: int, message: Any) -> bool:
        from trellis import wire

        request, name = wire.read_request(message), links.specs[index].name
        if request is None or request.purpose != "train":
            return True
        asked.append((request.round, name))
        return not (request.round == 1 and name in ("cedar", "iris"))

    monkeypatch.setattr(Links, "reachable", away)
    options = [o for o in FIVES if not o.startswith("engine")]
    found = Ran(simulate([*options, "min_replies=6", f"runs_dir={tmp_path}"]))
    first, second = found.rounds
    assert first.closed == "5 good replies, 6 are needed: min_replies=6"
    assert first.digest == first.base_digest == second.base_digest
    assert first.groups is not None
    assert first.groups["train-000"]["lost"] == "3 of 5 answered, 4 must"
    assert {(r.node, r.reason) for r in first.refusals} == {
        *((name, "unavailable") for name in ("cedar", "iris")),
        *((name, "group_lost") for name in ("aster", "elm", "ginkgo")),
    }
    assert {name for round_, name in asked if round_ == 2} == set(GROUPS["train-000"])
    assert second.closed is None
    assert len(second.answered) == 10
    assert second.digest != second.base_digest


def test_a_quorum_that_no_round_can_have_ends_the_run_with_what_it_means(tmp_path: Path) -> None:
    options = [*FIVES, "attack=malformed", "attack.nodes=[cedar]", "min_replies=10", "run_name=run"]
    with pytest.raises(BaseSpent, match=r"round 2: the params .* Start a new run"):
        simulate([*options, f"runs_dir={tmp_path}"])
    (record,) = RunFolder(tmp_path / "run").records()
    assert record.closed == "9 good replies, 10 are needed: min_replies=10"


def test_more_rounds_can_be_had_of_a_run_that_had_ended(ran: Run, tmp_path: Path) -> None:
    simulate([*FIVES, "rounds=1", "run_name=short", f"runs_dir={tmp_path}"])
    lengthened = simulate(["resume=short", "rounds=2", f"runs_dir={tmp_path}"])
    assert (lengthened.model_digest, lengthened.metrics) == (
        ran(*FIVES).result.model_digest,
        ran(*FIVES).result.metrics,
    )


# ---------------------------------------------------------------- crashes


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(DRIVER), str(tmp_path_factory.mktemp("killed")), "telling"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_masked_run_killed_at_any_step_resumes_to_the_same_model_or_says_that_its_base_is_spent(
    killed: dict[str, Any],
) -> None:
    whole, outcomes = killed["whole"], killed["outcomes"]
    steps = whole["steps"]
    first, kept = steps.index("answered"), next(i for i, s in enumerate(steps) if s.endswith(".sums"))
    assert len(outcomes) > 8
    assert all(outcome["killed"] == {"killed": True} for outcome in outcomes)
    # simulated nodes die with the server: whoever has answered answers no more
    window = range(first + 1, kept + 1)
    for outcome in outcomes:
        if outcome["point"] in window:
            assert "no further sum of updates to them can be had" in outcome["found"]["spent"]
        else:
            assert outcome["found"]["digest"] == whole["digest"], outcome["point"]
    assert any(outcome["point"] in window for outcome in outcomes)


def test_a_run_killed_in_its_closing_evaluation_has_its_metrics_or_says_why_not(killed: dict[str, Any]) -> None:
    whole, lost = killed["whole"], 0
    for outcome in (o for o in killed["outcomes"] if "spent" not in o["found"]):
        found = outcome["found"]
        if found["metrics"] != whole["metrics"]:
            lost += 1
            assert found["metrics"] == {}
            assert found["closed"][:-1] == [None]
            assert found["closed"][-1].startswith("no sum of train-000: ")
        else:
            assert found["closed"] == [None, None]
    assert 0 < lost < 4, "between its first share and its sum"
