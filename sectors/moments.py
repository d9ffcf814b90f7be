"""Mean and deviation of columns from sums that are added over nodes.

Values are mapped to 0..1 by the declared ranges first: then every sum is bounded by the number of rows, nothing is
negative, and sums can be quantised and masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trellis.vectors import CountSpec

TOLERANCE = 1e-6
"""Of a sum: it was rounded."""


def specs(num_columns: int) -> tuple[CountSpec, ...]:
    """`known`, how many values there are, and `sums` of them and of their `squares`, each (k,)."""
    k = num_columns
    return (
        CountSpec("known", (k,), "int64", k),
        CountSpec("sums", (k,), "float64", k),
        CountSpec("squares", (k,), "float64", k),
    )


def of(unit: npt.NDArray[np.floating[Any]]) -> dict[str, npt.NDArray[np.generic]]:
    """(n, k) values in 0..1, NaN where missing -> the three statistics."""
    values = unit.astype(np.float64)
    return {
        "known": np.isfinite(values).sum(axis=0, dtype=np.int64),
        "sums": np.nansum(values, axis=0),
        "squares": np.nansum(values**2, axis=0),
    }


def problem(counts: dict[str, Any], rows: int) -> str | None:
    """Why no `rows` values in 0..1 have these moments, or None.

    known <= rows, and for each column  sums^2 / known <= squares <= sums <= known.
    """
    known, sums, squares = (np.asarray(counts[k], np.float64) for k in ("known", "sums", "squares"))
    slack = TOLERANCE * (1.0 + known)
    laws = {
        f"more values than the {rows} rows": known > rows,
        "a mean above the declared range": sums > known + slack,
        "squares above their values": squares > sums + slack,
        "a negative variance": sums**2 > known * squares + slack * (1.0 + known),
    }
    broken = [f"{what} in column {int(np.argmax(bad))}" for what, bad in laws.items() if bad.any()]
    return f"statistics that no rows can have: {'; '.join(broken)}" if broken else None


def mean_and_deviation(totals: dict[str, Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each column on the scale 0..1, (k,) and (k,); 0 where there is no value."""
    known = np.maximum(np.asarray(totals["known"], np.float64), 1.0)
    mean = np.asarray(totals["sums"], np.float64) / known
    return mean, np.sqrt(np.maximum(np.asarray(totals["squares"], np.float64) / known - mean**2, 0.0))
