"""Secure aggregation as an exchange: three messages an epoch, then two a round (three under malicious_server).

    epoch   keys -> shares -> confirm                     who takes part, and what is needed when somebody is missing
    round   request -> [survivors] -> unmask              masked vectors, added up as they arrive; shares; the sum

What comes back is a row a group (the mean of its survivors' updates) and the group's summed counts.  A reply that does
not check costs its sender its place, named; its group goes on while its quorum stands, or is lost whole, and the round
goes on with the others.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from logging import INFO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log

from strategies import checks
from strategies.exchange import Ask, Clock, StoppedClock, refused, refused_by_error
from strategies.grouping import Plan
from strategies.observers import suspicion
from strategies.sums import KnownSum, Limits, Pending, Sums
from trellis import canonical, wire
from trellis.errors import BaseSpent, ConfigError, SecAggError, WireError
from trellis.identity import Member
from trellis.secagg import consent, counts, draws, leader, messages, quantise, roster, transcript
from trellis.secagg.draws import Draw
from trellis.secagg.leader import Leader
from trellis.secagg.messages import (
    AskDraw,
    AskKeys,
    AskName,
    AskReveal,
    Committed,
    Confirmed,
    Keys,
    Named,
    Revealed,
    Shares,
    Stage,
    Survivors,
    Unmasked,
)
from trellis.secagg.tally import Facts, GroupLost, Masks, Tally, unmasked
from trellis.secagg.transcript import Signed
from trellis.types import (
    LOSS_MAX,
    Collected,
    CountField,
    GroupSum,
    Masking,
    NodeInfo,
    Refusal,
    Request,
    Role,
    Row,
    Update,
)
from trellis.vectors import Arrays, CountSpec, Layout, TensorSpec, norm

SLACK = 1e-5
"""Of the norm of a group's mean, relative: what rounding to float32 may add."""
BUSY_BYTES = 1 << 30
"""Masks that are worth starting processes for."""


_NOTHING = Refusal("", "", "")
_EXCUSED = ("late", "unavailable", "group_lost")


@dataclass(slots=True)
class Open:
    """An epoch of a group that goes on."""

    leader: Leader
    nodes: Mapping[str, NodeInfo]
    drawn: bool
    next_index: int = 0

    @property
    def name(self) -> str:
        return self.leader.asked.group

    @property
    def names(self) -> tuple[str, ...]:
        return self.leader.asked.names

    @property
    def is_spent(self) -> bool:
        return self.next_index >= self.leader.asked.num_keys


@dataclass(slots=True)
class _Books:
    """Who was asked, what travelled, and who was turned away, over all messages of a round."""

    nodes: Mapping[str, NodeInfo]
    clock: Clock | None
    refusals: dict[str, Refusal] = field(default_factory=dict)
    strays: list[Refusal] = field(default_factory=list)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    """What nodes tell of their budgets."""
    lost: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Groups without a sum, and why."""

    def refuse(self, name: str, reason: str, evidence: str) -> None:
        """The first word on a node counts, unless a lie comes to light later."""
        lied = reason in suspicion.LIES and self.refusals.get(name, _NOTHING).reason not in suspicion.LIES
        if name not in self.refusals or lied:
            self.refusals[name] = refused(name, reason, evidence)

    def asked(
        self, ask: Ask, questions: Mapping[str, RecordDict], kind: str, timeout_s: float
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send a content to each of these nodes.  -> the contents of their replies, errors and silence booked."""
        ids = {self.nodes[name].node_id: name for name in questions}
        sent = [
            Message(content=content, message_type=kind, dst_node_id=self.nodes[name].node_id)
            for name, content in questions.items()
        ]
        sizes: dict[int, int] = {}  # a round's request is one content for all members of a group
        for name, content in questions.items():
            size = sizes.setdefault(id(content), wire.size_bytes(content))
            self.down[name] = self.down.get(name, 0) + size
        waiting = set(questions)
        timed = self.clock is not None and not isinstance(self.clock, StoppedClock)
        started = self.clock.now() if self.clock is not None and timed else 0.0
        for reply in ask(sent, timeout_s):
            name = ids.get(reply.metadata.src_node_id, "")
            if name not in waiting:
                who, reason = (name, "duplicate") if name else (f"id {reply.metadata.src_node_id}", "unknown_node")
                self.strays.append(Refusal(who, reason, "a reply that nobody asked for"))
                continue
            waiting.discard(name)
            if self.clock is not None and timed:
                self.node_seconds[name] = self.clock.now() - started + self.node_seconds.get(name, 0.0)
            if reply.has_error():
                found = refused_by_error(name, reply)
                if found.reason == "unavailable":
                    self.down[name] = self.down.get(name, 0) - wire.size_bytes(questions[name])
                self.refuse(name, found.reason, found.evidence)
                continue
            self.up[name] = self.up.get(name, 0) + wire.size_bytes(reply.content)
            yield name, reply.content
        for name in waiting:
            self.refuse(name, "late", "no reply before the deadline")


@dataclass(slots=True)
class SecAggExchange:
    """All messages of masked rounds.  `pins` are the members' identity keys and groups, as the server knows them."""

    pins: Mapping[str, Member]
    plan: Plan = field(default_factory=Plan)
    clip_norm: float = 10.0
    num_keys: int = 16
    max_weight: int = 1
    """Above 1, nodes' rows as registered are whole weights up to this."""
    min_resolution: float = 10000.0
    drawn_size: int = 0
    """Above 0: groups of so many at least are drawn by all members at the start of an epoch."""
    audit_every: int = 0
    audit_size: int = 0
    """In every `audit_every`-th round of training, groups of `audit_size` are drawn for that round."""
    counts: Mapping[str, CountSpec] | None = None
    counts_problem: checks.CountsProblem | None = None
    native: bool = True
    """Whether nodes run our app: then counts are among what is summed."""
    losses: bool = True
    """Whether the losses of their training are too."""
    max_examples: int = 100_000_000
    timeout_s: float = 3600.0
    offline_timeout_s: float = 300.0
    clock: Clock | None = None
    folder: Path | None = None
    """Where sums are kept until their round is committed; None: in memory."""
    workers: int = 1
    new_epoch: Callable[[], str] = lambda: secrets.token_hex(16)
    _epochs: dict[tuple[str, ...], Open] = field(default_factory=dict, repr=False)
    _draws: dict[str, list[tuple[str, ...]]] = field(default_factory=dict, repr=False)
    """Groups that were drawn, by role, while their epochs last."""
    _limits: Limits | None = field(default=None, repr=False)
    _convicted: dict[str, str] = field(default_factory=dict, repr=False)
    """Members whose shares were proven false: no epoch is begun with them again."""
    _out: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict, repr=False)
    """By group, who is out of its epoch, and why."""
    _sums: Sums | None = field(default=None, repr=False)

    def collect(self, request: Request, cohort: Sequence[NodeInfo], ask: Ask, *, base: Arrays) -> Collected:
        """Ask the cohort's groups, and add up what they answer.

        Raises BaseSpent where this base was asked for before and no more of it can be had.
        """
        started = time.perf_counter()
        cohort = sorted(cohort, key=lambda node: node.name)
        books = _Books({node.name: node for node in cohort}, self.clock)
        self._limits = self._limits or self._store.limits(request.purpose, _limits_of(cohort, self.max_examples))
        about = f"{request.purpose}-{canonical.digest(list(request.splits))[:8]}-{request.base[:32]}"
        known = list(self._store.known(about))
        pending = self._store.pending(about, self.pins)
        finished = self._finished(pending, ask, books, about=about, also=known)
        known += finished
        taken = {name for found in known for name in found.names}
        groups = self._groups(request, [n for n in cohort if n.name not in taken], ask, books)
        left = [group for group in groups if not taken & set(group)]
        epochs = self._opened(left, request, ask, books, groups)
        offline_s = time.perf_counter() - started
        fresh = self._round(request, epochs, ask, books, base=base, about=about, known=known)
        for names in (p.names for p in pending):
            books.lost.setdefault(names, "its shares are late")
        if request.purpose == "train" and not fresh and not finished and (known or pending):
            self._require_more(request, known, left, pending)
        collected = self._collected(request, cohort, [*known, *fresh], groups, books, base=base)
        seconds = {"exchange": time.perf_counter() - started, "offline": offline_s}
        return replace(collected, seconds=seconds)

    def register(self, nodes: Sequence[NodeInfo]) -> None:
        """All nodes of the run, before its first round: limits that are the same in all rounds follow from them."""
        self._limits = self._store.limits("train", _limits_of(nodes, self.max_examples))

    def named(self, node_ids: Sequence[int], ask: Ask) -> list[NodeInfo]:
        """The nodes behind these ids: those that sign their names with the keys that are pinned, sorted by name.

        For Flower's entry point, where a server knows ids only.  A name that two nodes claim belongs to neither.
        """
        nonce = secrets.token_bytes(32)
        question = _content(AskName(nonce))
        sent = [Message(content=question, message_type=MessageType.TRAIN, dst_node_id=n) for n in node_ids]
        found: dict[str, list[int]] = {}
        for reply in ask(sent, min(self.timeout_s, self.offline_timeout_s)):
            if not reply.has_content() or wire.SECAGG not in reply.content.config_records:
                continue
            try:
                said = messages.from_fields(Named, dict(reply.content.config_records[wire.SECAGG]))
                pin = self.pins[said.name]
                about = {"node": said.name, "nonce": nonce.hex()}
                transcript.read(Signed(said.payload, said.signature), "hello", pin.public_key, **about)
            except (SecAggError, KeyError):
                continue
            found.setdefault(said.name, []).append(reply.metadata.src_node_id)
        return [
            NodeInfo(
                name,
                ids[0],
                self.pins[name].organisation,
                role=Role(self.pins[name].role),
                group=self.pins[name].group,
            )
            for name, ids in sorted(found.items())
            if len(ids) == 1
        ]

    @property
    def _store(self) -> Sums:
        if self._sums is None:
            self._sums = Sums(self.folder)
        return self._sums

    def _require_more(
        self,
        request: Request,
        known: Sequence[KnownSum],
        left: Sequence[tuple[str, ...]],
        pending: Sequence[Pending],
    ) -> None:
        """Raises BaseSpent where a base comes again, and every group has answered for it already."""
        answered = {p.names for p in pending}
        if all(found.round < request.round for found in known) and set(left) <= answered:
            raise BaseSpent(
                f"round {request.round}: the params {request.base[:12]} were trained on before, and no further sum of "
                "updates to them can be had: nodes answer for a base once. Start a new run"
            )

    # ------------------------------------------------------------ groups

    def _groups(
        self, request: Request, cohort: Sequence[NodeInfo], ask: Ask, books: _Books
    ) -> dict[tuple[str, ...], _Draw | None]:
        """The groups that the cohort belongs to, each with the draw it comes from."""
        audits = self.audit_every and request.purpose == "train" and request.round % self.audit_every == 0
        if not self.drawn_size and not audits:
            labels = sorted({self.pins[node.name].group for node in cohort if node.name in self.pins})
            return dict.fromkeys((roster.pinned_group(label, self.pins) for label in labels), None)
        found: dict[tuple[str, ...], _Draw | None] = {}
        for role in sorted({self.pins[node.name].role for node in cohort}):
            lasting = [group for group in self._draws.get(role, []) if self._lasts(group)]
            if lasting and not audits:
                found |= dict.fromkeys(lasting, None)
                continue
            size = self.audit_size if audits else self.drawn_size
            drawn = self._drawn(role, size, request.run, ask, books)
            if drawn is not None:
                self._draws[role] = [] if audits else list(drawn.groups)
                found |= dict.fromkeys(drawn.groups, drawn)
        return found

    def _lasts(self, group: tuple[str, ...]) -> bool:
        return group in self._epochs and not self._epochs[group].is_spent

    def _drawn(self, role: str, size: int, run: str, ask: Ask, books: _Books) -> _Draw | None:
        """Groups drawn by all members of a role that are there: each commits itself to a number, then reveals it."""
        everyone = tuple(sorted(name for name, pin in self.pins.items() if pin.role == role))
        epoch = self.new_epoch()
        present = [name for name in everyone if name in books.nodes and name not in self._convicted]
        question = _content(AskDraw(run, epoch, everyone, size))
        commits: dict[str, Signed] = {}
        for name, reply in self._stage(dict.fromkeys(present, question), Committed, ask, books):
            signed = Signed(reply.payload, reply.signature)
            about = {"run": run, "epoch": epoch, "group_size": size, "node": name}
            with books_refusing(books, name):
                transcript.read(signed, "commit", self.pins[name].public_key, **about)
                commits[name] = signed
        names = tuple(sorted(commits))
        listed = AskReveal(
            epoch, names, tuple(commits[n].payload for n in names), tuple(commits[n].signature for n in names)
        )
        draw = Draw(run, epoch, list(everyone), size, b"", commits=draws.commits_digest(commits))
        reveals: dict[str, Signed] = {}
        numbers: dict[str, bytes] = {}
        for name, shown in self._stage(dict.fromkeys(names, _content(listed)), Revealed, ask, books):
            signed = Signed(shown.payload, shown.signature)
            with books_refusing(books, name):
                numbers[name] = draws.number_in(self.pins[name], draw, signed, commits[name])
                reveals[name] = signed
        if not numbers:
            return None
        entries = []
        for name in names:
            shown_by = reveals.get(name, Signed(b"", b""))
            entries += [commits[name].payload, commits[name].signature, shown_by.payload, shown_by.signature]
        seed = roster.drawn_seed(run, epoch, numbers)
        owners = [(name, self.pins[name].organisation) for name in numbers]
        return _Draw(epoch, names, tuple(entries), tuple(roster.dealt_out(owners, size, seed)))

    # ------------------------------------------------------------ epochs

    def _opened(
        self,
        groups: Sequence[tuple[str, ...]],
        request: Request,
        ask: Ask,
        books: _Books,
        draws: Mapping[tuple[str, ...], _Draw | None],
    ) -> list[Open]:
        """An epoch for every group, those that lack one led through keys, shares and confirmation together."""
        lacking = [group for group in groups if not self._lasts(group)]
        leaders: dict[tuple[str, ...], Leader] = {}
        for group in lacking:
            self._epochs.pop(group, None)
            self._out[group] = {}
            try:
                leaders[group] = Leader(self._ask_keys(group, request, draws.get(group)), self.pins)
            except ConfigError as error:
                self._lose(group, str(error), books)
        self._keys(leaders, books, ask)
        self._shares(leaders, books, ask)
        self._confirm(leaders, books, ask)
        for group, led in leaders.items():
            if led.is_confirmed:
                nodes = {name: books.nodes[name] for name in led.members}
                self._epochs[group] = Open(led, nodes, drawn=draws.get(group) is not None)
                self._note_missing(group, led, books)
            else:
                self._lose(
                    group, f"{len(led.confirmed)} of {len(group)} confirmed keys, {led.asked.quorum} must", books
                )
        return [self._epochs[group] for group in groups if group in self._epochs]

    def _ask_keys(self, group: tuple[str, ...], request: Request, draw: _Draw | None) -> AskKeys:
        num_neighbours, threshold = self.plan.neighbours(len(group))
        audits = draw is not None and not self.drawn_size
        return leader.ask_keys(
            run=request.run,
            epoch=draw.epoch if draw is not None else self.new_epoch(),
            group=self.pins[group[0]].group if draw is None else f"drawn-{'+'.join(group)}"[:64],
            names=group,
            pins=self.pins,
            threat=self.plan.threat,
            quorum=self.plan.quorum(len(group)),
            threshold=threshold,
            num_neighbours=num_neighbours,
            num_keys=1 if audits or request.purpose == "statistics" else self.num_keys,
            draw=draw.entries if draw is not None else (),
            drawn_names=draw.names if draw is not None else (),
        )

    def _keys(self, leaders: Mapping[tuple[str, ...], Leader], books: _Books, ask: Ask) -> None:
        questions, of = {}, {}
        for group, led in leaders.items():
            content = _content(led.asked)
            for name in (n for n in group if n in books.nodes):
                if name in self._convicted:
                    books.refuse(name, "unavailable", f"out of all epochs: {self._convicted[name]}")
                else:
                    questions[name], of[name] = content, led
        for name, reply in self._stage(questions, Keys, ask, books):
            with books_refusing(books, name):
                of[name].take_keys(name, reply)

    def _shares(self, leaders: Mapping[tuple[str, ...], Leader], books: _Books, ask: Ask) -> None:
        questions, of = {}, {}
        for led in leaders.values():
            for name, question in led.ask_shares().items():
                questions[name], of[name] = _content(question), led
        for name, reply in self._stage(questions, Shares, ask, books):
            with books_refusing(books, name):
                of[name].take_shares(name, reply)

    def _confirm(self, leaders: Mapping[tuple[str, ...], Leader], books: _Books, ask: Ask) -> None:
        """Until nobody complains any more: every complaint removes somebody."""
        waiting = list(leaders.values())
        while waiting:
            gone = {id(led): len(led.removed) for led in waiting}
            questions, of = {}, {}
            for led in waiting:
                for name, question in led.ask_confirm().items():
                    questions[name], of[name] = _content(question), led
            for name, reply in self._stage(questions, Confirmed, ask, books):
                with books_refusing(books, name):
                    of[name].take_confirmed(name, reply)
            for led in waiting:
                for name, why in led.removed.items():
                    books.refuse(name, "bad_complaint" if "complained" in why else "bad_share", why)
            waiting = [led for led in waiting if len(led.removed) > gone[id(led)]]

    def _note_missing(self, group: tuple[str, ...], led: Leader, books: _Books) -> None:
        """Why members are out of the epoch; in its later rounds that is why they are not asked."""
        for name in set(group) - set(led.members):
            found = books.refusals.get(name)
            self._out[group][name] = f"{found.reason}: {found.evidence}" if found else "not asked when the epoch began"

    def _lose(self, group: tuple[str, ...], why: str, books: _Books, *, liar: str | None = None) -> None:
        books.lost[group] = why
        log(INFO, "secure aggregation: no sum of %s: %s", "+".join(group)[:80], why)
        for name in group:
            if name in books.nodes and name != liar:
                books.refuse(name, "group_lost", why)

    # ------------------------------------------------------------ a round

    def _round(
        self,
        request: Request,
        epochs: Sequence[Open],
        ask: Ask,
        books: _Books,
        *,
        base: Arrays,
        about: str,
        known: Sequence[KnownSum],
    ) -> list[KnownSum]:
        """From requests to sums, all groups together."""
        if not epochs:
            return []
        dim = Layout.of(base).dim if request.purpose == "train" else 0
        requests = {}
        for opened in epochs:
            try:
                requests[opened.names] = self._request(request, opened, dim)
            except ConfigError as error:
                self._lose(opened.names, str(error), books)
        epochs = [opened for opened in epochs if opened.names in requests]
        if not epochs:
            return []
        tallies = self._masked(requests, epochs, ask, books, base)
        ready = []
        for opened in epochs:
            found = tallies[opened.names]
            if found.has_quorum:
                ready.append(opened)
            else:
                needed = f"{len(found.survivors)} of {len(opened.names)} answered, {found.facts.quorum} must"
                self._lose(opened.names, needed, books)
        pending = [
            Pending(
                opened.name,
                opened.names,
                request.round,
                opened.drawn,
                _masking(requests[opened.names]),
                tallies[opened.names],
            )
            for opened in ready
        ]
        return self._settled(pending, ask, books, about=about, known=known)

    def _request(self, request: Request, opened: Open, dim: int) -> Request:
        """The request as one group gets it, with the next key."""
        index, opened.next_index = opened.next_index, opened.next_index + 1
        led, members = opened.leader, opened.leader.members
        weights = self._weights(opened.nodes, members)
        size = self._size(opened)
        bits, scale = self._scale(size)
        masking = Masking(
            epoch=led.asked.epoch,
            group=led.asked.group,
            roster=led.asked.roster.hex(),
            confirmed=led.set_digest.hex(),
            members=tuple(members),
            quorum=led.asked.quorum,
            clip_norm=self.clip_norm,
            scale=scale,
            dtype=f"uint{bits}",
            dim=dim,
            counts=self._fields(request, size),
            weights=weights,
        )
        return replace(request, key_index=index, masking=masking)

    def _weights(self, nodes: Mapping[str, NodeInfo], members: Sequence[str]) -> tuple[int, ...]:
        """Whole weights by the rows that nodes registered; all 1 where rows are not weighed."""
        if self.max_weight == 1:
            return tuple(1 for _ in members)
        rows = [nodes[name].num_examples or 0 for name in members]
        most = max(self._limits.examples if self._limits else 0, 1)
        if not any(rows):
            raise ConfigError("its members registered no rows: every weight is 0")
        return tuple(max(round(self.max_weight * r / most), min(r, 1)) for r in rows)

    def _size(self, opened: Open) -> int:
        """Members that a node's group has at most in this run: scale and limits are to be the same in all rounds."""
        if not self.drawn_size and not self.audit_size:
            return len(opened.names)
        sizes = Counter(pin.group for pin in self.pins.values())
        # n members make n // g groups of fewer than 2 g each
        return max(2 * max(self.drawn_size, self.audit_size), *sizes.values())

    def _scale(self, num_members: int) -> tuple[int, int]:
        """(bits, steps of a coordinate of 1): 32 bits where they are fine enough."""
        finest = int(consent.MAX_STEPS / self.clip_norm) if self.max_weight > 1 else int(2**31 / self.clip_norm)
        try:
            scale = quantise.scale_for(num_members, self.clip_norm, self.max_weight)
            if scale >= self.min_resolution:
                return 32, max(min(scale, finest), 1)
        except ConfigError:
            pass
        return 64, max(min(quantise.scale_for(num_members, self.clip_norm, self.max_weight, bits=64), finest), 1)

    def _fields(self, request: Request, num_members: int) -> tuple[CountField, ...]:
        """What is summed beside the updates, and how much of each a node can have; the same in all rounds of a run."""
        failed, clipped = TensorSpec(counts.FAILED, (), "int64"), TensorSpec(counts.CLIPPED, (), "int64")
        own = [counts.field_of(counts.FAILED, failed, most=1, num_members=num_members)]
        if request.purpose == "train":
            own.append(counts.field_of(counts.CLIPPED, clipped, most=1, num_members=num_members))
            if self.native and self.losses:
                loss = TensorSpec(counts.LOSS, (), "float64")
                own.append(counts.field_of(counts.LOSS, loss, most=LOSS_MAX, num_members=num_members))
        limits = self._limits or Limits(0, 0)
        most = limits.examples if request.purpose == "statistics" else limits.rows
        splits = request.splits if self.native and self.counts is not None else ()
        return (*own, *counts.layout(self.counts or {}, splits, most_rows=most, num_members=num_members))

    def _masked(
        self,
        requests: Mapping[tuple[str, ...], Request],
        epochs: Sequence[Open],
        ask: Ask,
        books: _Books,
        base: Arrays,
    ) -> dict[tuple[str, ...], Tally]:
        """Every group's masked vectors, added up as they come."""
        arrays = wire.to_record(base)
        tallies: dict[tuple[str, ...], Tally] = {}
        questions, of = {}, {}
        purpose = next(iter(requests.values())).purpose
        for opened in epochs:
            request = requests[opened.names]
            masking = _masking(request)
            update = np.zeros(masking.dim, masking.dtype)
            words = np.zeros(counts.size(masking.counts), np.uint64)
            tallies[opened.names] = Tally(Facts.of(opened.leader, request), self.pins, update, words)
            whole = wire.request_content(arrays, request)
            shared = opened.leader.asked.num_neighbours == 0
            said = _record(opened.leader.confirmation(masking.members[0])) if shared else None
            for name in opened.names:
                if name not in books.nodes:
                    continue
                if name not in masking.members:
                    why = self._out.get(opened.names, {}).get(name, "it took no part in the epoch's keys")
                    books.refuse(name, "unavailable", f"out of this epoch: {why}")
                    continue
                told = said if said is not None else _record(opened.leader.confirmation(name))
                questions[name] = RecordDict({**whole, wire.SECAGG: told})
                of[name] = (request, tallies[opened.names])
        kind = MessageType.TRAIN if purpose == "train" else MessageType.EVALUATE
        for name, content in books.asked(ask, questions, kind, self.timeout_s):
            with books_refusing(books, name):
                request, found = of[name]
                found.take_masked(name, *_read_masked(content, request))
                said = content.config_records[wire.REPLY]
                books.told[name] = {k: v for k in wire.TOLD if isinstance(v := said.get(k), float) and 0 <= v < 1e12}
        return tallies

    def _settled(
        self, pending: list[Pending], ask: Ask, books: _Books, *, about: str, known: Sequence[KnownSum]
    ) -> list[KnownSum]:
        """Survivors agreed on, written down, unmasked, and the sums kept."""
        self._agree(pending, ask, books)
        for lost in [p for p in pending if not p.tally.is_agreed]:
            signed = f"{len(lost.tally.agreed)} survivors confirmed the set, {lost.tally.facts.quorum} must"
            self._lose(lost.names, signed, books)
        agreed = [p for p in pending if p.tally.is_agreed]
        if not agreed:
            return []
        self._store.expect(about, agreed)
        self._unmask(agreed, ask, books)
        fresh = self._sums_of(agreed, books)
        late = [p for p in agreed if not p.tally.is_recoverable]
        self._store.keep(about, [*known, *fresh], late=late)
        return fresh

    def _finished(
        self, pending: list[Pending], ask: Ask, books: _Books, *, about: str, also: Sequence[KnownSum]
    ) -> list[KnownSum]:
        """Sums whose shares were being asked for when a process died: members give the same answer again."""
        there = {name for found in also for name in found.names}
        pending = [p for p in pending if not there & set(p.names)]
        if not pending:
            return []
        self._unmask(pending, ask, books)
        complete = [p for p in pending if p.tally.is_recoverable]
        for p in (p for p in pending if not p.tally.is_recoverable):
            log(INFO, "secure aggregation: what %s masked before cannot be unmasked any more", p.group)
            for name in p.names:
                books.refusals.pop(name, None)  # they are asked again, with other keys
        sums = self._sums_of(complete, books)
        if sums:
            self._store.keep(about, [*also, *sums], late=[p for p in pending if p not in complete])
        return sums

    def _agree(self, pending: Sequence[Pending], ask: Ask, books: _Books) -> None:
        """The consistency round of malicious_server: survivors sign who the survivors are."""
        questions, of = {}, {}
        for p in (p for p in pending if not p.tally.is_agreed):
            for name in p.tally.survivors:
                questions[name], of[name] = _content(p.tally.ask_survivors()), p.tally
        open_tallies = [p.tally for p in pending]
        for name, reply in self._stage(questions, Survivors, ask, books):
            with books_refusing(books, name):
                of[name].take_survivors(name, reply)
            open_tallies = [t for t in open_tallies if not t.is_agreed]
            if not open_tallies:
                return

    def _unmask(self, pending: Sequence[Pending], ask: Ask, books: _Books) -> None:
        """Shares, until there are enough of every secret: who is slow then costs nothing."""
        questions, of = {}, {}
        for p in pending:
            content = _content(p.tally.ask_unmask())
            for name in (n for n in p.tally.survivors if n in books.nodes):
                questions[name], of[name] = content, p.tally
        open_tallies = [p.tally for p in pending]
        for name, reply in self._stage(questions, Unmasked, ask, books):
            with books_refusing(books, name):
                of[name].take_shares(name, reply)
            open_tallies = [t for t in open_tallies if not t.is_recoverable]
            if not open_tallies:
                return

    def _sums_of(self, pending: Sequence[Pending], books: _Books) -> list[KnownSum]:
        """Masks taken away; a dealer whose shares are proven false is named, and its group has no sum."""
        jobs: list[tuple[Pending, Masks]] = []
        for p in pending:
            try:
                jobs.append((p, p.tally.masks()))
            except GroupLost as error:
                if error.liar is not None:
                    self._convicted[error.liar] = error.reason
                    books.refuse(error.liar, "bad_share", error.reason)
                    self._epochs.pop(p.names, None)
                self._lose(p.names, error.reason, books, liar=error.liar)
        sums = self._without_masks(jobs)
        return [p.known(update, words) for (p, _), (update, words) in zip(jobs, sums, strict=True)]

    def _without_masks(self, jobs: Sequence[tuple[Pending, Masks]]) -> list[tuple[Any, Any]]:
        work = sum(p.tally.update.nbytes * len(masks) for p, masks in jobs)
        arguments = [(p.tally.update, p.tally.counts, masks) for p, masks in jobs]
        if self.workers == 1 or len(jobs) == 1 or work < BUSY_BYTES:
            return [unmasked(*each) for each in arguments]
        # processes: the cipher holds the interpreter's lock
        with ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            return list(pool.map(unmasked, *zip(*arguments, strict=True)))

    def _stage(
        self, questions: Mapping[str, RecordDict], kind: type[messages.M], ask: Ask, books: _Books
    ) -> Iterator[tuple[str, messages.M]]:
        """The replies to one stage's questions; what is none costs its sender the stage."""
        if not questions:
            return
        timeout_s = min(self.timeout_s, self.offline_timeout_s)
        for name, content in books.asked(ask, questions, MessageType.TRAIN, timeout_s):
            with books_refusing(books, name):
                if set(content) != {wire.SECAGG}:
                    raise WireError("wrong_records", f"unknown records {[str(r)[:60] for r in list(content)[:3]]}")
                yield name, messages.from_fields(kind, dict(content.config_records[wire.SECAGG]))

    # ------------------------------------------------------------ what comes back

    def _collected(
        self,
        request: Request,
        cohort: Sequence[NodeInfo],
        sums: Sequence[KnownSum],
        groups: Mapping[tuple[str, ...], Any],
        books: _Books,
        *,
        base: Arrays,
    ) -> Collected:
        """Rows, counts and who is in them."""
        trains = request.purpose == "train"
        dim = Layout.of(base).dim
        updates_nd = np.empty((len(sums) if trains else 0, dim), np.float32)
        rows: list[Row] = []
        found: list[GroupSum] = []
        for known in sorted(sums, key=lambda s: s.survivors):
            try:
                weight = _read_sum(known, updates_nd[len(rows)] if trains else None)
            except SecAggError as error:
                self._lose(known.names, f"its sum cannot be that of honest members: {error.evidence}", books)
                found.append(GroupSum(known.group, known.names, lost=error.evidence, drawn=known.drawn))
                continue
            if trains:
                rows.append(Row(known.survivors, updates_nd[len(rows)], weight=weight))
            found.append(self._group(known, request, books.nodes))
        there = {name for group in found for name in group.members}
        for group in (g for g in groups if not there & set(g)):
            found.append(self._lost(group, books, drawn=groups[group] is not None))
        survivors = sorted({name for group in found for name in group.survivors})
        for name in survivors:
            if books.refusals.get(name, _NOTHING).reason in _EXCUSED:
                del books.refusals[name]  # silent when shares were asked for, but its vector is in the sum
        for node in cohort:
            if node.name not in survivors:
                books.refuse(node.name, "group_lost", "its group has no sum in this round")
        down = {node.name: books.down.get(node.name, 0) for node in cohort}
        up = {node.name: books.up.get(node.name, 0) for node in cohort}
        return Collected(
            updates_nd=updates_nd[: len(rows)],
            rows=tuple(rows),
            updates=tuple(
                Update(
                    n, None, 0, books.told.get(n, {}), size_bytes=up.get(n, 0), seconds=books.node_seconds.get(n, 0.0)
                )
                for n in survivors
            ),
            refusals=(*(books.refusals[name] for name in sorted(books.refusals)), *books.strays),
            bytes_up=sum(up.values()),
            bytes_down=sum(down.values()),
            seconds={},
            node_bytes={name: (down[name], up[name]) for name in down},
            node_seconds=books.node_seconds,
            groups=tuple(sorted(found, key=lambda group: group.members)),
        )

    def _lost(self, group: tuple[str, ...], books: _Books, *, drawn: bool) -> GroupSum:
        """A group without a sum, why, and whether a liar is to blame."""
        refusals = [books.refusals[name] for name in group if name in books.refusals]
        lied = any(r.reason in suspicion.LIES for r in refusals) or any(name in self._convicted for name in group)
        why = books.lost.get(group, "nobody of it was asked or answered")
        return GroupSum(self.pins[group[0]].group, group, lost=why, lost_to_liar=lied, drawn=drawn)

    def _group(self, known: KnownSum, request: Request, nodes: Mapping[str, NodeInfo]) -> GroupSum:
        """What is known of a group with a sum; counts that its registered rows cannot have are left out."""
        group = GroupSum(known.group, known.names, known.survivors, drawn=known.drawn)
        try:
            values = counts.decode(known.masking.counts, known.counts, num_members=len(known.survivors))
            by_split, others = counts.by_split(values)
            for split, found in by_split.items():
                problem = self._problem(split, found, known, request, nodes)
                if problem is not None:
                    raise SecAggError("counts", f"{split}: {problem}")
        except SecAggError as error:
            return replace(group, voided=error.evidence)
        return replace(group, counts=by_split, metrics=others)

    def _problem(
        self, split: str, found: Mapping[str, Any], known: KnownSum, request: Request, nodes: Mapping[str, NodeInfo]
    ) -> str | None:
        """Why no registered rows of the survivors can have these counts of a split, or None."""
        rows = int(found["rows"]) if "rows" in found else 0
        most = sum(_rows(nodes[name], request.purpose, self.max_examples) for name in known.survivors if name in nodes)
        if "rows" in found and rows > most:
            return f"{rows} rows, its survivors registered {most}"
        slack = len(known.survivors)
        for name, spec in (self.counts or {}).items():
            total, allowed = float(np.sum(found[name], dtype=np.float64)), spec.per_row * rows
            if "rows" in found and total > allowed * (1 + 1e-9) + slack * np.size(found[name]) * 2.0**-20:
                return f"{name} adds up to {total:.4g}, {rows} rows allow {allowed:.4g}"
        return self.counts_problem(dict(found)) if self.counts_problem is not None else None


@dataclass(frozen=True, slots=True)
class _Draw:
    """Groups that were drawn, with everybody's signed numbers."""

    epoch: str
    names: tuple[str, ...]
    entries: tuple[bytes, ...]
    groups: tuple[tuple[str, ...], ...]


class books_refusing:  # a context manager that reads as a clause: with books_refusing(books, name)
    """Whatever is wrong with a reply costs its sender its place, and never ends the round."""

    def __init__(self, books: _Books, name: str) -> None:
        self._books, self._name = books, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        if isinstance(error, SecAggError | WireError):
            self._books.refuse(self._name, error.code, error.evidence)
        else:
            self._books.refuse(self._name, "undecodable", f"{type(error).__name__}: {error}")
        return True


def _content(question: Stage) -> RecordDict:
    return RecordDict({wire.SECAGG: _record(question)})


def _record(message: Stage) -> ConfigRecord:
    return ConfigRecord({**messages.fields_of(message)})


def _masking(request: Request) -> Masking:
    assert request.masking is not None
    return request.masking


def _limits_of(cohort: Sequence[NodeInfo], default: int) -> Limits:
    """The most rows that any node registered: to train on, and of all."""
    examples = max((node.num_examples or 0 for node in cohort), default=0)
    return Limits(examples, max((_rows(node, "train", default) for node in cohort), default=0))


def _rows(node: NodeInfo, purpose: str, default: int) -> int:
    """The most rows that a node can have scored, or looked at for statistics."""
    registered = node.num_examples if purpose == "statistics" else node.num_rows
    return default if registered is None else registered


def _read_masked(content: RecordDict, request: Request) -> tuple[Signed, Any, Any]:
    """A masked reply taken apart: sizes and shapes from headers first.  Raises WireError."""
    masking = _masking(request)
    update = TensorSpec(wire.UPDATE, (masking.dim,), masking.dtype)
    words = TensorSpec(wire.COUNTS, (counts.size(masking.counts),), "uint64")
    most = update.num_bytes + words.num_bytes + 4 * wire.HEADER_BYTES + 4096
    if wire.size_bytes(content) > most:
        raise WireError("oversize", f"{wire.size_bytes(content)} bytes, at most {most} were asked for")
    if set(content) != {wire.ARRAYS, wire.REPLY}:
        raise WireError("wrong_records", f"records {sorted(str(r)[:60] for r in content)[:4]}: masked replies have two")
    said, arrays = content.config_records[wire.REPLY], content.array_records[wire.ARRAYS]
    told = {key for key in said if key not in wire.TOLD}
    if told != {wire.REQUEST, "payload", "signature"} or said[wire.REQUEST] != request.digest:
        raise WireError("wrong_request", f"the reply names request {str(said.get(wire.REQUEST))[:12]}")
    if set(arrays) != {wire.UPDATE, wire.COUNTS}:
        raise WireError(
            "wrong_keys", f"arrays {sorted(str(k)[:60] for k in arrays)[:4]}: an update and counts are needed"
        )
    payload, signature = said["payload"], said["signature"]
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        raise WireError("bad_signature", "the reply is not signed")
    decoded = [wire.decode(arrays[spec.name], spec) for spec in (update, words)]
    return Signed(payload, signature), decoded[0], decoded[1]


def _all_failed(known: KnownSum) -> bool:
    """Whether no survivor's app gave anything; not where the counts cannot be believed."""
    try:
        found = counts.decode(known.masking.counts, known.counts, num_members=len(known.survivors))
    except SecAggError:
        return False
    return int(found.get(counts.FAILED, 0)) >= len(known.survivors)


def _read_sum(known: KnownSum, out: Any) -> float:
    """A group's mean into `out`, its weight back.  Raises SecAggError where honest members cannot have such a sum."""
    masking, num_survivors = known.masking, len(known.survivors)
    weight_of = dict(zip(masking.members, masking.weights, strict=True))
    weight = sum(weight_of[name] for name in known.survivors)
    if out is None:
        return float(weight)
    # who failed sent zeros, and counts: a number of failures that a liar may choose would let it scale the mean
    if weight <= 0:
        raise SecAggError("num_examples", "its survivors registered no rows: their weight is 0")
    if _all_failed(known):
        raise SecAggError("error_reply", "its survivors failed, every one of them")
    most = quantise.largest_sum(weight, masking.clip_norm, masking.scale, num_survivors)
    out[:] = quantise.dequantise(
        known.update, scale=masking.scale, total_weight=weight, num_members=num_survivors, most=most
    )
    rounding = float(np.sqrt(masking.dim)) * num_survivors / (masking.scale * weight)
    length = norm(out)
    if length > masking.clip_norm * (1 + SLACK) + rounding:
        raise SecAggError("norm", f"its mean has norm {length:.3g}, members clip to {masking.clip_norm:.3g}")
    return float(weight)
