"""The server's half of a round: one group's masked vectors, added up as they arrive, and unmasked.

Only the sum is kept, never a single vector.  What is written down before the first share is asked for (`dumps`) is
enough to go on after a crash: members give the same shares to the same question.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trellis.errors import SecAggError
from trellis.identity import Member as Pin
from trellis.secagg import dealt, keys, prg, roster, shamir, statements, transcript
from trellis.secagg.leader import Dealer, Leader
from trellis.secagg.messages import AskSurvivors, AskUnmask, Survivors, Unmasked
from trellis.secagg.statements import COUNTS, UPDATE
from trellis.secagg.transcript import Signed
from trellis.types import Request, Threat

Words = npt.NDArray[Any]
Masks = list[tuple[bytes, int]]


class GroupLost(Exception):
    """A group has no sum.  `liar` is who is to blame, where somebody is."""

    def __init__(self, reason: str, liar: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.liar = reason, liar


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server knows of the group for one request: all that unmasking needs."""

    epoch: str
    roster: bytes
    index: int
    request: str
    names: tuple[str, ...]
    """All of the group: where shares are evaluated."""
    members: tuple[str, ...]
    """Whose masks are in the sum."""
    threat: Threat
    quorum: int
    threshold: int
    num_neighbours: int
    dealers: Mapping[str, Dealer]

    @classmethod
    def of(cls, leader: Leader, request: Request) -> Facts:
        """For a request with this leader's masking."""
        asked = leader.asked
        assert request.key_index is not None
        return cls(
            epoch=asked.epoch,
            roster=asked.roster,
            index=request.key_index,
            request=request.digest,
            names=asked.names,
            members=tuple(leader.members),
            threat=Threat(asked.threat),
            quorum=asked.quorum,
            threshold=asked.threshold,
            num_neighbours=asked.num_neighbours,
            dealers=leader.dealers(request.key_index),
        )


@dataclass(slots=True)
class Tally:
    """The sum of one group for one request, from the first vector to the unmasked total."""

    facts: Facts
    pins: Mapping[str, Pin]
    update: Words
    counts: Words
    """Sums of masked vectors, mod 2^32 or 2^64."""
    survivors: list[str] = field(default_factory=list)
    agreed: dict[str, Signed] = field(default_factory=dict)
    """Signatures over the survivors."""
    held: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Good shares: by dealer, by holder."""

    # ------------------------------------------------------------ vectors

    def take_masked(self, name: str, signed: Signed, update: Words, counts: Words) -> None:
        """One member's masked vectors.  Raises SecAggError."""
        f = self.facts
        if name not in f.members:
            raise SecAggError("unknown_node", f"{name} is not among the members whose masks are in the sum")
        if name in self.survivors:
            raise SecAggError("duplicate", f"{name} has sent its vectors already")
        for total, words in ((self.update, update), (self.counts, counts)):
            if not isinstance(words, np.ndarray) or not words.flags.c_contiguous:
                raise SecAggError("wrong_shape", f"a {type(words).__name__} that is no contiguous vector")
            if words.shape != total.shape or words.dtype != total.dtype:
                raise SecAggError("wrong_shape", f"{words.shape} words of {words.dtype}, {total.shape} are needed")
        said = statements.masked_fields(f.roster, f.index, f.request, name, update, counts)
        transcript.read(signed, "masked", self.pins[name].public_key, **said)
        with np.errstate(over="ignore"):
            np.add(self.update, update, out=self.update)
            np.add(self.counts, counts, out=self.counts)
        self.survivors = sorted([*self.survivors, name])

    @property
    def has_quorum(self) -> bool:
        return len(self.survivors) >= self.facts.quorum

    # ------------------------------------------------------------ survivors

    def ask_survivors(self) -> AskSurvivors:
        """The question to every survivor under malicious_server."""
        f = self.facts
        return AskSurvivors(f.epoch, f.index, f.request, tuple(self.survivors))

    def take_survivors(self, name: str, reply: Survivors) -> None:
        """One survivor's signature.  Raises SecAggError."""
        f = self.facts
        self._require_survivor(name)
        found = statements.survivors_digest(f.roster, f.index, f.request, self.survivors)
        signed = Signed(reply.payload, reply.signature)
        told = {"roster": f.roster.hex(), "survivors": found.hex()}
        transcript.read(signed, "survivors", self.pins[name].public_key, **told)
        self.agreed[name] = signed

    @property
    def is_agreed(self) -> bool:
        """Whether shares may be asked for."""
        return self.facts.threat is Threat.semi_honest or len(self.agreed) >= self.facts.quorum

    # ------------------------------------------------------------ shares

    def ask_unmask(self) -> AskUnmask:
        """The question to every survivor."""
        f, signers = self.facts, sorted(self.agreed)
        return AskUnmask(
            epoch=f.epoch,
            key_index=f.index,
            request=f.request,
            survivors=tuple(self.survivors),
            signers=tuple(signers),
            payloads=tuple(self.agreed[name].payload for name in signers),
            signatures=tuple(self.agreed[name].signature for name in signers),
        )

    def take_shares(self, holder: str, reply: Unmasked) -> None:
        """One survivor's shares, each as its dealer signed it.  Raises SecAggError; then none of them counts."""
        f = self.facts
        self._require_survivor(holder)
        expected = [dealer for dealer in f.members if holder in f.dealers[dealer].share_hashes]
        if list(reply.dealers) != expected or len(reply.shares) != len(expected):
            raise SecAggError("bad_share", f"{len(reply.shares)} shares, {len(expected)} are needed")
        for dealer, share in zip(reply.dealers, reply.shares, strict=True):
            kind = self._kind(dealer)
            found = dealt.share_hash(f.roster, dealer, holder, f.index, kind, share)
            if found != f.dealers[dealer].share_hashes[holder][kind]:
                raise SecAggError("bad_share", f"a share of {dealer} is not the one that was dealt")
        for dealer, share in zip(reply.dealers, reply.shares, strict=True):
            self.held.setdefault(dealer, {})[holder] = share

    @property
    def is_recoverable(self) -> bool:
        """Whether there are shares enough of every secret."""
        return all(len(self.held.get(dealer, {})) >= self.facts.threshold for dealer in self.facts.members)

    def masks(self) -> Masks:
        """Every mask that is left in the sum, with the sign that takes it away.

        Raises GroupLost: where shares are missing, or all are what a dealer signed and do not give its secret.
        """
        f = self.facts
        if not self.has_quorum:
            raise GroupLost(f"{len(self.survivors)} survivors, {f.quorum} are needed")
        short = [dealer for dealer in f.members if len(self.held.get(dealer, {})) < f.threshold]
        if short:
            raise GroupLost(f"too few shares of {', '.join(short[:5])}: {f.threshold} are needed")
        masks: Masks = []
        for name, secret in self._secrets().items():
            if self._kind(name) == dealt.SEED:
                if statements.seed_hash(f.roster, name, f.index, secret) != f.dealers[name].seed_hash:
                    raise GroupLost(f"the shares that {name} dealt do not give its seed", name)
                masks.append((statements.self_mask(f.roster, f.index, f.request, name, secret), -1))
                continue
            if keys.public_of(secret) != f.dealers[name].mask_key:
                raise GroupLost(f"the shares that {name} dealt do not give its mask key", name)
            for other in self._peers(name) & set(self.survivors):
                key = statements.pair_mask(f.roster, f.index, f.request, name, other, secret, f.dealers[other].mask_key)
                masks.append((key, -1 if other < name else 1))
        return masks

    def _require_survivor(self, name: str) -> None:
        if name not in self.survivors:
            raise SecAggError("unknown_node", f"{name[:60]} is not in the sum")

    def _secrets(self) -> dict[str, bytes]:
        """Seeds of survivors and mask keys of the others."""
        at, coefficients = roster.points(self.facts.names), dict[tuple[str, ...], list[int]]()
        found = {}
        for dealer in self.facts.members:
            holders = tuple(sorted(self.held[dealer])[: self.facts.threshold])
            if holders not in coefficients:
                coefficients[holders] = shamir.lagrange_at_zero([at[holder] for holder in holders])
            try:
                shares = [self.held[dealer][holder] for holder in holders]
                found[dealer] = shamir.combine(shares, coefficients[holders])
            except SecAggError as error:
                raise GroupLost(f"the shares that {dealer} dealt give no secret: {error.evidence}", dealer) from error
        return found

    def _kind(self, dealer: str) -> int:
        return dealt.SEED if dealer in self.survivors else dealt.KEY

    def _peers(self, name: str) -> set[str]:
        f = self.facts
        return set(roster.peers_of(f.names, f.num_neighbours, f.roster)[name])


def unmasked(update: Words, counts: Words, masks: Iterable[tuple[bytes, int]]) -> tuple[Words, Words]:
    """The sums without their masks, in place."""
    masks = list(masks)
    prg.add_masks(update, masks, region=UPDATE)
    prg.add_masks(counts, masks, region=COUNTS)
    return update, counts


# ---------------------------------------------------------------- on disk


def dumps(tally: Tally) -> bytes:
    """A tally whose survivors are settled, without shares.  `loads(dumps(t), pins)` unmasks as `t` does."""
    f = tally.facts
    head = {
        **{k: v for k, v in asdict(f).items() if k not in ("roster", "dealers")},
        "roster": f.roster.hex(),
        "dealers": {
            name: {
                "mask_key": d.mask_key.hex(),
                "seed_hash": d.seed_hash.hex(),
                "share_hashes": {h: [seed.hex(), key.hex()] for h, (seed, key) in d.share_hashes.items()},
            }
            for name, d in f.dealers.items()
        },
        "survivors": tally.survivors,
        "agreed": {name: [s.payload.hex(), s.signature.hex()] for name, s in tally.agreed.items()},
        "update": [str(tally.update.dtype), tally.update.size],
        "counts": [str(tally.counts.dtype), tally.counts.size],
    }
    encoded = json.dumps(head).encode()
    return struct.pack("<I", len(encoded)) + encoded + tally.update.tobytes() + tally.counts.tobytes()


def loads(data: bytes, pins: Mapping[str, Pin]) -> Tally:
    """Inverse of `dumps`.  Raises ValueError or KeyError where the bytes are damaged."""
    (size,) = struct.unpack("<I", data[:4])
    head = json.loads(data[4 : 4 + size])
    dealers = {
        name: Dealer(
            bytes.fromhex(d["mask_key"]),
            bytes.fromhex(d["seed_hash"]),
            {h: (bytes.fromhex(seed), bytes.fromhex(key)) for h, (seed, key) in d["share_hashes"].items()},
        )
        for name, d in head["dealers"].items()
    }
    facts = Facts(
        epoch=head["epoch"],
        roster=bytes.fromhex(head["roster"]),
        index=head["index"],
        request=head["request"],
        names=tuple(head["names"]),
        members=tuple(head["members"]),
        threat=Threat(head["threat"]),
        quorum=head["quorum"],
        threshold=head["threshold"],
        num_neighbours=head["num_neighbours"],
        dealers=dealers,
    )
    (update_dtype, dim), (counts_dtype, num_counts) = head["update"], head["counts"]
    update = np.frombuffer(data, update_dtype, dim, 4 + size).copy()
    counts = np.frombuffer(data, counts_dtype, num_counts, 4 + size + update.nbytes).copy()
    agreed = {name: Signed(bytes.fromhex(p), bytes.fromhex(s)) for name, (p, s) in head["agreed"].items()}
    return Tally(facts, pins, update, counts, survivors=list(head["survivors"]), agreed=agreed)
