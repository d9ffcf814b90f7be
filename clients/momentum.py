"""Worker momentum, as a Mod: a node replies its momentum instead of its update.

    m_1 = u_1,    m_t = beta m_{t-1} + (1 - beta) u_t

Over about 1 / (1 - beta) rounds the noise of the honest nodes averages out, so they come to agree, while a small lie
told in every round no longer hides in their spread.
Karimireddy et al., Learning from history for Byzantine robust optimization, ICML 2021.
https://arxiv.org/abs/2012.10333

What a node remembers is keyed by base, as its local layers are: a round asked twice starts from the same momentum, and
a round that the server discarded is forgotten when its base comes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients import identity
from clients.policy import task_of
from clients.store import NodeStore, store_of
from trellis import wire
from trellis.errors import ConfigError, WireError
from trellis.types import Request
from trellis.vectors import Arrays, Layout, Vector, digest

Updates = Mapping[str, Vector]
"""Floating tensors by name, each float32 in its own shape."""

SLOT = "momentum"
STATE, BEFORE, AFTER = "trellis.momentum", "trellis.momentum.before", "trellis.momentum.after"
"""Records of `Context.state`, where a node has no store: the last base, and the momentum before and after it."""


def momentum_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod of our app: beta is what the task says, 0 replies the update itself."""
    return _replied(task_of(message).worker_momentum, message, context, call_next)


def momentum(beta: float) -> Mod:
    """Mod for anyone's ClientApp, by Flower's convention: params come in, params plus momentum go out."""
    if not 0.0 <= beta < 1.0:
        raise ConfigError(f"momentum({beta}): beta must be at least 0 and below 1")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return _replied(beta, message, context, call_next)

    return mod


def step(update: Vector, *, before: Vector | None, beta: float) -> Vector:
    """m_t of one tensor from u_t and m_{t-1} (None in the first round), in float64 and rounded once to float32."""
    if before is None or before.shape != update.shape:
        return update
    return (beta * before.astype(np.float64) + (1.0 - beta) * update.astype(np.float64)).astype(np.float32)


def _replied(beta: float, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The reply, with m in the place of u.  Evaluations, errors and what the server will refuse pass as they are."""
    reply = call_next(message, context)
    trains = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
    if beta == 0.0 or not trains or not reply.has_content():
        return reply
    request = wire.read_request(message)
    received, sent = _arrays(message.content), _arrays(reply.content)
    # our app replies a delta to a request, anyone else's its params
    delta = request is not None and wire.REPLY in reply.content.config_records
    updates = _deltas(received, sent) if delta else _moves(received, sent)
    # a NaN, remembered, would spoil all rounds that follow
    if not updates or not all(np.isfinite(u).all() for u in updates.values()):
        return reply
    base = request.base if request is not None else digest(received)
    momenta = _remembered(beta, updates, _memory(request, context), base)
    moved = momenta if delta else {name: _plus(received[name], m) for name, m in momenta.items()}
    arrays = {name: moved[name].astype(a.dtype) if name in moved else a for name, a in sent.items()}
    reply.content[_record_name(reply.content)] = wire.to_record(arrays)
    return reply


def _remembered(beta: float, updates: Updates, memory: _Memory, base: str) -> Updates:
    before = memory.recall(base)
    momenta = {name: step(u, before=before.get(name), beta=beta) for name, u in updates.items()}
    memory.commit(base, momenta)
    return momenta


# ---------------------------------------------------------------- replies


def _record_name(content: RecordDict) -> str:
    """The record that holds params or a delta: `arrays`, else the only one; "" where there is none."""
    names = list(content.array_records)
    if wire.ARRAYS in names:
        return wire.ARRAYS
    return names[0] if len(names) == 1 else ""


def _arrays(content: RecordDict) -> dict[str, npt.NDArray[np.generic]]:
    """The params or the delta of a content; empty where they cannot be read."""
    record = content.array_records.get(_record_name(content))
    try:
        return wire.from_record(record) if record is not None else {}
    except WireError:
        return {}


def _deltas(received: Arrays, sent: Arrays) -> Updates:
    """The tensors of a delta, float32; none where it is not the delta of these params: the server will refuse it."""
    if set(Layout.of(sent).tensors) != set(Layout.of(received).floating):
        return {}
    return {name: a.astype(np.float32) for name, a in sent.items()}


def _moves(received: Arrays, sent: Arrays) -> Updates:
    """sent - received of the tensors that are floating in both, rounded once to float32.

    Not by one layout: Flower's FedAvg returns integer buffers as floats, and a model makes them integers again.
    """
    known = {t.name: t.shape for t in Layout.of(received).floating}
    common = [t.name for t in Layout.of(sent).floating if known.get(t.name) == t.shape]
    return {name: np.subtract(sent[name], received[name], dtype=np.float64).astype(np.float32) for name in common}


def _plus(received: npt.NDArray[np.generic], momentum: Vector) -> npt.NDArray[np.float64]:
    return received.astype(np.float64) + momentum.astype(np.float64)


# ---------------------------------------------------------------- memory


class _Memory(Protocol):
    """The momentum a node had when a base was first sent to it, and what it has after."""

    def recall(self, base: str) -> Updates: ...

    def commit(self, base: str, momenta: Updates) -> None: ...


def _memory(request: Request | None, context: Context) -> _Memory:
    """The node's store, where a request comes to a node that has one; else the Context of the run."""
    store = store_of(identity.of(context)) if request is not None else None
    return _Stored(store, request.run) if store is not None and request is not None else _Cached(context.state)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Momentum of another run, whose model need not be like this one's, is not recalled."""

    store: NodeStore
    run: str

    def recall(self, base: str) -> Updates:
        return cast(Updates, self.store.local(base, slot=SLOT, run=self.run) or {})

    def commit(self, base: str, momenta: Updates) -> None:
        self.store.commit(base, momenta, slot=SLOT, run=self.run)


@dataclass(frozen=True, slots=True)
class _Cached:
    state: RecordDict

    def recall(self, base: str) -> Updates:
        kept = self.state.array_records.get(BEFORE if self._last_base() == base else AFTER)
        return cast(Updates, wire.from_record(kept)) if kept is not None else {}

    def commit(self, base: str, momenta: Updates) -> None:
        if self._last_base() != base and AFTER in self.state:
            self.state[BEFORE] = self.state[AFTER]
        self.state[AFTER] = wire.to_record(momenta)
        self.state[STATE] = ConfigRecord({"base": base})

    def _last_base(self) -> str | None:
        kept = self.state.config_records.get(STATE)
        return str(kept["base"]) if kept is not None else None
