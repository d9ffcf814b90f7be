"""The matrix of a round is memory that is used again, and never under someone's hands."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from experiments.simulate import simulate
from strategies import exchange
from strategies.exchange import _Matrix
from trellis.errors import TrellisError


def test_a_matrix_nobody_holds_is_handed_out_again() -> None:
    pool = _Matrix()
    address = pool.take((3, 5)).ctypes.data
    assert pool.take((3, 5)).ctypes.data == address


def test_a_matrix_with_a_row_still_held_is_left_alone() -> None:
    pool = _Matrix()
    first = pool.take((3, 5))
    first[:] = 7.0
    row = first[1]
    del first
    pool.take((3, 5))[:] = 0.0
    assert np.array_equal(row, np.full(5, 7.0, np.float32))


def test_an_evaluation_takes_no_memory_from_the_next_round() -> None:
    pool = _Matrix()
    address = pool.take((3, 5)).ctypes.data
    assert pool.take((0, 5)).shape == (0, 5)
    assert pool.take((3, 5)).ctypes.data == address


def test_a_cohort_of_another_size_gets_a_matrix_of_its_own() -> None:
    pool = _Matrix()
    pool.take((3, 5))
    assert pool.take((2, 5)).shape == (2, 5)


# ---------------------------------------------------------------- beyond memory


def mapped(pool: _Matrix, folder: Path) -> npt.NDArray[np.float32]:
    return pool.take((3, 5), max_bytes=59, folder=folder)


def lies_in_a_file(matrix: npt.NDArray[np.float32]) -> bool:
    owner = matrix
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return isinstance(getattr(owner.base, "obj", owner.base), mmap.mmap)


@pytest.mark.parametrize(("max_bytes", "expected"), [(61, False), (60, False), (59, True), (0, True)])
def test_only_what_is_larger_than_memory_may_be_lies_in_a_file(max_bytes: int, expected: bool, tmp_path: Path) -> None:
    assert lies_in_a_file(_Matrix().take((3, 5), max_bytes=max_bytes, folder=tmp_path)) is expected
    assert not lies_in_a_file(_Matrix().take((0, 5), max_bytes=max_bytes, folder=tmp_path))


def test_two_rounds_use_one_map(tmp_path: Path) -> None:
    pool = _Matrix()
    first = mapped(pool, tmp_path)
    first[:] = 7.0
    address = first.ctypes.data
    del first
    second = mapped(pool, tmp_path)
    assert second.ctypes.data == address
    assert np.array_equal(second, np.full((3, 5), 7.0, np.float32))


@pytest.mark.parametrize("hold", [lambda m: m[1], lambda m: m[:2], lambda m: m[1:][0][2:], lambda m: m.reshape(-1)])
def test_a_view_still_held_makes_a_new_map(hold: Callable[[Any], Any], tmp_path: Path) -> None:
    pool = _Matrix()
    first = mapped(pool, tmp_path)
    first[:] = 7.0
    view = hold(first)
    del first
    mapped(pool, tmp_path)[:] = 0.0
    assert np.all(view == 7.0)
    address = mapped(pool, tmp_path).ctypes.data
    assert mapped(pool, tmp_path).ctypes.data == address, "the new one is used again"


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    pool = _Matrix()
    held = mapped(pool, tmp_path)
    held[:] = 1.0
    assert list(tmp_path.iterdir()) == [], "the file has no name even while it is used"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_map_that_nobody_holds_gives_its_disk_back(tmp_path: Path) -> None:
    pool = _Matrix()
    row = mapped(pool, tmp_path)[1]
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del pool
    assert str(tmp_path) in Path("/proc/self/maps").read_text(), "a row is held"
    del row
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd)]


def test_a_full_disk_is_said_with_the_bytes_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    pool = _Matrix()
    with pytest.raises(TrellisError, match=rf"60 bytes in {tmp_path}.*No space left.*checks\.max_matrix_mb"):
        mapped(pool, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert mapped(pool, tmp_path).shape == (3, 5), "the next round may find room"


def test_a_folder_that_is_not_there_is_said_too(tmp_path: Path) -> None:
    with pytest.raises(TrellisError, match=r"60 bytes in .*gone"):
        mapped(_Matrix(), tmp_path / "gone")


def test_a_run_has_the_same_model_with_its_matrix_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["rounds=3", "data=synthetic", "tracking=none", f"runs_dir={tmp_path}"]
    in_memory = simulate([*settings, "run_name=memory"])
    folders: list[Path | None] = []
    make = exchange._mapped
    monkeypatch.setattr(exchange, "_mapped", lambda size, folder: (folders.append(folder), make(size, folder))[1])
    in_a_file = simulate([*settings, "run_name=file", "checks.max_matrix_mb=0"])
    assert len(folders) == 1, "all rounds used one map"
    assert folders == [tmp_path / "file"]
    assert in_a_file.model_digest == in_memory.model_digest
    assert in_a_file.metrics == in_memory.metrics
