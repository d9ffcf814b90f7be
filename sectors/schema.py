"""What a sector's data must look like: columns, units, categories, ranges.

A sector declares its columns once.  A file that disagrees is refused before training, and the error says file, column,
what was found and what was needed: federations fail on units (kelvin, not celsius), on codes (sex 1/2, not 0/1) and on
columns that one site spells otherwise, and none of that shows in a loss.

Columns hold numbers, or text; a column of arrays (images) says the shape of one.  Bounds are hard ones, of what can be
at all, not of what one file happens to hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from trellis import canonical
from trellis.errors import DataError

Table = pd.DataFrame | Mapping[str, npt.NDArray[Any]]
"""A table of columns: a DataFrame, or arrays of one leading length."""

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the raw table."""

    name: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    """Hard bounds, both included; None: none."""
    categories: tuple[Any, ...] | None = None
    """The only values there may be."""
    missing: tuple[float, ...] = ()
    """Numbers that the published files write where nothing was measured."""
    optional: bool = False
    """Whether values may be missing (empty cells, NaN).  The column itself is needed all the same."""
    integer: bool = False
    kind: Literal["number", "text"] = "number"
    shape: tuple[int, ...] = ()
    """Of one row's value: () a number or a text, (28, 28) an image, (-1, -1) an image of any size."""

    def __post_init__(self) -> None:
        if self.categories and all(isinstance(value, str) for value in self.categories):
            object.__setattr__(self, "kind", "text")

    @property
    def range(self) -> str:
        """The bounds or categories in words; "" where there are none."""
        unit = f" {self.unit}" if self.unit else ""
        if self.categories is not None:
            return f"one of {', '.join(map(str, self.categories))}"
        if self.low is None and self.high is None:
            return ""
        if self.low is None or self.high is None:
            return f"at least {self.low:g}{unit}" if self.low is not None else f"at most {self.high:g}{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"


def digest(columns: Sequence[Column]) -> str:
    """sha256 of the declaration: server and nodes compare it before the first round."""
    return canonical.digest([[repr(getattr(c, f)) for f in Column.__slots__] for c in columns])


def without_codes(table: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """The table with NaN where a column holds a code for "not measured", or a blank text."""
    coded = {c.name: table[c.name].where(~table[c.name].isin(c.missing)) for c in columns if c.missing}
    texts = [c.name for c in columns if c.kind == "text" and c.optional]
    coded |= {name: table[name].where(~_blank(table[name])) for name in texts}
    return table.assign(**coded) if coded else table


def _blank(values: pd.Series) -> pd.Series:
    return values.isna() | (values.astype(str).str.strip() == "")


def check(table: Table, columns: Sequence[Column], origin: str) -> None:
    """Refuse a table that does not hold `columns`.  Raises DataError naming origin, column, row and value."""
    missing = [c.name for c in columns if c.name not in table]
    if missing:
        needed = ", ".join(c.name for c in columns)
        raise DataError(f"{origin} has no column {', '.join(missing)}; needed are {needed}")
    lengths = {c.name: len(np.atleast_1d(np.asarray(table[c.name]))) for c in columns}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{origin} holds columns of different lengths ({said}): needed is one value a row in each")
    # of all columns at once: an owner mends a file in one go
    problems = [p for p in (_problem(table[c.name], c) for c in columns) if p]
    if problems:
        more = f"; and {len(problems) - SHOWN} columns more" if len(problems) > SHOWN else ""
        raise DataError(f"{origin} holds {'; '.join(problems[:SHOWN])}{more}")


def _problem(values: Any, column: Column) -> str | None:
    if column.kind == "text":
        return _text_problem(pd.Series(values), column)
    array = np.asarray(values)
    if array.ndim == 0 or not _fits(array.shape[1:], column.shape):
        found = f"values of shape {array.shape[1:]}" if array.ndim else "a single value"
        return f"{found} in column {column.name}, needed is {column.shape or 'a number'}"
    if array.dtype.kind not in "biuf":
        odd = _not_numbers(array)
        if odd or array.dtype.kind != "O":
            return f"non-numeric values in column {column.name}{odd}"
        array = pd.to_numeric(pd.Series(array.reshape(-1)), errors="coerce").to_numpy(np.float64).reshape(array.shape)
    if column.missing and array.dtype.kind in "iuf":
        array = np.where(np.isin(array, column.missing), np.nan, array.astype(np.float64))
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        empty = np.isnan(array)
        if (bad := ~finite & ~empty).any():
            return f"infinite values in column {column.name}{_where(array, bad)}"
        if empty.any() and not column.optional and not column.missing:
            return f"empty values in column {column.name}{_where(array, empty)}"
        array = np.where(empty, _harmless(column), array) if empty.any() else array
    return _range_problem(array, column)


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(b in (a, -1) for a, b in zip(shape, declared, strict=True))


def _harmless(column: Column) -> float:
    """A value that the column's own bounds allow, in the place of a missing one."""
    if column.categories is not None:
        return float(column.categories[0])
    return float(next((b for b in (column.low, column.high) if b is not None), 0.0))


def _range_problem(array: npt.NDArray[Any], column: Column) -> str | None:
    if column.categories is not None:
        bad = ~np.isin(array, column.categories)
    else:
        bad = np.zeros(array.shape, bool)
        if column.low is not None:
            bad |= array < column.low
        if column.high is not None:
            bad |= array > column.high
    if bad.any():
        hint = ": check the unit" if column.unit else ""
        return f"values outside {column.range} in column {column.name}{_where(array, bad)}{hint}"
    if column.integer and array.dtype.kind == "f" and (bad := array != np.round(array)).any():
        return f"values that are no whole numbers in column {column.name}{_where(array, bad)}"
    return None


def _text_problem(values: pd.Series, column: Column) -> str | None:
    empty = _blank(values).to_numpy()
    if empty.any() and not column.optional:
        rows = f"{int(empty.sum())} of {len(values)} rows, first row {_first(empty)}"
        return f"empty values in column {column.name} ({rows})"
    if column.categories is not None:
        bad = ~values.isin(list(column.categories)).to_numpy() & ~empty
        if bad.any():
            found = str(values[bad].iloc[0])[:40]
            return f"{found!r} in column {column.name} (row {_first(bad)}), which must be {column.range}"
    return None


def _where(array: npt.NDArray[Any], bad: npt.NDArray[np.bool_]) -> str:
    """How many rows, the first of them and its value, as a reader of the file counts: data rows from 1."""
    rows = bad.reshape(len(bad), -1).any(axis=1)
    value = array.reshape(len(array), -1)[rows.argmax()][bad.reshape(len(bad), -1)[rows.argmax()].argmax()]
    return f" ({int(rows.sum())} of {len(rows)} rows, first row {_first(rows)}: {value:g})"


def _not_numbers(array: npt.NDArray[Any]) -> str:
    series = pd.Series(array.astype(object).reshape(-1))
    bad = (pd.to_numeric(series, errors="coerce").isna() & ~series.isna()).to_numpy()
    return f" (first row {_first(bad)}: {str(series[bad].iloc[0])[:40]!r})" if bad.any() else ""


def _first(bad: npt.NDArray[np.bool_]) -> int:
    return int(np.asarray(bad).argmax()) + 1
