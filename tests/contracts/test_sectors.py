"""The exam of a sector.  One row a sector; every law is asked of every row, on real rows and on generated ones."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import sectors
from sectors.base import SPLITS, NodeData, Place, Rows, Sector, concatenate, num_rows, take, to_batch
from trellis.errors import ConfigError, DataError, MissingData
from trellis.types import Role

CPU = torch.device("cpu")
EVERYTHING = slice(None)


@dataclass(frozen=True)
class Case:
    """A sector, the level a plain central training must reach, and its recipe."""

    name: str
    level: float
    batch_size: int
    lr: float
    momentum: float
    epochs: int
    weight_decay: float = 0.0
    never_input: tuple[str, ...] = ()
    """Raw columns that must not reach x."""


CASES = [
    Case("banks", 0.90, 32, 0.05, 0.9, 20, weight_decay=1e-3, never_input=("Time", "src", "Class")),
    Case("healthcare_wisconsin", 0.98, 16, 0.1, 0.0, 30, never_input=("target",)),
]


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def sector(case: Case) -> Sector:
    return sectors.get(case.name)


@pytest.fixture(params=["real", "synthetic"])
def place(request: pytest.FixtureRequest, sector: Sector) -> Place:
    place = Place(0, 3, synthetic=request.param == "synthetic")
    try:
        sector.load(place)
    except MissingData as error:
        pytest.skip(str(error))
    return place


def federation(sector: Sector, place: Place, num_parts: int = 3) -> list[NodeData]:
    return [sector.load(replace(place, part=p, num_parts=num_parts)) for p in range(num_parts)]


def identities(rows: Rows) -> list[bytes]:
    return [hashlib.sha256(x.tobytes() + y.tobytes()).digest() for x, y in zip(rows["x"], rows["y"], strict=True)]


def same(a: NodeData, b: NodeData) -> bool:
    return all(np.array_equal(a.split(s)[k], b.split(s)[k]) for s in SPLITS for k in a.train)


def test_the_catalogue_and_the_exam_list_the_same_sectors() -> None:
    assert sorted(c.name for c in CASES) == sectors.names()


def test_a_sector_names_itself_and_its_primary_metric(case: Case, sector: Sector) -> None:
    assert sector.name == case.name
    assert sector.title
    assert sector.primary in sector.metric_specs


def test_outputs_and_losses_are_one_a_row(sector: Sector, place: Place) -> None:
    model = sector.build_model()
    for size in (1, 7):
        batch = to_batch(sector.load(place).train, slice(size), CPU)
        outputs = sector.forward(model, batch)
        losses = sector.losses(outputs, batch)
        assert outputs.shape == losses.shape == (size,)
        assert losses.requires_grad
        assert torch.isfinite(losses).all()
        assert sector.predict(outputs).shape == (size,)


def test_a_model_has_no_hidden_float_state(sector: Sector) -> None:
    model = sector.build_model()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    assert not [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]


def test_initial_params_follow_the_seed(sector: Sector) -> None:
    def params(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(sector.build_model().state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(params(3), params(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(params(3), params(4), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_metrics_of_summed_counts_are_the_pooled_metrics(sector: Sector, place: Place, split: str) -> None:
    model = sector.build_model()

    def counts(rows: Rows) -> dict[str, np.ndarray]:
        batch = to_batch(rows, EVERYTHING, CPU)
        with torch.no_grad():
            return sector.counts(sector.forward(model, batch), batch)

    parts = [node.split(split) for node in federation(sector, place)]
    each = [counts(rows) for rows in parts]
    summed = {k: sum(c[k] for c in each) for k in each[0]}
    pooled = sector.metrics(counts(concatenate(parts)))
    assert sector.metrics(summed) == pooled
    assert set(pooled) == {spec.name for spec in sector.metric_specs}
    assert all(0 <= v <= 1 for v in pooled.values())


def test_counts_are_what_the_sector_announces(sector: Sector, place: Place) -> None:
    for size in (0, 9):
        batch = to_batch(sector.load(place).train, slice(size), CPU)
        counts = sector.counts(sector.forward(sector.build_model(), batch), batch)
        assert {k: (v.shape, v.dtype.name) for k, v in counts.items()} == {
            s.name: (s.shape, s.dtype) for s in sector.count_specs()
        }


def test_counts_of_no_rows_give_no_metrics(sector: Sector, place: Place) -> None:
    batch = to_batch(take(sector.load(place).train, np.arange(0)), EVERYTHING, CPU)
    assert sector.metrics(sector.counts(sector.forward(sector.build_model(), batch), batch)) == {}
    assert sector.metrics({}) == {}


@pytest.mark.parametrize("num_parts", [3, 10])
def test_parts_and_splits_are_disjoint_and_cover_the_rows(sector: Sector, place: Place, num_parts: int) -> None:
    parts = [ids for node in federation(sector, place, num_parts) for s in SPLITS for ids in identities(node.split(s))]
    whole = identities(sector.load(replace(place, part=0, num_parts=1, role=Role.test)).test)
    assert sorted(parts) == sorted(whole)
    homes: dict[bytes, set[tuple[int, str]]] = {}
    for number, node in enumerate(federation(sector, place, num_parts)):
        for s in SPLITS:
            for identity in identities(node.split(s)):
                homes.setdefault(identity, set()).add((number, s))
    assert all(len(home) == 1 for home in homes.values())


def test_a_part_is_the_same_in_a_second_call_and_in_a_fresh_process(case: Case, sector: Sector, place: Place) -> None:
    data = sector.load(place)
    assert same(data, sectors.get(case.name).load(place))
    code = (
        "import sectors, hashlib; from sectors.base import Place, SPLITS; "
        f"d = sectors.get({case.name!r}).load(Place(0, 3, synthetic={place.synthetic})); "
        "print(hashlib.sha256(b''.join(d.split(s)['x'].tobytes() for s in SPLITS)).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == hashlib.sha256(b"".join(data.split(s)["x"].tobytes() for s in SPLITS)).hexdigest()


def test_another_split_seed_gives_another_split(case: Case, place: Place) -> None:
    one, two = (sectors.get(case.name, {"split_seed": seed}).load(place) for seed in (0, 1))
    assert identities(one.train) != identities(two.train)


@pytest.mark.parametrize("role", list(Role))
def test_held_out_nodes_keep_all_rows_in_the_split_of_their_role(sector: Sector, place: Place, role: Role) -> None:
    together = sector.load(place)
    whole = sector.load(replace(place, role=role, holds_out=True))
    assert sorted(identities(whole.split(role.value))) == sorted(
        i for s in SPLITS for i in identities(together.split(s))
    )
    for split in SPLITS:
        if split != role.value:
            assert num_rows(whole.split(split)) == 0
            assert whole.split(split)["x"].shape[1:] == together.train["x"].shape[1:]


def raw(sector: Sector, place: Place) -> pd.DataFrame:
    return sector.generate() if place.synthetic else sector.read(sector.files())


def test_features_of_a_row_do_not_depend_on_other_rows(sector: Sector, place: Place) -> None:
    table = raw(sector, place)
    x = sector.features(table)["x"]
    for i in (0, len(table) // 2, len(table) - 1):
        assert np.array_equal(sector.features(table.iloc[[i]])["x"][0], x[i])


def test_labels_and_what_betrays_the_sampling_never_reach_the_inputs(case: Case, sector: Sector, place: Place) -> None:
    table = raw(sector, place)
    rng = np.random.default_rng(0)
    moved = table.assign(**{c: rng.permutation(table[c]) for c in case.never_input if c in table})
    x = sector.features(table)["x"]
    assert np.array_equal(sector.features(moved)["x"], x)
    unlabelled = sector.features(table.drop(columns=list(case.never_input), errors="ignore"))
    assert np.array_equal(unlabelled["x"], x)
    assert "y" not in unlabelled


def test_generated_rows_have_the_columns_of_the_real_ones(sector: Sector) -> None:
    try:
        real = sector.read(sector.files())
    except MissingData as error:
        pytest.skip(str(error))
    generated = sector.generate()
    assert list(generated.columns) == list(real.columns)
    assert list(generated.dtypes) == list(real.dtypes)
    pd.testing.assert_frame_equal(generated, sector.generate())


def test_generated_rows_need_no_file(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    assert num_rows(sectors.get(case.name, {"split_seed": 99}).load(Place(0, 3, synthetic=True)).train)


def test_an_own_file_in_the_published_format_is_the_whole_part(sector: Sector, place: Place, tmp_path: Path) -> None:
    table = raw(sector, place).head(60)
    path = tmp_path / "own.csv.gz"
    table.to_csv(path, index=False)
    data = sector.load(Place(5, 10, path=path))
    own = sorted(i for s in SPLITS for i in identities(data.split(s)))
    assert own == sorted(identities(sector.pool(table).rows))


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


def test_too_many_parts_are_a_data_error_with_the_numbers(sector: Sector) -> None:
    with pytest.raises(DataError, match="rows cannot be divided into 100000 parts"):
        sector.load(Place(0, 100_000, synthetic=True))


def test_an_unknown_partition_is_refused_with_the_names(case: Case) -> None:
    with pytest.raises(ConfigError, match=f"{case.name}: no partition 'hospital'; there are .*uniform"):
        sectors.get(case.name, {"partition": "hospital"})


def test_a_further_node_of_many_loads_within_milliseconds(case: Case, sector: Sector) -> None:
    sector.load(Place(0, 100, synthetic=True))
    started = time.perf_counter()
    for part in range(100):
        sectors.get(case.name).load(Place(part, 100, synthetic=True))
    assert (time.perf_counter() - started) / 100 < 0.01  # 0.5 ms on an idle machine


def train_centrally(sector: Sector, case: Case, rows: Rows, seed: int) -> Callable[[Rows], dict[str, float]]:
    torch.manual_seed(seed)
    model, rng = sector.build_model(), np.random.default_rng(seed)
    optimizer = torch.optim.SGD(model.parameters(), case.lr, case.momentum, weight_decay=case.weight_decay)
    for _ in range(case.epochs):
        order = rng.permutation(num_rows(rows))
        for start in range(0, len(order), case.batch_size):
            batch = to_batch(rows, order[start : start + case.batch_size], CPU)
            optimizer.zero_grad()
            sector.losses(sector.forward(model, batch), batch).mean().backward()
            optimizer.step()

    def measure(rows: Rows) -> dict[str, float]:
        batch = to_batch(rows, EVERYTHING, CPU)
        with torch.no_grad():
            return sector.metrics(sector.counts(sector.forward(model, batch), batch))

    return measure


def test_plain_central_training_reaches_the_documented_level(case: Case, sector: Sector, place: Place) -> None:
    nodes = federation(sector, place)
    measure = train_centrally(sector, case, concatenate([n.train for n in nodes]), seed=0)
    assert measure(concatenate([n.test for n in nodes]))[sector.primary.name] >= case.level
