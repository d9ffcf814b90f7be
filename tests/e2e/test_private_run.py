"""Private runs from end to end: what was spent is in every record, nothing of a single row is, and budgets end runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiments.simulate import simulate
from server import points
from server import run as runs
from server.folder import RunFolder
from server.run import RunResult
from trellis.privacy import accountant
from trellis.privacy.ledger import Ledger
from trellis.types import RoundRecord

DRIVER = Path(__file__).with_name("kill_private.py")
QUICK = ("sector=healthcare_wisconsin", "engine.links=false", "tracking=none")
DP = (*QUICK, "privacy=dp", "rounds=3")
MASKED = (*QUICK, "privacy=dp_secagg", "nodes=consortium", "rounds=2")
NOISE = ("privacy.target_epsilon=null", "privacy.noise_multiplier=2.0")
FIXED = (*QUICK, "privacy=dp", *NOISE)
PILOT = ("north", "south", "west")
TOO_LITTLE = [f"+nodes.items.{i}.policy.dp.max_epsilon=0.01" for i in range(10)]
INSECURE = "privacy.secagg.insecure_rng=true"


class Ran:
    """A run and its folder."""

    def __init__(self, result: RunResult) -> None:
        self.result, self.folder = result, RunFolder(Path(result.run_dir))

    @property
    def records(self) -> list[RoundRecord]:
        return list(self.folder.records())

    def ledger(self, node: str) -> Ledger:
        return Ledger(self.folder.nodes_path / node / "ledger" / f"{node}.jsonl")


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`ran(*overrides)`: the run, made once."""

    @cache
    def run(*overrides: str) -> Ran:
        return Ran(simulate([*overrides, f"runs_dir={tmp_path_factory.mktemp('runs')}"]))

    return run


# ---------------------------------------------------------------- what was spent


@pytest.mark.parametrize("overrides", [DP, MASKED], ids=["dp", "dp_secagg"])
def test_every_record_has_every_nodes_epsilon_and_it_grows_to_the_target(overrides: tuple[str, ...], ran: Run) -> None:
    run = ran(*overrides)
    by_round = [record.epsilon for record in run.records]
    assert len(by_round) == run.result.rounds
    nodes = run.records[0].asked
    assert len(nodes) in (3, 10)
    for node in nodes:
        spent = [epsilons[node] for epsilons in by_round]
        assert all(earlier < later for earlier, later in pairwise(spent))
        assert 7.9 < spent[-1] <= 8.0001
        noise = {record.noise_multipliers[node] for record in run.records}
        assert len(noise) == 1
        assert spent[-1] == accountant.epsilon(run.ledger(node).entries(), 1e-5), "what the ledger says"
    assert run.result.epsilon_max == max(max(epsilons.values()) for epsilons in by_round)
    assert run.result.refusals == []


def test_nodes_solve_for_noise_of_their_own(ran: Run) -> None:
    assert len(set(ran(*DP).records[0].noise_multipliers.values())) == 3


def test_charts_have_what_was_spent_by_round_and_by_node(ran: Run) -> None:
    for record in ran(*DP).records:
        of_round = {point.key: point.value for point in points.of_round(record)}
        assert of_round["privacy/epsilon_max"] == max(record.epsilon.values())
        assert of_round["privacy/noise_multiplier_min"] == min(record.noise_multipliers.values())
        for node in PILOT:
            of_node = {point.key: point.value for point in points.of_node(record, node)}
            assert of_node["privacy/epsilon"] == record.epsilon[node]
            assert of_node["privacy/noise_multiplier"] == record.noise_multipliers[node]


def test_every_round_is_charged_and_settled_once_at_every_node(ran: Run) -> None:
    for node in PILOT:
        ledger = ran(*DP).ledger(node)
        assert [charge.round for charge in ledger.charges()] == [1, 2, 3]
        assert ledger.settled() == {charge.id: charge.steps for charge in ledger.charges()}


# ---------------------------------------------------------------- what leaves a node


def raw(run: Ran) -> set[str]:
    """Names of metrics of exact rows, in the records and in the cards of the versions."""
    found = set[str]()
    for record in run.records:
        for metrics in (record.base_metrics, *record.node_metrics.values()):
            found |= set(metrics)
    for path in run.folder.path.rglob("*.json"):
        if path.name not in ("result.json", "config.json"):
            text = path.read_text()
            found |= {name for name in ("train/loss", "val/", "test/", "loss_sum") if name in text}
    return found


def test_no_score_and_no_loss_of_any_row_is_in_what_the_server_keeps(ran: Run) -> None:
    run = ran(*DP)
    assert raw(run) == set()
    assert [record.purpose for record in run.records] == ["train"] * 3, "nothing is scored at the end either"
    assert (run.result.best, run.result.nodes) == (None, {})


def test_a_masked_private_run_records_no_loss_either(ran: Run) -> None:
    assert raw(ran(*MASKED)) == set()


def test_records_have_the_rows_that_nodes_train_on(ran: Run) -> None:
    assert all(rows > 0 for record in ran(*DP).records for rows in record.num_examples.values())


def test_masks_hide_single_nodes_and_epsilon_is_told_beside_them(ran: Run) -> None:
    for record in ran(*MASKED).records:
        assert record.groups is not None
        assert (record.node_metrics, record.num_examples, record.update_norms) == ({}, {}, {})
        assert set(record.epsilon) == set(record.noise_multipliers) == set(record.answered)
        assert record.closed is None
    assert ran(*MASKED).result.secagg is not None


@pytest.mark.parametrize("overrides", [DP, MASKED], ids=["dp", "dp_secagg"])
def test_the_simulation_measures_the_result_itself_and_says_so(overrides: tuple[str, ...], ran: Run) -> None:
    result = ran(*overrides).result
    assert result.primary_metric["measured_by"] == "simulation"
    assert (result.primary_metric["name"], result.primary_metric["split"]) == ("auc", "test")
    assert 0.8 < result.primary_metric["value"] <= 1
    assert result.metrics["test/auc"] == result.primary_metric["value"]
    assert {name.partition("/")[0] for name in result.metrics} == {"test"}
    kept = json.loads(ran(*overrides).folder.result_path.read_bytes())
    assert kept["primary_metric"] == result.primary_metric
    assert kept == json.loads(json.dumps(asdict(result)))


# ---------------------------------------------------------------- budgets end runs


def test_a_federation_without_any_budget_ends_with_its_first_model_and_says_who_refused(ran: Run) -> None:
    run = ran(*FIXED, "rounds=5", *TOO_LITTLE[:3])
    assert run.result.rounds == 1
    assert {(r["node"], r["reason"]) for r in run.result.refusals} == {(node, "policy.budget") for node in PILOT}
    assert all("of 0.01 is spent" in r["evidence"] for r in run.result.refusals)
    (record,) = run.records
    assert record.closed is not None
    assert record.answered == ()
    assert run.result.model_digest == record.base_digest
    assert run.result.epsilon_max is None
    assert 0 <= run.result.primary_metric["value"] <= 1


def test_a_run_ends_with_the_last_model_that_the_budgets_allowed(ran: Run) -> None:
    free = ran(*FIXED, "rounds=2", INSECURE)
    enough = [
        f"+nodes.items.{i}.policy.dp.max_epsilon={free.records[-1].epsilon[n] * 1.0001}" for i, n in enumerate(PILOT)
    ]
    run = ran(*FIXED, "rounds=5", INSECURE, *enough)
    assert run.result.rounds == 3, "the third closes"
    assert [record.closed is None for record in run.records] == [True, True, False]
    assert run.result.model_digest == free.result.model_digest
    assert {(r["round"], r["node"]) for r in run.result.refusals} == {(3, node) for node in PILOT}
    assert run.result.epsilon_max == free.result.epsilon_max
    assert run.result.primary_metric == free.result.primary_metric


def test_a_run_goes_on_with_the_nodes_that_have_budget_left(ran: Run) -> None:
    run = ran(*FIXED, "rounds=2", TOO_LITTLE[0])
    assert [record.answered for record in run.records] == [("south", "west")] * 2
    assert [(r["round"], r["node"]) for r in run.result.refusals] == [(1, "north"), (2, "north")]
    assert set(run.records[-1].epsilon) == {"south", "west"}


def test_a_masked_federation_without_any_budget_ends_too(ran: Run) -> None:
    run = ran(*MASKED[:-1], *NOISE, "rounds=4", *TOO_LITTLE)
    assert run.result.rounds == 1
    assert {r["reason"] for r in run.result.refusals} >= {"policy.budget"}
    assert len({r["node"] for r in run.result.refusals if r["reason"] == "policy.budget"}) == 10
    assert run.result.model_digest == run.records[0].base_digest


def test_a_drawn_cohort_without_budget_does_not_end_a_run_that_others_can_go_on_with(ran: Run) -> None:
    sampled = ("sampler=uniform", "sampler.fraction=0.1", "sampler.min_nodes=1")
    assert ran(*FIXED, "rounds=6", *sampled, *TOO_LITTLE[:2]).result.rounds == 6


# ---------------------------------------------------------------- the ledger outlives runs and crashes


def test_runs_with_the_same_store_share_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "_store", lambda folder: str(tmp_path / "nodes"))
    first, second = (Ran(simulate([*FIXED, "rounds=1", f"runs_dir={tmp_path / 'runs'}"])) for _ in range(2))
    for node in PILOT:
        ledger = Ledger(tmp_path / "nodes" / node / "ledger" / f"{node}.jsonl")
        assert [charge.run for charge in ledger.charges()] == [first.result.run_id, second.result.run_id]
        assert first.records[0].epsilon[node] < second.records[0].epsilon[node]
        assert second.records[0].epsilon[node] == accountant.epsilon(ledger.entries(), 1e-5)


def test_a_lengthened_run_goes_on_with_its_noise_and_its_ledger(tmp_path: Path) -> None:
    target = [*QUICK, "privacy=dp", f"runs_dir={tmp_path}"]
    simulate([*target, "rounds=1", "run_name=short"])
    run = Ran(simulate(["resume=short", "rounds=2", f"runs_dir={tmp_path}"]))
    one, two = run.records
    assert one.noise_multipliers == two.noise_multipliers
    assert all(7.9 < one.epsilon[node] <= 8 < two.epsilon[node] for node in PILOT)
    assert all(len(run.ledger(node).charges()) == 2 for node in PILOT)


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kill_private.py` found."""
    command = [sys.executable, str(DRIVER), str(tmp_path_factory.mktemp("kills"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=DRIVER.parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_node_killed_before_any_of_its_writes_never_charges_less_than_it_sent(kills: dict[str, Any]) -> None:
    outcomes = kills["outcomes"]
    assert kills["steps"] > 20
    assert len(outcomes) > 2 * kills["steps"] / 3
    assert all(outcome["killed"] for outcome in outcomes)
    for outcome in outcomes:
        for found in (outcome["after"], outcome["end"]):
            assert found["steps"] >= found["steps_sent"], outcome
            assert found["epsilon"] >= found["epsilon_sent"], outcome
        assert outcome["end"]["updates"] >= 2, "it answers every round in the end"


def test_a_node_that_is_not_killed_charges_exactly_what_it_sent(kills: dict[str, Any]) -> None:
    whole = kills["whole"]
    assert whole["updates"] == whole["charges"] == 2
    assert whole["steps"] == whole["steps_sent"]
    assert whole["epsilon"] == whole["epsilon_sent"]


def test_a_crash_costs_one_rounds_charge_at_most(kills: dict[str, Any]) -> None:
    assert {outcome["end"]["charges"] for outcome in kills["outcomes"]} <= {2, 3, 4}


# ---------------------------------------------------------------- runs that can be repeated


def test_an_insecure_seed_makes_a_run_reproducible_and_the_os_does_not(ran: Run, tmp_path: Path) -> None:
    digests = {
        insecure: {
            ran(*FIXED, "rounds=2", *insecure).result.model_digest,
            simulate([*FIXED, "rounds=2", *insecure, f"runs_dir={tmp_path}"]).model_digest,
        }
        for insecure in ((INSECURE,), ())
    }
    assert {insecure: len(found) for insecure, found in digests.items()} == {(INSECURE,): 1, (): 2}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            (*FIXED, "rounds=1"),
            id="dp",
        ),
        pytest.param((*MASKED[:-1], *NOISE, "rounds=1"), id="dp_secagg"),
    ],
)
def test_a_run_with_an_insecure_seed_is_tagged(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tags: list[dict[str, str]] = []
    make = runs.make_tracker
    monkeypatch.setattr(runs, "make_tracker", lambda f, c, info: tags.append(dict(info.tags)) or make(f, c, info))
    simulate([*overrides, INSECURE, f"runs_dir={tmp_path}"])
    assert [found.get("fl.insecure_rng") for found in tags] == ["true"]
