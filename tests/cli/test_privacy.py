"""`trellis privacy`: what was spent, and what a plan costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.simulate import simulate
from sectors import private
from trellis.cli import main
from trellis.privacy import accountant
from trellis.privacy.accountant import Entry
from trellis.privacy.ledger import Charge, Ledger

PILOT = ["north", "south", "west"]
SITE = "name: elder\npolicy: {dp: {privacy_unit: rows, max_epsilon: 6.5, delta: 1.0e-6}}\n"
PLAN = ["--rows", "500", "--batch-size", "25", "--epochs", "2", "--rounds", "4"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of two rounds; north has a budget and a delta of its own."""
    overrides = ["rounds=2", "tracking=none", "engine.links=false", "privacy=dp", "privacy.target_epsilon=null"]
    north = ["+nodes.items.0.policy.dp.max_epsilon=50.0", "+nodes.items.0.policy.dp.delta=0.0001"]
    where = tmp_path_factory.mktemp("runs")
    return Path(simulate([*overrides, "privacy.noise_multiplier=1.5", *north, f"runs_dir={where}"]).run_dir)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's own file, with a ledger of three charges in the node's store."""
    file = tmp_path / "node.yaml"
    file.write_text(SITE)
    folder = tmp_path / "elder.store" / "ledger"
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "rows.jsonl", unit="rows")
    for index, run in enumerate(["r", "r", "s"]):
        ledger.charge(charge(index, run))
    ledger.settle("c0", 3)
    return file


def charge(index: int, run: str) -> Charge:
    return Charge(f"c{index}", run, index, "a", "dp_sgd", 1.5, 0.1, 10, "d", 0.0)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    assert main(["privacy", *map(str, arguments), "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one object on stdout and nothing else"
    return json.loads(out)


# ---------------------------------------------------------------- show


def test_show_prints_every_simulated_nodes_ledger_of_a_run(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    found = printed(capsys, "show", run_dir)
    assert found["damaged"] == []
    assert [line["node"] for line in found["ledgers"]] == PILOT
    for line in found["ledgers"]:
        ledger = Ledger(Path(line["file"]))
        assert (line["unit"], line["charges"], line["runs"]) == (line["node"], 2, 1)
        assert line["steps"] == sum(c.steps for c in ledger.charges()) > 0
        assert line["epsilon"] == accountant.epsilon(ledger.entries(), line["delta"])
    limits = {line["node"]: (line["max_epsilon"], line["delta"]) for line in found["ledgers"]}
    assert limits == {"north": (50.0, 1e-4), "south": (None, 1e-5), "west": (None, 1e-5)}


def test_show_agrees_with_what_the_run_recorded(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    ledgers = printed(capsys, "show", run_dir)["ledgers"]
    result = json.loads((run_dir / "result.json").read_bytes())
    assert max(line["epsilon"] for line in ledgers) == result["epsilon_max"]


def test_people_get_a_table_of_a_runs_ledgers(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    assert main(["privacy", "show", str(run_dir)]) == 0
    out = capsys.readouterr().out
    for text in (*PILOT, "epsilon", "no limit", "50", "0.0001", "1e-05"):
        assert text in out


def test_show_of_one_nodes_store_takes_the_delta_that_is_given(
    capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    store = run_dir / "nodes" / "south"
    (usual,), (strict,) = (printed(capsys, "show", store, *o)["ledgers"] for o in ((), ("--delta", "1e-7")))
    assert (usual["node"], usual["delta"], strict["delta"]) == ("south", 1e-5, 1e-7)
    assert usual["epsilon"] < strict["epsilon"]


def test_show_prints_a_sites_own_ledger_with_its_budget(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    (line,) = printed(capsys, "show", "--node-file", site)["ledgers"]
    assert line == {
        "node": "elder",
        "unit": "rows",
        "file": str(site.parent / "elder.store" / "ledger" / "rows.jsonl"),
        "charges": 3,
        "runs": 2,
        "steps": 30,
        "epsilon": accountant.epsilon([Entry(1.5, 0.1, 23)], 1e-6),
        "max_epsilon": 6.5,
        "delta": 1e-6,
    }


def test_show_finds_the_folder_that_a_site_names(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    (site.parent / "elder.store" / "ledger").rename(site.parent / "safe")
    site.write_text(SITE.replace("delta", "ledger: safe, delta"))
    (line,) = printed(capsys, "show", "--node-file", site)["ledgers"]
    assert (Path(line["file"]).parent.name, line["charges"]) == ("safe", 3)


def test_show_changes_nothing(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    folder = site.parent / "elder.store" / "ledger"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    printed(capsys, "show", "--node-file", site)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def damage(site: Path) -> Path:
    """The ledger, its last line edited."""
    path = site.parent / "elder.store" / "ledger" / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps": 3', b'"steps": 1'))
    return path


def test_a_damaged_ledger_is_named_and_the_answer_is_no(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    path = damage(site)
    found = printed(capsys, "show", "--node-file", site, code=1)
    assert found["ledgers"] == []
    (why,) = found["damaged"]
    for text in (str(path), "line 5 is damaged", "restore it", "never start at zero"):
        assert text in why
    assert main(["privacy", "show", "--node-file", str(site)]) == 1
    assert "never start at zero" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_ledger_does_not_hide_the_others(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    damage(site)
    Ledger(site.parent / "elder.store" / "ledger" / "images.jsonl", unit="images").charge(charge(0, "r"))
    found = printed(capsys, "show", "--node-file", site, code=1)
    assert [line["unit"] for line in found["ledgers"]] == ["images"]
    assert len(found["damaged"]) == 1


def test_a_ledger_that_is_gone_while_its_mark_is_there_is_not_nothing(
    capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    (site.parent / "elder.store" / "ledger" / "rows.jsonl").unlink()
    code = main(["privacy", "show", "--node-file", str(site)])
    captured = capsys.readouterr()
    assert code == 1
    assert "is gone" in captured.out + captured.err


def test_the_budget_stands_beside_the_data_it_is_for(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    Ledger(site.parent / "elder.store" / "ledger" / "images.jsonl", unit="images").charge(charge(0, "r"))
    limits = {x["unit"]: x["max_epsilon"] for x in printed(capsys, "show", "--node-file", site)["ledgers"]}
    assert limits["rows"] == 6.5
    assert limits.get("images") is None


# ---------------------------------------------------------------- plan


def test_a_plan_of_an_epsilon_finds_the_noise_that_keeps_within_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "plan", *PLAN, "--epsilon", "3")
    assert (found["sample_rate"], found["steps"], found["delta"]) == (0.05, 160, 1e-5)
    assert 2.97 < found["epsilon"] <= 3
    assert found["epsilon"] == accountant.epsilon([Entry(found["noise_multiplier"], 0.05, 160)], 1e-5)
    assert list(found["by_round"]) == ["1", "2", "3", "4"]
    spent = list(found["by_round"].values())
    assert spent == sorted(spent)
    assert spent[-1] == found["epsilon"]
    assert found["warning"] is None


def test_a_plan_of_a_noise_says_what_it_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "plan", *PLAN, "--noise", "1.2")
    assert found["noise_multiplier"] == 1.2
    assert found["epsilon"] == accountant.epsilon([Entry(1.2, 0.05, 160)], 1e-5)
    assert found["by_round"]["1"] == accountant.epsilon([Entry(1.2, 0.05, 40)], 1e-5)


def test_a_plan_counts_as_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    each = private.plan(85, 17, 3)
    found = printed(capsys, "plan", "--rows", 85, "--batch-size", 17, "--epochs", 3, "--rounds", 2, "--noise", 2)
    assert (found["sample_rate"], found["steps"]) == (each.sample_rate, 2 * each.steps)
    one = printed(capsys, "plan", "--rows", 10, "--batch-size", 17, "--rounds", 2, "--noise", 2)
    assert (one["sample_rate"], one["steps"]) == (1.0, 2)


def test_a_long_plan_is_told_at_some_of_its_rounds_and_at_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "plan", "--rows", 500, "--rounds", 93, "--noise", 2)
    rounds = [int(r) for r in found["by_round"]]
    assert len(rounds) < 30
    assert (rounds[0], rounds[-1]) == (1, 93)
    assert rounds == sorted(rounds)


def test_people_get_a_plan_in_four_lines_and_a_warning_of_a_large_delta(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "plan", *PLAN, "--noise", "1.2"]) == 0
    out = capsys.readouterr().out
    for text in ("noise multiplier  1.2000", "after 4 rounds", "0.05000, 40 steps a round"):
        assert text in out
    assert "publishing a row" not in out
    assert main(["privacy", "plan", *PLAN, "--noise", "1.2", "--delta", "0.01"]) == 0
    assert "publishing a row" in " ".join(capsys.readouterr().out.split())
    assert "publishing a row" in printed(capsys, "plan", *PLAN, "--noise", "1.2", "--delta", "0.01")["warning"]


def test_a_plan_can_be_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["privacy", "plan", *PLAN, "--noise", "1.2", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "plan.png" in "".join(capsys.readouterr().out.split())
    printed(capsys, "plan", *PLAN, "--noise", "1.2", "--plot", tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["show"], "say whose"),
        (["show", "nowhere"], "no folder of a run"),
        (["plan"], "a plan needs --rows"),
        (["plan", "--rows", "10"], "one of --epsilon and --noise"),
        (["plan", "--rows", "10", "--epsilon", "1", "--noise", "1"], "one of --epsilon and --noise"),
        (["plan", "--noise", "1"], "a plan needs --rows"),
        (["plan", "--rows", "0", "--noise", "1"], "must be 1 at least"),
        (["plan", "--rows", "10", "--rounds", "-1", "--noise", "1"], "must be 1 at least"),
        (["plan", "--rows", "10", "--batch-size", "0", "--noise", "1"], "must be 1 at least"),
        (["plan", "--rows", "10", "--noise", "-1"], "--noise is -1"),
        (["plan", "--rows", "10", "--noise", "nan"], "--noise is nan"),
        (["plan", "--rows", "10", "--epsilon", "0"], "epsilon is 0"),
        (["plan", "--rows", "10", "--epsilon", "inf"], "epsilon is inf"),
        (["plan", "--rows", "10", "--epsilon", "1", "--delta", "0"], "delta is 0"),
        (["plan", "--rows", "10", "--epsilon", "1", "--delta", "1"], "delta is 1"),
    ],
)
def test_misuse_is_explained_and_exits_with_2(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["privacy", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert why in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["spend"], ["plan", "--rows", "many"], ["plan", "--surprise"]])
def test_what_cannot_be_parsed_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["privacy", *arguments])
    assert left.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_folder_without_ledgers_says_that_nothing_was_trained_privately(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["privacy", "show", str(tmp_path)]) == 2
    assert "nothing was ever trained privately" in capsys.readouterr().err


def test_an_epsilon_that_no_noise_reaches_is_a_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "plan", "--rows", "10", "--rounds", "100000", "--epsilon", "0.0001"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "plan fewer" in captured.err


@pytest.mark.parametrize("text", [None, "name: [", "part: 1\n"])
def test_a_node_file_that_cannot_be_read_is_named(
    text: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "node.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["privacy", "show", "--node-file", str(file)]) in (1, 2)
    assert str(file) in capsys.readouterr().err


def test_a_node_file_that_is_not_there_is_misuse(tmp_path: Path) -> None:
    assert main(["privacy", "show", "--node-file", str(tmp_path / "node.yaml")]) == 2


@pytest.mark.parametrize("name", ["no/such/folder/plan.png", "plan.sheet"])
def test_a_picture_that_cannot_be_written_is_misuse(name: str, tmp_path: Path) -> None:
    assert main(["privacy", "plan", *PLAN, "--noise", "1.2", "--plot", str(tmp_path / name)]) == 2


@pytest.mark.parametrize("verb", ["show", "plan"])
def test_an_argument_that_would_be_ignored_is_misuse(verb: str, site: Path, run_dir: Path) -> None:
    more = ["--node-file", str(site)] if verb == "show" else [*PLAN, "--noise", "1.2"]
    assert main(["privacy", verb, str(run_dir), *more]) == 2


def test_an_infinite_epsilon_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(word: str) -> None:
        raise ValueError(word)

    assert main(["privacy", "plan", *PLAN, "--noise", "0", "--json"]) in (0, 2)
    out = capsys.readouterr().out
    if out:
        json.loads(out, parse_constant=refuse)
