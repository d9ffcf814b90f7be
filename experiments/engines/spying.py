"""What attackers know: every honest update of a round before they send their own, and the run's rule.

A `Spy` stands at every honest node and enters what the node is about to send in `Seen`, which the attackers share.  All
in one process: the engine lets honest nodes answer first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from clients import identity, secagg
from clients.store import NodeStore
from experiments.attacks.view import Aggregate, Matrix
from strategies.aggregation import Pipeline
from trellis import canonical, wire
from trellis.types import Request
from trellis.vectors import Arrays, Layout, Vector


class Seen:
    """The honest updates of the request that is being answered, as rows sorted by name."""

    def __init__(self, liars: frozenset[str]) -> None:
        self._liars = liars
        self._request = ""
        self._rows: dict[str, int] = {}
        self._present: set[str] = set()
        self._updates_hd: Matrix = np.empty((0, 0), np.float32)
        self.lie_d: Vector | None = None
        """What all attackers send to this request, once one of them has worked it out."""

    def enter(self, request: Request, name: str, layout: Layout, delta: Arrays) -> None:
        """An honest node's update."""
        if name in self._liars or name not in request.members:
            return
        self.turn_to(request, layout.dim)
        layout.flatten(delta, out=self._updates_hd[self._rows[name]])
        self._present.add(name)

    def turn_to(self, request: Request, dim: int) -> None:
        """Forget what was sent to any other request."""
        # not the digest: under secure aggregation every group has a request of its own, all about one base
        about = f"{request.run} {request.round} {request.purpose} {request.base} {canonical.digest(request.config)}"
        if self._request == about:
            return
        honest = sorted(set(request.members) - self._liars)
        self._request, self._rows, self._present = about, {name: i for i, name in enumerate(honest)}, set()
        self._updates_hd = np.empty((len(honest), dim), np.float32)
        self.lie_d = None

    def missing(self) -> list[str]:
        """Honest members that have not been seen to answer."""
        return [name for name in self._rows if name not in self._present]

    def updates(self) -> Matrix:
        """(h, d), read only."""
        index = sorted(self._rows[name] for name in self._present)
        found = self._updates_hd if len(index) == len(self._rows) else self._updates_hd[index]
        found = found.view()
        found.flags.writeable = False
        return found


@dataclass(frozen=True, slots=True)
class Spy:
    """Mod: every honest node's update, as it is about to be sent in clear."""

    seen: Seen

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        request = asked_to_train(message)
        if request is not None and reply.has_content() and wire.ARRAYS in reply.content.array_records:
            layout = Layout.of(arrays_in(message.content))
            self.seen.enter(request, identity.of(context).spec.name, layout, arrays_in(reply.content))
        return reply


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What attackers know besides their own updates: everyone else's, and the rule."""

    seen: Seen
    pipeline: Pipeline
    num_byzantine: int

    def honest(self, request: Request, layout: Layout, store: NodeStore | None) -> Matrix:
        """Updates of the honest members.  (h, d)

        A round that is asked again after a crash is answered from the nodes' stores, where no spy stands: what is in
        the stores beside the attacker's own counts too.
        """
        self.seen.turn_to(request, layout.dim)
        if store is not None:
            for name in self.seen.missing():
                other = replace(store, path=store.path.parent / name)
                masked = request.masking is not None
                kept = other.reply(secagg.about(request), slot="update") if masked else other.reply(request.digest)
                if kept is not None:
                    self.seen.enter(request, name, layout, arrays_in(kept))
        return self.seen.updates()

    def aggregate(self, rng: np.random.Generator, num_honest: int) -> Aggregate:
        """The run's pipeline as an attacker runs it: without the rule's memory, with a generator of its own, with the
        honest mean for what the server's rows would say."""

        def ask(updates_nd: Matrix) -> Any:
            offers = {
                "rng": lambda: rng,
                "names": lambda: [(f"{i:06d}",) for i in range(len(updates_nd))],
                "weights": lambda: None,
                "state": dict,
                "reference_d": lambda: updates_nd[:num_honest].mean(axis=0),
            }
            return self.pipeline(updates_nd, num_byzantine=self.num_byzantine, offers=offers)

        return ask


def asked_to_train(message: Message) -> Request | None:
    """The request of a training message of ours, else None."""
    if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
        return None
    return wire.read_request(message)


def arrays_in(content: RecordDict) -> Arrays:
    """The params or the delta of a message of ours."""
    return wire.from_record(content.array_records[wire.ARRAYS])


def with_arrays(content: RecordDict, arrays: Arrays) -> RecordDict:
    """The content with other arrays; every other record is shared."""
    return RecordDict({**content, wire.ARRAYS: wire.to_record(arrays)})
