"""Nothing is fitted on rows of several owners: units are left out, rows of others replaced, statistics added up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.readiness.federation import Federation, evenly
from experiments.readiness.findings import POOLED, REPEATABLE, SHOWN, STATISTICS, Finding, each, failures, some
from experiments.readiness.leakage import digests
from experiments.readiness.model import TOLERANCE, spec_problems
from experiments.readiness.source import Source
from experiments.readiness.variants import Disturbed, variant
from sectors.base import SPLITS, NodeData, Pooled, Rows, Sector, concatenate, num_rows, take
from trellis.types import Counts

PROBE = 64
"""Units that are enough to see whether features depend on others."""


def check_pooled(f: Federation) -> list[Finding]:
    found = [finding for path, source in f.sources.items() for finding in _pooled_source(source, path)]
    return [*found, *_others(f)]


def _pooled_source(source: Source, path: Path | None) -> list[Finding]:
    """Whether units are pooled alike without the others."""
    ids = pd.unique(source.units)
    if len(ids) < 2:
        said = f"{source.origin} is one unit: nothing can be left out"
        return [Finding(POOLED, None, said, path.name if path else "")]
    halves = [source.pool(chosen) for chosen in (source.half, ~source.half)]
    problems = _moved(source.pooled, halves) or _dependent_features(source, ids)
    if problems:
        return failures(POOLED, (f"{said}: use constants, `statistics` or `localise`" for said in problems))
    said = f"of {len(ids)} units any half gives the same bytes without the others, and so does a unit alone"
    return [Finding(POOLED, True, said)]


def _moved(whole: Pooled, halves: Sequence[Pooled]) -> list[str]:
    """How rows of half the units differ from those of the same units among all; each row with its fixed split."""
    rows, *parts = (Counter(digests(_with_split(pooled))) for pooled in (whole, *halves))
    if other := sum((part - rows).total() for part in parts):
        columns = [f"`{c}`" for c in _with_split(whole) if _column_moved(whole, halves, c)]
        named = f" in {some(columns)}" if columns else ""
        return [f"{other} of {rows.total()} rows change{named} when half of the units are left out"]
    lost = (rows - parts[0] - parts[1]).total()
    return [f"{lost} rows are there only while the other units are"] if lost else []


def _with_split(pooled: Pooled) -> Rows:
    return pooled.rows if pooled.split is None else {**pooled.rows, "split": pooled.split}


def _column_moved(whole: Pooled, halves: Sequence[Pooled], column: str) -> bool:
    values, *parts = (Counter(digests(_with_split(pooled), (column,))) for pooled in (whole, *halves))
    return any((part - values).total() for part in parts)


def _dependent_features(source: Source, ids: npt.NDArray[Any]) -> list[str]:
    """Whether `features` of a unit alone are those it has among some others."""
    chosen = ids[evenly(len(ids), PROBE)]
    among = _features(source, chosen)
    for unit in (chosen[0], chosen[len(chosen) // 2], chosen[-1]):
        if (_features(source, [unit]) - among).total():
            return [f"`features` of unit {unit} alone are not those it has among {len(chosen)} units"]
    return []


def _features(source: Source, ids: Sequence[Any] | npt.NDArray[Any]) -> Counter[bytes]:
    return Counter(digests(source.sector.features(source.sector.select(source.table, np.isin(source.units, ids)))))


def _others(f: Federation) -> list[Finding]:
    """Whether a node's rows stay the same when every row of other nodes is replaced."""
    sharing = [node for node in f.nodes if node.place.path is None]
    if len(sharing) < 2:
        return []
    source, again, changed = sharing[0].source, f.again(), {}
    for turn in (0, 1):  # every second node has other rows, then the others have
        kept, others = sharing[turn::2], sharing[1 - turn :: 2]
        replaced = np.zeros(num_rows(source.pooled.rows), bool)
        for nodes, changes in ((others, True), (kept, False)):
            for node in nodes:
                replaced[np.concatenate(list(node.index.values()))] = changes
        if not replaced.any():
            continue
        disturbed = variant(f.sector, Disturbed, original=source.pooled, replaced=replaced)
        for node in kept:
            # one that loads other rows in every call says nothing of this, and is a finding elsewhere
            if not _same(disturbed.load(node.place), node.data) and _same(again.load(node.place), node.data):
                changed[node.name] = (
                    "its rows change when those of other nodes do: `localise` may see its own rows only"
                )
    said = f"rows of {len(sharing)} nodes stay the same when those of others are replaced"
    return each(POOLED, False, changed) or [Finding(POOLED, True, said)]


def check_repeatable(f: Federation) -> list[Finding]:
    again = f.again()
    other = {n.name: "loads other rows in a second call" for n in f.nodes if not _same(again.load(n.place), n.data)}
    said = "every node loads the same bytes in a second call"
    return each(REPEATABLE, False, other) or [Finding(REPEATABLE, True, said)]


def _same(a: NodeData, b: NodeData) -> bool:
    return all(_bytes(a.split(split)) == _bytes(b.split(split)) for split in SPLITS)


def _bytes(rows: Rows) -> dict[str, tuple[str, bytes]]:
    return {k: (v.dtype.str, v.tobytes()) for k, v in rows.items()}


def check_statistics(f: Federation) -> list[Finding]:
    specs, sector = f.sector.statistic_specs(), f.sector
    if not specs:
        return [Finding(STATISTICS, None, "nothing is fitted: there is no statistics round")]
    rows = [node.data.train for node in f.nodes if num_rows(node.data.train)]
    if not rows:
        return [Finding(STATISTICS, False, "no node has training rows to take statistics of")]
    # a node's rows in two halves, for a federation of one node
    parts = [*(take(rows[0], half) for half in np.array_split(np.arange(num_rows(rows[0])), 2)), *rows[1:]]
    counts = [sector.statistics(part) for part in parts]
    problems = [
        problem
        for part, found in zip(parts, counts, strict=True)
        for problem in spec_problems("statistics", found, specs, num_rows(part))
    ]
    problems = problems or _not_additive(sector.statistics(concatenate(parts)), counts)
    # a node may have no training rows
    problems = problems or spec_problems("statistics", sector.statistics(take(rows[0], np.arange(0))), specs, 0)
    problems = problems or _fit_problems(sector, concatenate(parts))
    if problems:
        return failures(STATISTICS, dict.fromkeys(problems[:SHOWN]))
    names = some([spec.name for spec in specs])
    said = f"{names}: additive over {len(rows)} nodes and within per_row; fit sets {some(sector.fitted_options)}"
    return [Finding(STATISTICS, True, said)]


def _not_additive(whole: Counts, parts: Sequence[Counts]) -> list[str]:
    problems = []
    for name, value in whole.items():
        found, total = np.asarray(value, np.float64), np.sum([np.asarray(p[name], np.float64) for p in parts], axis=0)
        if not np.allclose(total, found, rtol=TOLERANCE, atol=TOLERANCE):
            at = np.abs(total - found).argmax()
            problems.append(
                f"statistics {name} of all rows is {found.flat[at]:.6g}, of its parts together "
                f"{np.asarray(total).flat[at]:.6g}: needed are sums, not means"
            )
    return problems


def _fit_problems(sector: Sector, rows: Rows) -> list[str]:
    options = sector.fit(sector.all_statistics(rows))
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        return [f"`fit` gives what JSON cannot hold ({error}): needed are lists, numbers and texts"]
    if unknown := sorted(set(options) - set(sector.fitted_options)):
        return [f"`fit` sets {some(unknown)}, which `fitted_options` does not list"]
    sector.fitted(options)
    return []
