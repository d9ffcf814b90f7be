"""A state on disk: what is read is what was written, or it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import checkpoint
from trellis.errors import ResumeError
from trellis.types import Best, ServerState
from trellis.vectors import digest

STATE = ServerState(
    run="r1",
    round=7,
    params={
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(3, np.int64),
        "m": np.array(0.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "half": np.array([1.5], np.float16),
        "flags": np.array([True, False]),
    },
    optimizer={"v": np.array([0.1, 0.2]), "m": np.array([1e-300, -0.0])},
    rule={"last": np.ones(3, np.float32)},
    observers={"suspicion": {"node-1": [1, 2.5]}},
    accountants={"rdp": {"steps": 3}},
    best=Best(4, "ab" * 32, 0.875),
    seed=11,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "state.safetensors"
    checkpoint.save(path, STATE)
    return path


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and digest(a) == digest(b) and all(a[k].shape == b[k].shape for k in a)


def test_load_undoes_save_in_values_order_shapes_and_dtypes(path: Path) -> None:
    found = checkpoint.load(path)
    for slot in ("params", "optimizer", "rule"):
        assert same(getattr(found, slot), getattr(STATE, slot))
    assert list(found.params) == ["z", "a", "m", "empty", "half", "flags"]
    assert found.params["a"].shape == ()
    plain = {"params": {}, "optimizer": {}, "rule": {}}
    assert replace(found, **plain) == replace(STATE, **plain)


def test_a_first_state_has_nothing_but_params(tmp_path: Path) -> None:
    state = ServerState(run="r", round=0, params={"w": np.ones(2, np.float32)})
    checkpoint.save(tmp_path / "s", state)
    found = checkpoint.load(tmp_path / "s")
    assert (found.best, found.optimizer, found.rule, found.observers) == (None, {}, {}, {})


def test_tensors_in_fortran_order_keep_their_values(tmp_path: Path) -> None:
    value = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    checkpoint.save(tmp_path / "s", replace(STATE, params={"w": value, "t": value.T[::2]}))
    found = checkpoint.load(tmp_path / "s").params
    assert np.array_equal(found["w"], value)
    assert np.array_equal(found["t"], value.T[::2])


def test_a_later_state_replaces_the_earlier_and_leaves_nothing_behind(path: Path) -> None:
    checkpoint.save(path, replace(STATE, round=8))
    assert checkpoint.load(path).round == 8
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_state_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="does not exist"):
        checkpoint.load(tmp_path / "state.safetensors")


def test_a_truncated_state_is_refused_wherever_it_ends(path: Path) -> None:
    data = path.read_bytes()
    for end in (0, 4, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ResumeError):
            checkpoint.load(path)


def test_one_flipped_bit_anywhere_is_never_read_as_another_state(path: Path) -> None:
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, header, 7), *range(header, len(data))]
    survived = []
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            found = checkpoint.load(path)
        except ResumeError:
            continue
        survived.append((place, found))
    # a bit of padding or of JSON's white space may be read as nothing, but never as something else
    for place, found in survived:
        assert place < header
        assert all(same(getattr(found, slot), getattr(STATE, slot)) for slot in ("params", "optimizer", "rule"))
        assert (found.round, found.seed, found.best, found.observers) == (7, 11, STATE.best, STATE.observers)


@pytest.mark.parametrize("data", [b"[]".rjust(10), b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}", b"PK\x03"])
def test_another_file_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ResumeError, match="damaged"):
        checkpoint.load(path)


def test_a_state_of_another_format_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with pytest.raises(ResumeError, match="format"):
        checkpoint.load(path)
