"""The exam of a sector.  One row a sector; every law is asked of every row, on real rows and on generated ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sectors
from conf.load import load
from sectors import schema, training
from sectors.base import (
    OWN,
    SPLITS,
    TEST,
    NodeData,
    Place,
    Pooled,
    Rows,
    Sector,
    concatenate,
    num_rows,
    take,
    to_batch,
)
from sectors.binary import Binary
from sectors.params import initial_arrays
from trellis.errors import ConfigError, DataError, MissingData
from trellis.types import Role

CPU = torch.device("cpu")
EVERYTHING = slice(None)
SOME = 24
"""Rows of which a model's outputs are looked at: some models take seconds for all."""


@dataclass(frozen=True)
class Case:
    """A sector, how it can be divided, and what a plain central training must reach."""

    name: str
    level: float | None = None
    """Of the primary metric on all test rows, after the shipped recipe's epochs; None: too long for a test."""
    natural: int = 3
    """Nodes that its own partition has owners for."""
    many: dict[str, Any] = field(default_factory=dict)
    """Options with which it can be divided among more nodes than that, `most` at most."""
    most: int = 100
    never_input: tuple[str, ...] = ()
    """Raw columns that must not reach x."""
    exact: bool = False
    """Generated tables have the very columns and dtypes of the real one."""
    rowwise: bool = True
    """A row of the raw table is a row of the sector, and a file of one's own is a CSV."""


UNIFORM = {"partition": "uniform"}

CASES = [
    Case("banks", 0.90, exact=True, never_input=("Time", "src", "Class")),
    Case("healthcare_heart", 0.86, natural=4, many=UNIFORM, never_input=("site", "num", "target")),
    Case("healthcare_pneumonia", rowwise=False),
    Case("healthcare_retina", most=14, rowwise=False),
    Case("healthcare_wisconsin", 0.98, exact=True, never_input=("target",)),
    Case("production", natural=4, many=UNIFORM, most=10, rowwise=False),
    Case("retail", natural=3, many=UNIFORM, rowwise=False),
]


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def sector(case: Case) -> Sector:
    return sectors.get(case.name)


@pytest.fixture(params=["real", "synthetic"])
def place(request: pytest.FixtureRequest, case: Case, sector: Sector) -> Place:
    place = Place(0, case.natural, synthetic=request.param == "synthetic")
    try:
        sector.load(place)
    except MissingData as error:
        pytest.skip(str(error))
    return place


def federation(sector: Sector, place: Place, num_parts: int | None = None) -> list[NodeData]:
    many = num_parts or place.num_parts
    return [sector.load(replace(place, part=p, num_parts=many)) for p in range(many)]


def identities(rows: Rows) -> list[bytes]:
    """A digest of each row, every column of it."""
    columns = [rows[k] for k in sorted(rows)]
    return [hashlib.sha256(b"".join(c[i].tobytes() for c in columns)).digest() for i in range(num_rows(rows))]


def all_identities(data: NodeData) -> list[bytes]:
    return [i for split in SPLITS for i in identities(data.split(split))]


def same(a: NodeData, b: NodeData) -> bool:
    return all(identities(a.split(s)) == identities(b.split(s)) for s in SPLITS)


def some(rows: Rows, number: int = SOME) -> Rows:
    return take(rows, np.arange(min(number, num_rows(rows))))


def drawn(rows: Rows, number: int) -> Rows:
    """Some rows from all over: the first ones may be of one engine, or of one kind."""
    index = np.linspace(0, num_rows(rows) - 1, min(number, num_rows(rows))).astype(np.int64)
    return take(rows, index)


def raw(sector: Sector, place: Place) -> Any:
    """The raw table, read once; nobody changes it."""
    return _raw(sector.name, place.synthetic)


def pool(sector: Sector, place: Place) -> Pooled:
    """All of its rows, pooled once."""
    return _pool(sector.name, place.synthetic)


def pooled_identities(sector: Sector, place: Place) -> list[bytes]:
    return _identities(sector.name, place.synthetic)


@cache
def _raw(name: str, synthetic: bool) -> Any:
    sector = sectors.get(name)
    return sector.generate() if synthetic else sector.read(sector.files())


@cache
def _pool(name: str, synthetic: bool) -> Pooled:
    return sectors.get(name).pool(_raw(name, synthetic))


@cache
def _identities(name: str, synthetic: bool) -> list[bytes]:
    return identities(_pool(name, synthetic).rows)


# ---------------------------------------------------------------- what it says of itself


def test_the_catalogue_and_the_exam_list_the_same_sectors() -> None:
    assert sorted(c.name for c in CASES) == sectors.names()


def test_a_sector_names_itself_and_its_primary_metric(case: Case, sector: Sector) -> None:
    assert sector.name == case.name
    assert sector.title
    assert sector.primary in sector.metric_specs


def test_a_sector_declares_its_columns(sector: Sector, place: Place) -> None:
    assert sector.schema
    schema.check(raw(sector, place), sector.schema, "the table")


def test_its_options_stand_in_its_yaml_with_their_defaults(case: Case, sector: Sector) -> None:
    written = load([f"sector={case.name}"]).sector.options
    built = sectors.get(case.name, written)
    assert {f.name for f in fields(sector)} - set(written) <= {"local_layers", "num_folds", "fold"}
    assert all(getattr(built, key) == getattr(sector, key) for key in written if not key.endswith("_fraction"))


# ---------------------------------------------------------------- model, loss, counts


def test_outputs_and_losses_are_one_a_row(sector: Sector, place: Place) -> None:
    model = sector.build_model()
    for size in (1, 7):
        batch = to_batch(some(sector.load(place).train, size), EVERYTHING, CPU)
        outputs = sector.forward(model, batch)
        losses = sector.losses(outputs, batch)
        assert len(outputs) == size
        assert losses.shape == (size,)
        if isinstance(sector, Binary):  # (B, 1) would broadcast against (B,) labels
            assert outputs.shape == sector.predict(outputs).shape == (size,)
        assert losses.requires_grad
        assert torch.isfinite(losses).all()
        assert len(sector.predict(outputs)) == size


def test_a_model_has_no_hidden_float_state(sector: Sector) -> None:
    model = sector.build_model()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    assert not [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]


def test_a_row_is_scored_alike_whoever_is_in_its_batch(sector: Sector, place: Place) -> None:
    model, rows = sector.build_model().eval(), some(sector.load(place).train, 5)
    with torch.no_grad():
        together = sector.forward(model, to_batch(rows, EVERYTHING, CPU))
        alone = sector.forward(model, to_batch(take(rows, np.array([3])), EVERYTHING, CPU))
    assert torch.allclose(together[3], alone[0], rtol=1e-4, atol=1e-5)


def test_initial_params_follow_the_seed(sector: Sector) -> None:
    def params(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(sector.build_model().state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(params(3), params(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(params(3), params(4), strict=True))


def test_the_head_is_some_of_the_tensors_and_not_all(case: Case) -> None:
    sector = sectors.get(case.name, {"local_layers": ["head"]})
    names = list(sector.build_model().state_dict())
    local = [name for name in names if sector.is_local(name)]
    assert 0 < len(local) < len(names)


def counts_of(sector: Sector, rows: Rows) -> dict[str, Any]:
    """Counts under the initial params, without the library's own."""
    found = training.evaluate(sector, initial_arrays(sector, 0), rows)
    return {spec.name: found[spec.name] for spec in sector.count_specs()}


@pytest.mark.parametrize("split", SPLITS)
def test_metrics_of_summed_counts_are_the_pooled_metrics(case: Case, sector: Sector, place: Place, split: str) -> None:
    rows = [node.split(split) for node in federation(sector, place)]
    parts = rows if case.rowwise else [drawn(each, 120) for each in rows]
    each = [counts_of(sector, rows) for rows in parts]
    summed = {k: sum(c[k] for c in each) for k in each[0]}
    pooled = sector.metrics(counts_of(sector, concatenate(parts)))
    assert sector.metrics(summed) == pooled
    assert set(pooled) == {spec.name for spec in sector.metric_specs}
    assert all(0 <= pooled[s.name] <= (1 if s.direction == "max" else np.inf) for s in sector.metric_specs)
    assert all(np.isfinite(v) for v in pooled.values())


def test_counts_are_what_the_sector_announces_and_within_their_bounds(sector: Sector, place: Place) -> None:
    for size in (0, 9):
        batch = to_batch(some(sector.load(place).train, size), EVERYTHING, CPU)
        counts = sector.counts(sector.forward(sector.build_model(), batch), batch)
        assert {k: (v.shape, v.dtype.name) for k, v in counts.items()} == {
            s.name: (s.shape, s.dtype) for s in sector.count_specs()
        }
        for spec in sector.count_specs():
            assert (counts[spec.name] >= 0).all()  # type: ignore[operator]
            assert counts[spec.name].sum() <= spec.per_row * size * (1 + 1e-9)  # type: ignore[attr-defined]


def test_counts_of_no_rows_give_no_metrics(sector: Sector, place: Place) -> None:
    batch = to_batch(some(sector.load(place).train, 0), EVERYTHING, CPU)
    assert sector.metrics(sector.counts(sector.forward(sector.build_model(), batch), batch)) == {}
    assert sector.metrics(counts_of(sector, some(sector.load(place).train, 0))) == {}
    assert sector.metrics({}) == {}


# ---------------------------------------------------------------- who owns what


@pytest.mark.parametrize("naturally", [True, False])
def test_parts_and_splits_are_disjoint_and_cover_the_rows(case: Case, place: Place, naturally: bool) -> None:
    if not naturally and not place.synthetic and not case.rowwise:
        pytest.skip("many rows: generated ones are asked")
    sector = sectors.get(case.name, {} if naturally else case.many)
    parts = federation(sector, place, case.natural if naturally else min(10, case.most))
    whole = pooled_identities(sector, place)
    assert sorted(i for node in parts for i in all_identities(node)) == sorted(whole)
    groups = groups_of(sector, place)
    # rows alike of two persons are no leak; of one, or of nobody in particular, they are
    assert all(len(home) == 1 for i, home in homes_of(parts).items() if len(groups[i]) == 1)


def groups_of(sector: Sector, place: Place) -> dict[bytes, set[Any]]:
    """The groups of each row; rows alike of a sector without groups are one."""
    pooled, named = pool(sector, place), pooled_identities(sector, place)
    groups = sector.groups(pooled)
    found: dict[bytes, set[Any]] = {}
    for identity, group in zip(named, named if groups is None else groups.tolist(), strict=True):
        found.setdefault(identity, set()).add(group)
    return found


def homes_of(parts: list[NodeData]) -> dict[bytes, set[tuple[int, str]]]:
    """Node and split of each row."""
    homes: dict[bytes, set[tuple[int, str]]] = {}
    for number, node in enumerate(parts):
        for s in SPLITS:
            for identity in identities(node.split(s)):
                homes.setdefault(identity, set()).add((number, s))
    return homes


def test_a_group_is_at_one_node_and_in_one_split(case: Case, sector: Sector, place: Place) -> None:
    if not place.synthetic and not case.rowwise:
        pytest.skip("many rows: generated ones are asked, real ones by `trellis sectors check`")
    groups, homes = groups_of(sector, place), homes_of(federation(sector, place))
    of_group: dict[Any, set[tuple[int, str]]] = {}
    for identity, found in groups.items():
        if len(found) == 1:
            of_group.setdefault(*found, set()).update(homes[identity])
    assert all(len(home) == 1 for home in of_group.values())


def test_a_part_is_the_same_in_a_second_call_and_in_a_fresh_process(case: Case, sector: Sector, place: Place) -> None:
    if not place.synthetic:
        pytest.skip("a process a sector: generated rows are asked")
    data = sector.load(place)
    assert same(data, sectors.get(case.name).load(place))
    code = (
        "import sectors, hashlib; from sectors.base import Place, SPLITS; "
        f"d = sectors.get({case.name!r}).load(Place(0, {case.natural}, synthetic={place.synthetic})); "
        "print(hashlib.sha256(b''.join(d.split(s)['x'].tobytes() for s in SPLITS)).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == hashlib.sha256(b"".join(data.split(s)["x"].tobytes() for s in SPLITS)).hexdigest()


def test_another_split_seed_gives_another_split(case: Case, place: Place) -> None:
    one, two = (sectors.get(case.name, {"split_seed": seed}).load(place) for seed in (0, 1))
    assert identities(one.train) != identities(two.train)


@pytest.mark.parametrize("role", list(Role))
def test_held_out_nodes_keep_their_rows_in_the_split_of_their_role(sector: Sector, place: Place, role: Role) -> None:
    together = all_identities(sector.load(place))
    pooled = pool(sector, place)
    fixed = np.full(num_rows(pooled.rows), OWN) if pooled.split is None else pooled.split
    official = set(np.array(pooled_identities(sector, place), object)[fixed == TEST]) & set(together)
    expected = [i for i in together if (i in official) == (role is Role.test) or not official]
    whole = sector.load(replace(place, role=role, holds_out=True))
    assert sorted(identities(whole.split(role.value))) == sorted(expected)
    for split in SPLITS:
        if split != role.value:
            assert num_rows(whole.split(split)) == 0
            assert whole.split(split)["x"].shape[1:] == whole.split(role.value)["x"].shape[1:]


def test_an_official_test_row_is_never_trained_on(sector: Sector, place: Place) -> None:
    split_of = pool(sector, place).split
    if split_of is None:
        pytest.skip("no rows are set aside")
    official = {i for i, split in zip(pooled_identities(sector, place), split_of, strict=True) if split == TEST}
    assert official
    for node in federation(sector, place):
        assert not official & {*identities(node.train), *identities(node.validation)}


# ---------------------------------------------------------------- nothing leaks


def test_rows_of_some_units_do_not_depend_on_the_others(sector: Sector, place: Place) -> None:
    table = raw(sector, place)
    units = sector.units(table)
    names = np.unique(units)
    chosen = np.isin(units, names[np.random.default_rng(0).random(len(names)) < 0.5])
    whole, half = pooled_identities(sector, place), identities(sector.pool(sector.select(table, chosen)).rows)
    assert half
    assert set(half) <= set(whole)


def test_features_of_a_row_do_not_depend_on_other_rows(case: Case, sector: Sector, place: Place) -> None:
    if not case.rowwise:
        pytest.skip("a row of the table is not a row of the sector")
    table = raw(sector, place)
    x = sector.features(table)["x"]
    for i in (0, len(table) // 2, len(table) - 1):
        assert np.array_equal(sector.features(table.iloc[[i]])["x"][0], x[i], equal_nan=True)


def test_labels_and_what_betrays_the_sampling_never_reach_the_inputs(case: Case, sector: Sector, place: Place) -> None:
    if not case.never_input:
        pytest.skip("asked in the sector's own tests")
    table = raw(sector, place)
    rng = np.random.default_rng(0)
    moved = table.assign(**{c: rng.permutation(table[c]) for c in case.never_input if c in table})
    x = sector.features(table)["x"]
    assert np.array_equal(sector.features(moved)["x"], x, equal_nan=True)
    unlabelled = sector.features(table.drop(columns=list(case.never_input), errors="ignore"))
    assert np.array_equal(unlabelled["x"], x, equal_nan=True)
    assert "y" not in unlabelled


def test_statistics_are_additive_bounded_and_of_the_announced_shape(sector: Sector, place: Place) -> None:
    specs = sector.all_statistic_specs()
    if not specs:
        pytest.skip("nothing is fitted")
    parts = [some(node.train, 300) for node in federation(sector, place)]
    each = [sector.all_statistics(rows) for rows in parts]
    together = sector.all_statistics(concatenate(parts))
    for name, spec in specs.items():
        assert (together[name].shape, together[name].dtype.name) == (spec.shape, spec.dtype)
        np.testing.assert_allclose(sum(e[name] for e in each), together[name], rtol=1e-9)  # type: ignore[call-overload]
        assert (together[name] >= 0).all()  # type: ignore[operator]
        assert together[name].sum() <= spec.per_row * int(together["rows"]) * (1 + 1e-9)  # type: ignore[attr-defined]


def test_what_is_fitted_are_options_that_a_message_can_carry(case: Case, sector: Sector, place: Place) -> None:
    if not sector.statistic_specs():
        pytest.skip("nothing is fitted")
    fitted = sector.fit(sector.all_statistics(sector.load(place).train))
    assert set(fitted) == set(sector.fitted_options)
    carried = json.loads(json.dumps(fitted))
    assert sectors.get(case.name, carried) == sector.fitted(fitted)
    assert same(sectors.get(case.name, carried).load(place), sector.load(place))


# ---------------------------------------------------------------- generated rows, own files, bad partitions


def test_generated_rows_have_the_columns_of_the_real_ones(case: Case, sector: Sector) -> None:
    try:
        real = _raw(sector.name, False)
    except MissingData as error:
        pytest.skip(str(error))
    generated, again = sector.generate(), sector.generate()
    kinds = [
        {name: ("number" if np.asarray(t[name]).dtype.kind in "iuf" else "text") for name in t}
        for t in (generated, real)
    ]
    assert kinds[0] == {name: kind for name, kind in kinds[1].items() if name in kinds[0]}
    assert {column.name for column in sector.schema} <= set(kinds[0])
    if case.exact:
        assert list(generated.columns) == list(real.columns)
        assert list(generated.dtypes) == list(real.dtypes)
    for name in generated:
        assert pd.Series(list(np.asarray(generated[name]).ravel())).equals(
            pd.Series(list(np.asarray(again[name]).ravel()))
        )


def test_generated_rows_need_no_file(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    assert num_rows(sectors.get(case.name, {"split_seed": 99}).load(Place(0, 3, synthetic=True)).train)


def test_an_own_file_in_the_published_format_is_the_whole_part(
    case: Case, sector: Sector, place: Place, tmp_path: Path
) -> None:
    if not case.rowwise:
        pytest.skip("asked in the sector's own tests")
    table = raw(sector, place).head(60)
    path = tmp_path / "own.csv.gz"
    table.to_csv(path, index=False)
    data = sector.load(Place(5, 10, path=path))
    assert sorted(all_identities(data)) == sorted(identities(sector.pool(table).rows))


def test_the_fingerprint_tells_the_sources_of_rows_apart(case: Case, sector: Sector) -> None:
    found = [
        sector.fingerprint(synthetic=False),
        sector.fingerprint(synthetic=True),
        sectors.get(case.name, {"split_seed": 1}).fingerprint(synthetic=True),
        sectors.get(case.name, {"synthetic_rows": 50}).fingerprint(synthetic=True),
    ]
    assert len(set(found)) == 4
    assert sectors.get(case.name, {"split_seed": 1}).fingerprint(synthetic=False) == found[0]
    others = [sectors.get(name).fingerprint(synthetic=True) for name in sectors.names()]
    assert len(set(others)) == len(others)


def test_a_part_that_does_not_exist_is_a_data_error(sector: Sector) -> None:
    with pytest.raises(DataError, match="no part 3 of 3"):
        sector.load(Place(3, 3, synthetic=True))


@pytest.mark.parametrize("naturally", [True, False])
def test_too_many_parts_are_a_data_error_with_the_numbers(case: Case, naturally: bool) -> None:
    with pytest.raises(DataError, match=r"[0-9]+ .*cannot be divided into 100000 parts"):
        sectors.get(case.name, {} if naturally else case.many).load(Place(0, 100_000, synthetic=True))


def test_an_unknown_partition_is_refused_with_the_names(case: Case) -> None:
    with pytest.raises(ConfigError, match=f"{case.name}: no partition 'hospital'; there are .*uniform"):
        sectors.get(case.name, {"partition": "hospital"})


def test_a_further_node_of_many_loads_within_milliseconds(case: Case) -> None:
    def once() -> None:
        for part in range(case.most):
            sectors.get(case.name, case.many).load(Place(part, case.most, synthetic=True))

    once()
    started = time.perf_counter()
    once()
    assert (time.perf_counter() - started) / case.most < 0.01  # 1 ms on an idle machine


# ---------------------------------------------------------------- it learns


def train_centrally(sector: Sector, case: Case, rows: Rows) -> Callable[[Rows], dict[str, float]]:
    """The shipped recipe on pooled rows, what is fitted included."""
    config = load([f"sector={case.name}"])
    recipe = config.sector.training
    budget = replace(recipe, epochs=recipe.epochs * config.rounds)
    fitted = sector.fitted_on(rows)
    params = training.train(fitted, budget, initial_arrays(fitted, 0), rows, seed=0).arrays

    def measure(rows: Rows) -> dict[str, float]:
        found = training.evaluate(fitted, params, rows)
        return fitted.metrics({spec.name: found[spec.name] for spec in fitted.count_specs()})

    return measure


def test_plain_central_training_reaches_the_documented_level(case: Case, sector: Sector, place: Place) -> None:
    if case.level is None:
        pytest.skip("measured by experiments.studies.central_gap")
    nodes = federation(sector, place)
    measure = train_centrally(sector, case, concatenate([n.train for n in nodes]))
    assert measure(concatenate([n.test for n in nodes]))[sector.primary.name] >= case.level
