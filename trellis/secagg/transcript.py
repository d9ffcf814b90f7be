"""What is hashed and what is signed: every byte string has one meaning.

Digests and key derivations begin with a label and frame every part by its length, so that no two different contents
have one encoding.  A statement is canonical JSON that says what it is; its signature covers exactly those bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trellis import canonical, identity
from trellis.errors import SecAggError
from trellis.identity import IdentityKey

LABEL = b"trellis/secagg/v1/"
DIGEST_BYTES = 32
MAX_STATEMENT_BYTES = 8 << 20
"""More than any statement of a group of a thousand."""


def framed(label: str, *parts: bytes | str | int) -> bytes:
    """Label and parts, each behind its length: injective."""
    encoded = [LABEL + label.encode(), *(_bytes(part) for part in parts)]
    return b"".join(struct.pack("<Q", len(part)) + part for part in encoded)


def digest(label: str, *parts: bytes | str | int) -> bytes:
    """sha256 of `framed`.  -> 32 bytes"""
    return hashlib.sha256(framed(label, *parts)).digest()


def _bytes(part: bytes | str | int) -> bytes:
    if isinstance(part, bytes):
        return part
    # a stranger's text may hold what no encoding takes
    return (part if isinstance(part, str) else str(part)).encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement and its signature, exactly as they travelled."""

    payload: bytes
    signature: bytes

    @property
    def digest(self) -> bytes:
        return digest("statement", self.payload)


def sign(key: IdentityKey, kind: str, fields: Mapping[str, Any]) -> Signed:
    """A statement of this kind.  `fields` are JSON values."""
    payload = canonical.encode({**fields, "kind": kind})
    return Signed(payload, key.sign(f"secagg/{kind}", payload))


def read(signed: Signed, kind: str, public_key: bytes, **expected: Any) -> dict[str, Any]:
    """The fields of a statement, signed by this key, of this kind, with these values among them.

    Raises SecAggError("bad_signature").
    """
    if len(signed.payload) > MAX_STATEMENT_BYTES:
        raise SecAggError("bad_signature", f"a statement of {len(signed.payload)} bytes")
    if not identity.verify(public_key, f"secagg/{kind}", signed.payload, signed.signature):
        raise SecAggError("bad_signature", f"a statement of kind {kind} is not signed by the key that is pinned")
    return parsed(signed.payload, kind, **expected)


def parsed(payload: bytes, kind: str, **expected: Any) -> dict[str, Any]:
    """The fields of a statement whose signature is known to be good.  Raises SecAggError("bad_signature")."""
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SecAggError("bad_signature", "a signed statement is not JSON") from error
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise SecAggError("bad_signature", f"a signed statement is not of kind {kind}")
    for name, value in expected.items():
        if fields.get(name) != value:
            found = str(fields.get(name))[:60]
            raise SecAggError("bad_signature", f"a signed {kind} says {name}={found}, expected {str(value)[:60]}")
    return fields


def hex_bytes(value: Any, size: int) -> bytes:
    """`size` bytes that are written as hex.  Raises SecAggError("bad_key")."""
    try:
        found = bytes.fromhex(value)
    except (TypeError, ValueError) as error:
        raise SecAggError("bad_key", f"{str(value)[:40]!r} is not hex") from error
    if len(found) != size:
        raise SecAggError("bad_key", f"{len(found)} bytes where {size} are needed")
    return found


def hex_list(value: Any, size: int, count: int) -> list[bytes]:
    """`count` byte strings of `size` bytes.  Raises SecAggError("bad_key")."""
    if not isinstance(value, list) or len(value) != count:
        raise SecAggError("bad_key", f"expected a list of {count} values")
    return [hex_bytes(item, size) for item in value]


def hex_map(value: Any, size: int, names: Iterable[str]) -> dict[str, bytes]:
    """A byte string of `size` bytes for each of these names and no others.  Raises SecAggError("bad_key")."""
    wanted = set(names)
    if not isinstance(value, dict) or set(value) != wanted:
        raise SecAggError("bad_key", f"expected values for {len(wanted)} members, one each")
    return {name: hex_bytes(item, size) for name, item in value.items()}


def entry(fields: Mapping[str, Any], field: str, name: str, size: int) -> bytes:
    """One member's byte string in a map of them.  Raises SecAggError("bad_key")."""
    values = fields.get(field)
    return hex_bytes(values.get(name) if isinstance(values, dict) else None, size)


def set_digest(roster: bytes, names: Sequence[str], digests: Sequence[bytes]) -> bytes:
    """Digest of a set of members with the statements that stand for each."""
    parts = [part for name, found in zip(names, digests, strict=True) for part in (name, found)]
    return digest("set", roster, *parts)


def names_digest(roster: bytes, label: str, names: Sequence[str]) -> bytes:
    """Digest of a set of names within a group."""
    return digest(label, roster, *sorted(names))
