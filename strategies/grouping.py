"""Which nodes are summed together, and what a group needs and survives: the plan of secure aggregation.

The groups themselves are not the server's to choose: they are pinned at every site, or drawn by all.  What is here is
what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trellis.errors import ConfigError
from trellis.identity import Member
from trellis.secagg import graph, roster
from trellis.secagg.tolerance import Tolerance, least_threshold
from trellis.types import Threat

MAX_COMPLETE = 100
"""Members that still all share with each other; beyond, under semi_honest, in a sparse graph."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What holds for every group of a run."""

    threat: Threat = Threat.malicious_server
    threshold: int | None = None
    """None: the least that is safe."""
    min_group: int = 3
    colluding: float = 0.1
    dropping: float = 0.1

    def quorum(self, num_members: int) -> int:
        """Members that must answer.  Raises ConfigError where the threshold that was set is not safe, or too large."""
        least = least_threshold(self.threat, num_members)
        if self.threshold is None:
            return least
        if not least <= self.threshold <= num_members:
            raise ConfigError(
                f"privacy.secagg.threshold={self.threshold}: a group of {num_members} under threat={self.threat} needs "
                f"{least} to {num_members}"
            )
        return self.threshold

    def neighbours(self, num_members: int) -> tuple[int, int]:
        """(with how many others each member shares, shares that give a secret back); (0, quorum): with all."""
        if num_members > MAX_COMPLETE and self.threat is Threat.semi_honest:
            found = graph.degree(num_members, colluding=self.colluding, dropping=self.dropping)
            if found is not None:
                return found
        return 0, self.quorum(num_members)

    def tolerance(self, names: Sequence[str], pins: Mapping[str, Member]) -> Tolerance:
        """What a group of these members gives and survives."""
        return Tolerance(
            threat=self.threat,
            num_members=len(names),
            threshold=self.quorum(len(names)),
            num_organisations=roster.organisations(names, pins),
            min_group=self.min_group,
        )


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of the nodes that train: how many rows a rule sees, and how many it keeps when nodes are missing."""

    sizes: tuple[int, ...]
    dropouts: int
    """Members that any group may miss and still give its sum: the least of all groups'."""

    def num_rows(self, num_nodes: int) -> int:
        """Rows of a cohort with so many nodes, those that are missing being where they hurt most."""
        missing = max(sum(self.sizes) - num_nodes, 0)
        return max(len(self.sizes) - missing // (self.dropouts + 1), 0)
