"""What one member dealt to another: a share of each of its secrets, encrypted, with a signed hash of everything.

A holder that finds something wrong complains: it reveals the one private key that opens what this dealer sent it, and
then anybody can look (`judge`).  So either a dealer or a complainer is convicted, never an honest member, and what is
revealed are shares that a liar dealt, or shares of the liar that complained without reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trellis.errors import SecAggError
from trellis.identity import Member
from trellis.secagg import keys, shamir, transcript
from trellis.secagg.transcript import Signed

SEED, KEY = 0, 1
"""A self-mask seed's share, and a mask key's: the two secrets that are dealt for every key index."""
HASH_BYTES = 32
NUM_EVIDENCE = 8
"""Entries of a complaint's evidence."""


def share_hash(roster: bytes, dealer: str, holder: str, index: int, secret: int, share: bytes) -> bytes:
    """What a dealer signs of a share.  Shares are uniform field elements, so their hashes say nothing of them."""
    return transcript.digest("share", roster, dealer, holder, index, secret, share)


def hashes_of(roster: bytes, dealer: str, holder: str, shares: bytes) -> bytes:
    """Hashes of all shares that a dealer has for a holder, in their order."""
    split = (shares[at : at + shamir.SHARE_BYTES] for at in range(0, len(shares), shamir.SHARE_BYTES))
    return b"".join(share_hash(roster, dealer, holder, i // 2, i % 2, share) for i, share in enumerate(split))


def dealt_digest(ciphertext: bytes, hashes: bytes) -> bytes:
    """What a dealer's signed list says of one holder."""
    return transcript.digest("dealt", ciphertext, hashes)


def seal(roster: bytes, dealer: str, holder: str, transport_public: bytes, shares: bytes) -> tuple[bytes, bytes]:
    """Shares, encrypted to a holder's transport key under a fresh key.  -> (public half of that key, ciphertext)"""
    private, public = keys.generate()
    key = keys.agree(private, transport_public, "share", roster, dealer, holder)
    return public, keys.encrypt(key, shares, _associated(roster, dealer, holder))


def opened(
    roster: bytes,
    dealer: str,
    holder: str,
    *,
    private: bytes,
    public: bytes,
    ciphertext: bytes,
    hashes: bytes,
    num_keys: int,
) -> bytes:
    """The shares in a ciphertext.  Raises SecAggError("bad_share") where they are not what the dealer signed."""
    try:
        key = keys.agree(private, public, "share", roster, dealer, holder)
    except SecAggError as error:
        raise SecAggError("bad_share", f"{dealer} sent a key of small order to {holder}") from error
    shares = keys.decrypt(key, ciphertext, _associated(roster, dealer, holder))
    if shares is None or len(shares) != 2 * num_keys * shamir.SHARE_BYTES:
        raise SecAggError("bad_share", f"what {dealer} sent to {holder} cannot be opened")
    if hashes_of(roster, dealer, holder, shares) != hashes:
        raise SecAggError("bad_share", f"what {dealer} sent to {holder} are not the shares it signed")
    return shares


def _associated(roster: bytes, dealer: str, holder: str) -> bytes:
    return transcript.framed("shares", roster, dealer, holder)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A complaint with all that is needed to look into it, each statement as it was signed."""

    complaint: Signed
    keys: Signed
    """The complainer's."""
    shares: Signed
    """The dealer's."""
    ciphertext: bytes
    hashes: bytes

    def entries(self) -> tuple[bytes, ...]:
        statements = (self.complaint, self.keys, self.shares)
        return (*(part for s in statements for part in (s.payload, s.signature)), self.ciphertext, self.hashes)


def evidence_in(entries: tuple[bytes, ...]) -> list[Evidence]:
    """Inverse of `entries`, of several complaints one after another.  Raises SecAggError("wrong_records")."""
    if len(entries) % NUM_EVIDENCE:
        raise SecAggError("wrong_records", f"{len(entries)} entries are no whole number of complaints")
    found = []
    for at in range(0, len(entries), NUM_EVIDENCE):
        c, cs, k, ks, s, ss, ciphertext, hashes = entries[at : at + NUM_EVIDENCE]
        found.append(Evidence(Signed(c, cs), Signed(k, ks), Signed(s, ss), ciphertext, hashes))
    return found


def judge(
    evidence: Evidence,
    roster: bytes,
    pins: Mapping[str, Member],
    num_keys: int,
    *,
    keys_digest: bytes,
    known: Mapping[str, bytes],
) -> tuple[str, str]:
    """Who is to be removed, the dealer or the complainer, and why.

    `keys_digest` is of all keys that were good, `known` are the digests of single members' keys: a statement beside
    those convicts nobody.

    Raises SecAggError where a statement is not what it should be: then whoever put the evidence together is wrong.
    """
    complaint = transcript.parsed(evidence.complaint.payload, "complaint", roster=roster.hex())
    complainer, dealer = str(complaint.get("node")), str(complaint.get("against"))
    if complainer not in pins or dealer not in pins or complainer == dealer:
        raise SecAggError("bad_complaint", f"a complaint of {complainer[:60]} against {dealer[:60]}")
    transcript.read(evidence.complaint, "complaint", pins[complainer].public_key, roster=roster.hex())
    published = transcript.read(
        evidence.keys, "keys", pins[complainer].public_key, roster=roster.hex(), node=complainer
    )
    if known.get(complainer, evidence.keys.digest) != evidence.keys.digest:
        raise SecAggError("bad_complaint", f"the keys of {complainer} are not those it published")
    told = {"roster": roster.hex(), "node": dealer, "keys": keys_digest.hex()}
    dealt = transcript.read(evidence.shares, "shares", pins[dealer].public_key, **told)
    signed = transcript.entry(dealt, "lists", complainer, HASH_BYTES)
    if signed != dealt_digest(evidence.ciphertext, evidence.hashes):
        raise SecAggError("bad_complaint", f"the complaint of {complainer} is not about what {dealer} signed")
    private = transcript.hex_bytes(complaint.get("secret"), keys.KEY_BYTES)
    if keys.public_of(private) != transcript.entry(published, "transport", dealer, keys.KEY_BYTES):
        return complainer, f"{complainer} complained of {dealer} with a key that is not its own"
    try:
        opened(
            roster,
            dealer,
            complainer,
            private=private,
            public=transcript.entry(dealt, "ephemeral", complainer, keys.KEY_BYTES),
            ciphertext=evidence.ciphertext,
            hashes=evidence.hashes,
            num_keys=num_keys,
        )
    except SecAggError as error:
        return dealer, error.evidence
    return complainer, f"{complainer} complained of {dealer}, whose shares are good"
