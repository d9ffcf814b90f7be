"""The local engine: Flower's Grid, in this process.

`LocalGrid` calls a ClientApp directly, one message after another or in a pool of worker processes, with the semantics
of Flower's own engines: contents cannot be changed behind the server's back, an exception becomes an error reply,
every node has its own Context that lives as long as the run.  Time is virtual: computing takes none, links take what
`delay_s` says, so no deadline ever depends on how busy the machine is.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import copy as shallow
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any
from uuid import uuid4

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo as FlowerNode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from trellis import wire
from trellis.errors import ConfigError

App = ClientApp | str | Callable[[], ClientApp]
"""A ClientApp, "module:attribute", or a function that makes one."""

Delay = Callable[[int, Message, Message], float]
"""(index of the node, message, reply) -> seconds between sending and arrival; infinite: the reply is lost."""

Reachable = Callable[[int, Message], bool]
"""(index of the node, message) -> whether the node gets it."""

SERVER_NODE_ID = 1


def no_delay(index: int, message: Message, reply: Message) -> float:
    """Links that take no time."""
    return 0.0


def always(index: int, message: Message) -> bool:
    """Nodes that are never away."""
    return True


class VirtualClock:
    """Time that passes only when nothing is left to compute: then it jumps to the next arrival."""

    def __init__(self, grid: LocalGrid) -> None:
        self._now = 0.0
        self._grid = grid

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float, *, until: float = math.inf) -> None:
        at = min(self._grid.next_arrival(), until)
        self._now = max(self._now, at) if math.isfinite(at) else self._now + seconds


@dataclass(order=True, slots=True)
class _Arrival:
    at: float
    order: int
    reply: Message = field(compare=False)


class LocalGrid(Grid):
    """A Grid over `num_nodes` simulated nodes of one ClientApp.

    `app` is a ClientApp; for workers > 1 "module:attribute", or a function that can be pickled: each process makes its
    own.  Messages to nodes whose index is in `last` are computed after all others that were sent with them, where there
    is one worker.  Use as a context manager where there are workers.
    """

    def __init__(
        self,
        app: App,
        num_nodes: int,
        *,
        workers: int = 1,
        node_config: Callable[[int], Mapping[str, bool | float | int | str]] | None = None,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        delay_s: Delay = no_delay,
        reachable: Reachable = always,
        last: Set[int] = frozenset(),
    ) -> None:
        if workers > 1 and isinstance(app, ClientApp):
            raise ConfigError("workers > 1 needs the app as 'module:attribute', so that each process can import it")
        self._app = load_app(app)
        run_id = secrets.randbits(62)
        wire.identify(run_id, SERVER_NODE_ID)
        self._run = Run.create_empty(run_id)
        # Random, as Flower's are: whatever depends on them shows at once.
        self._index = {secrets.randbits(62) + 2: i for i in range(num_nodes)}
        extra = node_config or (lambda index: {})
        self._contexts = {
            node_id: Context(
                run_id=run_id,
                node_id=node_id,
                node_config={"partition-id": i, "num-partitions": num_nodes, "simulated": True, **extra(i)},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node_id, i in self._index.items()
        }
        self._delay_s = delay_s
        self._reachable = reachable
        self._last = last
        self._waiting: deque[tuple[float, Message]] = deque()
        self._running: dict[Future[tuple[Message, Context | None]], tuple[float, Message]] = {}
        self._arrivals: list[_Arrival] = []
        self._mailbox: dict[str, Message] = {}
        self._order = 0
        self.clock = VirtualClock(self)
        self._new_pool = partial(_pool, app, workers)
        self._pool = self._new_pool() if workers > 1 else None

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------ Grid

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._index)

    def get_nodes(self) -> Iterable[FlowerNode]:
        return [FlowerNode(node_id=node_id) for node_id in self._index]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids, last = [], []
        for message in messages:
            sent = _own_copy(message)
            ids.append(sent.metadata.message_id)
            index = self._index.get(sent.metadata.dst_node_id)
            if index is not None and not self._reachable(index, sent):
                self._deliver(self.clock.now(), sent, _away(sent))
            elif self._pool is not None:
                self._running[self._submit(self._pool, sent)] = (self.clock.now(), sent)
            elif index in self._last:
                last.append((self.clock.now(), sent))
            else:
                self._waiting.append((self.clock.now(), sent))
        self._waiting.extend(last)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived.  Computes at most one waiting message a call, so replies stream."""
        self._compute()
        while self._arrivals and self._arrivals[0].at <= self.clock.now():
            reply = heapq.heappop(self._arrivals).reply
            self._mailbox[reply.metadata.reply_to_message_id] = reply
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        return [self._mailbox.pop(sent) for sent in list(self._mailbox) if sent in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        deadline = self.clock.now() + (math.inf if timeout is None else timeout)
        outstanding = set(self.push_messages(messages))
        replies: list[Message] = []
        while outstanding and self.clock.now() <= deadline:
            for reply in self.pull_messages(outstanding):
                outstanding.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if outstanding and not self._busy():
                if self.next_arrival() > deadline or math.isinf(self.next_arrival()):
                    break
                self.clock.sleep(0.0)
        if outstanding and math.isfinite(deadline):
            self.clock.sleep(0.0, until=deadline)
        return replies

    # ------------------------------------------------------------ computing

    def next_arrival(self) -> float:
        """When the next reply arrives: now while something is being computed, infinity when nothing is under way."""
        if self._busy():
            return self.clock.now()
        return self._arrivals[0].at if self._arrivals else math.inf

    def _busy(self) -> bool:
        return bool(self._waiting or self._running)

    def _compute(self) -> None:
        if self._waiting:
            sent_at, message = self._waiting.popleft()
            context = self._contexts.get(message.metadata.dst_node_id)
            reply, _ = call(self._app, message, context)
            self._deliver(sent_at, message, reply)
        elif self._running:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                sent_at, message = self._running.pop(future)
                reply, context = self._result(future, message)
                if context is not None:
                    self._contexts[message.metadata.dst_node_id] = context
                self._deliver(sent_at, message, reply)

    def _submit(self, pool: ProcessPoolExecutor, message: Message) -> Future[tuple[Message, Context | None]]:
        context = self._contexts.get(message.metadata.dst_node_id)
        try:
            return pool.submit(_in_worker, message, context)
        except BrokenProcessPool:
            self._pool = self._new_pool()
            return self._pool.submit(_in_worker, message, context)

    def _result(
        self, future: Future[tuple[Message, Context | None]], message: Message
    ) -> tuple[Message, Context | None]:
        try:
            return future.result()
        except BrokenProcessPool:
            # One node's crash takes every message in the pool with it: asked again one by one, only the guilty fails.
            return self._again(message)
        except Exception as error:
            return _crashed(message, error), None

    def _again(self, message: Message) -> tuple[Message, Context | None]:
        assert self._pool is not None
        try:
            return self._submit(self._pool, message).result()
        except Exception as error:
            return _crashed(message, error), None

    def _deliver(self, sent_at: float, message: Message, reply: Message) -> None:
        # Whose reply it is, and to what, is for the network to say, not for the node.
        reply.metadata.__dict__.update(
            _message_id=uuid4().hex,
            _src_node_id=message.metadata.dst_node_id,
            _reply_to_message_id=message.metadata.message_id,
        )
        delay = self._delay_s(self._index.get(message.metadata.dst_node_id, -1), message, reply)
        self._order += 1
        if math.isfinite(delay):
            heapq.heappush(self._arrivals, _Arrival(sent_at + delay, self._order, reply))


def _away(message: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node is away in this round"), reply_to=message)


def call(app: ClientApp | None, message: Message, context: Context | None) -> tuple[Message, Context | None]:
    """One message at one node; whatever goes wrong there is an error reply."""
    if context is None or app is None:
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "there is no such node"), reply_to=message), context
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
        if reply.has_content():
            reply.content = _own_records(reply.content)
        return reply, context
    except (Exception, SystemExit) as error:  # as in Flower's engines: a client's exception is its reply
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message), context


def load_app(app: App) -> ClientApp:
    """A ClientApp, the one at "module:attribute", or the one a function makes.  Raises ConfigError."""
    if isinstance(app, ClientApp):
        return app
    if not isinstance(app, str):
        return app()
    module, _, attribute = app.partition(":")
    try:
        loaded = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"{app} cannot be imported: {error}") from error
    if not isinstance(loaded, ClientApp):
        raise ConfigError(f"{app} is not a ClientApp")
    return loaded


def _own_copy(message: Message) -> Message:
    """The message as the node gets it, with an id: records of its own over the same immutable bytes."""
    metadata = message.metadata
    copy = Message(
        _own_records(message.content),
        metadata.dst_node_id,
        metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )
    copy.metadata.__dict__["_message_id"] = uuid4().hex
    return copy


def _own_records(content: RecordDict) -> RecordDict:
    own = RecordDict()
    for name, record in content.items():
        copy: Any = record.copy()  # not a new record: its values were checked when they came in
        own[name] = copy
        for key, value in record.items():
            if isinstance(value, Array):
                copy[key] = shallow(value)  # an Array of its own over the same immutable bytes
            elif isinstance(value, list):
                copy[key] = list(value)
    return own


# ---------------------------------------------------------------- worker processes

_worker_app: ClientApp | None = None


def _pool(app: App, workers: int) -> ProcessPoolExecutor:
    # spawn: a fork of a process with threads (torch, MLflow's) can deadlock
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(app,))


def _start_worker(app: App) -> None:
    global _worker_app
    _worker_app = load_app(app)


def _in_worker(message: Message, context: Context | None) -> tuple[Message, Context | None]:
    return call(_worker_app, message, context)


def _crashed(message: Message, error: Exception) -> Message:
    reason = f"the worker process failed: {type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message)
