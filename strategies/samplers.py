"""Who is asked in a round: `sampler(rng, nodes) -> cohort`, sorted by name.

Draws depend on names, never on node ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from trellis.errors import ConfigError
from trellis.types import NodeInfo

Sampler = Callable[[np.random.Generator, Sequence[NodeInfo]], list[NodeInfo]]


def everyone(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    """Every active node."""
    return _active(nodes)


def uniform(*, fraction: float, min_nodes: int = 1) -> Sampler:
    """ceil(fraction * n) active nodes without replacement, at least `min_nodes` where there are so many."""

    def sample(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
        return _draw(rng, _active(nodes), fraction, min_nodes)

    return sample


def by_availability(*, fraction: float = 1.0, min_nodes: int = 1) -> Sampler:
    """A coin per node with its availability decides who is reachable; at most ceil(fraction * n) of those are drawn."""

    def sample(rng: np.random.Generator, nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
        active = _active(nodes)
        coins = rng.random(len(active))
        reachable = [node for node, coin in zip(active, coins, strict=True) if coin < node.availability]
        size = max(ceil(fraction * len(active)), min_nodes)
        return _choose(rng, reachable, min(size, len(reachable)))

    return sample


def _active(nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    return sorted((n for n in nodes if n.status == "active"), key=lambda n: n.name)


def _draw(rng: np.random.Generator, nodes: list[NodeInfo], fraction: float, min_nodes: int) -> list[NodeInfo]:
    return _choose(rng, nodes, min(len(nodes), max(ceil(fraction * len(nodes)), min_nodes)))


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
