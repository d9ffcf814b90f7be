"""Card fraud between banks: rare positives, and none of the banks sees the same customers.

ULB credit card fraud (Kaggle mlg-ulb/creditcardfraud, DbCL 1.0): 284,807 payments of September 2013, 492 frauds.
V1..V28 are principal components, so their scale is public and fixed: nothing is ever computed from pooled rows.
The public sample keeps all frauds and few normals, more of them before Time 81,841; its column `src` says from which
thinning a row comes.  `Time` and `src` betray the sampling, so a model never sees them.
Dal Pozzolo et al., SSCI 2015, https://doi.org/10.1109/SSCI.2015.33
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from sectors import files, partition
from sectors import metrics as measures
from sectors.base import Pooled, Rows
from sectors.binary import Binary, mlp
from sectors.schema import Column
from trellis.errors import ConfigError
from trellis.types import Counts, MetricSpec

COMPONENTS = tuple(f"V{i}" for i in range(1, 29))
INPUTS = (*COMPONENTS, "Amount")
SCHEMA = (
    Column("Time", "seconds from the first payment", low=0),
    *(Column(name, low=-1000, high=1000) for name in COMPONENTS),
    Column("Amount", "euros", low=0, high=1e6),
    Column("Class", categories=(0, 1)),
)
COLUMNS = tuple(column.name for column in SCHEMA)

# Standard deviations of V1..V28 in the full data set, as its Kaggle page publishes them; the means are 0.
SCALES = np.array(
    [
        1.958696, 1.651309, 1.516255, 1.415869, 1.380247, 1.332271, 1.237094, 1.194353, 1.098632, 1.088850,
        1.020713, 0.999201, 0.995274, 0.958596, 0.915316, 0.876253, 0.849337, 0.838176, 0.814041, 0.770925,
        0.734524, 0.725702, 0.624460, 0.605647, 0.521278, 0.482227, 0.403632, 0.330083,
    ]
)  # fmt: skip
LOG_AMOUNT_CENTRE, LOG_AMOUNT_SCALE = 3.2, 1.7
"""Of log(1 + euros): round numbers near those of a normal payment (22 euros at the median)."""
CLIP = 5.0
"""Scaled inputs are cut here: some frauds lie 30 deviations out, where one row would throw a whole update."""

EARLY = 81_841
"""Seconds from the first payment; the sample kept a larger share of the normals up to here."""
STRATUM_WEIGHTS = (24.2, 234.8, 1.0)
"""Payments that a normal row stands for: of the sample up to EARLY, of the sample after, of the full file."""

PARTITIONS = ("amount_band", "time_block", "dirichlet", "uniform")


@dataclass(frozen=True)
class Banks(Binary):
    """Fraud or not.  `ap_true` is the average precision that the full file's 0.17 % of frauds would give."""

    name: ClassVar[str] = "banks"
    title: ClassVar[str] = "Card fraud: which payments are fraudulent (ULB 2013)"
    primary: ClassVar[MetricSpec] = MetricSpec("ap", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("ap", "max"),
        MetricSpec("auc", "max"),
        MetricSpec("ap_true", "max"),
    )
    target: ClassVar[str] = "Class"
    schema: ClassVar[tuple[Column, ...]] = SCHEMA
    data_files: ClassVar[tuple[str, ...]] = ("banks/creditcard.csv", "banks/creditcard_sample.csv.gz")

    num_strata: ClassVar[int] = len(STRATUM_WEIGHTS)

    partition: str = "amount_band"
    """amount_band: banks by size of payment; time_block: by period; dirichlet: by label; uniform."""
    alpha: float = 0.5
    """Dirichlet concentration: smaller is less alike."""
    min_rows: int = 5
    """Least rows of a part under dirichlet."""
    hidden: tuple[int, ...] = (32, 16)
    synthetic_rows: int = 6000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(f"sector banks: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}")
        if self.alpha <= 0 or min((1, *self.hidden)) < 1 or self.synthetic_rows < 1 or self.min_rows < 1:
            raise ConfigError("sector banks: alpha, hidden, synthetic_rows and min_rows must be above 0")

    def files(self) -> tuple[Path, ...]:
        """The full file, `.csv` or `.csv.gz`; where it is not, the sample.  With both there the sample is not read."""
        return (files.find(self.data_files, "ULB credit card fraud", "Kaggle mlg-ulb/creditcardfraud"),)

    def read(self, paths: tuple[Path, ...]) -> pd.DataFrame:
        return files.read_csv(paths[0], SCHEMA)

    def pool(self, table: pd.DataFrame) -> Pooled:
        # Repeats differ in nothing but `src`: left in, they would stand in train and test at once.
        kept = table.drop_duplicates(subset=list(COLUMNS), ignore_index=True)
        return Pooled(self.features(kept), {"amount": kept["Amount"].to_numpy(), "time": kept["Time"].to_numpy()})

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        """Payments alike in everything but their second are one group."""
        x = np.ascontiguousarray(pooled.rows["x"])
        _, group = np.unique(x.view(f"V{x.shape[1] * x.itemsize}").reshape(-1), return_inverse=True)
        return group

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        labels = pooled.rows["y"]
        match self.partition:
            case "amount_band":
                return partition.by_quantile(pooled.keys["amount"], num_parts)
            case "time_block":
                return partition.by_block(pooled.keys["time"], num_parts)
            case "dirichlet":
                return partition.by_dirichlet(labels, num_parts, self.alpha, self.rng("partition"), self.min_rows)
            case _:
                return partition.uniform(len(labels), num_parts, self.rng("partition"))

    def features(self, table: pd.DataFrame) -> Rows:
        """x (n, 29) of a raw table; with its Class also y (n,) and stratum (n,).  Raises DataError."""
        files.require(table, [c for c in SCHEMA if c.name in INPUTS], "the table of payments")
        scaled = table[list(COMPONENTS)].to_numpy(np.float64) / SCALES
        amount = (np.log1p(table["Amount"].to_numpy(np.float64).clip(min=0.0)) - LOG_AMOUNT_CENTRE) / LOG_AMOUNT_SCALE
        rows: Rows = {"x": np.column_stack([scaled, amount]).clip(-CLIP, CLIP).astype(np.float32)}
        if "Class" in table.columns:
            files.require(table, SCHEMA[-1:], "the table of payments")
            rows |= {"y": table["Class"].to_numpy(np.float32), "stratum": _strata(table)}
        return rows

    def build_model(self) -> nn.Module:
        return mlp(len(INPUTS), self.hidden)

    def metrics(self, counts: Counts) -> dict[str, float]:
        """`ap` at the prevalence of the rows, `auc`, and `ap_true` at that of the full file."""
        found = super().metrics(counts)
        found.pop("accuracy", None)  # all-normal is 99.8 % right
        if "ap" in found:
            true = measures.average_precision_from_counts(counts["positives"], counts["negatives"], STRATUM_WEIGHTS)
            found |= {"ap_true": true} if true is not None else {}
        return found

    def generate(self) -> pd.DataFrame:
        """Rows of the sample's schema, 7 % frauds; frauds of a random severity are shifted where real ones are."""
        rng, n = self.rng("synthetic"), self.synthetic_rows
        fraud = rng.random(n) < 0.07
        severity = np.where(fraud, rng.gamma(2.5, 1.0, n), 0.0)
        shift = np.zeros(len(COMPONENTS))
        shift[[2, 3, 9, 10, 11, 13, 15, 16]] = [-1.2, 1.2, -1.3, 1.3, -1.6, -2.0, -1.2, -1.6]
        scaled = rng.standard_normal((n, len(COMPONENTS))) + severity[:, None] * shift
        euros = np.expm1(rng.normal(np.where(fraud, 2.8, 3.2), np.where(fraud, 2.2, 1.7)).clip(0.0, 9.0)).round(2)
        time = np.sort(rng.integers(0, 172_793, n))
        table = pd.DataFrame(scaled * SCALES, columns=list(COMPONENTS))
        table.insert(0, "Time", time)
        source = np.where(fraud | (time > EARLY), "r48h", "r24h")
        return table.assign(Amount=euros, Class=fraud.astype(np.int64), src=source)


def _strata(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Index into STRATUM_WEIGHTS of each row: only the sample has a column `src`."""
    if "src" not in table.columns or "Time" not in table.columns:
        return np.full(len(table), 2, np.int64)
    return (table["Time"].to_numpy() > EARLY).astype(np.int64)
