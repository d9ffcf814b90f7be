"""The raw table: what is declared of its columns, and what is missing in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.readiness.federation import Federation
from experiments.readiness.findings import SCHEMA, ColumnSeen, Finding, each, some
from experiments.readiness.leakage import digests
from experiments.readiness.source import Source
from sectors.base import SPLITS, num_rows
from sectors.schema import Column


def check_schema(f: Federation) -> list[Finding]:
    declared, columns, read = f.sector.schema, f.columns, {}
    for path, source in f.sources.items():
        name = next((node.name for node in f.nodes if node.place.path == path), path.name) if path else ""
        raw, pooled = len(source.units), num_rows(source.pooled.rows)
        width = len(declared) or len(list(source.table))
        read[name] = f"{raw} rows of {source.origin}, {pooled} after pooling, {width} columns"
    notes = []
    if not declared:
        notes.append("no columns are declared, so no unit, range or category is checked: list them in `schema`")
    if free := [c.name for c in declared if not c.range and c.kind == "number" and not c.integer]:
        notes.append(f"{some(free)}: neither range nor categories, so a value in another unit would pass")
    if lacking := [c for c in columns if c.missing]:
        most = max(lacking, key=lambda c: c.missing)
        notes.append(
            f"{len(lacking)} of {len(columns)} columns have missing values, most {most.name} ({most.missing:.0%})"
        )
    absent = {node.name: [c.name for c in columns if c.by_node[i] == 1.0] for i, node in enumerate(f.nodes)}
    return [
        *each(SCHEMA, True, read),
        *(Finding(SCHEMA, None, note) for note in notes),
        *each(SCHEMA, None, {name: f"no value at all of {some(names)}" for name, names in absent.items() if names}),
    ]


def columns_of(f: Federation) -> tuple[ColumnSeen, ...]:
    """Columns as declared, or as found where none are, with what is missing."""
    first = next(iter(f.sources.values()))
    declared = f.sector.schema or tuple(Column(str(name)) for name in first.table)
    absent = {id(s): {c.name: _missing(s.table, c) for c in declared} for s in f.sources.values()}
    homes = {id(s): _raw_rows(f, s, absent[id(s)]) for s in f.sources.values()}
    found = []
    for column in declared:
        by_node: list[float | None] = []
        for i, node in enumerate(f.nodes):
            mask, home = absent[id(node.source)][column.name], homes[id(node.source)]
            here = None if home is None else mask[home == i]
            by_node.append(0.0 if not mask.any() else None if here is None else _share(here))
        everywhere = np.concatenate([masks[column.name] for masks in absent.values()])
        found.append(ColumnSeen(column.name, column.unit, column.range, _share(everywhere), tuple(by_node)))
    return tuple(found)


def _share(mask: npt.NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _missing(table: Any, column: Column) -> npt.NDArray[np.bool_]:
    """(n,) whether a raw row has no value in a column: an empty cell, NaN, or a code for "not measured"."""
    if column.name not in table:
        return np.zeros(0, bool)
    values = np.asarray(table[column.name])
    if values.dtype == object:
        series = pd.Series(values)
        return np.asarray(series.isna() | (series.astype(str).str.strip() == ""))
    empty = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    if column.missing:
        empty |= np.isin(values, column.missing)
    return np.asarray(empty.reshape(len(values), -1).any(axis=1))


def _raw_rows(
    f: Federation, source: Source, absent: Mapping[str, npt.NDArray[np.bool_]]
) -> npt.NDArray[np.int64] | None:
    """(n,) index of the node that has each raw row, -1 for none; None where that cannot be told.

    A row is known by its features: pooling may drop, repeat and reorder rows.
    """
    owners = [i for i, node in enumerate(f.nodes) if node.source is source]
    n = len(source.units)
    if len(owners) == 1 and f.nodes[owners[0]].place.path is not None:
        return np.full(n, owners[0])
    if not any(mask.any() for mask in absent.values()):
        return None
    features = f.sector.features(source.table)
    if num_rows(features) != n:
        return None
    columns = sorted(features.keys() & source.pooled.rows.keys())
    home: dict[bytes, int] = {}
    for i in owners:
        for split in SPLITS:
            home |= dict.fromkeys(digests(f.nodes[i].pooled(split), columns), i)
    return np.array([home.get(row, -1) for row in digests(features, columns)], np.int64)
