"""Opening a tracking store.

The embedded store is `mlflow.db` beside the run folders, artifacts beside it.  MLflow makes a new SQLite file by
running every migration of its history, about 5 s, and is not safe against a kill in the middle or against two processes
at once; so the file is made under a lock, under another name, and renamed.

Only clients that are told their URI are used: MLflow's global URI and active run belong to the user's own code.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


def embedded_uri(runs_dir: Path) -> str:
    """URI of the store beside the run folders."""
    return f"{SQLITE}{runs_dir.resolve() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """A URI that may be shown and recorded."""
    return re.sub(r"://[^/@\s\"]*@", "://***@", uri)


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; a SQLite store that does not exist yet is made.  Imports MLflow (seconds)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
    # MLflow would try for four minutes; records are spooled, so failing soon and trying later is better.  No retries
    # inside MLflow also means that nothing is written twice behind our back.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if path := sqlite_path(uri):
        create_sqlite(path)
        _sync_seldom(uri, path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def sqlite_path(uri: str) -> Path | None:
    """File of a SQLite URI; None for any other."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) and uri != SQLITE else None


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where an experiment's artifacts go: beside a SQLite file; elsewhere the server decides (None)."""
    path = sqlite_path(uri)
    return str(path.resolve().parent / "mlartifacts" / re.sub(r"[^\w\-.]", "_", experiment)) if path else None


def create_sqlite(path: Path) -> None:
    """Make the SQLite store, in WAL mode, unless it exists.  Safe against kills and against other processes."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists():  # another process made it while we waited
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = path.with_name(f".{path.name}.tmp")
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink()
        artifacts = str(path.resolve().parent / "mlartifacts")
        store = SqlAlchemyStore(f"{SQLITE}{temporary}", artifacts)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        with contextlib.closing(sqlite3.connect(temporary)) as connection:
            # WAL: readers (the UI) do not stop the writer, and a write costs a third; the mode stays in the file
            connection.execute("PRAGMA journal_mode=WAL")
        os.replace(temporary, path)


def flush(uri: str) -> None:
    """After this, what was written to a SQLite store outlives a loss of power; elsewhere the server sees to it."""
    path = sqlite_path(uri)
    if path is None:
        return
    # The log only: opening the database beside SQLite would drop its locks, and SQLite syncs it when it moves the log.
    with contextlib.suppress(FileNotFoundError), open(path.with_name(f"{path.name}-wal"), "rb") as log:
        os.fsync(log.fileno())


def _sync_seldom(uri: str, path: Path) -> None:
    """Let MLflow's some 30 commits a record wait for `flush` instead of syncing the disk each; needs WAL."""
    import sqlalchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            return  # somebody else's file, in another mode
    # MLflow keeps one engine per URI; the client made next uses this one.
    engine = SqlAlchemyStore(uri, str(path.resolve().parent / "mlartifacts")).engine  # type: ignore[no-untyped-call]
    if not sqlalchemy.event.contains(engine, "connect", _relax):
        sqlalchemy.event.listen(engine, "connect", _relax)
        engine.dispose()  # its first connection was made before


def _relax(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


def unless_there(create: Callable[[], object]) -> None:
    """Create something by name, unless another run did just now."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file until the block ends; the kernel lets go of it when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
