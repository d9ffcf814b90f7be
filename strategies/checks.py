"""What a reply must be before a rule may see it.

Two steps: `read_update` takes a reply's records apart (sizes, keys, shapes, dtypes, from headers before anything is
decoded), then every `Check` looks at the update.  A reply that fails costs its sender the round, never the round
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from trellis import wire
from trellis.errors import WireError
from trellis.types import Counts, NodeInfo, Refusal, Update
from trellis.vectors import Arrays, CountSpec, Layout, TensorSpec, Vector, norm

Check = Callable[[Update], Refusal | None]

CountsProblem = Callable[[Counts], str | None]
"""Why no rows can have these counts of a split, or None: what only their meaning can tell."""

MAX_METRICS = 64
MAX_METRIC_CHARS = 64
MAX_METRIC = 1e12
MAX_COUNT = 1 << 50
"""Above any count of a node's rows, and low enough that thousands of nodes' counts add up in an int64."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reply to one message must look like.

    `request` is the digest that the reply must name, None for apps that follow Flower's convention only: those reply
    params, name no request, and may carry metrics of their own.  `counts` are the additive counts of a split.
    """

    layout: Layout
    base: Arrays
    trains: bool
    request: str | None = None
    counts: Mapping[str, TensorSpec] | None = None
    splits: tuple[str, ...] = ("validation",)
    metrics: frozenset[str] | None = None
    counts_problem: CountsProblem | None = None

    @property
    def replies_delta(self) -> bool:
        return self.request is not None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The arrays a training reply carries."""
        return self.layout.floating if self.replies_delta else self.layout.tensors

    @property
    def max_bytes(self) -> int:
        arrays = sum(t.num_bytes + wire.HEADER_BYTES for t in self.tensors)
        counts = sum(c.num_bytes + wire.HEADER_BYTES for c in (self.counts or {}).values()) * len(self.splits)
        return arrays + counts + MAX_METRICS * (8 + MAX_METRIC_CHARS) + 4096


def read_update(node: str, content: RecordDict, expected: Expected, *, out: Vector | None = None) -> Update:
    """A reply's update, its vector written into `out` (d,).  Raises WireError with the reason of the refusal."""
    size = wire.size_bytes(content)
    if size > expected.max_bytes:
        raise WireError("oversize", f"{size} bytes, at most {expected.max_bytes} were asked for")
    if expected.request is not None:
        _known_records(content)
        _same_request(content, expected.request)
    metrics, num_examples = _read_metrics(content, expected)
    update_d = _read_vector(content, expected, out) if expected.trains else None
    return Update(
        node=node,
        update_d=update_d,
        norm=norm(update_d) if update_d is not None else None,
        num_examples=num_examples,
        metrics=metrics,
        counts=_read_counts(content, expected) if expected.counts is not None else {},
        size_bytes=size,
    )


def _known_records(content: RecordDict) -> None:
    odd = sorted(set(content) - {wire.ARRAYS, wire.METRICS, wire.COUNTS, wire.REPLY})
    if odd:
        raise WireError("wrong_records", f"unknown records {[name[:60] for name in odd[:3]]}")


def _same_request(content: RecordDict, digest: str) -> None:
    named = content.config_records.get(wire.REPLY, ConfigRecord()).get(wire.REQUEST)
    if named != digest:
        raise WireError("wrong_request", f"the reply names request {str(named)[:12]}, asked was {digest[:12]}")


def _read_vector(content: RecordDict, expected: Expected, out: Vector | None) -> Vector:
    record = _only_arrays(content)
    names = {t.name for t in expected.tensors}
    if set(record) != names:
        odd = sorted(set(record) ^ names)[:3]
        raise WireError("wrong_keys", f"the arrays' names differ from the model's at {[k[:60] for k in odd]}")
    for t in expected.tensors:
        claimed = (tuple(record[t.name].shape), str(record[t.name].dtype))
        if claimed[0] != t.shape:
            raise WireError("wrong_shape", f"{t.name} has shape {claimed[0]}, expected {t.shape}")
        if claimed[1] != t.dtype:
            raise WireError("wrong_dtype", f"{t.name} has dtype {claimed[1][:20]}, expected {t.dtype}")
    arrays = {t.name: wire.decode(record[t.name], t) for t in expected.tensors}
    if expected.replies_delta:
        return expected.layout.flatten(arrays, out=out)
    with np.errstate(over="ignore", invalid="ignore"):  # a stranger's inf and nan are refused by `finite` below
        return expected.layout.subtract(arrays, expected.base, out=out)


def _only_arrays(content: RecordDict) -> ArrayRecord:
    records = [r for name, r in content.items() if isinstance(r, ArrayRecord) and name != wire.COUNTS]
    if len(records) != 1:
        raise WireError("wrong_records", f"a training reply has one record of arrays, found {len(records)}")
    return records[0]


def _read_metrics(content: RecordDict, expected: Expected) -> tuple[dict[str, float], int]:
    records = [r for r in content.values() if isinstance(r, MetricRecord)]
    if len(records) != 1:
        raise WireError("wrong_records", f"a reply has one record of metrics, found {len(records)}")
    record: MetricRecord = records[0]
    if len(record) > MAX_METRICS or any(len(k) > MAX_METRIC_CHARS for k in record):
        raise WireError("metrics", f"{len(record)} metrics; at most {MAX_METRICS}, of {MAX_METRIC_CHARS} characters")
    known = expected.metrics
    if known is not None and not set(record) <= known | {wire.NUM_EXAMPLES}:
        extra = sorted(set(record) - known - {wire.NUM_EXAMPLES})
        raise WireError("metrics", f"unknown metrics {extra[:3]}")
    lists = sorted(k for k, v in record.items() if isinstance(v, list) and k != wire.NUM_EXAMPLES)
    if lists and known is not None:
        raise WireError("metrics", f"metrics {lists[:3]} are lists, expected numbers")
    metrics = {k: float(v) for k, v in record.items() if k != wire.NUM_EXAMPLES and not isinstance(v, list)}
    return metrics, _read_num_examples(record.get(wire.NUM_EXAMPLES))


def _read_num_examples(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WireError("num_examples", f"num-examples is {str(value)[:40]}, expected a whole number")
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise WireError("num_examples", f"num-examples is {value}, expected a whole number, at least 0")
    return int(value)


def _read_counts(content: RecordDict, expected: Expected) -> dict[str, Counts]:
    record = content.array_records.get(wire.COUNTS)
    specs = expected.counts or {}
    names = {f"{split}/{k}" for split in expected.splits for k in specs}
    if record is None or set(record) != names:
        raise WireError("counts", f"expected the counts {sorted(names)[:4]}, found {sorted(record or {})[:4]}")
    counts: dict[str, Counts] = {}
    for split in expected.splits:
        counts[split] = {k: wire.decode(record[f"{split}/{k}"], spec) for k, spec in specs.items()}
        for k, values in counts[split].items():
            numbers = cast(Any, values)
            if not np.isfinite(numbers).all() or (numbers < 0).any() or (numbers > MAX_COUNT).any():
                raise WireError("counts", f"{split}/{k} has values that are negative, above 2^50 or not finite")
        _within_rows(split, counts[split], specs)
        problem = expected.counts_problem(counts[split]) if expected.counts_problem is not None else None
        if problem is not None:
            raise WireError("counts", f"{split}: {problem}")
    return counts


def _within_rows(split: str, counts: Counts, specs: Mapping[str, TensorSpec]) -> None:
    """A count is a sum over rows, of at most `per_row` each: few rows cannot outweigh all others' in a metric."""
    rows = float(cast(Any, counts["rows"])) if "rows" in counts else math.inf
    for name, spec in specs.items():
        if isinstance(spec, CountSpec):
            total, most = float(np.sum(cast(Any, counts[name]), dtype=np.float64)), spec.per_row * rows
            if total > most * (1 + 1e-9):
                raise WireError("counts", f"{split}/{name} adds up to {total:.4g}, {rows:.0f} rows allow {most:.4g}")


# ---------------------------------------------------------------- checks of an update


def finite(update: Update) -> Refusal | None:
    """No NaN, no infinity, in vector or metrics."""
    # A finite norm is a sum of finite squares.
    if update.update_d is not None and not math.isfinite(_norm(update)):
        bad = int((~np.isfinite(update.update_d)).sum())
        return Refusal(update.node, "not_finite", f"{bad} of {update.update_d.size} coordinates are NaN or infinite")
    odd = sorted(k for k, v in update.metrics.items() if not abs(v) <= MAX_METRIC)
    return Refusal(update.node, "metrics", f"metrics {odd[:3]} are NaN, infinite or above 1e12") if odd else None


def _norm(update: Update) -> float:
    if update.norm is not None or update.update_d is None:
        return update.norm or 0.0
    return norm(update.update_d)


def norm_within(max_norm: float) -> Check:
    """The update's Euclidean norm is at most `max_norm`."""

    def check(update: Update) -> Refusal | None:
        length = _norm(update)
        evidence = f"the update's norm is {length:.3g}, at most {max_norm:.3g} is allowed"
        return Refusal(update.node, "norm", evidence) if length > max_norm else None

    return check


def examples_within(nodes: Mapping[str, NodeInfo], *, default: int) -> Check:
    """Declared counts are at most what the node registered, or `default` where it registered nothing.

    A training reply is held against its training rows, everything scored against all its rows.
    """

    def check(update: Update) -> Refusal | None:
        node = nodes.get(update.node)
        most = default if node is None or node.num_rows is None else node.num_rows
        trained = node.max_examples if node is not None and update.update_d is not None else None
        limit = most if trained is None else trained
        if update.num_examples > limit:
            evidence = f"{update.num_examples} examples declared, at most {limit} are registered"
            return Refusal(update.node, "num_examples", evidence)
        # a tuned model scores the same rows once more
        scored = sum(int(c["rows"]) for split, c in update.counts.items() if "rows" in c and split != "test_tuned")
        scored = max(scored, *(int(c.get("rows", 0)) for c in update.counts.values()), 0)
        if "test_tuned" in update.counts and "test" in update.counts:
            tuned, test = (int(update.counts[split].get("rows", 0)) for split in ("test_tuned", "test"))
            if tuned != test:
                return Refusal(update.node, "counts", f"{tuned} test rows of the tuned model, {test} of the other")
        evidence = f"{scored} scored rows declared, at most {most} are registered"
        return Refusal(update.node, "num_examples", evidence) if scored > most else None

    return check
