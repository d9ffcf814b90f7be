"""Runs side by side: how each was configured where they differ, and what it came to.

trellis compare                        every finished run under runs/
trellis compare RUN RUN                by name
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from trellis.cli.show import clean, console, plain
from trellis.errors import ResumeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs; none: all that have ended")
    parser.add_argument("--runs-dir", default="runs", help="where the run folders are (default: runs)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.runs_dir)
    ended = sorted(path.parent.name for path in folder.glob("*/result.json"))
    unknown = [name for name in arguments.runs if name not in ended]
    if unknown:
        raise ResumeError(
            f"no finished run {', '.join(unknown)} under {folder}; there are: {', '.join(ended) or 'none'}"
        )
    rows = [_read(folder / name) for name in arguments.runs or ended]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print(f"no finished run under {clean(str(folder))}: start one with `trellis simulate`")
        return 0
    console().print(_table(rows))
    return 0


def _table(rows: list[dict[str, Any]]) -> Table:
    """A column a run: what it came to, then the settings in which the runs differ."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for row in rows:
        table.add_column(plain(row["run_name"]), overflow="fold")
    outcome: dict[str, Callable[[dict[str, Any]], str]] = {
        "sector": lambda r: str(r["sector"]),
        "data": lambda r: str(r["data_source"]),
        "primary": lambda r: _metric(r["primary_metric"]),
        "best on validation": lambda r: f"{r['best']['value']:.4f} in round {r['best']['round']}" if r["best"] else "-",
        "rounds": lambda r: str(r["rounds"]),
        "refused": lambda r: str(len(r["refusals"])),
        "seconds": lambda r: f"{r['seconds']:.1f}",
        "model": lambda r: str(r["model_digest"])[:12],
    }
    for heading, show in outcome.items():
        table.add_row(heading, *(plain(show(row)) for row in rows))
    keys = sorted({key for row in rows for key in row["config"]} - {"sector.name", "data", "rounds", "sector.rounds"})
    for key in keys:
        if len({json.dumps(row["config"].get(key)) for row in rows}) > 1:
            table.add_row(plain(key), *(plain(str(row["config"].get(key, "-"))) for row in rows))
    return table


def _metric(metric: dict[str, Any]) -> str:
    value = "-" if metric["value"] is None else f"{metric['value']:.4f}"
    return f"{metric['split']} {metric['name']} {value}"


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "result.json").read_bytes())
    config = json.loads((path / "config.json").read_bytes())["config"]
    return {**result, "config": _flat({k: v for k, v in config.items() if k not in ("run_name", "runs_dir", "resume")})}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
