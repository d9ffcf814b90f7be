"""Links and availability of the nodes, in the local engine's virtual time.

A message takes the way there and back (twice the latency), the params down and the reply up at the rates of the node's
link; computing takes no time.  A node that is away in a round answers nothing and does nothing: its network says so.
Who is away follows from the run's seed, the round and the node's name, so a resumed round finds the same nodes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message, MessageType

from conf.schema import NodeSpec
from trellis import canonical, wire


@dataclass(frozen=True, slots=True)
class Links:
    """The links of the nodes of a run, by the node's index.  `obeys_availability` is False where a sampler did so."""

    specs: Sequence[NodeSpec]
    seed: int
    obeys_availability: bool = True

    def delay_s(self, index: int, message: Message, reply: Message) -> float:
        """Seconds between question and reply.  Enrolment takes none: who cannot answer it in time is in no run."""
        if message.metadata.message_type == MessageType.QUERY:
            return 0.0
        link = self.specs[index].link
        up = wire.size_bytes(reply.content) if reply.has_content() else 0
        seconds_down = 8e-6 * wire.size_bytes(message.content) / link.downlink_mbit_s
        return 2e-3 * link.latency_ms + seconds_down + 8e-6 * up / link.uplink_mbit_s

    def reachable(self, index: int, message: Message) -> bool:
        """Whether the node is there for a round of training.  Enrolment and the closing evaluation wait for it."""
        request = wire.read_request(message)
        if not self.obeys_availability or request is None or request.purpose != "train":
            return True
        spec = self.specs[index]
        coin = canonical.seed_for(self.seed, "available", request.round, spec.name)
        return coin < spec.link.availability * (1 << 63)
