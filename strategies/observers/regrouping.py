"""Whose groups look bad: evidence against single nodes where only sums of groups are seen.

Under secure aggregation a rule sees one row a group, and a bad row accuses nobody in it.  In audit rounds groups are
drawn anew.  A liar's groups look bad round after round; an honest node's only when it is drawn beside a liar.  So each
member of a group gets the log-likelihood ratio of what the test of the group said, and over the rounds the ratios tell
liars from those who sat beside them.

What it costs: m = n / g sums a round, of groups drawn anew, determine what a node sends every time after g + 1
rounds (docs/detection.md).

Dorfman, The detection of defective members of large populations, 1943.  Xhemrishi et al., FedGT, IEEE TIFS 2025.
https://arxiv.org/abs/2305.05506  So et al., Securing secure aggregation, AAAI 2023.  https://arxiv.org/abs/2106.03328
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from strategies.observers.suspicion import unusual
from trellis.errors import ConfigError
from trellis.types import RoundView


@dataclass(frozen=True, slots=True)
class GroupTest:
    """Error rates of the test of one group: it passes one with a liar, it flags one without."""

    missed: float = 0.1
    """P_MD.  Liars who are seen more often than 1 - P_MD speak against those beside them: rather too low than too
    high."""
    false_alarm: float = 0.05
    """P_FA"""

    def __post_init__(self) -> None:
        if not (self.missed > 0 and self.false_alarm > 0 and self.missed + self.false_alarm < 1):
            raise ConfigError(
                f"a test of groups misses {self.missed:g} and falsely accuses {self.false_alarm:g}: both must be "
                "above 0 and their sum below 1, or it says nothing"
            )


def flag_rates(num_nodes: int, num_byzantine: int, group_size: int, test: GroupTest) -> tuple[float, float]:
    """(q_h, q_b): how often the group of an honest node, and that of a liar, is flagged.

    q_b = 1 - P_MD and q_h = p_h q_b + (1 - p_h) P_FA, where p_h = 1 - C(n - 1 - f, g - 1) / C(n - 1, g - 1) is the
    probability that any of an honest node's g - 1 partners is one of the f liars.
    """
    n, f, g = num_nodes, num_byzantine, group_size
    if not (0 <= f < n and 1 <= g <= n):
        raise ValueError(f"groups of {g} of {n} nodes with {f} liars do not exist")
    beside_a_liar = 1 - math.comb(n - 1 - f, g - 1) / math.comb(n - 1, g - 1)
    q_b = 1 - test.missed
    return beside_a_liar * q_b + (1 - beside_a_liar) * test.false_alarm, q_b


def increments(num_nodes: int, num_byzantine: int, group_size: int, test: GroupTest) -> tuple[float, float]:
    """(unflagged, flagged): what a member gets, log((1 - q_b) / (1 - q_h)) or log(q_b / q_h)."""
    q_h, q_b = flag_rates(num_nodes, num_byzantine, group_size, test)
    return math.log((1 - q_b) / (1 - q_h)), math.log(q_b / q_h)


def evidence(
    groups: Sequence[tuple[str, ...]],
    flagged: Collection[int],
    *,
    num_nodes: int,
    num_byzantine: int,
    test: GroupTest,
) -> dict[str, float]:
    """The log-likelihood ratio against each member of each group, for `RoundView.evidence`.

    E[exp(what an honest node gets)] <= 1, whatever happened before and with equality at the assumed rates, while

    - groups are drawn uniformly, anew, from `num_nodes` nodes of which at most `num_byzantine` lie;
    - a group without a liar is flagged with probability at most P_FA, one with liars with at most 1 - P_MD;
    - `groups` are as they were drawn.  Who dropped out counts, since liars need not: among those who are left they are
      more.  To count the survivors' replies alone, leave names out of the answer, not out of the groups.

    A lost group is in no list, and nobody of it gets anything.
    """
    names = [node for group in groups for node in group]
    if len(set(names)) < len(names) or len(names) > num_nodes or not set(flagged) <= set(range(len(groups))):
        raise ValueError(
            f"{len(names)} names ({len(set(names))} different) in {len(groups)} groups of {num_nodes} nodes, "
            f"{sorted(flagged)} of them flagged: each node is in one group, and groups count from 0"
        )
    by_size = {size: increments(num_nodes, num_byzantine, size, test) for size in {len(group) for group in groups}}
    found: dict[str, float] = {}
    for i, group in enumerate(groups):
        unflagged, accused = by_size[len(group)]
        found |= dict.fromkeys(group, accused if i in flagged else unflagged)
    return found


def map_threshold(num_nodes: int, num_byzantine: int) -> float:
    """Above it a node is more likely a liar than not, by its own groups: log((n - f) / f); infinite where none lies."""
    return math.log((num_nodes - num_byzantine) / num_byzantine) if num_byzantine else math.inf


def ban_threshold(num_nodes: int, alpha: float, beta: float) -> float:
    """Wald's limit for each of n nodes, so that any honest one passes it with probability at most alpha / (1 - beta).

    log((1 - beta) n / alpha), beta being the share of liars that may be missed.
    """
    return math.log((1 - beta) * num_nodes / alpha)


def flagged_groups(view: RoundView, *, num_byzantine: int, outlier_factor: float) -> dict[int, str]:
    """Groups of an audit round whose mean lies far from the others', or is nothing: index of the row -> evidence.

    At most as many far ones as there can be liars, and none of fewer than 2 f + 2.  In a group of g what one liar adds
    is divided by g, but what honest nodes differ by is only divided by sqrt(g): for liars of the same size the factor
    must be sqrt(g) below that for single nodes.  A lie shorter than 1.5 g norms (`suspicion.LEAST_DISTANCE`) is never
    far.
    """
    groups = [i for i, row in enumerate(view.rows) if len(row.members) > 1]
    found = unusual(view, groups, factor=outlier_factor, most=max(num_byzantine, 1))
    return {i: flag.evidence for i, flag in sorted(found.items())}
