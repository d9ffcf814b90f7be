"""A model as one vector, and its digest.

Rules see updates as rows of an (n, d) matrix; models are named tensors.  A `Layout` maps one to the other: floating
tensors are laid end to end in the order of the model, everything else (integer buffers such as counters) is not
aggregated and stays as the base has it.

Laws:  `layout.unflatten(layout.flatten(arrays)) == arrays` on floating tensors (float32 and narrower);
       `layout.apply(base, zeros) == base`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[np.generic]]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and numpy dtype name of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return np.issubdtype(np.dtype(self.dtype), np.floating)

    @property
    def num_bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class CountSpec(TensorSpec):
    """An additive count: its entries together grow by at most `per_row` with every row."""

    per_row: float = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a model, in order."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Arrays) -> Layout:
        return cls(tuple(TensorSpec(k, tuple(a.shape), a.dtype.name) for k, a in arrays.items()))

    @property
    def floating(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.is_floating)

    @property
    def kept(self) -> tuple[TensorSpec, ...]:
        """Tensors that are not aggregated: integer and boolean buffers."""
        return tuple(t for t in self.tensors if not t.is_floating)

    @property
    def dim(self) -> int:
        """d, the number of coordinates of an update."""
        return sum(t.size for t in self.floating)

    def flatten(self, arrays: Arrays, *, out: Vector | None = None) -> Vector:
        """Floating tensors end to end.  -> (d,) float32, written into `out` when given."""
        vector = np.empty(self.dim, np.float32) if out is None else out
        at = 0
        for t in self.floating:
            vector[at : at + t.size] = arrays[t.name].reshape(-1)
            at += t.size
        return vector

    def unflatten(self, vector: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.generic]]:
        """(d,) -> the floating tensors, each in its own dtype."""
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        at = 0
        for t in self.floating:
            arrays[t.name] = vector[at : at + t.size].astype(t.dtype).reshape(t.shape)
            at += t.size
        return arrays

    def subtract(self, local: Arrays, base: Arrays, *, out: Vector | None = None) -> Vector:
        """local - base, rounded once to float32.  -> (d,) float32."""
        vector = np.empty(self.dim, np.float32) if out is None else out
        at = 0
        for t in self.floating:
            a, b = local[t.name].reshape(-1), base[t.name].reshape(-1)
            # float64 for wider tensors.  For float32 it would give the same bits: a sum rounded to 53 bits, then to 24,
            # is the sum rounded to 24 (Figueroa, 1995).
            wide = np.float64 if max(a.itemsize, b.itemsize) > 4 else np.float32
            np.subtract(a, b, out=vector[at : at + t.size], dtype=wide, casting="same_kind")
            at += t.size
        return vector

    def apply(self, base: Arrays, step: npt.NDArray[np.floating]) -> dict[str, npt.NDArray[np.generic]]:
        """base + step, (d,), added in float64 and rounded once; kept tensors are the base's."""
        moved = dict(base)
        at = 0
        for t in self.floating:
            total = base[t.name].astype(np.float64) + step[at : at + t.size].astype(np.float64).reshape(t.shape)
            moved[t.name] = total.astype(t.dtype)
            at += t.size
        return moved


def digest(arrays: Arrays) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names.  -> hex

    Binds everything a model is: two models have one digest only if they are equal bit for bit.
    """
    h = hashlib.sha256(b"trellis/arrays/v1")
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        a = a.astype(a.dtype.newbyteorder("<"), copy=False)
        meta = json.dumps([name, a.dtype.str, list(arrays[name].shape)]).encode()
        h.update(struct.pack("<QQ", len(meta), a.nbytes) + meta)
        h.update(a.tobytes())
    return h.hexdigest()


def norm(update_d: npt.NDArray[np.floating]) -> float:
    """Euclidean norm; neither 1e30 nor 1e-30 leaves float64's range.  (d,) -> float

    Squares are summed in float32 over 1024 coordinates at a time (relative error below 1e-5), and again in float64
    where float32 would overflow or vanish.
    """
    whole = update_d.size - update_d.size % 1024
    # einsum, not `@`: a BLAS would start its threads for this, and its sum would depend on their number
    parts = update_d[:whole].reshape(-1, 1024), update_d[None, whole:]
    with np.errstate(over="ignore", under="ignore"):
        total = sum(float(np.einsum("ij,ij->i", part, part).sum(dtype=np.float64)) for part in parts)
    if not 1e-20 < total < 1e30 and (update_d.max(initial=0) != 0 or update_d.min(initial=0) != 0):
        exact = (update_d[at : at + (1 << 16)].astype(np.float64) for at in range(0, update_d.size, 1 << 16))
        total = sum(float(np.einsum("i,i->", block, block)) for block in exact)
    return float(np.sqrt(total))
