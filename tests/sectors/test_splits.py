"""Who trains, validates and tests: rows set aside by a publisher, folds, natural owners, the server's share, caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sectors import base, partition
from sectors.base import OWN, SPLITS, TEST, TRAIN, VALIDATION, NodeData, Place, Pooled, Rows, Sector, num_rows
from sectors.binary import Binary, mlp
from sectors.tabular import Tabular
from trellis.errors import ConfigError, DataError
from trellis.types import MetricSpec, Role

Ints = npt.NDArray[np.int64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Numbered(Binary):
    """Row i has x = i, so that a row can be found again; splits, classes, groups and owners are told in the options."""

    name: ClassVar[str] = "numbered"
    primary: ClassVar[MetricSpec] = MetricSpec("auc", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (primary,)

    split: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    owner: tuple[int, ...] = ()

    def read(self, paths: tuple[Path, ...]) -> Any:
        return self.generate()

    def generate(self) -> dict[str, Any]:
        n = len(self.split)
        y = np.array(self.classes) if self.classes else np.arange(n) % 2
        return {"number": np.arange(n), "y": y.astype(np.float32), "split": np.array(self.split, np.int8)}

    def pool(self, table: Any) -> Pooled:
        return Pooled(self.features(table), {}, table["split"])

    def features(self, table: Any) -> Rows:
        return {"x": table["number"].astype(np.float32)[:, None], "y": table["y"]}

    def groups(self, pooled: Pooled) -> npt.NDArray[Any] | None:
        return np.array(self.group)[numbers(pooled.rows)] if self.group else None

    def owners(self, pooled: Pooled, num_parts: int) -> Ints:
        if self.owner:
            return np.array(self.owner)[numbers(pooled.rows)]
        return partition.uniform(num_rows(pooled.rows), num_parts, self.rng("partition"))

    def build_model(self) -> nn.Module:
        return mlp(1, ())


def numbers(rows: Rows) -> Ints:
    return rows["x"][:, 0].astype(np.int64)


def of(data: NodeData) -> dict[str, list[int]]:
    return {name: sorted(numbers(data.split(name)).tolist()) for name in SPLITS}


def alone(sector: Sector, **more: Any) -> dict[str, list[int]]:
    """What one node with all rows makes of them."""
    return of(sector.load(Place(0, 1, synthetic=True, **more)))


def everywhere(sector: Sector, num_parts: int, **more: Any) -> list[dict[str, list[int]]]:
    return [of(sector.load(Place(part, num_parts, synthetic=True, **more))) for part in range(num_parts)]


fixed_splits = st.lists(st.sampled_from([OWN, TRAIN, VALIDATION, TEST]), min_size=1, max_size=40).map(tuple)


# ---------------------------------------------------------------- rows that are set aside


def test_fixed_rows_stay_and_the_others_are_divided_by_hand() -> None:
    split = (TEST, TRAIN, VALIDATION, *[OWN] * 20)
    found = alone(Numbered(split=split))
    assert 0 in found["test"]
    assert 1 in found["train"]
    assert 2 in found["validation"]
    # 10 of each class are the node's own: 2 validate, 2 test
    assert [len(found[s]) for s in SPLITS] == [1 + 12, 1 + 4, 1 + 4]


@given(split=fixed_splits, seed=st.integers(0, 50), num_folds=st.sampled_from([0, 2, 5]))
def test_a_fixed_row_never_moves_and_every_row_is_somewhere_once(
    split: tuple[int, ...], seed: int, num_folds: int
) -> None:
    sector = Numbered(split=split, split_seed=seed, num_folds=num_folds)
    if num_folds and TEST in split and OWN not in split:
        with pytest.raises(ConfigError, match="num_folds=0"):
            alone(sector)
        return
    found = alone(sector)
    assert sorted(i for rows in found.values() for i in rows) == list(range(len(split)))
    for i, where in enumerate(split):
        assert where == OWN or i in found[SPLITS[where]]
    own = [i for i, where in enumerate(split) if where == OWN]
    if own and not num_folds:
        assert set(own) & set(found["train"]), "rows that are the node's own also train"


@given(split=fixed_splits, seed=st.integers(0, 50))
def test_what_is_fixed_does_not_change_how_the_others_are_divided(split: tuple[int, ...], seed: int) -> None:
    own = [i for i, where in enumerate(split) if where == OWN]
    classes = tuple(i % 2 for i in range(len(split)))
    found = alone(Numbered(split=split, classes=classes, split_seed=seed))
    if not own:
        return
    without = alone(Numbered(split=(OWN,) * len(own), classes=tuple(classes[i] for i in own), split_seed=seed))
    for name in SPLITS:
        assert [i for i in found[name] if split[i] == OWN] == [own[i] for i in without[name]]


@given(split=fixed_splits, num_parts=st.integers(1, 4), seed=st.integers(0, 20))
def test_a_node_keeps_the_fixed_rows_of_its_part_wherever_they_are(
    split: tuple[int, ...], num_parts: int, seed: int
) -> None:
    if len(split) < num_parts:
        return
    nodes = everywhere(Numbered(split=split, split_seed=seed), num_parts)
    assert sorted(i for node in nodes for s in SPLITS for i in node[s]) == list(range(len(split)))
    assert all(split[i] in (OWN, k) for node in nodes for k, s in enumerate(SPLITS) for i in node[s])


def test_a_file_of_ones_own_is_divided_by_its_own_split_too(tmp_path: Path) -> None:
    (tmp_path / "own.csv").touch()
    sector = Numbered(split=(TEST, TEST, VALIDATION, TRAIN, *[OWN] * 12))
    found = of(sector.load(Place(7, 9, path=tmp_path / "own.csv")))
    assert {0, 1} <= set(found["test"])
    assert 2 in found["validation"]
    assert 3 in found["train"]


MIXED = (TRAIN, TEST, VALIDATION, OWN, TEST, OWN)


@pytest.mark.parametrize(
    ("split", "role", "used"),
    [
        (MIXED, Role.train, [0, 2, 3, 5]),
        (MIXED, Role.validation, [0, 2, 3, 5]),
        (MIXED, Role.test, [1, 4]),
        ((TRAIN, OWN, VALIDATION), Role.test, [0, 1, 2]),
        ((TEST, TEST), Role.train, []),
        ((TEST, TEST), Role.validation, []),
        ((OWN, OWN), Role.validation, [0, 1]),
    ],
)
def test_where_whole_nodes_are_held_out_official_test_rows_are_tested_on_or_not_used(
    split: tuple[int, ...], role: Role, used: list[int]
) -> None:
    found = alone(Numbered(split=split), role=role, holds_out=True)
    assert found[role.value] == used
    assert not [i for s in SPLITS if s != role.value for i in found[s]]


@given(split=fixed_splits, role=st.sampled_from(list(Role)), holds_out=st.booleans())
def test_no_official_test_row_is_ever_trained_or_chosen_by(split: tuple[int, ...], role: Role, holds_out: bool) -> None:
    found = alone(Numbered(split=split), role=role, holds_out=holds_out)
    official = {i for i, where in enumerate(split) if where == TEST}
    assert not official & {*found["train"], *found["validation"]}


def test_rows_of_a_group_with_an_official_test_row_do_not_train() -> None:
    # ten patients of three rows; one row of each is in the official test set
    sector = Numbered(split=(TEST, OWN, OWN) * 10, group=tuple(np.repeat(np.arange(10), 3).tolist()))
    found = alone(sector)
    assert not found["train"], "every patient is a test patient"


# ---------------------------------------------------------------- folds


def folds(labels: Ints, num_folds: int, seed: int, groups: Ints | None = None, share: float = 0.2) -> list[Any]:
    return [partition.fold_split(labels, num_folds, k, share, rng(seed), groups) for k in range(num_folds)]


def test_five_folds_of_twenty_and_ten_rows_by_hand() -> None:
    labels = np.repeat([0, 1], [20, 10])
    for train, validation, test in folds(labels, 5, 0, share=0.25):
        assert [np.bincount(labels[s]).tolist() for s in (train, validation, test)] == [[12, 6], [4, 2], [4, 2]]


def test_small_classes_do_not_all_end_in_the_first_folds() -> None:
    labels = np.arange(10)  # ten classes of one row
    assert [len(test) for _, _, test in folds(labels, 5, 0)] == [2] * 5


@given(
    counts=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    num_folds=st.integers(2, 6),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 100),
)
def test_folds_are_disjoint_cover_the_rows_and_share_each_class_evenly(
    counts: list[int], num_folds: int, share: float, seed: int
) -> None:
    labels = rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    tests = [test for _, _, test in folds(labels, num_folds, seed, share=share)]
    assert sorted(np.concatenate(tests)) == list(range(len(labels)))
    sizes = [len(test) for test in tests]
    assert max(sizes) - min(sizes) <= 1
    for label in range(len(counts)):
        each = [int((labels[test] == label).sum()) for test in tests]
        assert max(each) - min(each) <= 1


@given(
    num_groups=st.integers(1, 25),
    grouped=st.booleans(),
    num_folds=st.integers(2, 5),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 100),
)
def test_the_rest_trains_and_validates_and_whole_groups_stay_together(
    num_groups: int, grouped: bool, num_folds: int, share: float, seed: int
) -> None:
    of_row = rng(seed).integers(0, num_groups, 50)
    groups = of_row * 7 - 3 if grouped else None  # ids are names, not indices
    homes: dict[int, int] = {}
    for k, splits in enumerate(folds(of_row % 2, num_folds, seed, groups, share)):
        assert sorted(np.concatenate(splits)) == list(range(50))
        train, validation, test = splits
        assert all((np.diff(s) > 0).all() for s in splits), "ascending"
        assert len(train) or len(test) == 50, "validation lies inside the rest and leaves rows to train on"
        if share == 0:
            assert not len(validation)
        if groups is not None:
            sets = [set(groups[s].tolist()) for s in splits]
            assert not sets[0] & sets[1]
            assert not (sets[0] | sets[1]) & sets[2]
            assert all(homes.setdefault(g, k) == k for g in sets[2]), "a group is tested on in one fold"


@given(seed=st.integers(0, 100), share=st.floats(0, 0.5))
def test_the_validation_share_does_not_move_the_folds(seed: int, share: float) -> None:
    labels = np.arange(40) % 3
    plain, other = folds(labels, 4, seed, share=0.0), folds(labels, 4, seed, share=share)
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(plain, other, strict=True))


def test_a_nodes_folds_follow_the_split_seed_and_its_part_only() -> None:
    sector = Numbered(split=(OWN,) * 60, num_folds=5, validation_fraction=0.2)
    tests = [[node["test"] for node in everywhere(replace(sector, fold=k), 3)] for k in range(5)]
    for part in range(3):
        own = [tests[k][part] for k in range(5)]
        whole = everywhere(replace(sector, num_folds=0), 3)[part]
        assert sorted(i for t in own for i in t) == sorted(i for s in SPLITS for i in whole[s])
    assert tests[2] == [node["test"] for node in everywhere(replace(sector, fold=2), 3)], "the same in a second call"
    assert tests[2] != [node["test"] for node in everywhere(replace(sector, fold=2, split_seed=1), 3)]
    parts_alike = Numbered(split=(OWN,) * 60, num_folds=5, owner=tuple(int(i >= 30) for i in range(60)))
    first, second = (node["test"] for node in everywhere(parts_alike, 2))
    assert [i + 30 for i in first] != second, "two nodes do not draw alike"


@pytest.mark.parametrize(("num_folds", "fold"), [(5, 5), (5, -1), (1, 0), (-2, 0)])
def test_a_fold_that_does_not_exist_is_refused(num_folds: int, fold: int) -> None:
    with pytest.raises(ConfigError, match=f"fold is {fold} of num_folds={num_folds}; folds are counted from 0"):
        Numbered(num_folds=num_folds, fold=fold)


# ---------------------------------------------------------------- natural owners


def test_as_many_parts_as_owners_give_each_its_own_in_their_order() -> None:
    owner = np.array([2, 0, 1, 1, 2])
    assert partition.by_owner(owner, 3, "plants").tolist() == [2, 0, 1, 1, 2]


def test_with_fewer_parts_the_smallest_owners_share_the_last_one() -> None:
    owner = np.repeat([0, 1, 2, 3], [5, 1, 7, 2])
    assert [partition.by_owner(owner, 3, "plants")[owner == o][0] for o in range(4)] == [0, 2, 1, 2]
    assert set(partition.by_owner(owner, 1, "plants")) == {0}


def test_more_parts_than_owners_are_refused_with_the_numbers_and_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        partition.by_owner(np.array([0, 1, 1, 0]), 3, "plants (a, b): use two nodes")
    assert str(caught.value) == "4 rows cannot be divided into 3 parts: they have 2 plants (a, b): use two nodes"


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8), num_parts=st.integers(1, 8), seed=st.integers(0, 9))
def test_no_owner_is_divided_no_part_is_empty_and_only_the_smallest_share(
    sizes: list[int], num_parts: int, seed: int
) -> None:
    owner = rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    if num_parts > len(sizes):
        with pytest.raises(DataError, match=f"they have {len(sizes)} plants"):
            partition.by_owner(owner, num_parts, "plants")
        return
    part = partition.by_owner(owner, num_parts, "plants")
    assert set(part) == set(range(num_parts))
    home = [set(part[owner == o].tolist()) for o in range(len(sizes))]
    assert all(len(h) == 1 for h in home)
    of_owner = [h.pop() for h in home]
    own = [o for o in range(len(sizes)) if of_owner[o] < num_parts - 1]
    assert [of_owner[o] for o in own] == sorted(of_owner[o] for o in own), "in their order"
    shared = [o for o in range(len(sizes)) if of_owner[o] == num_parts - 1]
    if num_parts < len(sizes):
        assert max(sizes[o] for o in shared) <= min((sizes[o] for o in own), default=99)


def test_an_owner_without_rows_keeps_its_place() -> None:
    assert partition.by_owner(np.array([0, 2, 2]), 3, "plants").tolist() == [0, 2, 2]


# ---------------------------------------------------------------- the server's share


@given(split=fixed_splits, fraction=st.floats(0.05, 0.5), seed=st.integers(0, 20))
def test_the_server_takes_no_row_that_validates_or_tests_officially(
    split: tuple[int, ...], fraction: float, seed: int
) -> None:
    sector = Numbered(split=split, server_fraction=fraction, split_seed=seed)
    try:
        server = numbers(sector.server_rows(synthetic=True)).tolist()
    except DataError:
        server = []
    assert all(split[i] in (OWN, TRAIN) for i in server)
    if len(split) == len(server):
        return
    nodes = alone(sector)
    assert sorted([*server, *(i for s in SPLITS for i in nodes[s])]) == list(range(len(split)))
    assert all(split[i] in (OWN, k) for k, s in enumerate(SPLITS) for i in nodes[s])


def test_the_servers_share_is_of_the_rows_that_are_free_class_by_class() -> None:
    split = (TEST,) * 20 + (OWN,) * 20 + (TRAIN,) * 20
    sector = Numbered(split=split, server_fraction=0.2)
    server = numbers(sector.server_rows(synthetic=True))
    assert len(server) == 8
    assert np.bincount(server % 2).tolist() == [4, 4]
    assert (server >= 20).all()


# ---------------------------------------------------------------- caches

PATIENTS = "age,smoker,ill\n" + "".join(f"{20 + i},{i % 3 % 2},{i % 2}\n" for i in range(60))


@dataclass(frozen=True)
class Watched(Tabular):
    """Patients of a file; counts how often it is read, pooled and divided."""

    name: ClassVar[str] = "watched"
    title: ClassVar[str] = "patients"
    data_files: ClassVar[tuple[str, ...]] = ("patients.csv",)
    inputs: ClassVar[tuple[Any, ...]] = (
        base.Column("age", "years", low=0, high=120),
        base.Column("smoker", categories=(0, 1)),
    )
    target: ClassVar[str] = "ill"
    calls: ClassVar[list[str]] = []

    partition: str = "uniform"

    def read(self, paths: tuple[Path, ...]) -> Any:
        self.calls.append("read")
        return super().read(paths)

    def owners(self, pooled: Pooled, num_parts: int) -> Ints:
        self.calls.append("owners")
        return super().owners(pooled, num_parts)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    (tmp_path / "patients.csv").write_text(PATIENTS)
    Watched.calls.clear()
    yield Watched.calls
    Watched.calls.clear()


def test_variants_that_no_row_depends_on_read_and_divide_the_file_once(calls: list[str]) -> None:
    plain = Watched()
    variants: list[Sector] = [
        plain,
        plain.fitted({"centre": [50.0], "scale": [10.0]}),
        plain.fitted({"centre": [51.0], "scale": [10.0]}),
        replace(plain, local_layers=("head.*",)),
        *(replace(plain, num_folds=5, fold=k) for k in range(5)),
        plain.fitted_on(plain.load(Place(0, 3)).train),
    ]
    for sector in variants:
        for part in range(3):
            sector.load(Place(part, 3))
    assert calls == ["read", "owners"]


def test_a_variant_of_the_rows_or_another_number_of_parts_is_divided_anew(calls: list[str]) -> None:
    Watched().load(Place(0, 3))
    Watched().load(Place(0, 4))
    assert calls == ["read", "owners", "owners"]
    replace(Watched(), split_seed=1).load(Place(0, 3))
    assert calls.count("owners") == 3


def test_a_file_that_changed_is_read_again(calls: list[str], tmp_path: Path) -> None:
    before = num_rows(Watched().load(Place(0, 1)).train)
    (tmp_path / "patients.csv").write_text(PATIENTS + "90,1,1\n" * 40)
    assert num_rows(Watched().load(Place(0, 1)).train) > before
    assert calls.count("read") == 2


def test_fitted_values_never_change_a_nodes_rows(calls: list[str]) -> None:
    plain, fitted = Watched(), Watched(centre=(3.0,), scale=(0.5,))
    for part in range(3):
        one, two = (s.load(Place(part, 3)) for s in (plain, fitted))
        assert all(np.array_equal(one.split(s)[k], two.split(s)[k]) for s in SPLITS for k in ("x", "y"))
