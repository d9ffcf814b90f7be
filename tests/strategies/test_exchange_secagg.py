"""Secure aggregation over real nodes: exact sums, liars at every stage, and sums that are asked for once.

One table of lies.  Each is told at each stage of the protocol by one of the four nodes of group a (three must answer);
what the others send is summed bit for bit, and group b, of three nodes, notices nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

import clients.secagg
from clients import identity as own_identity
from strategies.exchange_secagg import SecAggExchange
from strategies.flower import RoundStrategy
from strategies.grouping import Plan
from tests.strategies.masked_nodes import BASE, GROUPS, Federation, Lie, Sites, light, make_sites, stage_of, with_fields
from trellis import canonical, wire
from trellis.errors import BaseSpent, ConfigError, ResumeError
from trellis.secagg import counts, dealt, member, quantise, statements
from trellis.secagg.consent import Terms
from trellis.types import Collected, Threat
from trellis.vectors import CountSpec, Layout, digest

A, B = GROUPS["a"], GROUPS["b"]
LIAR, OTHERS = A[0], A[1:]
MALICIOUS = Plan(Threat.malicious_server)
OFFLINE = ("keys", "shares", "confirm")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module", autouse=True)
def pinned_code() -> Iterator[None]:
    """Sites that run only code they have approved, so that they take part under malicious_server."""
    terms = clients.secagg._terms

    def pinned(own: own_identity.Identity) -> Terms:
        return dataclasses.replace(terms(own), code_is_pinned=True)

    with light(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients.secagg, "_terms", pinned)
        yield


@pytest.fixture
def nodes(sites: Sites, tmp_path: Path) -> Federation:
    return Federation(sites, tmp_path / "nodes")


def sums(collected: Collected) -> dict[str, Any]:
    """Rows by the group they are of."""
    return {row.members[0][0]: row.update_d for row in collected.rows}


def refusals(collected: Collected) -> list[tuple[str, str]]:
    return [(r.node, r.reason) for r in collected.refusals]


def group(collected: Collected, name: str) -> Any:
    return next(g for g in collected.groups or () if g.name == name)


def everything_in(content: RecordDict) -> bytes:
    """All names and bytes of a reply."""
    found = []
    for name, record in content.items():
        found.append(name.encode())
        for key, value in record.items():
            items = value if isinstance(value, list) else [value]
            found += [key.encode(), *(i.data if isinstance(i, Array) else str(i).encode() for i in items)]
            found += [i for i in items if isinstance(i, bytes)]
    return b"|".join(found)


# ---------------------------------------------------------------- honest rounds


def test_a_row_is_the_plain_mean_of_a_groups_updates_within_the_stated_error(nodes: Federation) -> None:
    collected = nodes.collect(nodes.exchange())
    assert collected.refusals == ()
    assert [row.members for row in collected.rows] == [A, B]
    layout = Layout.of(BASE)
    for row in collected.rows:
        exact = np.mean([layout.subtract(nodes.moved(n), BASE) for n in row.members], axis=0, dtype=np.float64)
        scale = nodes.words(row.members[0])[1]
        assert scale > 10**7
        assert np.abs(row.update_d - exact).max() <= 1 / scale + 1e-7
        assert np.array_equal(row.update_d, nodes.plain_mean(row.members))
        assert row.weight == len(row.members)


def test_nothing_of_what_the_app_replies_leaves_in_clear(nodes: Federation) -> None:
    nodes.collect(nodes.exchange())
    replies = [content for _, stage, content in nodes.sent if stage == "request"]
    assert len(replies) == 7
    for content in replies:
        assert {k: set(v) for k, v in content.items()} == {
            "arrays": {"update", "counts"}, "reply": {"request", "payload", "signature"}
        }  # fmt: skip
    for name, _, content in nodes.sent:
        sent = everything_in(content)
        assert b"accuracy" not in sent
        assert b"num-examples" not in sent
        assert nodes.moved(name)["w"].tobytes() not in sent
        words = nodes.words(name)[0]
        assert words[:2].tobytes() not in sent


def test_an_evaluation_of_anyones_app_says_only_who_took_part(nodes: Federation) -> None:
    collected = nodes.collect(nodes.exchange(), purpose="evaluate")
    assert collected.rows == ()
    assert [(g.name, g.survivors, dict(g.metrics)) for g in collected.groups or ()] == [
        ("a", A, {"num_failed": 0.0}), ("b", B, {"num_failed": 0.0})
    ]  # fmt: skip
    assert [u.node for u in collected.updates] == [*A, *B]
    assert all(u.metrics == {} and u.counts == {} and u.num_examples == 0 for u in collected.updates)


def test_keys_last_for_an_epoch_and_then_new_ones_are_made(nodes: Federation) -> None:
    exchange = nodes.exchange(num_keys=2)
    stages = []
    for round_ in (1, 2, 3):
        collected = nodes.collect(exchange, round_)
        assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A, round=round_))
        stages.append(list(dict.fromkeys(stage for _, stage in nodes.asked)))
        nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    assert stages == [[*OFFLINE, "request", "unmask"], ["request", "unmask"], [*OFFLINE, "request", "unmask"]]


def test_a_malicious_server_is_asked_for_the_survivors_signatures(nodes: Federation) -> None:
    collected = nodes.collect(nodes.exchange(plan=MALICIOUS))
    assert list(dict.fromkeys(stage for _, stage in nodes.asked)) == [*OFFLINE, "request", "survivors", "unmask"]
    assert np.array_equal(sums(collected)["b"], nodes.plain_mean(B))


WEIGHED = {"max_weight_ratio": 100}
"""A site that lets rows be weighed."""


def test_rows_that_were_registered_weigh_and_no_count_that_a_node_declares(sites: Sites, tmp_path: Path) -> None:
    rows = dict(zip(A, (10, 25, 60, 80), strict=True)) | dict.fromkeys(B, 7)
    nodes = Federation(sites, tmp_path / "nodes", rows=rows, metrics={"num-examples": 10**9}, policy=WEIGHED)
    collected = nodes.collect(nodes.exchange(max_weight=100))
    weights = (12, 31, 75, 100)  # 100 * 10 / 80 = 12.5, and an even number is nearest
    assert [row.weight for row in collected.rows] == [sum(weights), 3 * 9]
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A, weights=weights))
    layout, scale = Layout.of(BASE), nodes.words(A[0], weight=weights[0])[1]
    exact = np.average([layout.subtract(nodes.moved(n), BASE) for n in A], axis=0, weights=weights)
    assert np.abs(sums(collected)["a"] - exact).max() <= 4 / (scale * sum(weights)) + 1e-7


def test_sites_let_nobody_be_weighed_unless_they_say_so(sites: Sites, tmp_path: Path) -> None:
    rows = dict(zip(A, (10, 25, 60, 80), strict=True)) | dict.fromkeys(B, 80)
    nodes = Federation(sites, tmp_path / "nodes", rows=rows)
    collected = nodes.collect(nodes.exchange(max_weight=100))
    assert [row.members for row in collected.rows] == [B]
    told = {r.node: r.evidence for r in collected.refusals}
    assert all("and the site allows a ratio of 1" in told[n] for n in A)


def test_who_has_most_of_the_rows_is_in_no_weighted_sum(sites: Sites, tmp_path: Path) -> None:
    rows = dict.fromkeys(A, 1) | {"a0": 1000} | dict.fromkeys(B, 7)
    nodes = Federation(sites, tmp_path / "nodes", rows=rows, policy=WEIGHED)
    collected = nodes.collect(nodes.exchange(max_weight=100))
    assert [row.members for row in collected.rows] == [B]
    told = {r.node: r.evidence for r in collected.refusals}
    assert all("one member has 100 of 103 parts" in told[n] for n in A)
    assert collected.liars_out == 0


def test_weights_stay_those_of_the_runs_first_round_whoever_is_there(sites: Sites, tmp_path: Path) -> None:
    rows = dict(zip(A, (40, 25, 60, 80), strict=True)) | dict.fromkeys(B, 7)
    nodes = Federation(sites, tmp_path / "nodes", rows=rows, policy=WEIGHED)
    exchange, everyone = nodes.exchange(max_weight=100), nodes.nodes
    nodes.collect(exchange, 1)
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    nodes.nodes = [n for n in everyone if n.name != "a3"]  # quarantined, say
    assert nodes.collect(exchange, 2).rows[0].weight == 50 + 31 + 75


def test_weights_stay_the_same_where_a_resumed_run_does_without_the_largest_node(sites: Sites, tmp_path: Path) -> None:
    rows = dict(zip(A, (40, 25, 60, 80), strict=True)) | dict.fromkeys(B, 7)
    nodes = Federation(sites, tmp_path / "nodes", rows=rows, policy=WEIGHED)
    nodes.collect(nodes.exchange(max_weight=100, folder=tmp_path / "sums"), 1)
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    nodes.nodes = [n for n in nodes.nodes if n.name != "a3"]
    collected = nodes.collect(nodes.exchange(max_weight=100, folder=tmp_path / "sums"), 2)
    assert [row.weight for row in collected.rows] == [50 + 31 + 75, 27]


SPLITS = canonical.digest(["validation"])[:8]


def test_where_nobody_registered_rows_every_weighted_group_is_lost(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", policy=WEIGHED)
    assert nodes.collect(nodes.exchange(max_weight=100)).rows == ()


def test_a_group_whose_members_registered_no_rows_says_so(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", rows=dict.fromkeys(A, 5), policy=WEIGHED)
    collected = nodes.collect(nodes.exchange(max_weight=100))
    assert [row.members for row in collected.rows] == [A]
    assert group(collected, "b").lost == "its members registered no rows: every weight is 0"


def test_a_finer_resolution_than_32_bits_hold_is_sent_with_64(nodes: Federation) -> None:
    collected = nodes.collect(nodes.exchange(min_resolution=1e9))
    (content,) = [c for name, stage, c in nodes.sent if (name, stage) == (A[0], "request")]
    assert content.array_records["arrays"]["update"].dtype == "uint64"
    assert nodes.words(A[0])[1] > quantise.scale_for(4, 10.0, 1), "in finer steps"
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


def test_an_update_that_was_clipped_is_counted_and_nobodys_name_is_told(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes")
    nodes.delta = lambda name, round=1: {  # type: ignore[method-assign]
        "w": np.full((2, 3), 100.0 if name in ("a1", "a3") else 0.1, np.float32),
        "b": np.full(3, nodes.sites.names.index(name) / 100, np.float32),
    }
    collected = nodes.collect(nodes.exchange())
    assert group(collected, "a").metrics == {"num_clipped": 2.0, "num_failed": 0.0}
    assert group(collected, "b").metrics == {"num_clipped": 0.0, "num_failed": 0.0}
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


def test_a_masked_reply_takes_four_bytes_a_parameter(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", base={"w": np.zeros(100_000, np.float32)})
    collected = nodes.collect(nodes.exchange())
    sizes = {n: wire.size_bytes(content) for n, stage, content in nodes.sent if stage == "request"}
    assert max(sizes.values()) <= 4.1 * 100_000
    everything = {n: sum(wire.size_bytes(c) for m, _, c in nodes.sent if m == n) for n in sizes}
    assert {n: up for n, (_, up) in collected.node_bytes.items()} == everything
    assert collected.bytes_up == sum(everything.values())


def test_the_mean_of_a_round_with_many_parameters_is_exact_too(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", base={"w": np.zeros(70_000, np.float32)})
    assert np.array_equal(sums(nodes.collect(nodes.exchange()))["b"], nodes.plain_mean(B))


# ---------------------------------------------------------------- lies


def payload(content: RecordDict) -> bytes:
    return bytes(content.config_records["secagg" if "secagg" in content else "reply"]["payload"])  # type: ignore[arg-type]


def with_update(change: Callable[[Any], Any]) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        arrays = content.array_records["arrays"]
        changed = change(arrays["update"])
        return RecordDict({**content, "arrays": ArrayRecord({**arrays, "update": changed})})

    return lie


def words(change: Callable[[Any], Any]) -> Lie:
    return with_update(lambda array: Array(change(array.numpy())))


def without(record: str) -> Lie:
    return lambda content: RecordDict({k: v for k, v in content.items() if k != record})


def with_more(content: RecordDict) -> RecordDict:
    return RecordDict({**content, "more": ConfigRecord({"a": 1})})


SIGNED = {"keys": "keys", "shares": "shares", "confirm": "confirm", "request": "masked", "survivors": "survivors"}
"""By stage, what a signature says it is of."""


def by_another_node(sites: Sites, stage: str) -> Lie:
    def lie(content: RecordDict) -> RecordDict:
        signature = sites.keys[A[1]].sign(f"secagg/{SIGNED[stage]}", payload(content))
        return with_fields(signature=signature)(content)  # type: ignore[return-value]

    return lie


def of_another_stage(stage: str) -> Lie:
    other = {"stage": "unmask", "dealers": ["a1"], "shares": [b"x" * 33]}
    if stage == "unmask":
        other = {"stage": "survivors", "payload": b"p", "signature": b"s" * 64}
    return lambda content: RecordDict({"secagg": ConfigRecord(other)})


GARBAGE = bytes(range(200))
STATEMENTS = {
    "wrong length": (with_fields(signature=lambda s: s[:-1]), "bad_signature"),
    "wrong dtype": (with_fields(payload=lambda p: p.hex()), "wrong_records"),
    "shape (1,)": (with_fields(payload=lambda p: [p]), "wrong_records"),
    "a field too many": (with_fields(more=1), "wrong_records"),
    "garbage bytes": (with_fields(payload=GARBAGE), "bad_signature"),
    "no signature": (with_fields(signature=b""), "bad_signature"),
}
BY_STAGE: dict[str, dict[str, tuple[Lie, str]]] = {
    "keys": STATEMENTS,
    "shares": STATEMENTS
    | {
        "a ciphertext too few": (with_fields(ciphertexts=lambda c: c[:-1]), "bad_share"),
        "a ciphertext that was not signed": (with_fields(ciphertexts=lambda c: [*c[:-1], c[-1][::-1]]), "bad_share"),
        "hashes that were not signed": (with_fields(hashes=lambda h: [*h[:-1], h[-1][::-1]]), "bad_share"),
        "other holders": (with_fields(holders=lambda h: h[::-1]), "bad_share"),
    },
    "confirm": STATEMENTS
    | {
        "complaints that are none": (with_fields(complaints=[GARBAGE, GARBAGE]), "bad_signature"),
        "half a complaint": (with_fields(complaints=[GARBAGE]), "bad_complaint"),
    },
    "request": {
        "wrong length": (words(lambda w: np.append(w, w[:1])), "wrong_shape"),
        "wrong dtype": (words(lambda w: w.astype(np.uint64)), "wrong_dtype"),
        "float32": (words(lambda w: w.view(np.float32)), "wrong_dtype"),
        "shape (1,)": (words(lambda w: w[:1]), "wrong_shape"),
        "garbage bytes": (with_update(lambda a: Array("uint32", (9,), "numpy.ndarray", GARBAGE)), "undecodable"),
        "another serialisation": (with_update(lambda a: Array("uint32", (9,), "pickle", a.data)), "undecodable"),
        "words that were not signed": (words(lambda w: w + 1), "bad_signature"),
        "no words": (lambda c: RecordDict({**c, "arrays": ArrayRecord()}), "wrong_keys"),
        "a record of another kind": (lambda c: RecordDict({**c, "reply": ArrayRecord()}), "undecodable"),
        "another request's digest": (with_fields(request="0" * 64), "wrong_request"),
        "a signature that is a text": (with_fields(signature="s"), "bad_signature"),
        "no signature": (with_fields(signature=b""), "bad_signature"),
        "a field too many": (with_fields(more=1), "wrong_request"),
        "a megabyte": (lambda c: RecordDict({**c, "more": ConfigRecord({"a": "x" * 2**20})}), "oversize"),
    },
    "survivors": STATEMENTS,
    "unmask": {
        "wrong length": (with_fields(shares=lambda s: s[:-1]), "bad_share"),
        "wrong dtype": (with_fields(shares=lambda s: [x.hex() for x in s]), "wrong_records"),
        "shape (1,)": (with_fields(shares=lambda s: s[:1]), "bad_share"),
        "a field too many": (with_fields(more=1), "wrong_records"),
        "garbage bytes": (with_fields(shares=lambda s: [GARBAGE for _ in s]), "bad_share"),
        "another dealer's share": (with_fields(shares=lambda s: s[::-1]), "bad_share"),
        "one share with one bit flipped": (
            with_fields(shares=lambda s: [s[0][:-1] + bytes([s[0][-1] ^ 1]), *s[1:]]), "bad_share"
        ),
        "other dealers": (with_fields(dealers=lambda d: d[::-1]), "bad_share"),
    },
}  # fmt: skip
ANYWHERE: dict[str, tuple[Lie, str]] = {
    "an empty reply": (lambda content: RecordDict(), "wrong_records"),
    "an extra record": (with_more, "wrong_records"),
    "an error": (lambda content: Error(17, "no"), "error_reply"),
}
CASES = [
    *((stage, name, lie, why) for stage, lies in BY_STAGE.items() for name, (lie, why) in {**ANYWHERE, **lies}.items()),
    *((stage, "a reply to another stage", of_another_stage(stage), "wrong_records") for stage in BY_STAGE),
    *(("request", f"no {record}", without(record), "wrong_records") for record in ("arrays", "reply")),
]
OUT = {"keys", "shares", "request"}
"""Stages at which whoever lies is not in the sum; later ones find its vector there already."""


@dataclasses.dataclass
class Played:
    """Rounds under malicious_server: of one long epoch, or of a new one each where its beginning is what is played."""

    sites: Sites
    folder: Path
    rounds: int = 0

    def __post_init__(self) -> None:
        self.long = Federation(self.sites, self.folder / "long")
        self.exchange = self.long.exchange(plan=MALICIOUS, num_keys=80)
        self.long.collect(self.exchange)

    def round(self, stage: str, *, ask: Any = None, **told: Any) -> Collected:
        """A round in which these lies are told, or in which these replies are late."""
        self.rounds += 1
        self.nodes, exchange = self.long, self.exchange
        if stage in OFFLINE:
            self.nodes = Federation(self.sites, self.folder / f"{self.rounds}")
            exchange = self.nodes.exchange(plan=MALICIOUS)
        self.nodes.base = {**BASE, "b": BASE["b"] + np.float32(self.rounds)}
        self.nodes.lies, self.nodes.late = told.get("lies", {}), told.get("late", set())
        started = self.nodes.grid.clock.now()
        collected = self.nodes.collect(exchange, ask=ask and ask(self.nodes))
        self.waited_s = self.nodes.grid.clock.now() - started
        return collected

    def kept_and_exact(self, collected: Collected, stage: str) -> None:
        """The sum of the liar's group is that of its survivors in clear, and the other group's is as it would be."""
        survivors = OTHERS if stage in OUT else A
        assert [row.members for row in collected.rows] == [survivors, B]
        assert np.array_equal(sums(collected)["a"], self.nodes.plain_mean(survivors))
        assert np.array_equal(sums(collected)["b"], self.nodes.plain_mean(B))
        assert group(collected, "a").survivors == survivors
        assert collected.liars_out == 0


@pytest.fixture(scope="module")
def played(sites: Sites, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return Played(sites, tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize(("stage", "lie", "reason"), [pytest.param(s, f, r, id=f"{s}, {n}") for s, n, f, r in CASES])
def test_a_lie_costs_its_sender_its_place_and_nobody_else(stage: str, lie: Lie, reason: str, played: Played) -> None:
    collected = played.round(stage, lies={(LIAR, stage): lie})
    assert refusals(collected) == [(LIAR, reason)]
    assert collected.refusals[0].evidence
    assert len(collected.refusals[0].evidence) <= 300
    assert collected.refusals[0].evidence.isprintable()
    played.kept_and_exact(collected, stage)


@pytest.mark.parametrize("stage", SIGNED)
def test_another_nodes_signature_is_none(stage: str, played: Played) -> None:
    collected = played.round(stage, lies={(LIAR, stage): by_another_node(played.sites, stage)})
    assert refusals(collected) == [(LIAR, "bad_signature")]
    played.kept_and_exact(collected, stage)


@pytest.mark.parametrize("stage", BY_STAGE)
def test_a_late_reply_costs_its_sender_what_it_was_needed_for(stage: str, played: Played) -> None:
    collected = played.round(stage, late={(LIAR, stage)})
    # once its vector is in the sum, who is silent costs nothing
    assert refusals(collected) == ([(LIAR, "late")] if stage in OUT else [])
    played.kept_and_exact(collected, stage)
    assert played.waited_s == {"request": 60.0, "survivors": 0.0, "unmask": 0.0}.get(stage, 50.0)


@pytest.mark.parametrize("stage", BY_STAGE)
def test_a_second_reply_to_one_question_does_not_count(stage: str, played: Played) -> None:
    def twice(nodes: Federation) -> Any:
        def ask(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
            of_stage = bool(messages) and stage_of(messages[0]) == stage
            for reply in nodes.ask(messages, timeout_s):
                yield reply
                if of_stage and nodes.names[reply.metadata.src_node_id] == LIAR:
                    yield reply

        return ask

    collected = played.round(stage, ask=twice)
    assert refusals(collected) == [(LIAR, "duplicate")]
    assert np.array_equal(sums(collected)["a"], played.nodes.plain_mean(A))


@pytest.mark.parametrize("stage", BY_STAGE)
def test_below_the_quorum_a_group_is_lost_whole_and_its_liars_are_named(stage: str, played: Played) -> None:
    lie, reason = next(iter(BY_STAGE[stage].values()))
    collected = played.round(stage, lies={(name, stage): lie for name in A[:2]})
    assert refusals(collected) == [("a0", reason), ("a1", reason), ("a2", "group_lost"), ("a3", "group_lost")]
    assert [row.members for row in collected.rows] == [B]
    assert np.array_equal(sums(collected)["b"], played.nodes.plain_mean(B))
    lost = group(collected, "a")
    assert (lost.members, lost.survivors) == (A, ())
    assert lost.lost == collected.refusals[2].evidence
    assert lost.lost_to_liar
    assert collected.liars_out == 1


def test_a_group_that_is_lost_to_nobodys_lie_lowers_nothing(played: Played) -> None:
    collected = played.round("request", late={("a0", "request"), ("a1", "request")})
    assert group(collected, "a").lost == "2 of 4 answered, 3 must"
    assert not group(collected, "a").lost_to_liar
    assert collected.liars_out == 0


def test_a_reply_from_nobody_who_was_asked_is_left_out(nodes: Federation) -> None:
    def with_a_stranger(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        for reply in nodes.ask(messages, timeout_s):
            yield reply
            reply.metadata.__dict__["_src_node_id"] = 77
            yield reply

    collected = nodes.collect(nodes.exchange(), ask=with_a_stranger)
    assert set(refusals(collected)) == {("id 77", "unknown_node")}
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


def test_a_node_that_is_out_of_an_epoch_is_back_in_the_next(nodes: Federation) -> None:
    exchange = nodes.exchange(num_keys=2)
    nodes.lies[LIAR, "keys"] = with_more
    nodes.collect(exchange, 1)
    nodes.lies.clear()
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    second = nodes.collect(exchange, 2)
    assert [(r.node, r.reason) for r in second.refusals] == [(LIAR, "unavailable")]
    assert second.refusals[0].evidence.startswith("out of this epoch: wrong_records: ")
    assert (LIAR, "request") not in nodes.asked
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    assert nodes.collect(exchange, 3).rows[0].members == A


def test_a_node_that_missed_a_round_is_asked_in_the_next(nodes: Federation) -> None:
    exchange = nodes.exchange()
    nodes.late.add((LIAR, "request"))
    nodes.collect(exchange, 1)
    nodes.late.clear()
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    collected = nodes.collect(exchange, 2)
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A, round=2))


def test_a_node_that_never_tells_its_shares_costs_no_time_where_the_others_are_enough(nodes: Federation) -> None:
    nodes.late |= {("a3", "unmask"), ("b2", "unmask")}
    collected = nodes.collect(nodes.exchange())
    assert collected.refusals == ()
    assert nodes.grid.clock.now() == 0.0
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


# ---------------------------------------------------------------- false shares


@pytest.fixture
def dealing_falsely(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`dealing_falsely(name)`: that node's shares are of other secrets than those it published."""
    split, liars = statements.split_secrets, set[str]()

    def shares(self: member.Member, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            if self.name in liars:
                patch.setattr(statements, "split_secrets", lambda seeds, *rest: split(seeds[::-1], *rest))
            return dealt_by(self, *arguments)

    dealt_by = member.Member._dealt
    monkeypatch.setattr(member.Member, "_dealt", shares)
    return liars.add


def test_a_dealer_whose_shares_give_another_secret_is_named_and_lowers_f(
    nodes: Federation, dealing_falsely: Callable[[str], None]
) -> None:
    dealing_falsely("a2")
    collected = nodes.collect(nodes.exchange())
    assert refusals(collected) == [
        ("a0", "group_lost"), ("a1", "group_lost"), ("a2", "bad_share"), ("a3", "group_lost")
    ]  # fmt: skip
    assert group(collected, "a").lost == "the shares that a2 dealt do not give its seed"
    assert collected.liars_out == 1
    assert np.array_equal(sums(collected)["b"], nodes.plain_mean(B))


def test_a_dealer_that_was_convicted_is_in_no_epoch_any_more(
    nodes: Federation, dealing_falsely: Callable[[str], None]
) -> None:
    dealing_falsely("a2")
    exchange = nodes.exchange()
    nodes.collect(exchange, 1)
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    collected = nodes.collect(exchange, 2)
    assert collected.rows[0].members == ("a0", "a1", "a3")
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(("a0", "a1", "a3"), round=2))
    assert "a2" not in {name for name, _ in nodes.asked}
    assert [r.node for r in collected.refusals] == ["a2"]


def test_a_group_that_can_do_nothing_without_its_convicted_dealer_lowers_f_in_every_round(
    nodes: Federation, dealing_falsely: Callable[[str], None]
) -> None:
    dealing_falsely("b0")
    exchange = nodes.exchange(plan=MALICIOUS)
    assert nodes.collect(exchange, 1).liars_out == 1
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    collected = nodes.collect(exchange, 2)
    assert group(collected, "b").lost is not None
    assert collected.liars_out == 1


def test_a_dealer_that_was_convicted_reads_why_it_is_not_asked(
    nodes: Federation, dealing_falsely: Callable[[str], None]
) -> None:
    dealing_falsely("a2")
    exchange = nodes.exchange()
    nodes.collect(exchange, 1)
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    (refusal,) = nodes.collect(exchange, 2).refusals
    assert "the shares that a2 dealt do not give its seed" in refusal.evidence


def test_a_dealer_that_sends_one_holder_something_else_is_removed_by_its_complaint(
    nodes: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = dealt.seal

    def garbled(roster: bytes, dealer: str, holder: str, public: bytes, shares: bytes) -> Any:
        told = shares[::-1] if (dealer, holder) == ("a1", "a3") else shares
        return seal(roster, dealer, holder, public, told)

    monkeypatch.setattr(dealt, "seal", garbled)
    collected = nodes.collect(nodes.exchange())
    left = ("a0", "a2", "a3")
    assert refusals(collected) == [("a1", "bad_share")]
    assert "a1 sent to a3" in collected.refusals[0].evidence
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(left))
    confirmed = [name for name, stage in nodes.asked if stage == "confirm"]
    assert [confirmed.count(n) for n in (*A, *B)] == [2, 1, 2, 2, 1, 1, 1], "only the smaller set is asked again"


def test_a_sum_that_no_honest_members_have_is_left_out(nodes: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = quantise.quantise

    def garbage(update: Any, *, clip_norm: float, rng: Any, **options: Any) -> Any:
        found, clipped = quantised(update, clip_norm=clip_norm, rng=rng, **options)
        if np.array_equal(update, Layout.of(BASE).subtract(nodes.moved("a1"), BASE)):
            found[:] = 2**31  # masked by a node that does not care what it masks
        return found, clipped

    monkeypatch.setattr(quantise, "quantise", garbage)
    collected = nodes.collect(nodes.exchange())
    assert [row.members for row in collected.rows] == [B]
    assert "cannot be that of honest members" in collected.refusals[0].evidence
    assert "its mean has norm" in group(collected, "a").lost
    assert collected.liars_out == 0, "who it was is hidden by the masks"


# ---------------------------------------------------------------- counts


class Counting(Federation):
    """Nodes that run an app of ours: it replies counts as well."""

    rows_said = 5
    SPECS: ClassVar = {
        "loss_sum": CountSpec("loss_sum", (), "float64", per_row=100.0),
        "rows": CountSpec("rows", (), "int64"),
        "bins": CountSpec("bins", (4,), "int64"),
    }  # fmt: skip

    def _train(self, message: Message, context: Any) -> Message:
        request = wire.read_request(message)
        rows = self.rows_said
        found = {"loss_sum": np.asarray(3.5), "rows": np.asarray(rows), "bins": np.array([1, 0, rows - 1, 0])}
        delta = self.delta(own_identity.of(context).spec.name)
        content = wire.reply_content(
            request=request, arrays=delta, num_examples=9, metrics={"train/loss": 0.5}, counts={"validation": found}
        )
        return Message(content, reply_to=message)


def counting(sites: Sites, folder: Path, **options: Any) -> tuple[Counting, SecAggExchange]:
    nodes = Counting(sites, folder)
    nodes.nodes = [dataclasses.replace(n, num_examples=6, num_rows=10) for n in nodes.nodes]
    return nodes, nodes.exchange(native=True, counts=Counting.SPECS, **options)


def test_counts_and_losses_of_our_app_are_summed_by_group(sites: Sites, tmp_path: Path) -> None:
    nodes, exchange = counting(sites, tmp_path / "nodes")
    collected = nodes.collect(exchange)
    found = group(collected, "a").counts["validation"]
    assert {k: np.asarray(v).tolist() for k, v in found.items()} == {
        "loss_sum": 14.0, "rows": 20, "bins": [4, 0, 16, 0]
    }  # fmt: skip
    assert group(collected, "a").metrics == {"num_clipped": 0.0, "num_failed": 0.0, "train_loss": 2.0}
    layout = Layout.of(BASE)
    assert np.allclose(sums(collected)["a"], np.mean([layout.flatten(nodes.delta(n)) for n in A], axis=0), atol=1e-6)


def test_more_rows_than_anyone_registered_are_cut_at_the_node_and_voided(sites: Sites, tmp_path: Path) -> None:
    nodes, exchange = counting(sites, tmp_path / "nodes")
    nodes.rows_said = 12
    collected = nodes.collect(exchange)
    assert collected.refusals == ()
    assert group(collected, "a").voided == "validation: bins adds up to 44, 40 rows allow 40"
    assert len(collected.rows) == 2


def test_counts_that_the_registered_rows_cannot_have_are_voided_and_the_update_counts(
    sites: Sites, tmp_path: Path
) -> None:
    nodes, exchange = counting(sites, tmp_path / "nodes", counts_problem=lambda found: "odd bins")
    collected = nodes.collect(exchange)
    assert [row.members for row in collected.rows] == [A, B]
    assert group(collected, "a").voided == "validation: odd bins"
    assert group(collected, "a").counts == {}


def test_a_sum_of_counts_above_what_all_rows_allow_is_voided(
    sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, exchange = counting(sites, tmp_path / "nodes")
    encode = counts.encode
    monkeypatch.setattr(counts, "encode", lambda fields, values: encode(fields, values) + np.uint64(2**40))
    collected = nodes.collect(exchange)
    assert "above what 4 nodes can have" in group(collected, "a").voided
    assert len(collected.rows) == 2


# ---------------------------------------------------------------- a base is answered once


def test_the_same_round_asked_again_uses_the_sums_that_are_kept_and_asks_nobody(
    nodes: Federation, tmp_path: Path
) -> None:
    exchange = nodes.exchange(folder=tmp_path / "sums")
    first = nodes.collect(exchange)
    for again in (exchange, nodes.exchange(folder=tmp_path / "sums")):
        second = nodes.collect(again)
        assert nodes.asked == []
        assert [row.members for row in second.rows] == [A, B]
        assert np.array_equal(second.updates_nd, first.updates_nd)
        assert second.groups == first.groups
        assert second.refusals == ()


def test_a_round_that_lost_a_group_asks_only_that_group_for_the_same_base(nodes: Federation, tmp_path: Path) -> None:
    exchange = nodes.exchange(folder=tmp_path / "sums")
    nodes.late |= {("a0", "request"), ("a1", "request")}
    assert [row.members for row in nodes.collect(exchange, 1).rows] == [B]
    nodes.late.clear()
    second = nodes.collect(exchange, 2)
    assert {name for name, _ in nodes.asked} == set(A)
    assert np.array_equal(sums(second)["b"], nodes.plain_mean(B, round=1)), "what was given for round 1"
    assert np.array_equal(sums(second)["a"], nodes.plain_mean(A, round=2))


def test_a_base_of_which_everything_was_given_already_stops_the_run(nodes: Federation, tmp_path: Path) -> None:
    exchange = nodes.exchange(folder=tmp_path / "sums")
    nodes.collect(exchange, 1)
    for again in (exchange, nodes.exchange(folder=tmp_path / "sums")):
        with pytest.raises(BaseSpent, match=r"round 2: the params .* were trained on before.* Start a new run"):
            nodes.collect(again, 2)
    assert nodes.collect(exchange, 1).refusals == (), "the round that was not committed can still be had"


def test_a_sum_whose_shares_were_garbled_is_had_by_asking_again(nodes: Federation) -> None:
    exchange = nodes.exchange()
    nodes.late.add((LIAR, "request"))
    for name in A:
        nodes.lies[name, "unmask"] = with_more  # they answer, and what they say is lost
    assert group(nodes.collect(exchange, 1), "a").lost is not None
    nodes.late.clear()
    nodes.lies.clear()
    collected = nodes.collect(exchange, 2)
    # the same sum, without who was late: its members are in no other sum of the base
    assert [row.members for row in collected.rows] == [OTHERS, B]
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(OTHERS, round=1))


@pytest.mark.parametrize("on_disk", [True, False])
def test_shares_that_were_late_are_asked_for_again_where_the_base_stays(
    on_disk: bool, nodes: Federation, tmp_path: Path
) -> None:
    exchange = nodes.exchange(folder=tmp_path / "sums" if on_disk else None)
    nodes.late |= {("a0", "unmask"), ("a1", "unmask")}
    assert [row.members for row in nodes.collect(exchange, 1).rows] == [B]
    nodes.late.clear()
    collected = nodes.collect(exchange, 2)
    assert [row.members for row in collected.rows] == [A, B]
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A, round=1))


def test_a_run_ends_where_all_answered_and_no_sum_comes_of_it(nodes: Federation, tmp_path: Path) -> None:
    exchange = nodes.exchange(folder=tmp_path / "sums")
    for name in (*A, *B):
        nodes.lies[name, "unmask"] = with_more
    assert nodes.collect(exchange, 1).rows == ()
    with pytest.raises(BaseSpent, match="no further sum of updates to them can be had"):
        nodes.collect(exchange, 2)


def test_an_evaluation_between_two_rounds_of_a_base_takes_no_sums_away(nodes: Federation) -> None:
    exchange = nodes.exchange()
    nodes.collect(exchange, 1)
    nodes.collect(exchange, 1, purpose="evaluate")
    nodes.collect(exchange, 1)
    assert nodes.asked == []


def test_a_sum_of_other_splits_is_not_taken_for_the_one_that_is_asked(sites: Sites, tmp_path: Path) -> None:
    class Scoring(Counting):
        def _evaluate(self, message: Message, context: Any) -> Message:
            request = wire.read_request(message)
            assert request is not None
            one = {"loss_sum": np.asarray(1.0), "rows": np.asarray(3), "bins": np.array([1, 2, 0, 0])}
            found = dict.fromkeys(request.splits, one)
            content = wire.reply_content(request=request, arrays=None, num_examples=3, metrics={}, counts=found)
            return Message(content, reply_to=message)

    nodes = Scoring(sites, tmp_path / "nodes")
    nodes.nodes = [dataclasses.replace(n, num_examples=6, num_rows=10) for n in nodes.nodes]
    exchange = nodes.exchange(native=True, counts=Counting.SPECS, folder=tmp_path / "sums")
    nodes.collect(exchange, 1, purpose="evaluate", splits=("validation",))
    found = nodes.collect(exchange, 2, purpose="evaluate", splits=("validation", "test"))
    assert set(group(found, "a").counts) == {"validation", "test"}


def test_what_is_about_older_bases_is_removed(nodes: Federation, tmp_path: Path) -> None:
    exchange, first = nodes.exchange(folder=tmp_path / "sums"), digest(BASE)
    nodes.collect(exchange, 1)
    nodes.collect(exchange, 1, purpose="evaluate")
    names = {f"{purpose}-{SPLITS}-{first[:32]}.sums" for purpose in ("train", "evaluate")} | {"limits.json"}
    assert {path.name for path in (tmp_path / "sums").iterdir()} == names
    (tmp_path / "sums" / "notes.txt").write_text("not ours")
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    nodes.collect(exchange, 2)
    left = {path.name for path in (tmp_path / "sums").iterdir()}
    assert left == {f"train-{SPLITS}-{digest(nodes.base)[:32]}.sums", "notes.txt", "limits.json"}


# ---------------------------------------------------------------- crashes


class Killed(BaseException):
    pass


def dying(nodes: Federation, stage: str, replies: int) -> Callable[..., Iterator[Message]]:
    """A server that dies after so many replies at a stage."""

    def ask(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        of_stage = bool(messages) and stage_of(messages[0]) == stage
        for number, reply in enumerate(nodes.ask(messages, timeout_s)):
            if of_stage and number == replies:
                raise Killed
            yield reply

    return ask


@pytest.mark.parametrize("replies", [0, 1, 3, 4])
def test_a_server_that_died_between_shares_finishes_with_the_same_sum(
    replies: int, nodes: Federation, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"), ask=dying(nodes, "unmask", replies))
    assert {p.suffix for p in (tmp_path / "sums").iterdir()} == {".pending", ".json"}
    collected = nodes.collect(nodes.exchange(folder=tmp_path / "sums"))
    assert {stage for _, stage in nodes.asked} == {"unmask"}
    assert collected.refusals == ()
    for name, members in GROUPS.items():
        assert np.array_equal(sums(collected)[name], nodes.plain_mean(members))
    assert {p.suffix for p in (tmp_path / "sums").iterdir()} == {".sums", ".json"}


@pytest.mark.parametrize("stage", [*OFFLINE, "request"])
def test_a_server_that_died_before_any_share_was_asked_for_starts_the_round_again(
    stage: str, nodes: Federation, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"), ask=dying(nodes, stage, 2))
    collected = nodes.collect(nodes.exchange(folder=tmp_path / "sums"))
    assert collected.refusals == ()
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


def test_where_nodes_died_too_those_that_had_not_answered_are_summed_anew(nodes: Federation, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"), ask=dying(nodes, "unmask", 0))
    nodes.connect()
    collected = nodes.collect(nodes.exchange(folder=tmp_path / "sums"))
    assert refusals(collected) == [("a0", "policy.secagg")]
    assert "this base was answered in this run" in collected.refusals[0].evidence
    assert [row.members for row in collected.rows] == [OTHERS, B]
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(OTHERS))


def test_nodes_that_died_too_and_are_not_all_there_again_end_the_run(nodes: Federation, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"), ask=dying(nodes, "unmask", 5))
    nodes.connect()
    nodes.late |= {("a3", "request"), ("b2", "request")}
    with pytest.raises(BaseSpent, match="no further sum of updates to them can be had"):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"))


def test_one_group_that_cannot_be_finished_takes_nothing_from_the_other(nodes: Federation, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums"), ask=dying(nodes, "unmask", 5))
    for node in nodes.nodes:
        if node.name in A:  # their processes died as well
            nodes.grid._contexts[node.node_id].state = RecordDict()
    nodes.late.add(("a3", "request"))
    collected = nodes.collect(nodes.exchange(folder=tmp_path / "sums"))
    assert [row.members for row in collected.rows] == [B]
    assert np.array_equal(sums(collected)["b"], nodes.plain_mean(B))
    assert group(collected, "a").lost is not None


def test_a_pending_sum_under_malicious_server_is_finished_with_the_signatures_that_were_there(
    nodes: Federation, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=tmp_path / "sums", plan=MALICIOUS), ask=dying(nodes, "unmask", 1))
    collected = nodes.collect(nodes.exchange(folder=tmp_path / "sums", plan=MALICIOUS))
    assert {stage for _, stage in nodes.asked} == {"unmask"}
    assert np.array_equal(sums(collected)["a"], nodes.plain_mean(A))


@pytest.fixture(scope="module")
def files(sites: Sites, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of sums, and one of sums that were about to be unmasked."""
    folder = tmp_path_factory.mktemp("files")
    nodes = Federation(sites, folder / "some")
    nodes.collect(nodes.exchange(folder=folder / "sums"))
    nodes = Federation(sites, folder / "others")
    with pytest.raises(Killed):
        nodes.collect(nodes.exchange(folder=folder / "pending"), ask=dying(nodes, "unmask", 0))
    return {kind: next((folder / kind).glob(f"*.{kind}")) for kind in ("sums", "pending")}


@pytest.fixture(params=["sums", "pending"])
def written(request: pytest.FixtureRequest, files: dict[str, Path], tmp_path: Path) -> Path:
    """One of them, in a folder of its own."""
    path = tmp_path / "sums" / files[request.param].name
    path.parent.mkdir()
    path.write_bytes(files[request.param].read_bytes())
    return path


def asked_again(nodes: Federation, folder: Path) -> None:
    nodes.collect(nodes.exchange(folder=folder))


def test_a_file_that_was_cut_off_is_damaged_and_says_so(written: Path, nodes: Federation) -> None:
    whole = written.read_bytes()
    sizes = [0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 8, len(whole) - 1]
    for data in [*(whole[:size] for size in sizes), whole + b"\0", b"\xff" * len(whole)]:
        written.write_bytes(data)
        with pytest.raises(ResumeError, match="damaged"):
            asked_again(nodes, written.parent)


HEADS = ["null", "3", '"text"', "[]", "{}", '{"head": 1, "sizes": []}', '{"head": [1], "sizes": []}',
         '{"head": [[]], "sizes": [0, 0]}', '{"head": [{}], "sizes": [0, 0]}', '{"head": {}, "sizes": 3}',
         '{"head": ["text"], "sizes": [0]}', '{"head": [], "sizes": null}']  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_file_with_another_head_is_damaged_and_says_so(head: str, written: Path, nodes: Federation) -> None:
    encoded = head.encode()
    written.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with pytest.raises(ResumeError, match="damaged"):
        asked_again(nodes, written.parent)


@pytest.mark.parametrize("blobs", ["[0, 0]"])
def test_a_file_whose_heads_are_texts_is_damaged_and_says_so(blobs: str, nodes: Federation, tmp_path: Path) -> None:
    name, encoded = f"train-{SPLITS}-{digest(BASE)[:32]}.sums", f'{{"head": ["text"], "sizes": {blobs}}}'.encode()
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / name).write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with pytest.raises(ResumeError, match="damaged"):
        asked_again(nodes, tmp_path / "sums")


def test_a_word_that_changed_on_the_disk_is_not_taken_for_the_sum(written: Path, nodes: Federation) -> None:
    data = bytearray(written.read_bytes())
    # the last words are counts of group b; before them stand its updates
    data[-8 - 4 * 5] ^= 1
    written.write_bytes(data)
    with pytest.raises(ResumeError, match="damaged"):
        asked_again(nodes, written.parent)


# ---------------------------------------------------------------- groups that are drawn


def test_drawn_groups_last_for_an_epoch_and_everyone_is_in_one(nodes: Federation) -> None:
    exchange = nodes.exchange(drawn_size=3, num_keys=2)
    first = nodes.collect(exchange, 1)
    assert list(dict.fromkeys(stage for _, stage in nodes.asked))[:2] == ["draw", "reveal"]
    groups = [g.members for g in first.groups or ()]
    assert sorted(len(members) for members in groups) == [3, 4]
    assert sorted(name for members in groups for name in members) == [*A, *B]
    assert all(g.drawn for g in first.groups or ())
    for row in first.rows:
        assert np.array_equal(row.update_d, nodes.plain_mean(row.members))
    nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    second = nodes.collect(exchange, 2)
    assert [g.members for g in second.groups or ()] == groups
    assert {stage for _, stage in nodes.asked} == {"request", "unmask"}


def test_in_an_audit_round_groups_are_drawn_and_in_others_they_are_pinned(nodes: Federation) -> None:
    exchange = nodes.exchange(audit_every=2, audit_size=3)
    drawn = []
    for round_ in (1, 2, 3):
        collected = nodes.collect(exchange, round_)
        assert collected.refusals == ()
        drawn.append([g.drawn for g in collected.groups or ()])
        for row in collected.rows:
            # one scale in all rounds, whoever is summed
            assert np.array_equal(row.update_d, nodes.plain_mean(row.members, round=round_))
        nodes.base = {**nodes.base, "b": nodes.base["b"] + 1}
    assert drawn == [[False, False], [True, True], [False, False]]


@pytest.mark.parametrize("stage", ["draw", "reveal"])
@pytest.mark.parametrize("lie", ["garbage bytes", "shape (1,)", "wrong length"])
def test_who_lies_when_groups_are_drawn_is_in_none(stage: str, lie: str, nodes: Federation) -> None:
    told, reason = STATEMENTS[lie]
    nodes.lies[LIAR, stage] = told
    collected = nodes.collect(nodes.exchange(drawn_size=3))
    assert (LIAR, reason) in refusals(collected)
    assert all(LIAR not in row.members for row in collected.rows)
    assert sorted(name for row in collected.rows for name in row.members) == [*A[1:], *B]


# ---------------------------------------------------------------- Flower's entry point


def test_anyones_app_is_trained_by_flowers_entry_point_and_nothing_leaves_unmasked(nodes: Federation) -> None:
    strategy = RoundStrategy(exchange=nodes.exchange(), seed=5)
    result = strategy.start(nodes.grid, wire.to_record(BASE), num_rounds=2)
    layout, moved = Layout.of(BASE), BASE
    for round_ in (1, 2):
        mean = np.mean([layout.flatten(nodes.delta(n, round_)) for n in (*A, *B)], axis=0)
        moved = layout.apply(moved, mean)  # groups weigh as many as they are of
    trained = wire.from_record(result.arrays)
    assert all(np.allclose(trained[k], moved[k], atol=1e-6) for k in BASE)
    assert {s for _, s, _ in nodes.sent} == {"hello", *OFFLINE, "request", "unmask"}
    assert result.train_metrics_clientapp == {1: {}, 2: {}}


def test_a_name_is_whose_key_signed_it_and_nobodys_where_two_claim_it(nodes: Federation) -> None:
    ids = {n.name: n.node_id for n in nodes.nodes}
    told: dict[str, Lie] = {
        "a0": with_fields(name="a1"),
        "a2": with_fields(signature=lambda s: s[::-1]),
        "a3": lambda content: RecordDict(),
        "b0": lambda content: Error(17, "no"),
        "b1": with_fields(name="mallory"),
    }
    nodes.lies = {(name, "hello"): lie for name, lie in told.items()}
    found = nodes.exchange().named(list(ids.values()), nodes.ask)
    assert [(n.name, n.node_id, n.group) for n in found] == [("a1", ids["a1"], "a"), ("b2", ids["b2"], "b")]

    def twice(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        for reply in nodes.ask(messages, timeout_s):
            yield reply
            reply.metadata.__dict__["_src_node_id"] = 77
            yield reply

    nodes.lies = {}
    assert nodes.exchange().named([ids["a1"]], twice) == []


def test_a_node_that_is_named_has_the_role_that_is_pinned(nodes: Federation) -> None:
    pins = {n: dataclasses.replace(p, role="validation" if n in B else "train") for n, p in nodes.sites.pins.items()}
    found = nodes.exchange(pins=pins).named([n.node_id for n in nodes.nodes], nodes.ask)
    assert [(n.name, n.role.value) for n in found] == [*((n, "train") for n in A), *((n, "validation") for n in B)]


# ---------------------------------------------------------------- plans


def test_a_threshold_that_is_not_safe_loses_every_group_and_says_why(nodes: Federation) -> None:
    collected = nodes.collect(nodes.exchange(plan=Plan(Threat.semi_honest, threshold=2)))
    assert "privacy.secagg.threshold=2: a group of 4" in group(collected, "a").lost


@pytest.mark.parametrize(
    ("threat", "num_members", "threshold", "ok"),
    [(Threat.malicious_server, 4, 2, False), (Threat.malicious_server, 4, 3, True),
     (Threat.malicious_server, 4, 5, False),
     (Threat.semi_honest, 4, 2, False), (Threat.semi_honest, 4, 3, True), (Threat.semi_honest, 3, 2, True)],
)  # fmt: skip
def test_a_quorum_is_what_is_safe_or_what_was_set(threat: Threat, num_members: int, threshold: int, ok: bool) -> None:
    plan = Plan(threat, threshold=threshold)
    if ok:
        assert plan.quorum(num_members) == threshold
        return
    with pytest.raises(ConfigError, match=f"threshold={threshold}: a group of {num_members} under threat={threat}"):
        plan.quorum(num_members)
