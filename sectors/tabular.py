"""A table with a yes-or-no column: its columns are declared, the rest is here.

    class Churn(Tabular):
        inputs = (Column("age", "years", low=0, high=120), Column("plan", categories=("basic", "gold")), ...)
        target = "left"

Numbers are standardised with the mean and deviation of all nodes' training rows, which the statistics round finds from
sums and counts; a missing number then stands at the mean.  Categories become one column each, and every column that may
be missing gets one that says so.  Nothing is fitted on rows that are not a node's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from sectors import files, moments, partition
from sectors import schema as schemas
from sectors.base import Batch, Pooled, Rows
from sectors.binary import Binary, mlp
from sectors.schema import Column
from trellis.errors import ConfigError
from trellis.types import Counts, MetricSpec
from trellis.vectors import CountSpec

LEAST_SCALE = 1e-3
"""Of a column's range: a column that never varies is not blown up."""

SYNTHETIC_MISSING = 0.05


@dataclass(frozen=True)
class Tabular(Binary):
    """A CSV file whose rows are predicted one by one.  Subclasses declare `inputs`, `target` and where the file is."""

    primary: ClassVar[MetricSpec] = MetricSpec("auc", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("auc", "max"),
        MetricSpec("ap", "max"),
        MetricSpec("accuracy", "max"),
    )
    fitted_options: ClassVar[tuple[str, ...]] = ("centre", "scale")

    inputs: ClassVar[tuple[Column, ...]] = ()
    """What a model may see.  A number needs `low` and `high`."""
    target: ClassVar[str] = "target"
    """A column of 0 and 1; 1 is the class whose probability is predicted."""
    source: ClassVar[str] = ""
    """Where the file is to be had, for the error that says it is missing."""
    site: ClassVar[str | None] = None
    """The column that says whose row it is; None: rows have no owner."""
    sites: ClassVar[tuple[str, ...]] = ()
    """Its values: the first site is the first node, and so on."""

    partition: str = "site"
    """site: each site is a node (uniform, where there is no such column); dirichlet: nodes differ in their share of
    positives; uniform."""
    alpha: float = 0.5
    """Dirichlet concentration: smaller is less alike."""
    min_rows: int = 5
    """Least rows of a part under dirichlet."""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers; none: logistic regression."""
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    """Mean and deviation of each number; fitted in the statistics round unless given."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for column in cls.inputs:
            if column.missing and not column.optional:
                raise TypeError(f"{cls.__name__}: the input {column.name} may be missing: declare it optional=True")
            if column.categories is None and (column.low is None or column.high is None):
                raise TypeError(f"{cls.__name__}: the input {column.name} needs low and high, or categories")
        owner = (Column(cls.site, kind="text", categories=cls.sites),) if cls.site else ()
        who = (Column(cls.identifier, kind="text"),) if cls.identifier else ()
        cls.schema = (*owner, *who, *cls.inputs, Column(cls.target, categories=(0, 1)))

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("site", "dirichlet", "uniform")
        if self.partition not in known:
            raise ConfigError(f"sector {self.name}: no partition {self.partition!r}; there are {', '.join(known)}")
        if self.alpha <= 0 or min((1, *self.hidden)) < 1 or self.synthetic_rows < 1 or self.min_rows < 1:
            raise ConfigError(f"sector {self.name}: alpha, hidden, synthetic_rows and min_rows must be above 0")
        k, fitted = len(self.numbers), (*self.centre, *self.scale)
        lengths = (len(self.centre), len(self.scale))
        if lengths not in ((0, 0), (k, k)) or not np.isfinite(fitted).all() or min(self.scale, default=1.0) <= 0:
            raise ConfigError(
                f"sector {self.name}: centre and scale have {lengths[0]} and {lengths[1]} values; needed is one for "
                f"each of {', '.join(c.name for c in self.numbers)}, finite, scale above 0, or none at all"
            )

    # ------------------------------------------------------------ columns

    @property
    def numbers(self) -> tuple[Column, ...]:
        return tuple(c for c in self.inputs if c.categories is None)

    @property
    def _ranges(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Low and high of each number."""
        low, high = zip(*((c.low, c.high) for c in self.numbers), strict=True) if self.numbers else ((), ())
        return np.array(low, np.float64), np.array(high, np.float64)

    @property
    def num_inputs(self) -> int:
        """Columns of x: numbers, one a category, one for each column that may be missing."""
        categories = sum(len(c.categories) for c in self.inputs if c.categories is not None)
        return len(self.numbers) + categories + sum(c.optional for c in self.inputs)

    # ------------------------------------------------------------ rows

    def files(self) -> tuple[Path, ...]:
        return (files.find(self.data_files, self.title, self.source),)

    def read(self, paths: tuple[Path, ...]) -> pd.DataFrame:
        return files.read_csv(paths[0], self.schema)

    def pool(self, table: pd.DataFrame) -> Pooled:
        keys = {name: table[name].to_numpy() for name in (self.site, self.identifier) if name is not None}
        return Pooled(self.features(table), keys)

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        """Rows about one person, or rows that are alike, stay together."""
        if self.identifier is not None:
            return pooled.keys[self.identifier]
        x = np.ascontiguousarray(pooled.rows["x"])
        return np.unique(x.view(f"V{x.shape[1] * x.itemsize}").reshape(-1), return_inverse=True)[1]

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        labels = pooled.rows["y"]
        match self.partition:
            case "site" if self.site is not None:
                index = {name: i for i, name in enumerate(self.sites)}
                owner = np.array([index[name] for name in pooled.keys[self.site]], np.int64)
                what = f"sites ({', '.join(self.sites)}): use as many nodes, or sector.options.partition=uniform"
                return partition.by_owner(owner, num_parts, what, len(self.sites))
            case "dirichlet":
                return partition.by_dirichlet(labels, num_parts, self.alpha, self.rng("partition"), self.min_rows)
            case _:
                return partition.uniform(len(labels), num_parts, self.rng("partition"))

    def features(self, table: pd.DataFrame) -> Rows:
        """x (n, num_inputs) float32, missing numbers as NaN; with the target also y (n,).  Raises DataError."""
        declared = [*self.inputs, *(c for c in self.schema if c.name == self.target and c.name in table.columns)]
        schemas.check(table, declared, "the table")
        clean = schemas.without_codes(table, self.inputs)
        parts = [clean[c.name].to_numpy(np.float64) for c in self.numbers]
        for column in self.inputs:
            parts += [(clean[column.name] == value).to_numpy(np.float64) for value in column.categories or ()]
        parts += [clean[c.name].isna().to_numpy(np.float64) for c in self.inputs if c.optional]
        rows: Rows = {"x": np.column_stack(parts).astype(np.float32)}
        if self.target in table.columns:
            rows["y"] = table[self.target].to_numpy().astype(np.float32)
        return rows

    # ------------------------------------------------------------ what is fitted

    def statistic_specs(self) -> tuple[CountSpec, ...]:
        """For each number: how many values there are, and sums of them and of their squares on the scale 0 to 1."""
        return moments.specs(len(self.numbers)) if self.numbers else ()

    def statistics(self, rows: Rows) -> Counts:
        low, high = self._ranges
        values = rows["x"][:, : len(low)].astype(np.float64)
        return moments.of(((values - low) / (high - low)).clip(0.0, 1.0))

    def statistics_problem(self, counts: Counts) -> str | None:
        return moments.problem(counts, int(counts["rows"]))

    def fit(self, totals: Counts) -> dict[str, Any]:
        low, high = self._ranges
        mean, deviation = moments.mean_and_deviation(totals)
        centre, scale = _declared(low, high)
        seen = totals["known"] > 0
        return {
            "centre": np.where(seen, low + (high - low) * mean, centre).tolist(),
            "scale": np.where(seen, (high - low) * np.maximum(deviation, LEAST_SCALE), scale).tolist(),
        }

    # ------------------------------------------------------------ model

    def build_model(self) -> nn.Module:
        return mlp(self.num_inputs, self.hidden)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) logits; numbers standardised, missing ones at the mean."""
        x, k = batch["x"], len(self.numbers)
        centre, scale = (self.centre, self.scale) if self.centre else _declared(*self._ranges)
        mean, deviation = (torch.tensor(np.asarray(v), dtype=x.dtype, device=x.device) for v in (centre, scale))
        numbers = ((x[:, :k] - mean) / deviation).nan_to_num(nan=0.0)
        outputs: Tensor = model(torch.cat([numbers, x[:, k:]], dim=1))
        return outputs

    def generate(self) -> pd.DataFrame:
        """Rows of the schema; a hidden severity moves numbers and categories, and decides the target."""
        rng, n = self.rng("synthetic"), self.synthetic_rows
        severity = rng.standard_normal(n)
        table: dict[str, Any] = {}
        if self.site:
            table[self.site] = rng.choice(self.sites, n)
        if self.identifier:
            table[self.identifier] = [f"{i:08d}" for i in range(n)]
        for column in self.inputs:
            table[column.name] = _generated(column, severity, rng)
        table[self.target] = (rng.random(n) < 1.0 / (1.0 + np.exp(-3.0 * severity))).astype(np.int64)
        return pd.DataFrame(table)


def _declared(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre and scale where nothing is fitted: those of values spread evenly over the declared range."""
    return (low + high) / 2.0, (high - low) / np.sqrt(12.0)


def _generated(column: Column, severity: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[Any]:
    loading, n = rng.uniform(-1.0, 1.0), len(severity)
    position = 1.0 / (1.0 + np.exp(-(loading * severity + rng.standard_normal(n))))
    values: npt.NDArray[Any]
    if column.categories is not None:
        values = np.array(column.categories)[(position * len(column.categories)).astype(np.int64)]
        values = values.astype(object if column.kind == "text" else np.float64)
    else:
        low, high = float(column.low or 0.0), float(column.high or 1.0)
        values = low + (high - low) * position
        values = np.round(values) if column.integer else values
    if column.optional:
        values = np.where(rng.random(n) < SYNTHETIC_MISSING, np.nan if column.kind == "number" else None, values)
    return values
