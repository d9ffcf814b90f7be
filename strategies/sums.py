"""Sums that are paid for: what a group gave for a base is kept until the base is left behind.

Members answer for a base once.  So before the first share of a sum is asked for, the masked sum and its survivors are
on disk, and after a crash the same question is asked again; and a sum that is known is used when its base is asked
again, by a round that closed without a step or after a crash before the commit.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trellis import durable, wire
from trellis.errors import ResumeError
from trellis.identity import Member
from trellis.secagg import tally
from trellis.secagg.tally import Tally
from trellis.types import Masking

DIGEST_BYTES = 32

Words = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class KnownSum:
    """The unmasked sum of one group, as whole numbers, with what is needed to read it."""

    group: str
    names: tuple[str, ...]
    """All members of the group."""
    survivors: tuple[str, ...]
    round: int
    """The round that asked for it first."""
    drawn: bool
    masking: Masking
    update: Words
    counts: Words


@dataclass(frozen=True, slots=True)
class Limits:
    """What is the same in all rounds of a run: the most rows that a node of the first cohort registered."""

    examples: int
    """To train on."""
    rows: int
    """Of all."""


@dataclass(slots=True)
class Pending:
    """A masked sum whose survivors are settled: its shares may have been asked for."""

    group: str
    names: tuple[str, ...]
    round: int
    drawn: bool
    masking: Masking
    tally: Tally

    def known(self, update: Words, counts: Words) -> KnownSum:
        """The sum it came to."""
        survivors = tuple(self.tally.survivors)
        return KnownSum(self.group, self.names, survivors, self.round, self.drawn, self.masking, update, counts)


@dataclass(slots=True)
class Sums:
    """Known and pending sums by what they are about; in a folder, or in memory only."""

    folder: Path | None = None
    _known: dict[str, list[KnownSum]] = field(default_factory=dict)
    _late: dict[str, list[Pending]] = field(default_factory=dict)

    def limits(self, purpose: str, found: Limits) -> Limits:
        """Those the run began with, or these, which it begins with now.  Statistics come before a run's limits."""
        if self.folder is None or purpose == "statistics":
            return found
        data = self._read("limits.json")
        if data is not None:
            try:
                return Limits(**json.loads(data))
            except (ValueError, TypeError) as error:
                raise ResumeError(f"{self.folder}/limits.json is damaged: {error}") from error
        durable.write_atomically(self.folder / "limits.json", json.dumps(asdict(found)).encode())
        return found

    def known(self, about: str) -> list[KnownSum]:
        """Sums of this purpose and base.  Raises ResumeError when their file is damaged."""
        if about not in self._known:
            data = self._read(f"{about}.sums")
            self._known[about] = _read_known(data) if data is not None else []
        return self._known[about]

    def keep(self, about: str, sums: Sequence[KnownSum], *, late: Sequence[Pending] = ()) -> None:
        """These are the sums of this purpose and base now, and those whose shares are late.

        What is about another base is forgotten.
        """
        base = about.rpartition("-")[2]
        self._known = {k: v for k, v in self._known.items() if k.endswith(base)} | {about: list(sums)}
        self._late = {k: v for k, v in self._late.items() if k.endswith(base)} | {about: list(late)}
        if self.folder is not None:
            durable.write_atomically(self.folder / f"{about}.sums", _packed([_known_head(s) for s in sums], sums))
            for path in self.folder.glob("*"):
                if path.suffix in (".sums", ".pending") and not path.stem.endswith(base):
                    path.unlink(missing_ok=True)
            (self.folder / f"{about}.pending").unlink(missing_ok=True)
            self.expect(about, late)

    def expect(self, about: str, pending: Sequence[Pending]) -> None:
        """Write down what is about to be unmasked."""
        if self.folder is not None and pending:
            durable.write_atomically(self.folder / f"{about}.pending", _packed_pending(pending))

    def pending(self, about: str, pins: Mapping[str, Member]) -> list[Pending]:
        """What was about to be unmasked when a process died, or lacked shares.  Raises ResumeError when its file is
        damaged."""
        if about in self._late:
            return self._late[about]
        data = self._read(f"{about}.pending")
        if data is None:
            return []
        try:
            return _read_pending(data, pins)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ResumeError(f"{self.folder}/{about}.pending is damaged: {error}") from error

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes() if self.folder is not None else None
        except FileNotFoundError:
            return None


# ---------------------------------------------------------------- files


def _framed(head: Any, blobs: Sequence[bytes]) -> bytes:
    encoded = json.dumps({"head": head, "sizes": [len(blob) for blob in blobs]}).encode()
    body = struct.pack("<Q", len(encoded)) + encoded + b"".join(blobs)
    return hashlib.sha256(body).digest() + body


def _unframed(data: bytes) -> tuple[Any, list[bytes]]:
    told, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != told:
        raise ValueError("its digest is another")
    (size,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + size])
    at, blobs = 8 + size, []
    for length in found["sizes"]:
        blobs.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError(f"{len(data)} bytes, {at} expected")
    return found["head"], blobs


def _known_head(known: KnownSum) -> dict[str, Any]:
    return {
        "group": known.group,
        "names": list(known.names),
        "survivors": list(known.survivors),
        "round": known.round,
        "drawn": known.drawn,
        "masking": asdict(known.masking),
    }


def _packed(heads: Sequence[dict[str, Any]], sums: Sequence[KnownSum]) -> bytes:
    return _framed(heads, [words.tobytes() for known in sums for words in (known.update, known.counts)])


def _read_known(data: bytes) -> list[KnownSum]:
    try:
        heads, blobs = _unframed(data)
        found = []
        for head, update, counts in zip(heads, blobs[::2], blobs[1::2], strict=True):
            masking = wire.masking_from(head.pop("masking"))
            names, survivors = tuple(head.pop("names")), tuple(head.pop("survivors"))
            words = np.frombuffer(update, masking.dtype), np.frombuffer(counts, np.uint64)
            found.append(
                KnownSum(**head, names=names, survivors=survivors, masking=masking, update=words[0], counts=words[1])
            )
        return found
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ResumeError(f"a file of sums is damaged: {error}") from error


def _packed_pending(pending: Sequence[Pending]) -> bytes:
    heads = [
        {
            "group": p.group,
            "names": list(p.names),
            "round": p.round,
            "drawn": p.drawn,
            "masking": asdict(p.masking),
        }
        for p in pending
    ]
    return _framed(heads, [tally.dumps(p.tally) for p in pending])


def _read_pending(data: bytes, pins: Mapping[str, Member]) -> list[Pending]:
    heads, blobs = _unframed(data)
    return [
        Pending(
            group=head["group"],
            names=tuple(head["names"]),
            round=head["round"],
            drawn=head["drawn"],
            masking=wire.masking_from(head["masking"]),
            tally=tally.loads(blob, pins),
        )
        for head, blob in zip(heads, blobs, strict=True)
    ]
