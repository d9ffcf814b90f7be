"""A typed configuration -> the objects of a run.  The only place where names become things."""

from __future__ import annotations

from collections.abc import Mapping

import sectors
from conf.schema import NodeTask, RunConfig, to_json
from sectors.base import Sector
from strategies import rules, samplers, server_optimizers
from strategies.exchange import Clock, PlainExchange
from strategies.flower import Commit, RoundStrategy
from strategies.records import Scoring
from trellis.errors import ConfigError
from trellis.types import Counts, Role, RuleSpec


def check(config: RunConfig) -> Sector:
    """Every promise between fields, before anything starts.  -> the sector.  Raises ConfigError with the numbers."""
    sector = build_sector(config)
    rule = rules.get(config.rule.name)
    _sampler(config)
    _server_optimizer(config)
    _check_catalogues(config)
    _check_device(config.device)
    rules.require(rule, config.num_byzantine, config.rule.options)
    _check_cohort(config, rule)
    return sector


def build_sector(config: RunConfig) -> Sector:
    return sectors.get(config.sector.name, config.sector.options)


def strategy(config: RunConfig, sector: Sector, *, clock: Clock, commit: Commit) -> RoundStrategy:
    """The run's strategy.  `check` has passed."""
    return RoundStrategy(
        rule=rules.get(config.rule.name),
        rule_options=config.rule.options,
        num_byzantine=config.num_byzantine,
        weighted=config.rule.weighted,
        sampler=_sampler(config),
        exchange=PlainExchange(
            native=True,
            timeout_s=config.round_timeout_s,
            max_update_norm=config.checks.max_update_norm,
            counts=sector.all_counts(),
            metrics=frozenset({"train/loss"}),
        ),
        server_optimizer=_server_optimizer(config),
        scoring=scoring(sector),
        min_replies=config.min_replies,
        node_config=to_json(NodeTask.of(config)),
        clock=clock,
        commit=commit,
    )


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


def _check_catalogues(config: RunConfig) -> None:
    """What a user configured is never skipped: only what exists can be asked for."""
    for group, found in (("privacy", config.privacy.name), ("attack", config.attack.name)):
        if found != "none":
            raise ConfigError(f"{group}={found} does not exist; choose one of: none")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={device} cannot be used here ({str(error).splitlines()[0]}): try device=cpu"
        ) from error


def _check_cohort(config: RunConfig, rule: RuleSpec) -> None:
    trainers = [s for s in config.nodes.expand() if s.role is Role.train]
    size = len(trainers)
    if config.sampler.name != "all":
        size = samplers.cohort_size(size, config.sampler.fraction, config.sampler.min_nodes)
    needed = max(config.min_replies, rule.min_rows(config.num_byzantine))
    if size < needed:
        raise ConfigError(
            f"a cohort has at most {size} of {len(trainers)} training nodes, but {needed} are needed "
            f"(min_replies={config.min_replies}, rule={rule.name} with num_byzantine={config.num_byzantine}): "
            "take more nodes, a larger sampler.fraction, or a smaller num_byzantine"
        )
