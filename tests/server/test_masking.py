"""What secure aggregation promises is checked before a run starts, and said with its numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.load import load
from conf.schema import (
    HeldOutConfig,
    NodesConfig,
    NodeSpec,
    PolicyConfig,
    RunConfig,
    SecAggPolicy,
    SurvivorSets,
    from_json,
    to_json,
)
from server import build, masking
from server import run as runs
from strategies.exchange import StoppedClock
from strategies.exchange_secagg import SecAggExchange
from strategies.grouping import Groups
from trellis import identity
from trellis.errors import ConfigError
from trellis.types import Role, Threat

GROUPS = ("nodes", "rule", "sampler", "suspicion")


def masked(*overrides: str) -> RunConfig:
    """A masked run of ten nodes.  Files are composed once for every choice of them, which takes Hydra longer than a
    test."""
    chosen = {"nodes": "consortium"} | dict(o.split("=", 1) for o in overrides if o.partition("=")[0] in GROUPS)
    config = to_json(composed(*(f"{group}={name}" for group, name in sorted(chosen.items()))))
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in GROUPS:
            *path, last = key.split(".")
            reduce(dict.__getitem__, path, config)[last] = yaml.safe_load(value)
    return from_json(RunConfig, config)


@cache
def composed(*choices: str) -> RunConfig:
    return load([*choices, "privacy=secagg", "tracking=none"])


@cache
def in_clear() -> RunConfig:
    return load(["nodes=consortium"])


def with_nodes(config: RunConfig, specs: list[NodeSpec], **changes: Any) -> RunConfig:
    return replace(config, nodes=NodesConfig(name="ours", items=specs, **changes))


def owned(*owners: str, groups: str = "") -> list[NodeSpec]:
    """Nodes n0, n1, ... of these organisations, in these groups, a letter each."""
    given = groups or " " * len(owners)
    return [
        NodeSpec(name=f"n{i}", organisation=o, group=g.strip())
        for i, (o, g) in enumerate(zip(owners, given, strict=True))
    ]


# ---------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[list[str], str]] = {
    "a rule that compares nodes": (
        ["rule=foolsgold"], r"rule=foolsgold compares what single nodes sent, .* privacy=secagg a row is a group's"
    ),
    "a sampler of single nodes": (
        ["sampler=availability"], r"sampler=availability draws single nodes; .* cohorts are whole groups"
    ),
    "audits without a detector": (
        ["privacy.secagg.audit_every=2"], r"audit_every draws groups for the detector: set suspicion=sequential"
    ),
    "audits of some nodes": (
        ["privacy.secagg.audit_every=2", "suspicion=sequential", "sampler=uniform"],
        r"audit_every needs every node in a round: set sampler=all",
    ),
    "draws among some nodes": (
        ["privacy.secagg.grouping=drawn", "sampler=uniform"], r"grouping=drawn draws among all nodes: set sampler=all"
    ),
    "a threshold below the floor": (
        ["privacy.secagg.threshold=6"],
        r"threshold=6: a group of 10 under threat=malicious_server needs 7 to 10",
    ),
    "a threshold above the group": (
        ["privacy.secagg.threshold=11"], r"threshold=11: a group of 10 under threat=malicious_server needs 7 to 10"
    ),
    "a threshold below the floor of an honest server": (
        ["privacy.secagg.threshold=5", "privacy.secagg.threat=semi_honest"],
        r"threshold=5: a group of 10 under threat=semi_honest needs 6 to 10",
    ),
    "a group that may miss nobody": (
        ["nodes=pilot"],
        r"a group of 3 \(north\+south\+west\) under threat=malicious_server loses its round when a single member is "
        r"missing \(3 must answer, of 3 organisations\).*nodes=consortium.*allow_no_dropout=true",
    ),
    "an honest server does not change who must be behind a sum": (
        ["nodes=pilot", "privacy.secagg.threat=semi_honest"], r"\(2 must answer, of 3 organisations\)"
    ),
    "a threshold that leaves nobody to miss": (
        ["privacy.secagg.threshold=10"], r"loses its round when a single member is missing \(10 must answer"
    ),
    "groups of two": (
        ["nodes.group_size=2"],
        r"a group of 2 \([a-z+]+\) has 2 organisations, privacy\.secagg\.min_group=3 .* rule=mean with num_byzantine=0 "
        r"and 0 lost groups allows groups of 10",
    ),
    "more organisations than there are": (
        ["privacy.secagg.min_group=11"], r"a group of 10 .* has 10 organisations, privacy\.secagg\.min_group=11"
    ),
    "a rule that leaves only small groups": (
        ["rule=median", "num_byzantine=1"],
        r"has 2 organisations.* rule=median with num_byzantine=1 and 1 lost groups allows groups of 2",
    ),
    "groups too large for the rule": (
        ["rule=median", "num_byzantine=1", "nodes.group_size=5"],
        r"2 groups, and 3 rows are needed with 1 lost: rule=median with num_byzantine=1, nodes\.group_size=5 \(at most "
        r"2 fits\); privacy\.secagg\.num_lost_groups=0 does without the reserve",
    ),
    "a reserve that is not there": (
        ["nodes.group_size=5", "privacy.secagg.num_lost_groups=2"], r"2 groups, and 1 rows are needed with 2 lost"
    ),
    "too few nodes for the rule in groups of any size": (
        ["nodes=pilot", "rule=median", "num_byzantine=2"],
        r"rule=median with num_byzantine=2 needs more rows than 3 nodes can give: take another rule, or fewer liars",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_promised_is_refused_before_anything_starts(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        build.check(masked(*overrides))


ALLOWED: dict[str, list[str]] = {
    "ten nodes": [],
    "a pilot that accepts it": ["nodes=pilot", "privacy.secagg.allow_no_dropout=true"],
    "a pilot of two organisations a sum": [
        "nodes=pilot", "privacy.secagg.threat=semi_honest", "privacy.secagg.min_group=2"
    ],
    "two groups": ["nodes.group_size=5"],
    "two groups of which one may be lost": ["nodes.group_size=5", "privacy.secagg.num_lost_groups=1"],
    "a higher threshold": ["privacy.secagg.threshold=9"],
    "a robust rule over three groups": [
        "nodes.group_size=3", "rule=median", "num_byzantine=1", "privacy.secagg.num_lost_groups=0",
        "privacy.secagg.allow_no_dropout=true",
    ],
    "audits": ["privacy.secagg.audit_every=5", "suspicion=sequential", "nodes.group_size=5"],
    "drawn groups": ["privacy.secagg.grouping=drawn", "nodes.group_size=5"],
    "whole groups that are sampled": ["sampler=uniform", "sampler.fraction=0.5", "nodes.group_size=5"],
    "rows that are weighed": ["rule.weighted=true"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", ALLOWED.values(), ids=ALLOWED)
def test_what_can_be_promised_composes(overrides: list[str]) -> None:
    build.check(masked(*overrides))


def test_a_sampled_cohort_is_counted_in_groups() -> None:
    config = masked(
        "nodes=cross_device", "nodes.count=40", "nodes.held_out.validation=0", "nodes.held_out.test=0",
        "nodes.group_size=5", "rule=median", "num_byzantine=1", "sampler=uniform", "sampler.fraction=0.5",
    )  # fmt: skip
    build.check(config)  # 4 of 8 groups, one of them in reserve
    assert masking.require_rows(config, build.pipeline(config)) == 4
    config.sampler.fraction = 0.375
    with pytest.raises(ConfigError, match=r"3 groups, and 3 rows are needed with 1 lost"):
        build.check(config)


def test_nodes_of_one_organisation_are_not_summed_together() -> None:
    config = with_nodes(masked(), owned("A", "A", "B", "C", "D"))
    with pytest.raises(
        ConfigError, match=r"has 2 nodes of one organisation, privacy\.secagg\.max_per_organisation=1: put"
    ):
        build.check(config)
    config.privacy.secagg.max_per_organisation = 2
    build.check(config)


def test_a_node_without_an_organisation_is_its_own() -> None:
    build.check(with_nodes(masked(), owned("", "", "", "", "")))


def test_a_node_that_is_missing_may_be_the_last_of_its_organisation() -> None:
    config = with_nodes(masked("privacy.secagg.max_per_organisation=3"), owned("A", "A", "A", "B", "C"))
    with pytest.raises(ConfigError, match=r"loses its round when a single member is missing \(4 must answer, of 3"):
        build.check(config)


def test_groups_that_nodes_name_are_theirs() -> None:
    config = with_nodes(masked(), owned(*"ABCDEFGHI", groups="xxxxyyyyy"))
    build.check(config)
    found = masking.plan_of(config)
    assert found.groups == (("n0", "n1", "n2", "n3"), ("n4", "n5", "n6", "n7", "n8"))
    assert found.rows == Groups((4, 5), 1)
    small = with_nodes(masked(), owned(*"ABCDEFG", groups="xxxxxyy"))
    with pytest.raises(ConfigError, match=r"a group of 2 \(n5\+n6\) has 2 organisations"):
        build.check(small)
    some = with_nodes(masked(), [*owned(*"ABC", groups="xxx"), NodeSpec(name="other")])
    with pytest.raises(ConfigError, match=r"3 of 4 train nodes name a group: all must, or none"):
        build.check(some)


@pytest.mark.parametrize("role", [Role.validation, Role.test])
def test_held_out_nodes_too_few_for_a_sum_are_refused(role: Role) -> None:
    specs = [*owned(*"ABCDE"), *(NodeSpec(name=f"judge{i}", organisation=f"J{i}", role=role) for i in range(2))]
    with pytest.raises(ConfigError, match=r"a group of 2 \(judge0\+judge1\) has 2 organisations"):
        build.check(with_nodes(masked(), specs))


FORBIDDEN: dict[str, tuple[list[str], SecAggPolicy]] = {
    "fewer organisations than a site asks for": (
        ["nodes=pilot", "privacy.secagg.threat=semi_honest", "privacy.secagg.min_group=2"], SecAggPolicy(min_group=3)
    ),
    "more members of an organisation": (
        ["privacy.secagg.max_per_organisation=2"], SecAggPolicy(max_per_organisation=1)
    ),
    "a lower threat": (
        ["privacy.secagg.threat=semi_honest"], SecAggPolicy(least_threat=Threat.malicious_server)
    ),
    "more keys": (["privacy.secagg.num_keys=9"], SecAggPolicy(max_keys=8)),
    "more audits": (
        ["privacy.secagg.audit_every=2", "rounds=10", "suspicion=sequential", "nodes.group_size=5"],
        SecAggPolicy(max_regroupings=4),
    ),
    "more draws": (
        ["privacy.secagg.grouping=drawn", "rounds=10", "privacy.secagg.num_keys=2", "nodes.group_size=5"],
        SecAggPolicy(max_regroupings=4),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "policy"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_the_nodes_own_policies_forbid_is_refused_too(overrides: list[str], policy: SecAggPolicy) -> None:
    config = masked(*overrides)
    for spec in config.nodes.items:
        spec.policy.secagg = policy
    if "max_per_organisation" in overrides[0]:
        config.nodes.items[1].organisation = config.nodes.items[0].organisation
    with pytest.raises(ConfigError, match=r"policy\.secagg"):
        build.check(config)


def test_secrets_from_a_seed_are_for_simulations() -> None:
    config = masked("privacy.secagg.insecure_rng=true")
    runs._require_secure(config, simulated=True)
    with pytest.raises(ConfigError, match="anybody could foresee what is drawn"):
        runs._require_secure(config, simulated=False)


def test_deployed_nodes_need_a_key_that_the_federations_file_has() -> None:
    config = masked()
    with pytest.raises(ConfigError, match=r"nodes=consortium has no public_key of aster, birch, cedar, dahlia, elm: "):
        masking.pins_of(config, simulated=False)
    specs = owned(*"ABCDE")
    for spec in specs:
        spec.public_key = identity.simulated(f"other {spec.name}").public_key.hex()
    pins = masking.pins_of(with_nodes(config, specs), simulated=False)
    assert pins["n3"] == identity.Member("n3", "D", bytes.fromhex(specs[3].public_key), "train-000", "train")
    assert (
        masking.pins_of(with_nodes(config, specs), simulated=True)["n3"].public_key
        == identity.simulated("n3").public_key
    )


# ---------------------------------------------------------------- how large groups may be

CROSS_DEVICE = ["nodes=cross_device", "nodes.held_out.validation=0", "nodes.held_out.test=0"]


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        ([], 10),  # one row is enough for a mean
        (["privacy.secagg.num_lost_groups=1"], 5),  # two groups, one of them in reserve
        (["privacy.secagg.num_lost_groups=4"], 2),
        (["rule=median", "num_byzantine=1"], 2),  # 3 rows and one in reserve: 10 / 4
        (["rule=median", "num_byzantine=1", "privacy.secagg.num_lost_groups=0"], 3),
        (["rule=median", "num_byzantine=2", "privacy.secagg.num_lost_groups=0"], 2),
        (["rule=krum", "num_byzantine=1"], 1),  # 5 rows and one in reserve
        (["rule=krum", "num_byzantine=1", "privacy.secagg.num_lost_groups=0"], 2),
        ([*CROSS_DEVICE, "nodes.count=100", "rule=median", "num_byzantine=5"], 8),  # 11 rows and one: 100 / 12
        ([*CROSS_DEVICE, "nodes.count=100", "rule=median", "num_byzantine=10"], 4),
        ([*CROSS_DEVICE, "nodes.count=100", "rule=median", "num_byzantine=20"], 2),
        ([*CROSS_DEVICE, "nodes.count=1000"], 100),  # no larger: all share with all
        ([*CROSS_DEVICE, "nodes.count=250"], 100),
    ],
)
def test_the_largest_group_leaves_the_rule_as_many_rows_as_it_needs(overrides: list[str], largest: int) -> None:
    config = masked(*overrides)
    assert masking.largest_group(config) == largest
    assert masking.federation(config).group_size == largest
    rows, line = masking.require_rows(config, build.pipeline(config)), build.pipeline(config)
    line.require_rows(rows - masking.num_lost_groups(config), config.num_byzantine)


def test_a_run_in_clear_and_a_size_that_is_set_are_left_alone() -> None:
    clear = in_clear()
    assert masking.federation(clear) is clear.nodes
    given = masked("nodes.group_size=4")
    assert masking.federation(given) is given.nodes
    masking.check(clear)
    assert masking.tags(clear, "local") == {}


@pytest.mark.parametrize(
    ("overrides", "lost"),
    [([], 0), (["rule=median", "num_byzantine=1"], 1), (["rule=median", "num_byzantine=3"], 1),
     (["privacy.secagg.num_lost_groups=2"], 2),
     (["rule=median", "num_byzantine=1", "privacy.secagg.num_lost_groups=0"], 0)],
)  # fmt: skip
def test_a_group_is_kept_in_reserve_where_there_may_be_liars(overrides: list[str], lost: int) -> None:
    assert masking.num_lost_groups(masked(*overrides)) == lost


def test_held_out_nodes_train_nothing_and_are_in_no_group_that_does() -> None:
    nodes = NodesConfig(
        count=20, template=NodeSpec(name="n{index:02d}", organisation="o{index}"), held_out=HeldOutConfig(0.2, 0.2)
    )
    config = replace(masked(), nodes=nodes)
    roles = {spec.name: spec.role for spec in nodes.expand()}
    members = [name for group in masking.plan_of(config).groups for name in group]
    assert members == sorted(n for n, role in roles.items() if role is Role.train)
    assert masking.largest_group(config) == len(members)


# ---------------------------------------------------------------- what groups give and survive


@pytest.mark.parametrize(
    ("threat", "size", "threshold", "colluders", "dropouts"),
    [
        (Threat.malicious_server, 3, 3, 1, 0),
        (Threat.malicious_server, 4, 3, 1, 1),
        (Threat.malicious_server, 5, 4, 2, 1),
        (Threat.malicious_server, 6, 5, 3, 1),
        (Threat.malicious_server, 7, 5, 2, 2),
        (Threat.malicious_server, 10, 7, 3, 3),
        (Threat.semi_honest, 4, 3, 1, 1),
        (Threat.semi_honest, 5, 3, 1, 2),
        (Threat.semi_honest, 10, 6, 4, 4),
    ],
)
def test_what_a_group_survives_is_what_the_protocol_says(
    threat: Threat, size: int, threshold: int, colluders: int, dropouts: int
) -> None:
    config = with_nodes(masked(f"privacy.secagg.threat={threat}"), owned(*"ABCDEFGHIJ"[:size]))
    weakest = masking.plan_of(config).weakest
    assert (weakest.threshold, weakest.colluders, weakest.dropouts) == (threshold, colluders, dropouts)


def test_what_is_said_of_a_run_is_said_of_its_weakest_group() -> None:
    config = with_nodes(masked(), owned(*"ABCDEFGHI", groups="xxxxyyyyy"))
    assert masking.plan_of(config).described(config, "local") == {
        "keys": "simulated",
        "holds_for": "single rounds only",
        "threat": "malicious_server",
        "groups": [["n0", "n1", "n2", "n3"], ["n4", "n5", "n6", "n7", "n8"]],
        "grouping": "pinned",
        "threshold": 3,
        "privacy_set": 3,
        "organisations": 3,
        "colluders": 1,
        "dropouts": 1,
        "liars": 0,
        "lost_groups": 0,
        "audit_every": 0,
        "insecure_rng": False,
    }
    assert masking.plan_of(config).described(config, "deployment")["keys"] == "pinned"


def test_sums_over_one_set_of_survivors_hold_for_the_whole_run_and_only_a_node_can_say_so() -> None:
    fixed = PolicyConfig(secagg=SecAggPolicy(survivor_sets=SurvivorSets.fixed))
    specs = [replace(spec, policy=fixed) for spec in owned(*"ABCDE")]

    def holds_for(nodes: list[NodeSpec], engine: str = "local") -> str:
        config = with_nodes(masked(), nodes)
        return str(masking.plan_of(config).described(config, engine)["holds_for"])

    assert holds_for(specs) == "every round of the run"
    assert holds_for([*specs[:4], replace(specs[4], policy=PolicyConfig())]) == "single rounds only"
    assert holds_for(specs, "deployment") == "single rounds only", "what a deployed node says is in its own file"


def test_a_record_says_at_first_sight_what_is_simulated() -> None:
    config = masked("privacy.secagg.insecure_rng=true")
    known = {"fl.masked": "true", "fl.threat": "malicious_server"}
    assert masking.tags(masked(), "deployment") == known
    assert masking.tags(config, "ray") == {**known, "fl.keys": "simulated", "fl.insecure_rng": "true"}


@pytest.mark.parametrize(("missing", "rows"), [(0, 2), (1, 2), (2, 1), (3, 1), (4, 0), (5, 0), (10, 0)])
def test_rows_are_lost_where_missing_nodes_hurt_most(missing: int, rows: int) -> None:
    assert masking.plan_of(masked("nodes.group_size=5")).rows.num_rows(10 - missing) == rows


# ---------------------------------------------------------------- the exchange


def exchange(*overrides: str, folder: Path | None = None) -> SecAggExchange:
    config = masked(*overrides)
    return masking.exchange(config, {}, lambda counts: None, StoppedClock(), folder, simulated=True)


def test_the_exchange_does_what_the_config_says(tmp_path: Path) -> None:
    found = exchange(
        "privacy.secagg.clip_norm=3", "privacy.secagg.num_keys=5", "privacy.secagg.offline_timeout_s=7",
        "round_timeout_s=9", "privacy.secagg.min_resolution=100", "privacy.secagg.workers=2",
        "privacy.secagg.threat=semi_honest", "privacy.secagg.threshold=8", "privacy.secagg.min_group=4",
        folder=tmp_path,
    )  # fmt: skip
    assert (found.clip_norm, found.num_keys, found.offline_timeout_s, found.timeout_s) == (3, 5, 7, 9)
    assert (found.min_resolution, found.workers, found.folder) == (100, 2, tmp_path / "secagg")
    assert (found.plan.threat, found.plan.quorum(10), found.plan.min_group) == (Threat.semi_honest, 8, 4)
    assert (found.max_weight, found.drawn_size, found.audit_every, found.audit_size) == (1, 0, 0, 0)
    assert found.native
    assert set(found.pins) == {spec.name for spec in masked().nodes.expand()}


def test_rows_weigh_and_groups_are_drawn_only_where_the_config_says_so() -> None:
    assert exchange("privacy.secagg.max_weight=7").max_weight == 1
    assert exchange("rule.weighted=true", "privacy.secagg.max_weight=7").max_weight == 7
    assert exchange("privacy.secagg.grouping=drawn", "nodes.group_size=5").drawn_size == 5
    assert exchange("privacy.secagg.grouping=drawn").drawn_size == 10
    audited = exchange("privacy.secagg.audit_every=3", "suspicion=sequential", "nodes.group_size=5")
    assert (audited.audit_every, audited.audit_size, audited.drawn_size) == (3, 5, 0)


def test_the_strategy_knows_its_groups_and_how_long_a_cohort_lasts() -> None:
    config = masked("nodes.group_size=5", "privacy.secagg.num_keys=6")
    strategy = build.strategy(config, build.check(config), clock=StoppedClock(), commit=lambda *_: None)
    assert isinstance(strategy.exchange, SecAggExchange)
    assert strategy.groups == Groups((5, 5), 1)
    assert strategy.cohort_rounds == 6
    clear = in_clear()
    assert build.strategy(clear, build.check(clear), clock=StoppedClock(), commit=lambda *_: None).groups is None
