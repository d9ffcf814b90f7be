"""`trellis`: the command line.

Results go to stdout, everything else to stderr; exit 0 yes, 1 no, 2 misuse.  Each command lives in a file of its own
and is imported only when it is called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from trellis.errors import ConfigError, DataError, ResumeError, TrellisError

COMMANDS = {
    "simulate": "train a federation on this machine from a configuration",
    "sectors": "the tasks, their data and metrics",
    "nodes": "the nodes of a federation (`trellis nodes show`)",
    "privacy": "what differential privacy costs, and what was spent",
    "identity": "make or show a node's identity key",
    "compare": "runs side by side",
    "ui": "open the MLflow UI on the recorded runs",
    "sync": "deliver records that a tracking server has not received",
}

# Nothing is downloaded and nothing is reported, whichever engine is asked for.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  -> the exit code"""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv and argv[0] in COMMANDS:
        module = import_module(f"trellis.cli.{argv[0]}")
        command = argparse.ArgumentParser(
            prog=f"trellis {argv[0]}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        return _run(lambda: int(module.run(command.parse_args(argv[1:]))))
    parser.parse_args(argv)  # prints help or the choices, and leaves
    parser.print_help()
    return 2


def _run(command: object) -> int:
    try:
        return command()  # type: ignore[operator, no-any-return]
    except TrellisError as error:
        from trellis.cli.show import clean

        print(f"trellis: {clean(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError | ResumeError) else 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("trellis: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trellis",
        description="Train one model together; every record stays where it was made.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Try:  trellis simulate sector=banks nodes=consortium rounds=5",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=False)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser
