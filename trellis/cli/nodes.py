"""The nodes of a federation, as a configuration describes them.

trellis nodes show                     the pilot
trellis nodes show nodes=consortium
"""

from __future__ import annotations

import argparse
import json

from rich.table import Table

from trellis.cli.show import console, plain

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", choices=["show"])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. nodes=consortium")
    parser.add_argument("--json", action="store_true", help="print a JSON list of all nodes")


def run(arguments: argparse.Namespace) -> int:
    from conf.load import load
    from conf.schema import to_json

    specs = load(arguments.overrides).nodes.expand()
    if arguments.json:
        print(json.dumps([to_json(spec) for spec in specs]))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in (
        "node",
        "organisation",
        "region",
        "part",
        "role",
        "up/down Mbit/s",
        "ms",
        "available",
        "consents to",
    ):
        table.add_column(heading)
    for s in specs[:SHOWN]:
        consent = f"{','.join(s.policy.sectors)}; privacy >= {s.policy.least_privacy}"
        if s.policy.max_examples is not None:
            consent += f"; {s.policy.max_examples} rows"
        speed = f"{s.link.uplink_mbit_s:g}/{s.link.downlink_mbit_s:g}"
        part = s.data_path or f"{s.part} of {len(specs)}"
        cells = (
            s.name, s.organisation, s.region, part, s.role.value, speed,
            f"{s.link.latency_ms:g}", f"{s.link.availability:g}", consent,
        )  # fmt: skip
        table.add_row(*(plain(cell) for cell in cells))
    out = console()
    out.print(table)
    if len(specs) > SHOWN:
        out.print(f"... and {len(specs) - SHOWN} more (--json shows all)")
    return 0
