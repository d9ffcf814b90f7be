"""The shared vocabulary: what travels between the rooms of the house.

    Request -> (nodes) -> Update | Refusal -> Row -> Aggregated -> ServerState, RoundRecord

Frozen values and function protocols only; no Flower, no Hydra, no MLflow.  Shapes are suffixes: n rows, d coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trellis import canonical
from trellis.vectors import Vector

Purpose = Literal["train", "evaluate", "statistics"]
Counts = dict[str, npt.NDArray[np.generic]]

PROTOCOL = 2
"""Version of the messages between server and node."""

REFUSALS = (
    "unknown_node", "error_reply", "late", "duplicate", "wrong_request", "wrong_records", "wrong_keys", "wrong_shape",
    "wrong_dtype", "not_finite", "norm", "num_examples", "metrics", "counts", "oversize", "undecodable", "unavailable",
    "bad_signature", "bad_key", "bad_share", "bad_complaint", "group_lost",
)  # fmt: skip
"""Every reason for which the server turns a reply away.  A policy's refusal is listed under its own `policy.*` code.
`group_lost`: the node did nothing wrong, but the sum of its group under secure aggregation could not be had."""

LOSS_MAX = 100.0
"""Where a loss is cut, a row's in evaluation and a node's under secure aggregation: nothing outweighs all others in a
mean."""

POLICY_CODES = {
    "policy.sector": 1001,
    "policy.privacy": 1002,
    "policy.max_examples": 1003,
    "policy.protocol": 1004,
    "policy.identity": 1005,
    "policy.secagg": 1006,
    "policy.budget": 1007,
}
"""Reasons for which a node refuses a request, and the code of Flower's error reply that carries each."""


class Role(StrEnum):
    """What a node's rows are for.  Held-out nodes never train."""

    train = "train"
    validation = "validation"
    test = "test"


class Threat(StrEnum):
    """What a server is assumed to be capable of, under secure aggregation."""

    semi_honest = "semi_honest"
    """It follows the protocol, and looks at everything it gets."""
    malicious_server = "malicious_server"
    """It sends whatever it likes to whomever it likes."""

    def at_least(self, least: Threat) -> bool:
        """Whether what is safe under this assumption is safe under `least`."""
        return self is Threat.malicious_server or least is Threat.semi_honest


class Privacy(StrEnum):
    """Privacy modes; `protects` orders them."""

    none = "none"
    central_dp = "central_dp"
    secagg = "secagg"
    dp = "dp"
    distributed_dp = "distributed_dp"
    dp_secagg = "dp_secagg"

    @property
    def protects(self) -> frozenset[str]:
        """What the mode guarantees to a node."""
        return _PROTECTS[self]

    @property
    def trains_privately(self) -> bool:
        """Whether nodes train by DP-SGD: what a single row adds is hidden in noise."""
        return "example_level" in self.protects

    @property
    def noises(self) -> bool:
        """Whether the mode has noise, and needs to be told how much."""
        return "released_model" in self.protects

    @property
    def masks(self) -> bool:
        """Whether nodes' updates and counts are masked: the server learns sums only."""
        return "update_hidden" in self.protects

    def at_least(self, least: Privacy) -> bool:
        """Whether every guarantee of `least` is among this mode's."""
        return least.protects <= self.protects


_PROTECTS = {
    Privacy.none: frozenset[str](),
    Privacy.central_dp: frozenset({"released_model"}),
    Privacy.secagg: frozenset({"update_hidden"}),
    Privacy.dp: frozenset({"released_model", "example_level"}),
    Privacy.distributed_dp: frozenset({"released_model", "update_hidden"}),
    Privacy.dp_secagg: frozenset({"released_model", "example_level", "update_hidden"}),
}


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric's name and which way is better."""

    name: str
    direction: Literal["max", "min"]

    def better(self, a: float, b: float) -> bool:
        return a > b if self.direction == "max" else a < b


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What the server knows of a node.  A node is its `name`; `node_id` only addresses messages."""

    name: str
    node_id: int
    organisation: str = ""
    region: str = ""
    role: Role = Role.train
    availability: float = 1.0
    max_examples: int | None = None
    """The most training rows it may declare: what it registered, or what the federation allows it."""
    num_examples: int | None = None
    """Training rows it registered: its weight where rows are weighed; None weighs nothing."""
    num_rows: int | None = None
    """All rows it registered: the most it may score."""
    group: str = ""
    """With whom its updates are summed under secure aggregation."""
    public_key: bytes = b""
    """Of its identity, Ed25519."""
    status: str = "active"


@dataclass(frozen=True, slots=True)
class CountField:
    """One additive count in a masked vector: `size` words from where the last one ended, in units of 2 ** exponent.

    No node's count is above `most`, and all members' together fit a word.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    exponent: int
    most: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Masking:
    """How the members of one group mask what they reply to a request (facts of `trellis.secagg`).

    All of it is in the request's digest, from which masks are derived: members that were told different settings
    cannot be summed.
    """

    epoch: str
    group: str
    roster: str
    """Digest of the group, its keys and its threshold, as the members were told when the epoch began."""
    confirmed: str
    """Digest of the members' keys and shares, which they signed."""
    members: tuple[str, ...]
    """Whose masks are in the sum, sorted; all of the group whose keys and shares were good."""
    quorum: int
    clip_norm: float
    scale: int
    dtype: str
    dim: int
    counts: tuple[CountField, ...]
    weights: tuple[int, ...]
    """Whole weights of the members, held by the server; all 1 where rows are not weighed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a round asks, one value for all its members.

    `config` is the whole node config (JSON values).  The digest is the key of every cache at a node, and what nodes
    sign and derive masks from; so nothing about a single node is in it.  `run` survives resume.  Under secure
    aggregation there is one a group: `members` are all who are asked, `masking` is the group's.
    """

    run: str
    round: int
    purpose: Purpose
    base: str
    config: Mapping[str, Any]
    members: tuple[str, ...]
    splits: tuple[str, ...] = ("validation",)
    """Which of its rows a node evaluates the base on; "test_tuned": what the base is on them once the node has
    fine-tuned it on its own training rows."""
    key_index: int | None = None
    """Which of the epoch's keys the reply is masked with."""
    masking: Masking | None = None
    """None: replies travel in clear."""

    def encode(self) -> bytes:
        return canonical.encode(
            {
                "protocol": PROTOCOL,
                "run": self.run,
                "round": self.round,
                "purpose": self.purpose,
                "base": self.base,
                "config": self.config,
                "members": list(self.members),
                "splits": list(self.splits),
                "key_index": self.key_index,
                "masking": None if self.masking is None else asdict(self.masking),
                "reply": "delta",
            }
        )

    @property
    def digest(self) -> str:
        return canonical.digest_of(self.encode())


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reply turned away: whose, why (one of `REFUSALS` or `POLICY_CODES`), and what was seen."""

    node: str
    reason: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Update:
    """One node's checked reply.

    `update_d` is None for an evaluation.  Metrics and counts are of the params it was sent.
    """

    node: str
    update_d: Vector | None
    num_examples: int
    metrics: Mapping[str, float]
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """Additive counts by split ("validation", "test")."""
    size_bytes: int = 0
    seconds: float = 0.0
    """Between the question and this reply; virtual in simulation."""
    norm: float | None = None
    """Euclidean norm of `update_d`, measured once; None: not measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a rule sees: one node's update, or the mean of a group under secure aggregation."""

    members: tuple[str, ...]
    update_d: Vector
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Collected:
    """Everything an exchange brought back.  `updates_nd[i]` is `rows[i].update_d`; rows are sorted by members."""

    updates_nd: npt.NDArray[np.float32]
    rows: tuple[Row, ...]
    updates: tuple[Update, ...]
    """One a node that answered, without the vectors, sorted by name."""
    refusals: tuple[Refusal, ...]
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float]
    node_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Payload bytes (down, up) of every node that was asked."""
    node_seconds: Mapping[str, float] = field(default_factory=dict)
    """Between question and reply, of every node that replied in time; empty where time stands still."""
    groups: tuple[GroupSum, ...] | None = None
    """Under secure aggregation, every group that was asked; None where nodes' own replies are seen."""

    @property
    def liars_out(self) -> int:
        """Groups lost to a named liar: so many liars fewer are among the rows."""
        return sum(group.lost_to_liar for group in self.groups or ())


@dataclass(frozen=True, slots=True)
class GroupSum:
    """What is known of a group in a round: who is in its sum, and the sum of their counts and metrics."""

    name: str
    members: tuple[str, ...]
    """All of the group."""
    survivors: tuple[str, ...] = ()
    """Whose replies are in the sum; none when it was lost."""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Sums over the survivors."""
    lost: str | None = None
    """Why there is no sum."""
    lost_to_liar: bool = False
    voided: str | None = None
    """Why its counts were left out: no rows that are registered can have them."""
    drawn: bool = False
    """Whether the group was drawn for this round, and is not the one its members have pinned."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """A rule's answer: the combined update, how much each row counted, and the rule's next state."""

    update_d: npt.NDArray[np.floating]
    weights_n: npt.NDArray[np.float64] | None = None
    state: Mapping[str, npt.NDArray[np.generic]] | None = None


Need = Literal["rng", "names", "weights", "state", "reference_d"]
"""rng: a generator of the run and round; names: members of each row; weights: what the registry holds, or None; state:
what the rule returned last; reference_d: the server's own update, trained from the same base on its own rows."""


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule and what is known of it.

    `fn(updates_nd, *, num_byzantine, **needs)` returns the (d,) aggregate or an `Aggregated`.  `min_rows(f)` is the
    least number of rows with which f liars are survived, `kappa(n, f)` the robustness constant (None where none is
    finite), `sensitivity(n)` the factor on the clip norm for central noise (None: no central noise with this rule).
    """

    name: str
    fn: Callable[..., npt.NDArray[np.floating] | Aggregated]
    min_rows: Callable[[int], int]
    needs: tuple[Need, ...] = ()
    tolerates: bool = True
    """False: one liar moves the aggregate anywhere, so `num_byzantine` must be 0."""
    kappa: Callable[[int, int], float] | None = None
    sensitivity: Callable[[int], float] | None = None


@dataclass(frozen=True, slots=True)
class PreAggregatorSpec:
    """What stands between the rows and the rule: `fn(updates_nd, *, num_byzantine, **needs)`, (n, d) -> (m, d).

    Every pre-aggregator combines rows linearly.  `num_rows(n)` is m; `kappa(kappa_of_rule, n, f)` the robustness
    constant of a rule that stands behind it (None: not known).
    """

    name: str
    fn: Callable[..., Any]
    needs: tuple[Need, ...] = ()
    num_rows: Callable[..., int] = lambda n: n
    """(n, **options) -> m."""
    mixes: bool = True
    """Whether a row may be made of several nodes' rows: then it has no name and no weight of its own."""
    kappa: Callable[[float, int, int], float] | None = None


@dataclass(frozen=True, slots=True)
class Best:
    """The best version so far, by the primary metric on validation rows."""

    round: int
    digest: str
    value: float


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server needs to resume: the state after `round` rounds, before the next."""

    run: str
    round: int
    params: Mapping[str, npt.NDArray[np.generic]]
    optimizer: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    rule: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    observers: Mapping[str, Any] = field(default_factory=dict)
    accountants: Mapping[str, Any] = field(default_factory=dict)
    best: Best | None = None
    seed: int = 0
    """Every draw of round r comes from `canonical.seed_for(seed, purpose, r)`: there is no generator state to keep."""
    secret: str = ""
    """Goes into the draws of rules as well: nodes know the seed, and must not foresee what a rule will look at.  Empty
    in simulation, where a run follows from its seed."""


@dataclass(frozen=True, slots=True)
class RoundView:
    """What an observer may look at, after aggregation."""

    round: int
    rows: tuple[Row, ...]
    aggregated: Aggregated | None
    refusals: tuple[Refusal, ...]
    """Of everyone who was asked in the round, judges too."""
    base: Mapping[str, npt.NDArray[np.generic]]
    answered: tuple[str, ...] = ()
    """Nodes whose replies were good: those behind the rows, and judges."""
    updates_nd: Any = None
    """The rows as one matrix, for `strategies.rows`; it is the round's own, to be read and not kept."""
    fits: Callable[[int], bool] = lambda num_nodes: True
    """Whether a round like this one could still be aggregated with so many of its nodes asked no more."""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """Log-likelihood ratios against nodes that a test of the round itself found: an audit of groups, say."""


Observer = Callable[[Any, RoundView], tuple[Any, Mapping[str, float]]]
"""(state, view) -> (state, findings).  Never called inside a rule."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round, as it is recorded.  Metrics are those of the base: version `round - 1`, digest `base_digest`."""

    run: str
    round: int
    purpose: Purpose
    started_at: float
    base_digest: str
    digest: str
    """Of the params after the round; equals `base_digest` when the round closed without a step."""
    asked: tuple[str, ...]
    answered: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    closed: str | None = None
    """Why no step was taken, or None."""
    base_metrics: Mapping[str, float] = field(default_factory=dict)
    node_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    num_examples: Mapping[str, int] = field(default_factory=dict)
    update_norms: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    aggregate_norm: float = 0.0
    epsilon: Mapping[str, float] = field(default_factory=dict)
    """By node, all that was ever spent on its data, at its own delta; not of nodes that hide it."""
    noise_multipliers: Mapping[str, float] = field(default_factory=dict)
    """By node, the noise of this round's training."""
    findings: Mapping[str, float] = field(default_factory=dict)
    suspicion: Mapping[str, float] = field(default_factory=dict)
    """Evidence against each node so far, as a log-likelihood ratio; empty without a detector."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Nodes that are asked no more from the next round on, each with the evidence."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    node_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Payload bytes (down, up) by node."""
    node_seconds: Mapping[str, float] = field(default_factory=dict)
    """Between question and reply, by node: virtual in the local engine, real in deployment."""
    stragglers: tuple[str, ...] = ()
    """Nodes that the round waited for: no reply before the deadline, or more than twice the median time."""
    groups: Mapping[str, Mapping[str, Any]] | None = None
    """Under secure aggregation what is known by group: members, survivors, why it was lost.  Then nodes' own updates,
    metrics and counts are masked: they are in no other field."""
