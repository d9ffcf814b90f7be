"""The local engine keeps the semantics of Flower's own: contents, contexts, errors, time, and one result in any number
of processes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from experiments.engines.local import LocalGrid, load_app
from experiments.simulate import simulate
from strategies.exchange import door
from trellis.errors import ConfigError

CRASHING = "crashing_apps:app"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Worker processes import the app by name; they inherit `sys.path` and PYTHONPATH."""
    here, before = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = here
    yield
    sys.path.remove(here)
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def grid_of(train: Callable[[Message, Context], Any], num_nodes: int = 3, **options: Any) -> LocalGrid:
    app = ClientApp()
    app.train()(train)
    return LocalGrid(app, num_nodes, **options)


def content(**values: Any) -> RecordDict:
    return RecordDict({"config": ConfigRecord(values)})


def to_all(grid: LocalGrid, what: RecordDict | None = None, kind: str = "train") -> list[Message]:
    return [Message(what or content(), node_id, kind) for node_id in grid.get_node_ids()]


def by_node(grid: LocalGrid, replies: Any) -> dict[int, Message]:
    order = list(grid.get_node_ids())
    return {order.index(r.metadata.src_node_id): r for r in replies}


def echo(message: Message, context: Context) -> Message:
    return Message(content(node=context.node_config["partition-id"]), reply_to=message)


# ---------------------------------------------------------------- messages


def test_every_message_gets_the_reply_of_its_node() -> None:
    grid = grid_of(echo)
    messages = to_all(grid)
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 3
    replies = list(door(grid, grid.clock)(to_all(grid), 10))
    assert {i: r.content.config_records["config"]["node"] for i, r in by_node(grid, replies).items()} == {
        0: 0, 1: 1, 2: 2
    }  # fmt: skip


def test_nodes_that_come_last_are_computed_after_all_others() -> None:
    computed: list[Any] = []

    def train(message: Message, context: Context) -> Message:
        computed.append(context.node_config["partition-id"])
        return echo(message, context)

    grid = grid_of(train, 4, last={0, 2})
    messages = to_all(grid)
    replies = by_node(grid, door(grid, grid.clock)(messages, 10))
    assert computed == [1, 3, 0, 2]
    assert set(replies) == {0, 1, 2, 3}


def test_an_app_may_be_made_by_a_function() -> None:
    made = ClientApp()
    assert load_app(lambda: made) is made


def test_replies_stream_one_at_a_time() -> None:
    computed: list[int] = []

    def train(message: Message, context: Context) -> Message:
        computed.append(int(context.node_config["partition-id"]))
        return echo(message, context)

    grid = grid_of(train)
    replies = door(grid, grid.clock)(to_all(grid), 10)
    next(replies)
    assert len(computed) == 1
    assert len(list(replies)) == 2


def test_a_reply_is_pulled_once_and_only_by_its_own_id() -> None:
    grid = grid_of(echo)
    first, second, _ = grid.push_messages(to_all(grid))
    for _ in range(3):
        list(grid.pull_messages([]))
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([second])] == [second]
    assert list(grid.pull_messages([second])) == []
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages([first, second])] == [first]


def test_node_ids_are_random_and_partitions_are_not() -> None:
    one, two = grid_of(echo, 50), grid_of(echo, 50)
    assert set(one.get_node_ids()).isdisjoint(two.get_node_ids())
    assert len(list(one.get_nodes())) == 50
    assert [c.node_config["partition-id"] for c in one._contexts.values()] == list(range(50))


def test_a_node_cannot_change_what_others_receive() -> None:
    seen: list[dict[str, Any]] = []

    def vandal(message: Message, context: Context) -> Message:
        arrays, config = message.content.array_records["arrays"], message.content.config_records["config"]
        seen.append({
            "arrays": {k: a.numpy().tolist() for k, a in arrays.items()}, "config": dict(config),
            "list": list(config["list"]), "metrics": list(message.content.metric_records["metrics"]["m"]),  # type: ignore[arg-type]
            "records": sorted(message.content),
        })  # fmt: skip
        config["list"].append(9)  # type: ignore[union-attr]
        config["lr"] = 0.0
        message.content.metric_records["metrics"]["m"].append(9)  # type: ignore[union-attr]
        arrays["w"].data = b"gone"
        arrays["w"].shape = (0,)
        del arrays["b"]
        message.content["more"] = ConfigRecord({})
        return echo(message, context)

    what = RecordDict(
        {
            "arrays": ArrayRecord(
                [np.ones(2, np.float32)]
            ),
            "config": ConfigRecord({"lr": 0.5, "list": [1, 2]}),
            "metrics": MetricRecord({"m": [1, 2]}),
        }
    )  # fmt: skip
    what["arrays"] = ArrayRecord(dict.fromkeys(("w", "b"), what.array_records["arrays"]["0"]))
    grid = grid_of(vandal)
    replies = list(grid.send_and_receive(to_all(grid, what)))
    assert [r.has_content() for r in replies] == [True] * 3
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["list"] == [1, 2]
    assert what.array_records["arrays"]["w"].numpy().tolist() == [1, 1]
    assert what.config_records["config"]["list"] == [1, 2]


def test_a_node_cannot_change_its_reply_after_it_was_sent() -> None:
    kept: list[ConfigRecord] = []

    def train(message: Message, context: Context) -> Message:
        for earlier in kept:
            earlier["x"] = "changed"
        kept.append(ConfigRecord({"x": "sent"}))
        return Message(RecordDict({"told": kept[-1]}), reply_to=message)

    grid = grid_of(train, delay_s=lambda index, message, reply: 1.0)
    replies = list(grid.send_and_receive(to_all(grid)))
    assert [r.content.config_records["told"]["x"] for r in replies] == ["sent"] * 3


def test_a_node_cannot_reply_in_anothers_name() -> None:
    def forger(message: Message, context: Context) -> Message:
        reply = echo(message, context)
        reply.metadata.__dict__.update(_src_node_id=order[0], _reply_to_message_id="another")
        return reply

    grid = grid_of(forger)
    order = list(grid.get_node_ids())
    replies = list(grid.send_and_receive(to_all(grid)))
    assert sorted(r.metadata.src_node_id for r in replies) == sorted(order)


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize("workers", [1, 2])
def test_a_nodes_context_lives_as_long_as_the_run_and_is_its_own(workers: int) -> None:
    with LocalGrid(CRASHING, 3, workers=workers) as grid:
        order = list(grid.get_node_ids())
        for asked, who in ((1, [0, 1, 2]), (2, [0, 1]), (3, [0])):
            messages = [Message(content(), order[i], "evaluate") for i in who]
            replies = by_node(grid, grid.send_and_receive(messages))
            told = {i: r.content.config_records["told"]["asked"] for i, r in replies.items()}
            assert told == dict.fromkeys(who, asked)
            pids = {r.content.config_records["told"]["pid"] for r in replies.values()}
            assert (pids == {os.getpid()}) is (workers == 1)


def test_a_node_sees_its_partition_and_what_the_run_gives_it() -> None:
    grid = grid_of(echo, 2, node_config=lambda i: {"colour": f"c{i}"}, run_config={"overrides": "x=1"})
    contexts = list(grid._contexts.values())
    assert contexts[1].node_config == {"partition-id": 1, "num-partitions": 2, "simulated": True, "colour": "c1"}
    assert contexts[0].run_config == {"overrides": "x=1"}
    assert {c.run_id for c in contexts} == {grid.run.run_id}


# ---------------------------------------------------------------- errors


def fails(message: Message, context: Context) -> Any:
    match context.node_config["partition-id"]:
        case 0:
            raise ValueError("bad rows")
        case 1:
            sys.exit(3)
        case 2:
            return None
        case 3:
            return "a text"
    return echo(message, context)


def test_an_exception_is_an_error_reply_with_flowers_code() -> None:
    grid = grid_of(fails, 5)
    replies = by_node(grid, grid.send_and_receive(to_all(grid)))
    assert len(replies) == 5
    for i, reason in enumerate(["ValueError: bad rows", "SystemExit", "NoneType", "str"]):
        assert replies[i].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reason in str(replies[i].error.reason)
    assert replies[4].has_content()


def test_a_message_of_a_kind_the_app_lacks_is_an_error_reply() -> None:
    grid = grid_of(echo, 1)
    (reply,) = grid.send_and_receive(to_all(grid, kind="evaluate"))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


@pytest.mark.parametrize("workers", [1, 2])
def test_a_message_to_nobody_is_an_error_reply(workers: int) -> None:
    with LocalGrid(CRASHING, 1, workers=workers) as grid:
        (reply,) = grid.send_and_receive([Message(content(), 12345, "evaluate")])
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


def test_a_keyboard_interrupt_is_the_users() -> None:
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = grid_of(train, 1)
    with pytest.raises(KeyboardInterrupt):
        list(grid.send_and_receive(to_all(grid)))


def test_a_worker_that_dies_costs_its_own_node_only_and_the_run_goes_on() -> None:
    with LocalGrid(CRASHING, 6, workers=2) as grid:
        for asked in (1, 2):
            replies = by_node(grid, grid.send_and_receive(to_all(grid)))
            assert len(replies) == 6
            for i in (1, 2):  # one died, one sent what cannot be sent
                assert replies[i].error.code == ErrorCode.CLIENT_APP_CRASHED
            for i in (0, 3, 4, 5):
                assert replies[i].content.config_records["told"]["asked"] == asked


@pytest.mark.parametrize(
    ("app", "reason"),
    [("no_such_module:app", "cannot be imported"), ("json:dumps", "not a ClientApp"), ("json", "not a ClientApp")],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_app_that_is_none_is_refused_at_once(app: str, reason: str, workers: int) -> None:
    with pytest.raises(ConfigError, match=reason):
        LocalGrid(app, 2, workers=workers)


def test_workers_need_an_app_they_can_import() -> None:
    with pytest.raises(ConfigError, match="module:attribute"):
        grid_of(echo, workers=2)
    app = ClientApp()
    assert load_app(app) is app


# ---------------------------------------------------------------- time


def delays(*seconds: float) -> Callable[[int, Message, Message], float]:
    return lambda index, message, reply: seconds[index]


@pytest.mark.parametrize(
    ("timeout", "arrived", "now"),
    [(None, [0, 1], 30.0), (100.0, [0, 1], 100.0), (30.0, [0, 1], 30.0), (29.0, [0], 29.0), (0.0, [0], 0.0)],
)
def test_send_and_receive_waits_until_the_timeout_in_virtual_time(
    timeout: float | None, arrived: list[int], now: float
) -> None:
    grid = grid_of(echo, 3, delay_s=delays(0.0, 30.0, math.inf))
    replies = by_node(grid, grid.send_and_receive(to_all(grid), timeout=timeout))
    assert sorted(replies) == arrived
    assert grid.clock.now() == now


def test_send_and_receive_ends_when_all_have_answered() -> None:
    grid = grid_of(echo, 3, delay_s=delays(1.0, 3.0, 2.0))
    order = list(grid.get_node_ids())
    replies = list(grid.send_and_receive(to_all(grid), timeout=100.0))
    assert [order.index(r.metadata.src_node_id) for r in replies] == [0, 2, 1]
    assert grid.clock.now() == 3.0


def test_a_lost_reply_does_not_end_time_for_the_next_messages() -> None:
    grid = grid_of(echo, 2, delay_s=delays(1.0, math.inf))
    for round_ in range(1, 4):
        for ask in (lambda m: door(grid, grid.clock)(m, 10.0), lambda m: grid.send_and_receive(m, timeout=10.0)):
            assert sorted(by_node(grid, ask(to_all(grid)))) == [0]
        assert grid.clock.now() == 20.0 * round_


def test_a_late_reply_is_not_taken_for_one_of_the_next_round() -> None:
    grid = grid_of(echo, 2, delay_s=delays(1.0, 15.0))
    for _ in range(3):
        replies = list(door(grid, grid.clock)(to_all(grid), 10.0))
        assert sorted(by_node(grid, replies)) == [0]


# ---------------------------------------------------------------- the real app, whole


def test_one_and_two_worker_processes_give_one_model(tmp_path: Path) -> None:
    def run(workers: int) -> Any:
        return simulate(
            ["data=synthetic", "rounds=2", "tracking=none", f"engine.workers={workers}", f"runs_dir={tmp_path}",
             f"run_name=w{workers}"]
        )  # fmt: skip

    one, two = run(1), run(2)
    assert one.model_digest == two.model_digest
    assert one.metrics == two.metrics
    assert one.refusals == two.refusals == []
    assert one.engine == "local"
