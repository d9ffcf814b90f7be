"""Links and availability in virtual time: seconds and bytes by hand, who is late, and who is away again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from clients import node
from conf.load import load
from conf.schema import LinkConfig, NodeSpec
from experiments.engines.links import Links
from experiments.engines.local import LocalGrid
from experiments.simulate import simulate
from server.folder import RunFolder
from server.run import RunResult
from strategies.exchange import door
from strategies.records import STRAGGLER_FACTOR, stragglers
from trellis import canonical, wire
from trellis.errors import ResumeError
from trellis.types import Collected, Refusal, Request, RoundRecord, Update
from trellis.vectors import digest

SMALL = (
    "sector=healthcare_wisconsin",
    "data=synthetic",
    "sector.options.synthetic_rows=200",
    "sector.options.hidden=[4]",
    "sector.training.epochs=1",
    "tracking=none",
)
NAMES = ("ash", "bay", "cob", "dew")


def nodes(**links: Mapping[str, float]) -> str:
    """The override that makes a federation of NAMES, with what is said of their links."""
    items = []
    for name in NAMES:
        link = ", ".join(f"{k}: {v}" for k, v in links.get(name, {}).items())
        items.append(f"{{name: {name}, link: {{{link}}}}}")
    return f"nodes.items=[{', '.join(items)}]"


@pytest.fixture
def ran(simulated_once: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """`ran(*overrides)`: the small run with them, made once."""
    return partial(simulated_once, *SMALL)


Ran = Callable[..., RunResult]


def records(result: RunResult, purpose: str = "train") -> list[RoundRecord]:
    return [r for r in RunFolder(Path(result.run_dir)).records() if r.purpose == purpose]


def a_request(round_: int = 1, purpose: Any = "train") -> Request:
    return Request("r", round_, purpose, digest({}), {}, ())


def to_node(request: Request | None = None, extra: int = 0) -> Message:
    wire.identify(1, 1)
    content = wire.request_content(wire.to_record({}), request) if request else RecordDict()
    content["more"] = ConfigRecord({"text": "x" * extra})
    message = Message(content, 2, "train")
    message.metadata.__dict__["_message_id"] = "m"
    return message


# ---------------------------------------------------------------- seconds by hand


def test_a_message_takes_the_latency_twice_and_its_bytes_at_the_rates_of_the_link() -> None:
    slow = NodeSpec(name="slow", link=LinkConfig(uplink_mbit_s=1, downlink_mbit_s=8, latency_ms=250))
    links = Links([NodeSpec(name="other"), slow], seed=0)
    question, answer = (RecordDict({"c": ConfigRecord({"k": "x" * (n - 2)})}) for n in (1_000_000, 500_000))
    wire.identify(1, 1)
    message = Message(question, 2, "train")
    message.metadata.__dict__["_message_id"] = "m"
    assert (wire.size_bytes(question), wire.size_bytes(answer)) == (1_000_000, 500_000)
    # there and back 0.5 s; 8 Mbit at 8 Mbit/s; 4 Mbit at 1 Mbit/s
    assert links.delay_s(1, message, Message(answer, reply_to=message)) == pytest.approx(0.5 + 1.0 + 4.0)
    assert links.delay_s(1, message, Message(Error(1, "no"), reply_to=message)) == pytest.approx(0.5 + 1.0)


@given(
    latency=st.floats(0, 1e4),
    up=st.floats(0.01, 1e4),
    down=st.floats(0.01, 1e4),
    size=st.integers(0, 5000),
)
def test_a_faster_link_is_never_slower(latency: float, up: float, down: float, size: int) -> None:
    message = to_node(extra=size)
    reply = Message(RecordDict({"c": ConfigRecord({"k": "y" * size})}), reply_to=message)

    def delay(**changes: float) -> float:
        link = {"latency_ms": latency, "uplink_mbit_s": up, "downlink_mbit_s": down, **changes}
        return Links([NodeSpec(name="n", link=LinkConfig(**link))], seed=0).delay_s(0, message, reply)

    assert delay() >= 2e-3 * latency
    assert delay(latency_ms=latency / 2) <= delay()
    assert delay(uplink_mbit_s=up * 2) <= delay()
    assert delay(downlink_mbit_s=down * 2) <= delay()


UNLIKE = nodes(
    ash={"uplink_mbit_s": 100, "downlink_mbit_s": 500, "latency_ms": 10},
    bay={"uplink_mbit_s": 0.5, "downlink_mbit_s": 2, "latency_ms": 10},
    cob={"uplink_mbit_s": 100, "downlink_mbit_s": 500, "latency_ms": 15},
    dew={"uplink_mbit_s": 20, "downlink_mbit_s": 100, "latency_ms": 19},
)


def test_the_record_has_the_seconds_that_follow_from_the_bytes_of_every_node(ran: Ran) -> None:
    result = ran(UNLIKE, "rounds=2")
    specs = {s.name: s for s in load([*SMALL, UNLIKE]).nodes.expand()}
    for record in (*records(result), *records(result, "evaluate")):
        assert set(record.node_seconds) == set(record.node_bytes) == set(NAMES)
        for name, (down, up) in record.node_bytes.items():
            link = specs[name].link
            seconds = 2e-3 * link.latency_ms + 8e-6 * (down / link.downlink_mbit_s + up / link.uplink_mbit_s)
            assert record.node_seconds[name] == pytest.approx(seconds)
        assert sum(down for down, _ in record.node_bytes.values()) == record.bytes_down
        assert sum(up for _, up in record.node_bytes.values()) == record.bytes_up
        assert all(down > 0 and up > 0 for down, up in record.node_bytes.values())


def test_links_cost_no_real_time_and_change_nothing_that_is_computed(ran: Ran) -> None:
    far = nodes(**{name: {"latency_ms": 250_000} for name in NAMES})
    started = time.monotonic()
    result = ran(far, "rounds=2")
    assert time.monotonic() - started < 60
    assert min(records(result)[0].node_seconds.values()) >= 500
    near = ran(nodes(), "rounds=2", "engine.links=false")
    assert (result.model_digest, result.metrics) == (near.model_digest, near.metrics)
    assert (result.bytes_up, result.bytes_down) == (near.bytes_up, near.bytes_down)
    assert set(records(near)[0].node_seconds.values()) == {0.0}


# ---------------------------------------------------------------- stragglers


def collected(seconds: Mapping[str, float], *, late: tuple[str, ...] = (), away: tuple[str, ...] = ()) -> Collected:
    refusals = (*(Refusal(n, "late", "") for n in late), *(Refusal(n, "unavailable", "") for n in away))
    updates = tuple(Update(n, None, 1, {}) for n in sorted(seconds))
    return Collected(None, (), updates, refusals, 0, 0, {}, {}, {**seconds, **dict.fromkeys(away, 99.0)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "late", "expected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 2.0}, (), ()),
        ({"a": 1.0, "b": 1.0, "c": 2.1}, (), ("c",)),
        ({"a": 1.0, "b": 3.0, "c": 1.0, "d": 1.0}, ("e",), ("b", "e")),
        ({"a": 0.0, "b": 0.0, "c": 5.0}, (), ()),
        ({}, ("z", "y"), ("y", "z")),
        ({}, (), ()),
    ],
)
def test_stragglers_are_late_or_far_slower_than_most(
    seconds: dict[str, float], late: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert STRAGGLER_FACTOR == 2.0
    assert stragglers(collected(seconds, late=late)) == expected
    assert stragglers(collected(seconds, late=late, away=("away",))) == expected, "who is away keeps nobody waiting"


def test_the_slow_node_of_a_run_is_its_straggler(ran: Ran) -> None:
    for record in records(ran(UNLIKE, "rounds=2")):
        assert record.stragglers == ("bay",)


# ---------------------------------------------------------------- too slow


NARROW = nodes(bay={"uplink_mbit_s": 0.0001})
"""Answering whether it is there takes bay seconds, an update minutes."""


def test_a_link_too_slow_for_the_round_is_late_and_costs_no_real_time(ran: Ran) -> None:
    started = time.monotonic()
    result = ran(NARROW, "rounds=2", "round_timeout_s=60")
    assert time.monotonic() - started < 60
    for record in records(result):
        assert [(r.node, r.reason) for r in record.refusals] == [("bay", "late")]
        assert record.stragglers == ("bay",)
        assert set(record.update_norms) == {"ash", "cob", "dew"}
        assert "bay" not in record.node_seconds
        assert record.node_bytes["bay"] == (record.node_bytes["ash"][0], 0)
        assert record.closed is None


def test_the_model_is_that_of_the_others(ran: Ran) -> None:
    slow = ran(NARROW, "rounds=2", "round_timeout_s=60")
    assert slow.model_digest != ran(nodes(), "rounds=2", "engine.links=false").model_digest
    patient = ran(NARROW, "rounds=2", "round_timeout_s=100000")
    assert patient.model_digest == ran(nodes(), "rounds=2", "engine.links=false").model_digest


def test_where_all_are_late_the_round_closes_and_the_model_stays(ran: Ran) -> None:
    narrow = nodes(**{name: {"uplink_mbit_s": 0.0001} for name in NAMES})
    result = ran(narrow, "rounds=1", "round_timeout_s=60")
    (record,) = records(result)
    assert record.closed is not None
    assert record.digest == record.base_digest
    assert record.stragglers == NAMES


def test_a_way_longer_than_the_round_is_late_too_not_forgotten(ran: Ran) -> None:
    result = ran(nodes(bay={"latency_ms": 40_000}), "rounds=1", "round_timeout_s=60")
    (record,) = records(result)
    assert "bay" in record.asked
    assert [(r.node, r.reason) for r in record.refusals] == [("bay", "late")]


# ---------------------------------------------------------------- away


def there(seed: int, round_: int, name: str, availability: float) -> bool:
    return canonical.seed_for(seed, "available", round_, name) < availability * (1 << 63)


@given(seed=st.integers(0, 1 << 40), round_=st.integers(1, 10_000), availability=st.floats(0.01, 1))
def test_who_is_there_follows_from_seed_round_and_name_alone(seed: int, round_: int, availability: float) -> None:
    link = LinkConfig(availability=availability)
    one = Links([NodeSpec(name="ash", link=link), NodeSpec(name="bay", link=link)], seed)
    two = Links([NodeSpec(name="bay", link=link, organisation="other", part=7)], seed)
    message = to_node(a_request(round_))
    assert one.reachable(1, message) == two.reachable(0, message) == there(seed, round_, "bay", availability)
    if one.reachable(1, message):
        better = Links([NodeSpec(name="bay", link=LinkConfig(availability=min(1.0, availability * 1.1)))], seed)
        assert better.reachable(0, message), "who is there stays there with a better link"


@pytest.mark.parametrize("availability", [0.05, 0.3, 0.8, 0.99])
def test_a_node_is_there_as_often_as_its_link_says(availability: float) -> None:
    rounds = 20_000
    found = sum(there(5, r, "ash", availability) for r in range(rounds)) / rounds
    assert abs(found - availability) < 4 * (availability * (1 - availability) / rounds) ** 0.5  # fails once in 16,000


def test_nodes_are_away_independently() -> None:
    rounds = 10_000
    both = sum(there(5, r, "ash", 0.5) and there(5, r, "bay", 0.5) for r in range(rounds)) / rounds
    again = sum(there(5, r, "ash", 0.5) and there(5, r + 1, "ash", 0.5) for r in range(rounds)) / rounds
    assert abs(both - 0.25) < 4 * (0.25 * 0.75 / rounds) ** 0.5
    assert abs(again - 0.25) < 5 * (0.25 * 0.75 / rounds) ** 0.5


def test_whoever_is_always_there_is_always_there() -> None:
    links = Links([NodeSpec(name="ash")], 0)
    assert all(links.reachable(0, to_node(a_request(r))) for r in range(200))


def test_only_rounds_of_training_find_a_node_away() -> None:
    rarely = [NodeSpec(name="ash", link=LinkConfig(availability=1e-9))]
    links = Links(rarely, 0)
    assert not links.reachable(0, to_node(a_request()))
    assert links.reachable(0, to_node(a_request(purpose="evaluate")))
    assert links.reachable(0, to_node(a_request(purpose="statistics")))
    assert links.reachable(0, to_node()), "an enrolment"
    assert Links(rarely, 0, obeys_availability=False).reachable(0, to_node(a_request()))


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_an_availability_that_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(Exception, match=r"link\.availability is"):
        LinkConfig(availability=value)


def test_a_node_that_is_away_is_not_run_and_its_network_says_so() -> None:
    served: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        served.append(int(context.node_config["partition-id"]))
        context.state["seen"] = ConfigRecord({"rounds": 1})
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(app, 3, reachable=lambda index, message: index != 1, delay_s=lambda i, m, r: float(i))
    order = list(grid.get_node_ids())
    replies = list(door(grid, grid.clock)([Message(RecordDict(), n, "train") for n in order], 10))
    assert served == [0, 2]
    assert [order.index(r.metadata.src_node_id) for r in replies] == [0, 1, 2]
    assert "away in this round" in str(replies[1].error.reason)
    assert not list(grid._contexts[order[1]].state)
    assert grid.clock.now() == 2.0


ROUNDS = 6
UNSTEADY = nodes(bay={"availability": 0.5}, dew={"availability": 0.3})
AWAY = {
    r: [n for n, a in (("bay", 0.5), ("dew", 0.3)) if not there(0, r, n, a)] for r in range(1, ROUNDS + 1)
}  # fmt: skip


def test_the_coins_of_this_file_have_both_sides() -> None:
    assert 0 < sum("bay" in away for away in AWAY.values()) < ROUNDS
    assert 0 < sum("dew" in away for away in AWAY.values()) < ROUNDS


def test_an_absent_node_is_unavailable_in_the_record_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, str]] = []
    train = node.trained_on

    def watched(task: Any, base: Any, rows: Any, *, round: int, name: str) -> Any:
        trained.append((round, name))
        return train(task, base, rows, round=round, name=name)

    monkeypatch.setattr(node, "trained_on", watched)
    result = simulate([*SMALL, UNSTEADY, f"rounds={ROUNDS}", f"runs_dir={tmp_path}"])
    for record in records(result):
        assert [(r.node, r.reason) for r in record.refusals] == [(n, "unavailable") for n in AWAY[record.round]]
        assert record.asked == NAMES
        assert set(record.update_norms) == set(NAMES) - set(AWAY[record.round])
        assert not set(record.stragglers) & set(AWAY[record.round])
    assert sorted(trained) == [(r, n) for r in range(1, ROUNDS + 1) for n in NAMES if n not in AWAY[r]]
    (closing,) = records(result, "evaluate")
    assert closing.answered == NAMES, "the closing evaluation waits for everyone"


def test_an_absent_node_keeps_no_state(tmp_path: Path) -> None:
    gone = nodes(bay={"availability": 1e-9})
    options = [*SMALL, gone, "heterogeneity=local_head", "rule.worker_momentum=0.9", "rounds=2", f"runs_dir={tmp_path}"]
    result = simulate(options)
    stores = Path(result.run_dir) / "nodes"
    assert sorted(p.name for p in (stores / "ash").iterdir()) == ["local", "momentum", "reply.bin"]
    assert sorted(p.name for p in (stores / "bay").iterdir()) == ["reply.bin"], "of the closing evaluation"


def test_a_resumed_run_finds_the_same_nodes_there(ran: Ran, tmp_path: Path) -> None:
    simulate([*SMALL, UNSTEADY, "rounds=3", "run_name=short", f"runs_dir={tmp_path}"])
    longer = simulate(["resume=short", f"rounds={ROUNDS}", f"runs_dir={tmp_path}"])
    whole = ran(UNSTEADY, f"rounds={ROUNDS}")
    assert longer.refusals == whole.refusals
    assert (longer.model_digest, longer.metrics) == (whole.model_digest, whole.metrics)


def test_another_seed_finds_others_there(ran: Ran) -> None:
    found = [[(r["round"], r["node"]) for r in ran(UNSTEADY, f"rounds={ROUNDS}", f"seed={s}").refusals] for s in (0, 1)]
    assert found[0] == [(r, n) for r, away in AWAY.items() for n in away]
    assert found[1] == [(r, n) for r in AWAY for n, a in (("bay", 0.5), ("dew", 0.3)) if not there(1, r, n, a)]
    assert found[0] != found[1]


def test_without_links_everyone_is_there(ran: Ran) -> None:
    result = ran(UNSTEADY, f"rounds={ROUNDS}", "engine.links=false")
    assert result.refusals == []
    assert all(record.answered == NAMES for record in records(result))


def test_a_sampler_that_goes_by_availability_asks_only_those_that_are_there(ran: Ran) -> None:
    result = ran(UNSTEADY, f"rounds={ROUNDS}", "sampler=availability")
    assert result.refusals == [], "nobody's coin is thrown twice"
    asked = [record.asked for record in records(result)]
    assert all({"ash", "cob"} <= set(names) for names in asked)
    assert any(names != NAMES for names in asked)
    assert all(record.answered == record.asked for record in records(result))


def test_a_sampler_that_does_not_look_meets_nodes_that_are_away(ran: Ran) -> None:
    result = ran(UNSTEADY, f"rounds={ROUNDS}", "sampler=uniform", "sampler.fraction=0.75")
    for record in records(result):
        away = [n for n in record.asked if n in AWAY[record.round]]
        assert [r.node for r in record.refusals] == away
        assert len(record.asked) == 3


def test_a_run_is_not_continued_with_other_rules_for_who_is_there(ran: Ran) -> None:
    folder = ran(UNSTEADY, f"rounds={ROUNDS}").run_dir
    with pytest.raises(ResumeError, match="would make it another run"):
        simulate([f"resume={folder}", f"rounds={ROUNDS}", "engine.links=false"])
