"""The one Strategy: what a round does with rows, time, strangers and too few replies."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from experiments.engines.local import LocalGrid
from strategies import rules, samplers, server_optimizers
from strategies.exchange import PlainExchange, StoppedClock, WallClock, door
from strategies.flower import RoundStrategy, fresh_secret
from strategies.records import Scoring
from strategies.rows import Rows
from trellis import wire
from trellis.errors import ConfigError
from trellis.types import (
    Aggregated,
    Counts,
    MetricSpec,
    NodeInfo,
    PreAggregatorSpec,
    Role,
    RoundRecord,
    RoundView,
    RuleSpec,
    ServerState,
)
from trellis.vectors import TensorSpec, digest

BASE = {"w": np.array([1.0, 2.0, 3.0], np.float32), "n": np.array(5, np.int64)}
STEPS = {"loss_sum": TensorSpec("loss_sum", (), "float64"), "rows": TensorSpec("rows", (), "int64")}
START = ServerState(run="r", round=0, params=BASE)


def node_app(step: Callable[[int], Any] = lambda i: np.full(3, i, np.float32), raises: Sequence[int] = ()) -> ClientApp:
    """Node i replies the delta step(i), natively; on 10 * (i + 1) rows it loses 1 a row."""
    app = ClientApp()

    def counts(index: int, splits: Iterable[str]) -> dict[str, Counts]:
        rows = 10 * (index + 1)
        return {s: {"loss_sum": np.asarray(float(rows)), "rows": np.asarray(rows, np.int64)} for s in splits}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if index in raises:
            raise RuntimeError("no")
        request = wire.read_request(message)
        assert request is not None
        delta = {"w": np.asarray(step(index), np.float32)}
        content = wire.reply_content(
            request=request, arrays=delta, num_examples=index, metrics={"train/loss": float(index)},
            counts=counts(index, request.splits),
        )  # fmt: skip
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = wire.read_request(message)
        assert request is not None
        found = counts(int(context.node_config["partition-id"]), request.splits)
        content = wire.reply_content(request=request, arrays=None, num_examples=0, metrics={}, counts=found)
        return Message(content, reply_to=message)

    return app


class Recorded(LocalGrid):
    """A LocalGrid that writes down what is sent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: list[tuple[str, int]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent += [(m.metadata.message_type, self._index[m.metadata.dst_node_id]) for m in messages]
        return super().push_messages(messages)


def federation(grid: LocalGrid, **each: Sequence[Any]) -> list[NodeInfo]:
    ids = list(grid.get_node_ids())
    return [NodeInfo(f"node-{i}", ids[i], **{k: v[i] for k, v in each.items()}) for i in range(len(ids))]


def strategy(grid: LocalGrid, timeout_s: float = 60.0, **options: Any) -> RoundStrategy:
    exchange = PlainExchange(timeout_s=timeout_s, counts=STEPS, metrics=frozenset({"train/loss"}))
    return RoundStrategy(exchange=exchange, clock=grid.clock, **options)


def play(
    grid: LocalGrid, state: ServerState = START, nodes: list[NodeInfo] | None = None, **options: Any
) -> tuple[ServerState, RoundRecord]:
    return strategy(grid, **options).round(state, nodes or federation(grid), door(grid, grid.clock))


# ---------------------------------------------------------------- a round by hand


def test_a_round_moves_the_model_by_the_mean_of_the_updates() -> None:
    state, record = play(LocalGrid(node_app(), 3))
    assert state.round == 1
    assert state.params["w"].tolist() == [2.0, 3.0, 4.0]
    assert state.params["n"] == 5
    assert record.asked == record.answered == ("node-0", "node-1", "node-2")
    assert record.update_norms == {f"node-{i}": pytest.approx(i * 3**0.5) for i in range(3)}
    assert record.aggregate_norm == pytest.approx(3**0.5)
    assert record.num_examples == {"node-0": 0, "node-1": 1, "node-2": 2}
    assert record.base_metrics["train/loss"] == 1.0
    assert (record.base_digest, record.digest) == (digest(BASE), digest(state.params))
    assert record.weights == pytest.approx({f"node-{i}": 1 / 3 for i in range(3)})
    assert record.closed is None
    assert record.bytes_up > 0
    assert record.bytes_down > 0
    assert BASE["w"].tolist() == [1.0, 2.0, 3.0]


def test_weights_are_those_of_the_registry_never_those_that_nodes_declare() -> None:
    grid = LocalGrid(node_app(), 3)
    state, record = play(grid, nodes=federation(grid, num_examples=[100, 50, 50]), weighted=True)
    assert state.params["w"].tolist() == [1.75, 2.75, 3.75]  # (0 * 100 + 1 * 50 + 2 * 50) / 200
    assert record.weights == {"node-0": 0.5, "node-1": 0.25, "node-2": 0.25}


def test_a_node_that_registered_no_rows_weighs_nothing() -> None:
    grid = LocalGrid(node_app(), 3)
    nodes = [replace(n, num_examples=10 * i) for i, n in enumerate(federation(grid))]
    _, record = play(grid, nodes=nodes, weighted=True)
    assert record.weights == {"node-0": 0.0, "node-1": pytest.approx(1 / 3), "node-2": pytest.approx(2 / 3)}


def test_a_round_whose_nodes_all_weigh_nothing_closes() -> None:
    grid = LocalGrid(node_app(), 1)
    state, record = play(grid, nodes=federation(grid, num_examples=[0]), weighted=True)
    assert record.closed is not None
    assert "registered no rows" in record.closed
    assert digest(state.params) == digest(BASE)


def test_the_server_optimizer_takes_the_step_and_its_memory_is_kept() -> None:
    grid = LocalGrid(node_app(lambda i: np.ones(3)), 2)
    momentum = server_optimizers.momentum(lr=1.0, beta=0.5)
    first, _ = play(grid, server_optimizer=momentum)
    second, _ = play(grid, first, server_optimizer=momentum)
    assert first.params["w"].tolist() == [2, 3, 4]
    assert second.params["w"].tolist() == [3.5, 4.5, 5.5]
    assert second.optimizer["m"].tolist() == [1.5] * 3


# ---------------------------------------------------------------- order


def test_twenty_orders_of_arrival_give_one_model() -> None:
    def digest_when(delays: list[float]) -> str:
        def delay(index: int, message: Message, reply: Message) -> float:
            return delays[index]

        rough = np.random.default_rng(5).normal(size=(8, 3)) * 10.0 ** np.arange(-4, 4)[:, None]
        grid = LocalGrid(node_app(lambda i: rough[i]), 8, delay_s=delay)
        return digest(play(grid)[0].params)

    orders = [random.Random(seed).sample([float(t) for t in range(8)], 8) for seed in range(20)]
    assert len({tuple(o) for o in orders}) == 20
    assert len({digest_when(o) for o in orders}) == 1


def test_node_ids_change_nothing() -> None:
    # every LocalGrid draws new ids
    assert len({digest(play(LocalGrid(node_app(), 5))[0].params) for _ in range(5)}) == 1


# ---------------------------------------------------------------- quorum


@pytest.mark.parametrize(("min_replies", "closes"), [(1, False), (2, False), (3, True)])
def test_too_few_good_replies_close_the_round_and_the_model_stays(min_replies: int, closes: bool) -> None:
    state, record = play(LocalGrid(node_app(raises=[1]), 3), min_replies=min_replies)
    assert state.round == 1
    assert (digest(state.params) == digest(BASE)) is closes
    assert (record.closed is not None) is closes
    assert [(r.node, r.reason) for r in record.refusals] == [("node-1", "error_reply")]
    if closes:
        assert "2 good replies, 3 are needed" in str(record.closed)
        assert record.base_digest == record.digest
        assert record.aggregate_norm == 0
        assert record.weights == {}


def test_a_rule_that_needs_more_rows_closes_the_round() -> None:
    hungry = RuleSpec("hungry", lambda updates_nd, **_: updates_nd.mean(0), min_rows=lambda f: 2 * f + 3)
    _, record = play(LocalGrid(node_app(), 4), rule=hungry, num_byzantine=1)
    assert record.closed is not None
    assert "4 good replies, 5 are needed" in record.closed
    assert "hungry" in record.closed
    assert play(LocalGrid(node_app(), 5), rule=hungry, num_byzantine=1)[1].closed is None


@pytest.mark.parametrize("error", [ValueError("no"), ZeroDivisionError(), np.linalg.LinAlgError("singular")])
def test_rows_that_a_rule_cannot_digest_close_the_round_and_not_the_run(error: Exception) -> None:
    def choking(updates_nd: Any, **_: Any) -> Any:
        raise error

    rule = RuleSpec("choking", choking, min_rows=lambda f: 1)
    state, record = play(LocalGrid(node_app(), 3), rule=rule)
    assert f"rule=choking failed: {type(error).__name__}" in str(record.closed)
    assert digest(state.params) == digest(BASE)


def test_a_dropout_does_not_end_a_run_that_selects_a_number_of_rows() -> None:
    options: dict[str, Any] = {"rule": rules.get("multi_krum"), "rule_options": {"num_selected": 5}, "num_byzantine": 1}
    _, record = play(LocalGrid(node_app(), 6), **options)
    assert sum(w > 0 for w in record.weights.values()) == 5
    _, record = play(LocalGrid(node_app(raises=[2]), 6), **options)
    assert record.closed is None
    assert sum(w > 0 for w in record.weights.values()) == 4


def test_what_a_rule_draws_follows_from_the_seed_and_the_servers_secret() -> None:
    drawn: list[float] = []

    def drawing(updates_nd: Any, *, rng: np.random.Generator, **_: Any) -> Any:
        drawn.append(rng.random())
        return updates_nd[0]

    rule = RuleSpec("drawing", drawing, min_rows=lambda f: 1, needs=("rng",))
    for secret in ("", "", "a", "b"):
        play(LocalGrid(node_app(), 2), replace(START, secret=secret), rule=rule)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_a_run_has_a_secret_of_its_own_where_it_is_not_simulated() -> None:
    class Deployed:
        """A Grid that keeps no time of its own."""

    assert fresh_secret(LocalGrid(node_app(), 1)) == ""
    first, second = (fresh_secret(Deployed()) for _ in range(2))  # type: ignore[arg-type]
    assert len(first) == 64
    assert first != second


def test_a_round_that_nobody_can_be_asked_in_closes() -> None:
    grid = LocalGrid(node_app(), 3)
    nodes = federation(grid, availability=[1e-12] * 3)
    state, record = play(grid, nodes=nodes, sampler=samplers.by_availability())
    assert (record.asked, record.answered, state.round) == ((), (), 1)
    assert record.closed is not None


def test_a_closed_round_keeps_the_optimizers_memory_and_the_next_one_goes_on() -> None:
    grid = LocalGrid(node_app(), 3)
    momentum = server_optimizers.momentum()
    first, _ = play(grid, server_optimizer=momentum)
    closed, record = play(grid, first, server_optimizer=momentum, min_replies=9)
    assert record.closed
    assert closed.optimizer is first.optimizer
    third, record = play(grid, closed, server_optimizer=momentum)
    assert record.closed is None
    assert third.round == 3


def test_a_step_to_infinity_is_not_taken() -> None:
    def explode(state: Any, aggregate_d: Any) -> tuple[Any, Any]:
        return {"m": aggregate_d}, np.full(3, np.inf)

    state, record = play(LocalGrid(node_app(), 2), server_optimizer=explode)
    assert record.closed is not None
    assert "NaN or infinite" in record.closed
    assert digest(state.params) == digest(BASE)
    assert state.optimizer == {}


# ---------------------------------------------------------------- configuration


def test_liars_are_not_tolerated_by_a_rule_that_tolerates_none() -> None:
    with pytest.raises(ConfigError, match="num_byzantine=2"):
        RoundStrategy(num_byzantine=2)


def test_a_rule_that_needs_what_the_run_does_not_have_is_refused() -> None:
    rule = RuleSpec("rooted", lambda updates_nd, **_: updates_nd[0], min_rows=lambda f: 1, needs=("reference_d",))
    with pytest.raises(ConfigError, match=r"rule=rooted needs \['reference_d'\]"):
        play(LocalGrid(node_app(), 2), rule=rule)


def test_a_rule_gets_exactly_what_it_needs() -> None:
    seen: list[dict[str, Any]] = []

    def fn(updates_nd: Any, **given: Any) -> Aggregated:
        seen.append(given)
        return Aggregated(updates_nd.mean(0), state={"count": np.asarray(len(seen))})

    rule = RuleSpec("curious", fn, min_rows=lambda f: 1, needs=("rng", "names", "state", "weights"))
    grid = LocalGrid(node_app(), 2)
    first, _ = play(grid, rule=rule, num_byzantine=1, rule_options={"k": 3})
    second, _ = play(grid, first, rule=rule, rule_options={"k": 3})
    assert set(seen[0]) == {"rng", "names", "state", "weights", "num_byzantine", "k"}
    assert seen[0]["names"] == [("node-0",), ("node-1",)]
    assert (seen[0]["num_byzantine"], seen[0]["k"], seen[0]["weights"], seen[0]["state"]) == (1, 3, None, {})
    assert seen[1]["state"] == {"count": 1}
    assert second.rule == {"count": 2}
    # the same round draws the same, another round draws anew
    play(grid, rule=rule, rule_options={"k": 3})
    draws = [given["rng"].random() for given in seen]
    assert draws[0] == draws[2] != draws[1]


def test_preaggregators_stand_before_the_rule_in_their_order() -> None:
    def doubled(rows: Rows, *, num_byzantine: int) -> Rows:
        return rows.combined(2 * np.eye(3))

    def last_two(rows: Rows, *, num_byzantine: int) -> Rows:
        return rows.combined(np.array([[0, 1, 0], [0, -1, 2]]))

    def of(fn: Any, num_rows: int) -> PreAggregatorSpec:
        return PreAggregatorSpec(fn.__name__, fn, num_rows=lambda n: num_rows)

    state, record = play(LocalGrid(node_app(), 3), preaggregators=(of(doubled, 3), of(last_two, 2)))
    # rows 0, 1, 2 become 0, 2, 4, then 2 and -2 + 8; their mean is 4
    assert (state.params["w"] - BASE["w"]).tolist() == [4.0] * 3
    assert record.weights == {"node-0": 0.0, "node-1": 0.0, "node-2": 2.0}


# ---------------------------------------------------------------- time


def slow(index_late: int, seconds: float) -> Callable[[int, Message, Message], float]:
    return lambda index, message, reply: seconds if index == index_late else 1.0


@pytest.mark.parametrize(("seconds", "late"), [(59.0, False), (60.0, True), (61.0, True), (float("inf"), True)])
def test_a_slow_node_is_late_and_a_lost_reply_too(seconds: float, late: bool) -> None:
    _, record = play(LocalGrid(node_app(), 3, delay_s=slow(1, seconds)))
    assert [(r.node, r.reason) for r in record.refusals] == ([("node-1", "late")] if late else [])
    assert record.answered == (("node-0", "node-2") if late else ("node-0", "node-1", "node-2"))


@pytest.mark.parametrize("seconds", [61.0, 150.0, 1e6, float("inf")])
def test_a_node_that_is_late_every_round_costs_the_others_nothing(seconds: float) -> None:
    grid = LocalGrid(node_app(), 3, delay_s=slow(1, seconds))
    state = START
    for _ in range(4):
        state, record = play(grid, state)
        assert record.answered == ("node-0", "node-2")
        assert [(r.node, r.reason) for r in record.refusals] == [("node-1", "late")]
    assert state.params["w"].tolist() == [5.0, 6.0, 7.0]


def test_virtual_time_passes_as_far_as_the_deadline_and_no_further() -> None:
    grid = LocalGrid(node_app(), 3, delay_s=slow(1, 1e6))
    play(grid)
    assert grid.clock.now() == 60.0
    on_time = LocalGrid(node_app(), 3, delay_s=slow(1, 7.0))
    play(on_time)
    assert on_time.clock.now() == 7.0


def test_results_do_not_depend_on_how_long_computing_takes() -> None:
    def dawdling(index: int) -> Any:
        time.sleep(0.02 * index)
        return np.full(3, index)

    # with no link delay a deadline of a hundredth of a second is never missed, however slow the machine
    _, record = play(LocalGrid(node_app(dawdling), 4), timeout_s=0.01)
    assert len(record.answered) == 4


def test_the_wall_clock_does_not_sleep_beyond_its_deadline() -> None:
    clock = WallClock()
    started = clock.now()
    clock.sleep(30.0, until=started + 0.01)
    clock.sleep(30.0, until=started - 1.0)
    assert 0.01 <= clock.now() - started < 20
    assert StoppedClock().now() == StoppedClock().now() == 0.0


# ---------------------------------------------------------------- duplicates and strangers


def test_a_duplicate_and_a_stranger_are_recorded_and_change_nothing() -> None:
    grid = LocalGrid(node_app(), 4)
    nodes = federation(grid)

    def doubled(messages: Sequence[Message], timeout_s: float) -> Any:
        stray = Message(messages[0].content, nodes[3].node_id, "train")
        for reply in door(grid, grid.clock)([*messages, stray], timeout_s):
            yield reply
            if reply.metadata.src_node_id == nodes[1].node_id:
                yield reply

    state, record = strategy(grid).round(START, nodes[:3], doubled)
    clean, _ = play(grid, nodes=nodes[:3])
    assert digest(state.params) == digest(clean.params)
    assert sorted((r.node, r.reason) for r in record.refusals) == [
        (f"id {nodes[3].node_id}", "unknown_node"),
        ("node-1", "duplicate"),
    ]
    assert record.asked == ("node-0", "node-1", "node-2")


def test_of_two_replies_the_first_counts_even_if_it_is_bad() -> None:
    grid = LocalGrid(node_app(), 2)

    def bad_first(messages: Sequence[Message], timeout_s: float) -> Any:
        for reply in door(grid, grid.clock)(messages, timeout_s):
            empty = Message(RecordDict(), reply_to=messages[0])
            empty.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
            yield empty
            yield reply

    _, record = strategy(grid).round(START, federation(grid), bad_first)
    assert Counter(r.reason for r in record.refusals) == {"wrong_request": 2, "duplicate": 2}
    assert record.closed is not None


def test_the_door_lets_one_reply_a_message_through() -> None:
    class Echoing(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            return [*replies, *replies]

    grid = Echoing(node_app(), 3)
    _, record = play(grid)
    assert record.refusals == ()
    assert len(record.answered) == 3


# ---------------------------------------------------------------- observers


def test_observers_see_the_round_and_keep_their_state() -> None:
    views: list[RoundView] = []

    def suspicion(state: Any, view: RoundView) -> tuple[Any, Mapping[str, float]]:
        views.append(view)
        seen = [*(state or []), [row.members[0] for row in view.rows]]
        return seen, {"rounds": float(len(seen))}

    grid = LocalGrid(node_app(raises=[2]), 3)
    first, record = play(grid, observers={"suspicion": suspicion})
    second, later = play(grid, first, observers={"suspicion": suspicion}, min_replies=3)
    assert (record.findings, later.findings) == ({"suspicion/rounds": 1.0}, {"suspicion/rounds": 2.0})
    assert second.observers == {"suspicion": [["node-0", "node-1"]] * 2}
    assert [v.round for v in views] == [1, 2]
    assert views[0].aggregated is not None
    assert views[1].aggregated is None, "the second round closed: there was nothing to look at but its rows"
    assert [r.node for r in views[0].refusals] == ["node-2"]
    assert views[0].base is BASE


# ---------------------------------------------------------------- evaluation rides on training

SCORING = Scoring(lambda counts: {"loss": float(counts["loss_sum"]) / float(counts["rows"])}, MetricSpec("loss", "min"))


def test_a_run_sends_one_message_a_node_and_round_and_one_closing_evaluation() -> None:
    grid = Recorded(node_app(), 3)
    committed: list[RoundRecord] = []
    s = strategy(grid, scoring=SCORING, commit=lambda state, record: committed.append(record))
    state = s.run(grid, START, federation(grid), rounds=4)
    assert Counter(grid.sent) == {("train", i): 4 for i in range(3)} | {("evaluate", i): 1 for i in range(3)}
    assert [kind for kind, _ in grid.sent[-3:]] == ["evaluate"] * 3
    rounds = [(r.round, r.purpose) for r in committed]
    assert rounds == [(1, "train"), (2, "train"), (3, "train"), (4, "train"), (5, "evaluate")]
    assert state.round == 4
    assert committed[-1].base_digest == committed[-1].digest == digest(state.params)
    assert "test/loss" in committed[-1].base_metrics
    assert all("val/loss" in r.base_metrics for r in committed)


def test_metrics_are_those_of_the_params_that_were_sent() -> None:
    state, record = play(LocalGrid(node_app(), 3), scoring=SCORING)
    assert record.base_metrics["val/loss"] == 1.0
    assert state.best is not None
    assert (state.best.round, state.best.digest) == (0, digest(BASE))


def test_held_out_nodes_judge_and_never_train() -> None:
    grid = Recorded(node_app(), 4)
    nodes = federation(grid, role=[Role.train, Role.train, Role.validation, Role.test], max_examples=[9, 9, 0, 0])
    state = strategy(grid, scoring=SCORING).run(grid, START, nodes, rounds=2)
    assert Counter(grid.sent) == {
        ("train", 0): 2, ("train", 1): 2, ("evaluate", 2): 3, ("evaluate", 3): 1
    }  # fmt: skip
    assert (state.params["w"] - BASE["w"]).tolist() == [1.0] * 3


def test_a_judge_is_believed_though_it_registered_no_rows_to_train_on() -> None:
    grid = LocalGrid(node_app(), 2)
    nodes = federation(grid, role=[Role.train, Role.validation], max_examples=[9, 0])
    _, record = play(grid, nodes=nodes, scoring=SCORING)
    assert record.refusals == ()
    assert record.answered == ("node-0", "node-1")


def test_the_best_version_is_chosen_by_validation_and_in_the_metrics_direction() -> None:
    def scored(direction: Any) -> list[int]:
        values = [3.0, 1.0, 2.0]
        scoring = Scoring(lambda counts: {"loss": values[state.round]}, MetricSpec("loss", direction))
        grid = LocalGrid(node_app(), 2)
        state, best = START, []
        for _ in range(3):
            state, _ = play(grid, state, scoring=scoring)
            assert state.best is not None
            best.append(state.best.round)
        return best

    assert scored("min") == [0, 1, 1]
    assert scored("max") == [0, 0, 0]


# ---------------------------------------------------------------- resuming


def test_a_run_continued_from_any_state_ends_the_same() -> None:
    options: dict[str, Any] = {
        "sampler": samplers.uniform(fraction=0.5),
        "server_optimizer": server_optimizers.adam(),
    }

    def run(state: ServerState, rounds: int) -> ServerState:
        grid = LocalGrid(node_app(), 6)
        return strategy(grid, **options).run(grid, state, federation(grid), rounds=rounds)

    whole = run(START, 5)
    for stop in (1, 3):
        assert digest(run(run(START, stop), 5).params) == digest(whole.params)


def test_the_seed_decides_who_is_asked() -> None:
    def asked(seed: int) -> list[tuple[str, ...]]:
        grid = LocalGrid(node_app(), 8)
        state, found = replace(START, seed=seed), []
        for _ in range(5):
            state, record = play(grid, state, sampler=samplers.uniform(fraction=0.3))
            found.append(record.asked)
        return found

    assert asked(0) == asked(0) != asked(1)
    assert len(set(asked(0))) > 1
