"""One spelling for every value that is hashed: canonical JSON, and seeds derived from it.

Sorted keys, no blanks, ASCII only, no NaN.  `encode(a) == encode(b)` exactly when a and b are the same value.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def encode(value: Any) -> bytes:
    """JSON value -> canonical bytes.  NaN and infinities raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical bytes.  -> hex"""
    return digest_of(encode(value))


def digest_of(encoded: bytes) -> str:
    """sha256 of bytes that are canonical already.  -> hex"""
    return hashlib.sha256(encoded).hexdigest()


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order.

    `seed_for(seed, "train", round, node)`: a node's randomness depends on who it is and what is asked, never on the
    engine, the order of arrival, or what ran before.
    """
    return int.from_bytes(hashlib.sha256(encode(list(parts))).digest()[:8], "big") >> 1
