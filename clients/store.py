"""A node's durable state, all of it: one folder.

    reply.bin            the last reply and the digest of the request it answers
    local/000003.bin     what stays at the node (local layers), committed for a base

Versions are keyed by base: a request reads what was committed *before* its base, so a round asked twice starts from the
same state, and a round whose update the server discarded is forgotten when its base comes again.  Files are written
whole or not at all.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from clients.identity import Identity
from trellis import wire
from trellis.vectors import Arrays

KEEP = 3
"""Committed versions kept; a server is never more than one round behind its nodes."""


@dataclass(frozen=True, slots=True)
class NodeStore:
    """`durable` forces every write to disk; a simulation needs to survive its process only, not its machine."""

    path: Path
    durable: bool = True

    # ------------------------------------------------------------ replies

    def reply(self, request: str) -> RecordDict | None:
        """The bytes sent in answer to this request digest, if that was the last one answered."""
        try:
            data = (self.path / "reply.bin").read_bytes()
        except FileNotFoundError:
            return None
        return wire.unpack(data[64:]) if data[:64].decode() == request else None

    def keep_reply(self, request: str, content: RecordDict) -> None:
        self._write(self.path / "reply.bin", request.encode() + wire.pack(content))

    # ------------------------------------------------------------ local state

    def local(self, base: str) -> dict[str, npt.NDArray[np.generic]] | None:
        """What this node had when `base` was first sent to it; None before anything was committed."""
        known = self._versions()
        again = next((i for i, (_, committed_for) in enumerate(known) if committed_for == base), len(known))
        return _read(known[again - 1][0])[1] if again else None

    def commit(self, base: str, arrays: Arrays) -> None:
        """What this node has after training on `base`.

        Versions committed for the same base, or after it, are replaced.
        """
        known = self._versions()
        again = next((i for i, (_, committed_for) in enumerate(known) if committed_for == base), len(known))
        sequence = int(known[again][0].stem) if again < len(known) else self._next(known)
        self._write(self.path / "local" / f"{sequence:06d}.bin", _packed(base, arrays))
        for path, _ in (*known[again + 1 :], *known[: max(0, again + 1 - KEEP)]):
            path.unlink(missing_ok=True)

    def _versions(self) -> list[tuple[Path, str]]:
        return [(path, _read(path)[0]) for path in sorted((self.path / "local").glob("[0-9]*.bin"))]

    def _next(self, known: list[tuple[Path, str]]) -> int:
        return int(known[-1][0].stem) + 1 if known else 1

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


def _packed(base: str, arrays: Arrays) -> bytes:
    header = json.dumps({"base": base}).encode()
    return struct.pack("<I", len(header)) + header + wire.pack(RecordDict({wire.ARRAYS: wire.to_record(arrays)}))


def _read(path: Path) -> tuple[str, dict[str, npt.NDArray[np.generic]]]:
    data = path.read_bytes()
    (size,) = struct.unpack("<I", data[:4])
    header = json.loads(data[4 : 4 + size])
    return header["base"], wire.from_record(wire.unpack(data[4 + size :]).array_records[wire.ARRAYS])
