"""The detector on real runs: liars are out after a few rounds, unusual honest nodes stay, an operator decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.simulate import simulate
from experiments.studies.suspicion_rates import honest_run, partitioned
from server.folder import RunFolder
from server.run import RunResult
from trellis.cli import main
from trellis.errors import ConfigError, MissingData, ResumeError
from trellis.types import RoundRecord

LIAR = "birch"


def rounds_of(result: RunResult) -> list[RoundRecord]:
    return [r for r in RunFolder(Path(result.run_dir)).records() if r.purpose == "train"]


@pytest.mark.parametrize(
    ("sector", "partition", "seed", "rule"),
    [
        # of all that were measured those where honest nodes are furthest from the others
        ("banks", "dirichlet 0.3", 0, ("rule=geometric_median", "num_byzantine=2")),
        ("healthcare_wisconsin", "dirichlet 0.1", 2, ("rule=geometric_median", "num_byzantine=2")),
        ("banks", "amount_band", 2, ()),
    ],
)
def test_honest_nodes_that_are_unlike_the_others_are_not_quarantined(
    sector: str, partition: str, seed: int, rule: tuple[str, ...]
) -> None:
    data = [f"sector={sector}", *partitioned(partition), f"sector.options.split_seed={seed}", "nodes=consortium"]
    try:
        records, result = honest_run([*data, *rule, f"seed={seed}", "rounds=15"])
    except MissingData as error:
        pytest.skip(str(error))
    assert len(records) == 15
    assert result.quarantined == []
    assert max(llr for record in records for llr in record.suspicion.values()) == 0.0


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of which one node was quarantined: it sent NaN in every round."""
    runs = tmp_path_factory.mktemp("runs")
    attack = ["attack=not_a_number", f"attack.nodes=[{LIAR}]", "suspicion=sequential"]
    return simulate(
        [
            "nodes=consortium",
            *attack,
            "engine.links=false",
            "rounds=6",
            "tracking=none",
            "run_name=caught",
            f"runs_dir={runs}",
        ]
    )


def again(result: RunResult, *overrides: str) -> RunResult:
    return simulate([f"resume={result.run_name}", f"runs_dir={Path(result.run_dir).parent}", *overrides])


def test_a_liar_is_named_with_the_round_and_the_evidence(caught: RunResult) -> None:
    (found,) = caught.quarantined
    assert (found["node"], found["round"]) == (LIAR, 4)
    assert "flagged in 4 of 4 rounds" in found["evidence"]
    assert "not_finite" in found["evidence"]
    assert [LIAR in record.asked for record in rounds_of(caught)] == [True] * 4 + [False] * 2


def test_a_quarantine_survives_resuming_and_an_operator_lifts_it(caught: RunResult) -> None:
    lengthened = again(caught, "rounds=8")
    assert [LIAR in record.asked for record in rounds_of(lengthened)[6:]] == [False] * 2
    assert lengthened.quarantined == caught.quarantined
    released = again(caught, "rounds=14", f"suspicion.released=[{LIAR}]")
    assert [LIAR in record.asked for record in rounds_of(released)[8:]] == [True] * 6
    assert released.quarantined == []
    kept = again(caught, "rounds=15")
    assert LIAR in rounds_of(kept)[14].asked, "an operator's word is kept with the run"


def test_a_resumed_run_gathers_the_evidence_of_an_undisturbed_one(tmp_path: Path) -> None:
    settings = ["attack=not_a_number", "attack.nodes=[south]", "suspicion=sequential", "tracking=none"]

    def run(name: str, *stops: int) -> list[dict[str, Any]]:
        for stop in stops:
            earlier = (tmp_path / name).exists()
            start = [f"resume={name}"] if earlier else [*settings, f"run_name={name}"]
            result = simulate([*start, f"rounds={stop}", f"runs_dir={tmp_path}"])
        return [{"llr": dict(r.suspicion), "quarantined": dict(r.quarantined)} for r in rounds_of(result)]

    assert run("whole", 6) == run("halted", 2, 4, 6)


def test_only_what_an_operator_may_say_can_change(caught: RunResult) -> None:
    with pytest.raises(ResumeError, match=r"suspicion\.released may change"):
        again(caught, "rounds=20", "suspicion=sequential", "suspicion.alpha=0.5")
    with pytest.raises(ConfigError, match=r"suspicion\.released: brich are no nodes of .*its nodes are: aster, birch"):
        again(caught, "rounds=20", "suspicion.released=[brich]")


def test_people_are_told_who_is_out_and_how_to_let_them_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attack = ["attack=malformed", "attack.nodes=[south]", "suspicion=sequential"]
    assert main(["simulate", *attack, "rounds=4", "tracking=none", "run_name=one"]) == 0
    out = capsys.readouterr().out
    assert "quarantined  south, round 4: flagged in 4 of 4 rounds" in out
    (command,) = [line.split() for line in out.splitlines() if "suspicion.released" in line]
    assert command == ["trellis", "simulate", "resume=one", "rounds=8", "'suspicion.released=[south]'"]
    assert main(["simulate", "--json", "resume=one", "rounds=8", "suspicion.released=[south]"]) == 0
    assert json.loads(capsys.readouterr().out)["quarantined"] == []
