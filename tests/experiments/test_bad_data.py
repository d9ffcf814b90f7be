"""Data that cannot be used end a simulation before anything is written; the message says whose, which file, what."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

import sectors
from experiments.simulate import simulate
from sectors.schema import Column
from sectors.tabular import Tabular
from trellis.errors import DataError, MissingData, TrellisError

NAMES = ("ash", "bay", "cob")


@dataclass(frozen=True)
class Wards(Tabular):
    """Patients with a number, in a file of each ward's own."""

    name: ClassVar[str] = "wards"
    title: ClassVar[str] = "wards"
    data_files: ClassVar[tuple[str, ...]] = ("wards.csv",)
    source: ClassVar[str] = "the wards"
    inputs: ClassVar[tuple[Column, ...]] = (
        Column("age", "years", low=0, high=120),
        Column("bp", "mm Hg", low=50, high=300, missing=(0,), optional=True),
        Column("sex", categories=(0, 1)),
    )
    target: ClassVar[str] = "ill"
    identifier: ClassVar[str | None] = "patient"

    partition: str = "uniform"


@pytest.fixture(autouse=True)
def wards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sectors.SECTORS, "wards", f"{__name__}:Wards")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Wards.__module__])
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path / "data"))


def patients(first: int, n: int = 30, **columns: Any) -> pd.DataFrame:
    """Patients first, first + 1, ...; half of them ill."""
    rng = np.random.default_rng(first)
    table = {
        "patient": [f"{first + i:05d}" for i in range(n)],
        "age": rng.integers(20, 90, n),
        "bp": rng.integers(90, 180, n),
        "sex": rng.integers(0, 2, n),
        "ill": np.arange(n) % 2,
    }
    return pd.DataFrame({**table, **columns})


@dataclass
class Federation:
    """Three wards with a file each, and a folder for runs."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.csv"

    def write(self, **tables: pd.DataFrame | str | bytes) -> None:
        for i, name in enumerate(NAMES):
            table = tables.get(name, patients(1000 * i))
            if isinstance(table, pd.DataFrame):
                table.to_csv(self.path(name), index=False)
            else:
                self.path(name).write_bytes(table.encode() if isinstance(table, str) else table)

    def run(
        self, *overrides: str, paths: Mapping[str, Path] | None = None, roles: Mapping[str, str] | None = None
    ) -> Any:
        """Nodes without a path take their part of the shared file; those without a role train."""
        paths = {n: self.path(n) for n in NAMES} if paths is None else paths
        own = {n: f", data_path: {paths[n]}" for n in paths}
        items = [f"{{name: {n}, role: {(roles or {}).get(n, 'train')}{own.get(n, '')}}}" for n in NAMES]
        base = ["sector.name=wards", "rounds=1", "tracking=none", f"runs_dir={self.folder / 'runs'}"]
        return simulate([*base, f"nodes.items=[{', '.join(items)}]", *overrides])

    def refused(self, *overrides: str, kind: type[TrellisError] = DataError, **more: Any) -> str:
        """What is said; nothing is written, nor is the folder of runs made."""
        with pytest.raises(kind) as caught:
            self.run(*overrides, **more)
        assert not (self.folder / "runs").exists()
        return str(caught.value)


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def test_good_files_run(fed: Federation) -> None:
    fed.write()
    result = fed.run()
    assert result.refusals == []
    assert set(result.nodes) == set(NAMES)


# ---------------------------------------------------------------- columns


def test_columns_that_are_not_there(fed: Federation) -> None:
    fed.write(bay=patients(0).drop(columns=["bp", "ill"]))
    message = fed.refused()
    assert message == f"node bay: {fed.path('bay')} has no column bp, ill; needed are patient, age, bp, sex, ill"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "unknown", "non-numeric values in column age (first row 8: 'unknown')"),
        ("age", "63,5", "non-numeric values in column age (first row 8: '63,5')"),
        ("age", 1985, "values outside 0 to 120 years in column age (1 of 30 rows, first row 8: 1985): check the unit"),
        ("bp", 12.5, "values outside 50 to 300 mm Hg in column bp (1 of 30 rows, first row 8: 12.5): check the unit"),
        ("sex", "F", "non-numeric values in column sex (first row 8: 'F')"),
        ("sex", None, "empty values in column sex (1 of 30 rows, first row 8: nan)"),
        ("patient", None, "empty values in column patient (1 of 30 rows, first row 8)"),
        ("age", np.inf, "infinite values in column age (1 of 30 rows, first row 8: inf)"),
    ],
)
def test_values_that_do_not_fit(column: str, value: Any, message: str, fed: Federation) -> None:
    table = patients(0).astype({column: object})
    table.loc[7, column] = value
    fed.write(cob=table)
    assert fed.refused() == f"node cob: {fed.path('cob')} holds {message}"


def test_all_columns_of_a_file_are_told_at_once(fed: Federation) -> None:
    fed.write(ash=patients(0, age=-1, sex=3))
    message = fed.refused()
    assert message.startswith(f"node ash: {fed.path('ash')} holds ")
    assert "in column age (30 of 30 rows, first row 1: -1)" in message
    assert "in column sex (30 of 30 rows, first row 1: 3)" in message


# ---------------------------------------------------------------- files


def test_a_file_that_is_not_there(fed: Federation) -> None:
    fed.write()
    fed.path("bay").unlink()
    message = fed.refused(kind=MissingData)
    assert message.startswith(f"node bay: cannot open the data file {fed.path('bay')}: ")


def test_a_file_of_ones_own_is_never_replaced_by_generated_rows(fed: Federation) -> None:
    fed.write()
    fed.path("cob").unlink()
    assert str(fed.path("cob")) in fed.refused("data=synthetic", kind=MissingData)


def test_a_gzip_that_cannot_be_unpacked(fed: Federation) -> None:
    whole = gzip.compress(patients(0, 400).to_csv(index=False).encode())
    paths = {n: fed.path(n) for n in NAMES} | {"bay": fed.folder / "bay.csv.gz"}
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        fed.write()
        paths["bay"].write_bytes(content)
        assert fed.refused(paths=paths).startswith(f"node bay: {paths['bay']} cannot be read as gzipped CSV")


@pytest.mark.parametrize("content", ["", "patient,age,bp,sex,ill\n", 'patient,age\n"1,2\n'])
def test_a_file_without_a_table(content: str | bytes, fed: Federation) -> None:
    fed.write(cob=content)
    assert fed.refused().startswith(f"node cob: {fed.path('cob')} ")


def test_the_shared_file_that_is_not_there_is_nobodys_in_particular(fed: Federation) -> None:
    fed.write()
    message = fed.refused(paths={"ash": fed.path("ash")}, kind=MissingData)
    assert message.startswith("no wards.csv under ")
    for part in ("Get it from the wards", "TRELLIS_DATA", "data=synthetic"):
        assert part in message


# ---------------------------------------------------------------- classes


def test_one_class_in_all_there_is(fed: Federation) -> None:
    fed.write(**{n: patients(1000 * i, ill=0) for i, n in enumerate(NAMES)})
    assert fed.refused() == "all rows of sector wards are of one class (column ill: y = 0): nothing is to learn"


def test_one_class_at_a_node_that_validates(fed: Federation) -> None:
    fed.write(bay=patients(1000, ill=1))
    message = fed.refused()
    assert message.startswith(f"node bay: all 30 rows in {fed.path('bay')} are of one class (column ill: y = 1)")
    for part in ("cannot validate a model", "another partition", "hold out whole nodes"):
        assert part in message


def test_a_node_of_one_class_may_train_where_it_does_not_validate(fed: Federation) -> None:
    fed.write(bay=patients(1000, ill=1))
    assert fed.run(roles={"ash": "validation"}).refusals == []


def test_one_class_is_nothing_to_learn_where_nodes_are_held_out_too(fed: Federation) -> None:
    fed.write(**{n: patients(1000 * i, ill=1) for i, n in enumerate(NAMES)})
    assert "all rows of sector wards are of one class (column ill: y = 1)" in fed.refused(roles={"ash": "validation"})


def test_a_part_of_one_class_is_told_by_its_node_and_the_way_out(tmp_path: Path) -> None:
    overrides = ["data=synthetic", "sector.options.alpha=0.01", "sector.options.split_seed=1", "nodes=consortium"]
    runs = tmp_path / "runs"
    with pytest.raises(
        DataError,
        match=r"node \w+: all \d+ rows are of one class \(column target: y = [01]\).*larger sector\.options\.alpha",
    ):
        simulate([*overrides, "tracking=none", f"runs_dir={runs}"])
    assert not runs.exists()
    allowed = simulate([*overrides, "checks.allow_one_class=true", "rounds=1", "tracking=none", f"runs_dir={runs}"])
    assert None in {scores["federated"] for scores in allowed.nodes.values()}, "a node of one class has no AUC"
    held_out = ["nodes=cross_device", "nodes.count=10", "nodes.held_out.validation=0.3", "nodes.held_out.test=0.2"]
    result = simulate([*overrides, *held_out, "rounds=1", "tracking=none", f"runs_dir={runs}"])
    assert result.rounds == 1


# ---------------------------------------------------------------- rows


def test_nobody_to_validate_with(fed: Federation) -> None:
    fed.write()
    message = fed.refused("sector.options.validation_fraction=0")
    assert message.startswith("no node has validation rows: raise validation_fraction")


def test_a_node_without_training_rows(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    path = tmp_path / "heart.csv"
    table = sectors.get("healthcare_heart", {"synthetic_rows": 90}).generate()
    table[table["site"] != "switzerland"].to_csv(path, index=False)
    (tmp_path / "data" / "healthcare").mkdir(parents=True)
    path.rename(tmp_path / "data" / "healthcare" / "heart_disease_4sites.csv")
    with pytest.raises(DataError) as caught:
        simulate(["sector=healthcare_heart", "nodes=hospitals", "tracking=none", f"runs_dir={runs}"])
    assert str(caught.value).startswith("1 of 4 nodes have no training rows (switzerland): ")
    assert "use fewer nodes than nodes=hospitals, another partition" in str(caught.value)
    assert not runs.exists()


def test_more_nodes_than_rows(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    options = ["data=synthetic", "sector.options.synthetic_rows=20", "nodes=cross_device", "nodes.count=30"]
    with pytest.raises(DataError, match=r"node device-0000: 20 rows cannot be divided into 30 parts"):
        simulate([*options, "tracking=none", f"runs_dir={runs}"])
    assert not runs.exists()


def test_baselines_without_a_test_row_have_no_score_and_end_no_run(fed: Federation) -> None:
    fed.write()
    result = fed.run("baselines=true", "sector.options.test_fraction=0")
    assert result.baselines is not None


# ---------------------------------------------------------------- persons


def test_one_person_in_the_files_of_two_nodes(fed: Federation) -> None:
    fed.write(cob=patients(1017))  # bay has patients 1000 to 1029
    message = fed.refused()
    assert message == (
        f"node cob: {fed.path('cob')} holds '01017' in column patient, which {fed.path('bay')} of node bay holds too: "
        "each may be at one node only"
    )


def test_one_file_for_two_nodes(fed: Federation) -> None:
    fed.write()
    paths = {n: fed.path("ash") for n in NAMES}
    assert f"node bay: {fed.path('ash')} is the file of node ash already" in fed.refused(paths=paths)


def test_a_person_at_a_held_out_node_may_be_nowhere_else(fed: Federation) -> None:
    fed.write(bay=patients(29))
    assert "holds '00029' in column patient" in fed.refused(roles={"bay": "validation"})


def test_one_person_many_times_at_one_node_and_numbers_that_differ_by_their_zeros_are_no_trouble(
    fed: Federation,
) -> None:
    own = pd.concat([patients(1000), patients(1000, age=50)])
    fed.write(bay=own, cob=patients(2000).assign(patient=[str(i) for i in range(30)]))
    assert fed.run().refusals == []


def test_one_person_in_a_file_of_ones_own_and_in_the_shared_one(fed: Federation) -> None:
    fed.write()
    (fed.folder / "data").mkdir()
    patients(0, 60).to_csv(fed.folder / "data" / "wards.csv", index=False)
    assert "in column patient" in fed.refused(paths={"ash": fed.path("ash")})


def test_one_file_for_two_nodes_of_a_sector_without_persons(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    sectors.get("healthcare_wisconsin").generate().head(60).to_csv(path, index=False)
    items = ", ".join(f"{{name: {n}, data_path: {path}}}" for n in NAMES)
    with pytest.raises(DataError, match=r"own\.csv"):
        simulate(["rounds=1", "tracking=none", f"nodes.items=[{items}]", f"runs_dir={tmp_path / 'runs'}"])


# ---------------------------------------------------------------- a run that goes on


def test_a_run_is_not_resumed_on_a_file_that_went_bad(fed: Federation) -> None:
    fed.write()
    fed.run("run_name=fed")
    before = sorted(p.name for p in (fed.folder / "runs" / "fed" / "records").iterdir())
    fed.write(bay=patients(1000, sex=9))
    with pytest.raises(DataError, match=rf"node bay: {fed.path('bay')} holds values outside one of 0, 1 in column sex"):
        simulate(["resume=fed", "rounds=2", f"runs_dir={fed.folder / 'runs'}"])
    assert sorted(p.name for p in (fed.folder / "runs" / "fed" / "records").iterdir()) == before
