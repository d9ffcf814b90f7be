"""The whole protocol, members dropping out wherever they like: the sum over the survivors, bit for bit, or no sum."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trellis.secagg.play import (
    SPARSE,
    TERMS,
    Memory,
    Play,
    Vectors,
    consortium,
    draw,
    drawn_play,
    pins_of,
    plain_sum,
    vectors_of,
)
from trellis import identity
from trellis.errors import SecAggError
from trellis.secagg import consent, epoch, quantise, roster, tally, tolerance, transcript
from trellis.secagg.consent import Terms
from trellis.secagg.leader import Leader
from trellis.secagg.member import Member
from trellis.secagg.messages import Stage
from trellis.secagg.tally import GroupLost, Tally, unmasked
from trellis.types import Threat

NAMES = ["a", "B", "bank 3", "n-1", "n-10", "n-2", "ünï", "银行"]
STEPS = ["keys", "shares", "confirm", "mask", "agree", "unmask"]
"""At which a member may be missing, and at all that follow."""


class Forgetful(Member):
    """A member that is a process of its own for every message: what it knows went through bytes."""

    def answer(self, question: Stage) -> Stage:
        reply = super().answer(question)
        self._sleep()
        return reply

    def mask(self, *args: Any) -> Any:
        signed = super().mask(*args)
        self._sleep()
        return signed

    def _sleep(self) -> None:
        if self.epoch is not None:
            woken = epoch.loads(epoch.dumps(self.epoch))
            assert woken == self.epoch
            assert epoch.dumps(woken) == epoch.dumps(self.epoch)
            self.epoch = woken


def forgetful(names: Iterable[str], terms: Terms = TERMS) -> dict[str, Member]:
    pins = pins_of(names)
    return {n: Forgetful(n, identity.simulated(n), pins, terms, Memory()) for n in pins}


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    return all(f.dtype == e.dtype and np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


@dataclass(frozen=True)
class Story:
    """A group, and where each of its members drops out (None: nowhere)."""

    threat: Threat
    dtype: str
    dropped: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        return sorted(NAMES[: len(self.dropped)])

    def missing(self, step: str) -> set[str]:
        """Who does not answer at a step."""
        at = STEPS.index(step)
        return {n for n, s in zip(self.names, self.dropped, strict=True) if s is not None and STEPS.index(s) <= at}

    def first_short(self, quorum: int) -> str | None:
        """The step at which too few are left."""
        steps = [s for s in STEPS if s != "agree" or self.threat is Threat.malicious_server]
        return next((s for s in steps if len(self.names) - len(self.missing(s)) < quorum), None)


DROP = st.sampled_from([None] * 10 + STEPS)
STORIES = st.builds(
    Story,
    st.sampled_from(list(Threat)),
    st.sampled_from(["uint32", "uint64"]),
    st.lists(DROP, min_size=3, max_size=8).map(tuple),
)


def told(play: Play, story: Story) -> tuple[Tally, Vectors]:
    """A story up to its masked vectors and the signatures over the survivors."""
    play.offline(**{step: story.missing(step) for step in STEPS[:3]})
    request = play.request(0, dim=7)
    vectors = vectors_of(play.names, story.dtype, dim=7)
    found = play.tally(request)
    for name in play.leader.members:
        if name not in story.missing("mask"):
            play._do(name, lambda n: found.take_masked(n, *play.masked(n, request, *vectors[n])))
    play.settle(found, agree=story.missing("agree"), unmask=play.names)
    return found, vectors


@settings(derandomize=True, max_examples=50)
@given(STORIES)
def test_whoever_drops_out_the_sum_over_the_survivors_is_exact_or_there_is_none(story: Story) -> None:
    play = Play(
        story.names,
        story.threat,
        num_keys=2,
        dtype=story.dtype,
        members=forgetful(story.names),
        pins=pins_of(story.names),
    )
    found, vectors = told(play, story)
    kept = tally.dumps(found)
    short = story.first_short(play.quorum or 0)
    enough = len(STEPS) if short is None else STEPS.index(short)

    play.settle(found, agree=play.names, unmask=story.missing("unmask"))

    assert play.leader.is_confirmed == (enough > STEPS.index("confirm"))
    assert found.has_quorum == (enough > STEPS.index("mask"))
    if short is None:
        survivors = sorted(set(play.names) - story.missing("mask"))
        assert found.survivors == survivors
        assert found.is_agreed
        assert found.is_recoverable
        total = unmasked(found.update.copy(), found.counts.copy(), found.masks())
        assert same(total, plain_sum(vectors, survivors))
        # a server that was killed before it had the shares asks again, and gets them
        resumed = tally.loads(kept, play.pins)
        play.settle(resumed, agree=play.names, unmask=story.missing("unmask"))
        assert same(unmasked(resumed.update, resumed.counts, resumed.masks()), total)
        returned(play, story)
    elif play.leader.members:
        assert not found.is_recoverable
        few = rf"too few shares of .+: {play.quorum} are needed"
        with pytest.raises(GroupLost, match=few if found.has_quorum else survivors_of(found)):
            found.masks()
    else:
        assert short in ("keys", "shares")
        assert found.survivors == []
        with pytest.raises(GroupLost, match=survivors_of(found)):
            found.masks()


def survivors_of(found: Tally) -> str:
    """Why there is no sum where too few are left."""
    return f"^{len(found.survivors)} survivors, {found.facts.quorum} are needed$"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("threat", list(Threat))
def test_as_many_may_drop_out_at_any_step_as_the_threshold_leaves(threat: Threat, size: int, step: str) -> None:
    most = size - tolerance.least_threshold(threat, size)
    story = Story(threat, "uint32", (step,) * most + (None,) * (size - most))
    play = Play(story.names, threat, num_keys=1)
    found, vectors = told(play, story)
    play.settle(found, agree=play.names, unmask=story.missing("unmask"))
    survivors = sorted(set(play.names) - story.missing("mask"))
    assert same(unmasked(found.update, found.counts, found.masks()), plain_sum(vectors, survivors))


def returned(play: Play, story: Story) -> None:
    """The next key index of the epoch, everybody back who confirmed the set."""
    vectors = vectors_of(play.names, story.dtype, dim=7, seed=1)
    back = sorted(set(play.names) - story.missing("confirm"))
    request = play.request(1, dim=7, base="the next base")
    absent = set(play.names) - set(back)
    found, *total = play.round(request, vectors, mask=absent)
    assert found.survivors == back
    assert same((total[0], total[1]), plain_sum(vectors, back))


@pytest.mark.parametrize("threat", list(Threat))
def test_a_group_below_its_quorum_says_at_every_step_why_there_is_no_sum(threat: Threat) -> None:
    names = ["a", "b", "c", "d", "e"]
    least = tolerance.least_threshold(threat, 5)
    gone = names[: 5 - least + 1]

    play = Play(names, threat)
    play.keys(missing=gone)
    assert play.leader.ask_shares() == {}

    play = Play(names, threat)
    play.offline(shares=gone)
    assert play.leader.ask_confirm() == {}
    assert not play.leader.is_confirmed

    play = Play(names, threat)
    play.offline(confirm=gone)
    assert not play.leader.is_confirmed
    play._do("e", lambda n: play.masked(n, play.request(0), *vectors_of("e")["e"]))
    assert f"{least - 1} members confirmed the set, {least} are needed" in play.refused["e"].evidence

    play = Play(names, threat)
    play.offline()
    with pytest.raises(GroupLost, match=f"^{least - 1} survivors, {least} are needed$"):
        play.round(play.request(0), vectors_of(names), mask=gone)
    assert f"{least - 1} members, {least} are needed" in play.refused["e"].evidence

    play = Play(names, threat)
    play.offline()
    with pytest.raises(GroupLost, match=rf"^too few shares of a, b, c, d, e: {least} are needed$"):
        play.round(play.request(0), vectors_of(names), unmask=gone)
    assert play.refused == {}


@pytest.mark.parametrize("threat", list(Threat))
def test_shares_of_more_survivors_than_there_are_give_no_masks_below_the_quorum(threat: Threat) -> None:
    """Whatever shares are there: the server that follows the protocol has no use for them."""
    play = Play(["a", "b", "c", "d", "e"], threat)
    play.offline()
    found, *_ = play.round(play.request(0), vectors_of(play.names))
    assert found.is_recoverable
    found.masks()
    found.survivors = found.survivors[: play.quorum - 1] if play.quorum else []
    with pytest.raises(GroupLost, match=survivors_of(found)):
        found.masks()


def test_a_group_without_members_has_no_sum_either() -> None:
    play = Play(["a", "b", "c"])
    play.keys(missing=["a", "b"])
    with pytest.raises(GroupLost, match=r"^0 survivors, 2 are needed$"):
        play.tally(play.request(0)).masks()


# ---------------------------------------------------------------- weights, counts, several key indices


@pytest.mark.parametrize("threat", list(Threat))
def test_every_key_index_of_an_epoch_gives_the_sum_of_its_round(threat: Threat) -> None:
    play = Play(["a", "b", "c", "d"], threat, num_keys=6, members=forgetful("abcd"), pins=pins_of("abcd"))
    play.offline()
    for index in (3, 0, 5, 1):
        vectors = vectors_of(play.names, dim=7, seed=index)
        missing = [play.names[index % 4]]
        found, *total = play.round(play.request(index, dim=7, base=f"base {index}"), vectors, mask=missing)
        assert same((total[0], total[1]), plain_sum(vectors, found.survivors))
        assert missing[0] not in found.survivors


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_rounds_of_train_and_evaluate_on_one_base_are_unmasked_both(dtype: str) -> None:
    play = Play(["a", "b", "c"], dtype=dtype)
    play.offline()
    vectors = vectors_of(play.names, dtype, dim=7)
    nothing = {n: (np.zeros(0, dtype), counts) for n, (_, counts) in vectors.items()}
    _, *trained = play.round(play.request(0, dim=7), vectors)
    _, empty, counts = play.round(play.request(1, dim=0, purpose="evaluate"), nothing)
    assert same((trained[0], trained[1]), plain_sum(vectors, play.names))
    assert empty.size == 0
    assert np.array_equal(counts, plain_sum(vectors, play.names)[1])


@settings(derandomize=True, max_examples=15)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), st.sampled_from(["uint32", "uint64"]), st.integers(0, 99))
def test_weighted_updates_come_back_as_their_weighted_mean(weights: list[int], dtype: str, seed: int) -> None:
    names, rng, clip_norm = sorted(NAMES[: len(weights)]), np.random.default_rng(seed), 4.0
    bits = 8 * np.dtype(dtype).itemsize
    scale = quantise.scale_for(len(names), clip_norm, max(weights), bits=bits)
    # a group of three may have one member that weighs more than the others
    terms = replace(TERMS, max_share=1.0, max_weight_ratio=9.0)
    if len(set(weights)) > 1:
        scale = min(scale, int(consent.MAX_STEPS / clip_norm))  # as fine as weighed updates may be
    play = Play(names, scale=scale, clip_norm=clip_norm, dtype=dtype, terms=terms)
    play.offline()
    request = play.request(0, dim=20)
    assert request.masking is not None
    request = replace(request, masking=replace(request.masking, weights=tuple(weights)))
    updates = {n: rng.normal(0, 0.5, 20).astype(np.float32) for n in names}
    weight = dict(zip(names, weights, strict=True))
    vectors = {
        n: (
            quantise.quantise(u, clip_norm=clip_norm, weight=weight[n], scale=scale, dtype=dtype, rng=rng)[0],
            np.array([weight[n]], np.uint64),
        )
        for n, u in updates.items()
    }

    found, update, counts = play.round(request, vectors, mask=[names[0]])

    total = int(counts[0])
    assert total == sum(weight[n] for n in found.survivors)
    most = quantise.largest_sum(total, clip_norm, scale, len(found.survivors))
    mean = quantise.dequantise(update, scale=scale, total_weight=total, num_members=len(found.survivors), most=most)
    expected = sum(weight[n] * updates[n].astype(np.float64) for n in found.survivors) / total
    tolerated = len(found.survivors) / (scale * total) + 1e-6
    assert np.abs(mean - expected).max() <= tolerated


# ---------------------------------------------------------------- a sparse graph


FOURTEEN = [f"n{i:02}" for i in range(14)]


def sparse(**options: Any) -> Play:
    return Play(FOURTEEN, num_keys=1, num_neighbours=8, threshold=5, terms=SPARSE, **options)


@settings(derandomize=True, max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 13), st.sampled_from(STEPS)), max_size=3, unique_by=lambda d: d[0]))
def test_a_sparse_group_survives_as_many_dropouts_as_its_threshold_leaves_neighbours(
    drops: list[tuple[int, str]],
) -> None:
    play = sparse(members=forgetful(FOURTEEN, SPARSE), pins=pins_of(FOURTEEN))
    dropped: list[str | None] = [None] * 14
    for at, step in drops:
        dropped[at] = step

    class Sparse(Story):
        @property
        def names(self) -> list[str]:
            return play.names

    story = Sparse(Threat.semi_honest, "uint32", tuple(dropped))
    found, vectors = told(play, story)
    play.settle(found, unmask=story.missing("unmask") | story.missing("agree"))
    survivors = sorted(set(play.names) - story.missing("mask"))
    assert found.survivors == survivors
    assert same(unmasked(found.update, found.counts, found.masks()), plain_sum(vectors, survivors))


def neighbours_of(play: Play, name: str) -> tuple[str, ...]:
    return roster.peers(play.leader.asked)[name]


def test_a_member_of_a_sparse_group_has_masks_and_shares_with_its_neighbours_only() -> None:
    play = sparse()
    play.offline()
    for name, member in play.members.items():
        assert member.epoch is not None
        assert len(neighbours_of(play, name)) == 8
        assert set(member.epoch.shares) == set(neighbours_of(play, name))
        assert set(member.epoch.mask_keys) == set(neighbours_of(play, name))


def test_a_sparse_group_is_lost_where_a_member_has_too_few_neighbours_left() -> None:
    play = sparse()
    play.offline()
    gone = neighbours_of(play, "n00")[:4]
    assert play.refused == {}
    with pytest.raises(GroupLost, match=r"too few shares of .*n00.*: 5 are needed"):
        play.round(play.request(0), vectors_of(play.names), unmask=gone)


def test_a_member_with_fewer_neighbours_than_shares_are_needed_of_it_says_so() -> None:
    play = sparse()
    play.keys(missing=neighbours_of(play, "n00")[:4])
    with pytest.raises(SecAggError, match="4 members would have shares, 5 are needed"):
        play.members["n00"].answer(play.leader.ask_shares()["n00"])


# ---------------------------------------------------------------- drawn groups


@pytest.mark.parametrize("threat", list(Threat))
@pytest.mark.parametrize(("size", "group_size"), [(6, 3), (7, 3), (9, 4)])
def test_an_honest_draw_gives_every_member_the_same_groups_and_each_its_sum(
    threat: Threat, size: int, group_size: int
) -> None:
    members = consortium(size, kind=Forgetful)
    drawing = draw(members, "epoch-1", group_size)
    assert sorted(n for group in drawing.groups for n in group) == sorted(members)
    assert min(map(len, drawing.groups)) >= group_size
    assert max(map(len, drawing.groups)) <= min(map(len, drawing.groups)) + 1
    for group in drawing.groups:
        play = drawn_play(members, drawing, group, threat=threat)
        vectors = vectors_of(group, dim=7)
        play.offline()
        found, *total = play.round(play.request(0, dim=7), vectors, mask=group[3:4])
        assert play.refused == {}
        assert same((total[0], total[1]), plain_sum(vectors, found.survivors))


def test_no_member_accepts_a_drawn_group_that_is_not_its_own() -> None:
    members = consortium(6)
    drawing = draw(members, "epoch-1", 3)
    mine, other = drawing.groups
    mixed = tuple(sorted((*mine[:2], other[0])))
    for group in (other, mixed, tuple(sorted(members))):
        play = drawn_play(members, drawing, group)
        for name in mine:
            with pytest.raises(SecAggError, match="group"):
                members[name].answer(play.leader.asked)


def test_groups_that_are_drawn_again_follow_from_new_numbers() -> None:
    members = consortium(9, max_draws=8)
    drawings = [draw(members, f"epoch-{i}", 3) for i in range(8)]
    assert len({tuple(d.groups) for d in drawings}) > 1  # all the same: one chance in 10^17
    numbers = [json.loads(r.payload)["number"] for d in drawings for r in d.reveals.values()]
    assert len(set(numbers)) == 72


def test_a_member_asked_twice_for_one_draw_gives_one_commitment() -> None:
    members = consortium(6)
    first, second = (draw(members, "epoch-1", 3) for _ in range(2))
    assert first == second
    drew = [fact for fact in members["n0"].journal.facts() if fact["fact"] == "drew"]
    assert len(drew) == 1


# ---------------------------------------------------------------- what travels twice


@pytest.mark.parametrize("threat", list(Threat))
def test_every_question_asked_again_gets_the_same_bytes(threat: Threat) -> None:
    play = Play(["a", "b", "c", "d"], threat, members=forgetful("abcd"), pins=pins_of("abcd"))
    member = play.members["b"]

    def twice(question: Stage) -> Any:
        first = member.answer(question)
        assert member.answer(question) == first
        return first

    play.leader.take_keys("b", twice(play.leader.asked))
    play.keys(missing=["b"])
    play.leader.take_shares("b", twice(play.leader.ask_shares()["b"]))
    play.shares(missing=["b"])
    play.leader.take_confirmed("b", twice(play.leader.ask_confirm()["b"]))
    for name in "acd":  # `ask_confirm` starts to count signatures anew
        play.leader.take_confirmed(name, play.members[name].answer(Leader.ask_confirm(play.leader)[name]))
    play.confirm()
    vectors = vectors_of(play.names)
    request = play.request(0)
    found = play.tally(request)
    for name in play.names:
        found.take_masked(name, *play.masked(name, request, *vectors[name]))
    if threat is Threat.malicious_server:
        found.take_survivors("b", twice(found.ask_survivors()))
        play.settle(found, agree=["b"], unmask=play.names)
    found.take_shares("b", twice(found.ask_unmask()))
    play.settle(found, agree=play.names, unmask=["b"])
    assert same(unmasked(found.update, found.counts, found.masks()), plain_sum(vectors, play.names))


def test_an_epoch_is_spelt_the_same_whatever_is_in_it() -> None:
    found = epoch.Epoch(
        run="run \N{SNOWMAN}", epoch="", group="g", roster=b"", names=[], threat="semi_honest", quorum=2, threshold=2,
        num_neighbours=0, num_keys=0, drawn=False, peers=[],
    )  # fmt: skip
    assert epoch.loads(epoch.dumps(found)) == found
    full = replace(
        found,
        roster=bytes(range(32)),
        open={"0": ["request", "train::base"]},
        signed={"3": "ff"},
        shares={"银行": b"\0\1", "a": b""},
        transport={"b": bytes(32)},
        answer=b"{}\n",
    )
    assert epoch.loads(epoch.dumps(full)) == full


def test_statements_of_an_epoch_hold_nothing_of_its_secrets() -> None:
    play = Play(["a", "b", "c"])
    play.offline()
    said = b"".join(
        [s.payload for s in play.leader.statements.values()]
        + [s.payload + b"".join(s.ciphertexts) + b"".join(s.hashes) for s in play.leader.shares.values()]
    )
    for member in play.members.values():
        assert member.epoch is not None
        for secrets in (member.epoch.mask_secrets, member.epoch.seeds):
            for at in range(0, len(secrets), 32):
                assert secrets[at : at + 32] not in said
                assert secrets[at : at + 32].hex().encode() not in said
        assert member.epoch.transport == {}


def test_what_a_key_index_needed_is_erased_once_it_was_answered_for() -> None:
    play = Play(["a", "b", "c"], num_keys=2)
    play.offline()
    play.round(play.request(0), vectors_of(play.names))
    for member in play.members.values():
        assert member.epoch is not None
        for secrets, size in ((member.epoch.mask_secrets, 32), (member.epoch.seeds, 32)):
            assert secrets[:size] == bytes(size)
            assert secrets[size:].strip(b"\0")
        for shares in member.epoch.shares.values():
            assert shares[:66] == bytes(66)
            assert shares[66:].strip(b"\0")


def test_every_digest_binds_its_label_and_the_length_of_every_part() -> None:
    spelt = [("l", "ab", "c"), ("l", "a", "bc"), ("l", "abc"), ("la", "bc"), ("l", "ab", "c", "")]
    assert len({transcript.digest(*parts) for parts in spelt}) == len(spelt)
