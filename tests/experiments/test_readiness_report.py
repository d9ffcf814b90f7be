"""The report of `trellis sectors check`: one page with its pictures, whatever was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

import sectors
from conf.load import load
from conf.schema import RunConfig
from experiments.readiness import Finding, Readiness, examine, findings, plots, report
from sectors.healthcare_heart import HealthcareHeart

ROWS = 240


def config(sector: str, *overrides: str) -> RunConfig:
    return load([f"sector={sector}", "data=synthetic", *overrides])


@pytest.fixture(scope="module")
def heart() -> Readiness:
    return examine(config("healthcare_heart", "nodes=hospitals"), HealthcareHeart())


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels, which take less time."""
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 40)


def names_of(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_report_holds_its_pictures_and_asks_no_network(heart: Readiness, tmp_path: Path) -> None:
    page = report.write(heart, tmp_path / "made" / "here")
    assert names_of(page.parent) == ["labels.png", "missing.png", "report.html", "rows.png", "shift.png"]
    text = page.read_text()
    assert text.count("src=") == text.count('src="data:image/png;base64,') == 4
    for outside in ("http:", "https:", "url(", "@import", "<script", "<link", "<iframe"):
        assert outside not in text
    for words in ("healthcare_heart", "SYNTHETIC", "switzerland", "mm Hg", "fitted on pooled rows"):
        assert words in text


def test_the_report_of_images_shows_how_bright_they_are(tmp_path: Path) -> None:
    name = "healthcare_pneumonia"
    found = examine(config(name), sectors.get(name, {"synthetic_rows": ROWS}))
    assert found.shift is None
    assert found.brightness is not None
    assert [sum(shares) for shares in found.brightness.by_node] == pytest.approx([1.0] * 3)
    report.write(found, tmp_path)
    assert "intensity.png" in names_of(tmp_path)


def test_the_report_of_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.png").write_bytes(b"")
    said = "<script>alert(1)</script>\x1b[31m is no table"
    nothing = Readiness("a", "b", "real", "pilot", (Finding(findings.SCHEMA, False, said, "<b>"),))
    page = report.write(nothing, tmp_path).read_text()
    assert "not ready" in page
    assert "<script" not in page
    assert "\x1b" not in page
    assert names_of(tmp_path) == ["report.html"], "pictures of an earlier report are gone"


def test_the_report_of_a_thousand_nodes_can_be_drawn(heart: Readiness, tmp_path: Path) -> None:
    assert heart.shift is not None
    many = [dataclasses.replace(heart.nodes[i % 4], node=f"n{i}") for i in range(1000)]
    shift = dataclasses.replace(heart.shift, by_node=heart.shift.by_node * 250)
    columns = tuple(dataclasses.replace(c, by_node=c.by_node * 250) for c in heart.columns)
    found = dataclasses.replace(heart, nodes=tuple(many), shift=shift, columns=columns)
    report.write(found, tmp_path)
    assert len(names_of(tmp_path)) == 5
