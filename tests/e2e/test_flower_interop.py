"""Both ways: our Strategy runs anyone's Flower apps, and anyone's Flower strategy runs our ClientApp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from clients.app import app as our_app
from clients.node import node_config
from conf.load import load
from conf.schema import NodeTask
from experiments.engines.local import LocalGrid
from sectors.params import initial_arrays
from server import build, registry
from strategies.exchange import PlainExchange, door
from strategies.flower import RoundStrategy
from strategies.server_optimizers import momentum
from trellis import wire
from trellis.errors import ConfigError
from trellis.types import RoundRecord, ServerState
from trellis.vectors import digest

TARGETS = ([1.0, 0.0], [2.0, 4.0], [6.0, 2.0])
START = ArrayRecord({"w": wire.to_record({"w": np.zeros(2, np.float32)})["w"]})


def quickstart(lie: Callable[[RecordDict], Any] | None = None, liar: int = 1) -> ClientApp:
    """As in Flower's quickstart: node i moves w towards its target by the lr it is told, on 10 * (i + 1) rows."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        w = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
        lr = float(message.content["config"]["lr"])  # type: ignore[arg-type, index]
        loss = float(((w - TARGETS[index]) ** 2).sum())
        moved = {"w": (w + lr * (np.array(TARGETS[index], np.float32) - w)).astype(np.float32)}
        metrics = MetricRecord({"train_loss": loss, "num-examples": 10 * (index + 1)})
        content = RecordDict({"arrays": wire.to_record(moved), "metrics": metrics})
        if lie is not None and index == liar:
            content = lie(content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        w = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
        loss = float(((w - TARGETS[index]) ** 2).sum())
        metrics = MetricRecord({"eval_loss": loss, "num-examples": 5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


LR = ConfigRecord({"lr": 0.5})


def w_of(result: Result) -> list[float]:
    return result.arrays["w"].numpy().tolist()


class Recorded(LocalGrid):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)


# ---------------------------------------------------------------- our Strategy, stock apps


def test_our_start_trains_a_stock_app_and_the_result_is_right_by_hand() -> None:
    # the mean target is (3, 2); w goes half the way each round: (1.5, 1), (2.25, 1.5)
    grid = Recorded(quickstart(), 3)
    result = RoundStrategy().start(grid, START, num_rounds=2, train_config=LR)
    assert w_of(result) == [2.25, 1.5]
    # before round 1: (1 + 0), (4 + 16), (36 + 4); their unweighted mean is 61 / 3
    assert result.train_metrics_clientapp[1]["train_loss"] == pytest.approx(61 / 3)
    # after round 2: (1.25^2 + 1.5^2), (0.25^2 + 2.5^2), (3.75^2 + 0.5^2)
    assert dict(result.evaluate_metrics_clientapp[2]) == {"eval_loss": pytest.approx((3.8125 + 6.3125 + 14.3125) / 3)}
    assert Counter(m.metadata.message_type for m in grid.sent) == {"train": 6, "evaluate": 3}
    assert [m.content.config_records["config"]["server-round"] for m in grid.sent] == [1] * 3 + [2] * 3 + [3] * 3


def test_configs_reach_the_messages_they_are_for_and_leave_the_strategy_alone() -> None:
    grid = Recorded(quickstart(), 3)
    strategy = RoundStrategy()
    strategy.start(grid, START, num_rounds=1, train_config=LR, evaluate_config=ConfigRecord({"batch": 7}))
    train, evaluate = (
        [dict(m.content.config_records["config"]) for m in grid.sent if m.metadata.message_type == kind]
        for kind in ("train", "evaluate")
    )
    assert train == [{"lr": 0.5, "server-round": 1}] * 3
    assert evaluate == [{"batch": 7, "server-round": 2}] * 3
    assert strategy.exchange == PlainExchange(native=False)


def test_the_server_is_evaluated_before_and_after_every_round() -> None:
    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        return MetricRecord({"x": float(arrays["w"].numpy()[0])}) if server_round != 1 else None

    result = RoundStrategy().start(LocalGrid(quickstart(), 3), START, 2, train_config=LR, evaluate_fn=evaluate_fn)
    assert {r: m["x"] for r, m in result.evaluate_metrics_serverapp.items()} == {0: 0.0, 2: 2.25}


def test_no_rounds_ask_nobody() -> None:
    grid = Recorded(quickstart(), 3)
    assert RoundStrategy().start(grid, START, num_rounds=0).evaluate_metrics_clientapp == {}
    assert grid.sent == []


def test_a_stock_app_without_an_evaluate_handler_trains_all_the_same() -> None:
    app = quickstart()
    app._registered_funcs.pop("evaluate.default")
    result = RoundStrategy().start(LocalGrid(app, 3), START, num_rounds=2, train_config=LR)
    assert w_of(result) == [2.25, 1.5]
    assert dict(result.evaluate_metrics_clientapp[2]) == {}


def test_a_stock_torch_model_keeps_its_layers_and_its_buffers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        step = float(context.node_config["partition-id"])  # type: ignore[arg-type]
        moved = {k: v + (step if v.is_floating_point() else 100) for k, v in state.items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

    initial = ArrayRecord(model.state_dict())
    result = RoundStrategy().start(LocalGrid(app, 3), initial, num_rounds=1)
    found, base = result.arrays.to_torch_state_dict(), model.state_dict()
    assert list(found) == list(base)
    assert found["1.num_batches_tracked"] == 0, "an integer buffer is the base's"
    assert torch.allclose(found["0.weight"], base["0.weight"] + 1, atol=1e-6)
    model.load_state_dict(found)


# ---------------------------------------------------------------- liars


def changed(**metrics: Any) -> Callable[[RecordDict], RecordDict]:
    def lie(content: RecordDict) -> RecordDict:
        content["metrics"] = MetricRecord({**dict(content.metric_records["metrics"]), **metrics})
        return content

    return lie


def other_arrays(arrays: dict[str, Any]) -> Callable[[RecordDict], RecordDict]:
    def lie(content: RecordDict) -> RecordDict:
        content["arrays"] = wire.to_record(arrays)
        return content

    return lie


def emptied(content: RecordDict) -> RecordDict:
    return RecordDict()


RAISE = {
    "another key": other_arrays({"v": np.zeros(2, np.float32)}),
    "another shape": other_arrays({"w": np.zeros(3, np.float32)}),
    "an empty reply": emptied,
    "another metric": changed(bonus=1.0),
}
POISON = {
    "NaN params": other_arrays({"w": np.full(2, np.nan, np.float32)}),
    "NaN examples": changed(**{"num-examples": float("nan")}),
    "1e12 examples": changed(**{"num-examples": 10**12}),
}


def fedavg() -> FedAvg:
    return FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3)


@pytest.mark.parametrize("lie", RAISE.values(), ids=RAISE.keys())
def test_a_liar_that_ends_flowers_run_does_not_end_ours(lie: Callable[[RecordDict], Any]) -> None:
    with pytest.raises(Exception):  # noqa: B017  whatever it is: it ends the run
        fedavg().start(LocalGrid(quickstart(lie), 3), START, num_rounds=1, train_config=LR)
    survives(lie)


@pytest.mark.parametrize("lie", POISON.values(), ids=POISON.keys())
def test_a_liar_that_poisons_flowers_model_does_not_poison_ours(lie: Callable[[RecordDict], Any]) -> None:
    result = fedavg().start(LocalGrid(quickstart(lie), 3), START, num_rounds=1, train_config=LR)
    # honest by count: (10 * (0.5, 0) + 20 * (1, 2) + 30 * (3, 1)) / 60
    assert not np.allclose(w_of(result), [115 / 60, 70 / 60], atol=0.1)
    survives(lie)


def survives(lie: Callable[[RecordDict], Any]) -> None:
    committed: list[RoundRecord] = []
    strategy = RoundStrategy(commit=lambda state, record: committed.append(record))
    result = strategy.start(LocalGrid(quickstart(lie), 3), START, num_rounds=1, train_config=LR)
    if lie is RAISE["another metric"]:  # a stock app may report what it likes: nobody is refused
        assert w_of(result) == [1.5, 1.0]
        return
    assert w_of(result) == [1.75, 0.5]  # the mean of nodes 0 and 2 alone: ((0.5, 0) + (3, 1)) / 2
    assert len(committed[0].refusals) == 1
    assert len(committed[0].answered) == 2


def test_links_that_lose_and_delay_replies_are_survived_in_virtual_time() -> None:
    delays = (1.0, float("inf"), 2.0)
    grid = LocalGrid(quickstart(), 3, delay_s=lambda index, message, reply: delays[index])
    # the others' mean target is (3.5, 1): half the way, and half of the rest
    assert w_of(RoundStrategy().start(grid, START, 2, timeout=60, train_config=LR)) == [2.625, 0.75]


# ---------------------------------------------------------------- Flower's own loop


def test_flowers_own_loop_drives_our_strategy_to_the_same_model() -> None:
    for options in ({}, {"server_optimizer": momentum(beta=0.5)}):
        ours = RoundStrategy(**options).start(LocalGrid(quickstart(), 3), START, 3, train_config=LR)
        grid = LocalGrid(quickstart(), 3)
        theirs = Strategy.start(RoundStrategy(clock=grid.clock, **options), grid, START, 3, train_config=LR)
        assert w_of(theirs) == w_of(ours)
        assert theirs.train_metrics_clientapp.keys() == ours.train_metrics_clientapp.keys() == {1, 2, 3}
        for round_ in (1, 2, 3):
            ours_loss = ours.train_metrics_clientapp[round_]["train_loss"]
            assert theirs.train_metrics_clientapp[round_]["train_loss"] == pytest.approx(ours_loss)
        # Flower's loop evaluates after every round, ours once at the end
        assert set(theirs.evaluate_metrics_clientapp) == {1, 2, 3}
        assert dict(theirs.evaluate_metrics_clientapp[3]) == pytest.approx(dict(ours.evaluate_metrics_clientapp[3]))


def test_flowers_own_loop_keeps_its_arrays_when_a_round_closes() -> None:
    grid = LocalGrid(quickstart(RAISE["another shape"]), 3)
    strategy = RoundStrategy(clock=grid.clock, min_replies=3)
    result = Strategy.start(strategy, grid, START, 2, train_config=LR)
    assert len(result.arrays) == 0, "no round gave arrays"
    assert result.train_metrics_clientapp == {}
    assert set(result.evaluate_metrics_clientapp) == {1, 2}


def test_a_strategy_used_twice_starts_afresh() -> None:
    grid = LocalGrid(quickstart(), 3)
    strategy = RoundStrategy(clock=grid.clock, server_optimizer=momentum(beta=0.9))
    first, second = (w_of(Strategy.start(strategy, grid, START, 2, train_config=LR)) for _ in range(2))
    assert first == second


def test_replies_before_their_question_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregate_train\(1\) came before configure_train\(1\)"):
        RoundStrategy().aggregate_train(1, [])


def test_an_exchange_of_several_messages_cannot_run_in_flowers_loop() -> None:
    class Other:
        def collect(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

    grid = LocalGrid(quickstart(), 3)
    with pytest.raises(ConfigError, match="call `start`"):
        Strategy.start(RoundStrategy(clock=grid.clock, exchange=Other()), grid, START, 1)


# ---------------------------------------------------------------- Flower's strategy, our app


def test_flowers_fedavg_trains_our_client_app() -> None:
    config = load(["data=synthetic", "sector.training.epochs=1"])
    sector = build.build_sector(config)
    grid = LocalGrid(our_app, 3)
    registry.enrol(grid, door(grid, grid.clock), config, store="")
    start = initial_arrays(sector, config.seed)
    told = ConfigRecord({"node-config": node_config(NodeTask.of(config))})
    result = fedavg().start(grid, wire.to_record(start), 5, train_config=told, evaluate_config=told)
    losses = [result.evaluate_metrics_clientapp[r]["val/loss"] for r in range(1, 6)]
    assert losses[-1] < 0.7 * losses[0]  # type: ignore[operator]
    assert set(result.train_metrics_clientapp) == {1, 2, 3, 4, 5}
    assert set(result.arrays) == set(start)
    assert digest(wire.from_record(result.arrays)) != digest(start)


def test_our_strategy_and_flowers_fedavg_agree_on_our_app(tmp_path: Path) -> None:
    # both average the same params, ours by deltas and Flower's by params
    config = load(["data=synthetic", "sector.training.epochs=1", "sector.training.max_examples=10"])
    sector = build.build_sector(config)
    start = initial_arrays(sector, config.seed)

    def enrolled(store: str) -> tuple[LocalGrid, Any]:
        grid = LocalGrid(our_app, 3)
        return grid, registry.enrol(grid, door(grid, grid.clock), config, store=store)

    grid, nodes = enrolled(str(tmp_path))
    ours = build.strategy(config, sector, clock=grid.clock, commit=lambda state, record: None)
    after, record = ours.round(ServerState(run="r", round=0, params=start), nodes, door(grid, grid.clock))
    assert set(record.num_examples.values()) == {10}, "FedAvg weighs by count: here all the same"

    grid, _ = enrolled("")
    told = ConfigRecord({"node-config": node_config(NodeTask.of(config))})
    theirs = fedavg().start(grid, wire.to_record(start), 1, train_config=told, evaluate_config=told)
    for name, value in wire.from_record(theirs.arrays).items():
        assert np.allclose(value, after.params[name], atol=1e-6)

    # and our own strategy by Flower's convention, params instead of deltas
    grid, _ = enrolled("")
    stock = RoundStrategy(exchange=PlainExchange(native=False)).start(grid, wire.to_record(start), 1, train_config=told)
    for name, value in wire.from_record(stock.arrays).items():
        assert np.allclose(value, after.params[name], atol=1e-6)
