"""What is written down of a round: replies -> metrics of the base -> `RoundRecord`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trellis.types import (
    Aggregated,
    Best,
    Collected,
    Counts,
    MetricSpec,
    NodeInfo,
    Request,
    RoundRecord,
    Row,
    ServerState,
    Update,
)
from trellis.vectors import digest, norm

SPLIT_PREFIX = {"validation": "val", "test": "test", "test_tuned": "test_tuned"}

STRAGGLER_FACTOR = 2.0
"""A node that takes this many times the median of its round made the others wait."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How additive counts become metrics, and which of them decides."""

    metrics: Callable[[Counts], Mapping[str, float]]
    primary: MetricSpec


def record(
    request: Request,
    before: ServerState,
    after: ServerState,
    cohort: Sequence[NodeInfo],
    collected: Collected,
    judged: Collected | None,
    scoring: Scoring | None,
    started_at: float,
) -> RoundRecord:
    """The round's record, but for what aggregation adds.  `judged` is what held-out nodes replied."""
    updates = (*collected.updates, *(judged.updates if judged else ()))
    refusals = (*collected.refusals, *(judged.refusals if judged else ()))
    asked = (
        {n.name for n in cohort} | {u.node for u in updates} | {r.node for r in refusals if r.reason != "unknown_node"}
    )
    norms = {u.node: u.norm for u in collected.updates}
    return RoundRecord(
        run=before.run,
        round=request.round,
        purpose=request.purpose,
        started_at=started_at,
        base_digest=request.base,
        digest=digest(after.params),
        asked=tuple(sorted(asked)),
        answered=tuple(sorted(u.node for u in updates)),
        refusals=refusals,
        base_metrics={**mean_metrics(collected.updates), **score(scoring, updates)},
        node_metrics={u.node: {**u.metrics, **score(scoring, [u])} for u in updates},
        num_examples={u.node: u.num_examples for u in updates},
        update_norms={row.members[0]: _norm(row, norms) for row in collected.rows if len(row.members) == 1},
        bytes_up=collected.bytes_up + (judged.bytes_up if judged else 0),
        bytes_down=collected.bytes_down + (judged.bytes_down if judged else 0),
        node_bytes={**(judged.node_bytes if judged else {}), **collected.node_bytes},
        node_seconds={**(judged.node_seconds if judged else {}), **collected.node_seconds},
        stragglers=stragglers(collected),
    )


def stragglers(collected: Collected) -> tuple[str, ...]:
    """Nodes a round waited for: those without a reply at the deadline, and those far slower than most."""
    late = {refusal.node for refusal in collected.refusals if refusal.reason == "late"}
    taken = {update.node: collected.node_seconds.get(update.node, 0.0) for update in collected.updates}
    slow = STRAGGLER_FACTOR * float(np.median(list(taken.values()))) if taken else 0.0
    return tuple(sorted(late | {node for node, seconds in taken.items() if seconds > slow > 0}))


def _norm(row: Row, measured: Mapping[str, float | None]) -> float:
    known = measured.get(row.members[0])
    return norm(row.update_d) if known is None else known


def score(scoring: Scoring | None, updates: Sequence[Update]) -> dict[str, float]:
    """Metrics of the base from the sum of the nodes' counts: exact over all their rows."""
    if scoring is None:
        return {}
    scores: dict[str, float] = {}
    for split, prefix in SPLIT_PREFIX.items():
        many = [u.counts[split] for u in updates if split in u.counts]
        if many and sum(int(c["rows"]) for c in many):
            totals = {k: sum((c[k] for c in many[1:]), start=many[0][k]) for k in many[0]}
            scores.update({f"{prefix}/{k}": v for k, v in scoring.metrics(totals).items()})
    return scores


def best(scoring: Scoring | None, state: ServerState, found: RoundRecord) -> Best | None:
    """The base of this round may be the best version so far: by validation rows, never by training loss."""
    if scoring is None:
        return state.best
    value = found.base_metrics.get(f"val/{scoring.primary.name}")
    if value is None or (state.best and not scoring.primary.better(value, state.best.value)):
        return state.best
    return Best(found.round - 1, found.base_digest, value)


def weights(collected: Collected, aggregated: Aggregated | None) -> dict[str, float]:
    """How much each row counted, by its members' names."""
    if aggregated is None or aggregated.weights_n is None or len(aggregated.weights_n) != len(collected.rows):
        return {}
    pairs = zip(collected.rows, aggregated.weights_n, strict=True)
    return {"+".join(row.members): float(w) for row, w in pairs}


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Unweighted mean, over the updates that have it, of each metric that more than half of them have."""
    reported = Counter(k for u in updates for k in u.metrics)
    common = sorted(k for k, times in reported.items() if 2 * times > len(updates))
    return {k: float(np.mean([u.metrics[k] for u in updates if k in u.metrics])) for k in common}


def finite_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and np.isfinite(v)}
