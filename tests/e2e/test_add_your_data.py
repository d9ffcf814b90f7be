"""docs/add-your-data.md, followed literally: its files are written where it says, its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-your-data.md").read_text()
PACKAGES = ("conf", "trellis", "sectors", "strategies", "clients", "server", "experiments", "tests/contracts")
TRELLIS = [sys.executable, "-c", "import sys; from trellis.cli import main; sys.exit(main())"]


def written() -> dict[str, str]:
    """Blocks that begin with the name of their file."""
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", PAGE, re.DOTALL)
    return dict(blocks)


def commands() -> list[str]:
    return [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what the page adds."""
    place = tmp_path_factory.mktemp("user")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    files = written()
    row = files.pop("tests/contracts/test_sectors.py")
    exam = place / "tests" / "contracts" / "test_sectors.py"
    exam.write_text(exam.read_text().replace("CASES = [\n", f"CASES = [\n    {row.strip()},\n", 1))
    for name, text in files.items():
        (place / name).write_text(text)
    run(place, [sys.executable, "make_loans.py"])
    return place


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRELLIS_DATA": str(place / "data")}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def test_the_page_names_every_file_it_promises() -> None:
    assert set(written()) == {
        "make_loans.py", "sectors/loans.py", "conf/sector/loans.yaml", "tests/contracts/test_sectors.py",
    }  # fmt: skip
    assert len(commands()) == 3


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_page_succeeds(place: Path, command: str) -> None:
    program, *arguments = command.split()
    if program == "trellis":
        said = run(place, [*TRELLIS, *arguments]).stdout
        assert "north" in said
        assert "south" in said
    else:
        said = run(place, [sys.executable, *arguments, "-p", "no:cacheprovider"]).stdout
        assert re.search(r"\d{2} passed", said)


def test_a_column_in_another_unit_is_found_and_named(place: Path) -> None:
    path = place / "data" / "loans" / "loans.csv"
    kept = path.read_text()
    try:
        lines = kept.splitlines()
        cells = lines[7].split(",")
        cells[2] = "4100"  # an age in weeks
        path.write_text("\n".join([*lines[:7], ",".join(cells), *lines[8:]]) + "\n")
        environment = {**os.environ, "TRELLIS_DATA": str(place / "data")}
        command = [*TRELLIS, "simulate", "sector=loans", "nodes=pilot", "tracking=none"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(kept)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "loans.csv holds values outside 16 to 120 years in column age (1 of 1500 rows, first row 7: 4100)" in said
