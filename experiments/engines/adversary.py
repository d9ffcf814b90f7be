"""Attackers, as Mods that an engine puts around training at some nodes.

A `Liar` changes what its node replies, a `Poisoner` what its node trains on.  Only training of our own requests is
attacked: attackers evaluate honestly.  What an attacker remembers lies in its node's store, so that a resumed run goes
on lying as if nothing had happened.

Liars and spies stand outside momentum: honest nodes send momenta, and a liar answers with whatever it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from clients import identity, node
from clients.app import client_app
from clients.identity import Identity
from clients.policy import task_of
from clients.store import NodeStore, store_of
from conf.schema import EngineName, RunConfig
from experiments import attacks
from experiments.attacks import AttackSpec, Reply, View
from experiments.attacks.view import State
from experiments.engines.spying import Knowledge, Seen, Spy, arrays_in, asked_to_train, with_arrays
from sectors.base import Sector
from server import build
from trellis import canonical
from trellis.errors import ConfigError
from trellis.types import Request, Role
from trellis.vectors import Arrays, Layout, Vector

SLOT = "attack"
BASE = "base_d"
"""Of what an attacker remembers: the params it was sent last."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Who lies, how, and from which round on."""

    attack: str
    nodes: tuple[str, ...]
    start_round: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    """Whether nodes mask what they send."""

    @property
    def spec(self) -> AttackSpec:
        return attacks.get(self.attack)

    @property
    def sees_others(self) -> bool:
        """Whether honest nodes must have answered before the attackers do."""
        return self.spec.sees_others(self.options)

    def options_for(self, fn: Callable[..., Any]) -> dict[str, Any]:
        return attacks.options_for(fn, self.options)

    def rng(self, *more: int | str) -> np.random.Generator:
        """A generator of the attack, the same wherever it is asked for with the same parts."""
        return np.random.default_rng(canonical.seed_for(self.seed, "attack", *more))


def plot_of(config: RunConfig, sector: Sector) -> Plot | None:
    """The run's plot; None where all are honest.  `build.check` has passed.

    Raises ConfigError where this attack cannot be carried out with its options, on this sector or this engine.
    """
    if config.attack.name == "none":
        return None
    plot = Plot(
        attack=config.attack.name,
        nodes=attackers(config),
        start_round=config.attack.start_round,
        seed=config.seed,
        options=config.attack.options,
        masked=config.privacy.name.masks,
    )
    attacks.require(plot.spec, plot.options, num_classes=sector.num_classes)
    if plot.masked and plot.attack == "inflation":
        raise ConfigError(f"attack=inflation: with privacy={config.privacy.name} no node declares a number of examples")
    if plot.sees_others and (config.engine.name is not EngineName.local or config.engine.workers > 1):
        raise ConfigError(
            f"attack={plot.attack} needs the other nodes' updates: use engine=local with engine.workers=1"
        )
    return plot


def attackers(config: RunConfig) -> tuple[str, ...]:
    """Names of the nodes that lie, sorted: those the config names, or as many as it says, drawn from the run's seed."""
    attack = config.attack
    if attack.nodes:
        return tuple(sorted(set(attack.nodes)))
    trainers = [spec.name for spec in config.nodes.expand() if spec.role is Role.train]
    number = config.num_byzantine if attack.num_attackers is None else attack.num_attackers
    rng = np.random.default_rng(canonical.seed_for(config.seed, "attackers"))
    return tuple(sorted(rng.permutation(trainers)[:number].tolist()))


def attacked_app(plot: Plot, config: RunConfig | None = None) -> ClientApp:
    """Our ClientApp with the attackers in it.  `config`, of an attack that sees others, is the run they know all of."""
    if plot.spec.kind == "data":
        return client_app(Poisoner(plot))
    if plot.masked and plot.spec.kind == "protocol":  # what is wrong is what travels, behind the mask
        return client_app(outermost=[Liar(plot)])
    if not plot.sees_others or config is None:
        return client_app(replying=[Liar(plot)])
    seen = Seen(frozenset(plot.nodes))
    knowledge = Knowledge(seen, build.pipeline(config), config.num_byzantine)
    return client_app(replying=[Spy(seen), Liar(plot, knowledge)])


# ---------------------------------------------------------------- lies


@dataclass(frozen=True, slots=True)
class Liar:
    """Mod: another update, or another reply, than the node's honest one."""

    plot: Plot
    knowledge: Knowledge | None = None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        request, me = asked_to_train(message), identity.of(context)
        if request is None or me.spec.name not in self.plot.nodes or not reply.has_content():
            return reply
        tell = self._reply if self.plot.spec.kind == "protocol" else self._update
        lie = tell(reply.content, arrays_in(message.content), request, me)
        return reply if lie is None else Message(lie, reply_to=message)

    def _reply(self, content: RecordDict, base: Arrays, request: Request, me: Identity) -> RecordDict | None:
        """Another reply; None from a sleeper, which only remembers."""
        spec, memory = self.plot.spec, _Memory.of(me, request)
        reply = Reply(content, request.round, memory.recall())
        if spec.remember is not None:
            reply = replace(reply, state=spec.remember(reply, **self.plot.options_for(spec.remember)))
            memory.commit(reply.state)
        if request.round < self.plot.start_round:
            return None
        found: RecordDict = spec.fn(reply, **self.plot.options_for(spec.fn))
        return found

    def _update(self, content: RecordDict, base: Arrays, request: Request, me: Identity) -> RecordDict | None:
        """The reply with another update; None from a sleeper, which only remembers."""
        spec, memory, layout = self.plot.spec, _Memory.of(me, request), Layout.of(base)
        view = self._view(layout.flatten(arrays_in(content)), layout, base, memory.recall(), request, me)
        if spec.remember is not None:
            view = replace(view, state=spec.remember(view, **self.plot.options_for(spec.remember)))
        if spec.remember is not None or spec.needs_previous:
            memory.commit({**view.state, BASE: layout.flatten(base)})
        if request.round < self.plot.start_round:
            return None
        return with_arrays(content, layout.unflatten(self._worked_out(view)))

    def _worked_out(self, view: View) -> Vector:
        """What is sent.  It is worked out once for all attackers, where nothing of their own is in it."""
        spec, seen = self.plot.spec, self.knowledge.seen if self.knowledge else None
        if seen is None or spec.remember is not None or spec.needs_previous or not len(seen.updates()):
            own_d: Vector = spec.fn(view, **self.plot.options_for(spec.fn))
            return own_d
        if seen.lie_d is None:
            seen.lie_d = spec.fn(view, **self.plot.options_for(spec.fn))
        return seen.lie_d

    def _view(self, own_d: Vector, layout: Layout, base: Arrays, kept: State, request: Request, me: Identity) -> View:
        lying = sum(name in self.plot.nodes for name in request.members)
        view = View(
            own_d,
            num_attackers=lying,
            num_nodes=len(request.members),
            round=request.round,
            rng=self.plot.rng(request.round),
            private_rng=self.plot.rng(request.round, me.spec.name),
            previous_step_d=layout.flatten(base) - kept[BASE].astype(np.float32) if BASE in kept else None,
            state={k: v for k, v in kept.items() if k != BASE},
        )
        if self.knowledge is None:
            return view
        honest_hd = self.knowledge.honest(request, layout, store_of(me))
        if not len(honest_hd):  # nobody to hide among: the attackers take their own honest work for the others'
            honest_hd = own_d[None]
        aggregate = self.knowledge.aggregate(self.plot.rng(request.round, "rule"), len(honest_hd))
        return replace(view, honest_hd=honest_hd, aggregate=aggregate)


@dataclass(frozen=True, slots=True)
class Poisoner:
    """Mod: the update of the same training on rows that are false; counts and local layers stay the honest ones."""

    plot: Plot

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        request, me = asked_to_train(message), identity.of(context)
        if request is None or me.spec.name not in self.plot.nodes or not reply.has_content():
            return reply
        if request.round < self.plot.start_round:
            return reply
        shared = arrays_in(message.content)
        layout, spec = Layout.of(shared), self.plot.spec
        lie_d = layout.subtract(self._trained(message, request, shared, me), shared)
        if spec.boost is not None:
            lie_d = spec.boost(lie_d, **self.plot.options_for(spec.boost))
        return Message(with_arrays(reply.content, layout.unflatten(lie_d)), reply_to=message)

    def _trained(self, message: Message, request: Request, shared: Arrays, me: Identity) -> Arrays:
        """Params after the node's own training, its rows poisoned."""
        task, spec = task_of(message), self.plot.spec
        sector = node.sector_of(task)
        # the same rows in every round: a liar's data do not change
        rng = self.plot.rng(me.spec.name)
        options = self.plot.options_for(spec.fn)
        rows = spec.fn(node.data_of(me, task).train, num_classes=sector.num_classes, rng=rng, **options)
        base = node.with_local(sector, task, shared, store_of(me), request.base, request.run)
        return node.trained_on(task, base, rows, round=request.round, name=me.spec.name).arrays


@dataclass(frozen=True, slots=True)
class _Memory:
    """What an attacker knew when a base was first sent to it.  Nothing, where the node keeps nothing."""

    store: NodeStore | None
    request: Request

    @classmethod
    def of(cls, me: Identity, request: Request) -> _Memory:
        return cls(store_of(me), request)

    def recall(self) -> State:
        if self.store is None:
            return {}
        return self.store.local(self.request.base, slot=SLOT, run=self.request.run) or {}

    def commit(self, state: State) -> None:
        if self.store is not None:
            self.store.commit(self.request.base, state, slot=SLOT, run=self.request.run)
