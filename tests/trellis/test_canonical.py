"""One spelling for what is hashed, and seeds from it."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis import canonical

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_the_spelling_is_sorted_dense_and_ascii() -> None:
    assert canonical.encode({"b": [1, 2.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null]}'


def test_a_digest_is_the_sha256_of_the_spelling() -> None:
    assert canonical.digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    assert canonical.encode(value) == canonical.encode(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical.encode(value)


def test_a_seed_by_hand() -> None:
    expected = int.from_bytes(hashlib.sha256(b'[1,"train",2,"a"]').digest()[:8], "big") >> 1
    assert canonical.seed_for(1, "train", 2, "a") == expected


def test_a_seed_depends_on_every_part_and_on_their_order() -> None:
    base: tuple[int | str, ...] = (0, "train", 3, "north")
    changed: list[tuple[int | str, ...]] = [
        (1, "train", 3, "north"),
        (0, "evaluate", 3, "north"),
        (0, "train", 4, "north"),
        (0, "train", 3, "south"),
        (0, "train", "3", "north"),
        (0, "train", 3),
        (0, "train3", "north"),
    ]
    seeds = [canonical.seed_for(*parts) for parts in [*itertools.permutations(base), *changed]]
    assert len(set(seeds)) == 24 + len(changed)


@given(st.lists(st.integers() | st.text(), max_size=4))
def test_a_seed_fits_a_signed_64_bit_integer(parts: list[int | str]) -> None:
    assert 0 <= canonical.seed_for(*parts) < 1 << 63
