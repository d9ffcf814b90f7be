"""Masks: the keystream of AES-256 in counter mode, read as words and added to a vector.

A short key stands for a vector as long as the model, which nobody tells from a uniform one without the key.  Words are
little-endian and wrap, so what one member adds and another subtracts is gone from their sum (Bonawitz et al., CCS 2017,
https://eprint.iacr.org/2017/281):

    vector + keystream(key) - keystream(key) == vector

Counter block i of a region is the region's byte, then i in 15 bytes, big-endian: 256 streams of one key, all disjoint.
A (key, region) masks one vector, ever: two vectors under one stream reveal their difference.

The stream is NIST SP 800-38A's counter mode.  It is drawn from the library's GCM, which encrypts by counter mode
(SP 800-38D, section 6.5), because that was the faster one: 1e6 words under 101 keys took 47 ms, with CTR 79 ms
(OpenSSL 4.0, a Xeon with vector AES).  No tag is ever asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher, algorithms, modes

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

KEY_BYTES = 32
NUM_REGIONS = 256
CHUNK_BYTES = 1 << 18
"""What is masked under all keys before the next: vector, zeros and stream together stay in a core's L2 cache."""

_HEAD_BYTES = 32
"""Counter blocks 0 and 1.  GCM keeps them to itself and encrypts from block 2 on."""

_ZEROS = bytes(CHUNK_BYTES)


def add_masks(vector: Words, masks: Sequence[tuple[bytes, int]], *, region: int = 0) -> None:
    """Adds (sign +1) or subtracts (sign -1) each key's keystream, in place, mod 2^32 or 2^64.

    `vector` is (d,) contiguous uint32 or uint64 in the machine's byte order (the words are little-endian on any
    machine); `masks` are (32-byte key, sign); `region` is 0 to 255.  ValueError for anything else, with `vector` as it
    was.  Holds the GIL: many vectors at once need processes.
    """
    _require(vector, masks, region)
    streams = [(np.add if sign > 0 else np.subtract, *_open(key, region)) for key, sign in masks]
    words = vector.dtype.newbyteorder("<")
    num_head = min(_HEAD_BYTES // vector.itemsize, vector.size)
    for move, head, _ in streams:
        move(vector[:num_head], np.frombuffer(head, words, num_head), out=vector[:num_head])
    rest = vector[num_head:]
    buffer = np.empty(min(CHUNK_BYTES // vector.itemsize, rest.size), words)
    # Chunk by chunk, not key by key: a long vector would come from memory once a key.
    for at in range(0, rest.size, CHUNK_BYTES // vector.itemsize):
        chunk = rest[at : at + buffer.size]
        stream = buffer[: chunk.size]
        zeros, room = memoryview(_ZEROS)[: stream.nbytes], stream.view(np.uint8).data
        for move, _, encryptor in streams:
            encryptor.update_into(zeros, room)
            move(chunk, stream, out=chunk)


def keystream(key: bytes, num_words: int, dtype: npt.DTypeLike, *, region: int = 0) -> Words:
    """The mask itself.  -> (num_words,) uint32 or uint64"""
    words: Words = np.zeros(num_words, dtype)
    add_masks(words, [(key, 1)], region=region)
    return words


def _open(key: bytes, region: int) -> tuple[bytes, AEADEncryptionContext]:
    """Blocks 0 and 1 of a stream, and what goes on from block 2."""
    nonce = bytes([region]) + bytes(11)
    aes = algorithms.AES256(key)
    head = Cipher(aes, modes.CTR(nonce + bytes(4))).encryptor().update(bytes(_HEAD_BYTES))
    return head, Cipher(aes, modes.GCM(nonce)).encryptor()


def _require(vector: Words, masks: Sequence[tuple[bytes, int]], region: int) -> None:
    if vector.dtype not in (np.uint32, np.uint64) or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError(
            f"a {vector.dtype} array of shape {vector.shape}, strides {vector.strides}: "
            "masks are added to a contiguous vector of uint32 or uint64 in native byte order"
        )
    if not vector.flags.writeable:
        raise ValueError("the vector is read-only: masks are added in place")
    if not 0 <= region < NUM_REGIONS:
        raise ValueError(f"region {region}: a stream has regions 0 to {NUM_REGIONS - 1}")
    for number, (key, sign) in enumerate(masks):
        if len(key) != KEY_BYTES or sign not in (1, -1):
            raise ValueError(
                f"mask {number}: a key of {len(key)} bytes and sign {sign}; 32 bytes and +1 or -1 are needed"
            )


class Stream:
    """Uniform 32-bit words that follow from a key, one after another: a generator four times as fast as numpy's."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._encryptor = Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()

    def words(self, size: int) -> npt.NDArray[np.uint32]:
        """(size,) the next words."""
        room = np.empty(size, "<u4")
        view = room.view(np.uint8).data
        for at in range(0, room.nbytes, CHUNK_BYTES):
            part = view[at : at + CHUNK_BYTES]
            self._encryptor.update_into(memoryview(_ZEROS)[: len(part)], part)
        return room
