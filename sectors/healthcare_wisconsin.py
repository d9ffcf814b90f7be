"""Breast cancer between clinics: a small table, a first federation in seconds.

Wisconsin diagnostic data, 569 fine needle aspirates with 30 measurements of their cell nuclei, 212 malignant (UCI,
CC BY 4.0); they come with scikit-learn.  **Malignant is the positive class**: y = 1 where scikit-learn's target is 0.
A file of one's own is a CSV with scikit-learn's columns ("mean radius" ... "worst fractal dimension", "target").
Street, Wolberg, Mangasarian, 1993, https://doi.org/10.1117/12.148698
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from sectors import files, partition
from sectors.base import Pooled, Rows
from sectors.binary import Binary, mlp
from sectors.schema import Column
from trellis.errors import ConfigError
from trellis.types import MetricSpec

# Least and largest value of each measurement, from the summary table in the data set's own description.
RANGES: dict[str, tuple[float, float]] = {
    "mean radius": (6.981, 28.11),
    "mean texture": (9.71, 39.28),
    "mean perimeter": (43.79, 188.5),
    "mean area": (143.5, 2501.0),
    "mean smoothness": (0.053, 0.163),
    "mean compactness": (0.019, 0.345),
    "mean concavity": (0.0, 0.427),
    "mean concave points": (0.0, 0.201),
    "mean symmetry": (0.106, 0.304),
    "mean fractal dimension": (0.05, 0.097),
    "radius error": (0.112, 2.873),
    "texture error": (0.36, 4.885),
    "perimeter error": (0.757, 21.98),
    "area error": (6.802, 542.2),
    "smoothness error": (0.002, 0.031),
    "compactness error": (0.002, 0.135),
    "concavity error": (0.0, 0.396),
    "concave points error": (0.0, 0.053),
    "symmetry error": (0.008, 0.079),
    "fractal dimension error": (0.001, 0.03),
    "worst radius": (7.93, 36.04),
    "worst texture": (12.02, 49.54),
    "worst perimeter": (50.41, 251.2),
    "worst area": (185.2, 4254.0),
    "worst smoothness": (0.071, 0.223),
    "worst compactness": (0.027, 1.058),
    "worst concavity": (0.0, 1.252),
    "worst concave points": (0.0, 0.291),
    "worst symmetry": (0.156, 0.664),
    "worst fractal dimension": (0.055, 0.208),
}
INPUTS = tuple(RANGES)
LOW, HIGH = np.array(list(RANGES.values())).T

BEYOND = 3.0
"""How many times the largest published value a measurement may be: another microscope, not another unit."""
SCHEMA = (
    *(Column(name, low=0, high=BEYOND * high) for name, (_, high) in RANGES.items()),
    Column("target", categories=(0, 1)),
)

PARTITIONS = ("dirichlet", "radius_band", "uniform")


@dataclass(frozen=True)
class HealthcareWisconsin(Binary):
    """Malignant or benign."""

    name: ClassVar[str] = "healthcare_wisconsin"
    title: ClassVar[str] = "Breast cancer: which aspirates are malignant (Wisconsin)"
    target: ClassVar[str] = "target"
    schema: ClassVar[tuple[Column, ...]] = SCHEMA
    primary: ClassVar[MetricSpec] = MetricSpec("auc", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("auc", "max"),
        MetricSpec("ap", "max"),
        MetricSpec("accuracy", "max"),
    )

    partition: str = "dirichlet"
    """dirichlet: clinics differ in their share of malignant; radius_band: in the size of what they see; uniform."""
    alpha: float = 1.0
    """Dirichlet concentration: smaller is less alike."""
    min_rows: int = 5
    """Least rows of a part under dirichlet."""
    hidden: tuple[int, ...] = (16,)
    synthetic_rows: int = 569

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(
                f"sector healthcare_wisconsin: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}"
            )
        if self.alpha <= 0 or min((1, *self.hidden)) < 1 or self.synthetic_rows < 1 or self.min_rows < 1:
            raise ConfigError("sector healthcare_wisconsin: alpha, hidden, synthetic_rows, min_rows must be above 0")

    def read(self, paths: tuple[Path, ...]) -> pd.DataFrame:
        if paths:
            return files.read_csv(paths[0], SCHEMA)
        return _packaged()

    def pool(self, table: pd.DataFrame) -> Pooled:
        return Pooled(self.features(table), {"radius": table["mean radius"].to_numpy()})

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        labels = pooled.rows["y"]
        match self.partition:
            case "radius_band":
                return partition.by_quantile(pooled.keys["radius"], num_parts)
            case "dirichlet":
                return partition.by_dirichlet(labels, num_parts, self.alpha, self.rng("partition"), self.min_rows)
            case _:
                return partition.uniform(len(labels), num_parts, self.rng("partition"))

    def features(self, table: pd.DataFrame) -> Rows:
        """x (n, 30) in about -1..1; with a target also y (n,), 1 for malignant.  Raises DataError."""
        files.require(table, SCHEMA[:-1], "the table of aspirates")
        x = 2.0 * (table[list(INPUTS)].to_numpy(np.float64) - LOW) / (HIGH - LOW) - 1.0
        rows: Rows = {"x": x.astype(np.float32)}
        if "target" in table.columns:
            files.require(table, SCHEMA[-1:], "the table of aspirates")
            rows["y"] = (1 - table["target"].to_numpy()).astype(np.float32)
        return rows

    def build_model(self) -> nn.Module:
        return mlp(len(INPUTS), self.hidden)

    def generate(self) -> pd.DataFrame:
        """37 % malignant; a hidden severity, larger for malignant, moves every measurement within its range."""
        rng, n = self.rng("synthetic"), self.synthetic_rows
        malignant = rng.random(n) < 0.37
        severity = rng.normal(np.where(malignant, 1.8, -1.8), 1.0)
        loading = rng.uniform(0.2, 1.0, len(INPUTS))
        position = 1.0 / (1.0 + np.exp(1.0 - severity[:, None] * loading - rng.standard_normal((n, len(INPUTS))) * 0.8))
        table = pd.DataFrame(LOW + (HIGH - LOW) * position, columns=list(INPUTS))
        return table.assign(target=1 - malignant.astype(np.int64))


def _packaged() -> pd.DataFrame:
    """The rows that scikit-learn carries, from its file: importing scikit-learn takes a second of every start."""
    folder = (getattr(find_spec("sklearn"), "submodule_search_locations", None) or [""])[0]
    path = Path(folder) / "datasets" / "data" / "breast_cancer.csv"
    if path.is_file():
        types = {**dict.fromkeys(INPUTS, np.float64), "target": np.int64}
        names = [*INPUTS, "target"]
        return pd.read_csv(path, skiprows=1, header=None, names=names, dtype=types, float_precision="round_trip")
    from sklearn.datasets import load_breast_cancer

    packaged = load_breast_cancer()
    return pd.DataFrame(packaged.data, columns=list(INPUTS)).assign(target=packaged.target)
