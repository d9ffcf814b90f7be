"""Who is asked in a round: `sampler(rng, nodes) -> cohort`, sorted by name.

Draws depend on names, never on node ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from trellis import canonical
from trellis.errors import ConfigError
from trellis.types import NodeInfo

Sampler = Callable[[np.random.Generator, Sequence[NodeInfo]], list[NodeInfo]]


def everyone(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    """Every active node."""
    return _active(nodes)


def uniform(*, fraction: float, min_nodes: int = 1) -> Sampler:
    """ceil(fraction * n) active nodes without replacement, at least `min_nodes` where there are so many."""

    def sample(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
        active = _active(nodes)
        return _choose(rng, active, cohort_size(len(active), fraction, min_nodes))

    return sample


def by_availability(*, fraction: float = 1.0, min_nodes: int = 1) -> Sampler:
    """A coin per node with its availability decides who is reachable; at most ceil(fraction * n) of those are drawn."""

    def sample(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
        active = _active(nodes)
        draw = int(rng.integers(1 << 62))
        # a coin by name: who else is in the federation does not change it
        reachable = [n for n in active if canonical.seed_for(draw, n.name) < n.availability * (1 << 63)]
        return _choose(rng, reachable, min(cohort_size(len(active), fraction, min_nodes), len(reachable)))

    return sample


def whole_groups(sampler: Sampler, rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    """What `sampler` draws when it is shown one node a group, each with all of its group: who is summed together."""
    groups: dict[str, list[NodeInfo]] = {}
    for node in _active(nodes):
        groups.setdefault(node.group, []).append(node)
    chosen = sampler(rng, [members[0] for members in groups.values()])
    return sorted((n for first in chosen for n in groups[first.group]), key=lambda n: n.name)


def _active(nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    return sorted((n for n in nodes if n.status == "active"), key=lambda n: n.name)


def cohort_size(num_nodes: int, fraction: float, min_nodes: int) -> int:
    """max(ceil(fraction * n), min_nodes), at most n."""
    # rounded first: 0.07 * 100 is 7.000000000000001 in binary, and 7 % of 100 nodes are 7
    return min(num_nodes, max(ceil(round(fraction * num_nodes, 9)), min_nodes))


def _choose(rng: np.random.Generator, nodes: list[NodeInfo], size: int) -> list[NodeInfo]:
    if not size:
        return []
    chosen = rng.choice(len(nodes), size=size, replace=False)
    return [nodes[i] for i in sorted(int(i) for i in chosen)]


def get(name: str, *, fraction: float, min_nodes: int) -> Sampler:
    """The sampler of a config.  Raises ConfigError naming the catalogue."""
    if name == "all":
        return everyone
    if name == "uniform":
        return uniform(fraction=fraction, min_nodes=min_nodes)
    if name == "availability":
        return by_availability(fraction=fraction, min_nodes=min_nodes)
    raise ConfigError(f"there is no sampler {name!r}; choose one of: all, uniform, availability")
