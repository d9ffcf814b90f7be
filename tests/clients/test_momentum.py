"""Worker momentum by hand, and as a node's memory: asked twice, discarded, resumed, around anyone's app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import sectors
from clients import identity
from clients.app import app
from clients.momentum import momentum, momentum_mod, step
from clients.node import node_config
from clients.store import NodeStore
from conf.schema import DataSource, NodesConfig, NodeSpec, NodeTask, RuleConfig, RunConfig, to_json
from experiments.engines.local import LocalGrid
from experiments.simulate import simulate
from sectors.params import initial_arrays
from trellis import canonical, wire
from trellis.errors import ConfigError
from trellis.types import Request
from trellis.vectors import Arrays

BETA = 0.75
UPDATES = ([4.0, -8.0], [8.0, 0.0], [-4.0, 8.0])
BY_HAND = ([4.0, -8.0], [5.0, -6.0], [2.75, -2.5])
"""m_1 = u_1, then 0.75 m + 0.25 u."""


# ---------------------------------------------------------------- the formula


def test_three_rounds_by_hand() -> None:
    m = None
    for update, expected in zip(UPDATES, BY_HAND, strict=True):
        m = step(np.array(update, np.float32), before=m, beta=BETA)
        assert m.tolist() == expected


def test_the_sum_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    before, update = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
    exact = [np.float32(0.9 * float(b) + (1.0 - 0.9) * float(u)) for b, u in zip(before, update, strict=True)]
    found = step(update, before=before, beta=0.9)
    assert found.dtype == np.float32
    assert found.tolist() == [float(x) for x in exact]


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0, float("nan")])
def test_a_beta_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        momentum(beta)


# ---------------------------------------------------------------- a node of ours


FEDERATION = NodesConfig(items=[NodeSpec(name="ash")])


def told(beta: float) -> NodeTask:
    rule = RuleConfig(worker_momentum=beta)
    return NodeTask.of(RunConfig(nodes=FEDERATION, rule=rule, data=DataSource.synthetic))


def enrol(context: Context, store: str) -> None:
    identity.enrol(context, canonical.encode(to_json(FEDERATION)).decode(), store)


class Node:
    """A simulated node whose training replies what the test says, behind the Mod."""

    def __init__(self, store: Path | None, *, beta: float = BETA) -> None:
        wire.identify(1, 1)
        self.context = Context(1, 2, {"partition-id": 0, identity.SIMULATED: True}, RecordDict(), {})
        enrol(self.context, str(store) if store else "")
        self.config = to_json(told(beta))

    def ask(self, base: str, update: Any, *, run: str = "r", round_: int = 1) -> Message:
        received = {"w": np.zeros(2, np.float32), "steps": np.array([3])}
        request = Request(run, round_, "train", base, self.config, ("ash",))
        message = Message(wire.request_content(wire.to_record(received), request), 2, "train")
        message.metadata.__dict__["_message_id"] = "m"
        sent: Arrays = update if isinstance(update, dict) else {"w": np.array(update, np.float32)}

        def train(message: Message, context: Context) -> Message:
            content = wire.reply_content(
                request=request, arrays=sent, num_examples=5, metrics={"train/loss": 0.5}, counts={}
            )
            return Message(content, reply_to=message)

        return momentum_mod(message, self.context, train)

    def momentum(self, base: str, update: Any, **asked: Any) -> list[float]:
        found: list[float] = wire.from_record(self.ask(base, update, **asked).content.array_records["arrays"])[
            "w"
        ].tolist()
        return found


@pytest.fixture(params=["store", "context"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Node:
    return Node(tmp_path if request.param == "store" else None)


def test_a_node_replies_its_momentum(node: Node) -> None:
    assert [node.momentum(base, u) for base, u in zip("abc", UPDATES, strict=True)] == list(BY_HAND)


def test_nothing_else_of_the_reply_changes(node: Node) -> None:
    node.ask("a", UPDATES[0])
    reply = node.ask("b", UPDATES[1])
    assert list(reply.content) == ["metrics", "arrays", "reply", "counts"]
    assert dict(reply.content.metric_records["metrics"]) == {"num-examples": 5, "train/loss": 0.5}


@pytest.mark.parametrize("kept", [True, False])
def test_without_beta_the_reply_keeps_its_bytes_and_nothing_is_remembered(kept: bool, tmp_path: Path) -> None:
    node = Node(tmp_path if kept else None, beta=0.0)
    for base, update in zip("abc", UPDATES, strict=True):
        sent = node.ask(base, update).content.array_records["arrays"]
        assert sent == wire.to_record({"w": np.array(update, np.float32)})
    assert not list(tmp_path.iterdir())
    assert list(node.context.state) == [identity.STATE]


def test_a_round_asked_twice_gives_the_same_bytes_and_leaves_the_same_memory(node: Node) -> None:
    node.ask("a", UPDATES[0])
    once, again = (wire.pack(node.ask("b", UPDATES[1]).content) for _ in range(2))
    assert once == again
    assert node.momentum("c", UPDATES[2]) == BY_HAND[2]


def test_the_first_round_asked_twice_is_a_first_round_twice(node: Node) -> None:
    assert node.momentum("a", UPDATES[0]) == node.momentum("a", UPDATES[0]) == UPDATES[0]
    assert node.momentum("b", UPDATES[1]) == BY_HAND[1]


def test_a_round_that_the_server_discarded_is_forgotten(node: Node) -> None:
    node.ask("a", UPDATES[0])
    node.ask("b", [1000.0, 1000.0])
    assert node.momentum("b", UPDATES[1], round_=3) == BY_HAND[1], "the base came again"
    assert node.momentum("c", UPDATES[2], round_=4) == BY_HAND[2]


def test_another_run_starts_anew(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for base, update in zip("abcdef", UPDATES * 2, strict=True):
        node.ask(base, update)
    assert node.momentum("g", UPDATES[0], run="another") == UPDATES[0]
    assert node.momentum("h", UPDATES[1], run="another") == BY_HAND[1]


def test_momentum_and_local_layers_are_kept_apart(tmp_path: Path) -> None:
    node, store = Node(tmp_path), NodeStore(tmp_path / "ash", durable=False)
    store.commit("a", {"head": np.ones(1, np.float32)})
    node.ask("a", UPDATES[0])
    assert store.local("b", slot="momentum") is None, "of no run"
    head, kept = store.local("b"), store.local("b", slot="momentum", run="r")
    assert head is not None
    assert kept is not None
    assert (list(head), kept["w"].tolist()) == (["head"], UPDATES[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"w": np.array([np.nan, 1.0], np.float32)},
        {"w": np.array([np.inf, 1.0], np.float32)},
        {"w": np.zeros(3, np.float32)},
        {"w": np.zeros(2, np.float64)},
        {"v": np.zeros(2, np.float32)},
        {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)},
        {},
    ],
)
def test_what_the_server_will_refuse_passes_as_it_is_and_is_not_remembered(bad: dict[str, Any], node: Node) -> None:
    node.ask("a", UPDATES[0])
    sent = node.ask("b", bad).content.array_records["arrays"]
    assert sent == wire.to_record(bad)
    assert node.momentum("c", UPDATES[1]) == BY_HAND[1]


# ---------------------------------------------------------------- a run


def test_a_run_interrupted_and_resumed_is_the_run_undisturbed(tmp_path: Path) -> None:
    settings = ["sector=healthcare_wisconsin", "tracking=none", "rule.worker_momentum=0.9"]
    simulate([*settings, "rounds=3", "run_name=short", f"runs_dir={tmp_path}"])
    resumed = simulate(["resume=short", "rounds=5", f"runs_dir={tmp_path}"])
    whole = simulate([*settings, "rounds=5", "run_name=long", f"runs_dir={tmp_path}"])
    plain = simulate([*settings[:2], "rounds=5", "run_name=plain", f"runs_dir={tmp_path}"])
    assert resumed.model_digest == whole.model_digest != plain.model_digest
    assert resumed.metrics == whole.metrics
    assert resumed.refusals == []


# ---------------------------------------------------------------- anyone's app


class Stock:
    """A federation of one stock ClientApp, by Flower's convention; its training adds a given update."""

    def __init__(self, *, beta: float = BETA) -> None:
        self.updates = iter(UPDATES)
        self.app = ClientApp(mods=[momentum(beta)])
        self.app.train()(self._train)
        self.app.evaluate()(self._evaluate)
        self.grid = LocalGrid(self.app, 1)

    def _train(self, message: Message, context: Context) -> Message:
        params = wire.from_record(message.content.array_records["arrays"])
        moved = {
            "steps": np.asarray(params["steps"] + 1),
            "w": params["w"] + np.array(next(self.updates), np.float32),
        }
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"theirs": wire.to_record(moved), "metrics": metrics}), reply_to=message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    def send(self, params: Arrays, kind: str = "train") -> Message:
        (node_id,) = self.grid.get_node_ids()
        content = RecordDict({"arrays": wire.to_record(params), "config": ConfigRecord({"server-round": 1})})
        (reply,) = self.grid.send_and_receive([Message(content, node_id, kind)])
        return reply


def params(*w: float) -> Arrays:
    return {"w": np.array(w, np.float32), "steps": np.array([7])}


def test_a_stock_app_replies_params_plus_momentum_and_its_integers_as_they_are() -> None:
    stock = Stock()
    for number, expected in enumerate(BY_HAND):
        base = params(100.0 * number, 1.0)
        found = wire.from_record(stock.send(base).content.array_records["theirs"])
        assert list(found) == ["steps", "w"]
        assert (found["w"] - base["w"]).tolist() == expected
        assert found["steps"].tolist() == [8]


def test_a_stock_apps_round_asked_twice_starts_from_the_same_momentum() -> None:
    stock = Stock()
    stock.send(params(0.0, 0.0))
    stock.updates = iter([UPDATES[1]] * 2)
    once, again = (stock.send(params(1.0, 1.0)).content for _ in range(2))
    assert wire.pack(once) == wire.pack(again)


def test_without_beta_a_stock_apps_bytes_are_its_own() -> None:
    plain, wrapped = Stock(), Stock(beta=0.0)
    plain.send(params(0.5, 0.25))
    wrapped.send(params(0.5, 0.25))
    base = params(0.5, 0.25)
    found = wire.from_record(wrapped.send(base).content.array_records["theirs"])
    assert (found["w"] - base["w"]).tolist() == UPDATES[1]


def test_evaluations_and_error_replies_pass_untouched() -> None:
    stock = Stock()
    reply = stock.send(params(1.0, 2.0), "evaluate")
    assert wire.from_record(reply.content.array_records["arrays"])["w"].tolist() == [1.0, 2.0]
    (context,) = stock.grid._contexts.values()
    assert not list(context.state)

    def fail(message: Message, context: Context) -> Message:
        return Message(Error(7, "no"), reply_to=message)

    message = Message(RecordDict({"arrays": wire.to_record(params(1.0, 2.0))}), 2, "train")
    message.metadata.__dict__["_message_id"] = "m"
    assert momentum(BETA)(message, context, fail).error.code == 7


def test_flowers_fedavg_aggregates_the_momentum_of_a_stock_app() -> None:
    stock = Stock()
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1)
    result = strategy.start(stock.grid, wire.to_record(params(0.0, 0.0)), num_rounds=3)
    assert wire.from_record(result.arrays)["w"].tolist() == np.sum(BY_HAND, axis=0).tolist()


def test_our_app_takes_beta_from_the_node_config_that_flowers_strategies_send() -> None:
    grid = LocalGrid(app, 1)
    (node_id,) = grid.get_node_ids()
    enrol(grid._contexts[node_id], "")
    base = initial_arrays(sectors.get("healthcare_wisconsin"), 0)

    def ask(beta: float, scale: float) -> Arrays:
        config = ConfigRecord({"server-round": 1, "node-config": node_config(told(beta))})
        sent = {k: np.asarray(a * scale, a.dtype) for k, a in base.items()}
        content = RecordDict({"arrays": wire.to_record(sent), "config": config})
        (reply,) = grid.send_and_receive([Message(content, node_id, "train")])
        return wire.from_record(reply.content.array_records["arrays"])

    first, plain = ask(0.5, 1.0), ask(0.0, 0.5)
    second = ask(0.5, 0.5)
    for name, a in base.items():
        u1, u2 = first[name] - a, plain[name] - 0.5 * a
        assert np.allclose(second[name] - 0.5 * a, 0.5 * u1 + 0.5 * u2, atol=1e-6)
