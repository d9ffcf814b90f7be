"""What a round says, as points of charts.

A record of round r holds two kinds of values: those of the round itself (step r), and those of the params it sent out,
version r - 1 (step r - 1), because evaluation rides on training.  Pure: no MLflow here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trellis.types import RoundRecord

VERSION_PREFIXES = ("val/", "test/", "test_tuned/")
"""Metrics under these are of a version, all others of a round."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one chart.  `of_version`: it is a metric of the version of round `step`."""

    key: str
    value: float
    step: int
    of_version: bool = False


def clean(key: str) -> str:
    """A key that MLflow takes: letters, digits, `_-. :/`, no empty or dotted path parts, at most 250 characters."""
    parts = [re.sub(r"[^\w\-. :]", "_", part) for part in key.split("/")]
    return "/".join(part for part in parts if part.strip("."))[:250] or "_"


def of_version(record: RoundRecord) -> list[Point]:
    """Metrics of version `round - 1`: the federation's, and how its nodes spread."""
    step = record.round - 1
    points = [Point(clean(k), v, step, of_version=True) for k, v in record.base_metrics.items() if _is_of_version(k)]
    for name in sorted({k for metrics in record.node_metrics.values() for k in metrics if k.startswith("val/")}):
        values = _finite(metrics[name] for metrics in record.node_metrics.values() if name in metrics)
        points += _spread(f"nodes/{name.removeprefix('val/')}", values, step, ("min", "p50", "max"))
    return _sendable(points)


def of_round(record: RoundRecord) -> list[Point]:
    """Everything about the round itself."""
    reasons = Counter(refusal.reason for refusal in record.refusals)
    values: dict[str, float] = {k: v for k, v in record.base_metrics.items() if not _is_of_version(k)}
    values |= {
        "round/num_asked": len(record.asked),
        "round/num_answered": len(record.answered),
        "round/closed": float(record.closed is not None),
        "comm/bytes_up": record.bytes_up,
        "comm/bytes_down": record.bytes_down,
        "comm/stragglers": len(record.stragglers),
        "refusals/total": len(record.refusals),
    }
    values |= {f"refusals/{reason.replace('.', '_')}": count for reason, count in reasons.items()}
    values |= {f"round/seconds_{phase}": seconds for phase, seconds in record.seconds.items()}
    if record.purpose == "train":
        values["update/aggregate_norm"] = record.aggregate_norm
    if record.epsilon:
        values["privacy/epsilon_max"] = max(record.epsilon.values())
    if record.noise_multipliers:
        values["privacy/noise_multiplier_min"] = min(record.noise_multipliers.values())
    values |= record.findings
    points = [Point(clean(named(record, k)), float(v), record.round) for k, v in values.items()]
    points += _spread("comm/node_seconds", _finite(record.node_seconds.values()), record.round, ("p50", "max"))
    points += _spread("update/norm", _finite(record.update_norms.values()), record.round, ("p50", "max"))
    return _sendable(points)


def nodes_of(record: RoundRecord) -> list[str]:
    """Every node the record says something of, sorted."""
    named = {*record.asked, *record.answered, *record.quarantined, *(refusal.node for refusal in record.refusals)}
    return sorted(named.union(record.node_metrics, record.num_examples, record.update_norms, record.epsilon))


def of_node(record: RoundRecord, node: str) -> list[Point]:
    """What the record says of one node."""
    points = [
        Point(clean(k), v, record.round - 1 if _is_of_version(k) else record.round)
        for k, v in record.node_metrics.get(node, {}).items()
    ]
    points += [Point(named(record, k), float(v), record.round) for k, v in _node_values(record, node).items()]
    return _sendable(points)


def node_table(record: RoundRecord) -> dict[str, Any]:
    """The record's per-node values as one JSON value, for federations too large for a child run each."""
    return {
        "round": record.round,
        "purpose": record.purpose,
        "nodes": {n: {**record.node_metrics.get(n, {}), **_node_values(record, n)} for n in nodes_of(record)},
    }


def named(record: RoundRecord, key: str) -> str:
    """The closing evaluation has charts of its own: a lengthened run trains a round with the same number later."""
    return f"closing/{key.replace('/', '_')}" if record.purpose == "evaluate" else key


def _node_values(record: RoundRecord, node: str) -> dict[str, float]:
    known: dict[str, Mapping[str, float]] = {
        "update/norm": record.update_norms,
        "update/weight": record.weights,
        "num_examples": record.num_examples,
        "privacy/epsilon": record.epsilon,
        "privacy/noise_multiplier": record.noise_multipliers,
        "suspicion": record.suspicion,
        "comm/seconds": record.node_seconds,
        "comm/bytes_down": {name: down for name, (down, _) in record.node_bytes.items()},
        "comm/bytes_up": {name: up for name, (_, up) in record.node_bytes.items()},
    }
    values = {key: column[node] for key, column in known.items() if node in column}
    if record.suspicion:  # there is a detector
        values["quarantined"] = float(node in record.quarantined)
    return {**values, "refused": float(any(refusal.node == node for refusal in record.refusals))}


def _is_of_version(key: str) -> bool:
    return key.startswith(VERSION_PREFIXES)


def _finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _spread(key: str, values: list[float], step: int, which: tuple[str, ...]) -> list[Point]:
    if not values:
        return []
    summary = {"min": min(values), "p50": float(np.median(values)), "max": max(values)}
    return [Point(clean(f"{key}_{w}"), float(summary[w]), step) for w in which]


def _sendable(points: list[Point]) -> list[Point]:
    # MLflow keeps NaN but turns an infinity into 1.8e308, which flattens the chart
    return [p for p in points if not math.isinf(p.value)]
