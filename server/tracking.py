"""Rounds and model versions on a tracking server, without a round ever waiting for it.

    loop:     write_version, write_record (durable), notify
    tracker:  one background thread that delivers from the run folder, and remembers in `tracking.json` what it did

The run folder is the spool.  A server that is down, slow or hung delays the thread and nothing else; what it did not
take is delivered later by the same thread, by the resumed run, or by `sync`, from the folder alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from conf.schema import TrackingConfig, TrackingName, from_json, to_json
from server import store
from server.delivery import Session
from server.folder import RunFolder
from server.ledger import Ledger, Spool, load_ledgers
from server.run_info import RunInfo
from trellis.errors import ConfigError, TrackingError
from trellis.types import MetricSpec

__all__ = ["Delivery", "NoTracker", "RunInfo", "Tracker", "TrackerLike", "git_digest", "make_tracker", "sync"]

_logger = logging.getLogger(__name__)

ATTEMPTS_AT_END = 3
AFTER_ERROR_S = 10.0
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a store has of a run, and what still waits in the folder."""

    delivered: int
    """Records."""
    pending: int
    run_id: str | None
    """MLflow's id of the federation's run."""
    uri: str | None
    """Without a password."""
    model_name: str | None
    versions: Mapping[int, int] = field(default_factory=dict)
    """Round -> registered version."""
    error: str | None = None
    """Why something waits, or None."""

    @property
    def complete(self) -> bool:
        return self.pending == 0 and self.error is None


class TrackerLike(Protocol):
    """What a run needs of a tracker."""

    def start(self) -> None: ...

    def notify(self) -> None: ...

    def close(self, timeout_s: float | None = None) -> Delivery: ...

    def __enter__(self) -> TrackerLike: ...

    def __exit__(self, *_: object) -> None: ...


class NoTracker:
    """tracking=none: the folder keeps everything; `sync` can still deliver it."""

    def __init__(self, folder: RunFolder, config: TrackingConfig, info: RunInfo) -> None:
        self._folder, self._config, self._info = folder, config, info

    def start(self) -> None:
        """Write what `sync` would need."""
        _write_info(self._folder, self._config, self._info)

    def notify(self) -> None:
        """Nothing to do."""

    def close(self, timeout_s: float | None = None) -> Delivery:
        """Nothing was delivered, nothing waits."""
        return Delivery(0, 0, None, None, None)

    def __enter__(self) -> NoTracker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


class Tracker:
    """Delivers a run while it goes on.  Call `start`, `notify` after each committed record, `close` at the end.

    A record promises its version: write the version's folder before its record.
    """

    def __init__(self, folder: RunFolder, config: TrackingConfig, info: RunInfo) -> None:
        self._folder, self._config, self._info = folder, config, info
        self._uri = config.uri or store.embedded_uri(folder.path.parent)
        self._wake, self._closing, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._error: str | None = None
        self._closed: Delivery | None = None
        self._lock = _FolderLock(folder)
        self._thread = threading.Thread(target=self._run, name=f"tracker-{info.run_name}", daemon=True)

    def start(self) -> None:
        """Returns at once; MLflow is imported in the thread."""
        _write_info(self._folder, self._config, self._info)
        self._thread.start()

    def notify(self) -> None:
        """A record was written."""
        self._wake.set()

    def __enter__(self) -> Tracker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """After a `close` this does nothing; after an error it saves what it can and frees the folder."""
        self.close(min(AFTER_ERROR_S, self._config.close_timeout_s))

    def close(self, timeout_s: float | None = None) -> Delivery:
        """Deliver what is left, at most `timeout_s` (default: tracking.close_timeout_s).  Never raises for the server.

        What is not delivered by then stays in the folder, and the folder is free for `sync`.
        """
        if self._closed is not None:
            return self._closed
        limit_s = self._config.close_timeout_s if timeout_s is None else timeout_s
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(limit_s)
        error = self._error
        if self._thread.is_alive():
            error = error or f"the tracking server did not take everything within {limit_s:g} s"
        self._stopped.set()
        self._lock.release()
        delivery = _delivery(self._folder, self._info, self._uri, error)
        if delivery.error:
            _logger.warning(
                "%d records of %s wait to be sent to %s (%s); `trellis sync %s` sends them",
                delivery.pending,
                self._info.run_name,
                delivery.uri,
                delivery.error,
                self._info.run_name,
            )
        self._closed = delivery
        return delivery

    def _run(self) -> None:
        session: Session | None = None
        failures = failures_at_end = 0
        while not self._stopped.is_set():
            self._wake.clear()
            closing = self._closing.is_set()  # read after the clear: a wake-up that comes with it is then not lost
            try:
                self._lock.acquire()
                session = session or self._open()
                session.deliver()
                if closing:
                    session.settle()
            except Exception as error:  # an edge: whatever the store did, the round goes on and the thread tries again
                session, failures, failures_at_end = None, failures + 1, failures_at_end + closing
                self._note(error, failures)
                if failures_at_end >= ATTEMPTS_AT_END:
                    return
                delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(failures_at_end if closing else failures - 1, 10))
                # not `_wake`: a round does not make a dead server alive
                (self._stopped if closing else self._closing).wait(delay_s)
                continue
            failures, self._error = 0, None
            if closing:
                return
            self._wake.wait()

    def _open(self) -> Session:
        return Session(self._folder, self._config, self._info, self._uri, lambda: not self._stopped.is_set())

    def _note(self, error: Exception, failures: int) -> None:
        if self._stopped.is_set():
            return
        self._error = _one_line(error)
        level = logging.WARNING if failures == 1 else logging.DEBUG
        _logger.log(level, "tracking waits (%s); rounds go on and are kept in %s", self._error, self._folder.path)


def make_tracker(folder: RunFolder, config: TrackingConfig, info: RunInfo) -> TrackerLike:
    """The tracker that `tracking.name` asks for."""
    return (NoTracker if config.name is TrackingName.none else Tracker)(folder, config, info)


def sync(folder: RunFolder, uri: str | None = None) -> Delivery:
    """Deliver what is left of a run, from its folder alone; to another store when `uri` is given.

    Raises TrackingError when the folder holds no run or is being delivered by a process that is alive.  A store that
    cannot be reached, or a damaged record, is told in `Delivery.error`.
    """
    config, info = _read_info(folder)
    target = uri or config.uri or store.embedded_uri(folder.path.parent)
    lock = _FolderLock(folder)
    lock.acquire()
    try:
        session = Session(folder, config, info, target)
        session.deliver()
        session.settle()
    except Exception as error:  # an edge: the caller shows it
        return _delivery(folder, info, target, _one_line(error))
    finally:
        lock.release()
    return _delivery(folder, info, target, None)


def git_digest(path: Path | None = None) -> str | None:
    """Commit of a checkout, with "-dirty" when tracked files differ from it; None elsewhere.  Never raises."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        place = path or Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=5, check=False)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None


class _FolderLock:
    """One process delivers a folder at a time.  The kernel lets go of it when the process dies."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / ".tracking.lock"
        self._descriptor: int | None = None
        self._guard = threading.Lock()
        self._released = False

    def acquire(self) -> None:
        """Take it, or keep it.  Raises TrackingError when another holds it."""
        with self._guard:
            if self._released:
                raise TrackingError("delivery was stopped")
            if self._descriptor is not None:
                return
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise TrackingError(
                    f"{self._path.parent} is being delivered by another process; wait for its end"
                ) from None
            self._descriptor = descriptor

    def release(self) -> None:
        """For good: a thread that is still stuck in a call cannot take it again."""
        with self._guard:
            self._released = True
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def _write_info(folder: RunFolder, config: TrackingConfig, info: RunInfo) -> None:
    folder.write_json(folder.run_path, {"info": asdict(info), "tracking": to_json(config)})


def _read_info(folder: RunFolder) -> tuple[TrackingConfig, RunInfo]:
    try:
        content: dict[str, Any] = json.loads(folder.run_path.read_bytes())
        fields = content["info"]
        info = RunInfo(**{**fields, "primary": MetricSpec(**fields["primary"])})
        return from_json(TrackingConfig, content["tracking"]), info
    except OSError as error:
        raise TrackingError(f"{folder.path} holds no run: {error}") from error
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrackingError(f"{folder.run_path} is damaged: {error}") from error


def _delivery(folder: RunFolder, info: RunInfo, uri: str, error: str | None) -> Delivery:
    shown, ledger, spool = store.without_password(uri), Ledger(), Spool(folder)
    problems = [error] if error else []
    try:
        ledger = load_ledgers(folder).get(shown, ledger)
    except TrackingError as damage:
        problems.append(_one_line(damage))
    waiting = spool.pending(ledger)
    problems += [text for _, text in sorted(spool.damaged.items())]
    return Delivery(
        delivered=len(ledger.records),
        pending=len(waiting) + len(spool.damaged),
        run_id=ledger.run_id,
        uri=shown,
        model_name=info.model_name if ledger.versions else None,
        versions={r: kept.version for r, kept in sorted(ledger.versions.items())},
        error=problems[0] if problems else None,
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return store.without_password(f"{type(error).__name__}: {text[0] if text else ''}")[:300]
