"""An exchange owns all messages of a round: `collect(request, cohort, ask) -> Collected`.

`PlainExchange` sends one message a node and sees every update.  Past the exchange nobody asks how rows were collected.
`ask` is the one door to Flower's Grid: it polls, drops duplicates, and ends at the deadline.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from strategies import checks
from trellis import wire
from trellis.errors import TrellisError, WireError
from trellis.types import POLICY_CODES, Collected, NodeInfo, Refusal, Request, Row, Update
from trellis.vectors import Arrays, Layout, TensorSpec, Vector

MAX_EVIDENCE = 300
"""Characters of a refusal's evidence that are kept."""

REASONS = {int(ErrorCode.NODE_UNAVAILABLE): "unavailable"} | {code: why for why, code in POLICY_CODES.items()}


class Clock(Protocol):
    """Time as the run sees it: the machine's in deployment, virtual in simulation."""

    def now(self) -> float: ...

    def sleep(self, seconds: float, *, until: float = math.inf) -> None:
        """Let `seconds` pass, but not beyond `until`; virtual time jumps to what happens next instead."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, *, until: float = math.inf) -> None:
        time.sleep(max(min(seconds, until - self.now()), 0.0))


class StoppedClock:
    """Simulation on Ray: no deadline ever passes, so a busy machine changes no result."""

    def now(self) -> float:
        return 0.0

    def sleep(self, seconds: float, *, until: float = math.inf) -> None:
        time.sleep(seconds)


Ask = Callable[[Sequence[Message], float], Iterator[Message]]
"""(messages, timeout in seconds) -> replies as they arrive, at most one a message, none after the deadline."""


def door(grid: Grid, clock: Clock, *, poll_s: float = 0.05) -> Ask:
    """`ask` over a Grid.  Messages get their ids here; a reply whose message was answered already is dropped."""

    def ask(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        deadline = clock.now() + timeout_s
        outstanding = dict.fromkeys(grid.push_messages(messages))
        while outstanding and clock.now() < deadline:
            arrived = list(grid.pull_messages(outstanding.keys()))
            for reply in arrived:
                if reply.metadata.reply_to_message_id in outstanding:
                    del outstanding[reply.metadata.reply_to_message_id]
                    yield reply
            if not arrived:
                clock.sleep(poll_s, until=deadline)

    return ask


class Exchange(Protocol):
    """All messages of a round."""

    def collect(self, request: Request, cohort: Sequence[NodeInfo], ask: Ask, *, base: Arrays) -> Collected: ...


@dataclass(frozen=True, slots=True)
class PlainExchange:
    """One message a node, in clear.

    `native` nodes run our ClientApp: they receive the request and reply a delta, `counts` and `metrics`.  Anyone else's
    app receives `arrays` and `config` by Flower's convention and replies params.
    """

    native: bool = True
    timeout_s: float = 3600.0
    max_update_norm: float = 1000.0
    max_examples: int = 100_000_000
    """Cap on the examples declared by nodes that registered no number."""
    counts: Mapping[str, TensorSpec] | None = None
    metrics: frozenset[str] | None = None
    counts_problem: checks.CountsProblem | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    clock: Clock | None = None
    """Times the replies; None: nobody asks how long a node took."""
    max_matrix_bytes: int = 8 << 30
    """A larger matrix lies in a file, mapped into memory."""
    scratch: Path | None = None
    """The folder of that file, which has no name there; None: the system's folder for temporary files."""
    _matrix: _Matrix = field(default_factory=lambda: _Matrix(), repr=False, compare=False)

    def collect(self, request: Request, cohort: Sequence[NodeInfo], ask: Ask, *, base: Arrays) -> Collected:
        """Ask the cohort, check every reply, lay the good updates out as rows sorted by name."""
        cohort = sorted(cohort, key=lambda node: node.name)
        started = time.perf_counter()
        messages = self.messages(request, cohort, wire.to_record(base))
        replies = ask(messages, self.timeout_s)
        collected = self.read(request, cohort, replies, base=base)
        each = wire.size_bytes(messages[0].content) if messages else 0
        away = {refusal.node for refusal in collected.refusals if refusal.reason == "unavailable"}
        sent = {node.name: 0 if node.name in away else each for node in cohort}
        return replace(
            collected,
            bytes_down=sum(sent.values()),
            node_bytes={name: (down, collected.node_bytes.get(name, (0, 0))[1]) for name, down in sent.items()},
            seconds={"exchange": time.perf_counter() - started},
        )

    def messages(self, request: Request, cohort: Sequence[NodeInfo], arrays: ArrayRecord) -> list[Message]:
        """One message a node, all with the same content."""
        if self.native:
            content = wire.request_content(arrays, request)
        else:
            config = ConfigRecord({**self.config, wire.ROUND: request.round})
            content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: config})
        kind = MessageType.TRAIN if request.purpose == "train" else MessageType.EVALUATE
        return [Message(content=content, message_type=kind, dst_node_id=node.node_id) for node in cohort]

    def expected(self, request: Request, base: Arrays) -> checks.Expected:
        """What a reply to `request` must look like."""
        return checks.Expected(
            layout=Layout.of(base),
            base=base,
            trains=request.purpose == "train",
            request=request.digest if self.native else None,
            counts=self.counts if self.native else None,
            splits=request.splits,
            metrics=self.metrics if self.native else None,
            counts_problem=self.counts_problem if self.native else None,
        )

    def read(
        self, request: Request, cohort: Sequence[NodeInfo], replies: Iterable[Message], *, base: Arrays
    ) -> Collected:
        """Replies, in any order, -> rows, updates and refusals.  `cohort` is sorted by name."""
        expected = self.expected(request, base)
        shape = (len(cohort) if expected.trains else 0, expected.layout.dim)
        rows_nd = self._matrix.take(shape, max_bytes=self.max_matrix_bytes, folder=self.scratch)
        ledger = _Ledger(cohort, expected, self._checks(cohort), rows_nd, self.clock)
        for reply in replies:
            ledger.enter(reply)
        return ledger.collected()

    def _checks(self, cohort: Sequence[NodeInfo]) -> tuple[checks.Check, ...]:
        nodes = {node.name: node for node in cohort}
        return (
            checks.finite,
            checks.norm_within(self.max_update_norm),
            checks.examples_within(nodes, default=self.max_examples),
        )


class _Matrix:
    """The (n, d) matrix of the last round, handed out again where nobody holds a row of it any more.

    Fresh memory costs a page fault every 4 kB: at d = 1e5 that is more than reading a reply.
    """

    def __init__(self) -> None:
        # One-dimensional: every view of a matrix, a row too, refers to the array it was made from, not to the matrix.
        self._kept: list[npt.NDArray[np.float32]] = []

    def take(
        self, shape: tuple[int, int], *, max_bytes: float = math.inf, folder: Path | None = None
    ) -> npt.NDArray[np.float32]:
        """Rows to write into, (n, d) float32.  Beyond `max_bytes` they lie in a file in `folder`.

        Raises TrellisError when that file has no room there.
        """
        size = shape[0] * shape[1]
        if shape[0] == 0:  # an evaluation has no rows, and takes nothing from the next round
            return np.empty(shape, np.float32)
        # 2: the list and the argument of getrefcount; every view, a row, would be one more
        if self._kept and self._kept[0].size == size and sys.getrefcount(self._kept[0]) == 2:
            return self._kept[0].reshape(shape)
        self._kept.clear()  # before the new one is there: never two matrices at once
        self._kept.append(np.empty(size, np.float32) if 4 * size <= max_bytes else _mapped(size, folder))
        return self._kept[0].reshape(shape)


def _mapped(size: int, folder: Path | None) -> npt.NDArray[np.float32]:
    """(size,) float32 in a file without a name: the disk has it back when nobody holds the array any more."""
    size_bytes = 4 * size
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size_bytes)
            if sys.platform != "darwin":
                # claimed at once: on a disk that fills up later, writing to the map would kill the process
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            return np.frombuffer(mmap.mmap(file.fileno(), size_bytes), np.float32)
    except OSError as error:
        raise TrellisError(
            f"a round's updates need {size_bytes} bytes in {folder or tempfile.gettempdir()}, which has no room for "
            f"them ({error.strerror or error}): free the disk, raise checks.max_matrix_mb, or ask fewer nodes a round"
        ) from error


class _Ledger:
    """The open books of one exchange: who replied, and the matrix their vectors go into as they arrive."""

    def __init__(
        self,
        cohort: Sequence[NodeInfo],
        expected: checks.Expected,
        update_checks: tuple[checks.Check, ...],
        rows_nd: npt.NDArray[np.float32],
        clock: Clock | None = None,
    ) -> None:
        self._now = clock.now if clock is not None and not isinstance(clock, StoppedClock) else None
        self._asked_at = self._now() if self._now else 0.0
        self._node_seconds: dict[str, float] = {}
        self._node_bytes: dict[str, tuple[int, int]] = {}
        self._cohort, self._expected, self._checks = cohort, expected, update_checks
        self._index = {node.node_id: i for i, node in enumerate(cohort)}
        self._rows_nd = rows_nd
        self._updates: dict[int, Update] = {}
        self._refusals: dict[int, Refusal] = {}
        self._strays: list[Refusal] = []
        self._bytes_up = 0

    def enter(self, reply: Message) -> None:
        """One reply: an update or a refusal of its sender, never an exception."""
        i = self._index.get(reply.metadata.src_node_id)
        if i is None:
            evidence = "a reply from a node that was not asked"
            self._strays.append(Refusal(f"id {reply.metadata.src_node_id}", "unknown_node", evidence))
        elif i in self._updates or i in self._refusals:
            evidence = "a second reply to one message; the first counts"
            self._strays.append(Refusal(self._cohort[i].name, "duplicate", evidence))
        else:
            name = self._cohort[i].name
            size = wire.size_bytes(reply.content) if reply.has_content() else 0
            self._bytes_up += size
            self._node_bytes[name] = (0, size)
            if self._now:
                self._node_seconds[name] = self._now() - self._asked_at
            out = self._rows_nd[i] if self._expected.trains else None
            result = _read_reply(name, reply, self._expected, self._checks, out)
            if isinstance(result, Refusal):
                self._refusals[i] = result
            else:
                # The vector lives in its row only.
                self._updates[i] = replace(result, update_d=None, seconds=self._node_seconds.get(name, 0.0))

    def collected(self) -> Collected:
        """Close the books: who did not reply is late; good rows move together."""
        for i, node in enumerate(self._cohort):
            if i not in self._updates and i not in self._refusals:
                self._refusals[i] = Refusal(node.name, "late", "no reply before the deadline")
        good = sorted(self._updates)
        updates_nd = _compact(self._rows_nd, good) if self._expected.trains else self._rows_nd
        rows = [
            Row((self._cohort[i].name,), update_d, weight=_weight(self._cohort[i]))
            for i, update_d in zip(good, updates_nd, strict=False)
        ]
        return Collected(
            updates_nd=updates_nd,
            rows=tuple(rows),
            updates=tuple(self._updates[i] for i in good),
            refusals=(*(self._refusals[i] for i in sorted(self._refusals)), *self._strays),
            bytes_up=self._bytes_up,
            bytes_down=0,
            seconds={},
            node_bytes=self._node_bytes,
            node_seconds=self._node_seconds,
        )


def _weight(node: NodeInfo) -> float:
    """The training rows the node registered; a node that registered none weighs nothing."""
    return float(node.num_examples or 0)


def _read_reply(
    node: str,
    reply: Message,
    expected: checks.Expected,
    update_checks: tuple[checks.Check, ...],
    out: Vector | None,
) -> Update | Refusal:
    if reply.has_error():
        return refused_by_error(node, reply)
    try:
        update = checks.read_update(node, reply.content, expected, out=out)
    except WireError as error:
        return refused(node, error.code, error.evidence)
    except Exception as error:  # a stranger's reply must never end the round, whatever it breaks
        return refused(node, "undecodable", f"{type(error).__name__}: {error}")
    return next((r for r in (check(update) for check in update_checks) if r is not None), update)


def refused_by_error(node: str, reply: Message) -> Refusal:
    """A node's error reply: its own refusal, or its failure."""
    return refused(node, REASONS.get(reply.error.code, "error_reply"), str(reply.error.reason))


def refused(node: str, reason: str, evidence: str) -> Refusal:
    """A refusal whose evidence, a stranger's text, is short and printable."""
    printable = "".join(c if c.isprintable() else " " for c in evidence[:MAX_EVIDENCE])
    return Refusal(node, reason, printable)


def _compact(rows_nd: npt.NDArray[np.float32], good: list[int]) -> npt.NDArray[np.float32]:
    """The good rows, moved to the front in place: no second matrix."""
    for k, i in enumerate(good):
        if k != i:
            rows_nd[k] = rows_nd[i]
    return rows_nd[: len(good)]
