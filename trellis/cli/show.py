"""How results are shown: a console on stdout that cuts nothing when its output is piped."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 200


def console() -> Console:
    """stdout: the terminal's width, or wide where there is none."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
