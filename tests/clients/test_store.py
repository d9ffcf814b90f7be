"""What a node keeps: the last reply, and its local layers by the base they were trained from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from clients.identity import Identity
from clients.store import KEEP, NodeStore, store_of
from conf.schema import NodeSpec
from trellis import wire

A, B, C, D, E = (letter * 64 for letter in "abcde")


def value(store: NodeStore, base: str) -> Any:
    found = store.local(base)
    return None if found is None else found["head"].tolist()


def commit(store: NodeStore, base: str, number: float) -> None:
    store.commit(base, {"head": np.array([number], np.float32)})


@pytest.fixture
def store(tmp_path: Path) -> NodeStore:
    return NodeStore(tmp_path / "node", durable=False)


# ---------------------------------------------------------------- replies


def test_the_last_reply_is_kept_byte_for_byte(store: NodeStore) -> None:
    content = RecordDict(
        {
            "metrics": MetricRecord({"loss": 0.25}),
            "arrays": wire.to_record({"w": np.arange(3, dtype=np.float32)}),
            "reply": ConfigRecord({"request": A}),
        }
    )
    assert store.reply(A) is None
    store.keep_reply(A, content)
    found = store.reply(A)
    assert found is not None
    assert wire.pack(found) == wire.pack(content)
    assert store.reply(B) is None
    store.keep_reply(B, RecordDict())
    assert (store.reply(A), store.reply(B)) == (None, RecordDict())


# ---------------------------------------------------------------- local layers


def test_nothing_is_known_before_anything_was_committed(store: NodeStore) -> None:
    assert store.local(A) is None


def test_a_request_reads_what_was_committed_before_its_base(store: NodeStore) -> None:
    commit(store, A, 1)
    assert value(store, A) is None  # before A there was nothing: asked again, it starts from nothing again
    assert value(store, B) == [1]
    commit(store, B, 2)
    assert value(store, B) == [1]
    assert value(store, C) == [2]


def test_a_base_that_comes_again_forgets_what_came_after_it(store: NodeStore) -> None:
    for number, base in enumerate((A, B, C), start=1):
        commit(store, base, number)
    commit(store, B, 20)
    assert value(store, B) == [1]
    assert value(store, C) == [20]
    assert value(store, D) == [20]


def test_committing_a_base_twice_is_committing_it_once(store: NodeStore) -> None:
    commit(store, A, 1)
    commit(store, B, 2)
    commit(store, B, 2)
    assert len(list((store.path / "local").glob("*.bin"))) == 2
    assert (value(store, B), value(store, C)) == ([1], [2])


def test_old_versions_are_pruned(store: NodeStore) -> None:
    for number in range(20):
        commit(store, f"{number:064d}", number)
        assert len(list((store.path / "local").glob("*.bin"))) <= KEEP
    assert value(store, A) == [19]
    assert value(store, f"{19:064d}") == [18]
    assert value(store, f"{18:064d}") == [17]


def test_two_nodes_share_nothing(tmp_path: Path) -> None:
    one, two = NodeStore(tmp_path / "one", durable=False), NodeStore(tmp_path / "two", durable=False)
    commit(one, A, 1)
    assert two.local(B) is None


# ---------------------------------------------------------------- crashes

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from flwr.app import ConfigRecord, RecordDict
from clients.store import NodeStore
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
store = NodeStore(Path(sys.argv[1]))
if sys.argv[2] == "reply":
    store.keep_reply("b" * 64, RecordDict({"x": ConfigRecord({"n": 2})}))
else:
    store.commit("b" * 64, {"head": np.array([2], np.float32)})
"""


@pytest.mark.parametrize("what", ["reply", "local"])
def test_a_kill_between_write_and_rename_leaves_the_old(store: NodeStore, what: str) -> None:
    old = RecordDict({"x": ConfigRecord({"n": 1})})
    store.keep_reply(A, old)
    commit(store, A, 1)
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.path), what], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert list(store.path.rglob("*.tmp")), "it was killed too early to show anything"
    assert store.reply(A) == old
    assert store.reply(B) is None
    assert value(store, C) == [1]
    commit(store, B, 2)
    store.keep_reply(B, old)
    assert (value(store, C), store.reply(B)) == ([2], old)


def test_only_a_durable_store_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd))[1])
    commit(NodeStore(tmp_path / "s", durable=False), A, 1)
    assert synced == []
    commit(NodeStore(tmp_path / "d", durable=True), A, 1)
    NodeStore(tmp_path / "d").keep_reply(A, RecordDict())
    assert len(synced) == 2


def test_a_deployed_nodes_store_is_durable_and_a_simulated_ones_is_not(tmp_path: Path) -> None:
    spec = NodeSpec(name="a")
    assert store_of(Identity(spec, None, simulated=True)) is None
    for simulated in (True, False):
        store = store_of(Identity(spec, tmp_path, simulated=simulated))
        assert store is not None
        assert store.durable is not simulated
