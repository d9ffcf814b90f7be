"""Shamir's secret sharing of 32-byte secrets: any `threshold` shares give the secret, fewer say nothing about it.

The secret is f(0) of a random polynomial of degree threshold - 1, a share is f(x) for one point x = 1, 2, ...  (Shamir,
CACM 1979, https://dl.acm.org/doi/10.1145/359168.359176).  The field is the integers mod p = 2^256 + 297, the smallest
prime above 2^256, so every 32-byte string is a secret; a share takes 33 bytes, big-endian.

Law:  for any `threshold` of the points,
      `combine([shares of those points], lagrange_at_zero(those points)) == secret`.

A share is not authenticated: a wrong one gives a wrong secret.  Who calls checks each share against its dealer's list
of hashes, and the secret against its own commitment.  Python's integers are not constant-time: nothing here may be
timed by a stranger.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

from trellis.errors import SecAggError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_LAZY_BITS = 512
"""How far a value may grow beyond p before it is reduced: a division costs as much as several small products."""


def split(
    secret: bytes, points: Sequence[int], threshold: int, *, randbelow: Callable[[int], int] = secrets.randbelow
) -> list[bytes]:
    """One share a point, in the order of the points.  32 bytes -> len(points) times 33 bytes

    Points are different integers from 1 to p - 1, small ones being fast; `randbelow(p)` gives uniform field elements.
    ValueError unless 2 <= threshold <= len(points): with 1 a share would be the secret.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes: {SECRET_BYTES} are needed")
    if not 2 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} for {len(points)} points: 2 to {len(points)} is possible")
    _require_points(points)
    # The leading coefficient may be 0: without that, t - 1 shares would exclude one secret.
    coefficients = [randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    return [_evaluate(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points]


def lagrange_at_zero(points: Sequence[int]) -> list[int]:
    """l_i = prod over j != i of x_j / (x_j - x_i) mod p, so that f(0) = sum of l_i f(x_i).  One a point.

    Computed once for all secrets shared to the same points.  ValueError for repeated points, or outside 1 to p - 1.
    """
    _require_points(points)
    # Over the integers first: with small points these products are far shorter than their residues.
    denominators = [x * math.prod(other - x for other in points if other != x) % PRIME for x in points]
    numerator = math.prod(points) % PRIME
    return [numerator * inverse % PRIME for inverse in _inverses(denominators)]


def combine(shares: Sequence[bytes], coefficients: Sequence[int]) -> bytes:
    """The secret from `threshold` shares and the `lagrange_at_zero` of their points.  -> 32 bytes

    SecAggError("bad_share") when a share is no field element, or when what comes out is no 32-byte secret; the latter
    does not say whose share is wrong.  Evidence never holds the value of a share.
    """
    if len(shares) != len(coefficients) or not shares:
        raise ValueError(
            f"{len(shares)} shares and {len(coefficients)} coefficients: as many are needed, and one at least"
        )
    values = [_field_element(share, number) for number, share in enumerate(shares)]
    secret: int = sum(map(mul, values, coefficients)) % PRIME
    if secret.bit_length() > 8 * SECRET_BYTES:
        raise SecAggError("bad_share", f"{len(shares)} shares combine to no {SECRET_BYTES}-byte secret: one is wrong")
    return secret.to_bytes(SECRET_BYTES, "big")


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule, highest power first, reduced once in so many steps that no value grows past `_LAZY_BITS`."""
    num_steps = max(1, _LAZY_BITS // x.bit_length())
    value = 0
    for at in range(0, len(coefficients), num_steps):
        for coefficient in coefficients[at : at + num_steps]:
            value = value * x + coefficient
        value %= PRIME
    return value


def _inverses(values: Sequence[int]) -> list[int]:
    """Montgomery's trick: one inversion mod p, and three products for each value."""
    before = list(accumulate(values, lambda a, b: a * b % PRIME, initial=1))
    inverse = pow(before.pop(), -1, PRIME)
    inverses = []
    for value, product in zip(reversed(values), reversed(before), strict=True):
        inverses.append(inverse * product % PRIME)
        inverse = inverse * value % PRIME
    return inverses[::-1]


def _field_element(share: bytes, number: int) -> int:
    if len(share) != SHARE_BYTES:
        raise SecAggError("bad_share", f"share {number} has {len(share)} bytes, {SHARE_BYTES} are needed")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise SecAggError("bad_share", f"share {number} is not below p = 2^256 + 297")
    return value


def _require_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError(f"points {list(points)}: they must differ, and 0 is where the secret is")
