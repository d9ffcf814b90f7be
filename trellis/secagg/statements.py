"""What both halves derive and sign in the same way: masks, hashes of secrets, published keys, sets of survivors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trellis.errors import SecAggError
from trellis.identity import Member
from trellis.secagg import keys, shamir, transcript
from trellis.secagg.transcript import Signed

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

UPDATE, COUNTS = 0, 1
"""Parts of a keystream: what masks the update, and what masks the counts."""


def seed_hash(roster_digest: bytes, name: str, index: int, seed: bytes) -> bytes:
    """What a member publishes of a self-mask seed."""
    return transcript.digest("seed", roster_digest, name, index, seed)


def self_mask(roster_digest: bytes, index: int, request: str, name: str, seed: bytes) -> bytes:
    """Key of a member's own mask."""
    return keys.derive(seed, "self mask", roster_digest, index, request, name)


def pair_mask(
    roster_digest: bytes, index: int, request: str, name: str, other: str, private: bytes, public: bytes
) -> bytes:
    """Key of the mask that two members have in common, from the private key of either and the other's public one."""
    low, high = sorted((name, other))
    return keys.agree(private, public, "pair mask", roster_digest, index, request, low, high)


def survivors_digest(roster_digest: bytes, index: int, request: str, survivors: Sequence[str]) -> bytes:
    return transcript.digest("survivors", roster_digest, index, request, *survivors)


def both_digest(keys_statement: bytes, shares_statement: bytes) -> bytes:
    """A member's two statements as one."""
    return transcript.digest("member", keys_statement, shares_statement)


def masked_fields(
    roster_digest: bytes, index: int, request: str, name: str, update: Words, counts: Words
) -> dict[str, str | int]:
    """What a member signs of its masked vectors."""
    return {
        "roster": roster_digest.hex(),
        "index": index,
        "request": request,
        "node": name,
        "update": hashlib.sha256(update.data).hexdigest(),
        "counts": hashlib.sha256(counts.data).hexdigest(),
    }


def split_secrets(seeds: bytes, mask_secrets: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """Shares of all secrets of an epoch, by holder: for every key index one of the seed and one of the mask key."""
    rows: list[list[bytes]] = [[] for _ in points]
    for at in range(0, len(seeds), keys.KEY_BYTES):
        for secret in (seeds[at : at + keys.KEY_BYTES], mask_secrets[at : at + keys.KEY_BYTES]):
            for row, share in zip(rows, shamir.split(secret, points, threshold), strict=True):
                row.append(share)
    return [b"".join(row) for row in rows]


def share_at(shares: bytes, index: int, secret: int) -> bytes:
    """One share of those that a dealer has for a holder."""
    at = (2 * index + secret) * shamir.SHARE_BYTES
    return shares[at : at + shamir.SHARE_BYTES]


@dataclass(frozen=True, slots=True)
class Published:
    """A member's public keys of an epoch: one to encrypt to it for each peer, and by key index one for masks and the
    hash of its self-mask seed."""

    transport: Mapping[str, bytes]
    mask: Sequence[bytes]
    seeds: Sequence[bytes]


def read_keys(signed: Signed, pin: Member, roster_digest: bytes, peers: Iterable[str], num_keys: int) -> Published:
    """A member's published keys.  Raises SecAggError where one is missing, of small order, or there twice."""
    fields = transcript.read(signed, "keys", pin.public_key, roster=roster_digest.hex(), node=pin.name)
    transport = transcript.hex_map(fields.get("transport"), keys.KEY_BYTES, peers)
    mask = transcript.hex_list(fields.get("mask"), keys.KEY_BYTES, num_keys)
    seeds = transcript.hex_list(fields.get("seeds"), transcript.DIGEST_BYTES, num_keys)
    every = [*transport.values(), *mask]
    if any(keys.is_weak(public) for public in every):
        raise SecAggError("bad_key", f"a public key of {pin.name} is of small order")
    if len({keys.coordinate(public) for public in every}) < len(every):
        raise SecAggError("bad_key", f"a public key of {pin.name} stands there twice")
    return Published(transport, mask, seeds)


def require_distinct(published: Mapping[str, Published]) -> None:
    """Raises SecAggError("bad_key") where two members publish one key."""
    seen: dict[int, str] = {}
    for name, found in sorted(published.items()):
        for public in map(keys.coordinate, (*found.mask, *found.transport.values())):
            if seen.setdefault(public, name) != name:
                raise SecAggError("bad_key", f"{name} and {seen[public]} publish one key")
