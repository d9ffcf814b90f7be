"""A typed configuration -> the objects of a run.  The only place where names become things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

import sectors
from conf.load import choices
from conf.schema import DataSource, EngineName, NodeTask, RunConfig, sector_options, to_json
from sectors.base import Sector
from server import masking, statistics
from server.reference import reference
from strategies import preaggregators, rules, samplers, server_optimizers
from strategies.aggregation import Pipeline
from strategies.checks import CountsProblem
from strategies.exchange import Clock, Exchange, PlainExchange
from strategies.flower import Commit, RoundStrategy
from strategies.observers.suspicion import Suspicion
from strategies.records import Scoring
from trellis import wire
from trellis.errors import CohortTooSmall, ConfigError
from trellis.types import Counts, Role, RuleSpec
from trellis.vectors import CountSpec


def check(config: RunConfig) -> Sector:
    """Every promise between fields, before anything starts.  -> the sector.

    Raises ConfigError with the numbers; DataError where the server's own rows cannot be read.
    """
    sector = build_sector(config)
    rule = rules.get(config.rule.name)
    _sampler(config)
    _server_optimizer(config)
    _check_catalogues(config)
    _check_attackers(config)
    _check_engine(config)
    _check_device(config.device)
    rules.require(rule, config.num_byzantine, config.rule.options)
    masking.check(config)
    _check_cohort(config)
    _check_weighted(config, rule)
    _check_server_rows(config, sector)
    _check_suspicion(config)
    if config.privacy.name.trains_privately:
        _check_private(config, sector)
    return sector


def build_sector(config: RunConfig) -> Sector:
    """The run's sector.  Raises ConfigError where a layer that is to stay local is none of its model's."""
    sector = sectors.get(config.sector.name, sector_options(config))
    if sector.local_layers:
        _check_local_layers(sector)
    return sector


def _check_local_layers(sector: Sector) -> None:
    """Every pattern fits a tensor; some tensors stay at the nodes and some are shared."""
    names = list(sector.build_model().state_dict())
    idle = [p for p in sector.local_patterns() if not any(fnmatchcase(name, p) for name in names)]
    local = sum(sector.is_local(name) for name in names)
    if idle or local in (0, len(names)):
        wrong = f"{', '.join(map(repr, idle))} fits no tensor" if idle else "nothing would be shared"
        raise ConfigError(
            f"heterogeneity.local_layers={list(sector.local_layers)}: {wrong} of sector {sector.name}; its tensors are "
            f"{', '.join(names)}, its head is {', '.join(sector.head) or 'not named'}"
        )


def strategy(
    config: RunConfig,
    sector: Sector,
    *,
    clock: Clock,
    commit: Commit,
    scratch: Path | None = None,
    simulated: bool = True,
) -> RoundStrategy:
    """The run's strategy.  `check` has passed.

    A matrix too large for memory, and sums that nobody gives twice, lie in the folder `scratch`.
    """
    masked = masking.plan_of(config) if config.privacy.name.masks else None
    return RoundStrategy(
        rule=rules.get(config.rule.name),
        rule_options=config.rule.options,
        preaggregators=pipeline(config).preaggregators,
        device=config.device,
        num_byzantine=config.num_byzantine,
        weighted=config.rule.weighted,
        sampler=_sampler(config),
        exchange=exchange(config, sector.all_counts(), sector.counts_problem, clock, scratch, simulated=simulated),
        groups=masked.rows if masked is not None else None,
        cohort_rounds=config.privacy.secagg.num_keys,
        reference=reference(config, sector) if _needs_reference(config) else None,
        server_optimizer=_server_optimizer(config),
        suspicion=_suspicion(config),
        scoring=scoring(sector),
        measures=not config.privacy.name.trains_privately,
        min_replies=config.min_replies,
        tunes=config.heterogeneity.fine_tune_epochs > 0,
        node_config=to_json(NodeTask.of(config)),
        clock=clock,
        commit=commit,
    )


def exchange(
    config: RunConfig,
    counts: Mapping[str, CountSpec],
    problem: CountsProblem,
    clock: Clock,
    scratch: Path | None = None,
    *,
    simulated: bool = True,
) -> Exchange:
    """How the run's messages travel; `counts` are what a reply has of a split, `problem` why rows cannot have them."""
    if config.privacy.name.masks:
        return masking.exchange(config, counts, problem, clock, scratch, simulated=simulated)
    return PlainExchange(
        native=True,
        timeout_s=config.round_timeout_s,
        max_update_norm=config.checks.max_update_norm,
        counts=counts,
        counts_problem=problem,
        metrics=frozenset({"train/loss", *wire.TOLD}),
        clock=clock,
        max_matrix_bytes=int(config.checks.max_matrix_mb * 2**20),
        scratch=scratch,
    )


def pipeline(config: RunConfig) -> Pipeline:
    """The run's pre-aggregators and rule, as one function of rows."""
    before = [preaggregators.get(each.name, each.options) for each in config.preaggregator]
    return Pipeline(rules.get(config.rule.name), config.rule.options, before)


def scoring(sector: Sector) -> Scoring:
    """The sector's metrics and the mean loss, from summed counts."""

    def metrics(counts: Counts) -> Mapping[str, float]:
        rows = int(counts["rows"])
        own = {k: v for k, v in counts.items() if k not in ("rows", "loss_sum")}
        return {**sector.metrics(own), **({"loss": float(counts["loss_sum"]) / rows} if rows else {})}

    return Scoring(metrics, sector.primary)


def _sampler(config: RunConfig) -> samplers.Sampler:
    s = config.sampler
    return samplers.get(s.name, fraction=s.fraction, min_nodes=s.min_nodes)


def _server_optimizer(config: RunConfig) -> server_optimizers.ServerOptimizer:
    o = config.server_optimizer
    return server_optimizers.get(o.name, lr=o.lr, momentum=o.momentum, beta1=o.beta1, beta2=o.beta2, tau=o.tau)


def _suspicion(config: RunConfig) -> Suspicion | None:
    s = config.suspicion
    if s.name == "none":
        return None
    return Suspicion(
        num_nodes=len(config.nodes.expand()),
        num_byzantine=config.num_byzantine,
        alpha=s.alpha,
        horizon=s.horizon,
        honest_flag_rate=s.honest_flag_rate,
        liar_flag_rate=s.liar_flag_rate,
        outlier_factor=s.outlier_factor,
        released=frozenset(s.released),
    )


def _check_suspicion(config: RunConfig) -> None:
    """A detector that exists, and released nodes that do."""
    if config.suspicion.name not in choices("suspicion"):
        known = ", ".join(choices("suspicion"))
        raise ConfigError(f"suspicion={config.suspicion.name} does not exist; choose one of: {known}")
    if config.suspicion.name == "none" and config.suspicion.released:
        raise ConfigError("suspicion.released is for a run with suspicion=sequential: nobody is quarantined without it")
    names = [spec.name for spec in config.nodes.expand()]
    if odd := sorted(set(config.suspicion.released) - set(names)):
        raise ConfigError(
            f"suspicion.released: {', '.join(odd)} are no nodes of nodes={config.nodes.name}; "
            f"its nodes are: {', '.join(names)}"
        )


def _check_catalogues(config: RunConfig) -> None:
    """What a user configured is never skipped: only what exists can be asked for."""
    if config.privacy.name not in choices("privacy"):
        raise ConfigError(
            f"privacy={config.privacy.name} does not exist; choose one of: {', '.join(choices('privacy'))}"
        )
    if config.attack.name not in choices("attack"):
        known = ", ".join(choices("attack"))
        raise ConfigError(f"attack={config.attack.name} does not exist; choose one of: {known}")


def _check_attackers(config: RunConfig) -> None:
    """An attack is carried out by as many training nodes as the config says, or by those it names."""
    attack = config.attack
    if attack.name == "none":
        return
    trainers = {spec.name for spec in config.nodes.expand() if spec.role is Role.train}
    if odd := sorted(set(attack.nodes) - trainers):
        raise ConfigError(f"attack.nodes: {', '.join(odd)} are no training nodes of nodes={config.nodes.name}")
    number = len(set(attack.nodes)) or attack.num_attackers or config.num_byzantine
    if not number:
        raise ConfigError(f"attack={attack.name} with num_byzantine=0 attacks nobody: set attack.num_attackers")
    if number > len(trainers):
        raise ConfigError(f"attack={attack.name} on {number} nodes, but there are {len(trainers)} training nodes")


def _check_engine(config: RunConfig) -> None:
    """What a user configured is never skipped: Flower's engine keeps no time."""
    if config.engine.name is EngineName.ray and config.engine.links:
        raise ConfigError("engine=ray obeys no links: set engine.links=false, or engine=local")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={device} cannot be used here ({str(error).splitlines()[0]}): try device=cpu"
        ) from error


def _check_private(config: RunConfig, sector: Sector) -> None:
    """Refuse what cannot be private, with every reason at once."""
    from sectors import private

    found = private.problems(sector)
    if sector.statistic_specs() and not statistics.given(config, sector):
        names = ", ".join(f"sector.options.{name}" for name in sector.fitted_options)
        found.append(f"it is fitted on exact statistics of nodes' rows: give constants instead ({names})")
    if config.heterogeneity.fine_tune_epochs:
        found.append("heterogeneity.fine_tune_epochs scores models tuned on single nodes' rows: set it to 0")
    if found:
        raise ConfigError(f"privacy={config.privacy.name}, sector={sector.name}: " + "; ".join(found))


def _check_weighted(config: RunConfig, rule: RuleSpec) -> None:
    if config.rule.weighted and "weights" not in rule.needs:
        raise ConfigError(f"rule={rule.name} weighs no rows: set rule.weighted=false")


def _needs_reference(config: RunConfig) -> bool:
    line = pipeline(config)
    return any("reference_d" in needs for needs in (line.rule.needs, *(spec.needs for spec in line.preaggregators)))


def _check_server_rows(config: RunConfig, sector: Sector) -> None:
    """Refuse a rule that trusts the server's rows where it has none, or they cannot be read."""
    if not _needs_reference(config):
        return
    if sector.server_data == "none":
        raise ConfigError(
            f"rule={config.rule.name} needs rows of the server's own: set sector.options.server_fraction=0.02, or "
            "sector.options.server_path to a file in the sector's format"
        )
    sector.server_rows(config.data is DataSource.synthetic)


def _check_cohort(config: RunConfig) -> None:
    """Refuse what no cohort can satisfy, and options that no rule takes: everything is tried once, on numbers."""
    trainers = [s for s in config.nodes.expand() if s.role is Role.train]
    size = len(trainers)
    if config.sampler.name != "all":
        size = samplers.cohort_size(size, config.sampler.fraction, config.sampler.min_nodes)
    line = pipeline(config)
    try:
        if size < config.min_replies:
            raise CohortTooSmall(f"{config.min_replies} are needed: min_replies={config.min_replies}")
        if config.privacy.name.masks:
            size = masking.require_rows(config, line)
        line.require_rows(size, config.num_byzantine)
        line.require_names(weighted=config.rule.weighted)
        _check_selected(config, line.num_rows(size))
        _rehearse(line, size, config.num_byzantine)
    except CohortTooSmall as error:
        raise ConfigError(
            f"a cohort has at most {size} of {len(trainers)} training nodes: {error}; "
            "take more nodes, a larger sampler.fraction, or a smaller num_byzantine"
        ) from error


def _check_selected(config: RunConfig, num_rows: int) -> None:
    """Refuse to select more rows than there are honest ones, where nobody is away."""
    wanted, most = config.rule.options.get("num_selected"), num_rows - config.num_byzantine
    if isinstance(wanted, int) and wanted > most:
        raise ConfigError(
            f"rule.options.num_selected={wanted}: with {num_rows} rows and num_byzantine={config.num_byzantine} at "
            f"most {most} can be selected"
        )


def _rehearse(line: Pipeline, num_rows: int, num_byzantine: int) -> None:
    """Run the pipeline on a few numbers.  Raises ConfigError when its options are not what it takes."""
    rng = np.random.default_rng(0)
    offers: dict[str, Callable[[], Any]] = {
        "rng": lambda: rng,
        "names": lambda: [(str(i),) for i in range(num_rows)],
        "weights": lambda: None,
        "state": dict,
        "reference_d": lambda: np.ones(8, np.float32),
    }
    try:
        line(rng.standard_normal((num_rows, 8)).astype(np.float32), num_byzantine=num_byzantine, offers=offers)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        named = ", ".join([*(spec.name for spec in line.preaggregators), line.rule.name])
        raise ConfigError(f"the options of {named} cannot be used: {error}") from error
