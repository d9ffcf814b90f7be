"""Where data files are, and how a table is read.  Nothing is downloaded, nothing is replaced silently."""

from __future__ import annotations

import gzip
import hashlib
import os
import warnings
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sectors import schema
from sectors.schema import Column
from trellis.errors import DataError, MissingData

EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "?")
"""Cells of a column of numbers that hold none."""

_REPOSITORY = Path(__file__).resolve().parent.parent


def data_root() -> Path:
    """The data folder: TRELLIS_DATA, else `shared/data` beside the repository, else `./data` (which may not exist)."""
    named = os.environ.get("TRELLIS_DATA")
    if named:
        return Path(named).expanduser()
    beside = _REPOSITORY.parent / "shared" / "data"
    return beside if beside.is_dir() else Path("data")


def find(relative: str | Sequence[str], dataset: str, where: str) -> Path:
    """The first of some files under the data folder that exists, plain (`.csv`, `.txt`) or gzipped alike.

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
    if name.endswith((".csv", ".txt")):
        return name, f"{name}.gz"
    if name.endswith((".csv.gz", ".txt.gz")):
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


def read_csv(path: Path, columns: Sequence[str | Column]) -> pd.DataFrame:
    """A CSV file, plain or gzipped, that holds `columns`; a bare name is a column of finite numbers.

    Raises DataError naming file and column, MissingData.
    """
    stamp(path)
    declared = [Column(c) if isinstance(c, str) else c for c in columns]
    text = {c.name: str for c in declared if c.kind == "text"}
    try:
        table = _read_csv(path, text)
    except pd.errors.ParserWarning as error:
        raise DataError(
            f"{path} has rows with more cells than its header has names: a decimal comma, or a separator in a text?"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path} cannot be read as {_packing(path)}CSV: {error}") from error
    if table.empty:
        raise DataError(f"{path} has no rows; needed are the columns {', '.join(c.name for c in declared)}")
    schema.check(table, declared, str(path))
    return table


def _read_csv(path: Path, text: dict[str, type[str]]) -> pd.DataFrame:
    """UTF-8, or Latin-1 where it is not: published copies of one file come in both.

    More cells than the header has names are refused, where pandas would take the first ones for an index.
    """
    names = _names(path)
    options: dict[str, Any] = {
        "dtype": text,
        "low_memory": False,
        "index_col": False,
        "keep_default_na": False,
        # a text may be NA: the country, the initials
        "na_values": {name: [""] if name in text else list(EMPTY) for name in names},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, **options)
        except UnicodeDecodeError:
            return pd.read_csv(path, encoding="latin-1", **options)


def _names(path: Path) -> list[str]:
    """The header.  Raises DataError where it cannot be one: pandas would go on with names of its own."""
    first = pd.read_csv(path, header=None, nrows=1, dtype=str, encoding="latin-1", index_col=False)
    names = [str(name).removeprefix("\u00ef\u00bb\u00bf") for name in first.iloc[0]]
    if names and names[0].startswith(("\u00ff\u00fe", "\u00fe\u00ff")):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{path} is separated by semicolons: needed are commas, with points in numbers")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has two columns {', '.join(repeated)}: each name may stand once in its header")
    return names


def read_text(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """A table of numbers between blanks without a header, plain or gzipped.  Raises DataError, MissingData.

    Every line has as many numbers as there are `names`.
    """
    stamp(path)
    try:
        # by content, not by name: a file that was unpacked may still be called .gz, and the reverse
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt") as file:
            table = pd.read_csv(file, sep=r"\s+", header=None)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a {_packing(path)}table of numbers: {error}") from error
    if table.shape[1] != len(names):
        raise DataError(
            f"{path} has {table.shape[1]} numbers a line, needed are {len(names)}: {', '.join(names[:6])}"
            f"{', ...' if len(names) > 6 else ''}"
        )
    table.columns = pd.Index(names)
    schema.check(table, [Column(name) for name in names], str(path))
    return table


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays of a `.npz` file by key.  Raises DataError naming file and key, MissingData.

    Pickled objects are refused: they could run code.
    """
    stamp(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                found = ", ".join(archive.files[:12])
                raise DataError(
                    f"{path} has no array {', '.join(missing)}; needed are {', '.join(keys)}, found {found}"
                )
            return {key: archive[key] for key in keys}
    except DataError:
        raise
    except Exception as error:  # a damaged archive breaks zipfile and numpy in every way there is
        raise DataError(
            f"{path} cannot be read as .npz: it is no archive of plain arrays ({type(error).__name__})"
        ) from error


def _packing(path: Path) -> str:
    return "gzipped " if path.suffix == ".gz" else ""


def require(table: pd.DataFrame, columns: Sequence[str | Column], origin: str) -> pd.DataFrame:
    """The table itself, when it holds `columns`; a bare name is a column of finite numbers.  Raises DataError."""
    schema.check(table, [Column(c) if isinstance(c, str) else c for c in columns], origin)
    return table
