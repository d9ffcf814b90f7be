"""How results are shown: a console on stdout that cuts nothing when its output is piped, and texts that are only read.

Names, reasons and settings were written by others.  They reach a terminal as plain text: no markup, no control codes.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

PIPE_WIDTH = 200
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def console() -> Console:
    """stdout: the terminal's width, or wide where there is none."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def clean(text: str) -> str:
    """`text` on one line, without control codes and other characters that do not show."""
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else UNPRINTABLE for c in text)


def plain(text: str, style: str = "") -> Text:
    """`text` as it stands: brackets in it are no markup."""
    return Text(clean(text), style=style)
