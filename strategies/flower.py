"""The one Strategy: a round, from who is asked to what is recorded.

    sampler -> exchange (ask, check) -> pre-aggregators -> rule -> server optimizer -> observers -> record

`RoundStrategy` is a real `flwr.serverapp.strategy.Strategy`: Flower's own loop can drive it (`configure_train`,
`aggregate_train`) and it aggregates anyone's ClientApp.  `start` is ours: one message a node and round, resume, rounds
that close without a step.  A bad reply costs its sender the round; too few left close the round and the model stays.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies import records, rules, samplers, server_optimizers
from strategies.aggregation import Pipeline
from strategies.exchange import Ask, Clock, Exchange, PlainExchange, WallClock, door
from strategies.exchange_secagg import SecAggExchange
from strategies.grouping import Groups
from strategies.observers import regrouping, suspicion
from strategies.rows import Rows
from trellis import canonical, wire
from trellis.errors import CohortTooSmall, ConfigError, NotFinite
from trellis.types import (
    Aggregated,
    Collected,
    NodeInfo,
    Observer,
    PreAggregatorSpec,
    Refusal,
    Request,
    Role,
    RoundRecord,
    RoundView,
    Row,
    RuleSpec,
    ServerState,
    Update,
)
from trellis.vectors import Layout, Vector, digest, norm

Commit = Callable[[ServerState, RoundRecord], None]
"""Called once a round, with the state after it: what makes the round durable."""


@dataclass(slots=True)
class RoundStrategy(Strategy):
    """A configured round.  Everything is a value or a pure function; state lives in `ServerState`."""

    rule: RuleSpec = field(default_factory=lambda: rules.get("mean"))
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    num_byzantine: int = 0
    weighted: bool = False
    """Rows weigh what the registry holds for their nodes; else all the same."""
    sampler: samplers.Sampler = samplers.everyone
    exchange: Exchange = field(default_factory=lambda: PlainExchange(native=False))
    preaggregators: Sequence[PreAggregatorSpec] = ()
    server_optimizer: server_optimizers.ServerOptimizer = field(default_factory=server_optimizers.plain)
    observers: Mapping[str, Observer] = field(default_factory=dict)
    suspicion: suspicion.Suspicion | None = None
    """The observer whose word counts: nodes that it quarantines are asked no more."""
    reference: Callable[[ServerState], Vector] | None = None
    """The server's own update from a state's params, for rules that need it."""
    device: str = "cpu"
    """Where rules compute: cpu is numpy, anything else a device of torch."""
    scoring: records.Scoring | None = None
    min_replies: int = 1
    """Nodes that must be behind the rows of a round."""
    groups: Groups | None = None
    """Under secure aggregation: a row is a group's."""
    cohort_rounds: int = 1
    """Rounds that a drawn cohort is asked for: an epoch of secure aggregation."""
    measures: bool = True
    """Whether nodes score the params they are sent: under differential privacy exact scores do not leave them."""
    tunes: bool = False
    """Whether nodes that train also test the last version fine-tuned on their own rows."""
    node_config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Of the draws of `start` and of Flower's own loop; `run` takes the state's.  Their nodes have no names, so a
    sampled cohort still differs from run to run: Flower draws node ids anew."""
    clock: Clock = field(default_factory=WallClock)
    now: Callable[[], float] = time.time
    """Wall-clock time, for the records only."""
    commit: Commit | None = None
    _open: tuple[Request, list[NodeInfo], ServerState] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rules.require(self.rule, self.num_byzantine, self.rule_options)
        self.pipeline.require_names(weighted=self.weighted)

    # ------------------------------------------------------------ our loop

    def run(self, grid: Grid, state: ServerState, nodes: Sequence[NodeInfo], *, rounds: int) -> ServerState:
        """Train from `state` up to round `rounds`, then evaluate the last version once.  -> the last state."""
        ask = door(grid, self.clock)
        if isinstance(self.exchange, SecAggExchange):
            self.exchange.register(nodes)
        while state.round < rounds:
            state, record = self.round(state, nodes, ask)
            self._commit(state, record)
            if records.exhausted(record, [n.name for n in nodes if n.role is Role.train]):
                break  # nobody has any budget left: the last model is the result
        if self.measures:
            state, record = self.close(state, nodes, ask)
            self._commit(state, record)
        return state

    def round(self, state: ServerState, nodes: Sequence[NodeInfo], ask: Ask) -> tuple[ServerState, RoundRecord]:
        """One round.  Version `state.round` is sent and measured, version `state.round + 1` comes out."""
        started_at, started = self.now(), time.perf_counter()
        quarantined = self._quarantined(state)
        trainers = [n for n in nodes if n.role is Role.train and n.name not in quarantined]
        judges = [n for n in nodes if n.role is Role.validation and n.name not in quarantined]
        cohort = self._cohort(state, trainers)
        # of those asked, not of those who answered: who keeps others from answering must not lower it
        num_byzantine = self._tolerated(len(cohort), self._num_caught(state, nodes))
        request = self.request(state, cohort)
        collected = self.exchange.collect(request, cohort, ask, base=state.params)
        # a liar that was named went with its group
        num_byzantine = max(num_byzantine - collected.liars_out, 0)
        judged = self._judge(state, judges, ask, splits=("validation",)) if judges and self.measures else None

        stepped = time.perf_counter()
        after, aggregated, closed = self._step(state, collected, num_byzantine)
        view = self._view(state, nodes, cohort, collected, judged, aggregated)
        after, findings = self._observe(after, view)
        record = records.record(request, state, after, cohort, collected, judged, self.scoring, started_at)
        after = replace(after, best=records.best(self.scoring, state, record))
        seconds = {
            **collected.seconds,
            "evaluation": sum(judged.seconds.values()) if judged else 0.0,
            "aggregation": time.perf_counter() - stepped,
            "total": time.perf_counter() - started,
        }
        return after, replace(
            record,
            closed=closed,
            aggregate_norm=norm(aggregated.update_d) if aggregated else 0.0,
            weights=records.weights(collected, aggregated),
            findings={**findings, **records.masked_findings(collected)},
            suspicion=self.suspicion.llr(after.observers.get(suspicion.NAME)) if self.suspicion else {},
            quarantined=self._quarantined(after),
            seconds=seconds,
        )

    def close(self, state: ServerState, nodes: Sequence[NodeInfo], ask: Ask) -> tuple[ServerState, RoundRecord]:
        """The closing evaluation: the last version on validation and test rows.  The model does not move."""
        started_at = self.now()
        held_out, quarantined = [n for n in nodes if n.role is not Role.train], self._quarantined(state)
        cohort = sorted((n for n in held_out or nodes if n.name not in quarantined), key=lambda n: n.name)
        splits = ("validation", "test", "test_tuned") if self.tunes else ("validation", "test")
        judged = self._judge(state, cohort, ask, splits=splits)
        request = self.request(state, cohort, purpose="evaluate", splits=splits)
        record = records.record(request, state, state, cohort, judged, None, self.scoring, started_at)
        lost = [group for group in judged.groups or () if group.lost is not None]
        closed = f"no sum of {lost[0].name}: {lost[0].lost}" if lost and not judged.updates else None
        record = replace(record, closed=closed, seconds={**judged.seconds, "total": sum(judged.seconds.values())})
        return replace(state, best=records.best(self.scoring, state, record)), record

    def request(
        self,
        state: ServerState,
        cohort: Sequence[NodeInfo],
        *,
        purpose: str = "train",
        splits: tuple[str, ...] = ("validation",),
    ) -> Request:
        """What the next round asks of its members."""
        return Request(
            run=state.run,
            round=state.round + 1,
            purpose="train" if purpose == "train" else "evaluate",
            base=digest(state.params),
            config=self.node_config,
            members=tuple(n.name for n in cohort),
            splits=splits if self.measures else (),
        )

    def _cohort(self, state: ServerState, trainers: Sequence[NodeInfo]) -> list[NodeInfo]:
        """Who is asked.  Under secure aggregation whole groups are drawn, for as long as their keys last."""
        if self.groups is None or self.sampler is samplers.everyone:
            return self.sampler(self._rng(state, "cohort"), trainers)
        epoch = state.round // self.cohort_rounds
        rng = np.random.default_rng(canonical.seed_for(state.seed, "cohort", epoch))
        return samplers.whole_groups(self.sampler, rng, trainers)

    def _judge(self, state: ServerState, cohort: Sequence[NodeInfo], ask: Ask, *, splits: tuple[str, ...]) -> Collected:
        request = self.request(state, cohort, purpose="evaluate", splits=splits)
        return self.exchange.collect(request, cohort, ask, base=state.params)

    def _step(
        self, state: ServerState, collected: Collected, num_byzantine: int | None = None
    ) -> tuple[ServerState, Aggregated | None, str | None]:
        """The model's move, or the reason why there is none."""
        try:
            aggregated = self.aggregate(state, collected, num_byzantine)
        except (CohortTooSmall, NotFinite) as error:
            return replace(state, round=state.round + 1), None, str(error)
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
            # rows that a rule cannot digest cost the round, not the run
            failed = f"rule={self.rule.name} failed: {type(error).__name__}: {error}"
            return replace(state, round=state.round + 1), None, failed
        optimizer, step_d = self.server_optimizer(state.optimizer, aggregated.update_d)
        params = Layout.of(state.params).apply(state.params, step_d)
        if not all(np.isfinite(a).all() for a in params.values() if np.issubdtype(a.dtype, np.floating)):
            return replace(state, round=state.round + 1), aggregated, "the step would make params NaN or infinite"
        after = replace(state, round=state.round + 1, params=params, optimizer=optimizer)
        return (replace(after, rule=aggregated.state) if aggregated.state is not None else after), aggregated, None

    @property
    def pipeline(self) -> Pipeline:
        """Pre-aggregators and rule, as one function of rows."""
        return Pipeline(self.rule, self.rule_options, self.preaggregators)

    def aggregate(self, state: ServerState, collected: Collected, num_byzantine: int | None = None) -> Aggregated:
        """Rows -> one update, that survives `num_byzantine` liars (None: as many as configured).

        Raises CohortTooSmall when quorum or rule need more rows.
        """
        found = sum(len(row.members) for row in collected.rows)
        if found < self.min_replies:
            raise CohortTooSmall(f"{found} good replies, {self.min_replies} are needed: min_replies={self.min_replies}")
        if self.weighted and not any(row.weight for row in collected.rows):
            raise CohortTooSmall(f"{found} good replies, but their nodes registered no rows: every weight is 0")
        reference = self.reference
        offers: dict[str, Callable[[], Any]] = {
            "rng": lambda: self._rng(state, "rule", state.secret),
            "names": lambda: [row.members for row in collected.rows],
            "weights": lambda: self._weights(collected.rows),
            "state": lambda: state.rule,
            **({"reference_d": lambda: reference(state)} if reference else {}),
        }
        liars = self.num_byzantine if num_byzantine is None else num_byzantine
        return self.pipeline(self._rows(collected), num_byzantine=liars, offers=offers)

    def _weights(self, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """What rows weigh: what was registered, or as many as they are of; None: all the same."""
        masked = any(len(row.members) > 1 for row in rows)
        return np.array([row.weight for row in rows], np.float64) if self.weighted or masked else None

    def _rows(self, collected: Collected) -> Rows:
        return Rows(collected.updates_nd, device=None if self.device == "cpu" else self.device)

    # ------------------------------------------------------------ who is believed

    def _quarantined(self, state: ServerState) -> dict[str, str]:
        """Nodes that are asked no more, each with the evidence."""
        return self.suspicion.quarantined(state.observers.get(suspicion.NAME)) if self.suspicion else {}

    def _tolerated(self, cohort_size: int, num_caught: int) -> int:
        """Liars that a round of so many nodes must survive: f, or as few less as it takes, by `num_caught` at most.

        f where even that does not fit: the round then closes.
        """
        least = max(self.num_byzantine - num_caught, 0)
        fitting = (f for f in range(self.num_byzantine, least - 1, -1) if self._fits(cohort_size, f))
        return next(fitting, self.num_byzantine)

    def _num_caught(self, state: ServerState, nodes: Sequence[NodeInfo]) -> int:
        """Liars of a cohort that are out for certain.

        Caught lying, not only looking unusual; and none where cohorts are drawn: as many liars may be drawn as before.
        """
        if self.suspicion is None or self.sampler is not samplers.everyone:
            return 0
        judges = {n.name for n in nodes if n.role is not Role.train}
        return len(self.suspicion.caught_lying(state.observers.get(suspicion.NAME)) - judges)

    def _fits(self, cohort_size: int, num_byzantine: int) -> bool:
        rows = cohort_size if self.groups is None else self.groups.num_rows(cohort_size)
        try:
            self.pipeline.require_rows(rows, num_byzantine)
        except CohortTooSmall:
            return False
        return cohort_size >= self.min_replies

    def _view(
        self,
        state: ServerState,
        nodes: Sequence[NodeInfo],
        cohort: Sequence[NodeInfo],
        collected: Collected,
        judged: Collected | None,
        aggregated: Aggregated | None,
    ) -> RoundView:
        num_byzantine = self._tolerated(len(cohort), self._num_caught(state, nodes))

        def fits(num_more: int) -> bool:
            return self._fits(len(cohort) - num_more, num_byzantine)

        many = [collected, judged] if judged else [collected]
        view = RoundView(
            round=state.round + 1,
            rows=collected.rows,
            aggregated=aggregated,
            refusals=tuple(refusal for each in many for refusal in each.refusals),
            base=state.params,
            # a reply that is masked says nothing for its node
            answered=tuple(sorted(u.node for each in many if each.groups is None for u in each.updates)),
            updates_nd=self._rows(collected),
            fits=fits,
        )
        return replace(view, evidence=self._evidence(view, collected, num_byzantine))

    def _evidence(self, view: RoundView, collected: Collected, num_byzantine: int) -> dict[str, float]:
        """What groups that were drawn for this round say of their members, as a log-likelihood ratio each."""
        drawn = [group for group in collected.groups or () if group.drawn]
        of = {group.survivors: group.members for group in drawn}
        groups = [of[row.members] for row in view.rows if row.members in of]
        if self.suspicion is None or not groups or len(groups) < len(view.rows):
            return {}
        num_nodes, liars = sum(len(group.members) for group in drawn), max(self.num_byzantine, 1)
        # what one liar adds to a mean of g is g times shorter, what honest nodes differ by only sqrt(g) times
        factor = self.suspicion.outlier_factor / math.sqrt(num_nodes / len(drawn))
        found = regrouping.flagged_groups(view, num_byzantine=max(num_byzantine, 1), outlier_factor=factor)
        test = regrouping.GroupTest(1 - self.suspicion.liar_flag_rate, self.suspicion.honest_flag_rate)
        evidence = regrouping.evidence(groups, set(found), num_nodes=num_nodes, num_byzantine=liars, test=test)
        answered = {name for row in view.rows for name in row.members}
        return {name: llr for name, llr in evidence.items() if name in answered}

    def _observe(self, after: ServerState, view: RoundView) -> tuple[ServerState, dict[str, float]]:
        states, findings = dict(after.observers), dict[str, float]()
        detector: Mapping[str, Observer] = {suspicion.NAME: self.suspicion} if self.suspicion else {}
        for name, observe in {**self.observers, **detector}.items():
            states[name], found = observe(states.get(name), view)
            findings.update({f"{name}/{key}": value for key, value in found.items()})
        return replace(after, observers=states), findings

    def _rng(self, state: ServerState, *purpose: str) -> np.random.Generator:
        return np.random.default_rng(canonical.seed_for(state.seed, *purpose, state.round + 1))

    def _commit(self, state: ServerState, record: RoundRecord) -> None:
        if self.commit is not None:
            self.commit(state, record)

    # ------------------------------------------------------------ Flower's Strategy

    def summary(self) -> None:
        """One line of log."""
        log(INFO, "RoundStrategy: rule %s, num_byzantine %d", self.rule.name, self.num_byzantine)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's entry point, for anyone's ClientApp: `strategy.start(grid, initial_arrays, num_rounds)`.

        Metrics of a round's replies are averaged over nodes, unweighted, where every node reports them.  The last
        model is evaluated once, at the end: `evaluate_metrics_clientapp[num_rounds]`.
        """
        # a simulated Grid keeps its own time
        clock = getattr(grid, "clock", self.clock)
        strategy = replace(self, exchange=_sending(self.exchange, train_config, timeout), clock=clock)
        closing = replace(strategy, exchange=_sending(self.exchange, evaluate_config, timeout))
        params = wire.from_record(initial_arrays)
        state = ServerState(run="flower", seed=self.seed, round=0, params=params, secret=fresh_secret(grid))
        result = Result()
        ask = door(grid, clock)
        if evaluate_fn and (first := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = first
        while state.round < num_rounds:
            state, record = strategy.round(state, strategy._nodes(grid, ask), ask)
            strategy._commit(state, record)
            _log_refusals(state.round, record.refusals)
            result.arrays = wire.to_record(state.params)
            result.train_metrics_clientapp[state.round] = _metric_record(record.base_metrics)
            if evaluate_fn and (found := evaluate_fn(state.round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[state.round] = found
        if state.round:
            state, record = closing.close(state, strategy._nodes(grid, ask), ask)
            strategy._commit(state, record)
            _log_refusals(state.round, record.refusals)
            result.evaluate_metrics_clientapp[state.round] = _metric_record(record.base_metrics)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A round's messages, for Flower's own loop."""
        exchange = replace(self._plain(), config=_merged(self._plain(), config))
        state = ServerState(run="flower", seed=self.seed, round=server_round - 1, params=wire.from_record(arrays))
        state = replace(state, secret=fresh_secret(grid))
        # the optimizer's and the rule's memory live on from round to round, not from run to run
        if self._open is not None and server_round > 1:
            state = replace(self._open[2], round=server_round - 1, params=state.params)
        cohort = self.sampler(self._rng(state, "cohort"), self._connected(grid))
        request = self.request(state, cohort)
        self._open = (request, cohort, state)
        return exchange.messages(request, cohort, arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, aggregate, step.  (None, None) when the round closes: Flower keeps its arrays."""
        if self._open is None or self._open[0].round != server_round:
            raise ConfigError(f"aggregate_train({server_round}) came before configure_train({server_round})")
        request, cohort, state = self._open
        collected = self._plain().read(request, cohort, replies, base=state.params)
        _log_refusals(server_round, collected.refusals)
        after, _, closed = self._step(state, collected)
        self._open = (request, cohort, after)
        if closed:
            log(INFO, "round %d closed, the model stays: %s", server_round, closed)
            return None, None
        return wire.to_record(after.params), _metric_record(records.mean_metrics(collected.updates))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation messages for Flower's own loop; `run` needs none, its evaluation rides on training."""
        exchange = replace(self._plain(), config=_merged(self._plain(), config))
        nodes = self._connected(grid)
        base = wire.from_record(arrays)
        state = ServerState(run="flower", seed=self.seed, round=server_round - 1, params=base)
        messages = exchange.messages(self.request(state, nodes, purpose="evaluate"), nodes, arrays)
        assert all(m.metadata.message_type == MessageType.EVALUATE for m in messages)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Unweighted mean over nodes of every metric that is finite and reported by all."""
        good = [r.content for r in replies if r.has_content() and len(r.content.metric_records) == 1]
        many = [dict(next(iter(c.metric_records.values()))) for c in good]
        updates = [Update("", None, 0, records.finite_scalars(metrics)) for metrics in many]
        means = records.mean_metrics(updates)
        means.pop(wire.NUM_EXAMPLES, None)
        return _metric_record(means) if updates else None

    def _plain(self) -> PlainExchange:
        if not isinstance(self.exchange, PlainExchange):
            raise ConfigError("Flower's own loop sends one message a round; call `start` for this exchange")
        return self.exchange

    def _nodes(self, grid: Grid, ask: Ask) -> list[NodeInfo]:
        """The connected nodes: by id, or by the names that they sign where the exchange must know them."""
        connected = self._connected(grid)
        if not isinstance(self.exchange, SecAggExchange):
            return connected
        return self.exchange.named([node.node_id for node in connected], ask)

    def _connected(self, grid: Grid) -> list[NodeInfo]:
        """Nodes by id, for apps without names.

        Waits for as many as a round needs, `timeout_s` of the exchange at most: with fewer the round closes.
        """
        timeout_s = getattr(self.exchange, "timeout_s", 3600.0)
        # both clocks: virtual time passes while this process waits, a stopped one never does
        ends, ends_s = self.clock.now() + timeout_s, time.monotonic() + timeout_s
        nodes = _numbered(grid)
        while not self._enough(nodes) and self.clock.now() < ends and time.monotonic() < ends_s:
            self.clock.sleep(0.5, until=ends)
            nodes = _numbered(grid)
        return nodes

    def _enough(self, nodes: Sequence[NodeInfo]) -> bool:
        return self._fits(len(self.sampler(np.random.default_rng(0), nodes)), self.num_byzantine)


def _numbered(grid: Grid) -> list[NodeInfo]:
    """The connected nodes, named by their ids."""
    return [NodeInfo(f"{node_id:020d}", node_id) for node_id in sorted(grid.get_node_ids())]


def fresh_secret(grid: Grid) -> str:
    """A run's secret, from the OS; none in simulation."""
    simulated = hasattr(grid, "clock") or wire.runs_on_ray(grid)
    return "" if simulated else secrets.token_hex(32)


def _sending(exchange: Exchange, config: ConfigRecord | None, timeout: float) -> Exchange:
    if not isinstance(exchange, PlainExchange):
        return exchange
    return replace(exchange, timeout_s=timeout, config=_merged(exchange, config))


def _log_refusals(round_: int, refusals: Iterable[Refusal]) -> None:
    for refusal in refusals:
        log(INFO, "round %d: refused %s: %s, %s", round_, refusal.node, refusal.reason, refusal.evidence)


def _merged(exchange: PlainExchange, config: ConfigRecord | None) -> dict[str, Any]:
    return {**exchange.config, **dict(config or {})}


def _metric_record(metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({**metrics})
