"""Masks: a published block by hand, the same stream from the library's own counter mode, then the laws."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from trellis.secagg.prg import CHUNK_BYTES, NUM_REGIONS, Words, add_masks, keystream

DTYPES = (np.uint32, np.uint64)
KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(5)]
CHUNK = CHUNK_BYTES // 4


def reference(key: bytes, num_words: int, dtype: type[np.unsignedinteger], region: int = 0) -> Words:
    """AES-256-CTR of zeros, in one call."""
    zeros = bytes(num_words * np.dtype(dtype).itemsize)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes([region]) + bytes(15))).encryptor()
    words: Words = np.frombuffer(encryptor.update(zeros), np.dtype(dtype).newbyteorder("<")).astype(dtype)
    return words


def test_the_first_block_under_the_zero_key_is_the_published_one() -> None:
    """AES-256 of the zero block under the zero key: H of test case 13 in the GCM specification."""
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert keystream(bytes(32), 4, np.uint32).tolist() == [0x78C095DC, 0x898940A2, 0x14A248AD, 0x87208492]
    assert keystream(bytes(32), 2, np.uint64).astype("<u8").tobytes() == block


def test_sums_wrap() -> None:
    vector = np.array([0xFFFFFFFF, 0], np.uint32)
    add_masks(vector, [(bytes(32), 1)])
    assert vector.tolist() == [0x78C095DB, 0x898940A2]
    add_masks(vector, [(bytes(32), -1), (bytes(32), -1)])
    assert vector.tolist() == [0xFFFFFFFF - 0x78C095DC, 2**32 - 0x898940A2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("region", [0, 1, 255])
@pytest.mark.parametrize(
    "num_words",
    # around what is drawn apart (32 bytes), and around whole chunks after it
    [*range(0, 18), 4096, *(n + d for n in (CHUNK // 2, CHUNK, 2 * CHUNK) for d in (-1, 0, 1, 3, 4, 5, 7, 8, 9))],
)
def test_the_keystream_is_counter_mode_of_the_library(
    num_words: int, region: int, dtype: type[np.unsignedinteger]
) -> None:
    stream = keystream(KEYS[0], num_words, dtype, region=region)
    assert stream.dtype == dtype
    assert np.array_equal(stream, reference(KEYS[0], num_words, dtype, region))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_key_masks_every_chunk(dtype: type[np.unsignedinteger]) -> None:
    size = 3 * CHUNK + 11
    vector = keystream(KEYS[4], size, dtype, region=9)
    expected = (
        vector + reference(KEYS[0], size, dtype) - reference(KEYS[1], size, dtype) + reference(KEYS[2], size, dtype)
    )
    add_masks(vector, [(KEYS[0], 1), (KEYS[1], -1), (KEYS[2], 1)])
    assert np.array_equal(vector, expected)


@given(
    st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([1, -1])), max_size=6),
    st.integers(0, 70),
    st.sampled_from(DTYPES),
    st.integers(0, 255),
)
def test_masks_with_both_signs_cancel(
    masks: list[tuple[bytes, int]], size: int, dtype: type[np.unsignedinteger], region: int
) -> None:
    original = keystream(KEYS[3], size, dtype)
    vector = original.copy()
    add_masks(vector, masks, region=region)
    add_masks(vector, [(key, -sign) for key, sign in reversed(masks)], region=region)
    assert np.array_equal(vector, original)


@given(st.integers(2, 7), st.integers(0, 40), st.sampled_from(DTYPES))
def test_pairwise_masks_leave_the_sum_of_a_group(n: int, size: int, dtype: type[np.unsignedinteger]) -> None:
    def seed(u: int, v: int) -> bytes:
        return hashlib.sha256(bytes([min(u, v), max(u, v)])).digest()

    plain = [keystream(KEYS[0], size, dtype, region=u) for u in range(n)]
    masked = [vector.copy() for vector in plain]
    for u in range(n):
        add_masks(masked[u], [(seed(u, v), 1 if u < v else -1) for v in range(n) if v != u])
    assert np.array_equal(sum(masked, np.zeros(size, dtype)), sum(plain, np.zeros(size, dtype)))
    assert size < 2 or all(not np.array_equal(a, b) for a, b in zip(masked, plain, strict=True))


def test_regions_are_disjoint_parts_of_one_stream() -> None:
    """Decrypted, each region is its counter blocks: the region's byte, then 0, 1, 2, ... in 15 bytes."""
    decryptor = Cipher(algorithms.AES(KEYS[0]), modes.ECB()).decryptor()
    for region in range(NUM_REGIONS):
        blocks = decryptor.update(keystream(KEYS[0], 64, np.uint32, region=region).astype("<u4").tobytes())
        assert blocks == b"".join(bytes([region]) + i.to_bytes(15, "big") for i in range(16))


def test_neither_keys_nor_regions_share_words() -> None:
    streams = [keystream(key, 1000, np.uint64, region=region) for key in KEYS for region in (0, 1, 128)]
    assert np.unique(np.concatenate(streams)).size == len(streams) * 1000


def test_bytes_of_the_keystream_are_uniform_and_independent() -> None:
    """Chi-square over 4 MiB of bytes, and over pairs of neighbours; a uniform stream fails each once in 10^6 keys."""
    stream = np.frombuffer(keystream(KEYS[1], 1 << 20, np.uint32).tobytes(), np.uint8).astype(np.int64)
    for values, kinds in ((stream, 256), (stream[0::2] * 256 + stream[1::2], 65536)):
        counts = np.bincount(values, minlength=kinds)
        expected = values.size / kinds
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert stats.chi2.ppf(1e-6, kinds - 1) < statistic < stats.chi2.isf(1e-6, kinds - 1)


def test_a_masked_vector_says_nothing_of_what_it_hides() -> None:
    """Correlation of a constant-slope vector with its masked self: |z| > 5 once in 10^6 keys."""
    plain = np.arange(0, 1 << 32, 1 << 16).astype(np.uint32)
    masked = plain.copy()
    add_masks(masked, [(KEYS[2], 1)])
    z = np.corrcoef(plain, masked)[0, 1] * np.sqrt(plain.size)
    assert abs(z) < 5


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_key_of_another_length_is_refused_before_anything_is_masked(length: int) -> None:
    vector = np.arange(4, dtype=np.uint32)
    with pytest.raises(ValueError, match=f"mask 1: a key of {length} bytes"):
        add_masks(vector, [(KEYS[0], 1), (bytes(length), 1)])
    assert vector.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sign", [0, 2, -2])
def test_a_sign_is_plus_or_minus_one(sign: int) -> None:
    with pytest.raises(ValueError, match=f"sign {sign}"):
        add_masks(np.zeros(4, np.uint32), [(KEYS[0], sign)])


@pytest.mark.parametrize("region", [-1, 256])
def test_a_region_is_one_byte(region: int) -> None:
    with pytest.raises(ValueError, match=f"region {region}"):
        keystream(KEYS[0], 4, np.uint32, region=region)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.int32),
        np.zeros(4, np.uint16),
        np.zeros(4, np.float32),
        np.zeros(4, np.dtype(np.uint32).newbyteorder()),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
    ],
    ids=["signed", "short", "floating", "byte order", "matrix", "strided"],
)
def test_only_contiguous_vectors_of_words_are_masked(vector: Words) -> None:
    with pytest.raises(ValueError, match="contiguous vector of uint32 or uint64"):
        add_masks(vector, [(KEYS[0], 1)])


def test_a_read_only_vector_is_refused() -> None:
    vector = np.zeros(4, np.uint32)
    vector.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        add_masks(vector, [(KEYS[0], 1)])


def test_a_row_of_a_matrix_is_masked_alone() -> None:
    matrix = np.zeros((3, 50), np.uint32)
    add_masks(matrix[1], [(KEYS[0], 1)])
    assert not matrix[0].any()
    assert not matrix[2].any()
    assert np.array_equal(matrix[1], keystream(KEYS[0], 50, np.uint32))


def test_a_shorter_keystream_begins_a_longer_one() -> None:
    streams = [keystream(KEYS[0], n, np.uint64) for n in (3, 4, 5, 1000, CHUNK)]
    assert all(np.array_equal(short, long[: short.size]) for short, long in pairwise(streams))
