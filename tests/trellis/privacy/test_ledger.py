"""The ledger: what was acknowledged is there after any crash, and what is not there is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis.errors import ConfigError, LedgerError
from trellis.privacy.accountant import Entry
from trellis.privacy.ledger import Charge, Head, Ledger

FIRST = Charge("c1", "run-1", 1, "ab" * 32, "dp_sgd", 1.1, 0.1, 10, "cd" * 32, 1000.0)
SECOND = replace(FIRST, id="c2", round=2, about="ef" * 32, steps=7)
THIRD = replace(FIRST, id="c3", round=3, about="count", kind="counts", noise_multiplier=20.0, sample_rate=1.0, steps=1)


def noon() -> float:
    return 1234.5


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With two charges."""
    ledger = Ledger.create(tmp_path / "bank-1.jsonl", "bank-1", durable=False, now=noon)
    ledger.charge(FIRST)
    ledger.charge(SECOND)
    return ledger


def mark_of(ledger: Ledger) -> Path:
    return ledger.path.with_name("bank-1.jsonl.mark")


def lines_of(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


def again(ledger: Ledger) -> Ledger:
    """As the next process opens it."""
    return Ledger(ledger.path, durable=False, unit="bank-1", now=noon)


def written(records: list[dict[str, object]]) -> bytes:
    """The format, from its description: every line has the digest of the line before it and of itself."""
    digest, lines = "", []
    for record in records:
        body = json.dumps(record)[:-1]
        digest = hashlib.sha256(f"{digest}\n{body}".encode()).hexdigest()
        lines.append(f'{body}, "chain": "{digest}"}}\n')
    return "".join(lines).encode()


# ------------------------------------------------------------ by hand


def test_a_new_ledger_is_empty(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "bank-1.jsonl", "bank-1", now=noon)
    assert ledger.charges() == ledger.entries() == []
    assert ledger.find(FIRST.about) is None
    assert json.loads(ledger.path.read_bytes()) == {
        "ledger": 1,
        "unit": "bank-1",
        "created": 1234.5,
        "chain": ledger.head().digest,
    }


def test_charges_are_there_for_the_next_process(ledger: Ledger) -> None:
    assert again(ledger).charges() == [FIRST, SECOND]
    assert again(ledger).entries() == [Entry(1.1, 0.1, 10), Entry(1.1, 0.1, 7)]
    assert again(ledger).find(SECOND.about) == SECOND
    assert again(ledger).find("nothing") is None


def test_the_last_charge_for_a_request_is_found(ledger: Ledger) -> None:
    ledger.charge(replace(THIRD, about=FIRST.about))
    found = ledger.find(FIRST.about)
    assert found is not None
    assert found.id == "c3"


def test_the_first_use_starts_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "bank-1.jsonl", durable=False, unit="bank-1")
    assert ledger.charges() == []
    assert ledger.head() == Head(0, "")
    ledger.charge(FIRST)
    assert again(ledger).charges() == [FIRST]


def test_the_format_is_what_it_was() -> None:
    """A ledger of the first version, byte for byte: it is read for ever."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bank-1.jsonl"
        path.write_text(
            '{"ledger": 1, "unit": "bank-1", "created": 1234.5, '
            '"chain": "83919965198711f8048a5d31808a48903c88fde4c5f5f9eaad9a21454e082f82"}\n'
            '{"charge": {"id": "c1", "run": "run-1", "round": 1, "about": "r", "kind": "central", '
            '"noise_multiplier": 1.5, "sample_rate": 0.25, "steps": 4, "data_digest": "d", "at": 1000.0}, '
            '"chain": "1594474d19fbe41d1a0a30a588398dc7006ba486afa8cac2f640d74bd4f0ea8d"}\n'
            '{"settle": {"id": "c1", "steps": 3, "at": 1234.5}, '
            '"chain": "f992ddaea14d160c88ccdfdae83d5c6af7cb56feaffc9e5cb3a9ee74f0fe0c75"}\n'
        )
        path.with_name("bank-1.jsonl.mark").write_text(
            '{"lines": 3, "digest": "f992ddaea14d160c88ccdfdae83d5c6af7cb56feaffc9e5cb3a9ee74f0fe0c75"}\n'
        )
        ledger = Ledger(path, unit="bank-1")
        assert ledger.charges() == [Charge("c1", "run-1", 1, "r", "central", 1.5, 0.25, 4, "d", 1000.0)]
        assert ledger.entries() == [Entry(1.5, 0.25, 3)]


def test_it_is_written_as_described(ledger: Ledger) -> None:
    ledger.settle("c2", 5)
    assert ledger.path.read_bytes() == written(
        [
            {"ledger": 1, "unit": "bank-1", "created": 1234.5},
            {"charge": asdict(FIRST)},
            {"charge": asdict(SECOND)},
            {"settle": {"id": "c2", "steps": 5, "at": 1234.5}},
        ]
    )
    assert json.loads(mark_of(ledger).read_bytes()) == asdict(ledger.head())


# ------------------------------------------------------------ settling


def test_what_is_not_settled_counts_in_full(ledger: Ledger) -> None:
    ledger.settle("c1", 4)
    assert ledger.entries() == [Entry(1.1, 0.1, 4), Entry(1.1, 0.1, 7)]
    assert ledger.settled() == {"c1": 4}
    ledger.settle("c2", 0)
    assert again(ledger).entries() == [Entry(1.1, 0.1, 4), Entry(1.1, 0.1, 0)]


def test_settling_again_says_the_same_or_is_refused(ledger: Ledger) -> None:
    ledger.settle("c1", 4)
    before = ledger.path.read_bytes()
    ledger.settle("c1", 4)
    for steps in (3, 5, 10):
        with pytest.raises(LedgerError, match=f"was settled with 4 steps: they are not {steps} now"):
            ledger.settle("c1", steps)
    assert ledger.path.read_bytes() == before


def test_no_more_is_settled_than_was_charged(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="is of 10 steps, and 11 are settled"):
        ledger.settle("c1", 11)
    with pytest.raises(LedgerError, match="has no charge c9"):
        ledger.settle("c9", 1)
    for steps in (-1, 1.5):
        with pytest.raises(ConfigError, match="steps is"):
            ledger.settle("c1", steps)  # type: ignore[arg-type]
    assert ledger.settled() == {}


# ------------------------------------------------------------ what is refused


def test_an_id_is_charged_once(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="an id is charged once"):
        ledger.charge(FIRST)
    assert ledger.charges() == [FIRST, SECOND]


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""},
        {"run": 3},
        {"kind": "laplace"},
        {"round": 1.5},
        {"steps": -1},
        {"sample_rate": 0.0},
        {"noise_multiplier": -1.0},
        {"at": float("nan")},
    ],
)
def test_a_charge_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(FIRST, **wrong)


def test_the_ledger_of_another_unit_is_refused(ledger: Ledger) -> None:
    other = Ledger(ledger.path, unit="bank-2")
    for ask in (other.charges, other.entries, other.head, lambda: other.charge(THIRD), lambda: other.settle("c1", 1)):
        with pytest.raises(LedgerError, match="is the ledger of 'bank-1', not of 'bank-2'"):
            ask()
    assert Ledger(ledger.path).charges() == [FIRST, SECOND]


def test_a_ledger_is_never_started_again(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never started again"):
        Ledger.create(ledger.path, "bank-1")
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="never started again"):
        Ledger.create(ledger.path, "bank-1")


def test_a_folder_that_is_not_there_is_no_empty_ledger(tmp_path: Path) -> None:
    path = tmp_path / "disk" / "bank-1.jsonl"
    with pytest.raises(LedgerError, match="is its disk mounted"):
        Ledger.create(path, "bank-1")
    with pytest.raises(LedgerError, match="is its disk mounted"):
        Ledger(path, unit="bank-1").charge(FIRST)
    assert not path.parent.exists()


def test_a_ledger_is_not_started_for_nobody(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="whose it would be is not said"):
        Ledger(tmp_path / "bank-1.jsonl").charge(FIRST)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank-1.jsonl"
    path.write_bytes(written([{"ledger": 2, "unit": "bank-1", "created": 1.0}]))
    with pytest.raises(LedgerError, match=r"line 1 is damaged .*version 2, and this Trellis reads 1"):
        Ledger(path).charges()


# ------------------------------------------------------------ damage


def test_every_changed_byte_is_noticed(ledger: Ledger) -> None:
    whole = ledger.path.read_bytes()
    for at in range(len(whole)):
        ledger.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LedgerError, match="restore it"):
            ledger.charges()
    ledger.path.write_bytes(whole)
    assert ledger.charges() == [FIRST, SECOND]


def test_lost_moved_and_doubled_lines_are_noticed(ledger: Ledger) -> None:
    ledger.charge(THIRD)
    head, one, two, three = lines_of(ledger)
    for lines in (
        (head, two, three),
        (head, one, three),
        (head, one, two),
        (one, two, three),
        (head, two, one, three),
        (head, one, one, two, three),
        (head, one, two, three, three),
        (head,),
        (),
    ):
        ledger.path.write_bytes(b"".join(lines))
        with pytest.raises(LedgerError, match=r"bank-1.jsonl.*restore it and its .mark from a backup"):
            ledger.charges()


@pytest.mark.parametrize(
    "records",
    [
        [{"charge": asdict(FIRST)}, {"charge": asdict(FIRST)}],
        [{"settle": {"id": "c1", "steps": 1, "at": 1.0}}],
        [{"charge": asdict(FIRST)}, {"settle": {"id": "c1", "steps": 11, "at": 1.0}}],
        [{"charge": asdict(FIRST)}, {"settle": {"id": "c1", "steps": -1, "at": 1.0}}],
        [{"charge": asdict(FIRST)}, *[{"settle": {"id": "c1", "steps": 1, "at": 1.0}}] * 2],
        [{"charge": asdict(FIRST) | {"kind": "laplace"}}],
        [{"charge": asdict(FIRST) | {"colour": "red"}}],
        [{"charge": asdict(FIRST) | {"noise_multiplier": "much"}}],
        [{"spend": {}}],
    ],
)
def test_what_chains_and_makes_no_sense_is_damage(tmp_path: Path, records: list[dict[str, object]]) -> None:
    path = tmp_path / "bank-1.jsonl"
    path.write_bytes(written([{"ledger": 1, "unit": "bank-1", "created": 1.0}, *records]))
    with pytest.raises(LedgerError, match=f"line {len(records) + 1} is damaged"):
        Ledger(path).charges()


def test_a_damaged_ledger_is_not_charged(ledger: Ledger) -> None:
    whole = ledger.path.read_bytes()
    damaged = whole.replace(b'"steps": 10', b'"steps": 01')
    ledger.path.write_bytes(damaged)
    for ask in (lambda: ledger.charge(THIRD), lambda: ledger.settle("c1", 1)):
        with pytest.raises(LedgerError, match="line 2 is damaged"):
            ask()
    assert ledger.path.read_bytes() == damaged


def test_a_ledger_that_is_gone_is_noticed(ledger: Ledger) -> None:
    ledger.path.unlink()
    for ask in (ledger.charges, lambda: ledger.charge(THIRD), again(ledger).charges):
        with pytest.raises(
            LedgerError, match=r"is gone, and its mark says that it had 3 lines: restore .* never start at"
        ):
            ask()


def test_an_old_copy_is_noticed(ledger: Ledger) -> None:
    old = ledger.path.read_bytes()
    ledger.charge(THIRD)
    ledger.path.write_bytes(old)
    with pytest.raises(LedgerError, match="ends at line 3, and it had 4: charges are lost"):
        again(ledger).charge(replace(THIRD, id="c4"))


def test_another_history_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Ledger.create(tmp_path / "other" / "bank-1.jsonl", "bank-1", now=noon)
    for charge in (FIRST, replace(SECOND, steps=1), THIRD):
        other.charge(charge)
    other.path.replace(ledger.path)
    with pytest.raises(LedgerError, match="line 3 is not what was acknowledged"):
        ledger.charges()


def test_a_mark_that_is_gone_or_damaged_is_noticed(ledger: Ledger) -> None:
    whole = mark_of(ledger).read_bytes()
    for said in (whole[: len(whole) // 2], b"", b"[]", b'{"lines": null, "digest": ""}'):
        mark_of(ledger).write_bytes(said)
        with pytest.raises(LedgerError, match="mark is damaged"):
            ledger.charges()
    mark_of(ledger).unlink()
    with pytest.raises(LedgerError, match="mark is gone"):
        ledger.charges()


def test_both_gone_is_seen_only_by_who_kept_the_head(ledger: Ledger) -> None:
    head = ledger.head()
    ledger.charge(THIRD)
    ledger.require(head)
    ledger.path.unlink()
    mark_of(ledger).unlink()
    assert ledger.charges() == []
    with pytest.raises(LedgerError, match="ends at line 0, and it had 3: charges are lost"):
        ledger.require(head)


# ------------------------------------------------------------ crashes


def test_a_line_cut_at_any_byte_was_never_acknowledged(ledger: Ledger) -> None:
    """Killed while the third charge was written, before it was acknowledged."""
    before, mark = ledger.path.read_bytes(), mark_of(ledger).read_bytes()
    ledger.charge(THIRD)
    whole = ledger.path.read_bytes()
    for end in range(len(before), len(whole) + 1):
        ledger.path.write_bytes(whole[:end])
        mark_of(ledger).write_bytes(mark)
        torn = end < len(whole)
        assert again(ledger).charges() == [FIRST, SECOND, *([] if torn else [THIRD])]
        again(ledger).charge(replace(THIRD, id="c4"))
        ids = [charge.id for charge in again(ledger).charges()]
        assert ids == ["c1", "c2", "c4"] if torn else ids == ["c1", "c2", "c3", "c4"]


def test_nothing_of_a_torn_line_is_left_behind_a_shorter_one(ledger: Ledger) -> None:
    with open(ledger.path, "ab") as file:
        file.write(b'{"charge": ' + b"x" * 1000)
    before = lines_of(ledger)[:-1]
    ledger.settle("c1", 3)
    assert lines_of(ledger)[:-1] == before
    assert lines_of(ledger)[-1].endswith(b'"}\n')
    assert again(ledger).settled() == {"c1": 3}


def test_a_ledger_cut_at_any_byte_never_forgets_what_was_acknowledged(ledger: Ledger) -> None:
    whole = ledger.path.read_bytes()
    for end in range(len(whole)):
        ledger.path.write_bytes(whole[:end])
        for ask in (ledger.charges, lambda: ledger.charge(THIRD)):
            with pytest.raises(LedgerError):
                ask()


def test_a_ledger_may_be_started_again_when_its_start_was_cut_off(tmp_path: Path) -> None:
    for last in (1, 2, 3):
        folder = tmp_path / str(last)
        folder.mkdir()
        path = folder / "bank-1.jsonl"
        with crash_at(last), suppress(Crash):
            Ledger.create(path, "bank-1")
        Ledger(path, unit="bank-1").charge(FIRST)
        assert Ledger(path, unit="bank-1").charges() == [FIRST]


def test_everything_is_on_disk_before_a_charge_returns(ledger: Ledger) -> None:
    done: list[str] = []
    durable = Ledger(ledger.path, unit="bank-1")
    sync, rename = os.fsync, os.replace

    def fsync(fd: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        sync(fd)

    def replaced(source: Path, target: Path) -> None:
        done.append(f"renamed {Path(target).name}")
        rename(source, target)

    with patch.object(os, "fsync", fsync), patch.object(os, "replace", replaced):
        durable.charge(THIRD)
        assert done == ["bank-1.jsonl", ".bank-1.jsonl.mark.tmp", "renamed bank-1.jsonl.mark", ledger.path.parent.name]
        done.clear()
        ledger.settle("c3", 0)
        assert done == ["renamed bank-1.jsonl.mark"]


class Crash(BaseException):
    """The process ends here."""


@contextmanager
def crash_at(call: int) -> Iterator[None]:
    """The process ends in place of this call of fsync or rename (from 1; 0: never)."""
    left = [call]

    def or_crash(function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            function(*args)

        return called

    with patch.object(os, "fsync", or_crash(os.fsync)), patch.object(os, "replace", or_crash(os.replace)):
        yield


STEPS = st.integers(0, 9)
DEEDS = st.lists(
    st.tuples(st.sampled_from(["charge", "charge", "settle"]), STEPS, st.integers(0, 4), st.integers(0, 500)),
    max_size=10,
)


@settings(max_examples=60)
@given(DEEDS)
def test_whatever_happens_no_less_is_counted_than_was_acknowledged(
    deeds: list[tuple[str, int, int, int]],
) -> None:
    """Deeds, each of which may crash at one of its writes and leave its line torn where the mark does not know it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bank-1.jsonl"
        Ledger.create(path, "bank-1")
        charged: dict[str, int] = {}
        settled: dict[str, int] = {}
        tried = 0
        for deed, steps, crash, tear in deeds:
            ledger = Ledger(path, unit="bank-1")
            acknowledged_bytes = path.stat().st_size
            unsettled = sorted(set(charged) - set(ledger.settled()))
            try:
                with crash_at(crash):
                    if deed == "charge":
                        tried += 1
                        ledger.charge(replace(FIRST, id=f"c{tried}", steps=steps))
                        charged[f"c{tried}"] = steps
                    elif unsettled:
                        taken = min(steps, charged[unsettled[0]])
                        ledger.settle(unsettled[0], taken)
                        settled[unsettled[0]] = taken
            except Crash:
                if crash <= 3:  # before the mark is there
                    os.truncate(path, max(acknowledged_bytes, path.stat().st_size - tear))
        known = {charge.id: charge.steps for charge in Ledger(path, unit="bank-1").charges()}
        assert charged.items() <= known.items()
        assert settled.items() <= Ledger(path, unit="bank-1").settled().items()
        assert set(known) <= {f"c{n}" for n in range(1, tried + 1)}


# ------------------------------------------------------------ processes

SPEND = """
import sys, time
from pathlib import Path
from trellis.privacy.ledger import Charge, Ledger

ledger, me, budget = Ledger(Path(sys.argv[1]), unit="bank-1"), sys.argv[2], int(sys.argv[3])
for n in range(10**6):
    with ledger.locked():
        spent = sum(entry.steps for entry in ledger.entries())
        if spent + 7 > budget:
            break
        time.sleep(0.001)
        ledger.charge(Charge(f"{me}-{n}", "run-1", n, "r", "dp_sgd", 1.0, 0.1, 7, "d", time.time()))
    print(f"{me}-{n}", flush=True)
"""


def spender(path: Path, name: str, budget: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SPEND, str(path), name, str(budget)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_never_spend_a_budget_twice(tmp_path: Path) -> None:
    path = tmp_path / "bank-1.jsonl"
    Ledger.create(path, "bank-1")
    processes = [spender(path, name, 500) for name in ("a", "b")]
    acknowledged = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    charges = Ledger(path, unit="bank-1").charges()
    assert sum(charge.steps for charge in charges) == 497
    assert sorted(charge.id for charge in charges) == sorted(acknowledged)


def test_a_killed_process_leaves_every_charge_that_it_was_told_of(tmp_path: Path) -> None:
    path = tmp_path / "bank-1.jsonl"
    Ledger.create(path, "bank-1")
    process = spender(path, "a", 10**9)
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    told += process.communicate()[0].split()
    ledger = Ledger(path, unit="bank-1")
    ids = [charge.id for charge in ledger.charges()]
    assert ids[: len(told)] == told
    assert len(ids) <= len(told) + 1
    ledger.charge(FIRST)
    assert ledger.charges()[-1] == FIRST


def test_the_lock_may_be_entered_again_but_not_by_another_thread(ledger: Ledger) -> None:
    order: list[str] = []

    def other() -> None:
        with ledger.locked():
            order.append("other")

    with ledger.locked(), ledger.locked():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        ledger.charge(THIRD)
        order.append("this")
    thread.join(timeout=10)
    assert order == ["this", "other"]


def test_the_lock_is_free_after_an_error(ledger: Ledger) -> None:
    with pytest.raises(KeyError), ledger.locked():
        raise KeyError
    again(ledger).charge(THIRD)


# ------------------------------------------------------------ time


def test_ten_thousand_charges_are_read_in_half_a_second(ledger: Ledger) -> None:
    header = {"ledger": 1, "unit": "bank-1", "created": 1234.5}
    charges = [replace(FIRST, id=f"c{n}", round=n) for n in range(1, 10_001)]
    charges[1] = SECOND
    ledger.path.write_bytes(written([header, *({"charge": asdict(charge)} for charge in charges)]))
    started = time.process_time()
    assert ledger.charges() == charges
    assert time.process_time() - started < 0.5
    ledger.charge(replace(THIRD, id="last"))
    assert len(ledger.entries()) == 10_001
