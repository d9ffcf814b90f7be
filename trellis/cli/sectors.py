"""The tasks: what they predict, their primary metric, their data, their recipe; and whether a loader is honest.

trellis sectors                                       every task
trellis sectors check healthcare_heart                its loader and data, on the nodes of the pilot
trellis sectors check banks nodes=consortium data=synthetic
trellis sectors check banks --report DIR              a report with plots as well

A check passes or fails (exit 1); a note is for you to judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from trellis.cli.show import console, plain
from trellis.errors import ConfigError

if TYPE_CHECKING:
    from experiments.readiness import NodeRows, Readiness

SHOWN_NODES = 20
WORDS = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("note", "dim")}
COLUMN_NODES = 8
"""Nodes whose missing values stand beside each column."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", nargs="?", choices=["check"], help="check: examine a sector's loader and data")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the sector to check")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. nodes=consortium")
    parser.add_argument("--report", metavar="DIR", type=Path, help="check: write report.html and its plots to DIR")
    parser.add_argument("--json", action="store_true", help="print a JSON list; of a check one object")
    # options may stand between the words, e.g. `check banks --report DIR nodes=consortium`
    parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "check":
        return _check(arguments.name, arguments.overrides, arguments.report, as_json=arguments.json)
    if arguments.report is not None:
        raise ConfigError("--report needs a sector: trellis sectors check NAME --report DIR")
    return _list(as_json=arguments.json)


def _list(*, as_json: bool) -> int:
    import sectors
    from conf.load import load

    rows: list[dict[str, Any]] = []
    for name in sectors.names():
        config = load([f"sector={name}"])
        sector = sectors.get(name, config.sector.options)
        rows.append(
            {
                "name": name,
                "title": sector.title,
                "primary_metric": {"name": sector.primary.name, "direction": sector.primary.direction},
                "data_files": list(sector.data_files),
                "needs_all_files": sector.needs_all_files,
                "rounds": config.rounds,
            }
        )
    if as_json:
        print(json.dumps(rows))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("sector", "task", "primary", "rounds", "data (under $TRELLIS_DATA)"):
        table.add_column(heading)
    for row in rows:
        files = (" and " if row["needs_all_files"] else " or ").join(row["data_files"]) or "inside scikit-learn"
        table.add_row(row["name"], row["title"], row["primary_metric"]["name"], str(row["rounds"]), files)
    console().print(table)
    return 0


# ---------------------------------------------------------------- check


def _check(name: str | None, overrides: list[str], report: Path | None, *, as_json: bool) -> int:
    from conf.load import load
    from experiments.readiness import examine
    from server.build import build_sector

    config = load([f"sector={_sector(name, overrides)}", *overrides])
    sector = build_sector(config)
    if report is not None:
        _make(report)
    with Console(stderr=True).status("") as status:
        readiness = examine(config, sector, on_check=lambda check: status.update(f"{sector.name}: {check}"))
    written = None if report is None else _write(readiness, report)
    if as_json:
        print(json.dumps(_json(readiness, written)))
    else:
        _show(readiness, written)
    return 0 if readiness.passed else 1


def _sector(name: str | None, overrides: list[str]) -> str:
    """The sector to check.  Raises ConfigError where there is none, or there are two."""
    import sectors

    if name is None or "=" in name:
        raise ConfigError(f"name a sector: trellis sectors check NAME; the sectors are {', '.join(sectors.names())}")
    if name not in sectors.names():
        raise ConfigError(f"unknown sector {name!r}; the sectors are {', '.join(sectors.names())}")
    if again := next((o for o in overrides if o.strip().startswith("sector=")), None):
        raise ConfigError(f"{again} beside the sector {name}: name one of the two")
    return name


def _make(folder: Path) -> None:
    """The folder of the report, before anything is examined for it.  Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report {folder} cannot be made: {error.strerror or error}; name a folder") from error


def _write(readiness: Readiness, folder: Path) -> Path:
    from experiments.readiness.report import write

    try:
        return write(readiness, folder)
    except OSError as error:
        raise ConfigError(f"no report can be written to {folder}: {error.strerror or error}") from error


def _json(readiness: Readiness, written: Path | None) -> dict[str, Any]:
    return {
        **dataclasses.asdict(readiness),
        "passed": readiness.passed,
        "report": None if written is None else str(written),
    }


def _show(readiness: Readiness, written: Path | None) -> None:
    out = console()
    made = " (SYNTHETIC)" if readiness.data == "synthetic" else ""
    out.print(plain(f"{readiness.sector}{made}: {readiness.title}; nodes={readiness.federation}", "bold"), "")
    findings = _table("", "check", "node", "what was found")
    for finding in readiness.findings:
        word, style = WORDS[finding.passed]
        findings.add_row(plain(word, style), plain(finding.check), plain(finding.node), plain(finding.said))
    out.print(findings, "")
    if readiness.nodes:
        out.print(_nodes(readiness), "")
        if len(readiness.nodes) > SHOWN_NODES:
            out.print(f"... and {len(readiness.nodes) - SHOWN_NODES} nodes more (--json shows all)\n")
    if readiness.columns:
        out.print(_columns(readiness), "")
    failed = sum(finding.passed is False for finding in readiness.findings)
    passed = sum(finding.passed is True for finding in readiness.findings)
    out.print(plain(f"{passed} passed, {failed} failed, {len(readiness.findings) - passed - failed} notes"))
    if written is None:
        out.print(plain("a report with plots: add --report DIR"))
    else:
        out.print(plain(f"report {written}"))


def _table(*headings: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(plain(heading))
    for heading in numbers:
        table.add_column(plain(heading), justify="right")
    return table


def _nodes(readiness: Readiness) -> Table:
    """Rows of each node by split; of two classes the positives, of more the labels of each, of numbers quartiles."""
    from experiments.readiness import QUANTILES

    classes = next((len(node.by_class) for node in readiness.nodes if node.classes), 0)
    if classes == 2:
        labels: tuple[str, ...] = ("positives", "share")
    elif classes:
        labels = tuple(f"class {i}" for i in range(classes))
    else:
        labels = tuple(f"y at {q:.0%}" for q in QUANTILES) if any(n.quantiles for n in readiness.nodes) else ()
    splits = tuple(readiness.nodes[0].rows)
    table = _table("node", "role", "rows are", numbers=(*splits, *labels))
    for node in readiness.nodes[:SHOWN_NODES]:
        counts = (str(n) for n in node.rows.values())
        table.add_row(plain(node.node), node.role, plain(node.origin), *counts, *_told(node))
    return table


def _told(node: NodeRows) -> list[str]:
    if len(node.by_class) == 2:
        positives, total = node.by_class[1], sum(node.by_class)
        return [str(positives), f"{positives / total:.1%}" if total else ""]
    return [str(n) for n in node.by_class] or [f"{q:g}" for q in node.quantiles]


def _columns(readiness: Readiness) -> Table:
    """Units and ranges as declared, and what is missing; by node where there is room."""
    by_node = len(readiness.nodes) <= COLUMN_NODES and any(c.missing for c in readiness.columns)
    names = tuple(node.node for node in readiness.nodes) if by_node else ()
    table = _table("column", "unit", "must be", numbers=("missing", *names))
    for column in readiness.columns:
        shares = [column.missing, *(column.by_node if by_node else ())]
        told = ["?" if share is None else f"{share:.1%}" if share else "" for share in shares]
        table.add_row(plain(column.name), plain(column.unit), plain(column.needed), *told)
    return table
