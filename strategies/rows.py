"""n rows of d coordinates, looked at in blocks of columns; everything a rule needs of them in one pass.

Distance rules need one matrix of products, (n, n); coordinate rules need sorted columns; every answer is a combination
of rows, one pass more.  Nothing of size n * n * d, and no second (n, d) array, is ever made: what a pre-aggregator does
to rows is a small matrix of coefficients that is applied to each block as it is read.

Rows lie in memory (numpy, or a file mapped into memory) and are computed on by numpy, or, with a `device`, by torch.
Rows must be finite; a result that is not raises NotFinite.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from trellis.errors import CohortTooSmall, NotFinite

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BLOCK_BYTES = 1 << 21
"""Of a block of columns: it stays in a core's cache."""
DEVICE_BLOCK_BYTES = 1 << 28
FLOAT32_SQUARES = (1e-20, 1e30)
"""Squared lengths between which float32 neither vanishes nor overflows."""
FAR = 25.0
"""A centre is moved when it lies this many times further out than the middle row (in squares)."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a matrix, or linear combinations of them that are never written out.

    `updates_nd` is (n, d) float32, a numpy array or a torch tensor on any device.  `mix` says what the m rows are: None
    the n rows themselves, an index (m,) some of them, coefficients (m, n) combinations.  `device` is where torch
    computes; None: numpy.
    """

    updates_nd: Any
    mix: npt.NDArray[Any] | None = None
    device: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)"""
        n, d = self.updates_nd.shape
        return (n if self.mix is None else len(self.mix)), d

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def combined(self, coefficients_mn: npt.NDArray[np.floating]) -> Rows:
        """New rows, each a combination of these.  (m', m) coefficients."""
        return Rows(self.updates_nd, coefficients_mn @ self.coefficients(), self.device)

    def taken(self, index: npt.NDArray[np.integer]) -> Rows:
        """Some of these rows, in the order of `index`."""
        mix = np.asarray(index) if self.mix is None else self.mix[index]
        return Rows(self.updates_nd, mix, self.device)

    def coefficients(self) -> Float64:
        """What these rows are of the original ones.  -> (m, n)"""
        n = self.updates_nd.shape[0]
        if self.mix is None:
            return np.eye(n)
        return np.eye(n)[self.mix] if self.mix.ndim == 1 else self.mix

    def materialised(self) -> Float32:
        """The rows as an array of their own.  -> (m, d) float32"""
        out = np.empty(self.shape, np.float32)

        def write(block: Any, columns: slice) -> None:
            out[:, columns] = _to_numpy(block)

        _each_block(self, write)
        return out


Updates = npt.NDArray[np.float32] | Rows
"""What a rule takes: an (n, d) float32 array (or torch tensor), or rows that are not written out."""


def rows_of(updates: Any) -> Rows:
    """An array, a torch tensor or rows -> rows.  Raises ValueError for another shape or dtype."""
    if isinstance(updates, Rows):
        return updates
    if updates.ndim != 2 or str(updates.dtype).removeprefix("torch.") != "float32":
        raise ValueError(f"updates must be (n, d) float32, found {tuple(updates.shape)} {updates.dtype}")
    device = None if isinstance(updates, np.ndarray) else str(updates.device)
    return Rows(updates, device=device)


def require_rows(name: str, updates: Updates, least: int, num_byzantine: int) -> int:
    """The number of rows n.  Raises CohortTooSmall when it is below `least`."""
    n = rows_of(updates).num_rows
    if n < least:
        raise CohortTooSmall(f"{name} needs at least {least} rows (num_byzantine={num_byzantine}), found {n}")
    return n


# ---------------------------------------------------------------- one pass over the columns


def by_column(updates: Updates, rule: Callable[[Any, Any], Any]) -> Float32:
    """`rule(ranked, xp)` of all coordinates: ascending columns (m, B) -> (B,), with xp numpy or torch.  -> (d,)"""
    rows = rows_of(updates)
    out = np.empty(rows.shape[1], np.float32)

    def one(block: Any, columns: slice) -> None:
        out[columns] = _to_numpy(rule(_sorted_columns(block), _library(block)))

    _each_block(rows, one)
    return finite(out)


def combine(updates: Updates, coefficients_m: npt.ArrayLike) -> Float32:
    """sum_i c_i x_i, added in float64 and rounded once.  (m, d), (m,) -> (d,)"""
    rows = rows_of(updates)
    c = np.asarray(coefficients_m, np.float64)
    if rows.mix is not None:
        c = c @ rows.coefficients()
    used = np.flatnonzero(c)  # a row of coefficient 0 is not even read
    chosen = Rows(rows.updates_nd, None if len(used) == len(c) else used, rows.device)
    out = np.empty(rows.shape[1], np.float32)

    def one(block: Any, columns: slice) -> None:
        with np.errstate(over="ignore"):  # told by `finite`
            out[columns] = _weighted_sum(block, c[used])

    _each_block(chosen, one)
    return finite(out)


def _weighted_sum(block: Any, weights: Float64) -> Float64:
    if not isinstance(block, np.ndarray):
        return _to_numpy(_like(weights, block).double() @ block.double())
    total, term = np.zeros(block.shape[1]), np.empty(block.shape[1])
    # Row by row, not a matrix product: the sum depends on no BLAS, no thread, no memory layout.
    for weight, row in zip(weights, block, strict=True):
        total += np.multiply(row, weight, out=term)
    return total


def products(updates: Updates, *, centre_d: npt.NDArray[np.floating] | None = None) -> Float64:
    """(x_i - centre) . (x_j - centre) of all pairs.  (m, d) -> (m, m)

    Blocks are multiplied in float32 and added in float64; everything in float64 where squares leave float32's range.
    """
    rows = rows_of(updates)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        found = _products(rows, centre_d, _as_it_is)
        longest = found.diagonal().max(initial=0.0)
        least, most = FLOAT32_SQUARES
        if longest == 0.0 or not least <= longest <= most:
            found = _products(rows, centre_d, _double)
    return finite(found)


def _products(rows: Rows, centre_d: npt.NDArray[np.floating] | None, widen: Callable[[Any], Any]) -> Float64:
    def one(block: Any, columns: slice) -> Float64:
        block = widen(block)
        if centre_d is not None:
            block = block - _like(centre_d[columns], block)
        return _to_numpy(block @ block.T).astype(np.float64)

    total = np.zeros((rows.num_rows, rows.num_rows))
    for part in _each_block(rows, one):
        total += part
    return (total + total.T) / 2


def squared_distances(updates: Updates, *, sketch_dim: int = 0, rng: np.random.Generator | None = None) -> Float64:
    """||x_i - x_j||^2 of all pairs.  (m, d) -> (m, m), symmetric, zero on the diagonal

    From one matrix of products about a centre near most rows: about 0, or about a liar far away, the distances between
    honest rows would drown in the rounding of their lengths.  The centre is the first row; when that lies far from the
    middle of the rows, the pass is repeated about the row in the middle.

    With `sketch_dim` k > 0 distances are those of a count sketch of the rows (see `sketch`): the relative error of a
    squared distance has mean 0 and a standard deviation of at most sqrt(2 / k).
    """
    return about_middle(updates, sketch_dim=sketch_dim, rng=rng)[1]


def about_middle(
    updates: Updates, *, sketch_dim: int = 0, rng: np.random.Generator | None = None
) -> tuple[Float64, Float64]:
    """Products of the rows about a row near most of them, and squared distances.  (m, d) -> (m, m), (m, m)"""
    rows = sketch(updates, sketch_dim=sketch_dim, rng=rng) if sketch_dim else rows_of(updates)
    if rows.num_rows == 0:
        return np.zeros((0, 0)), np.zeros((0, 0))
    centre = 0
    for _ in range(3):  # each pass shrinks the rounding by 1e-7
        about = products(rows, centre_d=_row(rows, centre))
        lengths = about.diagonal()
        found = np.maximum(lengths[:, None] + lengths[None, :] - 2 * about, 0.0)
        np.fill_diagonal(found, 0.0)
        middles = np.median(found, axis=1)
        middle = int(np.argmin(middles))
        if middle == centre or lengths[middle] <= FAR * middles[middle]:
            break
        centre = middle
    return about, found


def squared_norms(updates: Updates) -> Float64:
    """||x_i||^2, float64.  (m, d) -> (m,)"""
    rows = rows_of(updates)

    def one(block: Any, columns: slice) -> Float64:
        wide = _double(block)
        return _to_numpy(_library(block).einsum("ij,ij->i", wide, wide))

    return finite(sum(_each_block(rows, one), np.zeros(rows.num_rows)))


def dots(updates: Updates, vector_d: npt.NDArray[np.floating]) -> Float64:
    """x_i . v, float64.  (m, d), (d,) -> (m,)"""
    rows = rows_of(updates)

    def one(block: Any, columns: slice) -> Float64:
        return _to_numpy(_double(block) @ _double(_like(vector_d[columns], block)))

    return finite(sum(_each_block(rows, one), np.zeros(rows.num_rows)))


def sketch(updates: Updates, *, sketch_dim: int, rng: np.random.Generator | None = None) -> Rows:
    """A count sketch of every row.  (m, d) -> (m, k) float32, k = min(sketch_dim, d)

    E ||Sx||^2 = ||x||^2 and Var ||Sx||^2 <= 2 ||x||^4 / k: columns are cut into blocks of k, each is signed and turned
    by a random offset, and all are added, so two coordinates meet with probability at most 1 / k.  Signs and offsets
    come from `rng`: a node must not know them before it has replied.
    Charikar, Chen and Farach-Colton, ICALP 2002.  https://doi.org/10.1007/3-540-45465-9_59
    """
    rows = rows_of(updates)
    m, d = rows.shape
    k = min(sketch_dim, d)
    rng = rng or np.random.default_rng(0)
    out = np.zeros((m, k), np.float64)
    for start in range(0, d, k):
        columns = slice(start, min(start + k, d))
        width = columns.stop - columns.start
        signs = rng.integers(0, 2, width) * 2.0 - 1.0
        turn = int(rng.integers(k))
        signed = _to_numpy(_block(rows, columns)) * signs
        head = min(width, k - turn)
        out[:, turn : turn + head] += signed[:, :head]
        out[:, : width - head] += signed[:, head:]
    return Rows(out.astype(np.float32))


def finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values themselves.  Raises NotFinite when one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NotFinite("rows hold NaN, infinities or numbers too large for float32: lower checks.max_update_norm")
    return values


# ---------------------------------------------------------------- blocks


def _each_block(rows: Rows, one: Callable[[Any, slice], Any]) -> list[Any]:
    """`one(block (m, B), columns)` of every block of columns; results in the order of the columns.

    Every block is computed by one thread, so results depend on no number of threads.
    """
    d = rows.shape[1]
    size = _block_size(rows)
    blocks = [slice(at, min(at + size, d)) for at in range(0, d, size)]
    if rows.device is not None:
        return [one(_block(rows, columns), columns) for columns in blocks]
    with single_threaded_blas():
        if len(blocks) < 2:
            return [one(_block(rows, columns), columns) for columns in blocks]
        with ThreadPoolExecutor(min(_num_threads(), len(blocks))) as pool:
            return list(pool.map(lambda columns: one(_block(rows, columns), columns), blocks))


def _block_size(rows: Rows) -> int:
    """Columns of a block, whole cache lines."""
    per_column = 4 * max(rows.updates_nd.shape[0], rows.num_rows, 1)
    most = BLOCK_BYTES if rows.device is None else DEVICE_BLOCK_BYTES
    return int(max(1024, most // per_column // 1024 * 1024))


def _block(rows: Rows, columns: slice) -> Any:
    """Columns of the rows.  -> (m, B), a view where nothing is mixed"""
    block = rows.updates_nd[:, columns]
    if rows.device is not None:
        import torch

        block = torch.as_tensor(block).to(rows.device)
    if rows.mix is None:
        return block
    if rows.mix.ndim == 1:
        return block[rows.mix if rows.device is None else rows.mix.tolist()]
    scale = _diagonal(rows.mix)
    if scale is not None:
        return block * _like(scale[:, None], block)
    return _like(rows.mix, block) @ block


def _diagonal(mix: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """The factors of a matrix that only scales rows, else None."""
    if mix.shape[0] != mix.shape[1] or np.count_nonzero(mix) != np.count_nonzero(mix.diagonal()):
        return None
    return mix.diagonal()


def _row(rows: Rows, index: int) -> Float32:
    """One row, written out.  -> (d,)"""
    row: Float32 = rows.taken(np.array([index])).materialised()[0]
    return row


# ---------------------------------------------------------------- sorted columns

NETWORK_ROWS = 24
"""Up to here a network of minima and maxima over whole rows is faster than sorting each column."""


def _sorted_columns(block: Any) -> Any:
    """Every column ascending.  (m, B) -> (m, B), the block is left as it was."""
    if not isinstance(block, np.ndarray):
        return block.sort(dim=0).values
    if len(block) <= NETWORK_ROWS:
        return _network(block)
    columns = np.ascontiguousarray(block.T)  # a sort of short contiguous rows is vectorised, one over axis 0 is not
    columns.sort(axis=1)
    return columns.T


def _network(block: Float32) -> Float32:
    """Batcher's odd-even merge sort of the rows, coordinate by coordinate.  Batcher, AFIPS 1968."""
    rows = [row.copy() for row in block]
    spare = np.empty(block.shape[1], np.float32)
    for i, j in _comparators(len(rows)):
        np.minimum(rows[i], rows[j], out=spare)
        np.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return np.stack(rows) if rows else block


@cache
def _comparators(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j), i < j, of a network that sorts n values."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)


# ---------------------------------------------------------------- numpy and torch


def _library(block: Any) -> Any:
    if isinstance(block, np.ndarray):
        return np
    import torch

    return torch


def _as_it_is(block: Any) -> Any:
    return block


def _double(block: Any) -> Any:
    return block.astype(np.float64) if isinstance(block, np.ndarray) else block.double()


def _like(values: npt.NDArray[Any], block: Any) -> Any:
    """`values` in the library, on the device and of the dtype of a block."""
    if isinstance(block, np.ndarray):
        return values.astype(block.dtype)
    return _library(block).tensor(values, dtype=block.dtype, device=block.device)


def _to_numpy(values: Any) -> npt.NDArray[Any]:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


@cache
def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def single_threaded_blas() -> Any:
    """Threads are over blocks; BLAS' own would only wait for each other, and their number would change its sums."""
    controller = _controller()
    return controller.limit(limits=1, user_api="blas") if controller.lib_controllers else nullcontext()
