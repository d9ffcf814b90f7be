"""A data-readiness report: one HTML file that opens anywhere, and its plots as PNGs beside it.

What is shown follows from a `Readiness` alone.  The file holds its pictures and styles itself and asks no network.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import matplotlib as mpl

from experiments.readiness.findings import QUANTILES, Finding, Readiness
from experiments.readiness.plots import PLOTS, STYLE
from sectors.base import SPLITS

FILE = "report.html"
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
WORDS = {True: "pass", False: "FAIL", None: "note"}

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { color: #52606d; margin: .2rem 0 1rem; }
.verdict { display: inline-block; padding: .3rem .8rem; border-radius: 1rem; font-weight: 600; color: #fff; }
.ready { background: #007a5a; } .unready { background: #b93a0c; } .made { background: #8a5a00; margin-left: .5rem; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid #e4e7eb; border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
th { background: #f0f4f8; white-space: nowrap; } tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
.pass { color: #007a5a; font-weight: 600; } .FAIL { color: #b93a0c; font-weight: 700; } .note { color: #7b8794; }
tr.failed { background: #fff3ee; }
figure { margin: 0 0 1.4rem; background: #fff; border: 1px solid #e4e7eb; border-radius: .5rem; padding: 1rem; }
figure img { max-width: 100%; height: auto; display: block; } figcaption { color: #52606d; font-size: .9rem; }
"""


def write(readiness: Readiness, folder: Path) -> Path:
    """`report.html` and a PNG a plot in `folder`, which is made.  -> the report"""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (text, draw) in PLOTS.items():
        with mpl.rc_context(STYLE):
            figure = draw(readiness)
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        png = io.BytesIO()
        figure.savefig(png, format="png", bbox_inches="tight", facecolor="white")
        path.write_bytes(png.getvalue())
        pictures[name] = (text, base64.b64encode(png.getvalue()).decode())
    report = folder / FILE
    report.write_text(_page(readiness, pictures), encoding="utf-8")
    return report


def _page(readiness: Readiness, pictures: dict[str, tuple[str, str]]) -> str:
    """The whole file: HTML with its styles and pictures inside."""
    verdict = ("ready", "ready") if readiness.passed else ("unready", "not ready")
    made = '<span class="verdict made">SYNTHETIC data</span>' if readiness.data == "synthetic" else ""
    counted = [sum(f.passed is which for f in readiness.findings) for which in (True, False, None)]
    parts = [
        f"<h1>{_text(readiness.sector)}: are the data ready?</h1>",
        f'<p class="lead">{_text(readiness.title)}<br>{len(readiness.nodes)} nodes of '
        f"{_text(readiness.federation)}, {_text(readiness.data)} data</p>",
        f'<p><span class="verdict {verdict[0]}">{verdict[1]}</span>{made} '
        f"&nbsp;{counted[0]} passed, {counted[1]} failed, {counted[2]} notes</p>",
        "<h2>Findings</h2>",
        _findings(readiness.findings),
        "<h2>Nodes</h2>",
        _nodes(readiness),
    ]
    figures = [
        f'<figure><img alt="{_text(name)} by node" src="data:image/png;base64,{png}">'
        f"<figcaption>{_text(text)}</figcaption></figure>"
        for name, (text, png) in pictures.items()
    ]
    nothing = "" if "missing" in pictures or not readiness.columns else f"<p>{_none_missing(readiness)}</p>"
    parts += ["<h2>Plots</h2>", *figures, nothing] if figures else []
    parts += ["<h2>Columns of the raw table</h2>", _columns(readiness)] if readiness.columns else []
    title = f"{_text(readiness.sector)}: data readiness"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _none_missing(readiness: Readiness) -> str:
    if any(c.missing for c in readiness.columns):
        return "Values are missing, but the loader does not say whose a raw row is: see the columns below."
    return "No value is missing in any column."


def _findings(findings: tuple[Finding, ...]) -> str:
    rows = []
    for finding in findings:
        word = WORDS[finding.passed]
        failed = ' class="failed"' if finding.passed is False else ""
        cells = f'<td class="{word}">{word}</td><td class="name">{_text(finding.check)}</td>'
        rows.append(f"<tr{failed}>{cells}<td>{_text(finding.node)}</td><td>{_text(finding.said)}</td></tr>")
    return _table(["", "check", "node", "what was found"], rows)


def _nodes(readiness: Readiness) -> str:
    if not readiness.nodes:
        return "<p>No node's rows could be loaded.</p>"
    labelled = next((len(n.by_class) for n in readiness.nodes if n.classes), 0)
    numbers = [f"class {i}" for i in range(labelled)] or [f"y at {q:.0%}" for q in QUANTILES]
    rows = []
    for node in readiness.nodes:
        told = [f"{n:,}" for n in node.by_class] or [f"{q:g}" for q in node.quantiles] or [""] * len(numbers)
        figures = [*(f"{node.rows[split]:,}" for split in SPLITS), *told]
        cells = "".join(f"<td>{_text(text)}</td>" for text in (node.node, node.role, node.origin))
        rows.append(f"<tr>{cells}{''.join(f'<td class=number>{v}</td>' for v in figures)}</tr>")
    return _table(["node", "role", "rows are"], rows, [*SPLITS, *numbers])


def _columns(readiness: Readiness) -> str:
    rows = []
    for column in readiness.columns:
        cells = "".join(f"<td>{_text(text)}</td>" for text in (column.name, column.unit or "–", column.needed or "–"))
        rows.append(f"<tr>{cells}<td class=number>{column.missing:.1%}</td></tr>")
    return _table(["column", "unit", "must be"], rows, ["missing"])


def _table(heads: list[str], rows: list[str], numbers: list[str] | None = None) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    head += "".join(f"<th class=number>{_text(h)}</th>" for h in numbers or [])
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _text(text: str) -> str:
    """A text that was written by others, as HTML that only shows it."""
    return escape("".join(c if c.isprintable() else " " if c in "\t\n\r" else UNPRINTABLE for c in text))
