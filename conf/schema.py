"""What a run is, as typed values.

Plain dataclasses (OmegaConf fills them), one per config group.  `RunConfig` is the whole; `NodeTask` is the part of it
that nodes receive; `NodeSpec` is one node as the federation file describes it.  Nothing here imports Hydra, so a node
can read these types without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from trellis import canonical
from trellis.errors import ConfigError
from trellis.identity import Member, simulated
from trellis.secagg.roster import dealt_out
from trellis.types import Privacy, Role, Threat

T = TypeVar("T")


class DataSource(StrEnum):
    """Where rows come from.  Synthetic is always a choice, never a fallback."""

    real = "real"
    synthetic = "synthetic"


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


class Grouping(StrEnum):
    """Who decides with whom a node's updates are summed: its site's own list, or a draw among all members."""

    pinned = "pinned"
    drawn = "drawn"


class SurvivorSets(StrEnum):
    """How many sets of survivors a group gives sums over: any number, or one."""

    any = "any"
    fixed = "fixed"


class RepeatBase(StrEnum):
    """For whom a node answers a base that it answered in another run: for the same survivors, or for any."""

    same_set = "same_set"
    allow = "allow"


class Clipping(StrEnum):
    """How a row's gradient is clipped: as a whole, or tensor by tensor to C / sqrt(number of tensors)."""

    flat = "flat"
    per_layer = "per_layer"


class GradSample(StrEnum):
    """How gradients of single rows are computed; auto: the fastest that is exact for the sector's model."""

    auto = "auto"
    direct = "direct"
    hooks = "hooks"
    ew = "ew"
    ghost = "ghost"
    functorch = "functorch"


class Require(StrEnum):
    """What a node asks of every run, at least."""

    dp = "dp"
    secagg = "secagg"
    both = "both"


class OptimizerName(StrEnum):
    sgd = "sgd"
    adam = "adam"


class TrackingName(StrEnum):
    mlflow = "mlflow"
    none = "none"


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of runs and nodes: they become names of folders."""

_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps|xpu(:\d+)?", re.ASCII)
_INDEX = re.compile(r"\{index(?::(0?[1-9])d)?\}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def check_name(what: str, name: str) -> None:
    """Refuse a name that could not be a folder's name beside others."""
    _require(
        NAME.fullmatch(name) is not None,
        f"{what} is {name!r}; it must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit",
    )


def _within(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a number outside its range, an infinite one and NaN."""
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    said = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    _require(
        math.isfinite(value) and least <= value <= most and above < value < below,
        f"{name} is {value}; it must be {' and '.join(said)}{'' if isinstance(value, int) else ', and finite'}",
    )


@dataclass
class TrainingConfig:
    """How a node trains in one round."""

    batch_size: int = 32
    epochs: int = 1
    optimizer: OptimizerName = OptimizerName.sgd
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_examples: int | None = None
    """At most this many training rows of a node are used in a round; None: all."""

    def __post_init__(self) -> None:
        _within("training.batch_size", self.batch_size, least=1)
        _within("training.epochs", self.epochs, least=1)
        _within("training.lr", self.lr, above=0)
        _within("training.momentum", self.momentum, least=0, below=1)
        _within("training.weight_decay", self.weight_decay, least=0)
        _require(
            self.max_examples is None or self.max_examples >= 1,
            f"training.max_examples is {self.max_examples}; it must be at least 1, or null for all rows",
        )


@dataclass
class HeterogeneityConfig:
    """What is done where sites differ.  Every setting exists in every choice, so they can be combined."""

    name: str = "none"
    proximal_mu: float = 0.0
    """FedProx: pulls a node's shared params back to those it was sent, by mu / 2 times their squared distance."""
    local_layers: list[str] = field(default_factory=list)
    """Patterns of tensors that stay at the node; "head": the sector's last layers."""
    fine_tune_epochs: int = 0
    """After the last round each node trains the final model on its own rows for so many epochs, and tests that too."""
    fine_tune_lr: float | None = None
    """None: the training's."""

    def __post_init__(self) -> None:
        _within("heterogeneity.proximal_mu", self.proximal_mu, least=0)
        _within("heterogeneity.fine_tune_epochs", self.fine_tune_epochs, least=0)
        if self.fine_tune_lr is not None:
            _within("heterogeneity.fine_tune_lr", self.fine_tune_lr, above=0)


@dataclass
class SectorConfig:
    """A task: the name of a file in `sectors/`, the options of its class, and how its model is trained."""

    name: str = "healthcare_wisconsin"
    rounds: int = 10
    """Rounds that the shipped recipe needs; the run's `rounds` follows it unless set."""
    options: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class LinkConfig:
    """A node's connection."""

    uplink_mbit_s: float = 100.0
    downlink_mbit_s: float = 100.0
    latency_ms: float = 20.0
    availability: float = 1.0
    """Probability that the node is reachable in a round."""

    def __post_init__(self) -> None:
        _within("link.availability", self.availability, above=0, most=1)
        _within("link.uplink_mbit_s", self.uplink_mbit_s, above=0)
        _within("link.downlink_mbit_s", self.downlink_mbit_s, above=0)
        _within("link.latency_ms", self.latency_ms, least=0)


@dataclass
class SecAggPolicy:
    """What a site asks of every secure aggregation that its node takes part in (docs/secure-aggregation.md)."""

    identity_key: str | None = None
    """The file of its private key, relative to the node's own file.  Simulated nodes have keys that protect nothing."""
    members: str | None = None
    """The file of the members it accepts, with keys and groups; likewise."""
    least_threat: Threat | None = None
    """None: malicious_server; a simulated node takes part in either."""
    min_group: int | None = None
    """Organisations that must be behind every sum; None: 3, and in simulation as many as the run says."""
    max_per_organisation: int | None = None
    """Members of one organisation in a group; None: 1, and in simulation as many as the run says."""
    max_share: float = 0.5
    """Of all weight in a sum, the most that one node's update may have."""
    max_weight_ratio: float | None = None
    """How much more one node's update may weigh than another's; None: not more, and in simulation as the run says."""
    colluding: float = 0.1
    """In groups whose members do not all share with each other: share of them that may collude."""
    max_keys: int = 1024
    max_draws: int = 4
    """Draws of groups that come to nothing, in a row."""
    max_regroupings: int | None = None
    """Different drawn groups that it is ever summed with; None: 4, and in simulation as many as the run draws."""
    repeat_base: RepeatBase = RepeatBase.same_set
    survivor_sets: SurvivorSets = SurvivorSets.any

    def __post_init__(self) -> None:
        if self.min_group is not None:
            _within("policy.secagg.min_group", self.min_group, least=2)
        if self.max_per_organisation is not None:
            _within("policy.secagg.max_per_organisation", self.max_per_organisation, least=1)
        _within("policy.secagg.max_share", self.max_share, above=0, most=1)
        if self.max_weight_ratio is not None:
            _within("policy.secagg.max_weight_ratio", self.max_weight_ratio, least=1)
        _within("policy.secagg.colluding", self.colluding, least=0, below=1)
        _within("policy.secagg.max_keys", self.max_keys, least=1)
        _within("policy.secagg.max_draws", self.max_draws, least=0)
        if self.max_regroupings is not None:
            _within("policy.secagg.max_regroupings", self.max_regroupings, least=0)


@dataclass
class DpPolicy:
    """What may be spent on a site's data, ever (docs/privacy.md)."""

    privacy_unit: str | None = None
    """The name of the data that the budget is for; None: they are trained on without differential privacy only."""
    max_epsilon: float | None = None
    """All that may be spent on the unit: over rounds, runs and restarts.  A simulated node may leave it open."""
    delta: float = 1e-5
    min_noise_multiplier: float = 0.0
    ledger: str | None = None
    """The folder of the ledger, relative to the node's own file; None: the node's store."""
    hide_epsilon: bool = False
    """Whether the server is not told what was spent."""

    def __post_init__(self) -> None:
        if self.privacy_unit is not None:
            check_name("policy.dp.privacy_unit", self.privacy_unit)
        if self.max_epsilon is not None:
            _within("policy.dp.max_epsilon", self.max_epsilon, above=0)
        _within("policy.dp.delta", self.delta, above=0, below=1)
        _within("policy.dp.min_noise_multiplier", self.min_noise_multiplier, least=0)


@dataclass
class PolicyConfig:
    """What a node consents to.  It beats the run's config."""

    sectors: list[str] = field(default_factory=lambda: ["*"])
    """Names of the sectors it takes part in; "*" is any."""
    least_privacy: Privacy = Privacy.none
    max_examples: int | None = None
    """At most this many of its rows may be trained on in a round."""
    require: Require | None = None
    """The same as `least_privacy`, in a word: both must hold."""
    dp: DpPolicy = field(default_factory=DpPolicy)
    secagg: SecAggPolicy = field(default_factory=SecAggPolicy)

    @property
    def least(self) -> tuple[Privacy, ...]:
        """Modes whose every guarantee the site asks for."""
        words = {Require.dp: Privacy.dp, Require.secagg: Privacy.secagg, Require.both: Privacy.dp_secagg}
        return (self.least_privacy, *((words[self.require],) if self.require is not None else ()))


@dataclass
class NodeSpec:
    """One node: who it is, which part of the data it owns, how it is connected, what it consents to."""

    name: str = ""
    organisation: str = ""
    region: str = ""
    part: int | None = None
    """Index of its part of the sector's partition; None: its place in the list."""
    data_path: str | None = None
    """A file of its own, in the sector's format; then the whole file is its part."""
    role: Role = Role.train
    group: str = ""
    """With whom its updates are summed under secure aggregation; "": as `nodes.group_size` divides them."""
    public_key: str = ""
    """Of its identity, hex: what the server knows it by.  Simulated nodes need none."""
    link: LinkConfig = field(default_factory=LinkConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class HeldOutConfig:
    """Shares of the nodes that never train: whole nodes for validation and for test."""

    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        _within("nodes.held_out.validation", self.validation, least=0, below=1)
        _within("nodes.held_out.test", self.test, least=0, below=1)
        _within("nodes.held_out.validation + nodes.held_out.test", self.validation + self.test, below=1)


@dataclass
class NodesConfig:
    """The federation: a list of nodes, or a count and one template."""

    name: str = "pilot"
    items: list[NodeSpec] = field(default_factory=list)
    count: int = 0
    template: NodeSpec = field(default_factory=NodeSpec)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    group_size: int | None = None
    """Nodes that are summed together under secure aggregation, at least; None: as many as the rule and the graph
    allow."""

    def expand(self) -> list[NodeSpec]:
        """Every node, with its part filled in, sorted by name.

        `{index}` or `{index:04d}` in a template's texts is the node's index.
        """
        _within("nodes.count", self.count, least=0)
        _require(bool(self.items) != bool(self.count), f"nodes={self.name} needs either `items` or a `count` above 0")
        specs = self.items or [self._from_template(i) for i in range(self.count)]
        specs = [dataclasses.replace(s, part=i if s.part is None else s.part) for i, s in enumerate(specs)]
        names = [s.name for s in specs]
        repeated = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        _require(all(names) and not repeated, f"nodes={self.name}: every node needs its own name; repeated: {repeated}")
        for name in names:
            check_name(f"nodes={self.name}: a node's name", name)
        return sorted(self._grouped(specs), key=lambda s: s.name)

    def _grouped(self, specs: list[NodeSpec]) -> list[NodeSpec]:
        """Every node with its group: the one it names, or the one that `group_size` deals it, among its role's."""
        if self.group_size is not None:
            _within("nodes.group_size", self.group_size, least=1)
        found: dict[str, str] = {}
        for role in Role:
            of_role = [s for s in specs if s.role is role]
            named = [s for s in of_role if s.group]
            _require(
                len(named) in (0, len(of_role)),
                f"nodes={self.name}: {len(named)} of {len(of_role)} {role} nodes name a group: all must, or none",
            )
            owners = [] if named else [(s.name, s.organisation) for s in of_role]
            groups = dealt_out(owners, self.group_size or len(owners)) if owners else []
            found |= {name: f"{role}-{i:03d}" for i, group in enumerate(groups) for name in group}
        return [dataclasses.replace(s, group=found.get(s.name, s.group)) for s in specs]

    def _from_template(self, index: int) -> NodeSpec:
        # Held-out nodes are spread evenly over the indices, so they are a fair sample of an ordered partition.
        position = (index * 0.6180339887498949) % 1.0
        held = self.held_out
        role = (
            Role.test
            if position < held.test
            else Role.validation
            if position < held.test + held.validation
            else Role.train
        )
        t = self.template
        texts: dict[str, Any] = {
            k: _numbered(f"nodes.template.{k}", getattr(t, k), index) for k in ("name", "organisation", "region")
        }
        return dataclasses.replace(t, role=role, part=index, **texts)


def _numbered(key: str, text: str, index: int) -> str:
    """`text` with the index written in.  Not str.format: a text may come over a network, and formats can do more."""
    rest = _INDEX.sub("", text)
    _require(
        "{" not in rest and "}" not in rest,
        f"{key} is {text!r}; in braces only {{index}}, or {{index:04d}} with a width of 1 to 9, can stand",
    )
    return _INDEX.sub(lambda found: format(index, f"{found[1] or ''}d"), text)


@dataclass
class RuleConfig:
    """An aggregation rule from the catalogue `strategies.rules`."""

    name: str = "mean"
    weighted: bool = False
    """Weigh rows by the example counts the server holds in its registry; never by a count a node declares."""
    worker_momentum: float = 0.0
    """Nodes reply m = beta m + (1 - beta) update instead of the update; 0: the update itself."""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("rule.worker_momentum", self.worker_momentum, least=0, below=1)


@dataclass
class PreAggregatorConfig:
    """What rows pass before the rule: a name from the catalogue `strategies.preaggregators`."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SecAggConfig:
    """How updates are masked and summed (docs/secure-aggregation.md)."""

    threat: Threat = Threat.malicious_server
    """What the server is assumed to be capable of."""
    clip_norm: float = 10.0
    """Every node clips its update to this Euclidean norm before it is masked."""
    grouping: Grouping = Grouping.pinned
    threshold: int | None = None
    """Members of a group that must answer; None: as few as the threat allows."""
    min_group: int = 3
    """Organisations that must be behind every sum."""
    max_per_organisation: int = 1
    allow_no_dropout: bool = False
    """Whether groups that lose their round when one member is missing may be used."""
    num_lost_groups: int | None = None
    """Groups that may be lost in a round without the rule losing its footing; None: 1 with num_byzantine above 0."""
    num_keys: int = 16
    """Rounds that the keys of an epoch last for: then three messages make new ones."""
    max_weight: int = 100
    """With rule.weighted: the largest of the whole weights that stand for the nodes' rows."""
    min_resolution: float = 10000.0
    """Steps in which a coordinate of 1 is told; coarser ones are sent with 64 bits instead of 32."""
    audit_every: int = 0
    """In every k-th round groups are drawn anew, so that `suspicion` can tell who is behind bad ones; 0: never."""
    colluding: float = 0.1
    """In groups above 100 members: share that may collude ..."""
    dropping: float = 0.1
    """... and that may drop out; they give the number of neighbours (Bell et al.)."""
    offline_timeout_s: float = 300.0
    """How long a message without training is waited for."""
    workers: int = 1
    """Processes that take masks away on the server; with 1 the server's own does."""
    insecure_rng: bool = False
    """Tests and studies only: halves of rows follow from the seed.  Keys, masks and draws of groups come from the OS
    whatever is said here.  Tagged in every record."""

    def __post_init__(self) -> None:
        _within("privacy.secagg.clip_norm", self.clip_norm, above=0)
        _within("privacy.secagg.min_group", self.min_group, least=2)
        _within("privacy.secagg.max_per_organisation", self.max_per_organisation, least=1)
        _within("privacy.secagg.num_keys", self.num_keys, least=1)
        _within("privacy.secagg.max_weight", self.max_weight, least=1)
        _within("privacy.secagg.min_resolution", self.min_resolution, least=1)
        _within("privacy.secagg.audit_every", self.audit_every, least=0)
        _within("privacy.secagg.colluding", self.colluding, least=0, below=1)
        _within("privacy.secagg.dropping", self.dropping, least=0, below=1)
        _within("privacy.secagg.offline_timeout_s", self.offline_timeout_s, above=0)
        _within("privacy.secagg.workers", self.workers, least=1)
        if self.threshold is not None:
            _within("privacy.secagg.threshold", self.threshold, least=2)
        if self.num_lost_groups is not None:
            _within("privacy.secagg.num_lost_groups", self.num_lost_groups, least=0)


@dataclass
class DpConfig:
    """How nodes train under differential privacy (docs/privacy.md)."""

    clip_norm: float = 1.0
    """Every row's gradient is clipped to this Euclidean norm."""
    clipping: Clipping = Clipping.flat
    grad_sample: GradSample = GradSample.auto
    max_physical_batch: int = 128
    """Rows whose gradients are in memory at once."""
    frozen_local: bool = False
    """Whether layers that stay at the node are left as they are; else they train in the same DP-SGD."""

    def __post_init__(self) -> None:
        _within("privacy.dp.clip_norm", self.clip_norm, above=0)
        _within("privacy.dp.max_physical_batch", self.max_physical_batch, least=1)


@dataclass
class PrivacyConfig:
    """What is kept from whom, and how."""

    name: Privacy = Privacy.none
    noise_multiplier: float | None = None
    """Under differential privacy the noise of a step, in clip norms: this, or ..."""
    target_epsilon: float | None = None
    """... what all planned rounds may spend at each node, at its own delta: each solves for its own noise, once."""
    dp: DpConfig = field(default_factory=DpConfig)
    secagg: SecAggConfig = field(default_factory=SecAggConfig)

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None:
            _within("privacy.noise_multiplier", self.noise_multiplier, above=0)
        if self.target_epsilon is not None:
            _within("privacy.target_epsilon", self.target_epsilon, above=0)
        given = [self.noise_multiplier, self.target_epsilon].count(None)
        _require(
            given == 1 or not self.name.noises,
            f"privacy={self.name} needs one of privacy.noise_multiplier, privacy.target_epsilon, and the other null; "
            f"they are {self.noise_multiplier} and {self.target_epsilon}",
        )


@dataclass
class AttackConfig:
    """Lies that the engine of a simulation tells in the name of some training nodes."""

    name: str = "none"
    num_attackers: int | None = None
    """How many nodes lie; None: as many as `num_byzantine`."""
    nodes: list[str] = field(default_factory=list)
    """Names of the nodes that lie; empty: drawn from the run's seed."""
    start_round: int = 1
    """They are honest before this round (a sleeper)."""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_attackers is not None:
            _within("attack.num_attackers", self.num_attackers, least=1)
        _within("attack.start_round", self.start_round, least=1)
        given = self.num_attackers
        _require(
            not self.nodes or given is None or given == len(set(self.nodes)),
            f"attack.num_attackers={given}, but attack.nodes names {len(set(self.nodes))}: give one of the two",
        )


@dataclass
class SuspicionConfig:
    """Evidence against nodes over the rounds (`strategies.observers.suspicion`)."""

    name: str = "none"
    alpha: float = 0.01
    """Probability that any honest node is quarantined within `horizon` rounds, as long as each is flagged in at most a
    share `honest_flag_rate` of them."""
    horizon: int = 100
    """Rounds that `alpha` is for."""
    honest_flag_rate: float = 0.05
    liar_flag_rate: float = 0.9
    outlier_factor: float = 15.0
    """A row is flagged when its median distance to the others is this many times what the nearer rows have."""
    released: list[str] = field(default_factory=list)
    """Nodes that an operator lets in again: their evidence is forgotten and they are never quarantined."""

    def __post_init__(self) -> None:
        _within("suspicion.alpha", self.alpha, above=0, below=1)
        _within("suspicion.horizon", self.horizon, least=1)
        _within("suspicion.honest_flag_rate", self.honest_flag_rate, above=0, below=1)
        _within("suspicion.liar_flag_rate", self.liar_flag_rate, above=self.honest_flag_rate, below=1)
        _within("suspicion.outlier_factor", self.outlier_factor, above=1)


@dataclass
class EngineConfig:
    """Where the two apps run."""

    name: EngineName = EngineName.local
    workers: int = 1
    """local: processes that run nodes; 1 runs them in this process."""
    address: str | None = None
    """ray: an existing cluster's address; None starts one on this machine."""
    links: bool = True
    """local: links and availability of `nodes` are obeyed, in virtual time."""
    cpus_per_node: float = 1.0
    """ray: cores that one node's message occupies."""
    gpus_per_node: float = 0.0

    def __post_init__(self) -> None:
        _within("engine.workers", self.workers, least=1)
        _within("engine.cpus_per_node", self.cpus_per_node, above=0)
        _within("engine.gpus_per_node", self.gpus_per_node, least=0)


@dataclass
class SamplerConfig:
    """Who is asked in a round."""

    name: str = "all"
    fraction: float = 1.0
    min_nodes: int = 1

    def __post_init__(self) -> None:
        _within("sampler.fraction", self.fraction, above=0, most=1)
        _within("sampler.min_nodes", self.min_nodes, least=1)


@dataclass
class ServerOptimizerConfig:
    """What the server does with the aggregate.  Reddi et al., ICLR 2021."""

    name: str = "none"
    lr: float = 1.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _within("server_optimizer.lr", self.lr, above=0)
        _within("server_optimizer.momentum", self.momentum, least=0, below=1)
        _within("server_optimizer.beta1", self.beta1, least=0, below=1)
        _within("server_optimizer.beta2", self.beta2, least=0, below=1)
        _within("server_optimizer.tau", self.tau, above=0)


@dataclass
class TrackingConfig:
    """Where rounds and model versions are recorded."""

    name: TrackingName = TrackingName.mlflow
    uri: str | None = None
    """An MLflow tracking URI; None: `mlflow.db` beside the run folders."""
    experiment: str | None = None
    every: int = 1
    """Register every k-th round's model; the last and the best are always kept."""
    max_node_runs: int = 64
    """Above this many nodes, per-node values go to one JSON artifact a round instead of a child run each."""
    close_timeout_s: float = 60.0
    """How long the end of a run waits for records to be delivered; what is left stays spooled."""

    def __post_init__(self) -> None:
        _within("tracking.every", self.every, least=1)
        _within("tracking.max_node_runs", self.max_node_runs, least=0)
        _within("tracking.close_timeout_s", self.close_timeout_s, least=0)


@dataclass
class ChecksConfig:
    """Limits that a reply must keep."""

    max_update_norm: float = 1000.0
    max_matrix_mb: float = 8192.0
    """A round's updates beyond this lie in a file that is mapped into memory, not in memory."""
    allow_one_class: bool = False
    """Whether a node all of whose rows are of one class may take part; its own metrics then say little."""

    def __post_init__(self) -> None:
        _within("checks.max_update_norm", self.max_update_norm, above=0)
        _within("checks.max_matrix_mb", self.max_matrix_mb, least=0)


@dataclass
class RunConfig:
    """One federated run."""

    sector: SectorConfig = field(default_factory=SectorConfig)
    nodes: NodesConfig = field(default_factory=NodesConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    preaggregator: list[PreAggregatorConfig] = field(default_factory=list)
    """What stands before the rule, in this order."""
    heterogeneity: HeterogeneityConfig = field(default_factory=HeterogeneityConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    suspicion: SuspicionConfig = field(default_factory=SuspicionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    seed: int = 0
    rounds: int = 10
    num_byzantine: int = 0
    device: str = "cpu"
    data: DataSource = DataSource.real
    min_replies: int = 1
    round_timeout_s: float = 3600.0
    baselines: bool = False
    resume: str | None = None
    run_name: str | None = None
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        _within("rounds", self.rounds, least=1)
        _within("num_byzantine", self.num_byzantine, least=0)
        _within("min_replies", self.min_replies, least=1)
        _within("round_timeout_s", self.round_timeout_s, above=0)
        if self.run_name is not None:
            check_name("run_name", self.run_name)
        _require(
            _DEVICE.fullmatch(self.device) is not None,
            f"device={self.device} cannot be used here: choose cpu, cuda, cuda:0, mps, xpu or xpu:0",
        )


@dataclass
class DpTask:
    """What nodes are told of a run's differential privacy: the plan, from which each solves for its own noise."""

    rounds: int
    """Planned: what `target_epsilon` is for."""
    clip_norm: float
    clipping: Clipping
    grad_sample: GradSample
    max_physical_batch: int
    frozen_local: bool
    noise_multiplier: float | None = None
    target_epsilon: float | None = None

    @classmethod
    def of(cls, config: RunConfig) -> DpTask:
        p = config.privacy
        return cls(
            rounds=config.rounds,
            clip_norm=p.dp.clip_norm,
            clipping=p.dp.clipping,
            grad_sample=p.dp.grad_sample,
            max_physical_batch=p.dp.max_physical_batch,
            frozen_local=p.dp.frozen_local,
            noise_multiplier=p.noise_multiplier,
            target_epsilon=p.target_epsilon,
        )


@dataclass
class NodeTask:
    """The node config of a request: everything a node needs to know of the run, the same for all nodes."""

    sector: str
    options: dict[str, Any]
    training: TrainingConfig
    data: DataSource
    privacy: Privacy
    seed: int
    device: str
    num_parts: int
    """Parts the sector's data are divided into, in simulation."""
    holds_out: bool = False
    """Validation and test rows are those of whole held-out nodes; the others hold training rows only."""
    worker_momentum: float = 0.0
    """beta of the momentum that nodes reply instead of their updates."""
    proximal_mu: float = 0.0
    fine_tune_epochs: int = 0
    fine_tune_lr: float | None = None
    insecure_rng: bool = False
    """What a node draws from the OS follows from the seed instead: for tests and studies."""
    dp: DpTask | None = None
    """How to train under differential privacy; None: without."""

    @classmethod
    def of(cls, config: RunConfig) -> NodeTask:
        specs = config.nodes.expand()
        return cls(
            sector=config.sector.name,
            options=_node_options(config),
            training=config.sector.training,
            data=config.data,
            privacy=config.privacy.name,
            seed=config.seed,
            device=config.device,
            num_parts=len(specs),
            holds_out=any(s.role is not Role.train for s in specs),
            worker_momentum=config.rule.worker_momentum,
            proximal_mu=config.heterogeneity.proximal_mu,
            fine_tune_epochs=config.heterogeneity.fine_tune_epochs,
            fine_tune_lr=config.heterogeneity.fine_tune_lr,
            insecure_rng=config.privacy.secagg.insecure_rng,
            dp=DpTask.of(config) if config.privacy.name.trains_privately else None,
        )


def simulated_pins(nodes: NodesConfig) -> dict[str, Member]:
    """The members of a simulated federation, with the keys that follow from their names."""
    return {
        spec.name: Member(spec.name, spec.organisation, simulated(spec.name).public_key, spec.group, spec.role.value)
        for spec in nodes.expand()
    }


def sector_options(config: RunConfig) -> dict[str, Any]:
    """The options of the run's sector: its own, and which layers stay at the nodes."""
    chosen = config.heterogeneity.local_layers
    return {**config.sector.options, **({"local_layers": list(chosen)} if chosen else {})}


def _node_options(config: RunConfig) -> dict[str, Any]:
    """What a node needs of them: where the server's own rows lie is no node's business."""
    return {k: v for k, v in sector_options(config).items() if k != "server_path"}


# Fields that say where a run lives, not what it computes.
_PLACE = ("engine", "tracking", "runs_dir", "run_name", "resume", "baselines", "rounds")


def to_json(value: Any) -> Any:
    """A schema value -> JSON values (enums by their value)."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value.value if isinstance(value, StrEnum) else value


def from_json(cls: type[T], value: Any) -> T:
    """Inverse of `to_json`: `from_json(cls, to_json(x)) == x`.

    Unknown or missing keys, and values of another type, raise ConfigError.
    """

    def build(kind: Any, v: Any) -> Any:
        origin = typing.get_origin(kind)
        if origin in (types.UnionType, typing.Union):
            if v is None:
                return None
            return build(next(k for k in typing.get_args(kind) if k is not type(None)), v)
        if origin is list:
            # a text is a sequence too: `sectors: banks` must not become its letters
            _require(isinstance(v, list | tuple), f"expected a list, found {v!r}")
            return [build(typing.get_args(kind)[0], item) for item in v]
        if dataclasses.is_dataclass(kind):
            hints = _hints(typing.cast(type, kind))
            _require(
                isinstance(v, dict) and set(v) <= set(hints),
                f"{getattr(kind, '__name__', kind)} does not have the keys of {v!r}",
            )
            return kind(**{k: build(hints[k], item) for k, item in v.items()})  # type: ignore[operator]
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return kind(v)
        if kind is float and type(v) is int:
            return float(v)
        plain = typing.get_origin(kind) or kind
        _require(plain is Any or type(v) is plain, f"expected {getattr(plain, '__name__', plain)}, found {v!r}")
        return v

    try:
        return typing.cast(T, build(cls, value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot read a {cls.__name__} from {value!r}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def absences(config: RunConfig) -> bool:
    """Whether nodes of this run are away in some rounds because the engine obeys their availability.

    A sampler that goes by availability has asked only those that are there.
    """
    obeyed = config.engine.name is EngineName.local and config.engine.links and config.sampler.name != "availability"
    described = config.nodes.items or [config.nodes.template]
    return obeyed and any(spec.link.availability < 1 for spec in described)


def config_digest(config: RunConfig) -> str:
    """sha256 of what the run computes: where it runs, how long and where it is recorded do not change it."""
    computed = {k: v for k, v in to_json(config).items() if k not in _PLACE}
    computed["absences"] = absences(config)  # who takes part in a round follows from them
    # neither an operator's word on a node nor where a matrix lies makes it another run
    for group, key in (("suspicion", "released"), ("checks", "max_matrix_mb")):
        computed[group] = {k: v for k, v in computed[group].items() if k != key}
    computed["privacy"]["secagg"] = {k: v for k, v in computed["privacy"]["secagg"].items() if k != "workers"}
    return canonical.digest(computed)
