"""What may never be forgotten: every use of one unit's data, in an append-only file.

    bank-1.jsonl         a header, then one line a charge or a settlement, each with the digest of all lines up to it
    bank-1.jsonl.mark    how many lines were acknowledged, and the digest of the last
    bank-1.jsonl.lock    held while the ledger is read, judged and added to

A charge is on disk, in both files, before `charge` returns.  A crash leaves at most one line that the mark does not
know: a whole one counts, for it may have been used; a torn one was never acknowledged, and the next charge cuts it off.
Everything else that does not parse, does not chain, or falls short of the mark is a LedgerError, and nothing is spent.

So a lost, edited or reordered line is noticed, and a ledger that is shortened, restored from an old copy or gone while
its mark is there.  What the two files cannot tell: that both are gone, or both were put back to an earlier day (a
machine's snapshot, a disk that was not mounted).  Who can keep the `head` somewhere else, for instance with the last
reply, may ask for it: `require`.  The digests have no key: they show accidents, not a forger at the node, whose data
these are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trellis.durable import sync_folder
from trellis.errors import ConfigError, LedgerError
from trellis.privacy.accountant import Entry

VERSION = 1

Kind = Literal["dp_sgd", "counts", "central", "distributed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

RESTORE = (
    "restore it and its .mark from a backup that has every charge, and never start at zero: without one, what is left "
    "for these data is unknown, so nothing is"
)


@dataclass(frozen=True, slots=True)
class Charge:
    """Steps that the data pay for: written down before they are taken, in full."""

    id: str
    run: str
    round: int
    about: str
    """The digest of the request, or what it is for."""
    kind: Kind
    noise_multiplier: float
    sample_rate: float
    steps: int
    data_digest: str
    at: float
    """When, in seconds since 1970."""

    def __post_init__(self) -> None:
        words = (self.id, self.run, self.about, self.data_digest)
        if not self.id or {type(word) for word in words} != {str}:
            raise ConfigError(f"a charge needs text for id, run, about and data_digest, and an id: it has {words}")
        if self.kind not in KINDS:
            raise ConfigError(f"kind of charge {self.id} is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not isinstance(self.round, int) or not math.isfinite(self.at):
            raise ConfigError(f"charge {self.id} has round {self.round!r} and time {self.at!r}; they must be numbers")
        self.entry(self.steps)

    def entry(self, steps: int) -> Entry:
        """What the accountant counts when so many of its steps were taken."""
        return Entry(self.noise_multiplier, self.sample_rate, steps)


@dataclass(frozen=True, slots=True)
class Head:
    """How far a ledger goes: its lines, and the digest of them all."""

    lines: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Book:
    """What a ledger says."""

    unit: str = ""
    charges: dict[str, Charge] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)
    """Steps really taken, by charge."""
    digests: list[str] = field(default_factory=list)
    """After each line."""
    size_bytes: int = 0
    """Of its whole lines."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of one unit.  With a `unit`, another's is refused, and the first charge may start it.

    `durable` forces every line to disk; a simulation needs to survive its process only, not its machine.
    """

    path: Path
    durable: bool = True
    unit: str | None = field(default=None, kw_only=True)
    now: Callable[[], float] = field(default=time.time, kw_only=True)
    _holders: set[tuple[int, int]] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path, unit: str, *, durable: bool = True, now: Callable[[], float] = time.time) -> Ledger:
        """An empty ledger, in a folder that is there.  Raises LedgerError where it, or its mark, is already."""
        ledger = cls(path, durable, unit=unit, now=now)
        with ledger.locked():
            mark = _read_mark(ledger._mark())
            if path.exists() or (mark is not None and mark.lines > 0):
                raise LedgerError(f"{path} or its mark is there already: a ledger is never started again; {RESTORE}")
            ledger._start()
        return ledger

    # ------------------------------------------------------------ reading

    def charges(self) -> list[Charge]:
        """Oldest first."""
        return list(self._read().charges.values())

    def settled(self) -> dict[str, int]:
        """The steps really taken, of the charges of which that is known, by id."""
        return dict(self._read().settled)

    def entries(self) -> list[Entry]:
        """For the accountant: everything charged, in full where it was not settled."""
        book = self._read()
        return [charge.entry(book.settled.get(charge.id, charge.steps)) for charge in book.charges.values()]

    def find(self, about: str) -> Charge | None:
        """The last charge for a request.  What it paid for may be sent again, not drawn again: noise is drawn once."""
        return next((charge for charge in reversed(self.charges()) if charge.about == about), None)

    def head(self) -> Head:
        """To be kept where the ledger is not."""
        digests = self._read().digests
        return Head(len(digests), digests[-1] if digests else "")

    def require(self, head: Head) -> None:
        """Raises LedgerError where this ledger does not go on from what it was when it had this head."""
        _require_head(self.path, self._read().digests, head)

    # ------------------------------------------------------------ writing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time reads, judges and charges.  May be entered again by who is in it."""
        me = (os.getpid(), threading.get_ident())
        if me in self._holders:
            yield
            return
        with self._open_lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._holders.add(me)
            try:
                yield
            finally:
                self._holders.discard(me)

    def charge(self, charge: Charge) -> None:
        """Write a charge down: it cannot be lost any more when this returns."""
        with self.locked():
            book = self._read()
            if charge.id in book.charges:
                raise LedgerError(f"{self.path} has a charge {charge.id} already: an id is charged once")
            self._append(book, {"charge": asdict(charge)})

    def settle(self, id: str, steps: int) -> None:
        """How many of its steps a charge really took.  Said once, and never more than were charged."""
        with self.locked():
            book = self._read()
            charge = book.charges.get(id)
            if charge is None:
                raise LedgerError(f"{self.path} has no charge {id}: nothing is settled that was not charged")
            taken, known = charge.entry(steps).steps, book.settled.get(id)
            if taken == known:
                return
            if known is not None:
                raise LedgerError(
                    f"charge {id} in {self.path} was settled with {known} steps: they are not {steps} now"
                )
            if taken > charge.steps:
                raise LedgerError(f"charge {id} in {self.path} is of {charge.steps} steps, and {steps} are settled")
            self._append(book, {"settle": {"id": id, "steps": taken, "at": self.now()}})

    # ------------------------------------------------------------ the files

    def _mark(self) -> Path:
        return self.path.with_name(f"{self.path.name}.mark")

    def _open_lock(self) -> Any:
        try:
            return open(self.path.with_name(f"{self.path.name}.lock"), "w")
        except FileNotFoundError:
            raise LedgerError(
                f"{self.path.parent}, the folder of this ledger, is not there: is its disk mounted?  "
                "For a node that is new, make it"
            ) from None

    def _start(self) -> None:
        header = {"ledger": VERSION, "unit": self.unit, "created": self.now()}
        line, digest = _line(header, "")
        self._replace(self._mark(), _packed(Head(0, "")))  # before the ledger: one without a mark is never a new one
        self._replace(self.path, line)
        self._replace(self._mark(), _packed(Head(1, digest)))

    def _append(self, book: _Book, record: dict[str, Any]) -> None:
        if not book.digests:
            if self.unit is None:
                raise LedgerError(
                    f"{self.path} is not there, and whose it would be is not said: `Ledger.create` starts it"
                )
            self._start()
            book = self._read()
        line, digest = _line(record, book.digests[-1])
        with open(self.path, "r+b") as file:
            file.truncate(book.size_bytes)  # what a crash cut off was never acknowledged
            file.seek(book.size_bytes)
            file.write(line)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        self._replace(self._mark(), _packed(Head(len(book.digests) + 1, digest)))

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if self.durable:
            sync_folder(path.parent)

    def _read(self) -> _Book:
        """What the ledger says, checked.  Raises LedgerError where it is damaged, or falls short of its mark."""
        mark = _read_mark(self._mark())  # first: who reads without the lock sees a ledger no older than its mark
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            if mark is None or mark.lines == 0:
                return _Book()
            raise LedgerError(
                f"{self.path} is gone, and its mark says that it had {mark.lines} lines: {RESTORE}"
            ) from None
        book = _parsed(self.path, data)
        if self.unit is not None and book.unit != self.unit:
            raise LedgerError(f"{self.path} is the ledger of {book.unit!r}, not of {self.unit!r}: check the paths")
        if mark is not None:
            _require_head(self.path, book.digests, mark)
        elif not self._mark().exists():
            raise LedgerError(f"{self._mark()} is gone, so charges in {self.path} may be: {RESTORE}")
        return book


# ------------------------------------------------------------ lines

_CHAIN = b', "chain": "'
_CHAIN_BYTES = len(_CHAIN) + 64 + len(b'"}')


def _line(record: dict[str, Any], digest: str) -> tuple[bytes, str]:
    """A record as a line that follows a digest, and the digest after it."""
    body = json.dumps(record, allow_nan=False).encode()[:-1]
    after = _digest_after(digest, body)
    return body + _CHAIN + after.encode() + b'"}\n', after


def _digest_after(digest: str, body: bytes) -> str:
    return hashlib.sha256(digest.encode() + b"\n" + body).hexdigest()


def _parsed(path: Path, data: bytes) -> _Book:
    *lines, _torn = data.split(b"\n")
    unit, charges, settled, digests = "", dict[str, Charge](), dict[str, int](), list[str]()
    for number, line in enumerate(lines, start=1):
        try:
            body = line[:-_CHAIN_BYTES]
            digest = _digest_after(digests[-1] if digests else "", body)
            if line[-_CHAIN_BYTES:] != _CHAIN + digest.encode() + b'"}':
                raise ValueError("its digest is not that of the lines up to it")
            record = json.loads(body + b"}")
            if number == 1:
                unit = _unit_of(record)
            elif "charge" in record:
                charge = Charge(**record["charge"])
                _require(charge.id not in charges, f"{charge.id} is charged a second time")
                charges[charge.id] = charge
            else:
                known = charges[record["settle"]["id"]]
                steps = record["settle"]["steps"]
                _require(known.id not in settled and steps <= known.steps, f"{known.id} cannot be settled so")
                settled[known.id] = known.entry(steps).steps
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            raise LedgerError(f"{path}, line {number} is damaged ({error}): {RESTORE}") from error
        digests.append(digest)
    if not digests:
        raise LedgerError(f"{path} has no header: {RESTORE}")
    return _Book(unit, charges, settled, digests, len(data) - len(_torn))


def _unit_of(record: dict[str, Any]) -> str:
    _require(record["ledger"] == VERSION, f"it is of version {record['ledger']}, and this Trellis reads {VERSION}")
    return str(record["unit"])


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


# ------------------------------------------------------------ heads


def _require_head(path: Path, digests: list[str], head: Head) -> None:
    if head.lines > len(digests):
        raise LedgerError(f"{path} ends at line {len(digests)}, and it had {head.lines}: charges are lost; {RESTORE}")
    if head.lines and digests[head.lines - 1] != head.digest:
        raise LedgerError(f"{path}, line {head.lines} is not what was acknowledged: {RESTORE}")


def _packed(head: Head) -> bytes:
    return json.dumps(asdict(head)).encode() + b"\n"


def _read_mark(path: Path) -> Head | None:
    try:
        said = json.loads(path.read_bytes())
        return Head(int(said["lines"]), str(said["digest"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise LedgerError(f"{path} is damaged ({error}): {RESTORE}") from error
