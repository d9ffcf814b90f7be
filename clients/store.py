"""A node's durable state, all of it: one folder.

    reply.bin            the last reply and the digest of the request it answers
    update.bin           under secure aggregation the last unmasked reply, and what it is about
    secagg.jsonl         which keys it used, and which sums it helped to unmask
    local/000003.bin     what stays at the node (local layers), committed for a base
    momentum/000003.bin  the node's momentum, likewise

Versions are keyed by base: a request reads what was committed *before* its base, so a round asked twice starts from the
same state, and a round whose update the server discarded is forgotten when its base comes again.  Files are written
whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from clients.identity import Identity
from trellis import wire
from trellis.durable import sync_folder
from trellis.vectors import Arrays

KEEP = 3
"""Committed versions kept; a server is never more than one round behind its nodes."""


@dataclass(frozen=True, slots=True)
class NodeStore:
    """`durable` forces every write to disk; a simulation needs to survive its process only, not its machine."""

    path: Path
    durable: bool = True

    # ------------------------------------------------------------ replies

    def reply(self, request: str, *, slot: str = "reply") -> RecordDict | None:
        """The bytes sent in answer to this request digest, if that was the last one answered."""
        try:
            data = (self.path / f"{slot}.bin").read_bytes()
        except FileNotFoundError:
            return None
        return wire.unpack(data[64:]) if data[:64].decode() == request else None

    def keep_reply(self, request: str, content: RecordDict, *, slot: str = "reply") -> None:
        self._write(self.path / f"{slot}.bin", request.encode() + wire.pack(content))

    # ------------------------------------------------------------ facts

    def facts(self) -> list[dict[str, Any]]:
        """What was written down with `add`, oldest first.  A last line that a crash cut off never counted."""
        try:
            lines = (self.path / "secagg.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1] if line]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Facts are looked at and added to by one process at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "secagg.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def add(self, fact: dict[str, Any]) -> None:
        """Write a fact down: it cannot be lost any more when this returns."""
        new = not (self.path / "secagg.jsonl").exists()
        with open(self.path / "secagg.jsonl", "a+b") as file:
            file.seek(0)
            kept = file.read()
            if kept and not kept.endswith(b"\n"):
                file.truncate(kept.rfind(b"\n") + 1)  # what a crash cut off never counted
            file.write(json.dumps(fact).encode() + b"\n")
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        if self.durable and new:
            sync_folder(self.path)

    # ------------------------------------------------------------ local state

    def local(
        self, base: str, *, slot: str = "local", run: str | None = None
    ) -> dict[str, npt.NDArray[np.generic]] | None:
        """What this node had when `base` was first sent to it; None before anything was committed.

        A slot is a folder of versions.  What was committed in another run does not count; without a run, what was
        committed in none is found.
        """
        known = self._versions(slot, run)
        again = next((i for i, (_, committed_for) in enumerate(known) if committed_for == base), len(known))
        return _read_arrays(known[again - 1][0]) if again else None

    def commit(self, base: str, arrays: Arrays, *, slot: str = "local", run: str | None = None) -> None:
        """What this node has after training on `base`.

        Versions committed for the same base, after it, or in another run, are replaced.
        """
        known = self._versions(slot, run)
        again = next((i for i, (_, committed_for) in enumerate(known) if committed_for == base), len(known))
        sequence = int(known[again][0].stem) if again < len(known) else self._next(slot)
        written = self.path / slot / f"{sequence:06d}.bin"
        self._write(written, _packed(base, run, arrays))
        kept = {written, *(path for path, _ in known[max(0, again + 1 - KEEP) : again])}
        for path in self._files(slot):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _versions(self, slot: str, run: str | None) -> list[tuple[Path, str]]:
        """Files of a run and the base of each, oldest first."""
        heads = [(path, _read_head(path)) for path in self._files(slot)]
        return [(path, head["base"]) for path, head in heads if head.get("run") == run]

    def _files(self, slot: str) -> list[Path]:
        return sorted((self.path / slot).glob("[0-9]*.bin"))

    def _next(self, slot: str) -> int:
        files = self._files(slot)
        return int(files[-1].stem) + 1 if files else 1

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            if self.durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)


def store_of(node: Identity) -> NodeStore | None:
    """The node's store, or None where nothing is kept."""
    return NodeStore(node.store, durable=not node.simulated) if node.store is not None else None


def _packed(base: str, run: str | None, arrays: Arrays) -> bytes:
    header = json.dumps({"base": base} | ({"run": run} if run is not None else {})).encode()
    return struct.pack("<I", len(header)) + header + wire.pack(RecordDict({wire.ARRAYS: wire.to_record(arrays)}))


def _read_head(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<I", file.read(4))
        head: dict[str, str] = json.loads(file.read(size))
    return head


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    data = path.read_bytes()
    (size,) = struct.unpack("<I", data[:4])
    return wire.from_record(wire.unpack(data[4 + size :]).array_records[wire.ARRAYS])
