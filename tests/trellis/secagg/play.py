"""The whole protocol in one process, without Flower: members and a leader that talk through Python calls.

`Play` goes step by step, so that a test can stand in for the server, or for a member, at any of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trellis import identity
from trellis.errors import SecAggError
from trellis.identity import Member as Pin
from trellis.secagg import leader, roster, tally, tolerance
from trellis.secagg.consent import Fact, Terms
from trellis.secagg.leader import Leader
from trellis.secagg.member import Member
from trellis.secagg.messages import AskDraw, AskKeys, AskReveal, Committed, Revealed
from trellis.secagg.tally import Facts, Tally, unmasked
from trellis.types import Masking, Request, Threat

Vectors = dict[str, tuple[Any, Any]]

TERMS = Terms(least_threat=Threat.semi_honest, min_group=2, code_is_pinned=True)

SPARSE = replace(TERMS, colluding=0.0, dropping=0.0)
"""With which a group of fourteen may be sparse; else all of it must share."""


@dataclass
class Memory:
    """A journal that lasts as long as the test."""

    kept: list[Fact] = field(default_factory=list)

    def facts(self) -> Sequence[Fact]:
        return self.kept

    def add(self, fact: Fact) -> None:
        self.kept.append(fact)


def pins_of(names: Iterable[str], group: str = "g", organisation: Callable[[str], str] = str.upper) -> dict[str, Pin]:
    """Members as everybody has pinned them, each of its own organisation."""
    return {n: Pin(n, organisation(n), identity.simulated(n).public_key, group) for n in names}


@dataclass(frozen=True)
class Drawing:
    """Groups as everybody's numbers give them, with the statements that prove it."""

    commits: dict[str, Committed]
    reveals: dict[str, Revealed]
    groups: list[tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.commits))

    @property
    def entries(self) -> tuple[bytes, ...]:
        """As they go into `AskKeys.draw`; empty where a member withheld its number."""
        nothing = Revealed(b"", b"")
        said = [(self.commits[n], self.reveals.get(n, nothing)) for n in self.names]
        return tuple(part for c, r in said for part in (c.payload, c.signature, r.payload, r.signature))

    def group_of(self, name: str) -> tuple[str, ...]:
        return next(group for group in self.groups if name in group)


def draw(
    members: Mapping[str, Member], epoch: str, group_size: int, *, run: str = "run", withhold: Iterable[str] = ()
) -> Drawing:
    """Groups drawn among members, some of which do not reveal their numbers."""
    names = tuple(sorted(members))
    commits = {n: members[n].answer(AskDraw(run, epoch, names, group_size)) for n in names}
    question = ask_reveal(epoch, commits)
    reveals = {n: members[n].answer(question) for n in names if n not in withhold}
    numbers = {n: bytes.fromhex(json.loads(r.payload)["number"]) for n, r in reveals.items()}
    owners = [(n, members[n].pins[n].organisation) for n in sorted(numbers)]
    groups = roster.dealt_out(owners, group_size, roster.drawn_seed(run, epoch, numbers))
    return Drawing(commits, reveals, groups)


def ask_reveal(epoch: str, commits: Mapping[str, Committed]) -> AskReveal:
    names = tuple(sorted(commits))
    payloads = tuple(commits[n].payload for n in names)
    return AskReveal(epoch, names, payloads, tuple(commits[n].signature for n in names))


@dataclass
class Play:
    """A group, its members and the server's half."""

    names: list[str]
    threat: Threat = Threat.semi_honest
    num_keys: int = 3
    terms: Terms = TERMS
    quorum: int | None = None
    num_neighbours: int = 0
    threshold: int | None = None
    run: str = "run"
    epoch: str = "epoch-1"
    clip_norm: float = 4.0
    scale: int = 1000
    dtype: str = "uint32"
    pins: dict[str, Pin] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[str, SecAggError] = field(default_factory=dict)
    drawing: Drawing | None = None
    """Where the group was drawn and is not pinned."""

    def __post_init__(self) -> None:
        self.names = sorted(self.names)
        self.pins = self.pins or pins_of(self.names)
        for name in self.names:
            if name not in self.members:
                self.members[name] = Member(name, identity.simulated(name), self.pins, self.terms, Memory())
        self.quorum = self.quorum or tolerance.least_threshold(self.threat, len(self.names))
        self.leader = Leader(self.ask_keys(), self.pins)

    def ask_keys(self, **changes: Any) -> AskKeys:
        asked = leader.ask_keys(
            run=self.run,
            epoch=self.epoch,
            group="g",
            names=self.names,
            pins=self.pins,
            threat=self.threat,
            quorum=self.quorum or 2,
            threshold=self.threshold,
            num_neighbours=self.num_neighbours,
            num_keys=self.num_keys,
            draw=self.drawing.entries if self.drawing else (),
            drawn_names=self.drawing.names if self.drawing else (),
        )
        return replace(asked, **changes)

    # ------------------------------------------------------------ offline

    def keys(self, missing: Iterable[str] = ()) -> None:
        for name in set(self.names) - set(missing):
            self._do(name, lambda n: self.leader.take_keys(n, self.members[n].answer(self.leader.asked)))

    def shares(self, missing: Iterable[str] = ()) -> None:
        for name, question in self.leader.ask_shares().items():
            if name not in missing:
                self._do(name, lambda n, q=question: self.leader.take_shares(n, self.members[n].answer(q)))

    def confirm(self, missing: Iterable[str] = ()) -> None:
        while True:
            gone = len(self.leader.removed)
            for name, question in self.leader.ask_confirm().items():
                if name not in missing:
                    self._do(name, lambda n, q=question: self.leader.take_confirmed(n, self.members[n].answer(q)))
            if len(self.leader.removed) == gone:
                return

    def offline(self, *, keys: Iterable[str] = (), shares: Iterable[str] = (), confirm: Iterable[str] = ()) -> None:
        """All three steps, some members missing at each."""
        self.keys(keys)
        self.shares({*keys, *shares})
        self.confirm({*keys, *shares, *confirm})

    # ------------------------------------------------------------ a round

    def request(
        self, index: int = 0, *, dim: int = 5, base: str = "base", purpose: Any = "train", **changes: Any
    ) -> Request:
        masking = Masking(
            epoch=self.leader.asked.epoch,
            group=self.leader.asked.group,
            roster=self.leader.asked.roster.hex(),
            confirmed=self.leader.set_digest.hex(),
            members=tuple(self.leader.members),
            quorum=self.leader.asked.quorum,
            clip_norm=self.clip_norm,
            scale=self.scale,
            dtype=self.dtype,
            dim=dim,
            counts=(),
            weights=tuple(1 for _ in self.leader.members),
        )
        request = Request(
            run=self.run,
            round=index + 1,
            purpose=purpose,
            base=base,
            config={"sector": "banks"},
            members=tuple(self.names),
            key_index=index,
            masking=masking,
        )
        return replace(request, **changes)

    def tally(self, request: Request, num_counts: int = 3) -> Tally:
        assert request.masking is not None
        update = np.zeros(request.masking.dim, request.masking.dtype)
        return Tally(Facts.of(self.leader, request), self.pins, update, np.zeros(num_counts, np.uint64))

    def masked(self, name: str, request: Request, update: Any, counts: Any) -> tuple[Any, Any, Any]:
        """One member's masked vectors and its signature."""
        update, counts = update.copy(), counts.copy()
        signed = self.members[name].mask(request, self.leader.confirmation(name), update, counts)
        return signed, update, counts

    def round(
        self,
        request: Request,
        vectors: dict[str, tuple[Any, Any]],
        *,
        mask: Iterable[str] = (),
        agree: Iterable[str] = (),
        unmask: Iterable[str] = (),
    ) -> tuple[Tally, Any, Any]:
        """A round in which some members are missing at each step.  -> the tally and the unmasked sums"""
        num_counts = len(next(iter(vectors.values()))[1])
        found = self.tally(request, num_counts)
        for name in self.leader.members:
            if name not in mask:
                self._do(name, lambda n: found.take_masked(n, *self.masked(n, request, *vectors[n])))
        self.settle(found, agree={*mask, *agree}, unmask={*mask, *unmask})
        update, counts = unmasked(found.update.copy(), found.counts.copy(), found.masks())
        return found, update, counts

    def settle(self, found: Tally, *, agree: Iterable[str] = (), unmask: Iterable[str] = ()) -> None:
        """From masked vectors to shares."""
        if self.threat is Threat.malicious_server:
            for name in set(found.survivors) - set(agree):
                question = found.ask_survivors()
                self._do(name, lambda n, q=question: found.take_survivors(n, self.members[n].answer(q)))
        for name in set(found.survivors) - set(unmask):
            question = found.ask_unmask()
            self._do(name, lambda n, q=question: found.take_shares(n, self.members[n].answer(q)))

    def _do(self, name: str, step: Callable[[str], None]) -> None:
        try:
            step(name)
        except SecAggError as error:
            self.refused[name] = error


def consortium(size: int = 9, *, kind: type[Member] = Member, **terms: Any) -> dict[str, Member]:
    """Members n0, n1, ... that accept each other and have no group in common: theirs are drawn."""
    pins = pins_of([f"n{i}" for i in range(size)], group="")
    agreed = replace(TERMS, **terms)
    return {n: kind(n, identity.simulated(n), pins, agreed, Memory()) for n in pins}


def drawn_play(members: Mapping[str, Member], drawing: Drawing, group: tuple[str, ...], **options: Any) -> Play:
    """One group of a draw."""
    chosen = {n: members[n] for n in group}
    return Play(list(group), members=chosen, pins=dict(members[group[0]].pins), drawing=drawing, **options)


def vectors_of(names: Iterable[str], dtype: str = "uint32", *, dim: int = 5, seed: int = 0) -> Vectors:
    """An update and counts for everyone, words of any value: sums wrap."""
    rng = np.random.default_rng(seed)

    def words(size: int, dtype: str) -> Any:
        return rng.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)

    return {name: (words(dim, dtype), words(3, "uint64")) for name in names}


def plain_sum(vectors: dict[str, tuple[Any, Any]], survivors: Iterable[str]) -> tuple[Any, Any]:
    """What the server may learn: the sum over the survivors, mod 2^32 or 2^64."""
    chosen = [vectors[name] for name in survivors]
    with np.errstate(over="ignore"):
        return sum((u for u, _ in chosen[1:]), start=chosen[0][0]), sum((c for _, c in chosen[1:]), start=chosen[0][1])


__all__ = [
    "SPARSE",
    "TERMS",
    "Drawing",
    "Memory",
    "Play",
    "Vectors",
    "ask_reveal",
    "consortium",
    "draw",
    "drawn_play",
    "pins_of",
    "plain_sum",
    "tally",
    "vectors_of",
]
