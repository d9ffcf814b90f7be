"""Lies about the protocol: an honest update in a reply that is not what was asked for."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from experiments.attacks.view import Reply, State
from trellis import wire
from trellis.errors import ConfigError


def inflation(reply: Reply, *, mode: str = "times", factor: float = 100.0) -> RecordDict:
    """Another number of examples, to weigh more or to break a weighted mean: K times as many, NaN, 0 or below 0."""
    metrics = dict(reply.content.metric_records[wire.METRICS])
    honest = int(metrics[wire.NUM_EXAMPLES])  # type: ignore[arg-type]
    lies: dict[str, int | float] = {
        "times": int(factor * honest),
        "not_a_number": float("nan"),
        "zero": 0,
        "negative": -honest,
    }
    if mode not in lies:
        raise ConfigError(f"attack=inflation: mode is {mode!r}; choose one of: {', '.join(lies)}")
    return _with(reply.content, wire.METRICS, MetricRecord({**metrics, wire.NUM_EXAMPLES: lies[mode]}))


def malformed(reply: Reply, *, kind: str = "shape", extra_bytes: int = 1 << 20) -> RecordDict:
    """Arrays of another shape, key or dtype, a reply of `extra_bytes` more than asked for, or an empty one."""
    arrays = reply.content.array_records[wire.ARRAYS]
    name = next(iter(arrays))
    value = arrays[name].numpy()
    match kind:
        case "shape":
            changed = {**arrays, name: Array(value[None])}
        case "key":
            changed = {(f"{k}.lie" if k == name else k): a for k, a in arrays.items()}
        case "dtype":
            changed = {**arrays, name: Array(value.astype(np.float64 if value.itemsize < 8 else np.float32))}
        case "oversize":
            return _with(reply.content, "lie", ConfigRecord({"text": " " * extra_bytes}))
        case "empty":
            return RecordDict()
        case _:
            raise ConfigError(f"attack=malformed: kind is {kind!r}; choose one of: shape, key, dtype, oversize, empty")
    return _with(reply.content, wire.ARRAYS, ArrayRecord(changed))


def replay(reply: Reply, *, age: int = 1) -> RecordDict:
    """This node's own reply of `age` rounds before, byte for byte; its honest one where it has none so old."""
    old = [round_ for round_ in reply.state if int(round_) <= reply.round - age]
    return wire.unpack(reply.state[max(old)].tobytes()) if old else reply.content


def replies(reply: Reply, *, age: int = 1) -> State:
    """The packed replies of this round and of as many before as a replay needs.  -> {"000003": bytes as (B,) uint8}"""
    if age < 1:
        raise ConfigError(f"attack=replay: age is {age}; it must be at least 1")
    packed = np.frombuffer(wire.pack(reply.content), np.uint8)
    known = {**reply.state, f"{reply.round:06d}": packed}
    return {round_: known[round_] for round_ in sorted(known)[-age - 1 :]}


def _with(content: RecordDict, name: str, record: ArrayRecord | MetricRecord | ConfigRecord) -> RecordDict:
    """The content with another record; records that stay are shared."""
    return RecordDict({**content, name: record})
