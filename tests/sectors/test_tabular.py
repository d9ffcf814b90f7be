"""A declared table: features by hand, statistics that add up, a scaler that is the pooled one, nobody divided."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import TrainingConfig
from sectors import schema, training
from sectors.base import SPLITS, NodeData, Place, Rows, Sector, concatenate, num_rows, take, to_batch
from sectors.params import initial_arrays
from sectors.schema import Column
from sectors.tabular import LEAST_SCALE, Tabular
from trellis.errors import ConfigError, DataError
from trellis.types import Counts

CPU = torch.device("cpu")
NAN = float("nan")


@dataclass(frozen=True)
class Clinics(Tabular):
    """Patients of three clinics; some come more than once, to more than one clinic."""

    name: ClassVar[str] = "clinics"
    title: ClassVar[str] = "clinics"
    inputs: ClassVar[tuple[Column, ...]] = (
        Column("sex", categories=(0, 1)),
        Column("age", "years", low=0, high=100),
        Column("stage", categories=("I", "II", "III"), kind="text", optional=True),
        Column("bp", "mm Hg", low=50, high=250, missing=(0,), optional=True),
    )
    target: ClassVar[str] = "ill"
    site: ClassVar[str | None] = "clinic"
    sites: ClassVar[tuple[str, ...]] = ("east", "west", "south")
    identifier: ClassVar[str | None] = "patient"


@dataclass(frozen=True)
class Anonymous(Clinics):
    """The same rows without a word of whom they are about."""

    name: ClassVar[str] = "anonymous"
    identifier: ClassVar[str | None] = None


def row(**changes: Any) -> dict[str, Any]:
    good = {"clinic": "east", "patient": "p", "sex": 1, "age": 40, "stage": "II", "bp": 120, "ill": 1}
    return {**good, **changes}


def table(*rows: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def drawn(seed: int, n: int, visits: int = 1) -> pd.DataFrame:
    """Rows of `n // visits` patients, numbers missing here and there."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "clinic": rng.choice(Clinics.sites, n),
            "patient": [f"{i // visits:04d}" for i in range(n)],
            "sex": rng.integers(0, 2, n),
            "age": rng.uniform(0, 100, n),
            "stage": rng.choice(np.array(["I", "II", "III", None], object), n),
            "bp": np.where(rng.random(n) < 0.3, rng.choice([0.0, NAN], n), rng.uniform(50, 250, n)),
            "ill": rng.integers(0, 2, n),
        }
    )


def add(*many: Counts) -> Counts:
    return {k: sum((c[k] for c in many[1:]), start=many[0][k]) for k in many[0]}


# ---------------------------------------------------------------- features


def test_features_by_hand() -> None:
    sector = Clinics()
    rows = sector.features(table(row(), row(sex=0, age=55.5, stage="I", bp=0, ill=0), row(stage=None, bp=NAN)))
    expected = [
        # age, bp | sex 0, 1 | stage I, II, III | stage missing, bp missing
        [40.0, 120.0, 0, 1, 0, 1, 0, 0, 0],
        [55.5, NAN, 1, 0, 1, 0, 0, 0, 1],
        [40.0, NAN, 0, 1, 0, 0, 0, 1, 1],
    ]
    assert np.array_equal(rows["x"], np.array(expected, np.float32), equal_nan=True)
    assert rows["x"].dtype == np.float32
    assert rows["y"].tolist() == [1, 0, 1]
    assert sector.num_inputs == len(expected[0])
    assert [c.name for c in sector.numbers] == ["age", "bp"]


def test_a_row_without_target_site_and_person_can_be_predicted() -> None:
    full = table(row(), row(age=70))
    bare = full.drop(columns=["clinic", "patient", "ill"])
    rows = Clinics().features(bare)
    assert set(rows) == {"x"}
    assert np.array_equal(rows["x"], Clinics().features(full)["x"])


def test_features_do_not_depend_on_the_order_of_columns_nor_on_other_rows() -> None:
    whole = drawn(0, 30)
    x = Clinics().features(whole)["x"]
    assert np.array_equal(Clinics().features(whole[whole.columns[::-1]])["x"], x, equal_nan=True)
    for i in (0, 7, 29):
        assert np.array_equal(Clinics().features(whole.iloc[[i]])["x"][0], x[i], equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": 400}, "0 to 100 years in column age (1 of 2 rows, first row 2: 400): check the unit"),
        ({"bp": 12}, "50 to 250 mm Hg in column bp (1 of 2 rows, first row 2: 12): check the unit"),
        ({"sex": 2}, "one of 0, 1 in column sex (1 of 2 rows, first row 2: 2)"),
        ({"sex": NAN}, "empty values in column sex"),
        ({"stage": "IV"}, "'IV' in column stage (row 2), which must be one of I, II, III"),
        ({"ill": 2}, "one of 0, 1 in column ill"),
    ],
)
def test_a_row_to_predict_is_held_against_the_schema_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        Clinics().features(table(row(), row(**changes)))
    assert message in str(caught.value)


def test_a_blank_text_is_as_missing_as_an_empty_one() -> None:
    x = Clinics().features(table(row(stage="  "), row(stage=None)))["x"]
    assert np.array_equal(x[0], x[1])


# ---------------------------------------------------------------- what a subclass declares


def test_the_schema_is_site_person_inputs_and_target() -> None:
    assert [c.name for c in Clinics.schema] == ["clinic", "patient", "sex", "age", "stage", "bp", "ill"]
    assert Clinics.schema[0].categories == Clinics.sites
    assert [c.name for c in Anonymous.schema] == ["clinic", "sex", "age", "stage", "bp", "ill"]


@pytest.mark.parametrize(
    "column", [Column("age"), Column("age", low=0), Column("age", "years", high=120, integer=True)]
)
def test_a_number_without_bounds_is_refused_where_it_is_declared(column: Column) -> None:
    with pytest.raises(TypeError, match="Loose: the input age needs low and high, or categories"):
        type("Loose", (Tabular,), {"inputs": (Column("sex", categories=(0, 1)), column)})


@pytest.mark.parametrize(
    "options",
    [
        {"centre": (1.0, 2.0)},
        {"scale": (1.0, 1.0)},
        {"centre": (1.0, 2.0), "scale": (1.0,)},
        {"centre": (1.0, 2.0), "scale": (1.0, 0.0)},
        {"alpha": 0.0},
        {"min_rows": 0},
        {"hidden": (0,)},
        {"partition": "clinic"},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sector clinics: "):
        Clinics(**options)


@pytest.mark.parametrize("given", [(1.0,), (1.0, 2.0, 3.0), (NAN, 1.0), (1.0, float("inf"))])
def test_given_constants_are_one_finite_value_a_number(given: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="centre and scale"):
        Clinics(centre=given, scale=tuple(abs(v) for v in given))


@dataclass(frozen=True)
class Churn(Tabular):
    """The example of the module, as it is written there."""

    name: ClassVar[str] = "churn"
    title: ClassVar[str] = "who leaves"
    inputs: ClassVar[tuple[Column, ...]] = (
        Column("age", "years", low=0, high=120),
        Column("plan", categories=("basic", "gold")),
    )
    target: ClassVar[str] = "left"


def test_a_table_without_a_site_needs_no_more_than_its_columns() -> None:
    parts = [Churn().load(Place(part, 2, synthetic=True)) for part in range(2)]
    assert sum(num_rows(data.split(split)) for data in parts for split in SPLITS) == Churn().synthetic_rows


def test_categories_may_be_texts_as_the_example_has_them() -> None:
    sector = Churn(partition="uniform")
    x = sector.features(pd.DataFrame({"age": [30.0], "plan": ["gold"]}))["x"]
    assert x.tolist() == [[30.0, 0.0, 1.0]]
    schema.check(sector.generate(), sector.schema, "generated rows")


def test_generated_rows_fit_the_schema_and_can_be_learned() -> None:
    for sector in (Clinics(), Anonymous(synthetic_rows=200)):
        made = sector.generate()
        schema.check(made, sector.schema, "generated rows")
        pd.testing.assert_frame_equal(made, sector.generate())
        assert made[["stage", "bp"]].isna().any().all(), "something is missing"
        assert 0.3 < made["ill"].mean() < 0.7
    data = Clinics().load(Place(0, 1, synthetic=True))
    fitted = Clinics().fitted_on(data.train)
    recipe = TrainingConfig(batch_size=16, epochs=10, lr=0.1)
    params = training.train(fitted, recipe, initial_arrays(fitted, 0), data.train, seed=0).arrays
    counts = training.evaluate(fitted, params, data.test)
    assert fitted.metrics({k: counts[k] for k in ("positives", "negatives")})["auc"] > 0.7


# ---------------------------------------------------------------- statistics


def test_statistics_by_hand() -> None:
    rows = Clinics().features(table(row(age=25, bp=100), row(age=75, bp=0), row(age=50, bp=250)))
    found = Clinics().all_statistics(rows)
    assert {k: v.tolist() for k, v in found.items()} == {
        "known": [3, 2],
        "sums": [1.5, 0.25 + 1.0],
        "squares": [0.0625 + 0.5625 + 0.25, 0.0625 + 1.0],
        "rows": 3,
    }


def test_a_scaler_by_hand() -> None:
    rows = Clinics().features(table(row(age=25, bp=100), row(age=75, bp=0), row(age=50, bp=250)))
    found = Clinics().fit(Clinics().all_statistics(rows))
    assert found["centre"] == pytest.approx([50.0, 175.0])
    assert found["scale"] == pytest.approx([np.std([25, 75, 50]), 75.0])


@given(seed=st.integers(0, 10_000), cut=st.integers(0, 40))
def test_statistics_add_up(seed: int, cut: int) -> None:
    sector = Clinics()
    rows = sector.features(drawn(seed, 40))
    order = np.random.default_rng(seed).permutation(40)
    parts = [sector.all_statistics(take(rows, index)) for index in (order[:cut], order[cut:])]
    whole = sector.all_statistics(rows)
    for name, total in add(*parts).items():
        assert total == pytest.approx(whole[name], rel=1e-9, abs=1e-12)
        assert total.dtype == whole[name].dtype


@given(seed=st.integers(0, 10_000), n=st.integers(0, 40))
def test_statistics_are_what_is_announced_and_no_row_adds_more(seed: int, n: int) -> None:
    sector = Clinics()
    counts = sector.all_statistics(take(sector.features(drawn(seed, 40)), np.arange(n)))
    specs = sector.all_statistic_specs()
    assert {k: (v.shape, v.dtype.name) for k, v in counts.items()} == {
        k: (spec.shape, spec.dtype) for k, spec in specs.items()
    }
    for name, spec in specs.items():
        assert (counts[name] >= 0).all()
        assert counts[name].sum() <= spec.per_row * n
    known, sums, squares = (counts[k] for k in ("known", "sums", "squares"))
    assert (squares <= sums + 1e-12).all()
    assert (sums <= known).all()
    assert (sums**2 <= known * squares + 1e-9).all()


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_what_is_fitted_is_mean_and_deviation_of_all_training_rows(seed: int, sizes: list[int]) -> None:
    sector = Clinics()
    parts = [sector.features(drawn(seed + i, 20)) for i in range(len(sizes))]
    parts = [take(rows, np.arange(n)) for rows, n in zip(parts, sizes, strict=True)]
    found = sector.fit(add(*(sector.all_statistics(rows) for rows in parts)))
    pooled = concatenate(parts)
    low, high = np.array([0.0, 50.0]), np.array([100.0, 250.0])
    for i in range(2):
        values = pooled["x"][:, i].astype(np.float64) if num_rows(pooled) else np.empty(0)
        values = values[np.isfinite(values)]
        centre = values.mean() if len(values) else (low[i] + high[i]) / 2
        scale = max(values.std(), LEAST_SCALE * (high[i] - low[i])) if len(values) else (high[i] - low[i]) / 12**0.5
        assert found["centre"][i] == pytest.approx(centre, abs=1e-9 * (high[i] - low[i]))
        assert found["scale"][i] == pytest.approx(scale, rel=1e-6)


def test_the_scaler_of_a_federation_is_that_of_its_pooled_training_rows() -> None:
    sector = Clinics(synthetic_rows=400)
    nodes = [sector.load(Place(part, 3, synthetic=True)) for part in range(3)]
    found = sector.fit(add(*(sector.all_statistics(n.train) for n in nodes)))
    x = concatenate([n.train for n in nodes])["x"][:, :2].astype(np.float64)
    assert found["centre"] == pytest.approx(np.nanmean(x, axis=0))
    assert found["scale"] == pytest.approx(np.nanstd(x, axis=0))
    everything = concatenate([n.split(s) for n in nodes for s in SPLITS])["x"][:, :2].astype(np.float64)
    assert found["centre"] != pytest.approx(np.nanmean(everything, axis=0)), "test rows are not looked at"


def test_a_column_that_never_varies_is_not_blown_up() -> None:
    sector = Clinics()
    rows = sector.features(table(*(row(age=40 + 1e-9 * i, bp=120) for i in range(50))))
    fitted = sector.fitted_on(rows)
    assert fitted.scale == pytest.approx((LEAST_SCALE * 100, LEAST_SCALE * 200))  # type: ignore[attr-defined]
    assert fitted.centre == pytest.approx((40.0, 120.0))  # type: ignore[attr-defined]
    assert torch.isfinite(logits(fitted, rows)).all()


def test_a_column_missing_at_every_node_keeps_its_declared_scale() -> None:
    sector = Clinics()
    rows = sector.features(table(row(bp=0, age=20), row(bp=NAN, age=60)))
    fitted = sector.fitted_on(rows)
    assert fitted.centre == pytest.approx((40.0, 150.0))  # type: ignore[attr-defined]
    assert fitted.scale == pytest.approx((20.0, 200 / 12**0.5))  # type: ignore[attr-defined]
    assert torch.isfinite(logits(fitted, rows)).all()


def test_a_table_of_categories_alone_has_nothing_to_fit() -> None:
    sector = type("Codes", (Tabular,), {"inputs": (Column("sex", categories=(0, 1)),), "name": "codes"})(
        partition="uniform"
    )
    rows = sector.features(pd.DataFrame({"sex": [0, 1, 1], "target": [0, 1, 1]}))
    assert sector.all_statistic_specs() == {}
    assert sector.fitted_on(rows) is sector
    assert torch.isfinite(logits(sector, rows)).all()


def test_a_node_without_training_rows_adds_nothing_and_fits_nothing() -> None:
    none = take(Clinics().features(drawn(0, 5)), np.arange(0))
    assert all(not np.any(v) for v in Clinics().all_statistics(none).values())
    assert Clinics().fitted_on(none) == Clinics()


@given(seed=st.integers(0, 1000))
def test_what_is_fitted_survives_json(seed: int) -> None:
    sector = Clinics()
    options = sector.fit(sector.all_statistics(sector.features(drawn(seed, 20))))
    assert set(options) == set(sector.fitted_options)
    again = json.loads(json.dumps(options))
    assert (
        sector.fitted(again) == sector.fitted(options) == replace(sector, **{k: tuple(v) for k, v in options.items()})
    )
    assert hash(sector.fitted(again)) == hash(sector.fitted(options))


# ---------------------------------------------------------------- the model


def logits(sector: Sector, rows: Rows, weights: npt.NDArray[Any] | None = None) -> torch.Tensor:
    model = sector.build_model()
    if weights is not None:
        model.load_state_dict({"head.weight": torch.tensor(weights[None]), "head.bias": torch.zeros(1)})
    with torch.no_grad():
        return sector.forward(model, to_batch(rows, slice(None), CPU))


WEIGHTS = np.array([1.0, 10.0, 0.5, -0.5, 1, 2, 3, 0.25, 0.125], np.float32)


def test_the_model_sees_standardised_numbers_and_a_missing_one_at_the_mean() -> None:
    rows = Clinics().features(table(row(age=60, bp=130), row(age=40, bp=0, sex=0, stage=None)))
    found = logits(Clinics(centre=(50.0, 120.0), scale=(20.0, 5.0)), rows, WEIGHTS)
    assert found.tolist() == pytest.approx([0.5 + 20.0 - 0.5 + 2.0, -0.5 + 0.0 + 0.5 + 0.25 + 0.125])


def test_without_fitted_values_the_declared_range_stands_for_them() -> None:
    rows = Clinics().features(table(row(age=60, bp=150)))
    found = logits(Clinics(), rows, WEIGHTS)
    assert found.tolist() == pytest.approx([10.0 / (100 / 12**0.5) - 0.5 + 2.0])


# ---------------------------------------------------------------- nobody is divided


def patients_of(sector: Sector, whole: pd.DataFrame, data: NodeData) -> list[set[str]]:
    """Patients in each split, found again by their rows."""
    x = sector.features(whole)["x"]
    who = {x[i].tobytes(): whole["patient"].iloc[i] for i in range(len(x))}
    return [{who[r.tobytes()] for r in data.split(s)["x"]} for s in SPLITS]


@pytest.mark.parametrize("partition", ["site", "dirichlet", "uniform"])
@pytest.mark.parametrize("num_folds", [0, 3])
@pytest.mark.parametrize("server_fraction", [0.0, 0.2])
def test_one_person_is_at_one_node_and_in_one_split(
    partition: str, num_folds: int, server_fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(1, 240, visits=4)
    whole.to_csv(tmp_path / "clinics.csv", index=False, float_format="%.17g")
    monkeypatch.setattr(Clinics, "data_files", ("clinics.csv",))
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    options: dict[str, Any] = {"partition": partition, "num_folds": num_folds, "server_fraction": server_fraction}
    sector = Clinics(**options)
    homes = [s for part in range(3) for s in patients_of(sector, whole, sector.load(Place(part, 3)))]
    if server_fraction:
        server = sector.server_rows(synthetic=False)
        homes += patients_of(sector, whole, NodeData(server, *(take(server, np.arange(0)),) * 2))[:1]
    assert set().union(*homes) == set(whole["patient"])
    assert sum(map(len, homes)) == 60, "nobody twice"


def test_rows_that_are_alike_stay_together_where_persons_have_no_names() -> None:
    repeated = pd.concat([drawn(2, 60)] * 3, ignore_index=True)
    sector = Anonymous(partition="uniform")
    pooled = sector.pool(repeated)
    groups = sector.groups(pooled)
    assert len(set(groups)) == 60
    assert (groups[:60] == groups[60:120]).all()


def test_sites_are_the_nodes_in_their_order() -> None:
    whole = drawn(3, 90)
    owners = Anonymous().owners(Anonymous().pool(whole), 3)
    assert [Clinics.sites[o] for o in owners] == whole["clinic"].tolist()


def test_more_nodes_than_sites_are_told_the_sites_and_what_to_set() -> None:
    with pytest.raises(DataError) as caught:
        Clinics(synthetic_rows=50).load(Place(0, 4, synthetic=True))
    for part in ("50 rows", "4 parts", "3 sites (east, west, south)", "sector.options.partition=uniform"):
        assert part in str(caught.value)


def test_an_unknown_site_is_refused_with_file_row_and_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    table(row(), row(clinic="north")).to_csv(path, index=False)
    with pytest.raises(DataError) as caught:
        Clinics().load(Place(0, 1, path=path))
    assert str(caught.value) == f"{path} holds 'north' in column clinic (row 2), which must be one of east, west, south"
