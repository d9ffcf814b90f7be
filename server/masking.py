"""Secure aggregation of a run: from its configuration to groups, what they give and survive, and the exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Grouping, NodesConfig, NodeSpec, RunConfig, SurvivorSets, simulated_pins
from strategies import rules, samplers
from strategies.aggregation import Pipeline
from strategies.checks import CountsProblem
from strategies.exchange import Clock
from strategies.exchange_secagg import SecAggExchange
from strategies.grouping import MAX_COMPLETE, Groups, Plan
from trellis.errors import CohortTooSmall, ConfigError
from trellis.identity import KEY_BYTES, Member
from trellis.secagg import roster
from trellis.secagg.tolerance import Tolerance
from trellis.types import Role
from trellis.vectors import CountSpec


@dataclass(frozen=True, slots=True)
class Masked:
    """What secure aggregation means for a run: printed before it starts, and kept with it."""

    groups: tuple[tuple[str, ...], ...]
    """Of the nodes that train."""
    tolerances: tuple[Tolerance, ...]
    num_byzantine: int
    num_lost_groups: int
    rows: Groups

    @property
    def weakest(self) -> Tolerance:
        """The group that survives least."""
        return min(self.tolerances, key=lambda t: (t.dropouts, t.colluders, t.num_members))

    def described(self, config: RunConfig, engine: str) -> dict[str, Any]:
        """For `--json`, the record, and people."""
        weakest = self.weakest
        fixed = all(s.policy.secagg.survivor_sets is SurvivorSets.fixed for s in config.nodes.expand())
        return {
            # a simulation plays sites that have pinned each other's keys and run only code that they approved
            "keys": "simulated" if engine != "deployment" else "pinned",
            "holds_for": "every round of the run" if fixed and engine != "deployment" else "single rounds only",
            "threat": str(weakest.threat),
            "groups": [list(group) for group in self.groups],
            "grouping": str(config.privacy.secagg.grouping),
            "threshold": weakest.threshold,
            "privacy_set": min(t.privacy_set for t in self.tolerances),
            "organisations": config.privacy.secagg.min_group,
            "colluders": min(t.colluders for t in self.tolerances),
            "dropouts": weakest.dropouts,
            "liars": self.num_byzantine,
            "lost_groups": self.num_lost_groups,
            "audit_every": config.privacy.secagg.audit_every,
            "insecure_rng": config.privacy.secagg.insecure_rng,
        }


def tags(config: RunConfig, engine: str) -> dict[str, str]:
    """What a run's record says at first sight."""
    s = config.privacy.secagg
    if not config.privacy.name.masks:
        foreseen = config.privacy.name.trains_privately and s.insecure_rng
        return {"fl.insecure_rng": "true"} if foreseen else {}
    found = {"fl.masked": "true", "fl.threat": str(s.threat)}
    if engine != "deployment":
        found["fl.keys"] = "simulated"
    return {**found, **({"fl.insecure_rng": "true"} if s.insecure_rng else {})}


def federation(config: RunConfig) -> NodesConfig:
    """The run's nodes with the size of their groups: the one that is set, or the largest that rule and graph allow.

    In simulation this is what the nodes' sites have pinned; a deployed node has its own list.
    """
    if not config.privacy.name.masks or config.nodes.group_size is not None:
        return config.nodes
    return dataclasses.replace(config.nodes, group_size=largest_group(config))


def largest_group(config: RunConfig) -> int:
    """The most nodes a group can have with the rule still surviving `num_byzantine` liars; at most 100.

    Raises ConfigError where there are too few nodes for that with groups of any size.
    """
    from server.build import pipeline

    trainers, line = _trainers(config), pipeline(config)
    n, lost = len(trainers), num_lost_groups(config)
    least = next((m for m in range(1, n + 1) if _holds(line, m - lost, config.num_byzantine)), None)
    if least is None:
        raise ConfigError(
            f"rule={config.rule.name} with num_byzantine={config.num_byzantine} needs more rows than {n} nodes can "
            "give: take another rule, or fewer liars"
        )
    return max(min(n // least, MAX_COMPLETE), 1)


def _holds(line: Pipeline, num_rows: int, num_byzantine: int) -> bool:
    try:
        line.require_rows(num_rows, num_byzantine)
    except CohortTooSmall:
        return False
    return num_rows > 0


def num_lost_groups(config: RunConfig) -> int:
    """Groups that a round may lose without the rule losing its footing."""
    given = config.privacy.secagg.num_lost_groups
    return int(config.num_byzantine > 0) if given is None else given


def _trainers(config: RunConfig, nodes: NodesConfig | None = None) -> list[NodeSpec]:
    return [spec for spec in (nodes or config.nodes).expand() if spec.role is Role.train]


def plan_of(config: RunConfig) -> Masked:
    """Groups and what they survive.  Raises ConfigError where they are too small for what is asked of them."""
    s, plan = config.privacy.secagg, _plan(config)
    pins = simulated_pins(federation(config))
    trainers = [name for name, pin in pins.items() if pin.role == Role.train]
    if s.grouping is Grouping.drawn:
        groups = roster.dealt_out([(name, pins[name].organisation) for name in trainers], drawn_size(config), b"plan")
    else:
        groups = [roster.pinned_group(g, pins) for g in sorted({pins[name].group for name in trainers})]
    tolerances = tuple(plan.tolerance(group, pins) for group in groups)
    dropouts = min(t.dropouts for t in tolerances)
    rows = Groups(tuple(len(group) for group in groups), dropouts)
    return Masked(tuple(groups), tolerances, config.num_byzantine, num_lost_groups(config), rows)


def _plan(config: RunConfig) -> Plan:
    s = config.privacy.secagg
    return Plan(
        threat=s.threat, threshold=s.threshold, min_group=s.min_group, colluding=s.colluding, dropping=s.dropping
    )


def drawn_size(config: RunConfig) -> int:
    """Members of a drawn group, at least."""
    return config.nodes.group_size or largest_group(config)


def check(config: RunConfig) -> None:
    """Every promise of secure aggregation.  Raises ConfigError with the numbers and what to do."""
    if not config.privacy.name.masks:
        return
    s, rule = config.privacy.secagg, rules.get(config.rule.name)
    if "names" in rule.needs:
        raise ConfigError(
            f"rule={rule.name} compares what single nodes sent, and under privacy={config.privacy.name} a row is a "
            "group's: take another rule"
        )
    if config.sampler.name == "availability":
        raise ConfigError("sampler=availability draws single nodes; under secure aggregation cohorts are whole groups")
    if s.audit_every and config.suspicion.name == "none":
        raise ConfigError("privacy.secagg.audit_every draws groups for the detector: set suspicion=sequential")
    if s.audit_every and config.sampler.name != "all":
        raise ConfigError("privacy.secagg.audit_every needs every node in a round: set sampler=all")
    if s.grouping is Grouping.drawn and config.sampler.name != "all":
        raise ConfigError("privacy.secagg.grouping=drawn draws among all nodes: set sampler=all")
    pins, found = simulated_pins(federation(config)), plan_of(config)
    for group, tolerance in zip(found.groups, found.tolerances, strict=True):
        _check_group(config, group, tolerance, pins)
    # held-out nodes are summed too, among themselves
    others = {pin.group for pin in pins.values() if pin.role != Role.train}
    for group in (roster.pinned_group(label, pins) for label in sorted(others)):
        _check_group(config, group, _plan(config).tolerance(group, pins), pins)
    for spec in config.nodes.items or [config.nodes.template]:
        _check_policy(config, spec, max(roster.crowded(group, pins) for group in found.groups))


def _check_policy(config: RunConfig, spec: NodeSpec, crowd: int) -> None:
    """What a node's own policy forbids in any case is told before anything starts; its site has the last word."""
    s, policy, who = config.privacy.secagg, spec.policy.secagg, spec.name or "the nodes"
    rounds = config.rounds
    draws = rounds // s.audit_every if s.audit_every else 0
    if s.grouping is Grouping.drawn:
        draws += -(-(rounds + 1) // s.num_keys)
    problems = {
        f"min_group={policy.min_group}, the run has {s.min_group}": (policy.min_group or 0) > s.min_group,
        f"max_per_organisation={policy.max_per_organisation}, a group has {crowd}": policy.max_per_organisation
        is not None
        and crowd > policy.max_per_organisation,
        f"least_threat={policy.least_threat}, the run has {s.threat}": policy.least_threat is not None
        and not s.threat.at_least(policy.least_threat),
        f"max_keys={policy.max_keys}, the run has num_keys={s.num_keys}": s.num_keys > policy.max_keys,
        f"max_regroupings={policy.max_regroupings}, the run draws {draws} times": policy.max_regroupings is not None
        and draws > policy.max_regroupings,
    }
    found = [f"policy.secagg.{problem}" for problem, holds in problems.items() if holds]
    if found:
        raise ConfigError(f"{who} would refuse every round: {'; '.join(found)}")


def _check_group(config: RunConfig, group: tuple[str, ...], found: Tolerance, pins: Mapping[str, Member]) -> None:
    s, who = config.privacy.secagg, "+".join(group)[:60]
    size = f"a group of {found.num_members} ({who})"
    if found.num_organisations < s.min_group:
        raise ConfigError(
            f"{size} has {found.num_organisations} organisations, privacy.secagg.min_group={s.min_group} must be "
            f"behind every sum: take a larger nodes.group_size or more nodes; rule={config.rule.name} with "
            f"num_byzantine={config.num_byzantine} and {num_lost_groups(config)} lost groups allows groups of "
            f"{largest_group(config)}"
        )
    crowd = roster.crowded(group, pins)
    if crowd > s.max_per_organisation:
        raise ConfigError(
            f"{size} has {crowd} nodes of one organisation, privacy.secagg.max_per_organisation="
            f"{s.max_per_organisation}: put them into different groups"
        )
    if found.dropouts == 0 and not s.allow_no_dropout:
        raise ConfigError(
            f"{size} under threat={s.threat} loses its round when a single member is missing ({found.threshold} must "
            f"answer, of {s.min_group} organisations): take more nodes a group (nodes=consortium has ten), or accept "
            "it with privacy.secagg.allow_no_dropout=true"
        )


def require_rows(config: RunConfig, line: Pipeline) -> int:
    """Rows of a cohort: its groups.  Raises CohortTooSmall where the rule needs more, some of them lost."""
    found = plan_of(config)
    num_groups = len(found.groups)
    if config.sampler.name != "all":
        num_groups = samplers.cohort_size(num_groups, config.sampler.fraction, config.sampler.min_nodes)
    left = num_groups - found.num_lost_groups
    if not _holds(line, left, config.num_byzantine):
        raise CohortTooSmall(
            f"{num_groups} groups, and {line.rule.min_rows(config.num_byzantine)} rows are needed with "
            f"{found.num_lost_groups} lost: rule={config.rule.name} with num_byzantine={config.num_byzantine}, "
            f"nodes.group_size={federation(config).group_size} (at most {largest_group(config)} fits); "
            "privacy.secagg.num_lost_groups=0 does without the reserve, and a lost group then closes the round"
        )
    return num_groups


def exchange(
    config: RunConfig,
    counts: Mapping[str, CountSpec],
    problem: CountsProblem,
    clock: Clock,
    folder: Path | None,
    *,
    simulated: bool,
) -> SecAggExchange:
    """The run's masked messages.  Raises ConfigError where a deployed node's key is not known."""
    s = config.privacy.secagg
    return SecAggExchange(
        pins=pins_of(config, simulated=simulated),
        plan=_plan(config),
        clip_norm=s.clip_norm,
        num_keys=s.num_keys,
        max_weight=s.max_weight if config.rule.weighted else 1,
        min_resolution=s.min_resolution,
        drawn_size=drawn_size(config) if s.grouping is Grouping.drawn else 0,
        audit_every=s.audit_every,
        audit_size=drawn_size(config) if s.audit_every else 0,
        counts=counts,
        counts_problem=problem,
        losses=not config.privacy.name.trains_privately,
        timeout_s=config.round_timeout_s,
        offline_timeout_s=s.offline_timeout_s,
        clock=clock,
        folder=folder / "secagg" if folder is not None else None,
        workers=s.workers,
    )


def pins_of(config: RunConfig, *, simulated: bool) -> dict[str, Member]:
    """Members as the server knows them: their keys from the federation's file, or those of a simulation."""
    nodes = federation(config)
    if simulated:
        return simulated_pins(nodes)
    unknown = [spec.name for spec in nodes.expand() if len(spec.public_key) != 2 * KEY_BYTES]
    if unknown:
        raise ConfigError(
            f"privacy={config.privacy.name}: nodes={config.nodes.name} has no public_key of {', '.join(unknown[:5])}: "
            "`trellis identity show` prints it at the node"
        )
    return {
        s.name: Member(s.name, s.organisation, bytes.fromhex(s.public_key), s.group, s.role.value)
        for s in nodes.expand()
    }
