"""The exam of loaders is sat by loaders: honest ones pass, and each kind of cheat is caught by its own check.

The cheats are small lies told on an honest sector, on generated rows.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import sectors
from conf.load import load
from conf.schema import NodeSpec, RunConfig
from experiments.readiness import CHECKS, ColumnSeen, Readiness, examine, findings
from experiments.readiness.leakage import digests
from sectors import partition
from sectors.base import Batch, NodeData, Place, Pooled, Rows, Sector, concatenate
from sectors.binary import Squeeze, mlp
from sectors.healthcare_heart import HealthcareHeart
from sectors.healthcare_wisconsin import HealthcareWisconsin
from sectors.schema import Column
from sectors.tabular import Tabular
from trellis.types import Counts

ROWS = 240
PILOT = ("north", "south", "west")


@lru_cache(maxsize=32)  # composing takes longer than most exams
def config(sector: str = "healthcare_wisconsin", *overrides: str) -> RunConfig:
    return load([f"sector={sector}", "data=synthetic", *overrides])


def failed(found: Readiness) -> set[str]:
    return {f.check for f in found.findings if f.passed is False}


def said(found: Readiness, check: str, passed: bool | None = False) -> str:
    return "\n".join(f"{f.node}: {f.said}" for f in found.findings if f.check == check and f.passed is passed)


# ---------------------------------------------------------------- honest loaders


@pytest.mark.parametrize("name", sectors.names())
def test_an_honest_loader_passes_every_check(name: str) -> None:
    found = examine(config(name), sectors.get(name))
    assert {f.check for f in found.findings} == set(CHECKS), "every check says something"
    assert [f for f in found.findings if f.passed is False] == []
    assert found.passed
    assert [node.node for node in found.nodes] == list(PILOT)
    assert all(node.total for node in found.nodes)


def test_real_rows_pass_and_are_counted() -> None:
    found = examine(load(["sector=healthcare_wisconsin"]), HealthcareWisconsin())
    assert found.passed
    assert sum(node.total for node in found.nodes) == 569
    assert np.sum([node.by_class for node in found.nodes], axis=0).tolist() == [357, 212]


def test_a_federation_with_held_out_nodes_passes() -> None:
    sector = HealthcareWisconsin(synthetic_rows=600, partition="uniform")
    found = examine(config("healthcare_wisconsin", "nodes=cross_device", "nodes.count=50"), sector)
    assert found.passed
    assert {node.role for node in found.nodes} == {"train", "validation", "test"}


def test_the_rows_of_the_server_are_looked_for_at_the_nodes() -> None:
    sector = HealthcareWisconsin(synthetic_rows=ROWS, server_fraction=0.1)
    found = examine(config(), sector)
    assert found.passed
    assert f"{ROWS} rows: each" in said(found, findings.LEAKAGE, True), "the server's included"
    assert "the server's" in said(found, findings.SPLIT, None)


# ---------------------------------------------------------------- cheats


class Scaled(HealthcareWisconsin):
    """Scales by the mean of everybody's rows."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        pooled = super().pool(table)
        return dataclasses.replace(pooled, rows={**pooled.rows, "x": pooled.rows["x"] - pooled.rows["x"].mean(axis=0)})


class Ranked(HealthcareWisconsin):
    """Features are ranks among the rows of the same table."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        return Pooled(HealthcareWisconsin.features(self, table), {"radius": table["mean radius"].to_numpy()})

    def features(self, table: pd.DataFrame) -> Rows:
        rows = super().features(table)
        return {**rows, "x": rows["x"].argsort(axis=0).argsort(axis=0).astype(np.float32)}


class Trimmed(HealthcareWisconsin):
    """Drops the rows that are outliers among all."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        return super().pool(table[table["mean radius"] < table["mean radius"].mean()])


class Peeking(HealthcareWisconsin):
    """A node centres its rows by those of the whole federation."""

    def load(self, place: Place) -> NodeData:
        everybody = [super(Peeking, self).load(dataclasses.replace(place, part=i)) for i in range(place.num_parts)]
        mean = concatenate([data.train for data in everybody])["x"].mean(axis=0)
        data = everybody[place.part]
        return NodeData(*({**data.split(s), "x": data.split(s)["x"] - mean} for s in ("train", "validation", "test")))


@dataclass(frozen=True)
class Wide(HealthcareHeart):
    """The statistics round decides how large the model is, as a vocabulary does."""

    fitted_options: ClassVar[tuple[str, ...]] = ("centre", "scale", "width")

    width: int = 4

    def fit(self, totals: Counts) -> dict[str, Any]:
        return {**super().fit(totals), "width": 8}

    def build_model(self) -> nn.Module:
        return mlp(self.num_inputs, (self.width,))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = super().forward(model, batch)
        assert next(model.parameters()).shape[0] == self.width
        return outputs


class Repeated(HealthcareWisconsin):
    """Every row is there twice, and nothing keeps the two together."""

    def generate(self) -> pd.DataFrame:
        table = super().generate()
        return pd.concat([table, table], ignore_index=True)


class Relabelled(Repeated):
    """The second of the two has the other label."""

    def generate(self) -> pd.DataFrame:
        table = super().generate()
        second = np.arange(len(table)) >= len(table) // 2
        return table.assign(target=np.where(second, 1 - table["target"], table["target"]))


class Overlapping(HealthcareWisconsin):
    """Trains on what it tests on."""

    def load(self, place: Place) -> NodeData:
        data = super().load(place)
        return dataclasses.replace(data, train=concatenate([data.train, data.test]))


class Grouped(Overlapping):
    """The same with groups, which are then divided too."""

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return np.arange(len(pooled.rows["x"])) // 2


@dataclass(frozen=True)
class Patients(Tabular):
    """Three rows a patient, dealt to the nodes row by row."""

    name: ClassVar[str] = "patients"
    title: ClassVar[str] = "Patients"
    inputs: ClassVar[tuple[Column, ...]] = (Column("age", "years", low=0, high=120), Column("size", "m", low=0, high=3))
    identifier: ClassVar[str | None] = "patient"

    partition: str = "uniform"

    def generate(self) -> pd.DataFrame:
        table = super().generate()
        return table.assign(patient=[f"{i // 3:08d}" for i in range(len(table))])


class Divided(Patients):
    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return np.arange(len(pooled.rows["x"]))


@dataclass(frozen=True)
class Twins(Patients):
    """Patients of one row each, every second one like the first but for the name."""

    def generate(self) -> pd.DataFrame:
        table = super().generate()
        half = table[: len(table) // 2]
        return pd.concat([half, half], ignore_index=True).assign(patient=self.names(len(half)))

    def names(self, n: int) -> list[str]:
        return [f"{i:08d}" for i in range(2 * n)]


class Doubles(Twins):
    """The two are one patient, whose rows are dealt apart."""

    def names(self, n: int) -> list[str]:
        return [f"{i % n:08d}" for i in range(2 * n)]

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return np.arange(len(pooled.rows["x"]))


class Renamed(Twins):
    """The key has another name, beside one that is as like it as a number can be."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        who = table["patient"].to_numpy()
        return dataclasses.replace(super().pool(table), keys={"turn": np.arange(len(who)), "who": who})

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return pooled.keys["who"]


class Unknown(Renamed):
    """No key says who it is."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        return dataclasses.replace(super().pool(table), keys={"who": np.arange(len(table))})


class NextVisit(Doubles):
    """A patient's second visit is set aside to be predicted from the first, at the same node."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        pooled = super().pool(table)
        later = table["patient"].duplicated().to_numpy()
        pooled.rows["x"][later, 0] += 1  # a year older
        first = table["patient"].str.endswith("0").to_numpy()  # of these the first visit validates
        return dataclasses.replace(pooled, split=np.where(later, 2, first).astype(np.int8))

    def units(self, table: pd.DataFrame) -> npt.NDArray[Any]:
        return table["patient"].to_numpy()

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        return pooled.keys["patient"].astype(np.int64) % num_parts


class Averaged(HealthcareHeart):
    """Statistics are means: those of a large node count as much as those of a small one."""

    def statistics(self, rows: Rows) -> Counts:
        found = super().statistics(rows)
        return {**found, "sums": found["sums"] / np.maximum(found["known"], 1)}


class Loud(HealthcareHeart):
    """A row adds more than was announced."""

    def statistics(self, rows: Rows) -> Counts:
        found = super().statistics(rows)
        return {**found, "squares": found["squares"] * 50}


class Arrays(HealthcareHeart):
    """What is fitted is not of JSON's types."""

    def fit(self, totals: Counts) -> dict[str, Any]:
        return {name: np.asarray(values) for name, values in super().fit(totals).items()}


class Normalised(HealthcareWisconsin):
    def build_model(self) -> nn.Module:
        named = {"norm": nn.BatchNorm1d(30), "head": nn.Linear(30, 1), "squeeze": Squeeze()}
        return nn.Sequential(OrderedDict(named))


class Counting(nn.Module):
    """Keeps how often it was called, in no tensor."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean(dim=1) + self.calls


class Hidden(HealthcareWisconsin):
    def build_model(self) -> nn.Module:
        return Counting()


class Together(HealthcareWisconsin):
    """A row's output depends on its batch."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().forward(model, {**batch, "x": batch["x"] - batch["x"].mean(dim=0)})


class Mean(HealthcareWisconsin):
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().losses(outputs, batch).mean()


class Infinite(HealthcareWisconsin):
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().losses(outputs, batch) / torch.zeros(())


class Unannounced(HealthcareWisconsin):
    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        found = super().counts(outputs, batch)
        return {**found, "positives": found["positives"].astype(np.int32)}


class Misnamed(HealthcareWisconsin):
    def metrics(self, counts: Counts) -> dict[str, float]:
        return {**super().metrics(counts), **({"f1": 0.5} if counts and counts["positives"].any() else {})}


class Ragged(HealthcareWisconsin):
    """A node's test rows are wider than its others."""

    def load(self, place: Place) -> NodeData:
        data = super().load(place)
        return dataclasses.replace(data, test={**data.test, "x": data.test["x"].astype(np.float64)})


class OneClass(HealthcareWisconsin):
    """The first node has benign aspirates only."""

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        malignant = pooled.rows["y"] > 0
        turn = np.arange(len(malignant))
        return np.where(malignant, 1 + turn % (num_parts - 1), turn % num_parts)


class OneLabel(HealthcareWisconsin):
    """There is one class in the world."""

    def generate(self) -> pd.DataFrame:
        return super().generate().assign(target=1)


class Starved(HealthcareWisconsin):
    """The last node gets nothing."""

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        return partition.uniform(len(pooled.rows["x"]), num_parts - 1, self.rng("partition"))


class Official(HealthcareWisconsin):
    """A fifth of the rows is an official test set."""

    def pool(self, table: pd.DataFrame) -> Pooled:
        test = np.where(table["mean radius"].to_numpy() * 1000 % 5 < 1, 2, -1).astype(np.int8)
        return dataclasses.replace(super().pool(table), split=test)


class Mixed(Official):
    """It is mixed with the others."""

    def _split(self, rows: Rows, fixed: npt.NDArray[np.int8], *rest: Any) -> npt.NDArray[np.int8]:
        return super()._split(rows, np.full_like(fixed, -1), *rest)


class Shuffled(HealthcareWisconsin):
    """Every call draws another split."""

    def _split(self, rows: Rows, *rest: Any) -> npt.NDArray[np.int8]:
        return np.random.default_rng().permutation(super()._split(rows, *rest))


class Broken(HealthcareWisconsin):
    """Raises what nobody declared, in the middle of things."""

    def count_specs(self) -> Any:
        raise KeyError("positives")


@dataclass(frozen=True)
class Cheat:
    """A sector, the one check that it fails, and words of what is told."""

    sector: Sector
    check: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return type(self.sector).__name__


CHEATS = [
    Cheat(Scaled(synthetic_rows=ROWS), findings.POOLED, ("240 of 240 rows change in `x`", "half of the units")),
    Cheat(Ranked(synthetic_rows=ROWS), findings.POOLED, ("`features` of unit 0 alone", "`localise`")),
    Cheat(Trimmed(synthetic_rows=ROWS), findings.POOLED, ("of 1", "rows")),
    Cheat(Peeking(synthetic_rows=ROWS), findings.POOLED, ("north: its rows change when those of other nodes do",)),
    Cheat(Repeated(synthetic_rows=ROWS), findings.LEAKAGE, ("identical rows stand at two nodes", "in two splits")),
    Cheat(
        Relabelled(synthetic_rows=ROWS),
        findings.LEAKAGE,
        ("inputs `x` of rows that differ elsewhere stand at two nodes",),
    ),
    Cheat(Overlapping(synthetic_rows=ROWS), findings.LEAKAGE, ("north: ", "train and test", "give them one group")),
    Cheat(Grouped(synthetic_rows=ROWS), findings.LEAKAGE, ("groups stand in two splits", "train and test")),
    Cheat(Divided(synthetic_rows=ROWS), findings.IDENTIFIERS, ("values of patient", "two nodes")),
    Cheat(Averaged(), findings.STATISTICS, ("statistics sums of all rows is", "needed are sums, not means")),
    Cheat(Loud(), findings.STATISTICS, ("statistics squares adds up to", "rows allow")),
    Cheat(Arrays(), findings.STATISTICS, ("`fit` gives what JSON cannot hold",)),
    Cheat(Normalised(synthetic_rows=ROWS), findings.MODEL, ("norm keep what they saw", "use GroupNorm")),
    Cheat(Hidden(synthetic_rows=ROWS), findings.MODEL, ("kept between calls",)),
    Cheat(Together(synthetic_rows=ROWS), findings.MODEL, ("changes with the other rows of its batch",)),
    Cheat(Mean(synthetic_rows=ROWS), findings.MODEL, ("losses of 1 rows have shape ()", "one a row")),
    Cheat(Infinite(synthetic_rows=ROWS), findings.MODEL, ("losses are not finite",)),
    Cheat(Unannounced(synthetic_rows=ROWS), findings.MODEL, ("'int32') for positives, announced is",)),
    Cheat(Misnamed(synthetic_rows=ROWS), findings.MODEL, ("metrics names f1",)),
    Cheat(Ragged(synthetic_rows=ROWS), findings.SHAPES, ("test has x (n, 30) float64",)),
    Cheat(OneClass(synthetic_rows=ROWS), findings.BALANCE, ("north: all", "labels are of class 0")),
    Cheat(Starved(synthetic_rows=ROWS), findings.SPLIT, ("1 of 3 training nodes have no training rows (west)",)),
    Cheat(Mixed(synthetic_rows=ROWS), findings.OFFICIAL, ("rows of train are set aside for another split",)),
    Cheat(Shuffled(synthetic_rows=ROWS), findings.REPEATABLE, ("loads other rows in a second call",)),
    Cheat(Broken(synthetic_rows=ROWS), findings.MODEL, ("the check ended with KeyError: 'positives'",)),
]


@pytest.mark.parametrize("cheat", CHEATS, ids=str)
def test_a_cheat_is_caught_by_its_own_check_and_no_other(cheat: Cheat) -> None:
    found = examine(config(), cheat.sector)
    assert failed(found) == {cheat.check}
    assert not found.passed
    for words in cheat.words:
        assert words in said(found, cheat.check)


def test_the_sectors_that_cheats_are_made_of_are_honest() -> None:
    for sector in (Patients(synthetic_rows=ROWS), Official(synthetic_rows=ROWS), Wide()):
        assert failed(examine(config(), sector)) == set()


@pytest.mark.parametrize("kind", [Twins, Renamed], ids=lambda kind: kind.__name__)
def test_rows_that_are_alike_but_of_different_people_are_a_remark(kind: type[Twins]) -> None:
    found = examine(config(), kind(synthetic_rows=ROWS))
    assert found.passed
    assert "rows alike, of different patient, stand at two nodes" in said(found, findings.LEAKAGE, None)
    assert "each input, of one patient stands in one split" in said(found, findings.LEAKAGE, True)


def test_rows_that_are_alike_and_of_one_person_fail_or_of_nobody_known() -> None:
    found = examine(config(), Doubles(synthetic_rows=ROWS))
    assert failed(found) == {findings.LEAKAGE, findings.IDENTIFIERS}
    assert "identical rows stand at two nodes" in said(found, findings.LEAKAGE)
    found = examine(config(), Unknown(synthetic_rows=ROWS))
    assert failed(found) == {findings.LEAKAGE}
    assert "no key of `pool` is the identifier patient" in said(found, findings.IDENTIFIERS, None)


def test_the_next_visit_of_a_patient_may_be_set_aside() -> None:
    found = examine(config(), NextVisit(synthetic_rows=ROWS))
    assert found.passed
    assert "120 values of patient: each is at one node" in said(found, findings.IDENTIFIERS, True)
    assert "train and test: 36, validation and test: 4): set aside by `pool`" in said(found, findings.IDENTIFIERS, None)


def test_one_class_everywhere_fails_once_and_a_rare_one_is_shown_not_judged() -> None:
    found = examine(config(), OneLabel(synthetic_rows=ROWS))
    assert said(found, findings.BALANCE) == ": all 240 labels are of class 0"
    few = examine(config(), HealthcareWisconsin(synthetic_rows=60, partition="radius_band"))
    assert few.passed
    assert "labels of class 1" in (told := said(few, findings.BALANCE, None))
    assert "shown, not judged" in told


def test_official_test_rows_are_told_from_those_that_nodes_divide() -> None:
    assert "kept by every node" in said(examine(config(), Official(synthetic_rows=ROWS)), findings.OFFICIAL, True)
    assert "no row is set aside" in said(examine(config(), HealthcareWisconsin()), findings.OFFICIAL, None)


# ---------------------------------------------------------------- nodes of a federation


def nodes(*items: NodeSpec) -> RunConfig:
    plain = config()
    return dataclasses.replace(plain, nodes=dataclasses.replace(plain.nodes, items=list(items)))


def test_two_nodes_that_name_one_part_are_caught() -> None:
    found = examine(nodes(NodeSpec("a", part=0), NodeSpec("b", part=0)), HealthcareWisconsin(synthetic_rows=ROWS))
    assert failed(found) == {findings.LEAKAGE}
    assert "identical rows stand at two nodes" in said(found, findings.LEAKAGE)


def write(path: Path, table: pd.DataFrame) -> str:
    table.to_csv(path, index=False)
    return str(path)


def test_a_person_in_the_files_of_two_nodes_is_caught(tmp_path: Path) -> None:
    table = Patients(synthetic_rows=ROWS).generate()
    first, second = table[table["patient"] < "00000041"], table[table["patient"] >= "00000040"]
    second = second.assign(age=second["age"] * 0.5)  # seen again years before: no row is the same
    found = examine(
        nodes(
            NodeSpec("a", data_path=write(tmp_path / "a.csv", first)),
            NodeSpec("b", data_path=write(tmp_path / "b.csv", second)),
        ),
        Patients(),
    )
    assert failed(found) == {findings.IDENTIFIERS}
    assert "1 values of patient stand at two nodes" in said(found, findings.IDENTIFIERS)


def test_a_file_in_another_unit_is_a_finding_and_the_other_nodes_are_still_examined(tmp_path: Path) -> None:
    table = Patients(synthetic_rows=ROWS).generate()
    cut = len(table) // 2
    months = table[cut:].assign(age=table["age"][cut:] * 12)
    found = examine(
        nodes(
            NodeSpec("a", data_path=write(tmp_path / "a.csv", table[:cut])),
            NodeSpec("b", data_path=write(tmp_path / "b.csv", months)),
        ),
        Patients(),
    )
    assert failed(found) == {findings.SCHEMA}
    assert (told := said(found, findings.SCHEMA)).startswith("b: ")
    for words in ("b.csv", "column age", "0 to 120 years", "check the unit"):
        assert words in told
    assert [node.node for node in found.nodes] == ["a"]
    assert found.columns[1] == ColumnSeen("age", "years", "0 to 120 years", 0.0, (0.0,))


def test_missing_data_are_a_finding_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    found = examine(load(["sector=healthcare_heart"]), HealthcareHeart())
    assert failed(found) == {findings.SCHEMA}
    assert "data=synthetic" in said(found, findings.SCHEMA)
    assert found.nodes == ()


def test_too_many_nodes_are_one_finding_not_one_each() -> None:
    found = examine(config("healthcare_wisconsin", "nodes=cross_device"), HealthcareWisconsin())
    assert [f.check for f in found.findings if f.passed is False] == [findings.SPLIT]
    assert "cannot be divided into 1000 parts" in said(found, findings.SPLIT)


# ---------------------------------------------------------------- what is shown


def test_rows_are_the_same_when_all_their_bytes_are() -> None:
    rows = {"x": np.array([[1, 2], [1, 2], [1, 3]], np.float32), "y": np.array([0, 1, 0])}
    assert len(set(digests(rows))) == 3
    first, second, third = digests(rows, ("x",))
    assert first == second != third


def test_missing_values_are_counted_by_node_with_their_codes() -> None:
    sector = HealthcareHeart()
    table = sector.generate()
    table.loc[table["site"] == "va", "chol"] = 0  # which stands for "not measured"

    class Given(HealthcareHeart):
        def generate(self) -> pd.DataFrame:
            return table

    found = examine(config("healthcare_heart", "nodes=hospitals"), Given())
    assert [n.node for n in found.nodes] == ["cleveland", "hungarian", "switzerland", "va"]
    column = next(c for c in found.columns if c.name == "chol")
    assert (column.unit, column.needed) == ("mg/dl", "50 to 700 mg/dl")
    by_hand = [float((table["chol"][table["site"] == n.node].replace(0, np.nan)).isna().mean()) for n in found.nodes]
    assert column.by_node == pytest.approx(by_hand)
    assert column.by_node[-1] == 1.0
    assert "va: no value at all of chol" in said(found, findings.SCHEMA, None)


def test_a_shift_is_measured_in_standard_deviations_and_named_by_the_raw_column() -> None:
    found = examine(config(), HealthcareWisconsin(synthetic_rows=ROWS, partition="radius_band"))
    assert found.shift is not None
    assert found.shift.names[:2] == ("mean radius", "mean texture")
    low, _, high = (node[0] for node in found.shift.by_node)
    assert low < -1 < 1 < high
