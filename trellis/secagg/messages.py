"""What travels between server and member, besides requests and masked vectors.

Flat records of texts, numbers and bytes, so that any transport can carry them: `fields_of` and `from_fields` are the
two directions.  What is signed is a `transcript.Signed`, as two entries: payload and signature.

    hello        a member's name, signed: only where a server does not know its nodes
    draw         commitments, then reveals: only where groups are drawn
    keys         the group, and what each member publishes for the epoch
    shares       everybody's keys; what each member deals to the others
    confirm      what others dealt to a member; its signature over the set, or complaints
    survivors    (malicious_server) whose vectors are in the sum; its signature over that
    unmask       the same set, signed by enough; the member's shares
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

from trellis.errors import SecAggError
from trellis.secagg import transcript
from trellis.secagg.transcript import Signed

Value = str | int | bytes | list[str] | list[bytes]
Fields = dict[str, Value]

STAGE = "stage"
M = TypeVar("M", bound="Stage")


@dataclass(frozen=True, slots=True)
class Stage:
    """A message of one stage of the protocol."""

    stage: ClassVar[str] = ""

    @property
    def digest(self) -> bytes:
        """Of everything in it: the same question gets the same answer."""
        return transcript.digest("message", *(_part(v) for v in fields_of(self).values()))


@dataclass(frozen=True, slots=True)
class AskName(Stage):
    """Who are you?"""

    stage: ClassVar[str] = "hello"
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Named(Stage):
    stage: ClassVar[str] = "hello"
    name: str
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AskDraw(Stage):
    """Commit yourself to a number: groups will be drawn among `names`."""

    stage: ClassVar[str] = "draw"
    run: str
    epoch: str
    names: tuple[str, ...]
    group_size: int


@dataclass(frozen=True, slots=True)
class Committed(Stage):
    stage: ClassVar[str] = "draw"
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AskReveal(Stage):
    """Here is everybody's commitment: reveal yours."""

    stage: ClassVar[str] = "reveal"
    epoch: str
    names: tuple[str, ...]
    payloads: tuple[bytes, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Revealed(Stage):
    stage: ClassVar[str] = "reveal"
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AskKeys(Stage):
    """An epoch begins: these are the members, this is what holds for them."""

    stage: ClassVar[str] = "keys"
    run: str
    epoch: str
    group: str
    names: tuple[str, ...]
    """All members of the group, sorted."""
    organisations: tuple[str, ...]
    fingerprints: tuple[str, ...]
    threat: str
    quorum: int
    """Members that must survive for a sum."""
    threshold: int
    """Shares that give a secret back.  The quorum, where everybody shares with everybody."""
    num_neighbours: int
    """With how many others each member shares; 0: with all."""
    num_keys: int
    draw: tuple[bytes, ...] = ()
    """Of drawn groups: each member's commitment, its signature, its reveal and that signature, in the order of
    `drawn_names`."""
    drawn_names: tuple[str, ...] = ()

    @property
    def roster(self) -> bytes:
        """Digest of all that holds for the epoch: it is in every key, share and signature of it."""
        return self.digest


@dataclass(frozen=True, slots=True)
class Keys(Stage):
    """A member's public keys: one to encrypt to it for each peer, one a key index for masks; hashes of self-mask
    seeds."""

    stage: ClassVar[str] = "keys"
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AskShares(Stage):
    """Here are the keys of those who replied: deal your secrets to them."""

    stage: ClassVar[str] = "shares"
    epoch: str
    names: tuple[str, ...]
    """All whose keys are good."""
    digests: tuple[bytes, ...]
    """Of their statements."""
    peers: tuple[str, ...]
    """Those of them that share with this member, and itself; theirs are the statements that follow."""
    payloads: tuple[bytes, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Shares(Stage):
    """A member's shares, encrypted to each peer; hashes of all of them."""

    stage: ClassVar[str] = "shares"
    payload: bytes
    signature: bytes
    holders: tuple[str, ...]
    ciphertexts: tuple[bytes, ...]
    hashes: tuple[bytes, ...]
    """For each holder the hashes of its shares."""


@dataclass(frozen=True, slots=True)
class AskConfirm(Stage):
    """Here is what was dealt to you, and the set of all whose keys and shares are good."""

    stage: ClassVar[str] = "confirm"
    epoch: str
    names: tuple[str, ...]
    """The set: all whose shares are good."""
    digests: tuple[bytes, ...]
    """Of each one's two statements."""
    dealers: tuple[str, ...]
    """Those of the set that dealt to this member; theirs is what follows."""
    payloads: tuple[bytes, ...]
    signatures: tuple[bytes, ...]
    ciphertexts: tuple[bytes, ...]
    hashes: tuple[bytes, ...]
    evidence: tuple[bytes, ...] = ()
    """Why members are missing that were in an earlier set: for each a complaint, in the entries of `Complaint`."""


@dataclass(frozen=True, slots=True)
class Confirmed(Stage):
    """The member's signature over the set, or its complaints, if there are any."""

    stage: ClassVar[str] = "confirm"
    payload: bytes
    signature: bytes
    complaints: tuple[bytes, ...] = ()
    """Signed complaints: payload and signature of each."""


@dataclass(frozen=True, slots=True)
class Confirmation(Stage):
    """Goes with a request: enough members have signed the set whose masks are in the sum."""

    stage: ClassVar[str] = "mask"
    names: tuple[str, ...]
    payloads: tuple[bytes, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AskSurvivors(Stage):
    """These members' vectors are in the sum: sign that."""

    stage: ClassVar[str] = "survivors"
    epoch: str
    key_index: int
    request: str
    survivors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survivors(Stage):
    stage: ClassVar[str] = "survivors"
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AskUnmask(Stage):
    """Give the shares that unmask this sum.  Under malicious_server with the survivors' signatures."""

    stage: ClassVar[str] = "unmask"
    epoch: str
    key_index: int
    request: str
    survivors: tuple[str, ...]
    signers: tuple[str, ...] = ()
    payloads: tuple[bytes, ...] = ()
    signatures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Unmasked(Stage):
    """For each peer one share: of its self-mask seed where it survived, of its mask key where it did not."""

    stage: ClassVar[str] = "unmask"
    dealers: tuple[str, ...]
    shares: tuple[bytes, ...]


ASKED: tuple[type[Stage], ...] = (AskName, AskDraw, AskReveal, AskKeys, AskShares, AskConfirm, AskSurvivors, AskUnmask)
"""What a server asks besides requests, by stage."""

REPLIES: tuple[type[Stage], ...] = (Named, Committed, Revealed, Keys, Shares, Confirmed, Survivors, Unmasked)


def fields_of(message: Stage) -> Fields:
    """A message as a flat record."""
    values: Fields = {STAGE: message.stage}
    for f in fields(message):
        value = getattr(message, f.name)
        values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def from_fields(kind: type[M], values: Mapping[str, Any]) -> M:
    """Inverse of `fields_of`.  Raises SecAggError("wrong_records") where a field is missing or of another type."""
    known = _types(typing.cast(Any, kind))
    if set(values) != {STAGE, *known} or values[STAGE] != kind.stage:
        raise SecAggError("wrong_records", f"not a message of stage {kind.stage}: {sorted(map(str, values))[:8]}")
    return kind(**{name: _read(name, values[name], of) for name, of in known.items()})


def asked(values: Mapping[str, Any]) -> Stage:
    """The question in a flat record.  Raises SecAggError("wrong_records")."""
    for kind in ASKED:
        if values.get(STAGE) == kind.stage:
            return from_fields(kind, values)
    raise SecAggError("wrong_records", f"there is no stage {str(values.get(STAGE))[:40]!r}")


def signed_by(names: tuple[str, ...], payloads: tuple[bytes, ...], signatures: tuple[bytes, ...]) -> dict[str, Signed]:
    """Statements by who made them.  Raises SecAggError("wrong_records") where there are not as many of each."""
    if len(set(names)) != len(names) or not len(names) == len(payloads) == len(signatures):
        found = f"{len(set(names))} names, {len(payloads)} statements, {len(signatures)} signatures"
        raise SecAggError("wrong_records", found)
    return {n: Signed(p, s) for n, p, s in zip(names, payloads, signatures, strict=True)}


def _read(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and all(type(v) is inner for v in value):
            return tuple(value)
    elif type(value) is kind:
        return value
    raise SecAggError("wrong_records", f"{name} is a {type(value).__name__} of other things than it must be")


def _part(value: Value) -> bytes | str | int:
    if not isinstance(value, list):
        return value
    return transcript.framed("list", *value)


@cache
def _types(kind: type[Stage]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}
