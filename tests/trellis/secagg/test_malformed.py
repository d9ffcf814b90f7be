"""Garbage in every field of every message: an error that is ours, nothing else changes, and the round goes on.

outside   a message as a flat record, one field of another type, empty, cut off, too long, in another order
inside    a statement that its owner has signed, one of its JSON values garbage, or all of it
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from tests.trellis.secagg.play import (
    TERMS,
    Memory,
    Play,
    ask_reveal,
    consortium,
    draw,
    drawn_play,
    plain_sum,
    vectors_of,
)
from trellis.errors import SecAggError
from trellis.secagg import dealt, epoch, messages, transcript
from trellis.secagg.member import Member
from trellis.secagg.messages import (
    AskDraw,
    AskName,
    Committed,
    Confirmation,
    Confirmed,
    Keys,
    Revealed,
    Shares,
    Stage,
    Survivors,
    Unmasked,
)
from trellis.secagg.tally import unmasked
from trellis.secagg.transcript import Signed
from trellis.types import Threat

MALICIOUS = Threat.malicious_server
LIAR, NODE = "d", "b"
"""Whose replies are garbage, and who is asked garbage."""

ANY_TYPE: list[Any] = [None, True, 0, -1, 1.5, "", "x", b"", b"x", [], ["x"], [b"x"], [0], [None], ["x", b"x"], {}]

FREE = {
    "hello": {"nonce"},
    # other words here are another epoch, or other terms that the site allows
    "draw": {"run", "epoch", "group_size"},
    "keys": {"run", "epoch", "group", "num_keys", "draw", "organisations", "fingerprints"},
    # nobody looks: no member is missing from the first set
    "confirm": {"evidence"},
    # fewer survivors are survivors too
    "survivors": {"survivors"},
    # one signature more or less than enough
    "unmask": {"survivors", "signers", "payloads", "signatures"},
    "mask": {"names", "payloads", "signatures"},
}
"""Fields, by stage, in which not all that is changed is wrong."""


def spoilt(value: Any) -> Iterator[Any]:
    """Values of the same type that are not what was meant."""
    if isinstance(value, str):
        yield from ("", value[:-1], value + "x", "x" * 70_000, value.swapcase(), "\0", "é", "\ud800")
    elif isinstance(value, int):
        yield from (0, -1, value + 1, value - 1, 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 64, -(10**30))
    elif isinstance(value, bytes):
        flipped = bytes([value[0] ^ 1]) + value[1:] if value else b"\1"
        yield from (b"", value[:-1], value + b"\0", flipped, bytes(len(value)), b"{}", b"\xff" * 70_000)
    else:
        yield from ([], value[:-1], value[1:], value[::-1], value + value, [*value, *value[:1]])
        for at in {0, len(value) - 1} if value else ():
            for other in spoilt(value[at]):
                yield [*value[:at], other, *value[at + 1 :]]


def garbled(values: messages.Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same record, one thing about it wrong.  -> (field, record)"""
    yield "", {}
    yield "", {**values, "more": 1}
    for name, value in values.items():
        yield name, {k: v for k, v in values.items() if k != name}
        for other in [*spoilt(value), *(v for v in ANY_TYPE if type(v) is not type(value) or isinstance(v, list))]:
            # a transport that knows no difference between list and tuple
            if other != value or type(other) is not type(value):
                yield name, {**values, name: other}


def state(node: Member) -> tuple[Any, ...]:
    """All that a node remembers; but for shares that were good, of a set in which something else was not."""
    kept = copy.deepcopy(node.epoch)
    if kept is not None and kept.stage == epoch.SHARES:
        kept.shares = {}
    found = None if kept is None else epoch.dumps(kept)
    return found, copy.deepcopy(node.draw), list(node.journal.facts())


def ask_garbage(node: Member, question: Stage) -> int:
    """Every spoilt question gets a refusal, and leaves the node as it was.  -> how many were refused"""
    refused = 0
    before = state(node)
    for name, values in garbled(messages.fields_of(question)):
        twin = copy.deepcopy(node)
        try:
            twin.answer(messages.asked(values))
        except SecAggError:
            refused += 1
            with pytest.raises(SecAggError):
                node.answer(messages.asked(values))
            assert state(node) == before, (question.stage, name)
        else:
            assert name in FREE.get(question.stage, ()), (question.stage, name, values[name])
    return refused


def reply_garbage(taken: Callable[[Any, Stage], Any], holder: Any, reply: Stage) -> int:
    """Every spoilt reply is refused by the server's half, which stays as it was."""
    refused = 0
    for name, values in garbled(messages.fields_of(reply)):
        twin = copy.deepcopy(holder)
        try:
            taken(twin, messages.from_fields(type(reply), values))
        except SecAggError:
            refused += 1
            assert seen(twin) == seen(holder), (reply.stage, name)
        else:
            pytest.fail(f"{reply.stage}: {name}={str(values.get(name))[:80]} was accepted")
    return refused


def seen(holder: Any) -> tuple[Any, ...]:
    """What the server's half holds, arrays as bytes."""
    values = [getattr(holder, f.name) for f in fields(holder)]
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in values)


@pytest.mark.parametrize("threat", list(Threat))
def test_no_question_and_no_reply_with_garbage_in_it_does_any_harm(threat: Threat) -> None:
    play = Play(list("abcd"), threat)
    node, liar, led = play.members[NODE], play.members[LIAR], play.leader

    assert ask_garbage(node, AskName(bytes(32))) > 20
    assert ask_garbage(node, led.asked) > 100
    assert reply_garbage(lambda led, r: led.take_keys(LIAR, r), led, liar.answer(led.asked)) > 30
    play.keys()

    questions = led.ask_shares()
    assert ask_garbage(node, questions[NODE]) > 100
    assert reply_garbage(lambda led, r: led.take_shares(LIAR, r), led, liar.answer(questions[LIAR])) > 70
    play.shares()

    asked = led.ask_confirm()
    assert ask_garbage(node, asked[NODE]) > 150
    signed = liar.answer(asked[LIAR])
    assert reply_garbage(lambda led, r: led.take_confirmed(LIAR, r), led, signed) > 30
    play.confirm()
    assert led.is_confirmed

    vectors = vectors_of(play.names)
    request = play.request(0)
    mask_garbage(play, request)
    found = play.tally(request)
    for name in play.names:
        found.take_masked(name, *play.masked(name, request, *vectors[name]))
    if threat is MALICIOUS:
        survivors = found.ask_survivors()
        assert ask_garbage(node, survivors) > 50
        reply = liar.answer(survivors)
        assert reply_garbage(lambda tally, r: tally.take_survivors(LIAR, r), found, reply) > 20
        play.settle(found, unmask=play.names)
    assert ask_garbage(node, found.ask_unmask()) > 60
    reply = liar.answer(found.ask_unmask())
    assert reply_garbage(lambda tally, r: tally.take_shares(LIAR, r), found, reply) > 30
    play.settle(found, agree=play.names)

    assert play.refused == {}
    update, counts = unmasked(found.update, found.counts, found.masks())
    expected = plain_sum(vectors, play.names)
    assert np.array_equal(update, expected[0])
    assert np.array_equal(counts, expected[1])


def mask_garbage(play: Play, request: Any) -> None:
    """A confirmation with garbage in it masks nothing."""
    node = play.members[NODE]
    before = state(node)
    good = play.leader.confirmation(NODE)
    for name, values in garbled(messages.fields_of(good)):
        twin = copy.deepcopy(node)
        update, counts = np.zeros(5, np.uint32), np.zeros(3, np.uint64)
        try:
            twin.mask(request, messages.from_fields(Confirmation, values), update, counts)
        except SecAggError:
            assert state(twin) == before
            assert not update.any()
            assert not counts.any()
        else:
            assert name in FREE["mask"]


def test_a_draw_takes_no_garbage_either() -> None:
    members = consortium(6)
    names = tuple(sorted(members))
    asked = AskDraw("run", "epoch-1", names, 3)
    node = members["n1"]
    assert ask_garbage(node, asked) > 40
    commits: dict[str, Committed] = {n: m.answer(asked) for n, m in members.items()}
    assert ask_garbage(node, ask_reveal("epoch-1", commits)) > 70
    drawing = draw(members, "epoch-1", 3)
    play = drawn_play(members, drawing, drawing.group_of("n1"))
    for name, values in garbled(messages.fields_of(play.leader.asked)):
        twin, before = copy.deepcopy(node), state(node)
        try:
            twin.answer(messages.asked(values))
        except SecAggError:
            assert state(twin) == before
        else:
            assert name in FREE["keys"] - {"draw", "run", "epoch"}
    play.offline()
    assert play.leader.is_confirmed


def test_a_record_of_another_stage_is_not_taken_for_this_one() -> None:
    play = Play(list("abcd"))
    values = messages.fields_of(play.leader.asked)
    for stage in ("draw", "reveal", "shares", "confirm", "survivors", "unmask", "mask", "", None, 3):
        with pytest.raises(SecAggError):
            play.members["a"].answer(messages.asked({**values, "stage": stage}))
    with pytest.raises(SecAggError):
        messages.asked({})


def test_what_a_message_says_of_itself_survives_the_way_through_a_flat_record() -> None:
    play = Play(list("abcd"))
    play.offline()
    for message in (play.leader.asked, play.leader.confirmation("a"), AskDraw("r", "e", ("a",), 3), *asked_of(play)):
        assert messages.from_fields(type(message), messages.fields_of(message)) == message


def asked_of(play: Play) -> list[Stage]:
    return [play.leader.ask_shares()["a"], play.leader.ask_confirm()["a"]]


# ---------------------------------------------------------------- what its owner signed


VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, "", "zz", "00", "ff" * 31, "ff" * 32, "ff" * 33, "é", "\ud800", " " * 64,
    [], [None], ["00"], [[[]]], {}, {"a": None}, {"a": "zz"}, {"a": "ff" * 32}, {"a": [1]}, {"\ud800": "00"},
]  # fmt: skip

RAW = [
    b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b"[" * 100_000, b'{"kind":' * 50_000, b"1" * 5000, b"NaN",
    b'{"kind":"keys","kind":"shares"}', b'"\\ud800"', b" " * (9 << 20),
]  # fmt: skip


def lies(play: Play, name: str, kind: str, payload: bytes) -> Iterator[Signed]:
    """A member's statement with garbage for one of its values, or garbage altogether, each with a good signature."""
    key = play.members[name].key
    told = {k: v for k, v in json.loads(payload).items() if k != "kind"}
    for field, value in told.items():
        yield transcript.sign(key, kind, {k: v for k, v in told.items() if k != field})
        for garbage in [*VALUES, *inner(value)]:
            yield transcript.sign(key, kind, {**told, field: garbage})
    for raw in (*RAW, json.dumps({**told, "kind": "other"}).encode()):
        yield Signed(raw, key.sign(f"secagg/{kind}", raw))


def inner(value: Any) -> Iterator[Any]:
    """A list or a map with one entry garbage, one too many, one too few."""
    if isinstance(value, list):
        yield from (value[:-1], value + value[:1], value[::-1])
        yield from ([garbage, *value[1:]] for garbage in VALUES)
    elif isinstance(value, dict):
        first = next(iter(value))
        yield {k: v for k, v in value.items() if k != first}
        yield {**value, "more": value[first]}
        yield from ({**value, first: garbage} for garbage in VALUES)


def harmless(step: Callable[[], Any], otherwise: type[Any]) -> bool:
    """It raises our error, or answers as it should.  -> whether it raised"""
    try:
        answer = step()
    except SecAggError:
        return True
    assert isinstance(answer, otherwise)
    return False


def test_keys_that_their_owner_signed_as_garbage_are_refused_by_server_and_members() -> None:
    play = Play(list("abcd"))
    play.keys()
    own = play.leader.statements[LIAR]
    refused = 0
    for signed in lies(play, LIAR, "keys", own.payload):
        led, twin = copy.deepcopy(play.leader), copy.deepcopy(play.members["a"])
        is_refused = harmless(lambda led=led, s=signed: led.take_keys(LIAR, Keys(s.payload, s.signature)), type(None))
        assert not is_refused or seen(led) == seen(play.leader)
        led.statements[LIAR] = signed
        # server and members judge keys by the same rules
        assert harmless(lambda twin=twin, led=led: twin.answer(led.ask_shares()["a"]), Shares) == is_refused
        assert not is_refused or state(twin) == state(play.members["a"])
        refused += is_refused
    assert refused > 150
    play.shares()
    play.confirm()
    assert play.leader.is_confirmed


def test_shares_that_their_owner_signed_as_garbage_are_refused_by_server_and_members() -> None:
    play = Play(list("abcd"))
    play.keys()
    play.shares()
    own = play.leader.shares[LIAR]
    refused = 0
    for signed in lies(play, LIAR, "shares", own.payload):
        reply = replace(own, payload=signed.payload, signature=signed.signature)
        led = copy.deepcopy(play.leader)
        refused += harmless(lambda led=led, reply=reply: led.take_shares(LIAR, reply), type(None))
        led.shares[LIAR] = reply
        for name in "ab":
            twin = copy.deepcopy(play.members[name])
            harmless(lambda twin=twin, led=led, name=name: twin.answer(led.ask_confirm()[name]), Confirmed)
    assert refused > 100
    play.confirm()
    assert play.leader.is_confirmed


def test_shares_of_which_some_are_garbage_are_refused_by_the_server() -> None:
    play = Play(list("abcd"))
    play.keys()
    play.shares()
    own = play.leader.shares[LIAR]
    told = json.loads(own.payload)
    for field in ("ephemeral", "lists", "keys", "roster", "node"):
        for garbage in VALUES:
            changed = {k: v for k, v in told.items() if k != "kind"} | {field: garbage}
            signed = transcript.sign(play.members[LIAR].key, "shares", changed)
            with pytest.raises(SecAggError):
                play.leader.take_shares(LIAR, replace(own, payload=signed.payload, signature=signed.signature))
    assert play.leader.shares[LIAR] == own


def test_complaints_that_are_garbage_remove_nobody_but_who_signed_them() -> None:
    play = Play(list("abcd"))
    play.keys()
    play.shares()
    told = {"roster": play.leader.asked.roster.hex(), "node": LIAR, "against": "a", "secret": "00" * 32}
    good = transcript.sign(play.members[LIAR].key, "complaint", told)
    signed_sets = copy.deepcopy(play)
    for name, question in signed_sets.leader.ask_confirm().items():
        signed_sets.leader.take_confirmed(name, signed_sets.members[name].answer(question))
    node, shares = signed_sets.members["b"], play.leader.shares["a"]
    before = state(node)
    for complaint in lies(play, LIAR, "complaint", good.payload):
        led = copy.deepcopy(play.leader)
        for entries in ((complaint.payload, complaint.signature), (complaint.payload,), (complaint.payload, b"")):
            harmless(lambda led=led, e=entries: led.take_confirmed(LIAR, Confirmed(b"", b"", e)), type(None))
        assert set(led.removed) <= {LIAR}
        keys, at = play.leader.statements[LIAR], shares.holders.index(LIAR)
        dealt_to = (Signed(shares.payload, shares.signature), shares.ciphertexts[at], shares.hashes[at])
        evidence = dealt.Evidence(complaint, keys, *dealt_to).entries()
        led = copy.deepcopy(signed_sets.leader)
        led.removed["a"] = "so the server says"
        with pytest.raises(SecAggError):
            node.answer(replace(led.ask_confirm()["b"], evidence=evidence))
        assert state(node) == before


@pytest.mark.parametrize("count", [1, 3, 7, 9, 15])
def test_evidence_of_no_whole_number_of_complaints_is_refused(count: int) -> None:
    play = Play(list("abcd"))
    play.offline()
    question = replace(play.leader.ask_confirm()["b"], evidence=(b"x",) * count)
    with pytest.raises(SecAggError):
        play.members["b"].answer(question)


@pytest.mark.parametrize("kind", ["confirm", "survivors", "masked"])
def test_other_statements_that_their_owner_signed_as_garbage_count_as_none(kind: str) -> None:
    play = Play(list("abcd"), MALICIOUS)
    play.offline()
    request, vectors = play.request(0), vectors_of(play.names)
    found = play.tally(request)
    for name in play.names:
        if name != LIAR:
            found.take_masked(name, *play.masked(name, request, *vectors[name]))
    masked, update, counts = play.masked(LIAR, request, *vectors[LIAR])
    twin = copy.deepcopy(found)
    twin.take_masked(LIAR, masked, update, counts)
    survivors = play.members[LIAR].answer(twin.ask_survivors())
    confirmed = play.leader.confirmed[LIAR]
    honest = {"confirm": confirmed.payload, "survivors": survivors.payload, "masked": masked.payload}[kind]
    take: dict[str, Callable[[Signed], None]] = {
        "confirm": lambda s: play.leader.take_confirmed(LIAR, Confirmed(s.payload, s.signature)),
        "survivors": lambda s: twin.take_survivors(LIAR, Survivors(s.payload, s.signature)),
        "masked": lambda s: found.take_masked(LIAR, s, update, counts),
    }
    for signed in lies(play, LIAR, kind, honest):
        if signed.payload != honest:
            with pytest.raises(SecAggError):
                take[kind](signed)
    assert found.survivors == ["a", "b", "c"]


def test_commitments_and_numbers_that_are_garbage_are_refused() -> None:
    members = consortium(5)
    drawing = draw(members, "epoch-1", 3)
    node, liar = members["n0"], members["n4"]
    play = drawn_play(members, drawing, drawing.group_of("n0"))
    for signed in lies(play_of(members), "n4", "commit", drawing.commits["n4"].payload):
        changed = {**drawing.commits, "n4": Committed(signed.payload, signed.signature)}
        if signed.payload != drawing.commits["n4"].payload:
            with pytest.raises(SecAggError):
                node.answer(ask_reveal("epoch-1", changed))
    for signed in lies(play_of(members), "n4", "reveal", drawing.reveals["n4"].payload):
        changed_reveals = {**drawing.reveals, "n4": Revealed(signed.payload, signed.signature)}
        forged = replace(drawing, reveals=changed_reveals)
        asked = replace(play.leader.asked, draw=forged.entries)
        if signed.payload and signed.payload != drawing.reveals["n4"].payload:
            with pytest.raises(SecAggError):
                node.answer(asked)
    assert liar.draw is not None
    play.offline()
    assert play.leader.is_confirmed


def play_of(members: dict[str, Member]) -> Play:
    """Members in a play, for their keys."""
    return Play(sorted(members), members=members, pins=dict(members["n0"].pins))


# ---------------------------------------------------------------- vectors


def array(shape: Any, dtype: Any) -> Any:
    return np.ones(shape, dtype)


VECTORS: dict[str, tuple[Any, Any]] = {
    "one word": (array(1, "uint32"), array(3, "uint64")),
    "one count": (array(5, "uint32"), array(1, "uint64")),
    "nothing": (array(0, "uint32"), array(3, "uint64")),
    "too long": (array(6, "uint32"), array(3, "uint64")),
    "too many counts": (array(5, "uint32"), array(4, "uint64")),
    "a number": (array((), "uint32"), array(3, "uint64")),
    "a matrix": (array((1, 5), "uint32"), array(3, "uint64")),
    "wide words": (array(5, "uint64"), array(3, "uint64")),
    "narrow words": (array(5, "uint8"), array(3, "uint64")),
    "signed words": (array(5, "int32"), array(3, "uint64")),
    "floats": (array(5, "float32"), array(3, "uint64")),
    "texts": (array(5, "U4"), array(3, "uint64")),
    "narrow counts": (array(5, "uint32"), array(3, "uint32")),
    "big-endian words": (array(5, ">u4"), array(3, "uint64")),
    "every other word": (array(10, "uint32")[::2], array(3, "uint64")),
    "a list": ([1, 1, 1, 1, 1], array(3, "uint64")),
    "none": (None, array(3, "uint64")),
}


@pytest.mark.parametrize("vectors", VECTORS.values(), ids=VECTORS)
def test_a_vector_of_another_shape_or_type_is_refused_and_changes_no_sum(vectors: tuple[Any, Any]) -> None:
    play = Play(list("abcd"))
    play.offline()
    request = play.request(0)
    found = play.tally(request)
    hashes = [hashlib.sha256(np.asarray(v, "U" if v is None else None).tobytes()).hexdigest() for v in vectors]
    told = {
        "roster": play.leader.asked.roster.hex(), "index": 0, "request": request.digest, "node": LIAR,
        "update": hashes[0], "counts": hashes[1],
    }  # fmt: skip
    signed = transcript.sign(play.members[LIAR].key, "masked", told)
    before = seen(found)
    try:
        with pytest.raises(SecAggError, match="wrong_shape"):
            found.take_masked(LIAR, signed, *vectors)
    finally:
        assert seen(found) == before


def test_a_vector_that_comes_twice_is_added_up_once() -> None:
    play = Play(list("abcd"))
    play.offline()
    request = play.request(0)
    found = play.tally(request)
    sent = play.masked("a", request, *vectors_of("a")["a"])
    found.take_masked("a", *sent)
    before = seen(found)
    with pytest.raises(SecAggError, match="duplicate"):
        found.take_masked("a", *sent)
    other = replace(sent[0], signature=bytes(64)), sent[1], sent[2]
    with pytest.raises(SecAggError, match="duplicate"):
        found.take_masked("a", *other)
    assert seen(found) == before


def test_a_vector_of_a_stranger_is_refused() -> None:
    play = Play(list("abcd"))
    play.offline(shares=["d"])
    request = play.request(0)
    sent = play.masked("a", request, *vectors_of("a")["a"])
    for name in ("d", "x", ""):
        with pytest.raises(SecAggError, match="unknown_node"):
            play.tally(request).take_masked(name, *sent)


# ---------------------------------------------------------------- numbers and texts that no encoding has room for


@pytest.mark.parametrize("field", ["num_keys", "quorum", "threshold", "num_neighbours"])
@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**30, 10**4000])
def test_a_number_of_more_than_64_bits_is_refused(number: int, field: str) -> None:
    play = Play(list("abcd"))
    values = messages.fields_of(play.leader.asked)
    with pytest.raises(SecAggError):
        play.members["a"].answer(messages.asked({**values, field: number}))
    assert play.members["a"].epoch is None


def test_numbers_of_any_size_have_digests_of_their_own() -> None:
    numbers = [0, 1, -1, (1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 63) - 1, 1 << 64, 10**30, -(10**30), 10**31]
    assert len({transcript.digest("l", n) for n in numbers}) == len(numbers)
    assert transcript.digest("l", 12, 3) != transcript.digest("l", 1, 23)


HALF = "\ud800"
"""Half a character: JSON knows it, UTF-8 does not."""


def test_a_text_that_cannot_be_encoded_changes_nothing_but_a_digest() -> None:
    """A run may be called what it likes; a label, a name, an owner or a threat may not."""
    play = Play(list("abcd"))
    values = messages.fields_of(play.leader.asked)
    for field in ("group", "threat"):
        with pytest.raises(SecAggError):
            play.members["a"].answer(messages.asked({**values, field: HALF}))
    for field in ("names", "organisations", "fingerprints"):
        for at in range(4):
            listed = [HALF if i == at else v for i, v in enumerate(getattr(play.leader.asked, field))]
            with pytest.raises(SecAggError):
                play.members["a"].answer(messages.asked({**values, field: listed}))
    assert play.members["a"].epoch is None
    rosters = {messages.asked({**values, "run": run}).digest for run in (HALF, "\udfff", "?", "\ufffd", "")}
    assert len(rosters) == 5
    for stage in ("shares", "confirm", "survivors", "unmask"):
        kind = next(k for k in messages.ASKED if k.stage == stage)
        empty: messages.Fields = {"stage": stage}
        for field in fields(kind):
            empty[field.name] = {"str": HALF, "int": 0}.get(str(field.type), [])
        with pytest.raises(SecAggError):
            play.members["a"].answer(messages.asked(empty))


@pytest.mark.parametrize("which", ["run", "epoch"])
def test_an_epoch_whose_name_cannot_be_encoded_comes_to_a_sum_like_any_other(which: str) -> None:
    play = Play(list("abcd"), num_keys=1, **{which: HALF})
    play.offline()
    assert epoch.loads(epoch.dumps(play.members["a"].epoch)) == play.members["a"].epoch  # type: ignore[arg-type]
    vectors = vectors_of(play.names)
    _, update, _ = play.round(play.request(0), vectors)
    assert np.array_equal(update, plain_sum(vectors, play.names)[0])


@pytest.mark.parametrize("num_neighbours", [-1, -(10**6), -(10**30)])
def test_a_negative_number_of_neighbours_is_refused(num_neighbours: int) -> None:
    play = Play(list("abcd"))
    for threat in Threat:
        with pytest.raises(SecAggError, match=r"neighbours|all share with each other"):
            play.members["a"].answer(play.ask_keys(num_neighbours=num_neighbours, threat=str(threat)))
    assert play.members["a"].epoch is None


@pytest.mark.parametrize("field", ["organisations", "fingerprints"])
def test_an_owner_or_a_key_too_many_is_refused(field: str) -> None:
    play = Play(list("abcd"))
    with pytest.raises(SecAggError, match="is not the one that is pinned"):
        play.members["a"].answer(play.ask_keys(**{field: (*getattr(play.leader.asked, field), "x")}))


@pytest.mark.parametrize("size", [0, -3, 5, 10**30])
def test_a_group_size_that_makes_no_groups_is_refused(size: int) -> None:
    members = consortium(4)
    with pytest.raises(SecAggError, match=f"groups of {size} among 4 members"):
        members["n0"].answer(AskDraw("run", "epoch-1", tuple(sorted(members)), size))
    assert members["n0"].draw is None
    assert members["n0"].journal.facts() == []


# ---------------------------------------------------------------- a request


MASKINGS: dict[str, list[Any]] = {
    "epoch": ["", "x", HALF],
    "group": ["", "x", HALF],
    "roster": ["", "zz", "00" * 32, HALF],
    "confirmed": ["", "zz", "00" * 32, HALF],
    "members": [(), ("a",), ("b", "c", "d"), ("d", "c", "b", "a"), ("a", "a", "b", "c", "d"), ("a", "b", "c", HALF)],
    "quorum": [0, -1, 1, 10**30],
    "weights": [(), (1,), (1,) * 5, (-1, 1, 1, 1), (0,) * 4, (0, 0, 0, 1), (1, 2, 2, 2), (1, 1, 1, 10**300)],
}


@pytest.mark.parametrize("field", MASKINGS)
def test_a_masking_with_garbage_in_it_masks_nothing(field: str) -> None:
    play = Play(list("abcd"))
    play.offline()
    node, before = play.members[NODE], state(play.members[NODE])
    request, confirmation = play.request(0), play.leader.confirmation(NODE)
    assert request.masking is not None
    for value in MASKINGS[field]:
        update, counts = np.zeros(5, np.uint32), np.zeros(3, np.uint64)
        changed = replace(request, masking=replace(request.masking, **{field: value}))
        with pytest.raises(SecAggError):
            node.mask(changed, confirmation, update, counts)
        assert state(node) == before
        assert not update.any()
        assert not counts.any()
    node.mask(request, confirmation, np.zeros(5, np.uint32), np.zeros(3, np.uint64))


HUGE = 10**400


@pytest.mark.parametrize(
    "changed", [{"weights": (HUGE, 1, 1, 1)}, {"weights": (2, 1, 1, 1), "scale": HUGE}], ids=["weights", "steps"]
)
def test_weights_and_steps_that_no_float_holds_are_refused(changed: dict[str, Any]) -> None:
    play = Play(list("abcd"), terms=replace(TERMS, max_weight_ratio=2.0))
    play.offline()
    request = play.request(0)
    assert request.masking is not None
    asked = replace(request, masking=replace(request.masking, **changed))
    for step in (play.members[NODE].require_maskable, mask_zeros(play.members[NODE])):
        with pytest.raises(SecAggError, match=r"^policy\.secagg: "):
            step(asked, play.leader.confirmation(NODE))


def mask_zeros(node: Member) -> Callable[..., Any]:
    return lambda asked, confirmation: node.mask(asked, confirmation, np.zeros(5, np.uint32), np.zeros(3, np.uint64))


NO_TEXTS: list[dict[str, Any]] = [
    *({"purpose": value} for value in (["train"], ("train",), {}, None, 1, b"train", ["train", "train"])),
    *({"splits": (value,)} for value in (["validation"], {}, None, 0, b"validation", ("validation",))),
]


@pytest.mark.parametrize("changed", NO_TEXTS, ids=str)
def test_a_purpose_or_a_split_that_is_no_text_is_refused(changed: dict[str, Any]) -> None:
    play = Play(list("abcd"))
    play.offline()
    with pytest.raises(SecAggError, match="nothing is masked for"):
        play.members[NODE].require_maskable(play.request(0, **changed), play.leader.confirmation(NODE))


def test_a_request_without_masking_is_refused_in_an_epoch_without_a_name_too() -> None:
    play = Play(list("abcd"), epoch="")
    play.offline()
    with pytest.raises(SecAggError, match="asks for no masking"):
        play.masked("a", play.request(0, masking=None), *vectors_of("a")["a"])


STRANGERS: dict[str, Callable[[Play, Any], Any]] = {
    "keys": lambda play, found: play.leader.take_keys("x", Keys(b"", b"")),
    "shares": lambda play, found: play.leader.take_shares("x", Shares(b"", b"", (), (), ())),
    "confirm": lambda play, found: play.leader.take_confirmed("x", Confirmed(b"", b"")),
    "survivors": lambda play, found: found.take_survivors("x", Survivors(b"", b"")),
    "unmask": lambda play, found: found.take_shares("x", Unmasked((), ())),
    "a complaint": lambda play, found: play.leader.take_confirmed("x", Confirmed(b"", b"", (b"", b""))),
}


@pytest.mark.parametrize("take", STRANGERS.values(), ids=STRANGERS)
def test_a_reply_of_a_stranger_is_refused(take: Callable[[Play, Any], Any]) -> None:
    play = Play(list("abcd"))
    play.offline()
    found = play.tally(play.request(0))
    before = seen(play.leader), seen(found)
    with pytest.raises(SecAggError, match="unknown_node"):
        take(play, found)
    assert (seen(play.leader), seen(found)) == before


def test_shares_of_a_member_whose_keys_were_turned_away_are_turned_away_too() -> None:
    play = Play(list("abcd"))
    play.keys(missing=[LIAR])
    play.shares()
    own = play.leader.shares["a"]
    told = json.loads(own.payload)
    told = {k: v for k, v in told.items() if k != "kind"} | {"node": LIAR}
    told["ephemeral"] = dict.fromkeys("abc", "ff" * 32)
    told["lists"] = {n: dealt.dealt_digest(b"c" * len(own.ciphertexts[1]), own.hashes[0]).hex() for n in "abc"}
    signed = transcript.sign(play.members[LIAR].key, "shares", told)
    reply = Shares(
        signed.payload, signed.signature, ("a", "b", "c"), (b"c" * len(own.ciphertexts[1]),) * 3, (own.hashes[0],) * 3
    )
    with pytest.raises(SecAggError, match="d has no part in this step"):
        play.leader.take_shares(LIAR, reply)
    with pytest.raises(SecAggError, match="d has no part in this step"):
        play.leader.take_confirmed(LIAR, Confirmed(b"", b""))
    play.confirm()
    assert play.leader.is_confirmed
    assert play.leader.members == ["a", "b", "c"]


def test_a_signature_of_a_member_that_dropped_out_is_none_of_a_survivor() -> None:
    play = Play(list("abcd"), MALICIOUS)
    play.offline()
    request = play.request(0)
    found = play.tally(request)
    for name in "abc":
        found.take_masked(name, *play.masked(name, request, *vectors_of(name)[name]))
    reply = play.members["a"].answer(found.ask_survivors())
    told = {k: v for k, v in json.loads(reply.payload).items() if k != "kind"}
    signed = transcript.sign(play.members[LIAR].key, "survivors", told)
    with pytest.raises(SecAggError, match="d is not in the sum"):
        found.take_survivors(LIAR, Survivors(signed.payload, signed.signature))
    assert found.agreed == {}


def test_shares_of_nobody_change_nothing() -> None:
    play = Play(list("abcd"))
    play.offline()
    request = play.request(0)
    found = play.tally(request)
    for name in "abc":
        found.take_masked(name, *play.masked(name, request, *vectors_of(name)[name]))
    good = play.members["a"].answer(found.ask_unmask())
    for holder in ("x", "", LIAR):
        for reply in (Unmasked((), ()), Unmasked(("a",), (b"",)), good):
            with pytest.raises(SecAggError, match="is not in the sum"):
                found.take_shares(holder, reply)
    assert found.held == {}
    with pytest.raises(SecAggError, match="bad_share"):
        found.take_shares("b", good)
    assert found.held == {}
    found.take_shares("a", good)


def test_a_member_whose_journal_is_empty_and_whose_epoch_is_gone_says_so() -> None:
    play = Play(list("abcd"))
    play.offline()
    node = play.members["a"]
    node.epoch, node.journal = None, Memory()
    for question in (play.leader.ask_shares()["a"], play.leader.ask_confirm()["a"]):
        with pytest.raises(SecAggError, match="no such epoch"):
            node.answer(question)
    with pytest.raises(SecAggError, match="no such epoch"):
        play.masked("a", play.request(0), *vectors_of("a")["a"])
