"""One liar of five nodes, every way we know to lie: it loses its round, and nobody else notices.

One table.  Each lie is told in the second round, to the strategy as our own nodes speak to it ("native") and as
anyone's Flower app does ("stock").  A new lie is one row.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.engines.local import LocalGrid
from strategies import rules
from strategies.checks import Expected, read_update
from strategies.exchange import PlainExchange, door
from strategies.flower import RoundStrategy
from trellis import wire
from trellis.errors import WireError
from trellis.types import Counts, RoundRecord, ServerState
from trellis.types import NodeInfo as Node
from trellis.vectors import CountSpec, Layout, digest

BASE = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5, -0.5, 0.25], np.float32),
    "steps": np.array(7, np.int64),
}
COUNTS = {
    "loss_sum": CountSpec("loss_sum", (), "float64", per_row=100.0),
    "rows": CountSpec("rows", (), "int64"),
    "bins": CountSpec("bins", (4,), "int64"),
}
REGISTERED, ROWS, LIAR = 50, 200, 2
STYPE = "numpy.ndarray"

Lie = Callable[[RecordDict], Any]
"""The honest content, changed; or another reply; or an exception."""


def honest(message: Message, index: int) -> RecordDict:
    """What node `index` replies: a small update of its own, in the language of the message."""
    request = wire.read_request(message)
    base = wire.from_record(message.content.array_records["arrays"])
    round_ = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    rng = np.random.default_rng((index, round_))
    delta = {k: rng.normal(0, 0.1, a.shape).astype(np.float32) for k, a in base.items() if a.dtype == np.float32}
    moved = {k: a + delta[k] if k in delta else a for k, a in base.items()}
    return wire.reply_content(
        request=request,
        arrays=delta if request else moved,
        num_examples=20 + index,
        metrics={"train/loss": 1.0 / (index + 1)},
        counts={
            "validation": {
                "loss_sum": np.asarray(3.5),
                "rows": np.asarray(5, np.int64),
                "bins": np.array([1, 0, 3, 1], np.int64),
            }
        },
    )


# ---------------------------------------------------------------- ways to lie


def array(value: Any, **claims: Any) -> Array:
    true = Array(np.asarray(value))
    return Array(
        claims.get("dtype", true.dtype), claims.get("shape", true.shape), claims.get("stype", STYPE),
        claims.get("data", true.data),
    )  # fmt: skip


def w(content: RecordDict) -> np.ndarray[Any, Any]:
    return np.array(content.array_records["arrays"]["w"].numpy())


def with_w(change: Callable[[np.ndarray[Any, Any]], Any]) -> Lie:
    """Another value of the tensor `w`."""

    def lie(content: RecordDict) -> RecordDict:
        changed = change(w(content))
        content.array_records["arrays"]["w"] = changed if isinstance(changed, Array) else array(changed)
        return content

    return lie


def with_one(value: float) -> Lie:
    def change(tensor: np.ndarray[Any, Any]) -> Any:
        tensor[1, 2] = value
        return tensor

    return with_w(change)


def with_data(data: bytes, stype: str = STYPE) -> Lie:
    """The right claims over other bytes."""
    return with_w(lambda tensor: Array("float32", (2, 3), stype, data))


def with_arrays(change: Callable[[ArrayRecord], Any]) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        change(content.array_records["arrays"])
        return content

    return lie


def with_metrics(**metrics: Any) -> Lie:
    """More or other metrics; None removes one."""

    def lie(content: RecordDict) -> RecordDict:
        kept = {**dict(content.metric_records["metrics"]), **{k.replace("__", "-"): v for k, v in metrics.items()}}
        content["metrics"] = MetricRecord({k: v for k, v in kept.items() if v is not None})
        return content

    return lie


def examples(value: Any) -> Lie:
    return with_metrics(num__examples=value)


def with_counts(change: Callable[[ArrayRecord], Any]) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        change(content.array_records["counts"])
        return content

    return lie


def count(key: str, value: Any) -> Lie:
    return with_counts(lambda record: record.update({f"validation/{key}": array(value)}))


def with_record(name: str, record: Any) -> Lie:
    """Another record of the reply; None removes it."""

    def lie(content: RecordDict) -> RecordDict:
        if record is None:
            del content[name]
        else:
            content[name] = record
        return content

    return lie


def without_arrays(content: RecordDict) -> RecordDict:
    del content["arrays"]
    return content


def raising(error: BaseException) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        raise error

    return lie


def stopping(content: RecordDict) -> RecordDict:
    sys.exit(3)


def npz_bomb() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, w=np.zeros(1_000_000, np.float32))
    return file.getvalue()


def lying_header() -> bytes:
    body = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},), }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + b"\0" * 24


class Loud:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a stranger's pickle was loaded",))


def object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((2, 3), Loud(), object), allow_pickle=True)
    return file.getvalue()


BOTH, NATIVE, STOCK = ("native", "stock"), ("native",), ("stock",)

# the lie, the reason it is refused for, and the languages in which it is one
TABLE: dict[str, tuple[Lie, str, tuple[str, ...]]] = {
    "a wrong key": (with_arrays(lambda r: r.update({"v": r.pop("w")})), "wrong_keys", BOTH),
    "a missing key": (with_arrays(lambda r: r.pop("w")), "wrong_keys", BOTH),
    "an extra key": (with_arrays(lambda r: r.update({"x": array(np.zeros(2, np.float32))})), "wrong_keys", BOTH),
    "no key at all": (with_arrays(lambda r: r.clear()), "wrong_keys", BOTH),
    "buffers in a delta": (with_arrays(lambda r: r.update({"steps": array(np.int64(9))})), "wrong_keys", NATIVE),
    "a transposed tensor": (with_w(lambda t: t.T.copy()), "wrong_shape", BOTH),
    "a shape that would broadcast": (with_w(lambda t: np.ones(1, np.float32)), "wrong_shape", BOTH),
    "a scalar that would broadcast": (with_w(lambda t: np.float32(1)), "wrong_shape", BOTH),
    "a flat tensor": (with_w(lambda t: t.reshape(6)), "wrong_shape", BOTH),
    "another shape behind the right claim": (with_w(lambda t: array(t.reshape(6), shape=(2, 3))), "wrong_shape", BOTH),
    "10^15 elements in the header": (with_data(lying_header()), "wrong_shape", BOTH),
    "float64": (with_w(lambda t: t.astype(np.float64)), "wrong_dtype", BOTH),
    "float16": (with_w(lambda t: t.astype(np.float16)), "wrong_dtype", BOTH),
    "integers": (with_w(lambda t: t.astype(np.int32)), "wrong_dtype", BOTH),
    "complex numbers": (with_w(lambda t: t.astype(np.complex64)), "wrong_dtype", BOTH),
    "texts": (with_w(lambda t: t.astype("S4")), "wrong_dtype", BOTH),
    "another dtype behind the right claim": (
        with_w(lambda t: array(t.astype(np.int32), dtype="float32")), "wrong_dtype", BOTH
    ),
    "a pickled object array": (with_data(object_array()), "wrong_dtype", BOTH),
    "a pickle": (with_data(pickle.dumps(Loud())), "undecodable", BOTH),
    "a pickle that says so": (with_data(pickle.dumps(Loud()), stype="pickle"), "undecodable", BOTH),
    "noise": (with_data(b"\x01\x02\x03" * 20), "undecodable", BOTH),
    "no bytes": (with_data(b""), "undecodable", BOTH),
    "half the bytes": (with_w(lambda t: array(t, data=array(t).data[:-12])), "undecodable", BOTH),
    "an npz zip bomb": (with_data(npz_bomb()), "undecodable", BOTH),
    "a megabyte more than asked": (
        with_w(lambda t: array(t, data=array(t).data + bytes(1 << 20))), "oversize", BOTH
    ),
    "a megabyte in a record of its own": (
        with_record("more", ConfigRecord({"x": bytes(1 << 20)})), "oversize", BOTH
    ),
    "NaN": (with_w(lambda t: t * np.float32("nan")), "not_finite", BOTH),
    "one single NaN": (with_one(float("nan")), "not_finite", BOTH),
    "infinity": (with_one(float("inf")), "not_finite", BOTH),
    "minus infinity": (with_one(float("-inf")), "not_finite", BOTH),
    "1e30": (with_w(lambda t: np.full((2, 3), 1e30, np.float32)), "norm", BOTH),
    "float32's largest": (with_one(float(np.finfo(np.float32).max)), "norm", BOTH),
    "an update a little too long": (with_one(1000.5 * 2), "norm", BOTH),
    "NaN examples": (examples(float("nan")), "num_examples", BOTH),
    "infinite examples": (examples(float("inf")), "num_examples", BOTH),
    "negative examples": (examples(-1), "num_examples", BOTH),
    "1e12 examples": (examples(10**12), "num_examples", BOTH),
    "one more example than registered": (examples(REGISTERED + 1), "num_examples", BOTH),
    "half an example": (examples(10.5), "num_examples", BOTH),
    "a list of examples": (examples([10]), "num_examples", BOTH),
    "an empty list of examples": (examples([]), "num_examples", BOTH),
    "no count of examples": (examples(None), "num_examples", BOTH),
    "an extra metric": (with_metrics(accuracy=1.0), "metrics", NATIVE),
    "a list for a metric": (with_metrics(**{"train/loss": [0.1, 0.2]}), "metrics", NATIVE),
    "a NaN metric": (with_metrics(**{"train/loss": float("nan")}), "metrics", BOTH),
    "an infinite metric": (with_metrics(**{"train/loss": float("inf")}), "metrics", BOTH),
    "1000 metrics": (with_metrics(**{str(i): 0.0 for i in range(1000)}), "metrics", BOTH),
    "a metric with a long name": (with_metrics(**{"m" * 65: 0.0}), "metrics", BOTH),
    "an empty reply, natively": (lambda content: RecordDict(), "wrong_request", NATIVE),
    "an empty reply": (lambda content: RecordDict(), "wrong_records", STOCK),
    "no arrays": (without_arrays, "wrong_records", BOTH),
    "two records of arrays": (with_record("more", wire.to_record(BASE)), "wrong_records", BOTH),
    "no metrics": (with_record("metrics", None), "wrong_records", BOTH),
    "two records of metrics": (with_record("more", MetricRecord({"num-examples": 1})), "wrong_records", BOTH),
    "another request's digest": (with_record("reply", ConfigRecord({"request": "0" * 64})), "wrong_request", NATIVE),
    "a number for a digest": (with_record("reply", ConfigRecord({"request": 0})), "wrong_request", NATIVE),
    "no digest": (with_record("reply", None), "wrong_request", NATIVE),
    "counts of another name": (
        with_counts(lambda r: r.update({"validation/cows": r.pop("validation/rows")})), "counts", NATIVE
    ),
    "a count too many": (with_counts(lambda r: r.update({"test/rows": array(np.int64(1))})), "counts", NATIVE),
    "a count too few": (with_counts(lambda r: r.pop("validation/rows")), "counts", NATIVE),
    "no counts": (with_record("counts", None), "counts", NATIVE),
    "negative counts": (count("rows", np.int64(-1)), "counts", NATIVE),
    "NaN counts": (count("loss_sum", np.float64("nan")), "counts", NATIVE),
    "counts that overflow a sum": (count("rows", np.int64(2**63 - 1)), "counts", NATIVE),
    "a loss that swallows all others": (count("loss_sum", np.float64(1e300)), "counts", NATIVE),
    "a loss above that of any row": (count("loss_sum", np.float64(501.0)), "counts", NATIVE),
    "more rows in the bins than were scored": (count("bins", np.array([1, 0, 3, 2], np.int64)), "counts", NATIVE),
    "fewer rows in the bins than were scored": (count("bins", np.array([0, 0, 1, 0], np.int64)), "counts", NATIVE),
    "bins that swallow all others": (count("bins", np.array([0, 0, 0, 2**50], np.int64)), "counts", NATIVE),
    "a count with a name of a megabyte": (
        with_counts(lambda r: r.update({"validation/" + "r" * 2**20: r.pop("validation/rows")})), "oversize", NATIVE
    ),
    "a record nobody asked for": (with_record("more", ConfigRecord({"a": 1})), "wrong_records", NATIVE),
    "texts of a megabyte": (with_record("more", ConfigRecord({"a": ["x" * 2**20]})), "oversize", BOTH),
    "a metric beyond belief": (with_metrics(**{"train/loss": 1e300}), "metrics", BOTH),
    "an error of a megabyte": (lambda content: Error(17, "\x1b[31m" + "no " * 2**19), "error_reply", BOTH),
    "counts of another dtype": (count("rows", np.float64(5)), "wrong_dtype", NATIVE),
    "counts of another shape": (count("rows", np.ones(3, np.int64)), "wrong_shape", NATIVE),
    "more scored rows than registered": (count("rows", np.int64(ROWS + 1)), "num_examples", NATIVE),
    "an error": (lambda content: Error(17, "no"), "error_reply", BOTH),
    "an exception": (raising(RuntimeError("the disk is full")), "error_reply", BOTH),
    "a failed assertion": (raising(AssertionError()), "error_reply", BOTH),
    "the process's end": (stopping, "error_reply", BOTH),
    "no message at all": (lambda content: None, "error_reply", BOTH),
}  # fmt: skip


def some_scored(counts: Counts) -> str | None:
    """What a sector might know of its counts: a row here and there may lack a score, most have one."""
    bins: Any = counts["bins"]
    return "few rows are in the bins" if bins.sum() < 3 else None


@dataclass
class Federation:
    """Five nodes or more, one of which lies in the second round."""

    native: bool
    lie: Lie | None = None
    lateness_s: float = 0.0
    rule: str = "mean"
    num_nodes: int = 5

    def __post_init__(self) -> None:
        app = ClientApp()
        app.train()(self._answer)
        self.grid = LocalGrid(app, self.num_nodes, delay_s=self._delay)
        ids = list(self.grid.get_node_ids())
        self.nodes = [Node(f"node-{i}", ids[i], max_examples=REGISTERED, num_rows=ROWS) for i in range(self.num_nodes)]
        self.strategy = RoundStrategy(
            rule=rules.get(self.rule),
            num_byzantine=int(rules.get(self.rule).tolerates),
            reference=lambda state: np.full(9, 0.1, np.float32),
            exchange=PlainExchange(
                native=self.native,
                timeout_s=60,
                counts=COUNTS,
                counts_problem=some_scored,
                metrics=frozenset({"train/loss"}),
                max_update_norm=1000,
            ),
            node_config={"lr": 0.1},
            clock=self.grid.clock,
        )

    def round(self, state: ServerState, nodes: list[Node]) -> tuple[ServerState, RoundRecord]:
        return self.strategy.round(state, nodes, door(self.grid, self.grid.clock))

    def _answer(self, message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        told = honest(message, index)
        if self.lie is not None and index == LIAR and _round_of(message) == 2:
            told = self.lie(told)
        if told is None:
            return None  # type: ignore[return-value]
        return Message(told, reply_to=message)

    def _delay(self, index: int, message: Message, reply: Message) -> float:
        return self.lateness_s if index == LIAR and _round_of(message) == 2 else 0.5 * index


def _round_of(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def exam(federation: Federation, reason: str) -> None:
    state = ServerState(run="r", round=0, params=BASE)
    first, record = federation.round(state, federation.nodes)
    assert record.refusals == ()
    assert digest(first.params) != digest(BASE)

    second, record = federation.round(first, federation.nodes)
    assert [(r.node, r.reason) for r in record.refusals] == [("node-2", reason)]
    assert record.refusals[0].evidence
    assert len(record.refusals[0].evidence) <= 300
    assert record.refusals[0].evidence.isprintable()
    honest_names = tuple(n.name for n in federation.nodes if n.name != "node-2")
    assert record.closed is None
    assert record.answered == honest_names
    assert tuple(sorted(record.update_norms)) == honest_names
    assert tuple(sorted(record.weights)) in (honest_names, ())  # coordinate rules weigh no rows
    assert all(np.isfinite(a).all() for a in second.params.values())
    assert record.asked == tuple(n.name for n in federation.nodes)

    alone, record = federation.round(first, [n for n in federation.nodes if n.name != "node-2"])
    assert record.refusals == ()
    assert digest(second.params) == digest(alone.params)
    assert digest(second.params) != digest(first.params)


CASES = [
    pytest.param(language == "native", lie, reason, id=f"{name}, {language}")
    for name, (lie, reason, languages) in TABLE.items()
    for language in languages
]


@pytest.mark.parametrize(("native", "lie", "reason"), CASES)
def test_a_malformed_reply_costs_its_sender_the_round_and_nobody_else(native: bool, lie: Lie, reason: str) -> None:
    exam(Federation(native, lie), reason)


LIES = (
    "NaN", "one single NaN", "infinity", "1e30", "float32's largest", "a shape that would broadcast", "a wrong key",
    "float64", "NaN examples", "1e12 examples", "negative examples",
)  # fmt: skip


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("rule", [name for name in rules.RULES if name != "mean"])
def test_a_malformed_reply_costs_its_sender_the_round_under_every_rule(rule: str, lie: str, native: bool) -> None:
    told, reason, _ = TABLE[lie]
    exam(Federation(native, told, rule=rule, num_nodes=9), reason)


@pytest.mark.parametrize("rule", [name for name in rules.RULES if name != "mean"])
def test_lies_within_the_norm_limit_are_aggregated_to_something_finite(rule: str) -> None:
    """No check can know them: here the rule stands alone."""
    federation = Federation(True, with_w(lambda t: np.full((2, 3), 400.0, np.float32)), rule=rule, num_nodes=9)
    first, _ = federation.round(ServerState(run="r", round=0, params=BASE), federation.nodes)
    second, record = federation.round(first, federation.nodes)
    assert record.refusals == ()
    assert record.closed is None
    moved = Layout.of(BASE).subtract(second.params, first.params)
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() < 1.0 or rule == "foolsgold"  # against sybils only: one liar alone is believed


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("lateness_s", [60.0, 61.0, 1e9, float("inf")])
def test_a_late_reply_costs_its_sender_the_round_and_nobody_else(native: bool, lateness_s: float) -> None:
    exam(Federation(native, lateness_s=lateness_s), "late")


def test_the_reply_of_the_round_before_is_not_the_reply_of_this_one() -> None:
    kept: list[RecordDict] = []
    federation = Federation(native=True)
    answer = federation._answer

    def replaying(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if context.node_config["partition-id"] == LIAR:
            kept.append(reply.content)
            reply.content = kept[0]
        return reply

    app = ClientApp()
    app.train()(replaying)
    federation.grid._app = app
    exam(federation, "wrong_request")


@pytest.mark.parametrize("native", [True, False])
def test_five_honest_nodes_are_all_counted(native: bool) -> None:
    federation = Federation(native)
    _, record = federation.round(ServerState(run="r", round=0, params=BASE), federation.nodes)
    assert record.refusals == ()
    assert len(record.answered) == 5


def test_a_stock_app_may_report_metrics_of_its_own() -> None:
    federation = Federation(False, lie=with_metrics(accuracy=0.5, many=[1.0, 2.0]))
    first, _ = federation.round(ServerState(run="r", round=0, params=BASE), federation.nodes)
    _, record = federation.round(first, federation.nodes)
    assert record.refusals == ()
    assert record.node_metrics["node-2"]["accuracy"] == 0.5


@pytest.mark.parametrize("number", [True, False, "10", None])
def test_only_a_whole_number_counts_examples(number: Any) -> None:
    content = honest(_question(), 0)
    content.metric_records["metrics"].__dict__["_data"]["num-examples"] = number
    expected = Expected(layout=Layout.of(BASE), base=BASE, trains=True)
    with pytest.raises(WireError, match="num-examples"):
        read_update("a", content, expected)


def _question() -> Message:
    wire.identify(1, 1)
    config = ConfigRecord({"server-round": 1})
    return Message(RecordDict({"arrays": wire.to_record(BASE), "config": config}), 2, "train")


def test_the_closing_evaluation_survives_its_liars_too() -> None:
    def evaluated(message: Message, context: Context) -> Message:
        request = wire.read_request(message)
        index = int(context.node_config["partition-id"])
        rows = np.asarray(101 if index == LIAR else 80, np.int64)
        one = {"loss_sum": np.asarray(1.0), "rows": rows, "bins": np.array([3, 0, 0, 0], np.int64)}
        counts = dict.fromkeys(("validation", "test"), one)
        reply = wire.reply_content(request=request, arrays=None, num_examples=160, metrics={}, counts=counts)
        return Message(reply, reply_to=message)

    federation = Federation(native=True)
    app = ClientApp()
    app.evaluate()(evaluated)
    federation.grid._app = app
    state = ServerState(run="r", round=3, params=BASE)
    after, record = federation.strategy.close(state, federation.nodes, door(federation.grid, federation.grid.clock))
    assert [(r.node, r.reason) for r in record.refusals] == [("node-2", "num_examples")]
    # 160 rows scored, where 50 rows to train on are registered: scored rows are others
    assert len(record.answered) == 4
    assert replace(after, best=None) == replace(state, best=None)
