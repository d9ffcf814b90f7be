"""Audits of groups drawn anew: who is told apart, how often an honest node is wronged, and what it gives away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from strategies.observers.regrouping import (
    GroupTest,
    ban_threshold,
    evidence,
    flag_rates,
    flagged_groups,
    increments,
    map_threshold,
)
from strategies.observers.suspicion import Suspicion
from trellis.errors import ConfigError
from trellis.types import Refusal, RoundView, Row

TEST = GroupTest(missed=0.1, false_alarm=0.05)
Group = tuple[str, ...]


def names(count: int) -> list[str]:
    return [f"node-{i:02d}" for i in range(count)]


def seen(
    groups: Sequence[Group],
    updates_md: Any = None,
    *,
    refused: Mapping[str, str] | None = None,
    **changes: Any,
) -> RoundView:
    """What an observer sees of a round with these groups, means of 1 each where none are given."""
    rows_md = np.ones((len(groups), 3), np.float32) if updates_md is None else np.asarray(updates_md, np.float32)
    fields: dict[str, Any] = {
        "rows": tuple(Row(group, row_d) for group, row_d in zip(groups, rows_md, strict=True)),
        "refusals": tuple(Refusal(node, reason, "seen") for node, reason in (refused or {}).items()),
        "answered": tuple(sorted(node for group in groups for node in group)),
        "updates_nd": rows_md,
    }
    return RoundView(round=1, aggregated=None, base={}, **{**fields, **changes})


def drawn(nodes: Sequence[str], num_groups: int, rng: np.random.Generator) -> list[Group]:
    """Groups whose sizes differ by one at most."""
    return [tuple(group) for group in np.array_split(rng.permutation(nodes).astype(object), num_groups)]


# ---------------------------------------------------------------- by hand


def test_four_nodes_in_pairs_by_hand() -> None:
    # one of an honest node's three possible partners lies: q_h = 1/3 * 0.9 + 2/3 * 0.05 = 1/3
    assert flag_rates(4, 1, 2, TEST) == pytest.approx((1 / 3, 0.9))
    assert increments(4, 1, 2, TEST) == pytest.approx((math.log(0.15), math.log(2.7)))


def test_every_member_of_a_group_gets_what_the_group_got() -> None:
    found = evidence([("a", "b"), ("c", "d")], {1}, num_nodes=4, num_byzantine=1, test=TEST)
    assert found == pytest.approx({"a": math.log(0.15), "b": math.log(0.15), "c": math.log(2.7), "d": math.log(2.7)})


def test_a_flag_says_less_of_a_member_of_a_larger_group() -> None:
    found = evidence([("a", "b"), ("c", "d", "e")], [0, 1], num_nodes=5, num_byzantine=1, test=TEST)
    # one of four other nodes lies: it is among one partner with 1/4, among two with 1/2
    assert found["a"] == pytest.approx(math.log(0.9 / (0.25 * 0.9 + 0.75 * 0.05)))
    assert found["c"] == pytest.approx(math.log(0.9 / (0.5 * 0.9 + 0.5 * 0.05)))
    assert found["a"] > found["c"] > 0


def test_a_node_alone_is_judged_by_the_errors_of_the_test_alone_and_so_are_all_where_nobody_lies() -> None:
    assert flag_rates(10, 3, 1, TEST) == pytest.approx((0.05, 0.9))
    assert flag_rates(10, 0, 5, TEST) == pytest.approx((0.05, 0.9))


def test_thresholds_by_hand() -> None:
    assert map_threshold(100, 10) == pytest.approx(math.log(9))
    assert map_threshold(100, 0) == math.inf
    assert ban_threshold(100, 0.05, 0.05) == pytest.approx(math.log(1900))


@pytest.mark.parametrize(("missed", "false_alarm"), [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (0.9, 0.2), (math.nan, 0.1)])
def test_a_test_that_says_nothing_or_is_certain_is_refused(missed: float, false_alarm: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and their sum below 1"):
        GroupTest(missed, false_alarm)


@pytest.mark.parametrize(("num_nodes", "num_byzantine", "group_size"), [(4, 4, 2), (4, -1, 2), (4, 1, 0), (4, 1, 5)])
def test_groups_that_do_not_exist_are_refused(num_nodes: int, num_byzantine: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="do not exist"):
        flag_rates(num_nodes, num_byzantine, group_size, TEST)


@pytest.mark.parametrize(
    ("groups", "flagged", "num_nodes"),
    [([("a", "b"), ("b", "c")], [], 4), ([("a", "b")], [1], 4), ([("a", "b")], [-1], 4), ([("a", "b", "c")], [], 2)],
)
def test_evidence_needs_each_node_in_one_group(groups: list[Group], flagged: list[int], num_nodes: int) -> None:
    with pytest.raises(ValueError, match="each node is in one group"):
        evidence(groups, flagged, num_nodes=num_nodes, num_byzantine=1, test=TEST)


# ---------------------------------------------------------------- the law of the mean


def mean_for_an_honest_node(
    sizes: tuple[int, ...], num_liars: int, *, assumed: int, missed: float = 0.1, false_alarm: float = 0.05
) -> float:
    """E[exp(what node-00 gets)] over every draw of groups, the last `num_liars` lying and `assumed` being assumed."""
    nodes, cuts = names(sum(sizes)), np.cumsum(sizes)[:-1]
    liars, total, draws = set(nodes[len(nodes) - num_liars :]), 0.0, 0
    for order in permutations(nodes):
        groups = [tuple(group) for group in np.split(np.array(order, object), cuts)]
        mine = next(i for i, group in enumerate(groups) if nodes[0] in group)
        flagged = 1 - missed if liars.intersection(groups[mine]) else false_alarm
        for which, probability in (([mine], flagged), ([], 1 - flagged)):
            found = evidence(groups, which, num_nodes=len(nodes), num_byzantine=assumed, test=TEST)
            total += probability * math.exp(found[nodes[0]])
        draws += 1
    return total / draws


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (2, 4), (6,)])
@pytest.mark.parametrize("num_liars", [0, 1, 2])
def test_exp_of_what_an_honest_node_gets_has_mean_one_and_less_with_fewer_liars_or_lies(
    sizes: tuple[int, ...], num_liars: int
) -> None:
    assert mean_for_an_honest_node(sizes, num_liars, assumed=num_liars) == pytest.approx(1.0)
    assert mean_for_an_honest_node(sizes, num_liars, assumed=2) <= 1 + 1e-12
    assert mean_for_an_honest_node(sizes, num_liars, assumed=2, missed=0.6) <= 1 + 1e-12
    assert mean_for_an_honest_node(sizes, num_liars, assumed=2, false_alarm=0.01) <= 1 + 1e-12


def test_liars_who_are_seen_more_often_than_assumed_speak_against_those_beside_them() -> None:
    assert 1.05 < mean_for_an_honest_node((3, 3), 1, assumed=1, missed=0.0) < 1.2


def test_counting_only_who_is_left_of_a_group_would_wrong_honest_nodes() -> None:
    # of four that were drawn two dropped out, and never a liar: the pair is flagged as often as a group of four
    q_h, _ = flag_rates(20, 2, 4, TEST)
    for size, fair in ((4, True), (2, False)):
        unflagged, flagged = increments(20, 2, size, TEST)
        assert (q_h * math.exp(flagged) + (1 - q_h) * math.exp(unflagged) <= 1 + 1e-12) == fair


# ---------------------------------------------------------------- who is told apart, and how soon

N, F, G, RUNS = 100, 10, 4, 150
ROUNDS = (5, 10, 20, 40)


@cache
def sums(missed: float = 0.1, seed: int = 0) -> npt.NDArray[np.float64]:
    """What speaks against each node after each round, liars first.  -> (RUNS, 40, N)"""
    rng = np.random.default_rng(seed)
    shape = (RUNS, ROUNDS[-1], N)
    order = rng.permuted(np.broadcast_to(np.arange(N), shape), axis=2)
    lied = (order < F).reshape(*shape[:2], N // G, G).any(axis=3)
    flagged = rng.random(lied.shape) < np.where(lied, 1 - missed, TEST.false_alarm)
    unflagged_x, flagged_x = increments(N, F, G, TEST)
    x = np.empty(shape)
    np.put_along_axis(x, order, np.repeat(np.where(flagged, flagged_x, unflagged_x), G, axis=2), axis=2)
    return x.cumsum(axis=1)


@pytest.mark.parametrize(
    ("rule", "limit", "found_liars", "found_honest"),
    [
        ("map", map_threshold(N, F), (0.91, 0.93, 0.995, 1.0), (0.023, 0.001, 0.0, 0.0)),
        ("ban", ban_threshold(N, 0.05, 0.05), (0.0, 0.75, 0.96, 1.0), (0.0, 0.0, 0.0, 0.0)),
    ],
    ids=["map", "ban"],
)
def test_liars_and_honest_nodes_are_told_apart_as_tabulated(
    rule: str, limit: float, found_liars: tuple[float, ...], found_honest: tuple[float, ...]
) -> None:
    """The table of docs/detection.md, printed under `pytest -rP`.

    1500 liars and 13500 honest nodes: the rates' standard errors are at most 0.012 and 0.002.
    """
    over = sums()[:, np.array(ROUNDS) - 1] >= limit
    liars, honest = over[..., :F].mean(axis=(0, 2)), over[..., F:].mean(axis=(0, 2))
    for rounds, tpr, fpr in zip(ROUNDS, liars, honest, strict=True):
        print(f"{rule}: after {rounds} audits {tpr:.3f} of the liars, {fpr:.4f} of the honest nodes")
    assert liars == pytest.approx(found_liars, abs=0.05)
    assert honest == pytest.approx(found_honest, abs=0.006)


def test_a_ban_wrongs_anyone_no_more_often_than_promised() -> None:
    """Promised: in at most alpha / (1 - beta) = 5.3 % of runs anyone, over all rounds.

    Where that just holds the test fails by chance with probability 0.006 (binomial, 150 runs).
    """
    wronged = (sums()[..., F:] >= ban_threshold(N, 0.05, 0.05)).any(axis=(1, 2)).sum()
    assert wronged <= 15


# ---------------------------------------------------------------- in the detector


def audited(suspicion: Suspicion, state: Any, asked: list[str], liars: set[str], rng: np.random.Generator) -> Any:
    """The state after one audit round of groups drawn anew."""
    groups = drawn(asked, len(asked) // G, rng)
    flagged = [
        i
        for i, group in enumerate(groups)
        if rng.random() < (1 - TEST.missed if liars.intersection(group) else TEST.false_alarm)
    ]
    found = evidence(groups, flagged, num_nodes=len(asked), num_byzantine=F, test=TEST)
    return suspicion(state, seen(groups, evidence=found))[0]


@pytest.mark.parametrize("seed", range(3))
def test_audits_quarantine_every_liar_and_no_honest_node(seed: int) -> None:
    """Who is out is drawn no more, so groups differ in size; rounds in fixed groups between the audits say nothing.

    An honest node is wronged with probability at most alpha = 0.01.
    """
    rng, everyone = np.random.default_rng(seed), names(N)
    liars = set(everyone[:F])
    suspicion, state = Suspicion(num_nodes=N, num_byzantine=F), None
    for _ in range(60):
        asked = [node for node in everyone if node not in suspicion.quarantined(state)]
        state = audited(suspicion, state, asked, liars, rng)
        between = suspicion(state, seen(drawn(asked, len(asked) // G, np.random.default_rng(0))))[0]
        assert suspicion.llr(between) == suspicion.llr(state)
    assert set(suspicion.quarantined(state)) == liars
    assert suspicion.caught_lying(state) == frozenset(), "what a group looks like is no lie of anyone"


PAIRS: list[Group] = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("i", "j"), ("k", "l")]
WATCH = Suspicion(num_nodes=12, num_byzantine=1, outlier_factor=3.0)
FLAGGED = WATCH.increments[1]


def test_groups_alone_move_nobodys_evidence_up_or_down() -> None:
    suspected = {"a": 2.5, "c": 0.5}
    state, _ = WATCH(None, seen(PAIRS, evidence=suspected))
    far = np.ones((6, 3)) * [[1000.0], [1.0], [1.1], [0.9], [1.2], [0.0]]
    for view in (seen(PAIRS), seen(PAIRS, far)):
        after, findings = WATCH(state, view)
        assert after == state
        assert findings == {"num_flagged": 0.0, "num_quarantined": 0.0, "max": 2.5}


@pytest.mark.parametrize("reason", ["bad_signature", "bad_share", "bad_key", "bad_complaint"])
@pytest.mark.parametrize("in_the_sum", [True, False])
def test_a_named_liar_in_a_group_is_caught_and_its_partners_are_not(reason: str, in_the_sum: bool) -> None:
    groups = PAIRS if in_the_sum else [("a",) if group == ("a", "b") else group for group in PAIRS]
    view, state = seen(groups, refused={"b": reason}), None
    for round_ in range(1, 6):
        assert WATCH.quarantined(state) == {}
        state, _ = WATCH(state, view)
        assert {node: llr for node, llr in WATCH.llr(state).items() if llr} == pytest.approx({"b": round_ * FLAGGED})
    assert list(WATCH.quarantined(state)) == ["b"]
    assert WATCH.caught_lying(state) == {"b"}


def test_a_lie_in_an_audit_outweighs_what_its_group_looked_like() -> None:
    found = evidence(PAIRS, [], num_nodes=12, num_byzantine=1, test=TEST)
    state, _ = WATCH(None, seen(PAIRS, evidence=found, refused={"b": "bad_share"}))
    assert {node: llr for node, llr in WATCH.llr(state).items() if llr} == pytest.approx({"b": FLAGGED})


def test_a_lost_group_speaks_neither_for_nor_against_its_members() -> None:
    state, _ = WATCH(None, seen(PAIRS, evidence={"a": 2.5}))
    lost = {"a": "group_lost", "b": "group_lost"}
    answered = tuple(sorted(node for group in PAIRS for node in group))
    assert WATCH(state, seen(PAIRS[1:], refused=lost, answered=answered))[0] == state


def test_judges_and_single_nodes_beside_groups_are_judged_as_ever() -> None:
    state, _ = WATCH(None, seen(PAIRS, evidence={"a": 2.5, "s": 2.5, "judge": 2.5}))
    after, _ = WATCH(state, seen([*PAIRS, ("s",)], answered=("a", "b", "judge", "s")))
    less = 2.5 + WATCH.increments[0]
    assert WATCH.llr(after) == pytest.approx({"a": 2.5, "s": less, "judge": less})


# ---------------------------------------------------------------- the test of a group by its distance


def means(groups: Sequence[Group], updates: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    return np.array([np.mean([updates[node] for node in group], axis=0) for group in groups], np.float32)


def updates_of(nodes: Sequence[str], liars: set[str], rng: np.random.Generator, lie: float = 20.0) -> dict[str, Any]:
    """A common direction and as much of their own; liars send noise so many times as long."""
    common_d = rng.normal(size=50)
    return {node: lie * rng.normal(size=50) if node in liars else common_d + rng.normal(size=50) for node in nodes}


def test_groups_with_a_liar_are_far_and_the_others_are_not() -> None:
    rng, nodes = np.random.default_rng(0), names(48)
    liars = set(nodes[:3])
    groups = drawn(nodes, 12, rng)
    view = seen(groups, means(groups, updates_of(nodes, liars, rng)))
    found = flagged_groups(view, num_byzantine=3, outlier_factor=3.0)
    assert set(found) == {i for i, group in enumerate(groups) if liars.intersection(group)}
    assert all(text.startswith("median distance ") for text in found.values())
    assert flagged_groups(view, num_byzantine=3, outlier_factor=100.0) == {}, "the factor is the caller's"
    assert len(flagged_groups(view, num_byzantine=1, outlier_factor=3.0)) == 1, "no more than can lie"
    honest = seen(groups, means(groups, updates_of(nodes, set(), rng)))
    assert flagged_groups(honest, num_byzantine=3, outlier_factor=3.0) == {}


def test_a_group_that_sent_nothing_is_flagged() -> None:
    rows_md = np.ones((6, 3)) + np.arange(6)[:, None] / 100
    rows_md[5] = 0.0
    found = flagged_groups(seen(PAIRS, rows_md), num_byzantine=0, outlier_factor=100.0)
    assert list(found) == [5]
    assert found[5].startswith("norm 0, ")


def test_single_nodes_are_left_to_the_detector_and_indices_are_those_of_the_rows() -> None:
    groups: list[Group] = [("s",), *PAIRS]
    rows_md = np.ones((7, 3)) + np.arange(7)[:, None] / 100
    rows_md[0], rows_md[3] = 500.0, 50.0
    views = [seen(groups, rows_md), seen([(node,) for node in names(7)], rows_md), seen([], np.zeros((0, 3)))]
    found = [list(flagged_groups(view, num_byzantine=1, outlier_factor=3.0)) for view in views]
    assert found == [[3], [], []]


def test_from_means_of_groups_to_liars_and_no_honest_node() -> None:
    """Liars who are seen every time are beyond `missed`: it is set as low as the test is good."""
    rng, everyone, test = np.random.default_rng(1), names(48), GroupTest(missed=0.01)
    liars = set(everyone[:3])
    suspicion, state = Suspicion(num_nodes=48, num_byzantine=3), None
    for _ in range(30):
        asked = [node for node in everyone if node not in suspicion.quarantined(state)]
        groups = drawn(asked, len(asked) // G, rng)
        view = seen(groups, means(groups, updates_of(asked, liars, rng)))
        flagged = flagged_groups(view, num_byzantine=3, outlier_factor=3.0)
        found = evidence(groups, flagged, num_nodes=len(asked), num_byzantine=3, test=test)
        state, _ = suspicion(state, seen(groups, view.updates_nd, evidence=found))
    assert set(suspicion.quarantined(state)) == liars


# ---------------------------------------------------------------- the price


def test_regrouping_gives_away_what_a_node_sends_every_time_and_fixed_groups_do_not() -> None:
    """T audits are T n / g sums of n unknowns, of which T - 1 say again what the total is."""
    rng, static_n = np.random.default_rng(0), np.random.default_rng(1).normal(size=N)

    def known(orders: Sequence[Any]) -> tuple[int, float]:
        """Rank of what was seen, and the correlation of the best guess with what nodes sent."""
        member = np.zeros((len(orders) * N // G, N))
        member[np.repeat(np.arange(len(member)), G), np.concatenate(orders)] = 1
        guess_n = np.linalg.lstsq(member, member @ static_n, rcond=None)[0]
        return int(np.linalg.matrix_rank(member)), float(np.corrcoef(guess_n, static_n)[0, 1])

    orders = [rng.permutation(N) for _ in range(2 * G)]
    for num_audits in range(1, 2 * G + 1):
        rank, correlation = known(orders[:num_audits])
        print(f"{num_audits} audits: correlation {correlation:.3f}")
        assert rank == min(N, num_audits * N // G - (num_audits - 1))
        assert (rank == N) == (num_audits > G)
        assert correlation > (0.999 if num_audits > G else 0.85 if num_audits > 2 else 0.3)
    assert known([orders[0]] * 40)[0] == N // G
    assert known([orders[0]] * 40)[1] < 0.7
