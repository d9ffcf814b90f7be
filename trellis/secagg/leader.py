"""The server's half of an epoch: one group's keys, shares and the set that its members confirm.

A server that follows the protocol is all this is; what a member believes of it is checked in `member`.  A reply that
does not check raises SecAggError and costs its sender its place in the epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from trellis import identity
from trellis.errors import SecAggError
from trellis.identity import Member as Pin
from trellis.secagg import dealt, keys, roster, shamir, statements, transcript
from trellis.secagg.messages import AskConfirm, AskKeys, AskShares, Confirmation, Confirmed, Keys, Shares
from trellis.secagg.statements import Published
from trellis.secagg.transcript import Signed
from trellis.types import Threat


def ask_keys(
    *,
    run: str,
    epoch: str,
    group: str,
    names: Sequence[str],
    pins: Mapping[str, Pin],
    threat: Threat,
    quorum: int,
    threshold: int | None = None,
    num_neighbours: int = 0,
    num_keys: int,
    draw: tuple[bytes, ...] = (),
    drawn_names: tuple[str, ...] = (),
) -> AskKeys:
    """The first question of an epoch to a group."""
    ordered = tuple(sorted(names))
    return AskKeys(
        run=run,
        epoch=epoch,
        group=group,
        names=ordered,
        organisations=tuple(pins[name].organisation for name in ordered),
        fingerprints=tuple(identity.fingerprint(pins[name].public_key) for name in ordered),
        threat=str(threat),
        quorum=quorum,
        threshold=quorum if threshold is None else threshold,
        num_neighbours=num_neighbours,
        num_keys=num_keys,
        draw=draw,
        drawn_names=drawn_names,
    )


@dataclass(frozen=True, slots=True)
class Dealer:
    """What the server knows of a member's secrets for one key index."""

    mask_key: bytes
    seed_hash: bytes
    share_hashes: Mapping[str, tuple[bytes, bytes]]
    """By holder, of the shares of its seed and of its mask key."""


@dataclass(slots=True)
class Leader:
    """An epoch of one group, as the server sees it."""

    asked: AskKeys
    pins: Mapping[str, Pin]
    """Identity keys the server knows, to name who does not sign."""
    statements: dict[str, Signed] = field(default_factory=dict)
    """Everybody's keys."""
    published: dict[str, Published] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    confirmed: dict[str, Signed] = field(default_factory=dict)
    """Signatures over the set as it is now."""
    removed: dict[str, str] = field(default_factory=dict)
    """Members convicted of dealing or complaining falsely, and why."""
    evidence: list[dealt.Evidence] = field(default_factory=list)

    # ------------------------------------------------------------ keys

    def take_keys(self, name: str, reply: Keys) -> None:
        """One member's keys.  Raises SecAggError."""
        self._require_member(name, self.asked.names)
        signed = Signed(reply.payload, reply.signature)
        found = statements.read_keys(
            signed, self.pins[name], self.asked.roster, roster.peers(self.asked)[name], self.asked.num_keys
        )
        statements.require_distinct({**self.published, name: found})
        self.statements[name], self.published[name] = signed, found

    def ask_shares(self) -> dict[str, AskShares]:
        """A question to everyone whose keys are good; none when they are too few."""
        names = sorted(self.statements)
        if not self._enough(names):
            return {}
        digests = tuple(self.statements[name].digest for name in names)
        everyone = roster.peers(self.asked)
        questions = {}
        for name in names:
            peers = sorted({*everyone[name], name} & set(names))
            told = [self.statements[peer] for peer in peers]
            questions[name] = AskShares(
                epoch=self.asked.epoch,
                names=tuple(names),
                digests=digests,
                peers=tuple(peers),
                payloads=tuple(s.payload for s in told),
                signatures=tuple(s.signature for s in told),
            )
        return questions

    # ------------------------------------------------------------ shares

    def take_shares(self, name: str, reply: Shares) -> None:
        """What one member deals.  Raises SecAggError."""
        asked = self.asked
        self._require_member(name, self.statements)
        signed = Signed(reply.payload, reply.signature)
        fields = transcript.read(
            signed,
            "shares",
            self.pins[name].public_key,
            roster=asked.roster.hex(),
            node=name,
            keys=self._keys_digest().hex(),
        )
        holders = self._holders(name)
        others = [holder for holder in holders if holder != name]
        transcript.hex_map(fields.get("ephemeral"), keys.KEY_BYTES, others)
        lists = transcript.hex_map(fields.get("lists"), dealt.HASH_BYTES, holders)
        if list(reply.holders) != holders or not len(reply.ciphertexts) == len(reply.hashes) == len(holders):
            raise SecAggError("bad_share", f"shares for {len(reply.holders)} members, {len(holders)} must have them")
        size = 2 * asked.num_keys
        for holder, ciphertext, hashes in zip(holders, reply.ciphertexts, reply.hashes, strict=True):
            told = 0 if holder == name else size * shamir.SHARE_BYTES + keys.TAG_BYTES
            if len(ciphertext) != told or len(hashes) != size * dealt.HASH_BYTES:
                raise SecAggError("bad_share", f"what is dealt to {holder} has the wrong size")
            if lists[holder] != dealt.dealt_digest(ciphertext, hashes):
                raise SecAggError("bad_share", f"what is dealt to {holder} is not what was signed")
        self.shares[name] = reply

    def ask_confirm(self) -> dict[str, AskConfirm]:
        """A question to every member of the set; none when they are too few, or all is confirmed."""
        names = self.members
        if not self._enough(names):
            return {}
        self.confirmed.clear()
        digests = tuple(
            statements.both_digest(self.statements[name].digest, Signed(self.shares[name].payload, b"").digest)
            for name in names
        )
        everyone = roster.peers(self.asked)
        evidence = tuple(part for found in self.evidence for part in found.entries())
        questions = {}
        for name in names:
            dealers = sorted(set(everyone[name]) & set(names))
            dealt_to = [(self.shares[d], self.shares[d].holders.index(name)) for d in dealers]
            questions[name] = AskConfirm(
                epoch=self.asked.epoch,
                names=tuple(names),
                digests=digests,
                dealers=tuple(dealers),
                payloads=tuple(shares.payload for shares, _ in dealt_to),
                signatures=tuple(shares.signature for shares, _ in dealt_to),
                ciphertexts=tuple(shares.ciphertexts[at] for shares, at in dealt_to),
                hashes=tuple(shares.hashes[at] for shares, at in dealt_to),
                evidence=evidence,
            )
        return questions

    # ------------------------------------------------------------ the set

    def take_confirmed(self, name: str, reply: Confirmed) -> None:
        """A signature over the set, or complaints that are looked into.  Raises SecAggError for what is neither."""
        self._require_member(name, self.shares)
        if reply.complaints:
            self._look_into(name, reply.complaints)
            return
        signed = Signed(reply.payload, reply.signature)
        told = {"roster": self.asked.roster.hex(), "set": self.set_digest.hex()}
        transcript.read(signed, "confirm", self.pins[name].public_key, **told)
        self.confirmed[name] = signed

    def _look_into(self, name: str, complaints: Sequence[bytes]) -> None:
        if len(complaints) % 2 or len(complaints) > 2 * len(self.asked.names):
            raise SecAggError("bad_complaint", f"{len(complaints)} entries are no complaints")
        for payload, signature in zip(complaints[::2], complaints[1::2], strict=True):
            fields = transcript.parsed(payload, "complaint", roster=self.asked.roster.hex(), node=name)
            dealer = str(fields.get("against"))
            if dealer not in self.shares or name not in self.shares[dealer].holders or dealer == name:
                raise SecAggError("bad_complaint", f"a complaint against {dealer[:60]}, who dealt it nothing")
            shares = self.shares[dealer]
            at = shares.holders.index(name)
            found = dealt.Evidence(
                complaint=Signed(payload, signature),
                keys=self.statements[name],
                shares=Signed(shares.payload, shares.signature),
                ciphertext=shares.ciphertexts[at],
                hashes=shares.hashes[at],
            )
            known = {name: signed.digest for name, signed in self.statements.items()}
            guilty, why = dealt.judge(
                found,
                self.asked.roster,
                self.pins,
                self.asked.num_keys,
                keys_digest=self._keys_digest(),
                known=known,
            )
            self.evidence.append(found)
            self.removed.setdefault(guilty, why)

    @property
    def members(self) -> list[str]:
        """The set: all whose keys and shares are good, sorted."""
        return sorted(set(self.shares) - set(self.removed))

    @property
    def set_digest(self) -> bytes:
        """What members sign."""
        digests = [
            statements.both_digest(self.statements[name].digest, Signed(self.shares[name].payload, b"").digest)
            for name in self.members
        ]
        return transcript.set_digest(self.asked.roster, self.members, digests)

    @property
    def is_confirmed(self) -> bool:
        """Whether enough members have signed the set for it to be used."""
        return self._enough(self.members) and len(set(self.confirmed) & set(self.members)) >= self.asked.quorum

    def confirmation(self, name: str) -> Confirmation:
        """What goes with a request to one member: signatures of others over the set."""
        among = set(self.members)
        if self.asked.num_neighbours:
            among &= {*roster.peers(self.asked)[name], name}
        signers = sorted(set(self.confirmed) & among)
        signed = [self.confirmed[signer] for signer in signers]
        return Confirmation(tuple(signers), tuple(s.payload for s in signed), tuple(s.signature for s in signed))

    def dealers(self, index: int) -> dict[str, Dealer]:
        """What is known of every member's secrets for a key index."""
        found = {}
        for name in self.members:
            shares, published = self.shares[name], self.published[name]
            by_holder = {
                holder: _pair(hashes, index) for holder, hashes in zip(shares.holders, shares.hashes, strict=True)
            }
            found[name] = Dealer(published.mask[index], published.seeds[index], by_holder)
        return found

    # ------------------------------------------------------------ inside

    def _require_member(self, name: str, among: Collection[str]) -> None:
        if name not in among or name not in self.pins:
            raise SecAggError("unknown_node", f"{name[:60]} has no part in this step")

    def _enough(self, names: Sequence[str]) -> bool:
        return len(names) >= self.asked.quorum

    def _holders(self, name: str) -> list[str]:
        """Who must have shares of a member's secrets: those whose keys are good, itself too where all share."""
        known = set(self.statements)
        peers = set(roster.peers(self.asked)[name])
        return sorted(known & (peers if self.asked.num_neighbours else {*peers, name}))

    def _keys_digest(self) -> bytes:
        names = sorted(self.statements)
        return transcript.set_digest(self.asked.roster, names, [self.statements[name].digest for name in names])


def _pair(hashes: bytes, index: int) -> tuple[bytes, bytes]:
    at = 2 * index * dealt.HASH_BYTES
    return hashes[at : at + dealt.HASH_BYTES], hashes[at + dealt.HASH_BYTES : at + 2 * dealt.HASH_BYTES]
