"""A group: who is in it, who shares with whom, and how members are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from trellis.errors import ConfigError
from trellis.identity import Member
from trellis.secagg import graph, transcript
from trellis.secagg.messages import AskKeys


def points(names: Sequence[str]) -> dict[str, int]:
    """Where a member's shares are evaluated: 1 for the first by name."""
    return {name: i + 1 for i, name in enumerate(names)}


def peers(asked: AskKeys) -> Mapping[str, tuple[str, ...]]:
    """With whom each member shares secrets and has masks in common, by name; never with itself."""
    return peers_of(asked.names, asked.num_neighbours, asked.roster)


@lru_cache(maxsize=64)
def peers_of(names: tuple[str, ...], num_neighbours: int, roster: bytes) -> Mapping[str, tuple[str, ...]]:
    """The same, from its parts: everybody, or the neighbours in a graph that follows from the roster."""
    if not num_neighbours:
        return {name: tuple(other for other in names if other != name) for name in names}
    return graph.neighbours(graph.order(names, roster), num_neighbours)


def pool(name: str, pins: Mapping[str, Member]) -> tuple[str, ...]:
    """All members among whom a member's group may be drawn, sorted."""
    return tuple(sorted(other for other, member in pins.items() if member.role == pins[name].role))


def organisations(names: Iterable[str], pins: Mapping[str, Member]) -> int:
    """How many organisations own these members.  A member without one counts as its own."""
    return len({pins[name].organisation or f"node {name}" for name in names})


def pinned_group(group: str, pins: Mapping[str, Member]) -> tuple[str, ...]:
    """All members that are pinned in a group, sorted."""
    return tuple(sorted(name for name, member in pins.items() if member.group == group))


def drawn_seed(run: str, epoch: str, reveals: Mapping[str, bytes]) -> bytes:
    """What groups are drawn from: everybody's number."""
    return transcript.digest("draw", run, epoch, *(part for name in sorted(reveals) for part in (name, reveals[name])))


def dealt_out(members: Sequence[tuple[str, str]], group_size: int, seed: bytes = b"") -> list[tuple[str, ...]]:
    """(name, organisation) of all -> groups of at least `group_size`, their sizes one apart at most, sorted names.

    Members of one organisation are dealt to different groups, as far as there are groups.  With a seed their order
    follows from it alone; without one they are dealt by name.
    """
    if group_size < 1:
        raise ConfigError(f"a group of {group_size} members: at least 1 is needed")
    num_groups = max(len(members) // group_size, 1)

    def rank(member: tuple[str, str]) -> tuple[bytes, bytes, str]:
        name, organisation = member
        owner = organisation or f"node {name}"
        if not seed:
            return owner.encode(), name.encode(), name
        return transcript.digest("rank", seed, owner), transcript.digest("rank", seed, owner, name), name

    ordered = [name for name, _ in sorted(members, key=rank)]
    return sorted(tuple(sorted(ordered[i::num_groups])) for i in range(num_groups))


def crowded(names: Iterable[str], pins: Mapping[str, Member]) -> int:
    """The most members that one organisation has among these."""
    owners = [pins[name].organisation or f"node {name}" for name in names]
    return max(map(owners.count, owners), default=0)
