"""Who shares masks with whom, when a group is too large for everyone to do so with everyone.

In a group of n each node needs only k = O(log n) neighbours: it masks against them and shares its secrets among them
(Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020, https://eprint.iacr.org/2020/704).  The graph is Harary's H(n, k)
(PNAS 1962), the sparsest that stays connected without any k - 1 of its nodes, on an order that nobody chose: then those
who collude or drop out are a random sample of any node's neighbourhood.

`degree` asks, for shares of which at most a fraction gamma of the n nodes collude and at most delta drop out:

    connected   n (gamma + delta)^(k/2)                                <= 2^-privacy_bits
    private     n P[at least t of a node's k neighbours collude]       <= 2^-privacy_bits
    correct     n P[fewer than t of a node's k neighbours stay]        <= 2^-correctness_bits

for a semi-honest server (against a malicious one the paper draws the graph otherwise).  Probabilities are
hypergeometric, floor(gamma n) or floor(delta n) marked among the n - 1 others.  All three are compared in integers and
rationals: no rounding decides.  k at 40, 40 and 30 bits:

    gamma, delta    n=50      100   300   1000  10000
    0.1, 0.1        40        41    42    52    60
    0.2, 0.1        complete  54    58    74    87
    1/3, 0.1        complete  78    82    113   140
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

_LABEL = b"trellis/secagg/order/v1"


def degree(
    num_members: int, *, colluding: float, dropping: float, privacy_bits: int = 40, correctness_bits: int = 30
) -> tuple[int, int] | None:
    """(k, t): the smallest number of neighbours that is enough, and the threshold of the shares among them.

    `colluding` and `dropping` are fractions of the members, read as the nearest rational with a denominator up to 1e6
    (1/3 means a third).  t is the largest that is still correct: what is left over goes to privacy.  It is at least 2.
    None when k would have to be n - 1 or more: take the complete graph.
    """
    if not (num_members >= 1 and 0 <= colluding <= 1 and 0 <= dropping <= 1):
        raise ValueError(f"{num_members=}, {colluding=}, {dropping=}: fractions are 0 to 1, of at least one member")
    gamma, delta = (Fraction(fraction).limit_denominator(10**6) for fraction in (colluding, dropping))
    num_colluding, num_dropping = math.floor(gamma * num_members), math.floor(delta * num_members)
    for k in range(2, num_members - 1):
        if not _stays_connected(num_members, k, gamma + delta, privacy_bits):
            continue
        least = _first_unlikely(num_members, k, num_colluding, privacy_bits)
        most = k + 1 - _first_unlikely(num_members, k, num_dropping, correctness_bits)
        if max(2, least) <= most:
            return k, most
    return None


def neighbours(order: Sequence[str], num_neighbours: int) -> dict[str, tuple[str, ...]]:
    """Harary's graph H(n, k) on the order given: the neighbours of each node, sorted.

    Each node is joined to the k // 2 next and previous ones on the circle, and for odd k across it: to the opposite one
    when n is even; when n is odd by (n + 1) / 2 edges from i to i + (n - 1) / 2, so that one node has k + 1 neighbours.
    Symmetric; complete when k >= n - 1.  ValueError for repeated names, or k < 2 among more than k + 1 nodes: such a
    graph falls apart.
    """
    n = len(order)
    if len(set(order)) != n:
        raise ValueError(f"{n} names, {len(set(order))} different ones: a node has one place in the order")
    if num_neighbours < min(2, n - 1):
        raise ValueError(f"{num_neighbours} neighbours among {n} nodes: at least {min(2, n - 1)} are needed")
    joined: list[set[int]] = [set() for _ in order]
    for i, j in _edges(n, min(num_neighbours, n - 1)):
        joined[i].add(j)
        joined[j].add(i)
    return {name: tuple(sorted(order[j] for j in others)) for name, others in zip(order, joined, strict=True)}


def order(names: Sequence[str], seed: bytes) -> list[str]:
    """A permutation of the names that follows from the seed, and from who they are, alone.

    By SHA-256 of label, seed and name; the order in which they are given does not matter.
    """
    # The length stands before the seed, or a seed's last letter could pass for a name's first.
    prefix = _LABEL + len(seed).to_bytes(8, "big") + seed
    return sorted(names, key=lambda name: hashlib.sha256(prefix + name.encode()).digest())


def _stays_connected(num_members: int, k: int, lost: Fraction, bits: int) -> bool:
    """n lost^(k/2) <= 2^-bits; squared, so that an odd k needs no root."""
    return bool(num_members**2 * lost**k * 4**bits <= 1)


def _first_unlikely(num_members: int, k: int, num_marked: int, bits: int) -> int:
    """The smallest m >= 1 with n P[at least m of k neighbours are marked] <= 2^-bits.

    The k are drawn from n - 1 others of which `num_marked` are marked.
    """
    num_others = num_members - 1
    num_draws = math.comb(num_others, k)
    tail = 0
    for m in range(min(k, num_marked), 0, -1):
        tail += math.comb(num_marked, m) * math.comb(num_others - num_marked, k - m)
        if num_members * tail << bits > num_draws:
            return m + 1
    return 1


def _edges(n: int, k: int) -> list[tuple[int, int]]:
    """Edges of H(n, k) between places 0 to n - 1 on a circle; 2 <= k <= n - 1, or k = n - 1."""
    around = [(i, (i + step) % n) for i in range(n) for step in range(1, k // 2 + 1)]
    if k % 2 == 0:
        return around
    # n odd: n // 2 + 1 edges, the node at n // 2 having two of them
    return around + [(i, (i + n // 2) % n) for i in range((n + 1) // 2)]
