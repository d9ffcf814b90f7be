"""Evidence over the rounds: who is caught, who is not framed, and how often an honest node is wronged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from experiments.engines.local import LocalGrid
from strategies import rules, samplers
from strategies.exchange import PlainExchange
from strategies.flower import RoundStrategy
from strategies.observers.suspicion import LIES, Suspicion, distances
from trellis import wire
from trellis.types import (
    REFUSALS,
    Collected,
    NodeInfo,
    Refusal,
    Request,
    Role,
    RoundRecord,
    RoundView,
    Row,
    RuleSpec,
    ServerState,
    Update,
)

FLAGGED, UNFLAGGED = math.log(0.9 / 0.05), math.log(0.1 / 0.95)
LIMIT = math.log(10 * 100 / 0.01)
ROUNDS_TO_CATCH = math.ceil(LIMIT / FLAGGED)
"""Of a node that is flagged in every one of them, among ten: 4."""

Updates = Mapping[str, Any]


def names(count: int) -> list[str]:
    return [f"node-{i}" for i in range(count)]


def seen(
    updates: Updates | None = None, refused: Mapping[str, str] | None = None, round_: int = 1, **changes: Any
) -> RoundView:
    """What the observer sees of a round with these updates and these reasons of refusal."""
    found = {node: np.asarray(update_d, np.float32) for node, update_d in sorted((updates or {}).items())}
    fields: dict[str, Any] = {
        "rows": tuple(Row((node,), update_d) for node, update_d in found.items()),
        "refusals": tuple(Refusal(node, reason, "seen") for node, reason in (refused or {}).items()),
        "answered": tuple(found),
        "updates_nd": np.stack(list(found.values())) if found else np.zeros((0, 1), np.float32),
    }
    return RoundView(round=round_, aggregated=None, base={}, **{**fields, **changes})


def alike(count: int, dim: int = 50, seed: int = 0) -> dict[str, Any]:
    """Updates of honest nodes: a common direction and as much of their own."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=dim)
    return {node: common + rng.normal(size=dim) for node in names(count)}


def detector(**changes: Any) -> Suspicion:
    return Suspicion(**{"num_nodes": 10, "num_byzantine": 2, "outlier_factor": 3.0, **changes})


def after(suspicion: Suspicion, views: Iterable[RoundView], state: Any = None) -> Any:
    for view in views:
        state, _ = suspicion(state, view)
    return state


def flagged(view: RoundView, **changes: Any) -> list[str]:
    """Nodes that one round speaks against."""
    suspicion = detector(**changes)
    return sorted(node for node, llr in suspicion.llr(suspicion(None, view)[0]).items() if llr > 0)


# ---------------------------------------------------------------- the sum, by hand


def test_evidence_adds_up_is_forgotten_and_never_falls_below_nothing() -> None:
    rounds: list[tuple[bool, float]] = [
        (False, 0.0),
        (True, FLAGGED),
        (True, 2 * FLAGGED),
        (False, 2 * FLAGGED + UNFLAGGED),
        (False, 2 * FLAGGED + 2 * UNFLAGGED),
        (False, 0.0),
        (True, FLAGGED),
    ]
    suspicion, state = detector(), None
    for lied, expected in rounds:
        honest = alike(5) if lied else alike(6)
        state, findings = suspicion(state, seen(honest, {"node-5": "not_finite"} if lied else {}))
        assert suspicion.llr(state)["node-5"] == pytest.approx(expected)
        assert findings == {"num_flagged": float(lied), "num_quarantined": 0.0, "max": pytest.approx(expected)}


def test_a_node_that_lies_in_every_round_is_quarantined_within_four() -> None:
    assert ROUNDS_TO_CATCH == 4
    suspicion, state = detector(), None
    for round_ in range(1, ROUNDS_TO_CATCH + 1):
        assert suspicion.quarantined(state) == {}
        state, findings = suspicion(state, seen(alike(5), {"node-5": "not_finite"}, round_))
    assert suspicion.quarantined(state) == {
        "node-5": "flagged in 4 of 4 rounds (log-likelihood ratio 11.6, limit 11.5); last: not_finite, seen"
    }
    assert findings["num_quarantined"] == 1.0
    assert findings["max"] == 0.0, "of those who are still asked"


def test_a_sleeper_has_no_credit() -> None:
    honest = [seen(alike(6))] * 300
    lies = [seen(alike(5), {"node-5": "norm"})] * ROUNDS_TO_CATCH
    assert "node-5" in detector().quarantined(after(detector(), [*honest, *lies]))


def test_who_lies_in_fewer_than_44_of_100_rounds_is_forgiven() -> None:
    share = -UNFLAGGED / (FLAGGED - UNFLAGGED)
    assert share == pytest.approx(0.44, abs=0.005)
    rounds = [seen(alike(5), {"node-5": "norm"}), seen(alike(6)), seen(alike(6))] * 100
    assert detector().quarantined(after(detector(), rounds)) == {}


def test_the_state_is_json_and_goes_on_exactly_where_it_was() -> None:
    rounds = [seen(alike(5), {"node-5": "norm"}, r) if r % 3 else seen(alike(6), round_=r) for r in range(1, 40)]
    whole = after(detector(), rounds)
    kept = json.loads(json.dumps(after(detector(), rounds[:17])))
    assert after(detector(), rounds[17:], kept) == whole
    assert json.loads(json.dumps(whole)) == whole


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("reason", sorted(LIES))
def test_a_refusal_that_is_a_lie_speaks_against_its_sender(reason: str) -> None:
    assert flagged(seen(alike(5), {"node-5": reason})) == ["node-5"]


@pytest.mark.parametrize("reason", sorted({*REFUSALS, "policy.privacy"} - LIES))
def test_being_late_failing_and_declining_speak_neither_for_nor_against(reason: str) -> None:
    suspicion = detector()
    state = after(suspicion, [seen(alike(5), {"node-5": "norm"}), seen(alike(5), {"node-5": reason})])
    assert suspicion.llr(state)["node-5"] == pytest.approx(FLAGGED)
    assert "duplicate" not in LIES, "anyone can send a second reply in another's name"


def test_a_round_in_which_most_lie_accuses_nobody() -> None:
    # a base from which honest training diverges makes honest nodes reply NaN
    four_of_seven = dict.fromkeys(names(7)[3:], "not_finite")
    assert flagged(seen(alike(3), four_of_seven)) == []
    assert flagged(seen(alike(4), dict.fromkeys(names(7)[4:], "not_finite"))) == ["node-4", "node-5", "node-6"]


# ---------------------------------------------------------------- distances


def test_distances_by_hand() -> None:
    rows = np.array([[0.0], [1.0], [3.0], [10.0]], np.float32)
    # sorted distances to the others: 1 3 10, 1 2 9, 2 3 7, 7 9 10
    assert distances(rows).tolist() == [3.0, 2.0, 3.0, 9.0]
    # of an even number of others the lower middle one: 1 |3| ..., 1 2 ..., 2 3 ..., 7 7 ..., 4 7 ...
    assert distances(np.append(rows, [[17.0]], 0).astype(np.float32)).tolist() == [3.0, 2.0, 3.0, 7.0, 14.0]


@pytest.mark.parametrize(("num_nodes", "num_liars"), [(4, 1), (6, 2), (10, 2), (10, 4), (12, 5)])
def test_colluders_at_one_far_point_are_flagged_and_no_honest_node_is(num_nodes: int, num_liars: int) -> None:
    updates = alike(num_nodes) | dict.fromkeys(names(num_nodes)[-num_liars:], np.full(50, 40.0))
    assert flagged(seen(updates), num_byzantine=num_liars) == sorted(names(num_nodes)[-num_liars:])


@pytest.mark.parametrize("num_liars", [1, 2, 4])
def test_a_liar_among_alike_nodes_is_quarantined_within_four_rounds(num_liars: int) -> None:
    liars = names(10)[:num_liars]
    lies: list[Callable[[Any, np.random.Generator], Any]] = [
        lambda x, rng: -10 * x,
        lambda x, rng: rng.normal(size=50) * 20,
        lambda x, rng: 10 * x,
        lambda x, rng: np.zeros(50),
    ]
    for lie in lies:
        rng = np.random.default_rng(1)
        suspicion = detector(num_byzantine=num_liars)
        rounds = []
        for round_ in range(ROUNDS_TO_CATCH):
            honest = alike(10, seed=round_)
            rounds.append(seen(honest | {node: lie(honest[node], rng) for node in liars}))
        assert sorted(suspicion.quarantined(after(suspicion, rounds))) == liars


def test_a_flipped_sign_is_seen_where_updates_agree_and_not_where_they_do_not() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=50)
    for own, caught in ((0.1, ["node-0"]), (1.0, [])):
        updates = {node: common + own * rng.normal(size=50) for node in names(10)}
        assert flagged(seen(updates | {"node-0": -updates["node-0"]})) == caught


@pytest.mark.parametrize(("num_nodes", "num_liars"), [(5, 2), (6, 2), (11, 5), (12, 5)])
def test_a_copied_node_and_those_beside_it_are_not_framed_by_its_copies(num_nodes: int, num_liars: int) -> None:
    for seed in range(20):
        updates = alike(num_nodes, seed=seed)
        copies = dict.fromkeys(names(num_nodes)[-num_liars:], updates["node-0"])
        assert flagged(seen(updates | copies), num_byzantine=num_liars) == []


def test_a_free_rider_that_sends_nothing_is_flagged_and_a_short_honest_update_is_not() -> None:
    updates = alike(10)
    assert flagged(seen(updates | {"node-3": np.zeros(50)})) == ["node-3"]
    assert flagged(seen(updates | {"node-3": updates["node-3"] / 1000})) == []
    assert flagged(seen({node: np.zeros(50) for node in updates})) == [], "a model that has converged"


def test_a_group_mean_accuses_nobody() -> None:
    far = {"node-9": np.full(50, 1000.0)}
    view = seen(alike(10) | far)
    grouped = seen(
        alike(10) | far, rows=tuple(Row((*r.members, f"with-{r.members[0]}"), r.update_d) for r in view.rows)
    )
    assert flagged(view) == ["node-9"]
    assert flagged(grouped) == []


def test_two_rows_cannot_be_told_apart() -> None:
    assert flagged(seen({"node-0": [0.0], "node-1": [1e6]})) == []


def test_more_outliers_than_there_can_be_liars_are_not_all_flagged() -> None:
    far = {
        node: rng_row * 100
        for node, rng_row in zip(names(3), np.random.default_rng(0).normal(size=(3, 50)), strict=True)
    }
    assert len(flagged(seen(alike(10) | far), num_byzantine=2)) == 2
    assert len(flagged(seen(alike(10) | far), num_byzantine=0)) == 1, "the detector works where no liar is tolerated"


# ---------------------------------------------------------------- who is quarantined


def outlying(nodes: Iterable[str], **changes: Any) -> RoundView:
    return seen(alike(10) | {node: np.full(50, 40.0 + i) for i, node in enumerate(nodes)}, **changes)


def test_distance_quarantines_as_many_as_can_lie_and_lies_any_number() -> None:
    suspicion = detector(num_byzantine=1)
    state = after(suspicion, [outlying(["node-0"])] * 4)
    assert list(suspicion.quarantined(state)) == ["node-0"]
    one_more = alike(10)
    del one_more["node-0"]
    state = after(suspicion, [seen(one_more | {"node-1": np.full(50, 40.0)})] * 10, state)
    assert list(suspicion.quarantined(state)) == ["node-0"]
    assert suspicion.llr(state)["node-1"] > suspicion.threshold, "it is suspected all the same"
    lies = seen(
        {n: u for n, u in one_more.items() if n not in ("node-1", "node-2")}, {"node-1": "norm", "node-2": "norm"}
    )
    assert sorted(suspicion.quarantined(after(suspicion, [lies] * 4, state))) == ["node-0", "node-1", "node-2"]


def test_distance_quarantines_nobody_whom_the_round_cannot_do_without() -> None:
    suspicion = detector()
    for allowed in (0, 1, 2):
        view = outlying(["node-0", "node-1"], fits=lambda num_nodes, most=allowed: num_nodes <= most)
        state = after(suspicion, [view] * 4)
        assert len(suspicion.quarantined(state)) == allowed
    lies = seen(alike(5), {"node-5": "norm"}, fits=lambda num_nodes: False)
    assert list(suspicion.quarantined(after(suspicion, [lies] * 4))) == ["node-5"]


def test_a_released_node_is_not_judged_and_starts_anew_when_it_is_not_listed_any_more() -> None:
    lies = [seen(alike(5), {"node-5": "norm"})] * 4
    state = after(detector(), lies)
    lenient = detector(released=frozenset({"node-5"}))
    assert lenient.quarantined(state) == {}
    state = after(lenient, [*lies, *lies], state)
    assert lenient.quarantined(state) == {}
    assert "node-5" not in lenient.llr(state)
    assert detector().quarantined(after(detector(), lies[:3], state)) == {}
    assert list(detector().quarantined(after(detector(), lies, state))) == ["node-5"]


def test_what_another_test_found_takes_the_place_of_a_flag() -> None:
    suspicion = detector()
    found = seen(alike(6), evidence={"node-0": 2.5, "node-1": -0.5, "node-9": 1.0})
    state = after(suspicion, [found, found])
    assert suspicion.llr(state) == pytest.approx(
        {"node-0": 5.0, "node-1": 0.0, "node-2": 0.0, "node-3": 0.0, "node-4": 0.0, "node-5": 0.0, "node-9": 2.0}
    )
    state = after(suspicion, [found] * 3, state)
    assert list(suspicion.quarantined(state)) == ["node-0"]
    lied = seen(alike(5), {"node-5": "norm"}, evidence={"node-5": -3.0})
    assert suspicion.llr(after(suspicion, [lied]))["node-5"] == pytest.approx(FLAGGED), "a lie outweighs it"


# ---------------------------------------------------------------- the error rate that is promised


def test_honest_nodes_flagged_at_the_assumed_rate_are_quarantined_no_more_often_than_promised() -> None:
    """300 federations of 8 nodes and 40 rounds, every node flagged with probability exactly q_h.

    Any quarantine is promised at most alpha = 0.2 of the time.  Where that just holds, the test fails by chance with
    probability at most exp(-2 * 300 * 0.11^2) < 1e-3 (Hoeffding).
    """
    alpha, runs, rounds, q_h = 0.2, 300, 40, 0.2
    suspicion = detector(num_nodes=8, alpha=alpha, horizon=rounds, honest_flag_rate=q_h, liar_flag_rate=0.6)
    rng, nodes, wronged = np.random.default_rng(0), names(8), 0
    for _ in range(runs):
        state: Any = None
        for flags_n in rng.random((rounds, 8)) < q_h:
            refused = {node: "norm" for node, flag in zip(nodes, flags_n, strict=True) if flag}
            state, _ = suspicion(state, seen(refused=refused, answered=tuple(sorted(set(nodes) - set(refused)))))
        wronged += bool(suspicion.quarantined(state))
    assert 0 < wronged <= (alpha + 0.11) * runs


def test_a_sum_of_ratios_is_what_ville_needs_up_to_the_assumed_rate() -> None:
    unflagged, flag = detector().increments

    def mean(rate: float) -> float:
        return rate * math.exp(flag) + (1 - rate) * math.exp(unflagged)

    assert mean(0.05) == pytest.approx(1.0)
    assert mean(0.0) < mean(0.04) < 1.0 < mean(0.06)


# ---------------------------------------------------------------- in the round

BASE = {"w": np.zeros(3, np.float32)}
START = ServerState(run="r", round=0, params=BASE)
Step = Callable[[int, int], Any]
"""(round, index of the node) -> its delta; NaN is a lie."""


def node_app(step: Step) -> ClientApp:
    """Node i moves w by step(round, i) and replies that delta, or params where Flower's convention asks for them."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        round_ = message.content.config_records["config"]["server-round"]
        assert isinstance(round_, int)
        delta_d = np.asarray(step(round_, _index(context)), np.float32)
        base = wire.from_record(message.content.array_records["arrays"])
        w = delta_d if wire.read_request(message) else np.asarray(base["w"], np.float32) + delta_d
        return _reply(message, {"w": w}, 1)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        lies = math.isnan(step(1, _index(context))[0])
        return _reply(message, None, -1 if lies else 1)

    return app


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _reply(message: Message, arrays: dict[str, Any] | None, num_examples: int) -> Message:
    request = wire.read_request(message)
    content = wire.reply_content(
        request=request, arrays=arrays, num_examples=num_examples, metrics={"loss": 1.0}, counts={}
    )
    return Message(content, reply_to=message)


def lying(*liars: int, until: int = 10**9) -> Step:
    """These nodes reply NaN, up to a round; the others about 1, each a little different."""
    return lambda round_, index: np.full(3, np.nan if index in liars and round_ <= until else 1 + index / 100)


def play(
    grid: LocalGrid, rounds: int, *, roles: Mapping[int, Role] | None = None, **options: Any
) -> tuple[ServerState, list[RoundRecord]]:
    ids = list(grid.get_node_ids())
    nodes = [NodeInfo(f"node-{i}", ids[i], role=(roles or {}).get(i, Role.train)) for i in range(len(ids))]
    records: list[RoundRecord] = []
    fields: dict[str, Any] = {"suspicion": detector(), "exchange": PlainExchange(native=False, timeout_s=60.0)}
    strategy = RoundStrategy(clock=grid.clock, commit=lambda state, r: records.append(r), **{**fields, **options})
    return strategy.run(grid, START, nodes, rounds=rounds), records


def test_a_quarantined_node_is_asked_no_more_not_even_at_the_end() -> None:
    state, records = play(LocalGrid(node_app(lying(2)), 5), rounds=6)
    everyone = tuple(names(5))
    others = ("node-0", "node-1", "node-3", "node-4")
    assert [r.asked for r in records] == [everyone] * 4 + [others] * 3
    assert [sorted(r.quarantined) for r in records] == [[]] * 3 + [["node-2"]] * 3 + [[]]
    assert "4 of 4 rounds" in records[-2].quarantined["node-2"]
    assert [r.suspicion.get("node-2") for r in records[:4]] == pytest.approx([k * FLAGGED for k in (1, 2, 3, 4)])
    assert set(records[5].suspicion) == set(everyone)
    assert records[3].findings == {
        "suspicion/num_flagged": 1.0, "suspicion/num_quarantined": 1.0, "suspicion/max": 0.0
    }  # fmt: skip
    assert json.loads(json.dumps(state.observers)) == state.observers


def test_a_judge_that_lies_is_asked_no_more() -> None:
    roles = {2: Role.validation, 3: Role.validation}
    _, records = play(LocalGrid(node_app(lying(3)), 4), rounds=5, roles=roles)
    assert [sorted(r.quarantined) for r in records[:5]] == [[]] * 3 + [["node-3"]] * 2
    assert records[4].asked == ("node-0", "node-1", "node-2")
    assert records[5].asked == ("node-2",)


def test_without_a_detector_nothing_is_kept_or_recorded() -> None:
    state, records = play(LocalGrid(node_app(lying(2)), 5), rounds=5, suspicion=None)
    assert state.observers == {}
    assert all((dict(r.suspicion), dict(r.quarantined), dict(r.findings)) == ({}, {}, {}) for r in records)
    assert records[-1].asked == tuple(names(5))


def test_a_reply_that_is_late_for_its_round_is_never_taken_for_a_lie_in_a_later_one() -> None:
    def delay(index: int, message: Message, reply: Message) -> float:
        return 61.0 if index == 1 else 40.0

    grid = LocalGrid(node_app(lying()), 4, delay_s=delay)
    state, records = play(grid, rounds=8, exchange=PlainExchange(native=True, timeout_s=60.0))
    assert {(r.node, r.reason) for record in records for r in record.refusals} == {("node-1", "late")}
    assert "node-1" not in detector().llr(state.observers["suspicion"])


def hungry(seen_f: list[int]) -> Any:
    """A rule that needs 2 f + 3 rows, and the f of each of its calls."""

    def rule(updates_nd: Any, *, num_byzantine: int) -> Any:
        seen_f.append(num_byzantine)
        return updates_nd.mean(0)

    return RuleSpec("hungry", rule, min_rows=lambda f: 2 * f + 3)


def test_the_rule_tolerates_fewer_liars_once_some_are_out_and_only_as_few_as_it_must() -> None:
    tolerated: list[int] = []
    _, records = play(LocalGrid(node_app(lying(5, 6, until=4)), 7), rounds=6, rule=hungry(tolerated), num_byzantine=2)
    # five rows of seven asked: f stays 2 and rounds close; five asked of whom none need lie: f = 1 fits
    assert [r.closed is None for r in records] == [False] * 4 + [True] * 3
    assert tolerated == [1, 1]


def test_rows_that_stay_away_do_not_make_the_rule_tolerate_fewer_liars() -> None:
    tolerated: list[int] = []
    gone = {4, 5, 6, 7}

    def delay(index: int, message: Message, reply: Message) -> float:
        return math.inf if index in gone else 1.0

    grid = LocalGrid(node_app(lying(8)), 9, delay_s=delay)
    _, records = play(grid, rounds=6, rule=hungry(tolerated), num_byzantine=2)
    assert "node-8" in records[4].quarantined
    assert [r.closed is None for r in records[:6]] == [False] * 6
    assert tolerated == []
    assert "num_byzantine=2" in str(records[5].closed), "8 were asked, and 2 f + 3 fits those"


def test_nobody_far_is_quarantined_whom_the_rule_needs() -> None:
    def step(round_: int, index: int) -> Any:
        return np.full(3, 1000.0 if index == 4 else 1 + index / 100)

    options: dict[str, Any] = {"exchange": PlainExchange(native=False, timeout_s=60.0, max_update_norm=1e6)}
    _, records = play(LocalGrid(node_app(step), 6), rounds=6, rule=hungry([]), num_byzantine=1, **options)
    assert list(records[4].quarantined) == ["node-4"]
    _, records = play(LocalGrid(node_app(step), 5), rounds=6, rule=hungry([]), num_byzantine=1, **options)
    assert records[5].quarantined == {}, "node-4 may be honest, and four nodes are too few to survive a liar"
    _, records = play(LocalGrid(node_app(step), 6), rounds=6, min_replies=6, **options)
    assert records[5].quarantined == {}
    assert records[5].suspicion["node-4"] == pytest.approx(6 * FLAGGED)


class Scripted:
    """An exchange in which rows are what a function of the asked names says."""

    def __init__(self, rows: Callable[[list[str]], Any]) -> None:
        self._rows = rows

    def collect(self, request: Request, cohort: Sequence[NodeInfo], ask: Any, *, base: Any) -> Collected:
        asked = sorted(node.name for node in cohort)
        updates_nd = np.asarray(self._rows(asked), np.float32)
        rows = tuple(Row((name,), update_d) for name, update_d in zip(asked, updates_nd, strict=True))
        updates = tuple(Update(name, None, 1, {}) for name in asked)
        return Collected(updates_nd, rows, updates, (), 0, 0, {})


@pytest.mark.parametrize(("num_nodes", "num_liars"), [(5, 2), (6, 2), (7, 2), (9, 4), (10, 4), (13, 4)])
@pytest.mark.parametrize("rule", ["robust", "trimmed_mean", "geometric_median"])
def test_liars_cannot_frame_their_way_to_a_majority(rule: str, num_nodes: int, num_liars: int) -> None:
    # they copy the shortest honest update, so that all longer ones look far; once they are half they strike
    liars, rng = set(names(num_nodes)[-num_liars:]), np.random.default_rng(0)
    honest = {name: rng.normal(size=20) * (0.01 if i == 0 else 1.0) for i, name in enumerate(names(num_nodes))}

    def rows(asked: list[str]) -> list[Any]:
        strike = 2 * len(liars.intersection(asked)) >= len(asked)
        lie = np.full(20, 200.0) if strike else honest["node-0"]
        return [lie if name in liars else honest[name] for name in asked]

    suspicious = Suspicion(num_nodes=num_nodes, num_byzantine=num_liars, outlier_factor=3.0)
    strategy = RoundStrategy(
        rule=rules.get(rule), num_byzantine=num_liars, exchange=Scripted(rows), suspicion=suspicious
    )
    state = ServerState(run="r", round=0, params={"w": np.zeros(20, np.float32)})
    nodes = [NodeInfo(name, i) for i, name in enumerate(names(num_nodes))]
    for _ in range(30):
        state, record = strategy.round(state, nodes, lambda messages, timeout_s: iter(()))
        assert record.aggregate_norm < 10
        assert len(record.asked) > 2 * num_liars


def test_liars_who_sacrifice_themselves_leave_the_others_no_freer_where_cohorts_are_drawn() -> None:
    # four of twenty are caught lying; a cohort of four may hold two of the others all the same
    lying_first = detector(num_nodes=20, num_byzantine=2)
    state = {"quarantined": {f"node-{i}": {"round": 1, "evidence": "", "by_lies": True} for i in range(4)}, "cases": {}}
    nodes = [NodeInfo(name, i) for i, name in enumerate(names(20))]
    before = ServerState(run="r", round=0, params=BASE, observers={"suspicion": state})
    for sampler, tolerated in ((samplers.everyone, 0), (samplers.uniform(fraction=0.25), 2)):
        strategy = RoundStrategy(
            rule=rules.get("trimmed_mean"), num_byzantine=2, suspicion=lying_first, sampler=sampler
        )
        assert strategy._tolerated(1, strategy._num_caught(before, nodes)) == tolerated


def test_flowers_own_entry_point_watches_nodes_by_their_ids() -> None:
    grid = LocalGrid(node_app(lying(1)), 4)
    records: list[RoundRecord] = []
    strategy = RoundStrategy(suspicion=detector(), commit=lambda state, record: records.append(record))
    strategy.start(grid, wire.to_record(BASE), num_rounds=5)
    liar = f"{list(grid.get_node_ids())[1]:020d}"
    assert list(records[4].quarantined) == [liar]
    assert liar not in records[4].asked
    assert liar not in records[5].asked
    assert len(records[5].asked) == 3
