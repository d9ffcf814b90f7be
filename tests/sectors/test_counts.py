"""What a node could say of its rows and no rows can have: each sector knows its own counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sectors
from sectors import training
from sectors.base import Place, Sector, take
from sectors.params import initial_arrays
from trellis.types import Counts


def counts_of(sector: Sector, number: int = 12) -> Counts:
    rows = sector.load(Place(0, 3, synthetic=True)).train
    return training.evaluate(sector, initial_arrays(sector, 0), take(rows, np.arange(number)))


@pytest.mark.parametrize("name", sectors.names())
def test_honest_counts_are_no_problem(name: str) -> None:
    sector = sectors.get(name)
    assert sector.counts_problem(counts_of(sector)) is None
    assert sector.counts_problem(counts_of(sector, 0)) is None


def one_more(counts: Counts, key: str) -> Counts:
    changed: Any = counts[key].copy()
    changed[(0,) * changed.ndim] += 1
    return {**counts, key: changed}


@pytest.mark.parametrize("name", ["banks", "healthcare_heart", "healthcare_pneumonia", "healthcare_wisconsin"])
@pytest.mark.parametrize("key", ["positives", "negatives"])
def test_a_score_of_no_row_is_found(name: str, key: str) -> None:
    sector = sectors.get(name)
    assert sector.counts_problem(one_more(counts_of(sector), key)) == "13 scores of 12 rows"


def test_rows_that_are_no_invoices_are_found() -> None:
    sector = sectors.get("retail")
    counts = counts_of(sector)
    counts["invoices"] = np.asarray(0, np.int64)
    assert sector.counts_problem(counts) == "0 invoices in 12 rows"


def test_errors_without_points_and_points_without_rows_are_found() -> None:
    sector = sectors.get("production")
    counts: Any = counts_of(sector)
    fleet = int(np.argmin(counts["points"]))
    assert counts["points"][fleet] == 0
    counts["squared_error"][fleet] = 1.0
    assert sector.counts_problem(counts) == "more squared_error in a fleet than its points allow"
    assert sector.counts_problem({**counts, "points": counts["points"] + 1}) == "15 points of 12 rows"


def test_more_pixels_than_the_tiles_have_are_found() -> None:
    sector = sectors.get("healthcare_retina")
    counts: Any = counts_of(sector)
    counts["negatives"][0, 0] += 12 * sector.tile**2  # type: ignore[attr-defined]
    assert "pixels of tiles" in str(sector.counts_problem(counts))
