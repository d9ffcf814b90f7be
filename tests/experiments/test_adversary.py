"""Attackers in real runs: they lie as their formula says, honest nodes notice nothing, a resumed run goes on lying."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pytest

import sectors
from conf.load import load
from experiments import attacks
from experiments.attacks import View
from experiments.engines.adversary import Liar, attacked_app, attackers, plot_of
from experiments.simulate import simulate
from sectors.base import Sector
from server import build
from server.app import main as deployed
from server.folder import RunFolder
from server.run import RunResult
from strategies.aggregation import Pipeline
from trellis.cli import main
from trellis.errors import ConfigError
from trellis.types import RoundRecord

NAMES = ["aster", "birch", "cedar", "dahlia", "elm", "fir", "ginkgo", "hazel", "iris", "juniper"]
LIARS = ["cedar", "iris", "juniper"]
HONEST = [i for i, name in enumerate(NAMES) if name not in LIARS]
LYING = [i for i, name in enumerate(NAMES) if name in LIARS]
BASE = ("nodes=consortium", "engine.links=false", "tracking=none")
BY_THREE = f"attack.nodes=[{','.join(LIARS)}]"


@dataclass(frozen=True)
class Ran:
    """A run, its training records, and the rows (n, d) that the rule saw in each round."""

    result: RunResult
    records: list[RoundRecord]
    rows: list[Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """`ran(*overrides)`: the run, made once."""

    @cache
    def run(*overrides: str) -> Ran:
        rows: list[Any] = []
        aggregate = Pipeline.__call__

        def watched(self: Pipeline, updates: Any, **more: Any) -> Any:
            found = aggregate(self, updates, **more)
            if hasattr(updates, "updates_nd"):  # the server's own; attackers try their lies on arrays
                rows.append(updates.updates_nd.copy())
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "__call__", watched)
            result = simulate([*BASE, *overrides, f"runs_dir={tmp_path_factory.mktemp('runs')}"])
        records = [r for r in RunFolder(Path(result.run_dir)).records() if r.purpose == "train"]
        return Ran(result, records, rows)

    return run


Run = Callable[..., Ran]


# ---------------------------------------------------------------- lies


@pytest.mark.parametrize(
    "attack",
    ["sign_flip", "gaussian", "alie attack.options.z=1.5", "mimic", "agr_tailored", "rop", "free_rider", "scaling",
     "label_flip", "backdoor"],
)  # fmt: skip
def test_attackers_lie_and_nobody_else_sends_another_bit(attack: str, ran: Run) -> None:
    honest, lied = ran("rounds=3"), ran("rounds=2", *f"attack={attack}".split(), BY_THREE)
    assert (lied.rows[0][HONEST] == honest.rows[0][HONEST]).all()
    assert all((lied.rows[0][i] != honest.rows[0][i]).any() for i in LYING)
    assert lied.records[0].base_metrics == {
        **honest.records[0].base_metrics, "train/loss": lied.records[0].base_metrics["train/loss"]
    }, "attackers evaluate honestly"  # fmt: skip
    assert lied.result.refusals == []
    assert lied.result.attack == {
        "name": attack.split()[0], "nodes": LIARS, "start_round": 1, "success_rate": lied.result.attack["success_rate"]
    }  # fmt: skip
    assert (lied.result.attack["success_rate"] is None) == (attack != "backdoor")


def test_what_is_sent_is_the_formula_of_what_the_others_sent(ran: Run) -> None:
    honest = ran("rounds=3").rows[0]
    flipped = ran("rounds=2", "attack=sign_flip", BY_THREE).rows[0]
    assert (flipped[LYING] == -honest[LYING]).all()
    for rows in ran("rounds=2", "attack=alie", "attack.options.z=1.5", BY_THREE).rows:
        expected = attacks.alie(View(rows[0], np.ascontiguousarray(rows[HONEST]), num_attackers=3), z=1.5)
        assert all((rows[i] == expected).all() for i in LYING)


def test_colluders_send_one_vector_and_noise_is_everyones_own(ran: Run) -> None:
    for rows in ran("rounds=2", "attack=mimic", BY_THREE).rows:
        assert any((rows[LYING] == rows[i]).all() for i in HONEST), "a copy of an honest node"
    first, second, third = ran("rounds=2", "attack=gaussian", BY_THREE).rows[0][LYING]
    assert (first != second).any()
    assert (second != third).any()


def test_a_free_rider_sends_the_last_step_of_the_global_model(ran: Run) -> None:
    lied = ran("rounds=2", "attack=free_rider", "attack.options.mode=previous", BY_THREE)
    step = lied.rows[0].mean(axis=0, dtype=np.float64)
    assert not lied.rows[0][LYING].any()
    assert np.allclose(lied.rows[1][LYING], step, atol=1e-6)


def test_liars_see_and_send_what_stands_for_momentum(ran: Run) -> None:
    rows = ran("rounds=2", "attack=alie", "attack.options.z=1.5", BY_THREE, "rule.worker_momentum=0.9").rows[1]
    expected = attacks.alie(View(rows[0], np.ascontiguousarray(rows[HONEST]), num_attackers=3), z=1.5)
    assert all((rows[i] == expected).all() for i in LYING)


def test_a_tailored_lie_is_counted_by_the_runs_own_rule(ran: Run) -> None:
    options = ["rule=multi_krum", "num_byzantine=3", "attack=agr_tailored", BY_THREE]
    for record in ran("rounds=2", *options).records:
        assert any(record.weights[name] > 0 for name in LIARS)


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("not_a_number", "not_finite"),
        ("malformed", "wrong_shape"),
        ("malformed attack.options.kind=oversize", "oversize"),
        ("malformed attack.options.kind=empty", "wrong_request"),
        ("inflation", "num_examples"),
        ("inflation attack.options.mode=not_a_number", "num_examples"),
        ("replay", "wrong_request"),
    ],
)
def test_a_lie_about_the_protocol_costs_its_sender_every_round_and_training_goes_on(
    attack: str, reason: str, ran: Run
) -> None:
    lied = ran("rounds=2", *f"attack={attack}".split(), BY_THREE)
    for record in lied.records[1:] if attack == "replay" else lied.records:
        assert sorted((r.node, r.reason) for r in record.refusals) == [(name, reason) for name in LIARS]
        assert record.closed is None
        assert record.digest != record.base_digest
        assert set(record.update_norms) == set(NAMES) - set(LIARS)


def test_a_backdoor_opens_more_often_the_louder_it_is_taught(ran: Run) -> None:
    def rate(*options: str) -> float:
        found = ran("rounds=2", "attack=backdoor", BY_THREE, *options).result
        assert json.loads((Path(found.run_dir) / "result.json").read_text())["attack"] == found.attack
        return float(found.attack["success_rate"])  # type: ignore[index]

    assert 0 <= rate() < rate("attack.options.scale=10", "attack.options.value=3")


@pytest.mark.parametrize("attack", ["mimic", "label_flip", "replay"])
def test_a_sleeper_is_honest_until_it_wakes(attack: str, ran: Run) -> None:
    honest, lied = ran("rounds=3"), ran("rounds=3", f"attack={attack}", "attack.start_round=3", BY_THREE)
    for asleep in (0, 1):
        assert (lied.rows[asleep] == honest.rows[asleep]).all()
    assert lied.rows[2].tobytes() != honest.rows[2].tobytes()
    assert lied.result.attack["start_round"] == 3  # type: ignore[index]


def test_attackers_that_are_not_asked_do_not_lie(ran: Run) -> None:
    some = ["sampler=uniform", "sampler.fraction=0.4", "seed=3"]
    for attack in ("replay", "mimic"):
        records = ran("rounds=3", f"attack={attack}", "attack.num_attackers=2", *some).records
        assert len(records) == 3
        assert all(len(r.asked) == 4 for r in records)


# ---------------------------------------------------------------- resume, and other engines


@pytest.mark.parametrize(
    "attack",
    ["mimic", "rop", "replay attack.options.age=2"],
)
def test_a_resumed_run_goes_on_lying_as_if_nothing_had_happened(attack: str, tmp_path: Path) -> None:
    options = [*BASE, *f"attack={attack}".split(), BY_THREE, f"runs_dir={tmp_path}"]
    straight = simulate([*options, "rounds=3", "run_name=straight"])
    simulate([*options, "rounds=2", "run_name=parted"])
    resumed = simulate(["resume=parted", "rounds=3", f"runs_dir={tmp_path}"])
    assert resumed.model_digest == straight.model_digest
    assert resumed.attack == straight.attack


@pytest.mark.parametrize("attack", ["alie", "mimic"])
def test_a_run_killed_between_honest_nodes_and_attackers_resumes_to_the_same_model(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*BASE, f"attack={attack}", BY_THREE, "rounds=2", f"runs_dir={tmp_path}"]
    straight = simulate([*options, "run_name=straight"])
    answer, calls = Liar.__call__, [0]

    def killed(self: Liar, message: Any, context: Any, call_next: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 * len(NAMES):  # the last attacker of the second round
            raise KeyboardInterrupt
        return answer(self, message, context, call_next)

    with monkeypatch.context() as patch:
        patch.setattr(Liar, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate([*options, "run_name=killed"])
    assert simulate(["resume=killed", f"runs_dir={tmp_path}"]).model_digest == straight.model_digest


def test_what_needs_no_one_else_is_the_same_in_any_number_of_processes(tmp_path: Path) -> None:
    options = [*BASE, "rounds=2", "attack=free_rider", "attack.options.mode=previous_noise", BY_THREE]
    one, two = (simulate([*options, f"engine.workers={n}", f"runs_dir={tmp_path / str(n)}"]) for n in (1, 2))
    assert one.model_digest == two.model_digest


@pytest.mark.parametrize("attack", ["sign_flip", "label_flip", "malformed"])
def test_an_app_with_attackers_travels_to_other_processes(attack: str) -> None:
    config = load([*BASE, "engine=ray", f"attack={attack}", BY_THREE])
    plot = plot_of(config, build.check(config))
    assert plot is not None
    assert cloudpickle.loads(cloudpickle.dumps(attacked_app(plot))) is not None


# ---------------------------------------------------------------- what is refused


def test_attackers_are_those_named_or_as_many_as_said_drawn_from_the_seed() -> None:
    def drawn(*overrides: str) -> tuple[str, ...]:
        return attackers(load([*BASE, "attack=sign_flip", *overrides]))

    assert drawn("attack.nodes=[iris,cedar]") == ("cedar", "iris")
    assert drawn("attack.num_attackers=3") == drawn("attack.num_attackers=3") == drawn("num_byzantine=3")
    assert set(drawn("attack.num_attackers=3")) < set(drawn("attack.num_attackers=4"))
    assert len({drawn("attack.num_attackers=3", f"seed={seed}") for seed in range(3)}) > 1


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["engine.workers=2"], "attack=alie needs the other nodes' updates: use engine=local with engine.workers=1"),
        (["engine=ray"], "attack=alie needs the other nodes' updates: use engine=local with engine.workers=1"),
        (["+attack.options.strength=2"], r"attack=alie has no options \['strength'\]"),
        (["attack=sign_flip", "attack.options.of=mean", "engine=ray"], "attack=sign_flip needs the other nodes'"),
    ],
)
def test_an_attack_that_cannot_be_carried_out_is_refused_before_anything_is_written(
    overrides: list[str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        simulate([*BASE, "attack=alie", BY_THREE, *overrides, f"runs_dir={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


def test_labels_cannot_be_flipped_where_there_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([*BASE, "attack=label_flip", BY_THREE])
    sector: Sector = sectors.get("healthcare_wisconsin")
    monkeypatch.setattr(type(sector), "num_classes", None)
    with pytest.raises(ConfigError, match="this sector has none"):
        plot_of(config, sector)


def test_a_deployed_run_has_no_attack() -> None:
    context: Any = SimpleNamespace(run_config={"overrides": "attack=sign_flip attack.num_attackers=1"})
    with pytest.raises(ConfigError, match="attacks exist in simulation only"):
        deployed(None, context)  # type: ignore[arg-type]


def test_the_command_line_says_who_lied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [*BASE, "rounds=1", "attack=backdoor", "attack.nodes=[elm]", f"runs_dir={tmp_path}"]
    assert main(["simulate", *options]) == 0
    assert "backdoor by elm, succeeds on" in " ".join(capsys.readouterr().out.split())
