"""A member's memory of an epoch: its secrets, and what others told it.  It lives in memory only.

`dumps` and `loads` carry it from one message to the next where every message starts a process of its own.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any

NEW, KEYS, SHARES, CONFIRMED = range(4)
"""How far a member has come in an epoch."""


@dataclass(slots=True)
class Epoch:
    """Everything of one epoch at one member.  Secrets are erased as soon as they are no longer needed."""

    run: str
    epoch: str
    group: str
    roster: bytes
    names: list[str]
    threat: str
    quorum: int
    threshold: int
    num_neighbours: int
    num_keys: int
    drawn: bool
    peers: list[str]
    """Members it shares with."""
    stage: int = NEW
    keys_digest: bytes = b""
    """Of the statement of all members whose keys were good."""
    keyed: list[str] = field(default_factory=list)
    """They."""
    confirmed: bytes = b""
    """Digest of the set it signed last."""
    members: list[str] = field(default_factory=list)
    """That set: whose masks are in a sum."""
    certified: bool = False
    """Whether it has seen that enough others signed the set too."""
    signed: dict[str, str] = field(default_factory=dict)
    """By key index, the digest of the survivors it confirmed."""
    open: dict[str, list[str]] = field(default_factory=dict)
    """By key index in use: the request, and the base it is about."""
    weights: dict[str, dict[str, int]] = field(default_factory=dict)
    """By key index in use, the members' weights; none where they are all the same."""
    masked: list[int] = field(default_factory=list)
    """Key indices that are used up, or in use."""
    mask_secrets: bytes = b""
    """Private mask keys, one a key index; zeros where erased."""
    seeds: bytes = b""
    """Self-mask seeds, likewise."""
    transport: dict[str, bytes] = field(default_factory=dict)
    """Private keys to which each peer encrypts."""
    statements: dict[str, bytes] = field(default_factory=dict)
    """Digest of each peer's keys."""
    mask_keys: dict[str, bytes] = field(default_factory=dict)
    """Each peer's public mask keys, one a key index."""
    shares: dict[str, bytes] = field(default_factory=dict)
    """By dealer: for every key index a share of its seed and one of its mask key."""
    asked: bytes = b""
    """Digest of the last question."""
    answer: bytes = b""
    """The reply to it: the same question gets the same bytes."""


_BINARY = ("roster", "keys_digest", "confirmed", "mask_secrets", "seeds", "asked", "answer")
_MAPS = ("transport", "statements", "mask_keys", "shares")


def dumps(epoch: Epoch) -> bytes:
    """An epoch as bytes.  `loads(dumps(e)) == e`."""
    blobs = [getattr(epoch, name) for name in _BINARY]
    blobs += [value for name in _MAPS for value in getattr(epoch, name).values()]
    head: dict[str, Any] = {f.name: getattr(epoch, f.name) for f in fields(epoch) if f.name not in (*_BINARY, *_MAPS)}
    head["maps"] = {name: list(getattr(epoch, name)) for name in _MAPS}
    head["sizes"] = [len(blob) for blob in blobs]
    encoded = json.dumps(head).encode()
    return struct.pack("<I", len(encoded)) + encoded + b"".join(blobs)


def loads(data: bytes) -> Epoch:
    """Inverse of `dumps`."""
    (size,) = struct.unpack("<I", data[:4])
    head = json.loads(data[4 : 4 + size])
    at, blobs = 4 + size, []
    for length in head.pop("sizes"):
        blobs.append(data[at : at + length])
        at += length
    maps = head.pop("maps")
    rest = iter(blobs)
    values: dict[str, Any] = {name: next(rest) for name in _BINARY}
    found: dict[str, Any] = {name: {key: next(rest) for key in maps[name]} for name in _MAPS}
    return Epoch(**head, **values, **found)


def erased(words: bytes, index: int, size: int) -> bytes:
    """The entries with one of them set to zeros."""
    return words[: index * size] + bytes(size) + words[(index + 1) * size :]
