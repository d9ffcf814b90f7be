"""What is written down of a round: replies -> metrics of the base -> `RoundRecord`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
from trellis.wire import EPSILON, NOISE, TOLD

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
    clear = collected.groups is None
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
        base_metrics={**_means(collected), **score(scoring, counted(collected, judged))},
        node_metrics={u.node: {**_own(u.metrics), **score(scoring, [u])} for u in updates} if clear else {},
        epsilon={u.node: u.metrics[EPSILON] for u in updates if EPSILON in u.metrics},
        noise_multipliers={u.node: u.metrics[NOISE] for u in updates if NOISE in u.metrics},
        num_examples={u.node: u.num_examples for u in updates} if clear else {},
        update_norms={row.members[0]: _norm(row, norms) for row in collected.rows} if clear else {},
        bytes_up=collected.bytes_up + (judged.bytes_up if judged else 0),
        bytes_down=collected.bytes_down + (judged.bytes_down if judged else 0),
        node_bytes={**(judged.node_bytes if judged else {}), **collected.node_bytes},
        node_seconds={**(judged.node_seconds if judged else {}), **collected.node_seconds},
        stragglers=stragglers(collected),
        groups=None if clear else groups(collected, judged),
    )


def exhausted(record: RoundRecord, trainers: Collection[str]) -> bool:
    """Whether all that could train were asked, and refused for lack of budget."""
    without = {refusal.node for refusal in record.refusals if refusal.reason == "policy.budget"}
    return bool(trainers) and set(trainers) <= without


def _own(metrics: Mapping[str, float]) -> dict[str, float]:
    """A node's metrics without what it says of its budget, which has places of its own."""
    return {k: v for k, v in metrics.items() if k not in TOLD}


def counted(*many: Collected | None) -> list[Mapping[str, Counts]]:
    """Counts by split: one a node, or one a group where nodes' own are masked."""
    found: list[Mapping[str, Counts]] = []
    for collected in (each for each in many if each is not None):
        sums = [group.counts for group in collected.groups or () if group.survivors]
        found += sums if collected.groups is not None else [update.counts for update in collected.updates]
    return found


def _means(collected: Collected) -> dict[str, float]:
    """Means over nodes of what they report: of their own reports, or of their groups' sums."""
    if collected.groups is None:
        return mean_metrics(collected.updates)
    summed = [group for group in collected.groups if "train_loss" in group.metrics]
    nodes = sum(max(len(group.survivors) - group.metrics.get("num_failed", 0), 0) for group in summed)
    return {"train/loss": sum(group.metrics["train_loss"] for group in summed) / nodes} if nodes else {}


def masked_findings(collected: Collected) -> dict[str, float]:
    """What became of the groups, and how many of their members' updates were clipped."""
    if collected.groups is None:
        return {}
    return {
        "secagg/num_groups": float(len(collected.groups)),
        "secagg/num_groups_lost": float(sum(group.lost is not None for group in collected.groups)),
        "secagg/num_groups_voided": float(sum(group.voided is not None for group in collected.groups)),
        "secagg/num_failed": sum(group.metrics.get("num_failed", 0.0) for group in collected.groups),
        "secagg/num_clipped": sum(group.metrics.get("num_clipped", 0.0) for group in collected.groups),
    }


def groups(*many: Collected | None) -> dict[str, dict[str, Any]]:
    """What is recorded of each group."""
    return {
        group.name: {
            "members": list(group.members),
            "survivors": list(group.survivors),
            "lost": group.lost,
            "voided": group.voided,
            "trains": collected is many[0],
            "num_clipped": int(group.metrics.get("num_clipped", 0)),
            "num_failed": int(group.metrics.get("num_failed", 0)),
        }
        for collected in many
        if collected is not None
        for group in collected.groups or ()
    }


def contributors(record: RoundRecord) -> list[str]:
    """Nodes whose updates a round aggregated, sorted."""
    if record.groups is None:
        return sorted(record.update_norms)
    return sorted(name for group in record.groups.values() if group["trains"] for name in group["survivors"])


def stragglers(collected: Collected) -> tuple[str, ...]:
    """Nodes a round waited for: those without a reply at the deadline, and those far slower than most."""
    late = {refusal.node for refusal in collected.refusals if refusal.reason == "late"}
    taken = {update.node: collected.node_seconds.get(update.node, 0.0) for update in collected.updates}
    slow = STRAGGLER_FACTOR * float(np.median(list(taken.values()))) if taken else 0.0
    return tuple(sorted(late | {node for node, seconds in taken.items() if seconds > slow > 0}))


def _norm(row: Row, measured: Mapping[str, float | None]) -> float:
    known = measured.get(row.members[0])
    return norm(row.update_d) if known is None else known


def score(scoring: Scoring | None, many: Sequence[Update | Mapping[str, Counts]]) -> dict[str, float]:
    """Metrics of the base from the sum of the nodes' counts, or of groups' sums: exact over all their rows."""
    if scoring is None:
        return {}
    scores: dict[str, float] = {}
    all_counts = [each.counts if isinstance(each, Update) else each for each in many]
    for split, prefix in SPLIT_PREFIX.items():
        found = [counts[split] for counts in all_counts if split in counts]
        if found and sum(int(c["rows"]) for c in found):
            totals = {k: sum((c[k] for c in found[1:]), start=found[0][k]) for k in found[0]}
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
    reported = Counter(k for u in updates for k in _own(u.metrics))
    common = sorted(k for k, times in reported.items() if 2 * times > len(updates))
    return {k: float(np.mean([u.metrics[k] for u in updates if k in u.metrics])) for k in common}


def finite_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and np.isfinite(v)}
