"""The tasks: what they predict, their primary metric, their data, their recipe."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from trellis.cli.show import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(arguments: argparse.Namespace) -> int:
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
                "rounds": config.rounds,
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("sector", "task", "primary", "rounds", "data (under $TRELLIS_DATA)"):
        table.add_column(heading)
    for row in rows:
        files = " or ".join(row["data_files"]) or "inside scikit-learn"
        table.add_row(row["name"], row["title"], row["primary_metric"]["name"], str(row["rounds"]), files)
    console().print(table)
    return 0
