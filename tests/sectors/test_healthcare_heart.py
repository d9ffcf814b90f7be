"""The heart disease of four hospitals: codes for "not measured", hospitals as nodes, and what the file really holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sectors
from conf.load import load
from conf.schema import NodeTask
from sectors.base import SPLITS, NodeData, Place, concatenate, num_rows, place_of
from sectors.healthcare_heart import HealthcareHeart
from trellis.errors import DataError, MissingData

SECTOR = HealthcareHeart()
ROWS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
PREVALENCE = {"cleveland": 0.459, "hungarian": 0.361, "switzerland": 0.935, "va": 0.745}
# the first patient of the published file
PATIENT = {
    "site": "cleveland", "age": 63.0, "sex": 1.0, "cp": 1.0, "trestbps": 145.0, "chol": 233.0, "fbs": 1.0,
    "restecg": 2.0, "thalach": 150.0, "exang": 0.0, "oldpeak": 2.3, "slope": 3.0, "ca": 0.0, "thal": 6.0, "target": 0,
}  # fmt: skip
NUMBERS = ["age", "trestbps", "chol", "thalach", "oldpeak", "ca"]
OPTIONAL = ["trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal"]


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    try:
        return SECTOR.read(SECTOR.files())
    except MissingData as error:
        pytest.skip(str(error))


def hospitals() -> dict[str, NodeData]:
    return {name: SECTOR.load(Place(part, 4)) for part, name in enumerate(SECTOR.sites)}


def everything(data: NodeData) -> dict[str, np.ndarray]:
    return concatenate([data.split(s) for s in SPLITS])


def patient(**changes: object) -> pd.DataFrame:
    return pd.DataFrame([{**PATIENT, **changes}])


# ---------------------------------------------------------------- one patient by hand


def test_the_first_patient_by_hand() -> None:
    (x,) = SECTOR.features(patient())["x"].tolist()
    assert [c.name for c in SECTOR.numbers] == NUMBERS
    assert x[:6] == pytest.approx([63, 145, 233, 150, 2.3, 0])
    sex, cp, fbs, restecg, exang, slope, thal = [0, 1], [1, 0, 0, 0], [0, 1], [0, 0, 1], [1, 0], [0, 0, 1], [0, 1, 0]
    assert x[6:] == [*sex, *cp, *fbs, *restecg, *exang, *slope, *thal, *[0] * len(OPTIONAL)]
    assert len(x) == SECTOR.num_inputs == 6 + 19 + 10


@pytest.mark.parametrize("column", ["chol", "trestbps"])
@pytest.mark.parametrize("written", [0.0, np.nan])
def test_a_zero_of_a_number_that_was_not_measured_is_missing(column: str, written: float) -> None:
    (x,) = SECTOR.features(patient(**{column: written}))["x"]
    assert np.isnan(x[NUMBERS.index(column)])
    assert np.isnan(x).sum() == 1
    assert x[-10:].tolist() == [float(c == column) for c in OPTIONAL]


def test_a_zero_of_thal_is_no_category_and_missing() -> None:
    (x,) = SECTOR.features(patient(thal=0))["x"]
    assert x[-13:-10].tolist() == [0, 0, 0]
    assert x[-10:].tolist() == [float(c == "thal") for c in OPTIONAL]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("thalach", 0, "40 to 250 beats a minute in column thalach (1 of 1 rows, first row 1: 0): check the unit"),
        ("chol", 6.03, "50 to 700 mg/dl in column chol (1 of 1 rows, first row 1: 6.03): check the unit"),
        ("trestbps", 14.5, "50 to 300 mm Hg in column trestbps"),
        ("sex", 2, "one of 0, 1 in column sex"),
        ("cp", 0, "one of 1, 2, 3, 4 in column cp"),
        ("thal", 2, "one of 3, 6, 7 in column thal"),
        ("age", np.nan, "empty values in column age"),
        ("ca", -9, "0 to 4 vessels in column ca"),
    ],
)
def test_zeros_and_codes_of_other_columns_are_no_missing_values(column: str, value: float, message: str) -> None:
    with pytest.raises(DataError) as caught:
        SECTOR.features(patient(**{column: value}))
    assert message in str(caught.value)


def test_the_stage_of_the_disease_betrays_the_target_and_is_no_input() -> None:
    assert np.array_equal(SECTOR.features(patient(num=4))["x"], SECTOR.features(patient())["x"])


# ---------------------------------------------------------------- hospitals


def test_the_hospitals_are_the_sites_in_their_order() -> None:
    config = load(["sector=healthcare_heart", "nodes=hospitals"])
    assert tuple(spec.name for spec in config.nodes.items) == SECTOR.sites
    places = [place_of(spec, NodeTask.of(config)) for spec in config.nodes.expand()]
    assert [(p.part, p.num_parts) for p in places] == [(i, 4) for i in range(4)]
    assert [spec.name for spec in config.nodes.expand()] == list(SECTOR.sites)


def test_the_shipped_options_are_the_sectors_own() -> None:
    config = load(["sector=healthcare_heart"])
    assert sectors.get("healthcare_heart", config.sector.options) == HealthcareHeart(validation_fraction=0.1)


def test_a_hospital_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    pd.concat([patient(), patient(site="budapest")]).to_csv(path, index=False)
    with pytest.raises(
        DataError, match=r"own\.csv holds 'budapest' in column site \(row 2\), which must be one of clev"
    ):
        SECTOR.load(Place(0, 1, path=path))


def test_more_nodes_than_hospitals_are_told_what_to_set() -> None:
    with pytest.raises(DataError, match=r"5 parts: they have 4 sites \(cleveland, .*partition=uniform"):
        SECTOR.load(Place(0, 5, synthetic=True))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_fewer_nodes_share_the_smallest_hospitals(num_parts: int) -> None:
    made = SECTOR.generate()
    parts = [everything(SECTOR.load(Place(part, num_parts, synthetic=True))) for part in range(num_parts)]
    sizes = made["site"].value_counts().sort_values(ascending=False)
    assert sum(num_rows(p) for p in parts) == len(made)
    assert num_rows(parts[-1]) == (sizes.iloc[num_parts - 1 :].sum() if num_parts < 4 else sizes["va"])


# ---------------------------------------------------------------- the real file


def test_each_hospital_has_its_own_patients(real: pd.DataFrame) -> None:
    for name, data in hospitals().items():
        own = everything(data)
        assert num_rows(own) == ROWS[name]
        assert float(own["y"].mean()) == pytest.approx(PREVALENCE[name], abs=5e-4)
        expected = SECTOR.features(real[real["site"] == name])["x"]
        assert sorted(x.tobytes() for x in own["x"]) == sorted(x.tobytes() for x in expected)


def test_target_is_a_stage_above_zero(real: pd.DataFrame) -> None:
    assert (real["target"] == (real["num"] > 0)).all()


def test_what_is_missing_differs_by_hospital_and_zeros_are_not_values(real: pd.DataFrame) -> None:
    share = {
        name: np.isnan(everything(data)["x"][:, NUMBERS.index("chol")]).mean() for name, data in hospitals().items()
    }
    assert share["switzerland"] == 1.0, "it writes 0 throughout"
    assert share["cleveland"] == 0.0
    for number, column in enumerate(NUMBERS):
        values = np.concatenate([everything(d)["x"][:, number] for d in hospitals().values()])
        assert np.isnan(values).sum() == int(
            (real[column].isna() | ((real[column] == 0) & (column in ("chol", "trestbps")))).sum()
        )


def test_no_two_splits_and_no_two_hospitals_share_a_row(real: pd.DataFrame) -> None:
    homes: dict[bytes, set[tuple[str, str]]] = {}
    for name, data in hospitals().items():
        for split in SPLITS:
            for x in data.split(split)["x"]:
                homes.setdefault(x.tobytes(), set()).add((name, split))
    assert max(len(home) for home in homes.values()) == 1


def test_five_folds_test_every_patient_once(real: pd.DataFrame) -> None:
    for part, name in enumerate(SECTOR.sites):
        folds = [HealthcareHeart(num_folds=5, fold=k).load(Place(part, 4)) for k in range(5)]
        tested = [x.tobytes() for data in folds for x in data.test["x"]]
        assert sorted(tested) == sorted(x.tobytes() for x in everything(folds[0])["x"])
        sizes = [num_rows(data.test) for data in folds]
        assert max(sizes) - min(sizes) <= 2, f"{name}: groups of two at most"
        positives = [float(data.test["y"].sum()) for data in folds]
        assert max(positives) - min(positives) <= 2


def test_the_statistics_round_leaves_switzerlands_cholesterol_out(real: pd.DataFrame) -> None:
    data = hospitals()
    known = {name: SECTOR.statistics(d.train)["known"][NUMBERS.index("chol")] for name, d in data.items()}
    assert known["switzerland"] == 0
    totals = [SECTOR.all_statistics(d.train) for d in data.values()]
    found = SECTOR.fit({k: sum(t[k] for t in totals) for k in totals[0]})
    x = concatenate([d.train for d in data.values()])["x"][:, :6].astype(np.float64)
    assert found["centre"] == pytest.approx(np.nanmean(x, axis=0))
    assert found["scale"] == pytest.approx(np.nanstd(x, axis=0))
