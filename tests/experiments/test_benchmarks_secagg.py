"""The benchmark of secure aggregation, very small: every line appears, what is timed is right, and a miss is one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import secagg
from experiments.benchmarks.secagg import Measured, Sizes

TINY = Sizes(2000, ((3, 2),), num_shares=6, num_nodes=8, group_size=4, num_rounds=2)


@pytest.fixture(scope="module")
def rows() -> list[Measured]:
    return list(secagg.table(TINY))


def found(rows: list[Measured], beginning: str) -> Measured:
    (row,) = (row for row in rows if row.what.startswith(beginning))
    return row


def test_every_line_of_the_table_appears_with_a_number(rows: list[Measured]) -> None:
    beginnings = (
        "node step, 3 neighbours",
        "the first of an epoch",
        "Shamir n=6 t=4: split seed and key",
        "Shamir n=6 t=4: combine a seed",
        "Shamir n=6 t=4: combine a missing node's key",
        "round, 8 nodes in groups of 4",
        "offline phase, once in 16 rounds",
        "round and offline phase",
        "unmasking, of the round",
        "round, 1 of 4 missing",
        "unmasking, 1 of 4 missing",
        "upload of a round, a param",
        "upload of an offline phase, a node",
        "peak memory, all parties",
        "of it before the first message",
    )
    assert len(rows) == len(beginnings)
    assert all(row.what.startswith(beginning) for row, beginning in zip(rows, beginnings, strict=True))
    numbers = [number for row in rows for number in (row.found, row.flower) if number is not None]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_numbers_of_one_round_fit_each_other(rows: list[Measured]) -> None:
    whole, offline = found(rows, "round, 8").found, found(rows, "offline phase").found
    assert found(rows, "round and offline").found == pytest.approx(whole + offline)
    assert found(rows, "unmasking, of").found < whole
    assert found(rows, "unmasking, 1").found < found(rows, "round, 1").found
    # 4 bytes a word, and what every reply carries beside the words: a signed statement and headers
    assert 4.0 < found(rows, "upload of a round").found < 4.0 + 2000 / TINY.num_params
    assert found(rows, "of it before").found <= found(rows, "peak memory").found < 2.0


def test_flower_sends_int64(rows: list[Measured]) -> None:
    flower = found(rows, "upload of a round").flower
    assert flower is not None
    assert flower > 8.0


def test_flowers_step_is_what_its_mod_does() -> None:
    from flwr.client.mod.secure_aggregation.secaggplus_mod import _collect_masked_vectors
    from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

    state, params = secagg.flower_state(3), [secagg.update_of(50)]
    peers = list(state.public_keys_dict)
    key = b"A" * 43 + b"="
    state.ss2_dict = dict.fromkeys(peers, key)
    state.threshold, state.rd_seed_share_dict, state.sk1_share_dict = 2, {}, {}
    sealed = [encrypt(key, share_keys_plaintext_concat(peer, state.nid, b"seed", b"key")) for peer in peers]
    asked: Any = {Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: peers}
    np.random.seed(0)  # noqa: NPY002 - Flower rounds with the global generator
    theirs = _collect_masked_vectors(state, asked, 700, ndarrays_to_parameters(params))[Key.MASKED_PARAMETERS]
    np.random.seed(0)  # noqa: NPY002
    ours = secagg.flower_step(state, params, 700)
    assert isinstance(theirs, list)
    assert len(ours) == len(theirs) == 2
    for mine, yours in zip(ours, theirs, strict=True):
        assert isinstance(yours, bytes)
        np.testing.assert_array_equal(mine, bytes_to_ndarray(yours))


def test_a_missed_target_is_said_and_gives_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Measured("round", 6.0, "s", 5.0, 12.0)

    def table(rows: list[Measured]) -> Any:
        def made(sizes: Sizes, *, large: bool) -> Iterator[Measured]:
            return iter(rows)

        return made

    monkeypatch.setattr(secagg, "table", table([slow]))
    assert secagg.main([]) == 1
    assert "| round | 6 s | 5 | 12 | 2.0x | missed |" in capsys.readouterr().out
    assert secagg.main(["--quick"]) == 0  # a smaller run has no target of seconds
    monkeypatch.setattr(secagg, "table", table([dataclasses.replace(slow, found=5.0)]))
    capsys.readouterr()
    assert secagg.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["found"] == 5.0


def test_a_sum_that_is_wrong_is_not_timed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = secagg.client

    def other(update_d: Any, *rest: Any) -> Any:
        return honest(update_d + np.float32(0.001), *rest)

    monkeypatch.setattr(secagg, "client", other)
    with pytest.raises(RuntimeError, match="is off by"):
        secagg.rounds(4, 4, 50, 1, tmp_path, missing=False)
