"""Deliver the records of runs that their tracking server has not received yet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trellis.cli.show import clean
from trellis.errors import ResumeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or names under --runs-dir")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--uri", default=None, help="another tracking server than the run was started with")


def run(arguments: argparse.Namespace) -> int:
    from server.folder import RunFolder
    from server.tracking import sync

    complete = True
    for name in arguments.runs:
        path = Path(name) if Path(name).is_dir() else Path(arguments.runs_dir) / name
        if not (path / "config.json").exists():
            raise ResumeError(f"{path} is not a run folder")
        delivery = sync(RunFolder(path), uri=arguments.uri)
        complete = complete and delivery.complete
        told = f"{path.name}: {delivery.delivered} records delivered, {delivery.pending} pending, {delivery.uri}"
        print(clean(told))
        if delivery.error:
            print(clean(f"trellis: {path.name}: {delivery.error}"), file=sys.stderr)
    return 0 if complete else 1
