"""Plots of a data-readiness report: each draws a `Readiness`, or nothing where there is nothing to see.

Colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from experiments.readiness.findings import NodeRows, Readiness
from sectors.base import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C")
CLASS_COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#0072B2", "#E69F00", "#8C8C8C")
"""Other than those of the splits where there are two."""
INK, FAINT = "#1f2933", "#9aa5b1"

MOST_NAMED = 40
"""Nodes that still have a name of their own beside a bar; more are drawn by their place."""
MOST_WRITTEN = 400
"""Cells of a heat map that still have room for their numbers."""
MOST_INPUTS = 40
"""Inputs of a heat map: those that differ most."""
MOST_LINES = 8
"""Histograms in one picture; more nodes are rows of a heat map."""
SHIFT_LIMIT = 2.0
"""Standard deviations at the ends of the colours."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def _rows(readiness: Readiness) -> Figure | None:
    """Rows of each node, stacked by split."""
    if not readiness.nodes:
        return None
    figure, axes = _bars(readiness.nodes)
    counts = _sorted(np.array([[node.rows[split] for split in SPLITS] for node in readiness.nodes]))
    _stack(axes, counts, SPLITS, COLOURS)
    if len(readiness.nodes) <= MOST_NAMED:
        _beside(axes, counts.sum(axis=1), [f"{n:,}" for n in counts.sum(axis=1)])
    axes.set(xlabel="rows", title="Rows by node and split")
    return figure


def _labels(readiness: Readiness) -> Figure | None:
    """Shares of the classes at each node; of numbers their quartiles."""
    nodes = [node for node in readiness.nodes if node.total and (sum(node.by_class) or node.quantiles)]
    if not nodes:
        return None
    if not nodes[0].classes:
        return _spread(nodes)
    figure, axes = _bars(nodes)
    counts = np.array([node.by_class for node in nodes], np.float64)
    shares = _sorted(counts / counts.sum(axis=1, keepdims=True))
    names = ["negative (0)", "positive (1)"] if counts.shape[1] == 2 else [f"class {i}" for i in range(counts.shape[1])]
    _stack(axes, shares, names, CLASS_COLOURS)
    if len(nodes) <= MOST_NAMED:
        told = [" / ".join(f"{int(n):,}" for n in row) if len(row) <= 4 else f"{int(row.sum()):,}" for row in counts]
        _beside(axes, np.ones(len(nodes)), told)
    whole = counts.sum(axis=0) / counts.sum()
    if len(whole) == 2:
        axes.axvline(whole[0], color=INK, linewidth=1, linestyle="--")
    axes.set(xlabel="share of labels (dashed: of all nodes together)" if len(whole) == 2 else "share of labels")
    axes.set(title="Label balance by node", xlim=(0, 1))
    return figure


def _spread(nodes: list[NodeRows]) -> Figure:
    figure, axes = _bars(nodes)
    quantiles = np.array([node.quantiles for node in nodes])
    quantiles = quantiles if len(nodes) <= MOST_NAMED else quantiles[np.argsort(quantiles[:, 2])]
    place = np.arange(len(nodes))
    axes.hlines(place, quantiles[:, 0], quantiles[:, -1], color=FAINT, linewidth=1.5, label="least to most")
    thick = max(2.0, min(9.0, 260 / len(nodes)))
    axes.hlines(place, quantiles[:, 1], quantiles[:, 3], color=COLOURS[0], linewidth=thick, label="middle half")
    axes.plot(quantiles[:, 2], place, "o", color="white", markeredgecolor=INK, markersize=5, label="median")
    _legend(axes, 3)
    axes.set(xlabel="y", title="Label balance by node")
    return figure


def _missing(readiness: Readiness) -> Figure | None:
    """Share of missing values, node by column; columns that miss none are left out."""
    columns = [c for c in readiness.columns if c.missing and all(share is not None for share in c.by_node)]
    if not columns or not readiness.nodes:
        return None
    shares = np.array([c.by_node for c in columns], np.float64).T
    figure, axes = _grid([n.node for n in readiness.nodes], [c.name for c in columns])
    picture = axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    _write_cells(axes, shares, [[_percent(v) for v in row] for row in shares], dark=0.6)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02, format=lambda v, _: f"{v:.0%}")
    bar.outline.set_visible(False)
    if left_out := len(readiness.columns) - len(columns):
        axes.set_xlabel(f"{left_out} columns that miss no value are not shown")
    axes.set_title("Missing values by node and column")
    return figure


def _percent(share: float) -> str:
    return "" if not share else f"{share:.0%}" if share >= 0.005 else "<1%"


def _shift(readiness: Readiness) -> Figure | None:
    """How far each node's inputs lie from those of the others."""
    if readiness.shift is None:
        return None
    values = np.array(readiness.shift.by_node)
    most = np.sort(np.argsort(-np.abs(values).max(axis=0), kind="stable")[:MOST_INPUTS])
    figure, axes = _grid([n.node for n in readiness.nodes], [readiness.shift.names[i] for i in most])
    shown = values[:, most]
    picture = axes.imshow(shown, cmap="RdBu_r", vmin=-SHIFT_LIMIT, vmax=SHIFT_LIMIT, aspect="auto")
    _write_cells(axes, np.abs(shown) / SHIFT_LIMIT, [[f"{v:.1f}" if abs(v) >= 0.05 else "" for v in r] for r in shown])
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02, extend="both")
    bar.outline.set_visible(False)
    bar.set_label("standard deviations")
    named = f", the {len(most)} inputs that differ most" if len(most) < values.shape[1] else ""
    axes.set_title(f"Feature shift: mean of a node less that of the others{named}")
    return figure


def _brightness(readiness: Readiness) -> Figure | None:
    """Histograms of the mean intensity of images."""
    if readiness.brightness is None:
        return None
    edges, shares = np.array(readiness.brightness.edges), np.array(readiness.brightness.by_node)
    if len(shares) > MOST_LINES:
        figure, axes = _bars(readiness.nodes)
        if len(shares) > MOST_NAMED:
            shares = shares[np.argsort(shares @ edges[1:], kind="stable")]
        ends = (edges[0], edges[-1], len(shares) - 0.5, -0.5)
        axes.imshow(shares, cmap="Blues", aspect="auto", extent=ends, interpolation="nearest")
    else:
        figure = Figure(figsize=(8, 3.6))
        axes = figure.add_subplot()
        for node, row, colour in zip(readiness.nodes, shares, COLOURS, strict=False):
            axes.stairs(row, edges, color=colour, linewidth=1.8, label=node.node)
            axes.stairs(row, edges, color=colour, alpha=0.12, fill=True)
        axes.set_ylabel("share of the node's images")
        axes.legend(loc="upper right", frameon=False)
    axes.set(xlabel="mean intensity of an image", title="Feature shift: mean intensity of images by node")
    return figure


PLOTS: dict[str, tuple[str, Callable[[Readiness], Figure | None]]] = {
    "rows": ("How many rows each node trains, validates and tests on.", _rows),
    "labels": ("What the labels of each node are, in all its splits together.", _labels),
    "missing": ("Values that are missing in the raw table, codes for “not measured” included.", _missing),
    "shift": ("Inputs as the model is given them; 0 is a node like the others, 1 one standard deviation away.", _shift),
    "intensity": ("A scanner that exposes otherwise shows as a hump of its own.", _brightness),
}
"""File name -> what stands under the picture, and who draws it; None where there is nothing to draw."""


def _bars(nodes: list[NodeRows] | tuple[NodeRows, ...]) -> tuple[Figure, Axes]:
    """An empty picture with a line a node, the first on top."""
    n = len(nodes)
    figure = Figure(figsize=(8, 1.3 + (0.32 * n if n <= MOST_NAMED else 5.0)))
    axes = figure.add_subplot()
    if n <= MOST_NAMED:
        axes.set_yticks(range(n), [_short(node.node) for node in nodes])
        axes.tick_params(axis="y", length=0)
    else:
        axes.set_ylabel(f"{n} nodes, sorted")
    axes.set_ylim(n - 0.5, -0.5)
    axes.grid(axis="x", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _sorted(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lines of too many nodes to name by their first number, then the next: a shape, not stripes.  (nodes, names)"""
    return values if len(values) <= MOST_NAMED else values[np.lexsort(-values.T[::-1])]


def _stack(axes: Axes, values: npt.NDArray[Any], names: list[str] | tuple[str, ...], colours: tuple[str, ...]) -> None:
    """Bars that continue one another.  (nodes, names)"""
    n = len(values)
    left = np.zeros(n)
    for i, name in enumerate(names):
        right, colour = left + values[:, i], colours[i % len(colours)]
        if n <= MOST_NAMED:
            axes.barh(range(n), values[:, i], 0.72, left=left, color=colour, label=name)
        else:  # one shape: a thousand bars take seconds
            edges = np.arange(n + 1) - 0.5
            axes.stairs(right, edges, baseline=left, orientation="horizontal", fill=True, color=colour, label=name)
        left = right
    _legend(axes, min(len(names), 5))


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, frameon=False, borderaxespad=0.2)


def _beside(axes: Axes, ends: npt.NDArray[Any], told: list[str]) -> None:
    for i, (end, text) in enumerate(zip(ends, told, strict=True)):
        axes.annotate(text, (float(end), i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _grid(nodes: list[str], columns: list[str]) -> tuple[Figure, Axes]:
    """An empty heat map, a row a node."""
    high = 1.6 + (0.34 * len(nodes) if len(nodes) <= MOST_NAMED else 5.0)
    figure = Figure(figsize=(max(6.0, 2.2 + 0.36 * len(columns)), high))
    axes = figure.add_subplot()
    axes.set_xticks(range(len(columns)), [_short(c) for c in columns], rotation=45, ha="right", rotation_mode="anchor")
    if len(nodes) <= MOST_NAMED:
        axes.set_yticks(range(len(nodes)), [_short(n) for n in nodes])
    else:
        axes.set_ylabel(f"{len(nodes)} nodes, in the order of their names")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _write_cells(axes: Axes, strength: npt.NDArray[np.float64], told: list[list[str]], dark: float = 0.7) -> None:
    """Numbers in the cells, white on the dark ones; none where there are too many to read."""
    if strength.size > MOST_WRITTEN:
        return
    for (i, j), value in np.ndenumerate(strength):
        colour = "white" if value > dark else INK
        axes.text(j, i, told[i][j], ha="center", va="center", fontsize=7, color=colour)


def _short(name: str, most: int = 28) -> str:
    # a dollar would start a formula
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")
