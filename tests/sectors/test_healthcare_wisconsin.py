"""Breast cancer: which class is positive, and where the scaling comes from."""

from __future__ import annotations

import re

import numpy as np
from sklearn.datasets import load_breast_cancer

from sectors.base import SPLITS, Place, num_rows
from sectors.healthcare_wisconsin import INPUTS, RANGES, HealthcareWisconsin


def test_malignant_is_the_positive_class() -> None:
    sector = HealthcareWisconsin()
    assert sector.pool(sector.read(())).rows["y"].sum() == 212


def test_ranges_are_those_of_the_published_description() -> None:
    packaged = load_breast_cancer()
    published = re.findall(r"^[a-z ]+\((?:mean|standard error|worst)\): +([\d.]+) +([\d.]+)$", packaged.DESCR, re.M)
    assert [(float(low), float(high)) for low, high in published] == list(RANGES.values())
    assert list(packaged.feature_names) == list(INPUTS)


def test_inputs_lie_about_minus_one_to_one() -> None:
    x = HealthcareWisconsin().load(Place(0, 1)).train["x"]
    assert np.abs(x).max() < 1.2


def test_a_hundred_clinics_each_have_their_least_rows() -> None:
    for part in range(100):
        data = HealthcareWisconsin().load(Place(part, 100))
        assert sum(num_rows(data.split(s)) for s in SPLITS) >= 5
        assert num_rows(data.train) >= 1


def test_radius_bands_differ_in_their_share_of_malignant() -> None:
    sector = HealthcareWisconsin(partition="radius_band")
    shares = [sector.load(Place(p, 3)).train["y"].mean() for p in range(3)]
    assert shares[0] < 0.1 < 0.8 < shares[2]
