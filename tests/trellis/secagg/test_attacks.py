"""A server, or a node that colludes with it, against a real node: what it is refused, and what it would have learned.

Every attack is made in full: where a node's check can be stepped around, the test does so (a journal that forgets, a
member asked twice in two copies) and computes what the server would then have.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.trellis.secagg.play import (
    SPARSE,
    TERMS,
    Drawing,
    Memory,
    Play,
    Vectors,
    ask_reveal,
    consortium,
    draw,
    drawn_play,
    pins_of,
    plain_sum,
    vectors_of,
)
from trellis import identity
from trellis.errors import SecAggError
from trellis.secagg import (
    consent,
    counts,
    dealt,
    epoch,
    graph,
    keys,
    prg,
    quantise,
    roster,
    shamir,
    statements,
    tolerance,
    transcript,
)
from trellis.secagg.consent import Terms
from trellis.secagg.epoch import Epoch
from trellis.secagg.member import Member
from trellis.secagg.messages import AskConfirm, AskShares, AskUnmask, Confirmation, Confirmed, Keys, Revealed, Shares
from trellis.secagg.statements import COUNTS, UPDATE
from trellis.secagg.tally import GroupLost, Tally, unmasked
from trellis.secagg.transcript import Signed
from trellis.types import CountField, Request, Threat
from trellis.vectors import digest

SEMI_HONEST, MALICIOUS = Threat.semi_honest, Threat.malicious_server
VICTIM = "e"
ERROR = 1e-9
"""How often a test of randomness fails where nothing is wrong: the OS's randomness has no seed."""


def refuses(match: str | None = None, code: str | None = None) -> Any:
    """The node says no, and nothing else."""
    return pytest.raises(SecAggError, match=match if match is not None else code)


@cache
def _played(threat: Threat, names: str, num_keys: int, terms: Terms) -> Play:
    play = Play(list(names), threat, num_keys=num_keys, terms=terms)
    play.offline()
    assert play.leader.is_confirmed
    return play


def ready(threat: Threat = SEMI_HONEST, *, names: str = "abcde", num_keys: int = 2, terms: Terms = TERMS) -> Play:
    """A group whose offline phase is done."""
    return copy.deepcopy(_played(threat, names, num_keys, terms))


def memory(node: Member) -> Epoch:
    assert node.epoch is not None
    return node.epoch


def masked(play: Play, request: Request, vectors: Vectors, *, missing: Iterable[str] = ()) -> tuple[Tally, Vectors]:
    """The masked vectors that the server has: their sum, and each."""
    found, seen = play.tally(request), {}
    for name in sorted(set(play.leader.members) - set(missing)):
        signed, *words = play.masked(name, request, *vectors[name])
        found.take_masked(name, signed, *words)
        seen[name] = (words[0], words[1])
    return found, seen


def shares_of(reply: Any, dealer: str) -> bytes:
    return bytes(dict(zip(reply.dealers, reply.shares, strict=True))[dealer])


def secret_from(play: Play, shares: Mapping[str, bytes], threshold: int | None = None) -> bytes:
    """The secret that these holders' shares give."""
    at = roster.points(play.leader.asked.names)
    holders = sorted(shares)[: threshold or play.leader.asked.threshold]
    return shamir.combine([shares[h] for h in holders], shamir.lagrange_at_zero([at[h] for h in holders]))


def without_masks(
    play: Play, name: str, request: Request, words: Any, *, seed: bytes | None = None, key: bytes | None = None
) -> Any:
    """One member's masked update without its own mask, and without those it has in common with others."""
    index, asked, masks = request.key_index or 0, play.leader.asked, []
    if seed is not None:
        masks.append((statements.self_mask(asked.roster, index, request.digest, name, seed), -1))
    for other in play.leader.members if key is not None else ():
        if other != name:
            public = play.leader.published[other].mask[index]
            pair = statements.pair_mask(asked.roster, index, request.digest, name, other, key or b"", public)
            masks.append((pair, -1 if name < other else 1))
    words = words.copy()
    prg.add_masks(words, masks, region=UPDATE)
    return words


def minus(a: Any, b: Any) -> Any:
    with np.errstate(over="ignore"):
        return a - b


def is_near(a: Any, b: Any) -> bool:
    """Whether more coordinates of two long vectors lie within 2^20 of each other than chance, 1 in 2048, explains."""
    assert a.size >= 256
    return int((np.abs(minus(a, b).view(np.int32).astype(np.int64)) < 1 << 20).sum()) > 10 + a.size // 100


def looks_uniform(words: Any) -> bool:
    """Chi-square over bytes."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    return bool(stats.chisquare(counts).pvalue > ERROR)


def forgetting(play: Play) -> None:
    """What a node would do without a journal: as if every fact were lost."""
    for node in play.members.values():
        node.journal = Memory()


def distance(a: bytes, b: bytes) -> int:
    """Bits that differ."""
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()


def all_far_apart(found: list[bytes]) -> bool:
    """Whether no two of many 256-bit strings are closer or further than independent ones can be: 8.5 sigma, 2e-17."""
    return all(60 < distance(a, b) < 196 for a, b in itertools.combinations(found, 2))


# ---------------------------------------------------------------- the keystream has 256 bits of key


def test_every_mask_has_a_key_of_its_own_over_members_indices_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    play, used = ready(num_keys=2), []
    add_masks = prg.add_masks

    def spied(words: Any, masks: Any, *, region: int = 0) -> None:
        used.extend((key, region) for key, _ in masks)
        add_masks(words, masks, region=region)

    monkeypatch.setattr(prg, "add_masks", spied)
    for index, base in ((0, "one base"), (1, "another")):
        masked(play, play.request(index, base=base), vectors_of(play.names))

    streams = {key for key, _ in used}
    assert all(len(key) == 32 for key in streams)
    # 5 members, 2 indices: a key each of their own, and one a pair, which both of the pair use
    assert len(streams) == 2 * (5 + 10)
    assert len(set(used)) == 2 * len(streams)  # update and counts lie in regions of their own
    assert all_far_apart(sorted(streams))


def test_no_bit_of_a_key_is_fixed() -> None:
    (private, _), (_, public) = keys.generate(), keys.generate()
    roster_digest = secrets.token_bytes(32)
    own = [statements.self_mask(roster_digest, i, "request", "a", secrets.token_bytes(32)) for i in range(1000)]
    pair = [statements.pair_mask(roster_digest, i, "request", "a", "b", private, public) for i in range(1000)]
    for found in (own, pair):
        numbers = [int.from_bytes(key, "big") for key in found]
        ones = [sum(n >> bit & 1 for n in numbers) for bit in range(256)]
        # Flower's seeds have four bits that are always 0, and 28 in all (facts of `trellis.secagg`)
        assert all(350 < count < 650 for count in ones)  # 9.5 sigma: 1e-18 over all bits
        assert len(set(found)) == 1000


def test_every_bit_of_the_request_and_of_the_seed_changes_the_whole_keystream() -> None:
    request, seed, at = (secrets.token_bytes(32) for _ in range(3))
    (private, _), (_, public) = keys.generate(), keys.generate()

    def streams(request: bytes, seed: bytes) -> list[bytes]:
        own = statements.self_mask(at, 0, request.hex(), "a", seed)
        pair = statements.pair_mask(at, 0, request.hex(), "a", "b", private, public)
        return [prg.keystream(key, 8, np.uint32).tobytes() for key in (own, pair)]

    def flipped(data: bytes, bit: int) -> bytes:
        return bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(data))

    found = streams(request, seed)
    for bit in range(256):
        found += streams(flipped(request, bit), seed)
        found += streams(request, flipped(seed, bit))[:1]
    assert len(set(found)) == len(found)
    assert all(60 < distance(found[0], other) < 196 for other in found[1:])


def test_a_mask_belongs_to_one_run_epoch_index_pair_and_request() -> None:
    (private, _), (_, public) = keys.generate(), keys.generate()
    told = [(b"r" * 32, 0, "q", "a", "b"), (b"s" * 32, 0, "q", "a", "b"), (b"r" * 32, 1, "q", "a", "b")]
    told += [(b"r" * 32, 0, "Q", "a", "b"), (b"r" * 32, 0, "q", "a", "c"), (b"r" * 32, 0, "q", "ab", "")]
    assert len({statements.pair_mask(*parts, private, public) for parts in told}) == len(told)
    one, again = Play(["a", "b", "c"]).leader.asked, Play(["a", "b", "c"]).leader.asked
    assert one.roster == again.roster
    for changed in ({"run": "x"}, {"epoch": "x"}, {"group": "x"}, {"quorum": 3}, {"threat": "x"}, {"num_keys": 4}):
        assert replace(one, **changed).roster != one.roster


# ---------------------------------------------------------------- a node is alive or dead, never both


@pytest.mark.parametrize("dead_first", [True, False])
def test_a_node_never_gives_both_shares_of_a_peer(dead_first: bool) -> None:
    play = ready()
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    alive = found.ask_unmask()
    dead = replace(alive, survivors=tuple(n for n in alive.survivors if n != VICTIM))
    first, second = (dead, alive) if dead_first else (alive, dead)
    for name in "abcd":
        node = play.members[name]
        given = node.answer(first)
        with refuses(code="policy.secagg"):
            node.answer(second)
        assert len(set(given.dealers)) == len(given.dealers) == len(given.shares)


def test_with_both_shares_the_server_would_read_the_vector_of_a_node() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    request = play.request(0)
    found, seen = masked(play, request, vectors)
    alive = found.ask_unmask()
    dead = replace(alive, survivors=("a", "b", "c", "d"))
    twins = copy.deepcopy(play.members)
    seed = secret_from(play, {n: shares_of(play.members[n].answer(alive), VICTIM) for n in "abcd"})
    key = secret_from(play, {n: shares_of(twins[n].answer(dead), VICTIM) for n in "abcd"})
    read = without_masks(play, VICTIM, request, seen[VICTIM][0], seed=seed, key=key)
    assert np.array_equal(read, vectors[VICTIM][0])
    for half in ({"seed": seed}, {"key": key}):
        assert not np.array_equal(without_masks(play, VICTIM, request, seen[VICTIM][0], **half), vectors[VICTIM][0])


def test_a_server_that_splits_a_group_gets_too_few_shares_of_either_kind() -> None:
    for threat in Threat:
        play = ready(threat)
        quorum = play.leader.asked.threshold
        found, _ = masked(play, play.request(0), vectors_of(play.names))
        alive = found.ask_unmask()
        dead = replace(alive, survivors=("a", "b", "c", "d"))
        seeds, mask_keys = {}, {}
        for name in play.names:
            for question, kept in ((alive, seeds), (dead, mask_keys)):
                play._do(name, lambda n, p=play, q=question, k=kept: k.update({n: p.members[n].answer(q)}))
        assert not set(seeds) & set(mask_keys)
        assert min(len(seeds), len(mask_keys)) < quorum


# ---------------------------------------------------------------- who, how many, and under what assumption


@pytest.mark.parametrize("size", range(3, 9))
@pytest.mark.parametrize("threat", list(Threat))
def test_a_threshold_below_the_floor_is_refused_whoever_asks(threat: Threat, size: int) -> None:
    play = Play([f"n{i}" for i in range(size)], threat)
    least = tolerance.least_threshold(threat, size)
    node = play.members["n0"]
    for quorum in {1, 0, -1, least - 1, size + 1}:
        with refuses("quorum"):
            node.answer(play.ask_keys(quorum=quorum, threshold=quorum))
    for threshold in {1, least - 1}:
        with refuses("threshold"):
            node.answer(play.ask_keys(quorum=least, threshold=threshold))
    assert node.epoch is None
    node.answer(play.ask_keys(quorum=least, threshold=least))


def test_with_a_threshold_of_one_a_share_would_be_the_secret() -> None:
    secret = secrets.token_bytes(32)
    with pytest.raises(ValueError, match="threshold 1"):
        shamir.split(secret, [1, 2, 3], 1)
    constant = [secret for _ in range(3)]  # a polynomial of degree 0, wherever it is evaluated
    assert shamir.combine([b"\0" + constant[2]], shamir.lagrange_at_zero([3])) == secret


def test_a_lower_threat_than_the_sites_own_is_refused() -> None:
    terms = replace(TERMS, least_threat=MALICIOUS)
    play = Play(list("abcd"), SEMI_HONEST, terms=terms)
    with refuses("semi_honest"):
        play.members["a"].answer(play.leader.asked)
    with refuses("no threat"):
        play.members["a"].answer(play.ask_keys(threat="none"))
    Play(list("abcd"), MALICIOUS, terms=terms).keys()
    assert Terms().least_threat is MALICIOUS


def test_a_site_that_runs_any_code_refuses_to_be_told_that_it_is_safe_from_a_malicious_server() -> None:
    play = Play(list("abcd"), MALICIOUS, terms=replace(TERMS, code_is_pinned=False))
    with refuses("checks the code"):
        play.members["a"].answer(play.leader.asked)
    assert not Terms().code_is_pinned


def test_a_sybil_is_no_member() -> None:
    play = Play(list("abcd"))
    sybils = {**play.pins, **pins_of(["s1", "s2"])}
    asked = Play(["a", "b", "s1", "s2"], pins=sybils).leader.asked
    with refuses("whole group"):
        play.members["a"].answer(asked)
    with refuses("whole group"):
        play.members["a"].answer(Play([*"abcd", "s1"], pins=sybils).leader.asked)


@pytest.mark.parametrize("field", ["fingerprints", "organisations"])
def test_a_key_or_an_owner_that_is_not_the_pinned_one_is_refused(field: str) -> None:
    play = Play(list("abcd"))
    values = list(getattr(play.leader.asked, field))
    for changed in (["x", *values[1:]], [values[1], values[0], *values[2:]], values[:-1], []):
        with refuses("pinned"):
            play.members["a"].answer(play.ask_keys(**{field: tuple(changed)}))


def test_a_roster_that_leaves_members_out_or_names_them_twice_is_refused() -> None:
    play = Play(list("abcde"))
    for names in ("abcd", "abc", "bcde", "aabcde", "edcba", ""):
        asked = Play(list("abcde")).leader.asked
        named = [play.pins[n] for n in names]
        asked = replace(
            asked,
            names=tuple(names),
            organisations=tuple(p.organisation for p in named),
            fingerprints=tuple(identity.fingerprint(p.public_key) for p in named),
        )
        with refuses(code="policy.secagg"):
            play.members["a"].answer(asked)


def test_more_members_of_one_organisation_than_the_site_allows_are_refused() -> None:
    pins = pins_of("abcdef", organisation=lambda n: {"a": "A", "b": "A"}.get(n, n.upper()))
    asked = Play(list("abcdef"), pins=pins)
    with refuses("more than 1 members of one organisation"):
        asked.members["c"].answer(asked.leader.asked)
    Play(list("abcdef"), pins=pins, terms=replace(TERMS, max_per_organisation=2)).keys()


def test_fewer_organisations_than_the_site_asks_for_are_refused_before_and_after_dropouts() -> None:
    terms = replace(TERMS, min_group=3, max_per_organisation=2)
    two = pins_of("abcdef", organisation=lambda n: "XY"[n in "def"])
    few = Play(list("abcdef"), pins=two, terms=replace(terms, max_per_organisation=3))
    with refuses("2 organisations, the site asks for 3"):
        few.members["a"].answer(few.leader.asked)

    three = pins_of("abcdef", organisation=lambda n: {"a": "X", "b": "X", "c": "Y", "d": "Y"}.get(n, "Z"))
    play = Play(list("abcdef"), pins=three, terms=terms)
    play.offline()
    assert play.leader.asked.quorum == 4
    with pytest.raises(GroupLost):
        play.round(play.request(0), vectors_of(play.names), mask="ef")
    assert "2 organisations, the site asks for 3" in play.refused["a"].evidence
    # the same at the set that is confirmed
    play = Play(list("abcdef"), pins=three, terms=terms)
    play.offline(shares="ef")
    assert "2 organisations" in play.refused["a"].evidence


def test_more_key_indices_than_the_site_allows_are_refused() -> None:
    play = Play(list("abc"), terms=replace(TERMS, max_keys=4))
    for num_keys in (0, -1, 5, 10**6):
        with refuses("keys for an epoch"):
            play.members["a"].answer(play.ask_keys(num_keys=num_keys))


def test_an_epoch_is_begun_once() -> None:
    play = Play(list("abc"))
    play.keys()
    before = epoch.dumps(memory(play.members["a"]))
    with refuses("begun"):
        play.members["a"].answer(play.ask_keys(num_keys=2))
    assert epoch.dumps(memory(play.members["a"])) == before


# ---------------------------------------------------------------- keys


def said_again(play: Play, name: str, kind: str, payload: bytes, change: Callable[[dict[str, Any]], Any]) -> Signed:
    """A member's statement with something changed, and its good signature: the member lies."""
    fields = json.loads(payload)
    change(fields)
    return transcript.sign(play.members[name].key, kind, {k: v for k, v in fields.items() if k != "kind"})


def passed_on(play: Play, name: str, signed: Signed) -> AskShares:
    """The question to "a" of a server that passes on whatever a member says of its keys."""
    play.leader.statements[name] = signed
    return play.leader.ask_shares()["a"]


@pytest.mark.parametrize("which", ["mask", "transport"])
def test_a_key_that_the_server_puts_in_the_place_of_a_members_is_refused(which: str) -> None:
    play = Play(list("abcde"))
    play.keys()
    private, public = keys.generate()

    def swap(fields: dict[str, Any]) -> None:
        if which == "mask":
            fields["mask"][0] = public.hex()
        else:
            fields["transport"]["a"] = public.hex()

    own = play.leader.statements[VICTIM]
    forged = said_again(play, "b", "keys", own.payload, swap)  # signed, but by another member
    for signed in (Signed(forged.payload, own.signature), forged, Signed(forged.payload, bytes(64))):
        with refuses(code="bad_signature"):
            play.members["a"].answer(passed_on(play, VICTIM, signed))
    assert memory(play.members["a"]).stage == epoch.KEYS
    # with such a key the server would know the mask of a and e as well as they do
    secret, victims = memory(play.members["a"]).mask_secrets[:32], play.leader.published["a"].mask[0]
    told = (play.leader.asked.roster, 0, "request", "a", VICTIM)
    assert statements.pair_mask(*told, private, victims) == statements.pair_mask(*told, secret, public)


def test_a_member_sees_that_its_own_keys_were_replaced() -> None:
    play = Play(list("abc"))
    play.keys()
    other = copy.deepcopy(play.members["a"])
    other.epoch = None
    reply = other.answer(play.leader.asked)
    with refuses("its own keys were replaced"):
        play.members["a"].answer(passed_on(play, "a", Signed(reply.payload, reply.signature)))


SMALL_ORDER = [
    *(n.to_bytes(32, "little") for n in (0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18)),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


@pytest.mark.parametrize("top_bit", [0, 0x80])
@pytest.mark.parametrize("key", SMALL_ORDER, ids=lambda k: k.hex()[:6])
@pytest.mark.parametrize("which", ["mask", "transport"])
def test_a_key_of_small_order_is_refused_by_server_and_members(which: str, key: bytes, top_bit: int) -> None:
    play = copy.deepcopy(_with_keys())
    key = key[:-1] + bytes([key[-1] | top_bit])

    def weaken(fields: dict[str, Any]) -> None:
        if which == "mask":
            fields["mask"][1] = key.hex()
        else:
            fields["transport"]["b"] = key.hex()

    signed = said_again(play, VICTIM, "keys", play.leader.statements[VICTIM].payload, weaken)
    with refuses(code="bad_key"):
        play.leader.take_keys(VICTIM, Keys(signed.payload, signed.signature))
    with refuses(code="bad_key"):
        play.members["a"].answer(passed_on(play, VICTIM, signed))


@cache
def _with_keys() -> Play:
    play = Play(list("abcde"))
    play.keys()
    return play


@pytest.mark.parametrize("which", ["mask", "transport", "own"])
def test_one_key_in_two_places_is_refused_by_server_and_members(which: str) -> None:
    play = copy.deepcopy(_with_keys())
    others = play.leader.published["b"]

    def repeat(fields: dict[str, Any]) -> None:
        if which == "mask":
            fields["mask"][1] = others.mask[1].hex()
        elif which == "transport":
            fields["transport"]["b"] = others.transport["a"].hex()
        else:
            fields["mask"][1] = fields["mask"][0]

    signed = said_again(play, VICTIM, "keys", play.leader.statements[VICTIM].payload, repeat)
    with refuses(code="bad_key"):
        play.leader.take_keys(VICTIM, Keys(signed.payload, signed.signature))
    with refuses(code="bad_key"):
        play.members["a"].answer(passed_on(play, VICTIM, signed))


def test_one_key_in_two_spellings_is_one_key() -> None:
    play = copy.deepcopy(_with_keys())
    key = play.leader.published["b"].mask[1]
    spelt = key[:-1] + bytes([key[-1] ^ 0x80])
    assert keys.agree(bytes(range(32)), key, "x") == keys.agree(bytes(range(32)), spelt, "x")
    change = {"mask": [play.leader.published[VICTIM].mask[0].hex(), spelt.hex(), bytes([9] * 32).hex()]}
    signed = said_again(play, VICTIM, "keys", play.leader.statements[VICTIM].payload, lambda f: f.update(change))
    with refuses("e and b publish one key"):
        play.leader.take_keys(VICTIM, Keys(signed.payload, signed.signature))
    with refuses("e and b publish one key"):
        play.members["a"].answer(passed_on(play, VICTIM, signed))
    own = {"mask": [key.hex(), spelt.hex(), bytes([9] * 32).hex()]}  # and within one member's keys
    signed = said_again(play, "b", "keys", play.leader.statements["b"].payload, lambda f: f.update(own))
    with refuses("a public key of b stands there twice"):
        play.leader.take_keys("b", Keys(signed.payload, signed.signature))


# ---------------------------------------------------------------- shares and complaints


@cache
def _dealt_out(threat: Threat) -> Play:
    play = Play(list("abcde"), threat)
    play.keys()
    play.shares()
    return play


def dealt_out(threat: Threat = SEMI_HONEST) -> Play:
    """A group whose members have dealt their shares, which nobody has seen."""
    return copy.deepcopy(_dealt_out(threat))


def dealing(play: Play, dealer: str, holder: str, ciphertext: bytes) -> Shares:
    """The shares of a dealer that sends one holder something else, and signs it."""
    shares = play.leader.shares[dealer]
    at = shares.holders.index(holder)
    listed = dealt.dealt_digest(ciphertext, shares.hashes[at]).hex()
    signed = said_again(play, dealer, "shares", shares.payload, lambda f: f["lists"].update({holder: listed}))
    ciphertexts = (*shares.ciphertexts[:at], ciphertext, *shares.ciphertexts[at + 1 :])
    return replace(shares, payload=signed.payload, signature=signed.signature, ciphertexts=ciphertexts)


def complaint_of(play: Play, name: str, dealer: str, secret: bytes) -> Signed:
    fields = {"roster": play.leader.asked.roster.hex(), "node": name, "against": dealer, "secret": secret.hex()}
    return transcript.sign(play.members[name].key, "complaint", fields)


def signed_by_all(play: Play) -> None:
    """All members sign the set as it is; a complaint is none of it."""
    for name, question in play.leader.ask_confirm().items():
        play.leader.take_confirmed(name, play.members[name].answer(question))


def exact_without(play: Play, gone: Iterable[str]) -> None:
    """The group goes on without those who were removed, and its sum is right."""
    left = sorted(set(play.names) - set(gone))
    assert play.leader.members == left
    assert play.leader.is_confirmed
    vectors = vectors_of(play.names)
    found, *total = play.round(play.request(0), vectors)
    assert found.survivors == left
    for got, expected in zip(total, plain_sum(vectors, left), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("what", ["ciphertexts", "hashes", "payloads", "signatures"])
def test_a_server_that_tampers_with_what_was_dealt_provokes_no_complaint(what: str) -> None:
    play = dealt_out()
    question = play.leader.ask_confirm()["a"]
    values = getattr(question, what)
    transport = dict(memory(play.members["a"]).transport)
    flipped = bytes([values[1][0] ^ 1]) + values[1][1:]
    for changed in (flipped, b"", values[1][:-1], values[2]):
        with refuses():
            play.members["a"].answer(replace(question, **{what: (values[0], changed, *values[2:])}))
        assert memory(play.members["a"]).stage == epoch.SHARES
        assert memory(play.members["a"]).transport == transport
    play.confirm()
    exact_without(play, [])


def test_a_statement_of_another_set_of_keys_is_refused() -> None:
    play, other = dealt_out(), Play(list("abcde"))
    other.keys(missing=["b"])
    other.shares()
    question, foreign = play.leader.ask_confirm()["a"], other.leader.shares[VICTIM]
    at = question.dealers.index(VICTIM)
    swapped = {
        "payloads": (*question.payloads[:at], foreign.payload),
        "signatures": (*question.signatures[:at], foreign.signature),
    }
    with refuses():
        play.members["a"].answer(replace(question, **swapped))


@pytest.mark.parametrize("threat", list(Threat))
def test_a_dealer_that_sends_garbage_is_removed_and_the_others_sign_the_smaller_set(threat: Threat) -> None:
    play = dealt_out(threat)
    size = len(play.leader.shares["b"].ciphertexts[2])
    play.leader.take_shares("b", dealing(play, "b", VICTIM, secrets.token_bytes(size)))
    play.confirm()
    assert list(play.leader.removed) == ["b"]
    assert "cannot be opened" in play.leader.removed["b"]
    exact_without(play, ["b"])


def test_a_dealer_that_sends_other_shares_than_it_hashed_is_removed() -> None:
    play = dealt_out()
    public = play.leader.published[VICTIM].transport["b"]
    fresh, ciphertext = dealt.seal(play.leader.asked.roster, "b", VICTIM, public, bytes(33) * 6)
    listed = dealing(play, "b", VICTIM, ciphertext)
    signed = said_again(play, "b", "shares", listed.payload, lambda f: f["ephemeral"].update({VICTIM: fresh.hex()}))
    play.leader.take_shares("b", replace(listed, payload=signed.payload, signature=signed.signature))
    play.confirm()
    assert "are not the shares it signed" in play.leader.removed["b"]
    exact_without(play, ["b"])


def test_a_dealer_whose_encryption_key_is_of_small_order_is_removed() -> None:
    play = dealt_out()
    own = play.leader.shares["b"]
    signed = said_again(play, "b", "shares", own.payload, lambda f: f["ephemeral"].update({VICTIM: bytes(32).hex()}))
    play.leader.take_shares("b", replace(own, payload=signed.payload, signature=signed.signature))
    play.confirm()
    assert "small order" in play.leader.removed["b"]
    exact_without(play, ["b"])


def test_a_complaint_gives_away_one_key_and_no_share_of_an_honest_dealer() -> None:
    play = dealt_out()
    size = len(play.leader.shares["b"].ciphertexts[2])
    play.leader.take_shares("b", dealing(play, "b", VICTIM, secrets.token_bytes(size)))
    reply = play.members[VICTIM].answer(play.leader.ask_confirm()[VICTIM])
    (payload, _) = reply.complaints
    revealed = bytes.fromhex(json.loads(payload)["secret"])
    for dealer in "acd":
        shares = play.leader.shares[dealer]
        at = shares.holders.index(VICTIM)
        public = bytes.fromhex(json.loads(shares.payload)["ephemeral"][VICTIM])
        with refuses(code="bad_share"):
            dealt.opened(
                play.leader.asked.roster, dealer, VICTIM, private=revealed, public=public,
                ciphertext=shares.ciphertexts[at], hashes=shares.hashes[at], num_keys=3,
            )  # fmt: skip


@pytest.mark.parametrize("honest_key", [True, False], ids=["its own key", "a forged key"])
def test_a_member_that_complains_without_reason_is_removed(honest_key: bool) -> None:
    play = dealt_out()
    secret = memory(play.members[VICTIM]).transport["b"] if honest_key else keys.generate()[0]
    complaint = complaint_of(play, VICTIM, "b", secret)
    play.leader.take_confirmed(VICTIM, complaining(complaint))
    assert list(play.leader.removed) == [VICTIM]
    play.confirm()
    exact_without(play, [VICTIM])


def complaining(complaint: Signed) -> Confirmed:
    return Confirmed(b"", b"", (complaint.payload, complaint.signature))


def test_a_complaint_that_its_sender_did_not_sign_convicts_nobody() -> None:
    play = dealt_out()
    own = complaint_of(play, "c", VICTIM, secrets.token_bytes(32))
    framed = json.loads(own.payload) | {"node": VICTIM, "against": "b"}
    forged = transcript.sign(play.members["c"].key, "complaint", {k: v for k, v in framed.items() if k != "kind"})
    with refuses(code="bad_signature"):
        play.leader.take_confirmed(VICTIM, complaining(forged))
    for against in ("x", VICTIM):
        with refuses(code="bad_complaint"):
            play.leader.take_confirmed(VICTIM, complaining(complaint_of(play, VICTIM, against, bytes(32))))
    assert play.leader.removed == {}


def smaller(play: Play, gone: str, evidence: tuple[bytes, ...] = ()) -> dict[str, AskConfirm]:
    """The questions of a server that leaves a member out of the set, with such evidence."""
    play.leader.removed[gone] = "the server says so"
    return {name: replace(q, evidence=evidence) for name, q in play.leader.ask_confirm().items()}


def test_a_node_that_has_signed_a_set_signs_none_that_lacks_a_member_without_proof() -> None:
    play = dealt_out()
    signed_by_all(play)
    before = epoch.dumps(memory(play.members["a"]))
    someone = dealt.Evidence(
        complaint_of(play, "c", "d", play.leader.statements["c"].payload[:32]),
        play.leader.statements["c"], Signed(play.leader.shares["d"].payload, play.leader.shares["d"].signature),
        play.leader.shares["d"].ciphertexts[2], play.leader.shares["d"].hashes[2],
    )  # fmt: skip
    with refuses("missing without a proven complaint"):
        play.members["a"].answer(smaller(play, "b")["a"])
    for evidence in (someone.entries(), someone.entries()[:7], (b"",) * 8):
        with refuses():
            play.members["a"].answer(smaller(play, "b", evidence)["a"])
    assert epoch.dumps(memory(play.members["a"])) == before


def test_a_set_that_was_signed_shrinks_where_a_complaint_proves_it() -> None:
    play = dealt_out()
    size = len(play.leader.shares["b"].ciphertexts[2])
    play.leader.take_shares("b", dealing(play, "b", VICTIM, secrets.token_bytes(size)))
    for name, question in play.leader.ask_confirm().items():
        if name != VICTIM:
            assert not play.members[name].answer(question).complaints
    play.leader.take_confirmed(VICTIM, play.members[VICTIM].answer(play.leader.ask_confirm()[VICTIM]))
    play.confirm()
    exact_without(play, ["b"])


def test_shares_that_are_good_by_hash_and_give_no_secret_convict_their_dealer(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, reason in ((dealt.SEED, "do not give its seed"), (dealt.KEY, "do not give its mask key")):
        play = Play(list("abcde"))
        play.keys()
        honest = statements.split_secrets

        def spoilt(*args: Any, kind: int = kind, honest: Any = honest) -> list[bytes]:
            first, *others = honest(*args)
            at = kind * shamir.SHARE_BYTES
            return [first[:at] + bytes(32) + b"\7" + first[at + 33 :], *others]

        with monkeypatch.context() as patched:
            patched.setattr(statements, "split_secrets", spoilt)
            play.leader.take_shares("b", play.members["b"].answer(play.leader.ask_shares()["b"]))
        play.shares(missing=["b"])
        play.confirm()
        assert play.leader.is_confirmed  # nobody can see it yet
        with pytest.raises(GroupLost, match=reason) as lost:
            play.round(play.request(0), vectors_of(play.names), mask=["b"] if kind == dealt.KEY else [])
        assert lost.value.liar == "b"


def test_a_wrong_share_names_its_sender_and_the_group_has_its_sum() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    found, _ = masked(play, play.request(0), vectors)
    reply = play.members["c"].answer(found.ask_unmask())
    for at, wrong in ((0, bytes(33)), (3, b""), (2, reply.shares[1])):
        shares = list(reply.shares)
        shares[at] = wrong
        with refuses(code="bad_share"):
            found.take_shares("c", replace(reply, shares=tuple(shares)))
    assert found.held == {}
    play.settle(found, unmask=["c"])
    update, counts = unmasked(found.update, found.counts, found.masks())
    assert np.array_equal(update, plain_sum(vectors, play.names)[0])
    assert np.array_equal(counts, plain_sum(vectors, play.names)[1])


# ---------------------------------------------------------------- the set, signed


def confirmations(play: Play, chosen: Iterable[str], *, said: str = "", signer: str = "") -> Confirmation:
    """Signatures over a set, by their owners or by one for all."""
    chosen = tuple(chosen)
    told = {"roster": play.leader.asked.roster.hex(), "set": said or play.leader.set_digest.hex()}
    signed = [transcript.sign(play.members[signer or n].key, "confirm", told) for n in chosen]
    return Confirmation(chosen, tuple(s.payload for s in signed), tuple(s.signature for s in signed))


@pytest.mark.parametrize("threat", list(Threat))
def test_a_node_masks_only_for_a_set_that_enough_members_have_signed(threat: Threat) -> None:
    play = ready(threat)
    request, node, quorum = play.request(0), play.members["a"], play.leader.asked.quorum
    few = play.names[: quorum - 1]
    other = "00" * 32
    zeros = np.zeros(5, np.uint32), np.zeros(3, np.uint64)
    for wrong in (
        Confirmation((), (), ()),
        confirmations(play, few),
        confirmations(play, play.names, said=other),
        confirmations(play, play.names, signer="b"),
    ):
        with refuses("members confirmed the set"):
            node.mask(request, wrong, *zeros)
    twice = confirmations(play, few)
    again = Confirmation(*(field + field[:1] for field in (twice.names, twice.payloads, twice.signatures)))
    with refuses(code="wrong_records"):
        node.mask(request, again, *zeros)
    assert node.journal.facts() == []
    assert not zeros[0].any()
    node.mask(request, confirmations(play, play.names[:quorum]), *zeros)


def test_a_request_about_another_set_quorum_or_roster_is_refused() -> None:
    play = ready()
    request = play.request(0)
    assert request.masking is not None
    zeros = np.zeros(5, np.uint32), np.zeros(3, np.uint64)
    for changed in (
        {"members": ("a", "b", "c", "d")}, {"members": ("e", "d", "c", "b", "a")}, {"confirmed": "00" * 32},
        {"roster": "00" * 32}, {"quorum": 2}, {"group": "h"}, {"epoch": "epoch-2"},
    ):  # fmt: skip
        with refuses(code="policy.secagg"):
            asked = replace(request, masking=replace(request.masking, **changed))
            play.members["a"].mask(asked, play.leader.confirmation("a"), *zeros)
    for changed in ({"masking": None}, {"members": ("b", "c")}, {"run": "another"}, {"key_index": None}):
        with refuses(code="policy.secagg"):
            play.members["a"].mask(replace(request, **changed), play.leader.confirmation("a"), *zeros)
    for index in (-1, 2, 10**9):
        with refuses("unused"):
            play.members["a"].mask(play.request(index), play.leader.confirmation("a"), *zeros)


def proof(play: Play, complaint: Signed, complainer: str, dealer: str, **said: Signed) -> tuple[bytes, ...]:
    """Evidence of a complaint; `keys` and `shares` are the statements that the two once made, or others."""
    shares = play.leader.shares[dealer]
    at = shares.holders.index(complainer)
    own = {"keys": play.leader.statements[complainer], "shares": Signed(shares.payload, shares.signature)}
    told = {**own, **said}
    return dealt.Evidence(
        complaint, told["keys"], told["shares"], shares.ciphertexts[at], shares.hashes[at]
    ).entries()  # fmt: skip


def with_a_key_of_no_use(play: Play, complainer: str, dealer: str) -> tuple[bytes, ...]:
    """A colluder signs a second statement of its keys, after the fact, with a key that opens nothing, and complains."""
    private, public = keys.generate()
    told = play.leader.statements[complainer].payload
    second = said_again(play, complainer, "keys", told, lambda f: f["transport"].update({dealer: public.hex()}))
    return proof(play, complaint_of(play, complainer, dealer, private), complainer, dealer, keys=second)


def test_a_complaint_about_keys_that_nobody_dealt_to_proves_nothing() -> None:
    play = dealt_out()
    signed_by_all(play)
    before = epoch.dumps(memory(play.members["a"]))
    with refuses("bad_complaint: the keys of e are not those it published"):
        play.members["a"].answer(smaller(play, "b", with_a_key_of_no_use(play, VICTIM, "b"))["a"])
    assert epoch.dumps(memory(play.members["a"])) == before


@pytest.mark.parametrize("which", ["keys", "roster", "node"])
def test_shares_that_were_dealt_for_other_keys_prove_nothing(which: str) -> None:
    """A dealer that colludes signs shares of another set of keys, of another epoch, or those of somebody else."""
    play = dealt_out()
    signed_by_all(play)
    told = json.loads(play.leader.shares["b"].payload)
    other = {"keys": "00" * 32, "roster": "00" * 32, "node": "c"}[which]
    second = said_again(play, "b", "shares", play.leader.shares["b"].payload, lambda f: f.update({which: other}))
    secret = keys.generate()[0]
    evidence = proof(play, complaint_of(play, VICTIM, "b", secret), VICTIM, "b", shares=second)
    assert told[which] != other
    with refuses(f"bad_signature: a signed shares says {which}={other[:60]}, expected"):
        play.members["a"].answer(smaller(play, "b", evidence)["a"])


def test_a_complaint_with_the_keys_of_another_epoch_or_member_proves_nothing() -> None:
    play, before = dealt_out(), Play(list("abcde"), epoch="an epoch before")
    before.keys()
    signed_by_all(play)
    private, _ = keys.generate()
    complaint = complaint_of(play, VICTIM, "b", private)
    for foreign in (before.leader.statements[VICTIM], play.leader.statements["c"]):
        with refuses("bad_signature"):
            play.members["a"].answer(smaller(play, "b", proof(play, complaint, VICTIM, "b", keys=foreign))["a"])


def test_a_complaint_about_keys_that_nobody_dealt_to_proves_nothing_to_strangers_in_a_sparse_group() -> None:
    play = Play([f"n{i:02}" for i in range(14)], num_keys=1, num_neighbours=8, threshold=5, terms=SPARSE)
    play.keys()
    play.shares()
    signed_by_all(play)
    everyone = roster.peers(play.leader.asked)
    dealer = everyone["n05"][0]
    judge = next(n for n in play.names if n not in (dealer, "n05", *everyone["n05"]))
    with refuses("bad_complaint"):
        play.members[judge].answer(smaller(play, dealer, with_a_key_of_no_use(play, "n05", dealer))[judge])


def test_a_set_with_a_member_that_dealt_nothing_is_refused() -> None:
    play = Play(list("abcde"))
    play.keys(missing=[VICTIM])
    play.shares()
    question = play.leader.ask_confirm()["a"]
    ghost = replace(question, names=(*question.names, VICTIM), digests=(*question.digests, bytes(32)))
    with refuses("has no keys that were good"):
        play.members["a"].answer(ghost)
    play.confirm()
    exact_without(play, [VICTIM])


# ---------------------------------------------------------------- one index, one vector


def test_a_key_index_masks_one_vector() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    play.masked("a", play.request(0), *vectors["a"])
    for request in (play.request(0), play.request(0, base="another"), play.request(0, round=7)):
        with refuses("unused"):
            play.masked("a", request, *vectors["a"])


def test_a_node_that_wakes_up_in_an_old_memory_knows_from_its_journal_what_is_used_up() -> None:
    play = ready()
    vectors, node = vectors_of(play.names), play.members["a"]
    before = epoch.dumps(memory(node))
    play.masked("a", play.request(0), *vectors["a"])
    node.epoch = epoch.loads(before)
    for base in ("base", "another"):
        with refuses("masked a vector already"):
            play.masked("a", play.request(0, base=base), *vectors["a"])
    play.masked("a", play.request(1, base="another"), *vectors["a"])


def test_two_vectors_under_one_index_would_show_their_difference() -> None:
    play = ready()
    old, new = (vectors_of(play.names, seed=s)["a"] for s in (0, 1))
    kept = epoch.dumps(memory(play.members["a"]))
    _, first, _ = play.masked("a", play.request(0), *old)
    play.members["a"].epoch = epoch.loads(kept)
    forgetting(play)
    _, second, _ = play.masked("a", play.request(0), *new)
    assert np.array_equal(minus(second, first), minus(new[0], old[0]))


def test_the_vector_is_never_masked_where_the_journal_cannot_be_written() -> None:
    class Full(Memory):
        def add(self, fact: Any) -> None:
            raise OSError("no space left on device")

    play = ready()
    play.members["a"].journal = Full()
    update = np.zeros(5, np.uint32)
    with pytest.raises(OSError, match="no space"):
        play.members["a"].mask(play.request(0), play.leader.confirmation("a"), update, np.zeros(3, np.uint64))
    assert not update.any()
    found, _ = masked(play, play.request(0), vectors_of(play.names), missing="a")
    play.members["b"].journal = Full()
    with pytest.raises(OSError, match="no space"):
        play.members["b"].answer(found.ask_unmask())


def test_a_masked_vector_counts_for_its_request_and_index_only() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    request, later = play.request(0), play.request(1, base="another")
    found, other = play.tally(request), play.tally(later)
    signed, update, counts = play.masked("a", request, *vectors["a"])
    for tally, name in ((other, "a"), (found, "b")):
        with refuses(code="bad_signature"):
            tally.take_masked(name, signed, update, counts)
    for changed in ((update + np.uint32(1), counts), (update, counts + np.uint64(1)), (update[::-1].copy(), counts)):
        with refuses(code="bad_signature"):
            found.take_masked("a", signed, *changed)
    assert not found.update.any()
    assert found.survivors == []
    found.take_masked("a", signed, update, counts)


# ---------------------------------------------------------------- one base, one set of survivors


def test_a_base_that_was_answered_for_is_masked_no_more_in_this_run_and_answered_for_no_others_in_another() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    play.round(play.request(0), vectors)
    for name in play.names:  # whoever would survive
        with refuses("answered in this run: it is unmasked once"):
            play.masked(name, play.request(1), *vectors[name])
    again = next_run(play, TERMS)
    found, _ = masked(again, again.request(0), vectors, missing=[VICTIM])
    for name in "abcd":
        with refuses("answered for other survivors"):
            again.members[name].answer(found.ask_unmask())


def test_a_base_that_was_masked_in_one_group_is_masked_in_no_other() -> None:
    """Not even where nothing was answered: the other group's members may have told theirs without this node."""
    play = ready()
    vectors = vectors_of("abcdef")
    masked(play, play.request(0), vectors)
    for run in ("run", "another"):
        larger = pins_of("abcdef")
        for node in play.members.values():
            node.pins = larger
        again = Play(list("abcdef"), members=dict(play.members), pins=larger, run=run, epoch=f"{run} 2")
        again.offline()
        with refuses("masked in another group"):
            again.masked("a", again.request(0), *vectors["a"])
        again.masked("a", again.request(1, base="another base"), *vectors["a"])


def test_two_sums_over_one_base_would_show_the_node_that_is_in_one_of_them() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    _, everyone, _ = play.round(play.request(0), vectors)
    forgetting(play)
    _, without, _ = play.round(play.request(1), vectors, mask=[VICTIM])
    assert np.array_equal(minus(everyone, without), vectors[VICTIM][0])


def test_a_base_asked_again_under_a_new_index_is_never_answered_under_the_old_one() -> None:
    play = ready()
    vectors = vectors_of(play.names)
    old, _ = masked(play, play.request(0), vectors)
    new, _ = masked(play, play.request(1), vectors, missing=[VICTIM])
    for name in "abcd":
        with refuses("waits for no such request"):
            play.members[name].answer(old.ask_unmask())
    play.settle(new)
    total, _ = unmasked(new.update, new.counts, new.masks())
    assert np.array_equal(total, plain_sum(vectors, "abcd")[0])


def test_a_base_that_is_one_ulp_away_is_another_base() -> None:
    """Single rounds only: the two sums differ by a node's update, nearly.  Fixed survivors stop it."""
    weights = {"w": np.ones(4, np.float32)}
    moved = {"w": np.nextafter(weights["w"], np.float32(2))}
    bases = digest(weights), digest(moved)
    assert bases[0] != bases[1]
    for fixed in (False, True):
        play = ready(terms=replace(TERMS, fixed_survivors=fixed))
        vectors = vectors_of(play.names)
        play.round(play.request(0, base=bases[0]), vectors)
        found, _ = masked(play, play.request(1, base=bases[1]), vectors, missing=[VICTIM])
        if fixed:
            with refuses("the site allows one set"):
                play.members["a"].answer(found.ask_unmask())
        else:
            play.settle(found)
            total, _ = unmasked(found.update, found.counts, found.masks())
            assert np.array_equal(total, plain_sum(vectors, "abcd")[0])


def next_run(play: Play, terms: Terms, *, run: str | None = None, missing: Iterable[str] = ()) -> Play:
    """The same nodes, with their journals, in another epoch, and in another run where it is not told."""
    for node in play.members.values():
        node.terms = terms
    names = {"run": run or f"after {play.run}", "epoch": f"after {play.epoch}"}
    again = Play(play.names, play.threat, members=play.members, pins=play.pins, terms=terms, **names)
    again.offline(keys=missing)
    return again


@pytest.mark.parametrize("allow_repeat", [False, True])
def test_an_old_base_in_a_new_run_is_answered_for_the_same_survivors_unless_the_site_says_otherwise(
    allow_repeat: bool,
) -> None:
    play = ready()
    vectors = vectors_of(play.names)
    play.round(play.request(0), vectors)
    again = next_run(play, replace(TERMS, allow_repeat=allow_repeat))
    _, total, _ = again.round(again.request(0), vectors)
    assert np.array_equal(total, plain_sum(vectors, play.names)[0])

    third = next_run(again, replace(TERMS, allow_repeat=allow_repeat))
    if allow_repeat:
        _, total, _ = third.round(third.request(0), vectors, mask=[VICTIM])
        assert np.array_equal(total, plain_sum(vectors, "abcd")[0])
    else:
        with pytest.raises(GroupLost):
            third.round(third.request(0), vectors, mask=[VICTIM])
        assert "answered for other survivors" in third.refused["a"].evidence


def test_the_same_question_gets_the_same_bytes_after_a_crash_of_the_server_too() -> None:
    play = ready(MALICIOUS)
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    play.settle(found, unmask=play.names)
    question = found.ask_unmask()
    first = play.members["a"].answer(question)
    assert play.members["a"].answer(replace(question)) == first
    for survivors in (("a", "b", "c", "d"), ("b", "c", "d", "e"), ()):
        with refuses():
            play.members["a"].answer(replace(question, survivors=survivors))
    assert play.members["a"].answer(question) == first


def test_nobody_answers_for_an_index_that_masked_nothing() -> None:
    play = ready()
    request = play.request(0)
    for index in (0, 1, 5, -1):
        question = AskUnmask(play.epoch, index, request.digest, tuple(play.names))
        with refuses("waits for no such request"):
            play.members["a"].answer(question)
    found, _ = masked(play, request, vectors_of(play.names), missing="a")
    with refuses("waits for no such request"):
        play.members["a"].answer(found.ask_unmask())
    with refuses("waits for no such request"):
        play.members["b"].answer(replace(found.ask_unmask(), request=play.request(0, base="x").digest))


def test_a_node_whose_vector_is_not_counted_gives_nothing() -> None:
    play = ready()
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    question = replace(found.ask_unmask(), survivors=("a", "b", "c", "d"))
    with refuses("not in the sum"):
        play.members[VICTIM].answer(question)
    for survivors in (("a", "b"), ("e", "d", "c"), ("a", "a", "b", "c"), ("a", "b", "c", "x")):
        with refuses(code="policy.secagg"):
            play.members["a"].answer(replace(question, survivors=survivors))


# ---------------------------------------------------------------- one model, one set of settings, one list of survivors


@pytest.mark.parametrize("changed", [{"base": "a model for one"}, {"config": {"sector": "banks", "lr": 0.0}}])
def test_a_server_that_tells_members_different_things_gets_noise(changed: dict[str, Any]) -> None:
    play = ready()
    vectors = vectors_of(play.names, dim=512)
    asked = play.request(0, dim=512)
    other = replace(asked, **changed)
    assert asked.digest != other.digest
    requests = {n: other if n == VICTIM else asked for n in play.names}
    found = play.tally(asked)
    for name, request in requests.items():  # the server adds up by hand: no signature would fit
        _, update, counts = play.masked(name, request, *vectors[name])
        with np.errstate(over="ignore"):
            found.update += update
            found.counts += counts
    found.survivors = list(play.names)
    for name, request in requests.items():
        found.take_shares(name, play.members[name].answer(replace(found.ask_unmask(), request=request.digest)))
    # the best it can do: everybody's own mask is known to it, each for the request that its owner was told
    seeds = {n: secret_from(play, found.held[n]) for n in play.names}
    own = [(statements.self_mask(play.leader.asked.roster, 0, requests[n].digest, n, seeds[n]), -1) for n in play.names]
    update, _ = unmasked(found.update, found.counts, own)
    plain = plain_sum(vectors, play.names)[0]
    assert not is_near(update, plain)
    assert not is_near(update, plain_sum(vectors, "abcd")[0])
    assert looks_uniform(minus(update, plain))


@pytest.mark.parametrize("colluding", ["", "de"], ids=["honest", "two colluders"])
def test_two_lists_of_survivors_are_never_both_confirmed(colluding: str) -> None:
    play = ready(MALICIOUS)
    asked = play.leader.asked
    assert tolerance.colluders(MALICIOUS, 5, asked.quorum) == 2
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    first = found.ask_survivors()
    lists = [first, replace(first, survivors=("a", "b", "c", "d"))]
    signed: list[dict[str, Any]] = [{}, {}]
    for at, name in enumerate(sorted(set(play.names) - set(colluding))):
        for which in (at % 2, 1 - at % 2):  # half of them hear one list first, half the other
            play._do(name, lambda n, w=which: signed[w].update({n: play.members[n].answer(lists[w])}))
    for which, question in enumerate(lists):
        digest_ = statements.survivors_digest(asked.roster, 0, question.request, question.survivors)
        told = {"roster": asked.roster.hex(), "survivors": digest_.hex()}
        for name in colluding:
            signed[which][name] = transcript.sign(play.members[name].key, "survivors", told)
    both = [len(found) >= asked.quorum for found in signed]
    assert sum(both) <= 1
    for which, question in enumerate(lists):
        names = tuple(sorted(signed[which]))
        parts = [signed[which][n] for n in names]
        unmask = AskUnmask(
            question.epoch, 0, question.request, question.survivors, names,
            tuple(p.payload for p in parts), tuple(p.signature for p in parts),
        )  # fmt: skip
        if not both[which]:
            for name in "abc":
                with refuses():
                    play.members[name].answer(unmask)


def test_under_a_malicious_server_nobody_answers_without_enough_signatures_of_survivors() -> None:
    play = ready(MALICIOUS)
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    play.settle(found, unmask=play.names)
    good = found.ask_unmask()
    few = replace(good, signers=good.signers[:3], payloads=good.payloads[:3], signatures=good.signatures[:3])
    one = replace(good, payloads=good.payloads[:1] * 5, signatures=good.signatures[:1] * 5)
    other = replace(good, survivors=("a", "b", "c", "d"))
    none = replace(good, signers=(), payloads=(), signatures=())
    for question in (few, one, other, none):
        with refuses(code="policy.secagg"):
            play.members["a"].answer(question)
    twice = replace(few, signers=("a", "a", "b", "c"), payloads=good.payloads[:4], signatures=good.signatures[:4])
    with refuses(code="wrong_records"):
        play.members["a"].answer(twice)
    play.members["a"].answer(good)


def test_a_node_that_confirmed_survivors_confirms_and_answers_no_others() -> None:
    play = ready(MALICIOUS)
    found, _ = masked(play, play.request(0), vectors_of(play.names))
    question = found.ask_survivors()
    node = play.members["a"]
    first = node.answer(question)
    other = replace(question, survivors=("a", "b", "c", "d"))
    with refuses("confirmed other survivors"):
        node.answer(other)
    assert node.answer(question) == first


# ---------------------------------------------------------------- what is left, and what never was hidden


def test_a_vector_that_comes_late_stays_hidden_by_its_own_mask() -> None:
    play = ready()
    dim = 4096
    zeros = {n: (np.zeros(dim, np.uint32), np.zeros(3, np.uint64)) for n in play.names}
    request = play.request(0, dim=dim)
    found, _ = masked(play, request, zeros, missing=[VICTIM])
    seed = memory(play.members[VICTIM]).seeds[:32]
    _, late, _ = play.masked(VICTIM, request, *zeros[VICTIM])  # it was counted as dropped: too late
    play.settle(found)
    key = secret_from(play, found.held[VICTIM])
    assert keys.public_of(key) == play.leader.published[VICTIM].mask[0]
    left = without_masks(play, VICTIM, request, late, key=key)
    own = statements.self_mask(play.leader.asked.roster, 0, request.digest, VICTIM, seed)
    assert np.array_equal(left, prg.keystream(own, dim, np.uint32))
    assert not is_near(left, zeros[VICTIM][0])
    assert looks_uniform(left)


def test_masked_vectors_and_what_the_server_can_make_of_them_look_uniform() -> None:
    play = ready(num_keys=2)
    dim = 16384
    zeros = {n: (np.zeros(dim, np.uint32), np.zeros(512, np.uint64)) for n in play.names}
    request = play.request(0, dim=dim)
    seen = {n: play.masked(n, request, *zeros[n])[1:] for n in play.names}
    for update, words in seen.values():
        assert looks_uniform(update)
        assert looks_uniform(words)
    for a, b in itertools.combinations(play.names, 2):
        assert looks_uniform(minus(seen[a][0], seen[b][0]))
    assert looks_uniform(sum((u for u, _ in seen.values()), start=np.zeros(dim, np.uint32)))
    assert prg.keystream(bytes(32), 4, np.uint32, region=UPDATE).tobytes() != bytes(16)
    assert UPDATE != COUNTS


def test_whoever_colludes_with_all_but_one_exposes_that_one() -> None:
    """No protocol prevents this: it is written in the docs."""
    play = ready(MALICIOUS)
    vectors = vectors_of(play.names)
    _, total, _ = play.round(play.request(0), vectors)
    for name in "abcd":
        total = minus(total, vectors[name][0])
    assert np.array_equal(total, vectors[VICTIM][0])


def test_as_many_colluders_as_shares_are_needed_expose_a_node_and_one_fewer_do_not() -> None:
    play = ready()
    vectors, request = vectors_of(play.names), play.request(0)
    pooled = {n: memory(play.members[n]).shares[VICTIM] for n in "abc"}
    _, seen = masked(play, request, vectors)

    def read(colluders: str, threshold: int) -> Any:
        seed, key = (
            secret_from(play, {n: statements.share_at(pooled[n], 0, kind) for n in colluders}, threshold)
            for kind in (dealt.SEED, dealt.KEY)
        )
        return without_masks(play, VICTIM, request, seen[VICTIM][0], seed=seed, key=key)

    assert play.leader.asked.threshold == 3
    assert np.array_equal(read("abc", 3), vectors[VICTIM][0])
    with pytest.raises((AssertionError, SecAggError)):
        assert np.array_equal(read("ab", 2), vectors[VICTIM][0])


# ---------------------------------------------------------------- groups that are drawn


def test_a_server_that_draws_until_it_likes_the_groups_is_refused() -> None:
    members = consortium(6, max_draws=3)
    for at in range(3):
        draw(members, f"epoch-{at}", 3)
    with refuses("drawn 3 times"):
        draw(members, "epoch-3", 3)


def test_a_draw_without_every_member_that_is_pinned_is_refused() -> None:
    members = consortium(6)
    few = {n: members[n] for n in list(members)[:5]}
    with refuses("all members that are pinned"):
        draw(few, "epoch-1", 3)


def test_a_group_size_that_changes_after_the_commitments_is_refused() -> None:
    members = consortium(6)
    drawing = draw(members, "epoch-1", 3)
    with refuses("groups are drawn once for an epoch"):
        draw(members, "epoch-1", 2)
    others = draw(consortium(6), "epoch-1", 2)  # elsewhere, with other numbers
    assert drawing.commits != others.commits
    mixed = {**drawing.commits, "n5": others.commits["n5"]}
    with refuses(code="bad_signature"):
        members["n0"].answer(ask_reveal("epoch-1", mixed))


def test_a_number_is_revealed_to_one_set_of_commitments() -> None:
    members = consortium(6)
    drawing = draw(members, "epoch-1", 3)
    colluder = members["n5"]
    told = json.loads(drawing.commits["n5"].payload) | {"commitment": secrets.token_hex(32)}
    second = transcript.sign(colluder.key, "commit", {k: v for k, v in told.items() if k != "kind"})
    changed = {
        **drawing.commits,
        "n5": replace(drawing.commits["n5"], payload=second.payload, signature=second.signature),
    }
    for question in (ask_reveal("epoch-1", changed), ask_reveal("epoch-1", dict(list(drawing.commits.items())[:5]))):
        with refuses("revealed to other commitments"):
            members["n0"].answer(question)
    asked = drawn_play(members, replace(drawing, commits=changed), drawing.group_of("n0")).leader.asked
    with refuses("not those it revealed"):
        members["n0"].answer(asked)


def test_a_number_that_its_owner_was_not_committed_to_is_refused() -> None:
    members = consortium(6)
    drawing = draw(members, "epoch-1", 3)
    told = json.loads(drawing.reveals["n5"].payload) | {"number": secrets.token_hex(32)}
    lie = transcript.sign(members["n5"].key, "reveal", {k: v for k, v in told.items() if k != "kind"})
    forged = replace(drawing, reveals={**drawing.reveals, "n5": Revealed(lie.payload, lie.signature)})
    with refuses("another number"):
        members["n0"].answer(drawn_play(members, forged, drawing.group_of("n0")).leader.asked)


@pytest.mark.parametrize("threat", list(Threat))
def test_a_number_that_is_withheld_costs_its_owner_the_epoch_or_voids_the_draw(threat: Threat) -> None:
    members = consortium(7)
    drawing = draw(members, "epoch-1", 3, withhold=["n6"])
    assert sorted(n for g in drawing.groups for n in g) == [f"n{i}" for i in range(6)]
    play = drawn_play(members, drawing, drawing.groups[0], threat=threat)
    if threat is MALICIOUS:
        with refuses("void"):
            members[drawing.groups[0][0]].answer(play.leader.asked)
    else:
        play.offline()
        assert play.leader.is_confirmed


def test_a_number_that_the_server_hides_from_one_node_voids_the_draw_under_a_malicious_server() -> None:
    """It would choose the groups among 2^n; under semi_honest it is assumed not to."""
    members = consortium(7)
    drawing = draw(members, "epoch-1", 3)
    hidden = replace(drawing, reveals={n: r for n, r in drawing.reveals.items() if n != "n6"})
    unlisted = replace(hidden, commits={n: c for n, c in drawing.commits.items() if n != "n6"})
    for tampered in (hidden, unlisted):
        asked = drawn_play(members, tampered, drawing.group_of("n0"), threat=MALICIOUS).leader.asked
        with refuses():
            members["n0"].answer(asked)


def test_a_draw_of_the_past_is_no_draw() -> None:
    members = consortium(6)
    old = draw(members, "epoch-1", 3)
    new = draw(members, "epoch-2", 3)
    with refuses("no such draw"):
        members["n0"].answer(drawn_play(members, old, old.group_of("n0"), epoch="epoch-1").leader.asked)
    replayed = {**new.commits, "n5": old.commits["n5"]}
    with refuses(code="bad_signature"):
        members["n0"].answer(ask_reveal("epoch-2", replayed))


def test_a_site_bounds_the_drawn_groups_that_it_is_ever_summed_with() -> None:
    members = consortium(6, max_regroupings=1, max_draws=50)
    seen: set[tuple[str, ...]] = set()
    for at in range(12):
        drawing = draw(members, f"epoch-{at}", 3)
        group = drawing.group_of("n0")
        play = drawn_play(members, drawing, group, epoch=f"epoch-{at}", num_keys=1)
        if seen and group not in seen:
            with refuses("drawn groups"):
                members["n0"].answer(play.leader.asked)
            return
        play.offline()
        play.round(play.request(0, base=f"base {at}"), vectors_of(group))
        seen.add(group)
    pytest.fail("twelve draws gave one group: one chance in 10^11")


# ---------------------------------------------------------------- weights, which the server chooses


WEIGHTS = {
    "digits of their own": (tuple(1 << 16 * at for at in range(5)), "parts of the sum"),
    "one alone": ((0, 0, 0, 0, 1), "one member has 1 of 1 parts"),
    "two of five": ((1, 1, 0, 0, 0), "2 members, 4 are needed"),
    "three of five": ((1, 1, 1, 0, 0), "3 members, 4 are needed"),
    "one above all": ((1, 1, 1, 1, 10**6), "one member has 1000000 of 1000004 parts"),
    "negative": ((-1, 1, 1, 1, 1), "none below 0"),
    "all 0": ((0, 0, 0, 0, 0), "not all 0"),
    "too few": ((1, 1, 1, 1), "every member must have a weight"),
    "too many": ((1, 1, 1, 1, 1, 1), "every member must have a weight"),
    "none": ((), "every member must have a weight"),
}


@pytest.mark.parametrize(("weights", "reason"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("ratio", [1.0, 1e30], ids=["weighed alike", "weighed as the server likes"])
def test_weights_that_single_a_member_out_are_refused(ratio: float, weights: tuple[int, ...], reason: str) -> None:
    play = ready(MALICIOUS, terms=replace(TERMS, max_weight_ratio=ratio))
    apart = len(weights) == 5 and len(set(weights)) > 1 and min(weights) >= 0
    with refuses("the site allows a ratio of 1$" if ratio == 1 and apart else reason):
        weighted(play, weights)
    assert play.members["a"].journal.facts() == []


def weighted(play: Play, weights: tuple[int, ...], *, index: int = 0, base: str = "base", **options: Any) -> None:
    """A node is asked to mask, with such weights."""
    request = play.request(index, base=base)
    assert request.masking is not None
    request = replace(request, masking=replace(request.masking, weights=weights, dtype="uint64", **options))
    zeros = np.zeros(5, np.uint64), np.zeros(3, np.uint64)
    play.members["a"].mask(request, play.leader.confirmation("a"), *zeros)


def test_a_weight_far_below_all_others_would_show_its_owners_update_in_the_lowest_digits() -> None:
    """A float32 has 24 bits: times 2^42 it is a multiple of 2^17 wherever it is above 2e-6."""
    weights = {n: 1 if n == "a" else 1 << 42 for n in "abcde"}
    assert max(weights.values()) / sum(weights.values()) < 0.26
    rng, dim, scale = np.random.default_rng(0), 2000, 1 << 20
    updates = {n: rng.normal(0, 0.01, dim).astype(np.float32) for n in weights}
    total = np.zeros(dim, np.uint64)
    for name, weight in weights.items():
        options = {"clip_norm": 1.0, "weight": weight, "scale": scale, "dtype": np.uint64, "rng": rng}
        with np.errstate(over="ignore"):
            total += quantise.quantise(updates[name], **options)[0]
    digits = ((total + np.uint64(1 << 16)) % np.uint64(1 << 17)).astype(np.int64) - (1 << 16)
    assert (np.abs(digits / scale - updates["a"]) < 2e-6).mean() > 0.99


@pytest.mark.parametrize("most", [2, 1 << 20, 1 << 42])
def test_weights_of_which_one_is_far_below_all_others_are_refused(most: int) -> None:
    for weights in ((1, most, most, most, most), (most, most, 1, most, most), (0, 1, most, most, most)):
        with refuses("do not weigh the same, and the site allows a ratio of 1$"):
            weighted(ready(MALICIOUS), weights)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0, 1000.0])
def test_one_update_weighs_as_much_more_than_another_as_the_site_allows_and_no_more(ratio: float) -> None:
    terms = replace(TERMS, max_weight_ratio=ratio)
    least = 1000
    weighted(ready(MALICIOUS, terms=terms), (least, int(ratio * least), *[int(ratio * least)] * 3))
    nothing = (0, *[least] * 4)
    if ratio > 1:
        weighted(ready(MALICIOUS, terms=terms), nothing)  # who weighs nothing is in no sum, and hides nobody
    else:
        with refuses("the site allows a ratio of 1$"):
            weighted(ready(MALICIOUS, terms=terms), nothing)
    with refuses(f"the site allows a ratio of {ratio:g}$"):
        weighted(ready(MALICIOUS, terms=terms), (least, int(ratio * least) + 1, *[int(ratio * least)] * 3))


def test_weighed_updates_travel_in_no_finer_steps_than_their_digits_fill() -> None:
    steps = int(consent.MAX_STEPS)
    terms = replace(TERMS, max_weight_ratio=4.0)
    for clip_norm in (1.0, 4.0, 0.25):
        most = int(steps / clip_norm)
        weighted(ready(MALICIOUS, terms=terms), (1, 2, 2, 2, 2), clip_norm=clip_norm, scale=most)
        with refuses("the finest digits would tell single ones"):
            weighted(ready(MALICIOUS, terms=terms), (1, 2, 2, 2, 2), clip_norm=clip_norm, scale=most + 1)
        # where all weigh the same no digits are anybody's own
        weighted(ready(MALICIOUS, terms=terms), (2, 2, 2, 2, 2), clip_norm=clip_norm, scale=most + 1)


def test_the_finest_steps_that_are_allowed_leave_no_digits_in_which_an_update_could_be_read() -> None:
    """The others' words are multiples of 100, so the sum is the victim's word mod 100: 9 of 10 coordinates at 2^31
    steps, by chance 1 of 100 at 2^24."""
    rng, dim, clip_norm, ratio = np.random.default_rng(0), 4096, 1.0, 100
    scale = int(consent.MAX_STEPS)
    total = np.zeros(dim, np.uint64)
    words = []
    for weight in (1, ratio, ratio, ratio, ratio):
        update = np.zeros(dim, np.float32)
        update[:] = rng.choice([-1, 1], dim) * rng.uniform(0.5, 1, dim) * 0.9 / np.sqrt(dim)
        options = {"clip_norm": clip_norm, "weight": weight, "scale": scale, "dtype": np.uint64, "rng": rng}
        words.append(quantise.quantise(update, **options)[0].view(np.int64))
        with np.errstate(over="ignore"):
            total += words[-1].view(np.uint64)
    told = (total.view(np.int64) - words[0]) % ratio == 0
    assert told.mean() < 2 / ratio


# ---------------------------------------------------------------- one base: one sum; one run: one way to make it


def with_masking(request: Request, **changes: Any) -> Request:
    assert request.masking is not None
    return replace(request, masking=replace(request.masking, **changes))


def refused_everywhere(play: Play, match: str) -> None:
    """All of a group said no, for one reason."""
    assert sorted(play.refused) == play.names
    for error in play.refused.values():
        assert error.code == "policy.secagg"
        assert match in error.evidence


def words_of(updates: Mapping[str, Any], clip_norm: float) -> Vectors:
    """Updates as their owners would mask them, and whether they were clipped."""
    options: dict[str, Any] = {"clip_norm": clip_norm, "scale": STEPS, "weight": 1, "dtype": np.uint32}
    rng = np.random.default_rng(0)
    found = {n: quantise.quantise(u, rng=rng, **options) for n, u in updates.items()}
    return {n: (w, np.array([clipped], np.uint64)) for n, (w, clipped) in found.items()}


STEPS = 10**6


def one_long_update() -> dict[str, Any]:
    """Updates of norm 0.5, and the victim's of norm 2."""
    rng = np.random.default_rng(0)
    updates = {n: rng.normal(0, 1, 5) for n in "abcde"}
    length = {n: 2.0 if n == VICTIM else 0.5 for n in updates}
    return {n: (u * length[n] / np.linalg.norm(u)).astype(np.float32) for n, u in updates.items()}


def reads_half(found: Any, updates: Mapping[str, Any]) -> bool:
    """Whether it is 1 - 1.0 / 2.0 of the victim's update."""
    return np.allclose(found.view(np.int32) / STEPS * 2, updates[VICTIM], atol=1e-4)


def test_one_base_is_answered_with_one_set_of_weights() -> None:
    play = ready(MALICIOUS, terms=replace(TERMS, max_weight_ratio=2.0))
    vectors = vectors_of(play.names)
    doubled = {**vectors, VICTIM: (vectors[VICTIM][0] * np.uint32(2), vectors[VICTIM][1])}
    asked = with_masking(play.request(0), weights=(1, 1, 1, 1, 2)), play.request(1)
    twin = copy.deepcopy(play)
    _, one, _ = twin.round(asked[0], doubled)
    forgetting(twin)
    _, two, _ = twin.round(asked[1], vectors)
    assert np.array_equal(minus(one, two), vectors[VICTIM][0])  # what it would learn

    play.round(asked[0], doubled)
    with pytest.raises(GroupLost):
        play.round(asked[1], vectors)
    refused_everywhere(play, "answered in this run")


def test_one_base_is_answered_with_one_clip_norm() -> None:
    """Where one member alone is clipped (the counts say so), the difference of the sums is that member's update."""
    play, updates = ready(MALICIOUS), one_long_update()
    asked = [with_masking(play.request(at), clip_norm=c, scale=STEPS) for at, c in enumerate((4.0, 1.0))]
    vectors = [words_of(updates, clip_norm) for clip_norm in (4.0, 1.0)]
    twin = copy.deepcopy(play)
    _, one, _ = twin.round(asked[0], vectors[0])
    forgetting(twin)
    _, two, _ = twin.round(asked[1], vectors[1])
    assert reads_half(minus(one, two), updates)  # what it would learn

    play.round(asked[0], vectors[0])
    with pytest.raises(GroupLost):
        play.round(asked[1], vectors[1])
    refused_everywhere(play, "answered in this run")


SETTINGS: dict[str, dict[str, Any]] = {
    "clip norm": {"clip_norm": 4.0000001},
    "scale": {"scale": 1001},
    "words": {"dtype": "uint64"},
    "weights": {"weights": (1, 1, 1, 1, 2)},
    "one that weighs nothing": {"weights": (1, 1, 1, 1, 0)},
}


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_what_makes_a_sum_stays_what_it_was_in_all_of_a_run(changed: dict[str, Any], purpose: str) -> None:
    """One base later, or one ulp away: the difference of two sums would tell whose update was clipped, or weighed."""
    terms = replace(TERMS, max_weight_ratio=2.0)
    play = ready(MALICIOUS, terms=terms)
    vectors = vectors_of(play.names)
    wide = vectors_of(play.names, "uint64") if "dtype" in changed else vectors
    play.round(play.request(0, purpose=purpose), vectors)
    for again in (play, None):
        other = again or next_run(play, terms, run=play.run)  # in another epoch of the run too
        asked = with_masking(other.request(1, base="one ulp away", purpose=purpose), **changed)
        for name in other.names:
            with refuses("not those that this run began with"):
                other.masked(name, asked, *wide[name])
    other.round(other.request(1, base="one ulp away", purpose=purpose), vectors)


def test_an_evaluation_has_settings_of_its_own_and_another_run_has_too() -> None:
    play = ready(MALICIOUS, num_keys=4)
    vectors = vectors_of(play.names)
    play.round(play.request(0), vectors)
    play.round(with_masking(play.request(1, purpose="evaluate"), scale=1), vectors)
    again = next_run(play, TERMS)
    again.round(with_masking(again.request(0, base="another"), scale=1, clip_norm=1.0), vectors)
    assert not again.refused


def test_weights_stay_what_they_were_for_those_who_are_there_again() -> None:
    terms = replace(TERMS, max_weight_ratio=3.0)
    play = ready(MALICIOUS, terms=terms)
    vectors = vectors_of(play.names)
    play.round(with_masking(play.request(0), weights=(1, 2, 3, 2, 2)), vectors)
    again = next_run(play, terms, run=play.run, missing=["b"])
    assert again.leader.members == ["a", "c", "d", "e"]
    for weights in ((2, 3, 2, 2), (1, 1, 1, 1), (1, 3, 2, 3), (1, 3, 2, 1)):
        with refuses("not those that this run began with"):
            again.masked("a", with_masking(again.request(0, base="another"), weights=weights), *vectors["a"])
    again.masked("a", with_masking(again.request(0, base="another"), weights=(1, 3, 2, 2)), *vectors["a"])


# what a run may do once, a server must not do again under the name of another run


@pytest.mark.parametrize("terms", [TERMS, Terms(code_is_pinned=True)], ids=["the tests' terms", "the default"])
def test_one_base_is_answered_with_one_set_of_weights_whatever_the_run_is_called(terms: Terms) -> None:
    """All survive both times, so the journal is content; the second sum is without the victim, exactly."""
    play = ready(MALICIOUS, terms=terms)
    vectors = vectors_of(play.names)
    without = {**vectors, VICTIM: (vectors[VICTIM][0] * np.uint32(0), vectors[VICTIM][1])}
    _, one, _ = play.round(play.request(0), vectors)
    again = next_run(play, terms)

    def attack() -> None:
        _, two, _ = again.round(with_masking(again.request(0), weights=(1, 1, 1, 1, 0)), without)
        assert np.array_equal(minus(one, two), vectors[VICTIM][0])

    with pytest.raises(GroupLost):
        attack()


def test_one_base_is_answered_with_one_clip_norm_whatever_the_run_is_called() -> None:
    play, updates = ready(MALICIOUS), one_long_update()
    _, one, _ = play.round(with_masking(play.request(0), scale=STEPS), words_of(updates, 4.0))
    again = next_run(play, TERMS)

    def attack() -> None:
        asked = with_masking(again.request(0), clip_norm=1.0, scale=STEPS)
        _, two, _ = again.round(asked, words_of(updates, 1.0))
        assert reads_half(minus(one, two), updates)

    with pytest.raises(GroupLost):
        attack()


def test_one_base_is_answered_with_one_config_whatever_the_run_is_called() -> None:
    """Statistics of all rows, then of all but one of the node that has most (`training.max_examples`): that row."""
    rng = np.random.default_rng(0)
    rows = {n: rng.integers(0, 100, (7 if n == VICTIM else 6, 3), np.uint64) for n in "abcde"}

    def counted(play: Play, most: int) -> Any:
        config = {"sector": "banks", "training": {"max_examples": most}}
        request = play.request(0, dim=0, purpose="statistics", splits=("train",), config=config)
        found = {n: (np.zeros(0, np.uint32), r[:most].sum(axis=0, dtype=np.uint64)) for n, r in rows.items()}
        return play.round(request, found)[2]

    play = ready(MALICIOUS)
    everything = counted(play, 7)
    again = next_run(play, TERMS)

    def attack() -> None:
        assert np.array_equal(minus(everything, counted(again, 6)), rows[VICTIM][6])

    with pytest.raises(GroupLost):
        attack()


def test_the_config_stays_what_it_was_in_all_of_a_run() -> None:
    """One ulp away, all but the node with most rows train as before (`training.max_examples`): the rest is its own."""
    play = ready(MALICIOUS)
    vectors = vectors_of(play.names)
    config = {"sector": "banks", "training": {"max_examples": 700}}
    play.round(play.request(0, base="a model", config=config), vectors)
    fewer = {**config, "training": {"max_examples": 699}}
    with refuses():
        play.masked("a", play.request(1, base="the model, one ulp away", config=fewer), *vectors["a"])


def test_settings_stay_what_they_were_where_the_pinned_group_is_drawn() -> None:
    """Nor do fixed survivors help: all survive, and one weighs nothing."""
    terms = replace(TERMS, fixed_survivors=True)
    play = ready(MALICIOUS, terms=terms)
    vectors = vectors_of(play.names)
    without = {**vectors, VICTIM: (vectors[VICTIM][0] * np.uint32(0), vectors[VICTIM][1])}
    _, one, _ = play.round(play.request(0, base="a model"), vectors)
    drawing = draw(play.members, "a draw", 5)
    again = drawn_play(play.members, drawing, drawing.groups[0], threat=MALICIOUS, epoch="a draw")
    again.offline()

    def attack() -> None:
        asked = with_masking(again.request(0, base="the model, one ulp away"), weights=(1, 1, 1, 1, 0))
        _, two, _ = again.round(asked, without)
        assert np.array_equal(minus(one, two), vectors[VICTIM][0])

    with pytest.raises(GroupLost):
        attack()


POSITIVES = {"a": 40, "b": 55, "c": 70, "d": 90, VICTIM: 412}


def counted(play: Play, field: CountField, *, index: int = 0, base: str = "base") -> int:
    """The sum of everybody's count, as a server has it told."""
    words = {n: counts.encode([field], {field.name: np.int64(x)}) for n, x in POSITIVES.items()}
    request = play.request(index, dim=0, base=base, purpose="evaluate", splits=("test",))
    vectors = {n: (np.zeros(0, np.uint32), w) for n, w in words.items()}
    return int(play.round(with_masking(request, counts=(field,)), vectors)[2][0])


def cut_off(most: float) -> CountField:
    return CountField("test/positives", (), "int64", exponent=0, most=most)


@pytest.mark.parametrize("base", ["base", "one ulp away"])
def test_counts_are_cut_off_where_they_were_in_all_of_a_run(base: str) -> None:
    """sum of min(x, m), as m moves, tells every node's count, though not whose it is."""
    play = ready(MALICIOUS)
    everything = counted(play, cut_off(1000.0))

    def attack() -> None:
        assert everything - counted(play, cut_off(90.0), index=1, base=base) + 90 == POSITIVES[VICTIM]

    with pytest.raises(GroupLost):
        attack()
    refused_everywhere(play, "answered in this run" if base == "base" else "not those that this run began with")


OTHERS: dict[str, CountField] = {
    "cut off": cut_off(90.0),
    "in units of 2^7": CountField("test/positives", (), "float64", exponent=7, most=1000.0),
    "under another name": CountField("test/rows", (), "int64", exponent=0, most=1000.0),
    "of another shape": CountField("test/positives", (1,), "int64", exponent=0, most=1000.0),
}


@pytest.mark.parametrize("field", [OTHERS[n] for n in list(OTHERS)[:3]], ids=list(OTHERS)[:3])
def test_one_base_is_counted_in_one_way_whatever_the_run_is_called(field: CountField) -> None:
    play = ready(MALICIOUS)
    counted(play, cut_off(1000.0))
    again = next_run(play, TERMS)
    with pytest.raises(GroupLost):
        counted(again, field)
    refused_everywhere(again, "that this base was answered with before")


def test_one_base_is_counted_in_one_type_whatever_the_run_is_called() -> None:
    """412 and 90 are 3 and 1 units of 128, 70 and less are 1 or none: the second sum counts who is above 64."""
    play = ready(MALICIOUS)
    counted(play, CountField("test/positives", (), "int64", exponent=7, most=1000.0))
    again = next_run(play, TERMS)
    with pytest.raises(GroupLost):
        counted(again, OTHERS["in units of 2^7"])


def test_counts_are_cut_off_where_they_were_whatever_the_run_and_the_base_are() -> None:
    """Counts of test rows hardly move in an ulp, and all survive: nobody need be missing for this."""
    play = ready(MALICIOUS, terms=replace(TERMS, fixed_survivors=True))
    everything = counted(play, cut_off(1000.0))
    again = next_run(play, play.terms)

    def attack() -> None:
        assert everything - counted(again, cut_off(90.0), base="one ulp away") + 90 == POSITIVES[VICTIM]

    with pytest.raises(GroupLost):
        attack()


def test_fixed_survivors_are_not_told_apart_by_who_is_clipped_either() -> None:
    """`survivor_sets: fixed` is what stops a base that is one ulp away; not where another run clips to another norm."""
    play, updates = ready(MALICIOUS, terms=replace(TERMS, fixed_survivors=True)), one_long_update()
    _, one, _ = play.round(with_masking(play.request(0), scale=STEPS), words_of(updates, 4.0))
    again = next_run(play, play.terms)

    def attack() -> None:
        asked = with_masking(again.request(0, base="one ulp away"), clip_norm=1.0, scale=STEPS)
        _, two, _ = again.round(asked, words_of(updates, 1.0))
        assert reads_half(minus(one, two), updates)

    with pytest.raises(GroupLost):
        attack()


def test_statistics_are_of_the_same_rows_whatever_the_run_is_called() -> None:
    """Of seven rows six are counted (clients.node.statistics): two seeds leave two out, and tell their difference."""
    rng = np.random.default_rng(0)
    rows = {n: rng.integers(0, 100, (7 if n == VICTIM else 6, 3), np.uint64) for n in "abcde"}

    def statistics(play: Play, seed: int) -> Any:
        config = {"sector": "banks", "seed": seed, "training": {"max_examples": 6}}
        request = play.request(0, dim=0, purpose="statistics", splits=("train",), config=config)
        chosen = {n: np.delete(r, seed, axis=0) if n == VICTIM else r for n, r in rows.items()}
        found = {n: (np.zeros(0, np.uint32), r.sum(axis=0, dtype=np.uint64)) for n, r in chosen.items()}
        return play.round(request, found)[2]

    play = ready(MALICIOUS)
    one = statistics(play, 0)
    again = next_run(play, TERMS)

    def attack() -> None:
        assert np.array_equal(minus(one, statistics(again, 1)), minus(rows[VICTIM][1], rows[VICTIM][0]))

    with pytest.raises(GroupLost):
        attack()


def test_statistics_are_given_again_to_a_run_with_another_seed_or_training_that_looks_at_all_rows() -> None:
    play = ready(MALICIOUS)
    vectors = vectors_of(play.names)
    config: dict[str, Any] = {
        "sector": "banks",
        "data": "real",
        "options": {"a": 1},
        "seed": 0,
        "training": {"lr": 0.1},
    }
    for at, changed in enumerate(({}, {"seed": 1}, {"training": {"lr": 0.2}}, {"dp": {"rounds": 3}})):
        asked = play.request(at % 2, purpose="statistics", splits=("train",), config={**config, **changed})
        _, total, _ = play.round(asked, vectors)
        assert np.array_equal(total, plain_sum(vectors, play.names)[0])
        play = next_run(play, TERMS)
    for changed in ({"data": "synthetic"}, {"options": {"a": 2}}, {"training": {"max_examples": 6}}, {"num_parts": 3}):
        asked = play.request(0, purpose="statistics", splits=("train",), config={**config, **changed})
        with refuses("that this base was answered with before"):
            play.masked("a", asked, *vectors["a"])


def test_fixed_survivors_are_fixed_whatever_the_run_is_called() -> None:
    terms = replace(TERMS, fixed_survivors=True)
    play = ready(MALICIOUS, terms=terms)
    vectors = vectors_of(play.names)
    _, one, _ = play.round(play.request(0, base="a model"), vectors)
    again = next_run(play, terms)

    def attack() -> None:
        _, two, _ = again.round(again.request(0, base="the model, one ulp away"), vectors, mask=[VICTIM])
        assert np.array_equal(minus(one, two), vectors[VICTIM][0])

    with pytest.raises(GroupLost):
        attack()


# ---------------------------------------------------------------- what is asked for, and of which rows


def test_statistics_are_answered_for_one_set_of_survivors_whatever_base_they_name() -> None:
    """Rows are the same whatever params come with the question: two sums differ by one node's statistics, exactly."""
    play = ready()
    vectors = vectors_of(play.names)
    junk = digest({"anything": np.ones(1, np.float32)})

    def asked(play: Play, index: int, base: str) -> Request:
        return play.request(index, purpose="statistics", base=base, splits=("train",))

    twin = copy.deepcopy(play)
    _, _, one = twin.round(asked(twin, 0, digest({})), vectors)
    forgetting(twin)
    _, _, two = twin.round(asked(twin, 1, junk), vectors, mask=[VICTIM])
    assert np.array_equal(minus(one, two), vectors[VICTIM][1])  # what it would learn

    play.round(asked(play, 0, digest({})), vectors)
    with pytest.raises(GroupLost):
        play.round(asked(play, 1, junk), vectors, mask=[VICTIM])
    assert all("answered in this run" in play.refused[n].evidence for n in "abcd")
    again = next_run(play, TERMS)
    with pytest.raises(GroupLost):
        again.round(asked(again, 0, junk), vectors, mask=[VICTIM])
    assert all("answered for other survivors" in again.refused[n].evidence for n in "abcd")
    for name, node in again.members.items():
        assert {f["base"] for f in node.journal.facts()} == {"statistics:banks"}, name


SPLITS = {"train": {"validation"}, "evaluate": {"validation", "test", "test_tuned"}, "statistics": {"train"}}


@pytest.mark.parametrize("purpose", [*SPLITS, "train ", "Train", "", "query", "enrol"])
def test_a_purpose_is_one_of_three_each_on_splits_of_its_own(purpose: str) -> None:
    play = ready()
    node, confirmation = play.members["a"], play.leader.confirmation("a")
    known = ("train", "validation", "test", "test_tuned", "everything", "")
    allowed = 0
    for splits in itertools.chain.from_iterable(itertools.combinations(known, n) for n in range(len(known) + 1)):
        asked = play.request(0, purpose=purpose, splits=splits)
        if purpose in SPLITS and set(splits) <= SPLITS[purpose]:
            node.require_maskable(asked, confirmation)
            allowed += 1
        else:
            for step in (lambda a=asked: node.require_maskable(a, confirmation), lambda a=asked: mask_zeros(play, a)):
                with refuses("nothing is masked for"):
                    step()
    assert allowed == (2 ** len(SPLITS[purpose]) if purpose in SPLITS else 0)
    assert node.journal.facts() == []


def mask_zeros(play: Play, request: Request, name: str = "a") -> Signed:
    zeros = np.zeros(5, np.uint32), np.zeros(3, np.uint64)
    return play.members[name].mask(request, play.leader.confirmation(name), *zeros)


def test_test_rows_of_a_base_are_counted_in_one_evaluation_and_never_in_training() -> None:
    """Training replies what the base scores on its splits, as evaluation does (clients.node.EVALUATED): once each."""
    play = ready()
    vectors = vectors_of(play.names)
    for splits in (("test",), ("validation", "test"), ("test_tuned",)):
        with refuses("nothing is masked for 'train'"):
            play.masked("a", play.request(0, splits=splits), *vectors["a"])
    play.round(play.request(0), vectors)
    play.round(play.request(1, purpose="evaluate", splits=("test",)), vectors)
    again = next_run(play, TERMS, run=play.run)
    for splits in (("test",), ("test_tuned",), ("validation", "test"), ()):
        with refuses("answered in this run"):
            again.masked("a", again.request(0, purpose="evaluate", splits=splits), *vectors["a"])


def test_validation_counts_of_a_base_are_answered_twice_and_hide_a_node_where_its_app_counts_other_rows() -> None:
    """Once in training, once in an evaluation, for other survivors if the server likes: it is written in the docs.
    Of the same rows the sums would differ by one node's counts; our app scores another half each time
    (clients.node.scored)."""
    rng = np.random.default_rng(0)
    rows = {n: rng.integers(0, 2, 400) for n in "abcde"}

    def told(fresh: bool) -> int:
        play = ready(MALICIOUS)
        half = {n: rng.random(400) < 0.5 for n in rows}
        counted = []
        for purpose, missing in (("train", ""), ("evaluate", VICTIM)):
            half = {n: rng.random(400) < 0.5 for n in rows} if fresh else half
            counted.append({n: int(r[half[n]].sum()) for n, r in rows.items()})
            vectors = {n: (np.zeros(0, np.uint32), np.array([c], np.uint64)) for n, c in counted[-1].items()}
            request = play.request(len(counted) - 1, dim=0, purpose=purpose)
            counted[-1]["sum"] = int(play.round(request, vectors, mask=list(missing))[2][0])
        return counted[0]["sum"] - counted[1]["sum"] - counted[0][VICTIM]

    assert told(fresh=False) == 0
    assert all(told(fresh=True) for _ in range(3))  # seeded: a difference of 0 has a chance of 1 in 35


# ---------------------------------------------------------------- nothing in a node's rows decides whether it answers


def test_a_count_above_what_the_server_allows_is_cut_off_and_no_answer_of_its_own() -> None:
    """A refusal leaves in clear: with `most` of its choice a server would find any count of any node by halving."""
    field = CountField("test/positives", (), "int64", exponent=0, most=100.0)
    for rows in (0, 1, 99, 100, 101, 10**6, 2**62, 2**63 - 1):
        assert counts.encode([field], {"test/positives": np.int64(rows)})[0] == min(rows, 100)
    for rows in (-1, -100, -(2**63)):
        assert counts.encode([field], {"test/positives": np.int64(rows)})[0] == 0
    several = CountField("test/bins", (2, 3), "int64", exponent=0, most=100.0)
    value = np.array([[1, 1000, -3], [100, 101, 0]])
    assert counts.encode([several], {"test/bins": value}).tolist() == [1, 100, 0, 100, 100, 0]
    # what is missing, or of another shape, is 0
    for values in ({}, {"test/bins": None}, {"test/bins": value[:1]}, {"test/bins": np.int64(3)}, {"bins": value}):
        assert counts.encode([field, several], {"test/positives": np.int64(7), **values}).tolist() == [7, *[0] * 6]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_count_that_is_not_finite_is_masked_like_any_other(dtype: str) -> None:
    """A model that overflows on one kind of record only would tell who has such a record, by who refuses."""
    field = CountField("validation/loss_sum", (), dtype, exponent=-20, most=100.0)
    most = 100 << 20
    told = {np.nan: most, np.inf: most, -np.inf: 0, 1e30: most, -1e30: 0, 101.0: most, -1.0: 0, 50.0: most // 2, 0: 0}
    for value, word in told.items():
        scalar = np.dtype(dtype).type(value)
        assert counts.encode([field], {field.name: scalar}).tolist() == [word]
        assert counts.encode([field], {field.name: np.asarray(scalar)}).tolist() == [word]
    whole = CountField("validation/loss_sum", (), "int64", exponent=0, most=100.0)
    for value in told:
        assert 0 <= counts.encode([whole], {field.name: np.dtype(dtype).type(value)})[0] <= 100


ANY_NUMBER = st.one_of(
    st.floats(width=64), st.floats(width=32), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1)
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(derandomize=True, max_examples=200)
@given(
    st.lists(ANY_NUMBER, min_size=3, max_size=3), st.sampled_from(["int64", "float64"]), st.sampled_from([0, -30, 7])
)
def test_whatever_arrays_an_app_counts_they_are_words_that_all_may_have(
    numbers: list[float], dtype: str, exponent: int
) -> None:
    fields = [
        CountField("test/a", (3,), dtype, exponent if dtype == "float64" else 0, most=1000.0),
        CountField("test/b", (), "int64", 0, most=5.0),
    ]
    for a in (np.array(numbers, np.float64), np.array(numbers, object).astype(np.float64).astype(np.int64)):
        for b in (None, np.int64(3), np.zeros(2), np.float64(a[0])):
            words = counts.encode(fields, {"test/a": a, "test/b": b, "test/more": a})
            assert (words.dtype, words.shape) == (np.uint64, (4,))
            sums = counts.decode(fields, words * np.uint64(5), num_members=5)
            assert (sums["test/a"] >= 0).all()
            assert (sums["test/a"] <= 5 * 1000.0 * (1 + 2**-8)).all()
            assert 0 <= sums["test/b"] <= 25


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_a_loss_that_is_no_number_of_64_bits_is_masked_like_any_other(dtype: str) -> None:
    """A loss is a number of Python's.  A base with logits of 1e20 has finite gradients, and a loss of 1e20 at whoever
    has a record it is wrong about: an error would leave in clear."""
    exponent = -30 if dtype == "float64" else 0
    field = CountField(counts.LOSS, (), dtype, exponent, most=100.0)
    told = {math.inf: 100, -math.inf: 0, 1e20: 100, -1e20: 0, 1e308: 100, 10**30: 100, -(10**30): 0, 2**63: 100, 7: 7}
    for value, count in told.items():
        assert counts.encode([field], {counts.LOSS: value}).tolist() == [count << -exponent], value
    assert counts.encode([field], {counts.LOSS: math.nan}).tolist() == [100 << -exponent]


@pytest.mark.parametrize("value", [np.array("x"), np.array(b"x"), 10**400], ids=["a text", "bytes", "10^400"])
def test_a_count_that_is_no_number_at_all_is_masked_like_any_other(value: Any) -> None:
    field = CountField("test/any", (), "float64", 0, most=100.0)
    assert counts.encode([field], {"test/any": value}).size == 1


FIELDS = {
    "no type": CountField("train_loss", (), "of its choice", 0, 100.0),
    "units of 2^-5000": CountField("train_loss", (), "float64", -5000, 100.0),
    "up to 1e308": CountField("train_loss", (), "float64", -30, 1e308),
    "up to NaN": CountField("train_loss", (), "float64", -30, math.nan),
    "less than nothing": CountField("train_loss", (), "float64", -30, -1.0),
}


HUGE = pytest.param(
    CountField("train_loss", (), "float64", -1000, 1e300),
    id="up to 1e300 in units of 2^-1000",
)


@pytest.mark.parametrize("field", [*(pytest.param(f, id=n) for n, f in FIELDS.items()), HUGE])
def test_whether_a_count_can_be_told_does_not_depend_on_whether_there_is_one(field: CountField) -> None:
    """So a server with such a field is told by each error that an app did not fail, which is to be a sum."""
    outcome = []
    for values in ({counts.FAILED: 1}, {counts.LOSS: np.float64(0.5)}):
        try:
            outcome.append(counts.encode([field], values).size)
        except SecAggError as error:
            outcome.append(error.code)
    assert len(set(outcome)) == 1


WORDS = {
    "zeros": (np.zeros(5, np.uint32), np.zeros(3, np.uint64)),
    "the largest": (np.full(5, 2**32 - 1, np.uint32), np.full(3, 2**64 - 1, np.uint64)),
    "the least below 0": (np.full(5, 1 << 31, np.uint32), np.full(3, 1 << 63, np.uint64)),
    "any": vectors_of("a")["a"],
}


@pytest.mark.parametrize("threat", list(Threat))
def test_a_node_answers_and_remembers_the_same_whatever_is_in_its_vectors(threat: Threat) -> None:
    told, sizes = [], set()
    for vectors in WORDS.values():
        play = ready(threat)
        node = play.members["a"]
        node.require_maskable(play.request(0), play.leader.confirmation("a"))
        signed, *_ = play.masked("a", play.request(0), *vectors)
        fields = json.loads(signed.payload)
        sizes.add((len(signed.payload), len(signed.signature)))
        told.append(({k: v for k, v in fields.items() if k not in ("update", "counts")}, list(node.journal.facts())))
    assert len(sizes) == 1
    assert all(found == told[0] for found in told)


@pytest.mark.parametrize("threat", list(Threat))
def test_what_would_be_refused_is_refused_before_anything_is_trained(threat: Threat) -> None:
    """`require_maskable` and `mask` say the same: between the two only the app runs."""
    play = ready(threat, num_keys=4)
    play.round(play.request(0), vectors_of(play.names))
    play.masked("a", play.request(1, base="masked only"), *vectors_of("a")["a"])
    good = play.request(2, base="next")
    few = Confirmation((), (), ())
    asked = [
        good, play.request(0, base="next"), play.request(1, base="next"), play.request(2), play.request(9, base="next"),
        play.request(2, base="masked only"), replace(good, purpose="tell"), replace(good, splits=("test",)),
        replace(good, members=("b",)), replace(good, run="another"), replace(good, key_index=None),
        replace(good, masking=None), with_masking(good, weights=()), with_masking(good, weights=(2, 1, 1, 1, 1)),
        with_masking(good, weights=(0, 0, 0, 0, 1)), with_masking(good, clip_norm=1.0), with_masking(good, scale=1),
        with_masking(good, epoch="another"), with_masking(good, quorum=2), with_masking(good, roster=""),
    ]  # fmt: skip
    outcomes = set()
    for request in asked:
        for confirmation in (play.leader.confirmation("a"), few):
            found = []
            for step in ("require_maskable", "mask"):
                node = copy.deepcopy(play.members["a"])
                words = (np.zeros(5, np.uint32), np.zeros(3, np.uint64)) if step == "mask" else ()
                try:
                    getattr(node, step)(request, confirmation, *words)
                    found.append("")
                except SecAggError as error:
                    found.append(str(error))
            assert found[0] == found[1]
            outcomes.add(found[0])
    assert "" in outcomes
    assert len(outcomes) > 8


# ---------------------------------------------------------------- groups that are drawn: once and for all


def test_fixed_survivors_are_fixed_whatever_the_server_calls_the_group() -> None:
    terms = replace(TERMS, fixed_survivors=True)
    play = ready(terms=terms)
    vectors = vectors_of(play.names)
    play.round(play.request(0, base="one"), vectors)
    again = Play(play.names, members=play.members, terms=terms, epoch="epoch-2")
    for label in ("the same people", "", "G", "g "):
        for node in again.members.values():
            with refuses("not as it is pinned"):
                node.answer(again.ask_keys(group=label))
    again.offline()
    found, _ = masked(again, again.request(0, base="one ulp away"), vectors, missing=[VICTIM])
    with refuses("the site allows one set"):
        again.members["a"].answer(found.ask_unmask())


def test_rounds_in_groups_that_were_drawn_long_ago_buy_no_new_draws() -> None:
    members = consortium(6, max_draws=3)
    drawing = draw(members, "epoch-0", 3)
    plays = [drawn_play(members, drawing, group, epoch="epoch-0", num_keys=4) for group in drawing.groups]
    for play in plays:
        play.offline()
    drawn = 0

    def grind() -> None:
        nonlocal drawn
        for at in range(4):
            for luck in range(2):
                draw(members, f"better luck {2 * at + luck}", 3)
                drawn += 1
            for play in plays:
                play.round(play.request(at, base=f"base {at}"), vectors_of(play.names))

    with refuses("no more draws"):
        grind()
    assert drawn <= 5  # the first of these rounds is a sum that came of a draw


def test_a_draw_that_ended_in_a_sum_is_forgiven_and_no_other() -> None:
    members = consortium(6, max_draws=2, max_regroupings=100)
    for at in range(5):
        draw(members, f"given up {at}", 3)
        drawing = draw(members, f"epoch-{at}", 3)
        for group in drawing.groups:
            play = drawn_play(members, drawing, group, epoch=f"epoch-{at}", num_keys=1)
            play.offline()
            play.round(play.request(0, base=f"base {at}"), vectors_of(group))
    draw(members, "given up 5", 3)
    draw(members, "given up 6", 3)
    with refuses("drawn 2 times"):
        draw(members, "given up 7", 3)


def test_a_draw_is_not_forgiven_for_a_sum_that_was_there_before_it() -> None:
    """Two group sizes by turns, so that each question is new; the numbers are too, and the groups."""
    play = ready(MALICIOUS, names="abcdef", terms=replace(TERMS, max_draws=3))
    vectors = vectors_of(play.names)
    play.round(play.request(0), vectors)
    other = Play(play.names, MALICIOUS, members=play.members, terms=play.terms, epoch="another")
    other.keys()  # its memory is of another epoch now

    def grind() -> None:
        drawing = liked(play, lambda at: None)
        exposed(play, drawing, index=1)

    with refuses("groups are drawn once for an epoch"):
        grind()


LIKED = ("a", "b", "f")
"""A victim, and two people of the server's."""


def liked(play: Play, between: Callable[[int], Any]) -> Drawing:
    """The groups that a server likes, drawn until they are there: a chance of 1 in 10 each."""
    for at in itertools.count():
        draw(play.members, play.epoch, 2)
        drawing = draw(play.members, play.epoch, 3)
        if at >= 3 and drawing.group_of("f") == LIKED:
            return drawing
        between(at)
    raise AssertionError


def exposed(play: Play, drawing: Drawing, index: int) -> None:
    """What such groups are good for."""
    chosen = drawn_play(play.members, drawing, LIKED, threat=MALICIOUS, epoch=play.epoch, num_keys=200)
    chosen.offline()
    vectors = vectors_of(play.names)
    _, total, _ = chosen.round(chosen.request(index, base="the last"), vectors)
    assert np.array_equal(minus(total, plain_sum(vectors, "ab")[0]), vectors["f"][0])


def test_a_draw_is_not_forgiven_for_a_sum_of_an_older_draw_of_its_name() -> None:
    play = ready(MALICIOUS, names="abcdef", terms=replace(TERMS, max_draws=3, max_keys=1000))
    members, vectors, name = play.members, vectors_of(play.names), "again and again"
    first = draw(members, name, 3)
    old = drawn_play(members, first, first.groups[0], epoch=name, num_keys=199, threat=MALICIOUS)
    others = drawn_play(members, first, first.groups[1], epoch=name, num_keys=199, threat=MALICIOUS)

    def rounds(at: int) -> None:
        for each in (old, others):
            each.round(each.request(at, base=f"base {at}"), vectors)

    def grind() -> None:
        for each in (old, others):
            each.offline()
        play.epoch = name
        drawing = liked(play, rounds)
        Play(play.names, MALICIOUS, members=members, terms=play.terms, epoch="between").keys()
        exposed(play, drawing, index=199)

    with refuses("groups are drawn once for an epoch"):
        grind()


def test_a_node_that_is_never_asked_to_unmask_is_in_no_more_groups_than_it_allows() -> None:
    members = consortium(9, max_regroupings=50, max_draws=50)
    members["n0"].terms = replace(members["n0"].terms, max_regroupings=1)

    def regroup() -> None:
        for at in range(6):
            drawing = draw(members, f"epoch-{at}", 3)
            group = drawing.group_of("n0")
            play = drawn_play(members, drawing, group, epoch=f"epoch-{at}", num_keys=1)
            vectors = vectors_of(group)
            play.leader.take_keys("n0", members["n0"].answer(play.leader.asked))
            play.keys(missing=["n0"])
            play.shares()
            play.confirm()
            _, total, _ = play.round(play.request(0, base=f"base {at}"), vectors, unmask=["n0"])
            assert np.array_equal(total, plain_sum(vectors, group)[0])  # its update is in this sum too

    with refuses("drawn groups"):
        regroup()


# ---------------------------------------------------------------- a sparse group


def sparse(size: int = 14, *, terms: Terms = SPARSE, **options: Any) -> Play:
    return Play([f"n{i:02}" for i in range(size)], num_keys=1, terms=terms, **options)


def accepted(play: Play) -> None:
    """A member publishes its keys."""
    play.members["n00"].answer(play.leader.asked)


@pytest.mark.parametrize(("num_neighbours", "threshold"), [(8, 2), (8, 4), (12, 6), (12, 1), (12, 0), (12, 13)])
def test_a_sparse_group_has_a_floor_for_its_threshold_too(num_neighbours: int, threshold: int) -> None:
    """With t <= k / 2 one half of a neighbourhood would give seeds and the other mask keys."""
    with refuses(f"threshold {threshold} among {num_neighbours} neighbours"):
        accepted(sparse(num_neighbours=num_neighbours, threshold=threshold))


@pytest.mark.parametrize(("num_neighbours", "threshold"), [(8, 5), (8, 8), (12, 7)])
def test_a_sparse_group_above_its_floors_is_accepted(num_neighbours: int, threshold: int) -> None:
    accepted(sparse(num_neighbours=num_neighbours, threshold=threshold))


def test_the_floor_holds_for_the_member_with_one_neighbour_more() -> None:
    play = sparse(15, num_neighbours=7, threshold=4)
    assert max(map(len, roster.peers(play.leader.asked).values())) == 8
    with refuses("threshold 4 among 7 neighbours"):
        accepted(play)
    accepted(sparse(15, num_neighbours=7, threshold=5))


@pytest.mark.parametrize("num_neighbours", [2, 3, 8, 12, 13, 14, 10**6])
def test_a_sparse_group_has_a_floor_for_its_degree(num_neighbours: int) -> None:
    """Two colluders of fourteen, if they are a node's neighbours, have all its secrets; where all share, eight must."""
    for terms, needed in ((TERMS, "all others are needed"), (SPARSE, "2 at least are needed")):
        if terms is SPARSE and 2 <= num_neighbours < 13:
            continue
        play = sparse(terms=terms, num_neighbours=num_neighbours, threshold=num_neighbours // 2 + 1)
        with refuses(f"{num_neighbours} neighbours among 14 members: {needed}"):
            play.members["n00"].answer(play.leader.asked)


@pytest.mark.parametrize(("colluding", "least"), [(0.1, 40), (0.05, None)])
def test_the_least_degree_follows_from_how_many_may_collude_by_the_sites_own_terms(
    colluding: float, least: int | None
) -> None:
    least = least or (graph.degree(50, colluding=colluding, dropping=0.1) or (0, 0))[0]
    assert 8 < least < 49
    terms = replace(TERMS, colluding=colluding)
    accepted(sparse(50, terms=terms, num_neighbours=least, threshold=least // 2 + 1))
    with refuses(f"{least} at least are needed"):
        accepted(sparse(50, terms=terms, num_neighbours=least - 1, threshold=least // 2 + 1))


def test_a_sparse_group_under_a_malicious_server_is_refused() -> None:
    play = Play([f"n{i:02}" for i in range(14)], MALICIOUS, num_neighbours=8, threshold=6, terms=SPARSE)
    with refuses("all share with each other"):
        play.members["n00"].answer(play.leader.asked)


def test_the_facts_that_a_node_remembers_are_no_secrets() -> None:
    play = ready()
    node = play.members["a"]
    secret = epoch.dumps(memory(node))
    play.round(play.request(0), vectors_of(play.names))
    told = json.dumps(list(node.journal.facts())).encode()
    kinds = [fact["fact"] for fact in node.journal.facts()]
    assert kinds == ["masked", "answered"]
    for at in range(0, len(secret) - 32, 32):
        assert secret[at : at + 32].hex().encode() not in told
    assert consent.base_of(play.request(0)) != consent.base_of(play.request(0, purpose="evaluate"))
