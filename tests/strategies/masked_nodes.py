"""Real nodes under secure aggregation, in this process: files of their own, anyone's app behind the Mod.

Every node has a key that its site generated, a list of members that it pinned and a store on disk.  Its app replies by
Flower's convention: params and metrics.  A test plays liars by changing what a node replies at a stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from clients import identity as own_identity
from clients.secagg import secagg
from clients.store import NodeStore
from experiments.engines.local import LocalGrid
from strategies.exchange import door
from strategies.exchange_secagg import SecAggExchange
from strategies.grouping import Plan
from trellis import canonical, identity, wire
from trellis.identity import IdentityKey, Member
from trellis.secagg import quantise
from trellis.types import Collected, NodeInfo, Purpose, Request, Threat
from trellis.vectors import Layout, digest

BASE = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5, -0.5, 0.25], np.float32),
    "steps": np.array(7, np.int64),
}
GROUPS = {"a": ("a0", "a1", "a2", "a3"), "b": ("b0", "b1", "b2")}
CLIP = 10.0

Lie = Callable[[RecordDict], RecordDict | Error]
Tamper = Callable[[RecordDict], RecordDict]


QUANTISED: dict[tuple[bytes, int], tuple[Any, int]] = {}
"""By update and weight: the words that a node masked last, and their scale."""


@contextmanager
def light() -> Iterator[None]:
    """Every update is written down as it was rounded.

    And what would take longer than everything else: YAML is parsed once, and nothing waits for the disk.
    """
    rounded = quantise.quantise

    def watched(update: Any, *, weight: int, scale: int, dtype: Any, **options: Any) -> Any:
        found = rounded(update, weight=weight, scale=scale, dtype=dtype, **options)
        QUANTISED[update.tobytes(), weight] = found[0].copy(), scale
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "quantise", watched)
        patch.setattr(own_identity, "_from_file", lru_cache(own_identity._from_file))
        patch.setattr(identity, "load_members", lru_cache(identity.load_members))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@dataclass(frozen=True)
class Sites:
    """Keys and lists of members, made once: only stores are new in every federation."""

    folder: Path
    keys: Mapping[str, IdentityKey]
    pins: Mapping[str, Member]

    @property
    def names(self) -> list[str]:
        return sorted(self.pins)


def make_sites(folder: Path, groups: Mapping[str, Sequence[str]] | None = None) -> Sites:
    """Every node's key in a file of its own, and one list of members that all have pinned."""
    of = {name: group for group, names in (groups or GROUPS).items() for name in names}
    found = {name: identity.generate(folder / f"{name}.pem") for name in of}
    pins = {n: Member(n, f"{n} Ltd", found[n].public_key, group) for n, group in of.items()}
    members = [
        {"name": m.name, "organisation": m.organisation, "public_key": m.public_key.hex(), "group": m.group}
        for m in pins.values()
    ]
    (folder / "members.yaml").write_text(yaml.safe_dump({"members": members}))
    return Sites(folder, found, pins)


@dataclass
class Federation:
    """Sites that are connected, and the exchange that asks them."""

    sites: Sites
    folder: Path
    base: Mapping[str, Any] = field(default_factory=lambda: BASE)
    lies: dict[tuple[str, str], Lie] = field(default_factory=dict)
    """By node and stage, what is done to the content of its honest reply."""
    tampered: dict[tuple[str, str], Tamper] = field(default_factory=dict)
    """By node and stage, what a server makes of its question."""
    late: set[tuple[str, str]] = field(default_factory=set)
    """Nodes whose reply at a stage never arrives."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Of every site, besides where its files are."""
    metrics: Mapping[str, float] = field(default_factory=lambda: {"num-examples": 31, "accuracy": 0.123})
    app: ClientApp | None = None
    """None: replies params that are the base's, moved by what `delta` says."""
    rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.asked: list[tuple[str, str]] = []
        self.sent: list[tuple[str, str, RecordDict]] = []
        self.questions: dict[tuple[str, str], RecordDict] = {}
        self.connect()

    def connect(self) -> None:
        """Start every node: what it held in memory is gone."""
        app = self.app or self._app()
        config = [{"simulated": False, "node-file": str(self._node_file(name))} for name in self.sites.names]
        self.grid = LocalGrid(app, len(config), node_config=lambda i: config[i], delay_s=self._delay)
        ids = dict(zip(self.sites.names, self.grid.get_node_ids(), strict=True))
        self.names = {node_id: name for name, node_id in ids.items()}
        self.nodes = [
            NodeInfo(n, ids[n], organisation=pin.organisation, group=pin.group, num_examples=self.rows.get(n))
            for n, pin in sorted(self.sites.pins.items())
        ]

    def exchange(self, **options: Any) -> SecAggExchange:
        settings: dict[str, Any] = {
            "pins": self.sites.pins,
            "plan": Plan(Threat.semi_honest),
            "clip_norm": CLIP,
            "num_keys": 3,
            "native": False,
            "timeout_s": 60.0,
            "offline_timeout_s": 50.0,
            "clock": self.grid.clock,
        }
        return SecAggExchange(**{**settings, **options})

    def request(self, round: int = 1, *, purpose: Purpose = "train", **changes: Any) -> Request:
        fields: dict[str, Any] = {
            "run": "run",
            "round": round,
            "purpose": purpose,
            "base": digest(self.base),
            "config": {"seed": 5},
            "members": tuple(n.name for n in self.nodes),
        }
        return Request(**{**fields, **changes})

    def collect(self, exchange: SecAggExchange, round: int = 1, *, ask: Any = None, **changes: Any) -> Collected:
        """A round, of which `asked` then says who was asked for what."""
        self.asked.clear()
        self.sent.clear()
        return exchange.collect(self.request(round, **changes), self.nodes, ask or self.ask, base=self.base)

    def ask(self, messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        self.asked += [(self.names[m.metadata.dst_node_id], stage_of(m)) for m in messages]
        sent = [self._question(m) for m in messages]
        return door(self.grid, self.grid.clock)(sent, timeout_s)

    def _question(self, message: Message) -> Message:
        name, stage = self.names[message.metadata.dst_node_id], stage_of(message)
        tamper = self.tampered.get((name, stage), lambda content: content)
        content = self.questions[name, stage] = tamper(message.content)
        return Message(content, message.metadata.dst_node_id, message.metadata.message_type)

    def send(self, name: str, content: RecordDict, kind: str = "train") -> Message:
        """One message to one node.  -> its reply"""
        (node_id,) = (n.node_id for n in self.nodes if n.name == name)
        (reply,) = door(self.grid, self.grid.clock)([Message(content, node_id, kind)], 60)
        return reply

    def store(self, name: str) -> NodeStore:
        return NodeStore(self.folder / f"{name}.store")

    def context(self, name: str) -> Context:
        """What a node holds in memory."""
        return next(self.grid._contexts[n.node_id] for n in self.nodes if n.name == name)

    def delta(self, name: str, round: int = 1) -> dict[str, Any]:
        """What a node's training does to the floating params."""
        rng = np.random.default_rng(canonical.seed_for(name, round))
        return {k: rng.normal(0, 0.1, a.shape).astype(np.float32) for k, a in self.base.items() if a.dtype.kind == "f"}

    def moved(self, name: str, round: int = 1, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What its app replies to a base."""
        delta = self.delta(name, round)
        return {k: a + delta[k] if k in delta else a for k, a in (base or self.base).items()}

    # ------------------------------------------------------------ what must come out

    def words(self, name: str, *, round: int = 1, weight: int = 1) -> tuple[Any, int]:
        """One node's update as it is before it is masked, what `light` saw being rounded; and its scale."""
        return QUANTISED[Layout.of(self.base).subtract(self.moved(name, round), self.base).tobytes(), weight]

    def plain_mean(
        self, names: Sequence[str], *, round: int = 1, weights: Sequence[int] | None = None, of: int | None = None
    ) -> Any:
        """The row that a sum in clear would give, over `of` where some of them count for nothing."""
        weights = weights or [1] * len(names)
        found = [self.words(n, round=round, weight=w) for n, w in zip(names, weights, strict=True)]
        (scale,) = {scale for _, scale in found}
        signed = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
        total = sum(words.view(signed[words.dtype]).astype(np.int64) for words, _ in found)
        return (total / float(scale * (of or sum(weights)))).astype(np.float32)

    # ------------------------------------------------------------ the nodes

    def _node_file(self, name: str) -> Path:
        file = self.folder / f"{name}.yaml"
        files = {"identity_key": str(self.sites.folder / f"{name}.pem")}
        files["members"] = str(self.sites.folder / "members.yaml")
        own = {"least_threat": "semi_honest", **files, **self.policy}
        file.write_text(yaml.safe_dump({"name": name, "policy": {"secagg": own}}))
        return file

    def _app(self) -> ClientApp:
        app = ClientApp(mods=[self._lying, secagg()])
        app.train()(self._train)
        app.evaluate()(self._evaluate)
        return app

    def _train(self, message: Message, context: Context) -> Message:
        request = wire.read_request(message)
        assert request is not None
        base = wire.from_record(message.content.array_records["arrays"])
        arrays = self.moved(own_identity.of(context).spec.name, request.round, base)
        content = RecordDict({"arrays": wire.to_record(arrays), "metrics": MetricRecord({**self.metrics})})
        return Message(content, reply_to=message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({**self.metrics})}), reply_to=message)

    def _lying(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        name, stage = own_identity.of(context).spec.name, stage_of(message)
        reply = call_next(message, context)
        if (name, stage) in self.lies and reply.has_content():
            told = self.lies[name, stage](reply.content)
            reply = Message(told, reply_to=message)
        if reply.has_content():
            self.sent.append((name, stage, reply.content))
        return reply

    def _delay(self, index: int, message: Message, reply: Message) -> float:
        return np.inf if (self.sites.names[index], stage_of(message)) in self.late else 0.0


def stage_of(message: Message) -> str:
    """What a message asks: a stage of the protocol, or a round's "request"."""
    if "config" in message.content.config_records:
        return "request"
    return str(message.content.config_records.get("secagg", ConfigRecord()).get("stage", ""))


def with_fields(**fields: Any) -> Lie:
    """Other values of the fields of a stage's reply."""

    def lie(content: RecordDict) -> RecordDict:
        record = "secagg" if "secagg" in content else "reply"
        known = dict(content.config_records[record])
        changed = {k: v(known[k]) if callable(v) else v for k, v in fields.items()}
        return RecordDict({**content, record: ConfigRecord({**known, **changed})})

    return lie
