"""Splits and labels: rows for every purpose, what was set aside kept aside, and more than one class to tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.readiness.federation import Federation, Node
from experiments.readiness.findings import BALANCE, OFFICIAL, QUANTILES, SPLIT, Finding, NodeRows, each, some, span
from sectors.base import SPLITS, TEST, Rows, Sector, num_rows

FEW_ROWS = 10
"""A class with fewer rows at a node is shown, not judged: one row moves its metrics by a tenth."""


def check_splits(f: Federation) -> list[Finding]:
    sizes = {node.name: num_rows(node.data.train) for node in f.nodes if node.trains}
    totals = {split: num_rows(f.split(split)) for split in SPLITS}
    found = []
    if not sizes:
        found.append(Finding(SPLIT, False, "no node trains: every one of them is held out"))
    if starved := [name for name, n in sizes.items() if not n]:
        said = f"{len(starved)} of {len(sizes)} training nodes have no training rows ({some(starved)})"
        found.append(Finding(SPLIT, False, f"{said}: use fewer nodes, or another partition"))
    if not totals["validation"]:
        said = "no node has validation rows: raise validation_fraction, or hold nodes out for validation"
        found.append(Finding(SPLIT, False, said))
    if not totals["test"]:
        found.append(Finding(SPLIT, None, "no node has test rows: no run will be tested"))
    divided = ", ".join(f"{split} {n}" for split, n in totals.items())
    found = found or [Finding(SPLIT, True, f"{divided} rows; training nodes have {span(sizes)}")]
    return [*found, *_unused(f)]


def _unused(f: Federation) -> list[Finding]:
    shared = f.sources.get(None)
    if shared is None:
        return []
    used = {int(i) for node in f.nodes if node.source is shared for index in node.index.values() for i in index}
    left = num_rows(shared.pooled.rows) - len(used)
    whose = "the server's, or of no node's part" if f.sector.server_data == "fraction" else "of no node's part or split"
    return [Finding(SPLIT, None, f"{left} pooled rows are {whose}")] if left else []


def check_official(f: Federation) -> list[Finding]:
    fixed = [source.pooled.split for source in f.sources.values() if source.pooled.split is not None]
    if not any((split >= 0).any() for split in fixed):
        return [Finding(OFFICIAL, None, "no row is set aside by the publisher: every node divides its own")]
    moved = {node.name: said for node in f.nodes if (said := _moved(node))}
    counted = ", ".join(f"{name} {sum((split == i).sum() for split in fixed)}" for i, name in enumerate(SPLITS))
    return each(OFFICIAL, False, moved) or [Finding(OFFICIAL, True, f"kept by every node ({counted} rows)")]


def _moved(node: Node) -> str:
    """How many rows of a node stand in another split than they were set aside for."""
    split, said = node.source.pooled.split, []
    if split is None:
        return ""
    for i, name in enumerate(SPLITS):
        here = split[node.index[name]]
        # where whole nodes are held out, a node has all its rows in the split of its role, but for test rows
        wrong = (here == TEST) & (i != TEST) if node.place.holds_out else (here >= 0) & (here != i)
        if wrong.any():
            said.append(f"{int(wrong.sum())} rows of {name} are set aside for another split")
    return "; ".join(said)


def check_balance(f: Federation) -> list[Finding]:
    if "y" not in f.nodes[0].data.train:
        return [Finding(BALANCE, None, "the rows have no `y`")]
    nodes = [rows_of(f.sector, node) for node in f.nodes]
    return _spread(f, nodes) if f.sector.num_classes is None else _classes(f, nodes)


def _classes(f: Federation, nodes: Sequence[NodeRows]) -> list[Finding]:
    totals = np.sum([node.by_class for node in nodes], axis=0)
    if np.count_nonzero(totals) <= 1:
        return [Finding(BALANCE, False, f"all {totals.sum()} labels are of class {int(totals.argmax())}")]
    alone, few = {}, {}
    for node in nodes:
        counts = np.array(node.by_class)
        if np.count_nonzero(counts) == 1 and node.role == "train" and node.rows["validation"]:
            alone[node.node] = (
                f"all {counts.sum()} labels are of class {int(counts.argmax())}: nothing can be told apart; "
                "use fewer nodes, or another partition"
            )
        elif counts.any() and counts.min() < FEW_ROWS:
            rare = int(counts.argmin())
            where = ", ".join(f"{split} {by[rare]}" for split, by in node.classes.items())
            few[node.node] = f"{counts[rare]} labels of class {rare} ({where}): its own metrics are shown, not judged"
    # how the last class is spread over nodes: of two, the positives
    shares = {node.node: node.by_class[-1] / sum(node.by_class) for node in nodes if sum(node.by_class)}
    counted, last = " / ".join(map(str, totals.tolist()[:10])), len(totals) - 1
    said = f"{counted} labels of {len(totals)} classes; class {last} is {span(shares, '.1%')}"
    failed = [*each(BALANCE, False, alone), *_unnamed(f)]
    return [*(failed or [Finding(BALANCE, True, said)]), *each(BALANCE, None, few)]


def _unnamed(f: Federation) -> list[Finding]:
    """Labels that are none of the classes, where a row has one label."""
    num_classes = f.sector.num_classes or 0
    labels = [y for node in f.nodes if (y := node.column("y")).ndim == 1]
    odd = {value for y in labels for value in y[~np.isin(y, range(num_classes))].tolist()}
    said = f"y holds {some(sorted(odd, key=str))}: needed are the classes 0 to {num_classes - 1}"
    return [Finding(BALANCE, False, said)] if odd else []


def _spread(f: Federation, nodes: Sequence[NodeRows]) -> list[Finding]:
    y = np.concatenate([node.column("y").reshape(-1) for node in f.nodes])
    if len(np.unique(y)) == 1:
        return [Finding(BALANCE, False, f"y is {y[0]:g} in all {len(y)} rows: there is nothing to predict")]
    medians = {node.node: node.quantiles[2] for node in nodes if node.quantiles}
    if not medians:
        return [Finding(BALANCE, None, "y is not one class or number a row: its balance is not shown")]
    said = f"y runs from {y.min():g} to {y.max():g}; its median is {span(medians)}"
    return [Finding(BALANCE, True, said)]


def rows_of(sector: Sector, node: Node) -> NodeRows:
    """A node's rows, counted."""
    data = {split: node.data.split(split) for split in SPLITS}
    classes: dict[str, tuple[int, ...]] = {}
    if sector.num_classes is not None and all("y" in rows for rows in data.values()):
        classes = {split: _by_class(rows["y"], sector.num_classes) for split, rows in data.items()}
    return NodeRows(
        node=node.name,
        role=node.spec.role.value,
        origin=str(node.place.path) if node.place.path else f"{node.place.part} of {node.place.num_parts}",
        rows={split: num_rows(rows) for split, rows in data.items()},
        classes=classes,
        quantiles=() if classes else _quantiles(data),
    )


def _by_class(y: npt.NDArray[Any], num_classes: int) -> tuple[int, ...]:
    """How many labels are of each class; a row may have many (the pixels of a mask)."""
    return tuple(int((y == i).sum()) for i in range(num_classes))


def _quantiles(data: Mapping[str, Rows]) -> tuple[float, ...]:
    values = [rows["y"] for rows in data.values() if "y" in rows and num_rows(rows)]
    if not values or values[0].ndim > 1 or values[0].dtype.kind not in "iuf":
        return ()
    return tuple(float(v) for v in np.quantile(np.concatenate(values).astype(np.float64), QUANTILES))
