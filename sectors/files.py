"""Where data files are, and how a table is read.  Nothing is downloaded, nothing is replaced silently."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from trellis.errors import DataError, MissingData

_REPOSITORY = Path(__file__).resolve().parent.parent


def data_root() -> Path:
    """The data folder: TRELLIS_DATA, else `shared/data` beside the repository, else `./data` (which may not exist)."""
    named = os.environ.get("TRELLIS_DATA")
    if named:
        return Path(named).expanduser()
    beside = _REPOSITORY.parent / "shared" / "data"
    return beside if beside.is_dir() else Path("data")


def find(relative: str | Sequence[str], dataset: str, where: str) -> Path:
    """The first of some files under the data folder that exists, `.csv` or `.csv.gz` alike.

    `dataset` names the data, `where` says where to get them.  Raises MissingData.
    """
    wanted = [relative] if isinstance(relative, str) else list(relative)
    root = data_root()
    for path in (root / spelling for name in wanted for spelling in _spellings(name)):
        if path.is_file():
            return path
    raise MissingData(
        f"no {' or '.join(wanted)} under {root.absolute()}: the data set {dataset} is not there. "
        f"Get it from {where} and put it there, or point TRELLIS_DATA at the folder that holds it; "
        "data=synthetic runs on generated rows instead."
    )


def _spellings(name: str) -> tuple[str, ...]:
    if name.endswith(".csv"):
        return name, f"{name}.gz"
    if name.endswith(".csv.gz"):
        return name, name.removesuffix(".gz")
    return (name,)


def stamp(path: Path) -> tuple[int, int]:
    """Modification time (ns) and size (bytes): what a cache of the file is keyed by.  Raises MissingData."""
    try:
        found = path.stat()
    except OSError as error:
        raise MissingData(f"cannot open the data file {path}: {error.strerror or error}") from error
    return found.st_mtime_ns, found.st_size


def digest(path: Path) -> str:
    """sha256 of a file's bytes.  Read once a process and stamp.  Raises MissingData."""
    return _digest(path, stamp(path))


@lru_cache(maxsize=64)
def _digest(path: Path, stamped: tuple[int, int]) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MissingData(f"cannot read the data file {path}: {error.strerror or error}") from error


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV file, plain or gzipped, with at least `columns`, all of them numbers.  Raises DataError, MissingData."""
    stamp(path)
    try:
        table = pd.read_csv(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path} cannot be read as {'gzipped ' if path.suffix == '.gz' else ''}CSV: {error}") from error
    if table.empty:
        raise DataError(f"{path} has no rows; needed are the columns {', '.join(columns)}")
    return require(table, columns, str(path))


def require(table: pd.DataFrame, columns: Sequence[str], origin: str) -> pd.DataFrame:
    """The table itself, when it has all `columns` and they hold finite numbers.  Raises DataError."""
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise DataError(f"{origin} has no column {', '.join(missing)}; needed are {', '.join(columns)}")
    bad = [c for c in columns if not _is_finite(table[c])]
    if bad:
        raise DataError(f"{origin} holds empty, infinite or non-numeric values in column {', '.join(bad)}")
    return table


def _is_finite(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(
        np.isfinite(column.to_numpy(np.float64, na_value=np.nan)).all()
    )
