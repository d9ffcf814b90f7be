"""Who signs: Ed25519 identity keys in files, and the members that a node accepts.

A node trusts the keys that its own site has pinned (exchanged out of band), never keys that a server sends.  A private
key is a PEM file that nobody but its owner can read; a public key travels as 32 bytes, written as hex.

In a simulation a node's key follows from its name (`simulated`): anybody can compute it, so it protects nothing and
only exercises the code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from trellis.errors import ConfigError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_LABEL = b"trellis/v1/"


@dataclass(frozen=True, slots=True)
class Member:
    """A node as another one has pinned it."""

    name: str
    organisation: str
    public_key: bytes
    group: str = ""
    """With whom its updates may be summed."""
    role: str = "train"
    """Groups are drawn among members of one role only."""


class IdentityKey:
    """A node's private identity key."""

    __slots__ = ("_key", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def sign(self, label: str, payload: bytes) -> bytes:
        """64 bytes over the payload; `label` says what it is, so that no signature can be taken for another."""
        return self._key.sign(_labelled(label, payload))


def verify(public_key: bytes, label: str, payload: bytes, signature: bytes) -> bool:
    """Whether the owner of `public_key` signed this payload as a `label`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _labelled(label, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def _labelled(label: str, payload: bytes) -> bytes:
    return _LABEL + label.encode() + b"\0" + payload


def fingerprint(public_key: bytes) -> str:
    """sha256 of a public key, for people to compare.  -> hex"""
    return hashlib.sha256(public_key).hexdigest()


def simulated(name: str) -> IdentityKey:
    """The key of a simulated node."""
    secret = hashlib.sha256(b"trellis/simulated identity/" + name.encode()).digest()
    return IdentityKey(Ed25519PrivateKey.from_private_bytes(secret))


# ---------------------------------------------------------------- files


def generate(path: Path) -> IdentityKey:
    """A new key, written to `path` (0600).  Raises ConfigError where a file is there already: a key is not replaced."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write an identity key to {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return IdentityKey(key)


def load(path: Path) -> IdentityKey:
    """The key in a file.  Raises ConfigError where it cannot be read, or others can read it."""
    try:
        mode = path.stat().st_mode
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read an identity key from {path}: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a {type(key).__name__}, an Ed25519 key is needed: trellis identity new")
    return IdentityKey(key)


def load_members(path: Path) -> tuple[Member, ...]:
    """The members a site has pinned: YAML, a list under `members` of name, organisation, public_key, group, role.

    Raises ConfigError where the file cannot be read, or a name or a key stands in it twice.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
        members = tuple(_member(entry) for entry in found["members"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot read pinned members from {path}: {error}") from error
    for what, values in (("name", [m.name for m in members]), ("public key", [m.public_key.hex() for m in members])):
        if twice := _twice(values):
            raise ConfigError(f"{path}: the {what} {twice} stands there twice: every member has its own")
    return members


def _member(entry: Mapping[str, Any]) -> Member:
    if not isinstance(entry, dict) or not {"name", "organisation", "public_key"} <= set(entry):
        raise ValueError(f"a member needs name, organisation and public_key, found {entry!r}")
    unknown = sorted(set(map(str, entry)) - {"name", "organisation", "public_key", "group", "role"})
    if unknown:
        raise ValueError(f"{entry['name']!r} has {unknown}, which nobody knows")
    odd = [key for key, value in entry.items() if not isinstance(value, str)]
    if odd:  # YAML reads `no` as false, and digits as a number
        raise ValueError(f"{odd} of {entry['name']!r} are no texts: put them in quotes")
    public_key = bytes.fromhex(entry["public_key"])
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"the public key of {entry['name']} has {len(public_key)} bytes, not {KEY_BYTES}")
    group, role = entry.get("group", ""), entry.get("role", "train")
    return Member(entry["name"], entry["organisation"], public_key, group, role)


def _twice(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
