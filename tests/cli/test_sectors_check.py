"""`trellis sectors check`: exit 0 where a loader passes, 1 where it does not, 2 for misuse."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from experiments import readiness
from trellis.cli import main
from trellis.cli.sectors import _show

HEART = ["sectors", "check", "healthcare_heart", "data=synthetic"]
FOREIGN = "[/x]\x1b[31m\r\u202e"
"""Markup that closes nothing, a colour, a carriage return, and an order to write from right to left."""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which nothing may be left behind."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_loader_that_passes_is_told_with_its_nodes_and_columns(
    capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    assert main([*HEART, "nodes=hospitals"]) == 0
    out = capsys.readouterr().out
    for words in ("pass", "note", "fitted on pooled rows", "leakage", "SYNTHETIC", "0 failed"):
        assert words in out
    assert "FAIL" not in out
    for words in ("cleveland", "validation", "positives", "mm Hg", "50 to 300 mm Hg"):
        assert words in out
    assert "add --report DIR" in out
    assert list(elsewhere.iterdir()) == [], "no files unless asked for"


def test_packaged_rows_are_checked_without_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sectors", "check", "healthcare_wisconsin"]) == 0
    assert "569 rows" in capsys.readouterr().out


def test_data_that_are_not_there_fail_and_say_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    assert main(["sectors", "check", "healthcare_heart"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  schema" in out
    assert "TRELLIS_DATA" in out
    assert "1 failed" in out


def test_a_cheat_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sectors.healthcare_heart import HealthcareHeart

    monkeypatch.setattr(HealthcareHeart, "statistics", lambda self, rows: {"known": 1})
    assert main([*HEART, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["report"]) == (False, None)
    assert {f["check"] for f in found["findings"] if f["passed"] is False} == {readiness.findings.STATISTICS}


def test_machines_get_one_object_and_the_report_is_written_where_it_was_asked_for(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # options may stand between the words
    assert main([*HEART[:-1], "--report", "made/here", HEART[-1], "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(found) >= {"sector", "data", "passed", "findings", "nodes", "columns", "report"}
    assert (found["sector"], found["data"], found["passed"]) == ("healthcare_heart", "synthetic", True)
    assert set(found["findings"][0]) == {"check", "passed", "said", "node"}
    assert [node["node"] for node in found["nodes"]] == ["north", "south", "west"]
    assert set(found["nodes"][0]["rows"]) == {"train", "validation", "test"}

    assert found["report"] == "made/here/report.html"
    made = sorted(path.name for path in (elsewhere / "made" / "here").iterdir())
    assert made == ["labels.png", "missing.png", "report.html", "rows.png", "shift.png"]
    page = (elsewhere / "made" / "here" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "trellis sectors check NAME; the sectors are banks"),
        (["check", "nodes=consortium"], "trellis sectors check NAME"),
        (["check", "bank"], "unknown sector 'bank'; the sectors are banks"),
        (["check", "banks,retail"], "unknown sector"),
        (["check", "banks", "sector=healthcare_heart"], "name one of the two"),
        (["check", "banks", "nodes=everyone"], "choose one of"),
        (["check", "banks", "seed=0,1"], "is several values"),
        (["check", "banks", "sector.options.partition=none"], "no partition 'none'"),
        (["check", "healthcare_wisconsin", "--report", "file"], "--report file cannot be made"),
        (["--report", "somewhere"], "--report needs a sector"),
    ],
)
def test_misuse_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, arguments: list[str], said: str
) -> None:
    (elsewhere / "file").write_text("")
    assert main(["sectors", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_an_unknown_verb_names_the_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sectors", "chek", "banks"])
    assert left.value.code == 2
    assert "check" in capsys.readouterr().err


def test_what_files_hold_is_shown_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    finding = readiness.Finding(f"a{FOREIGN}", False, f"b{FOREIGN}", f"c{FOREIGN}")
    node = readiness.NodeRows(f"d{FOREIGN}", "train", f"e{FOREIGN}", {"train": 1}, {}, ())
    column = readiness.ColumnSeen(f"f{FOREIGN}", f"g{FOREIGN}", f"h{FOREIGN}", 0.5, (None,))
    found = readiness.Readiness(f"i{FOREIGN}", f"j{FOREIGN}", "real", f"k{FOREIGN}", (finding,), (node,), (column,))
    _show(found, Path(f"l{FOREIGN}"))
    out = capsys.readouterr().out
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert all(f"{letter}[/x]" in out for letter in "abcdefghijkl")
