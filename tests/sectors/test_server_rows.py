"""The server's own rows: held out before the partition, whole groups, of every class; or a file of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import sectors
from sectors.base import SPLITS, Place, Pooled, Rows, Sector, concatenate, num_rows
from sectors.healthcare_wisconsin import HealthcareWisconsin
from trellis.errors import ConfigError, DataError, MissingData

PLACE = Place(0, 3, synthetic=True)


@dataclass(frozen=True)
class Clinics(HealthcareWisconsin):
    """Patients of seven aspirates each: rows of a patient stay together."""

    name: ClassVar[str] = "clinics"

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return np.arange(num_rows(pooled.rows)) // 7


@pytest.fixture(params=sectors.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids(rows: Rows) -> list[bytes]:
    return [x.tobytes() + y.tobytes() for x, y in zip(rows["x"], rows["y"], strict=True)]


def at_nodes(sector: Sector, num_parts: int = 3) -> Rows:
    data = [sector.load(replace(PLACE, part=part, num_parts=num_parts)) for part in range(num_parts)]
    return concatenate([d.split(s) for d in data for s in SPLITS])


def everything(sector: Sector) -> Rows:
    return at_nodes(replace(sector, server_fraction=0.0), 1)


# ---------------------------------------------------------------- a fraction


def test_server_and_nodes_together_hold_every_row_once(name: str) -> None:
    sector = sectors.get(name, {"server_fraction": 0.1})
    server, nodes = ids(sector.server_rows(synthetic=True)), ids(at_nodes(sector))
    assert not set(server) & set(nodes)
    assert sorted(server + nodes) == sorted(ids(everything(sector)))


@pytest.mark.parametrize("partition", ["dirichlet", "radius_band", "uniform"])
@pytest.mark.parametrize("num_parts", [1, 3, 10])
def test_no_row_of_the_server_is_at_a_node_in_any_partition(partition: str, num_parts: int) -> None:
    sector = sectors.get("healthcare_wisconsin", {"server_fraction": 0.2, "partition": partition})
    server, nodes = ids(sector.server_rows(synthetic=True)), ids(at_nodes(sector, num_parts))
    assert not set(server) & set(nodes)
    assert len(server) + len(nodes) == num_rows(everything(sector))


@pytest.mark.parametrize("name", ["banks", "healthcare_heart", "healthcare_wisconsin"])
def test_of_every_class_the_server_has_its_share(name: str) -> None:
    for fraction in (0.02, 0.1, 0.5):
        sector = sectors.get(name, {"server_fraction": fraction})
        server, whole = sector.server_rows(synthetic=True)["y"], everything(sector)["y"]
        for label in np.unique(whole):
            assert np.sum(server == label) == pytest.approx(fraction * np.sum(whole == label), abs=1)


def test_no_group_is_divided_between_the_server_and_a_node() -> None:
    sector = Clinics(server_fraction=0.1)
    order = {row: i // 7 for i, row in enumerate(ids(sector.pool(sector.generate()).rows))}
    patients = {order[row] for row in ids(sector.server_rows(synthetic=True))}
    assert len(patients) == pytest.approx(0.1 * 82, abs=1)
    assert not patients & {order[row] for row in ids(at_nodes(sector))}
    assert num_rows(sector.server_rows(synthetic=True)) >= 7 * (len(patients) - 1), "whole patients"


def test_the_servers_rows_follow_the_split_seed_only(name: str) -> None:
    rows = [
        ids(sectors.get(name, {"server_fraction": 0.1, "split_seed": seed}).server_rows(synthetic=True))
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]


def test_without_a_fraction_the_parts_are_what_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = at_nodes(sectors.get(name))
    purposes: list[tuple[int | str, ...]] = []
    rng = Sector.rng

    def watched(self: Sector, *purpose: int | str) -> np.random.Generator:
        purposes.append(purpose)
        return rng(self, *purpose)

    monkeypatch.setattr(Sector, "rng", watched)
    zero = at_nodes(sectors.get(name, {"server_fraction": 0.0, "server_path": None}))
    assert ids(zero) == ids(plain)
    assert ("server",) not in purposes


def test_a_nodes_own_file_is_its_own_whatever_the_server_holds(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    sectors.get("healthcare_wisconsin").generate().head(50).to_csv(path, index=False)
    sector = sectors.get("healthcare_wisconsin", {"server_fraction": 0.5})
    data = sector.load(Place(0, 3, path=path))
    assert sum(num_rows(data.split(s)) for s in SPLITS) == 50


# ---------------------------------------------------------------- a file


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "server.csv"
    sectors.get("healthcare_wisconsin", {"split_seed": 9}).generate().head(40).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("synthetic", [True, False])
def test_a_file_of_the_servers_own_is_all_its_rows(own: Path, synthetic: bool) -> None:
    sector = sectors.get("healthcare_wisconsin", {"server_path": str(own)})
    assert num_rows(sector.server_rows(synthetic)) == 40
    assert ids(at_nodes(sector)) == ids(at_nodes(sectors.get("healthcare_wisconsin"))), "the nodes keep all of theirs"


def test_a_file_that_is_not_there_or_does_not_fit_is_said(own: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"gone\.csv"):
        sectors.get("healthcare_wisconsin", {"server_path": str(tmp_path / "gone.csv")}).server_rows(True)
    with pytest.raises(DataError, match="has no column"):
        sectors.get("banks", {"server_path": str(own)}).server_rows(True)


def test_another_file_of_the_servers_is_other_data(own: Path) -> None:
    plain, sector = (sectors.get("healthcare_wisconsin", o) for o in ({}, {"server_path": str(own)}))
    before = sector.fingerprint(synthetic=True)
    assert before != plain.fingerprint(synthetic=True)
    own.write_text(own.read_text().rsplit("\n", 2)[0] + "\n")
    assert sector.fingerprint(synthetic=True) != before


# ---------------------------------------------------------------- options


def test_the_server_says_where_its_rows_come_from() -> None:
    options: list[dict[str, Any]] = [{}, {"server_fraction": 0.1}, {"server_path": "rows.csv"}]
    found = [sectors.get("healthcare_wisconsin", o).server_data for o in options]
    assert found == ["none", "fraction", "path"]


def test_a_server_without_rows_says_what_to_set(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server_fraction=0\.02, or .*server_path"):
        sectors.get(name).server_rows(synthetic=True)


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0, float("nan"), float("inf")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"server_fraction is .*; it must be between 0 and 0\.5"):
        sectors.get("healthcare_wisconsin", {"server_fraction": fraction})


def test_both_a_fraction_and_a_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="set one of the two"):
        sectors.get("healthcare_wisconsin", {"server_fraction": 0.1, "server_path": "rows.csv"})


def test_a_share_too_small_for_one_row_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # two rows of each class: drawn by the shares, none is the server's
    sector = sectors.get("healthcare_wisconsin", {"server_fraction": 0.001, "synthetic_rows": 4, "min_rows": 1})
    monkeypatch.setattr(type(sector), "labels", lambda self, rows: np.arange(num_rows(rows)))
    with pytest.raises(DataError, match=r"server_fraction=0\.001 of the rows is not one row"):
        sector.server_rows(synthetic=True)
