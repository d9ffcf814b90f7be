"""Secret sharing: lines and parabolas by hand, then that t shares tell all and t - 1 tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import SecAggError
from trellis.secagg.shamir import PRIME, combine, lagrange_at_zero, split

SECRETS = st.binary(min_size=32, max_size=32)
SEVEN = (7).to_bytes(32, "big")


def values(shares: list[bytes]) -> list[int]:
    return [int.from_bytes(share, "big") for share in shares]


def drawn(*coefficients: int) -> Callable[[int], int]:
    """A `randbelow` that gives these, highest power first."""
    left = iter(coefficients)
    return lambda below: next(left)


def combined(shares: list[bytes]) -> bytes | None:
    """What shares at 1, 2, 3 combine to; None when they are refused."""
    try:
        return combine(shares, lagrange_at_zero([1, 2, 3]))
    except SecAggError:
        return None


def is_prime(n: int) -> bool:
    """Miller-Rabin with 40 fixed bases: a composite passes with probability below 4^-40."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    rng = Random(1)
    bases = [rng.randrange(2, n - 1) for _ in range(40)]
    return all(
        (x := pow(base, odd, n)) in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))
        for base in bases
    )


def test_p_is_the_smallest_prime_above_every_secret() -> None:
    assert PRIME == 2**256 + 297
    assert is_prime(PRIME)
    assert not any(is_prime(n) for n in range(2**256 + 1, PRIME, 2))


def test_a_line_by_hand() -> None:
    """f(x) = 7 + 5x"""
    shares = split(SEVEN, [1, 2, 10], 2, randbelow=lambda below: 5)
    assert values(shares) == [12, 17, 57]
    assert all(len(share) == 33 for share in shares)
    assert lagrange_at_zero([1, 2]) == [2, PRIME - 1]
    assert combine(shares[:2], [2, PRIME - 1]) == SEVEN


def test_a_parabola_by_hand() -> None:
    """f(x) = 7 + 3x + 2x^2"""
    shares = split(SEVEN, [1, 2, 3, 4], 3, randbelow=drawn(2, 3))
    assert values(shares) == [12, 21, 34, 51]
    assert lagrange_at_zero([1, 2, 3]) == [3, PRIME - 3, 1]
    assert combine(shares[:3], lagrange_at_zero([1, 2, 3])) == SEVEN


def test_coefficients_are_drawn_from_the_whole_field_one_a_degree() -> None:
    asked: list[int] = []

    def randbelow(below: int) -> int:
        asked.append(below)
        return 0

    split(SEVEN, range(1, 6), 4, randbelow=randbelow)
    assert asked == [PRIME] * 3


def test_every_set_of_threshold_shares_gives_the_secret() -> None:
    secret = bytes(range(32))
    shares = dict(enumerate(split(secret, range(1, 7), 4), start=1))
    for some in combinations(shares, 4):
        assert combine([shares[x] for x in some], lagrange_at_zero(some)) == secret
    # More than threshold points lie on the same polynomial.
    assert combine(list(shares.values()), lagrange_at_zero(list(shares))) == secret


@given(SECRETS, st.data())
def test_any_threshold_shares_give_the_secret(secret: bytes, data: st.DataObject) -> None:
    small, any_size = st.integers(1, 2000), st.integers(1, PRIME - 1)
    points = data.draw(st.lists(small | any_size, min_size=2, max_size=12, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    shares = dict(zip(points, split(secret, points, threshold), strict=True))
    some = data.draw(st.permutations(points))[:threshold]
    assert combine([shares[x] for x in some], lagrange_at_zero(some)) == secret


@given(st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=60), st.integers(1, PRIME - 1) | st.integers(1, 2000))
def test_a_share_is_the_polynomial_at_its_point(coefficients: list[int], point: int) -> None:
    points = [point, *(x for x in range(1, len(coefficients) + 2) if x != point)]
    share = split(SEVEN, points, len(coefficients) + 1, randbelow=drawn(*coefficients))[0]
    powers = range(len(coefficients), 0, -1)
    expected = 7 + sum(c * pow(point, power, PRIME) for c, power in zip(coefficients, powers, strict=True))
    assert values([share]) == [expected % PRIME]


def test_one_secret_is_shared_to_many_points_and_back() -> None:
    secret = bytes(range(100, 132))
    points = range(1, 1001)
    shares = split(secret, points, 501)
    some = Random(3).sample(points, 501)
    assert combine([shares[x - 1] for x in some], lagrange_at_zero(some)) == secret


@given(SECRETS, st.lists(SECRETS, min_size=1, max_size=5))
def test_fewer_shares_are_consistent_with_every_secret(secret: bytes, candidates: list[bytes]) -> None:
    """For two shares of a threshold of three and any candidate, exactly one polynomial gives both."""
    shares = split(secret, [1, 2, 3, 4], 3)
    known = values(shares)[1], values(shares)[3]  # at x = 2 and x = 4
    for candidate in candidates:
        s = int.from_bytes(candidate, "big")
        # y2 = s + 2a + 4b,  y4 = s + 4a + 16b:  the determinant, 16, is not 0 mod p
        b = (known[1] - 2 * known[0] + s) * pow(8, -1, PRIME) % PRIME
        a = (known[0] - s - 4 * b) * pow(2, -1, PRIME) % PRIME
        other = split(candidate, [1, 2, 3, 4], 3, randbelow=drawn(b, a))
        assert (other[1], other[3]) == (shares[1], shares[3])
        assert (other == shares) == (candidate == secret)


def test_shares_of_one_secret_differ_from_time_to_time() -> None:
    assert len({share for _ in range(20) for share in split(SEVEN, [1, 2, 3], 2)}) == 60


def test_shares_are_uniform_whatever_the_secret() -> None:
    """The mean of 4000 shares over p, in standard errors; beyond 5 once in 10^6 seeds."""
    rng = Random(5)
    for secret in (bytes(32), b"\xff" * 32):
        shares = [values(split(secret, [1, 2], 2, randbelow=rng.randrange))[1] / PRIME for _ in range(4000)]
        assert abs(sum(shares) / 4000 - 0.5) < 5 * (1 / 12 / 4000) ** 0.5


# ---------------------------------------------------------------- what is refused


@given(SECRETS, st.integers(0, 2), st.integers(0, 32), st.integers(1, 255))
def test_a_wrong_share_never_gives_the_secret(secret: bytes, who: int, at: int, flip: int) -> None:
    shares = split(secret, [1, 2, 3], 3)
    wrong = bytearray(shares[who])
    wrong[at] ^= flip
    shares[who] = bytes(wrong)
    assert combined(shares) != secret


@pytest.mark.parametrize("length", [0, 32, 34])
def test_a_share_of_another_length_is_refused_by_its_number(length: int) -> None:
    shares = split(SEVEN, [1, 2], 2)
    with pytest.raises(SecAggError, match=f"bad_share: share 1 has {length} bytes"):
        combine([shares[0], bytes(length)], [2, PRIME - 1])


@pytest.mark.parametrize("value", [PRIME, PRIME + 1, 2**264 - 1])
def test_a_share_outside_the_field_is_refused(value: int) -> None:
    with pytest.raises(SecAggError, match="bad_share: share 0 is not below p"):
        combine([value.to_bytes(33, "big"), bytes(33)], [2, PRIME - 1])


@pytest.mark.parametrize("value", [2**256, PRIME - 1])
def test_what_is_no_secret_is_refused(value: int) -> None:
    """A flat polynomial at a field element that 32 bytes do not hold."""
    with pytest.raises(SecAggError, match="combine to no 32-byte secret"):
        combine([value.to_bytes(33, "big")] * 2, lagrange_at_zero([1, 2]))
    assert combine([(2**256 - 1).to_bytes(33, "big")] * 2, lagrange_at_zero([1, 2])) == b"\xff" * 32


def test_evidence_never_holds_a_share() -> None:
    share = (2**264 - 12345).to_bytes(33, "big")
    with pytest.raises(SecAggError) as caught:
        combine([share, share], [1, 1])
    assert share.hex() not in str(caught.value)
    assert str(int.from_bytes(share, "big")) not in str(caught.value)


@pytest.mark.parametrize(("num_points", "threshold"), [(3, 1), (3, 0), (3, -1), (3, 4), (1, 2), (0, 2)])
def test_a_threshold_that_shares_the_secret_itself_or_none_is_refused(num_points: int, threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold {threshold} for {num_points} points"):
        split(SEVEN, range(1, num_points + 1), threshold)


@pytest.mark.parametrize("points", [[0, 1, 2], [1, 2, 2], [1, 2, -1], [1, 2, PRIME], [1, 2, PRIME + 1]])
def test_points_differ_and_none_is_where_the_secret_is(points: list[int]) -> None:
    with pytest.raises(ValueError, match="they must differ"):
        split(SEVEN, points, 2)
    with pytest.raises(ValueError, match="they must differ"):
        lagrange_at_zero(points)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_has_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match=f"a secret of {length} bytes"):
        split(bytes(length), [1, 2], 2)


def test_shares_and_coefficients_go_in_pairs() -> None:
    with pytest.raises(ValueError, match="1 shares and 2 coefficients"):
        combine([bytes(33)], [1, 2])
    with pytest.raises(ValueError, match="0 shares"):
        combine([], [])
