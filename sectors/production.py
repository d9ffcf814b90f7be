"""Remaining useful life of turbofan engines between plants: whose engines fail in a way the others never saw.

NASA C-MAPSS (public domain): FD001, 100 engines run to failure and 100 cut before it, one fault mode (compressor); of
FD003, with a second mode (fan), the 100 that were cut.  One operating condition, sea level.  Each cycle has 21 sensors,
of which 14 move; a row is a window of 30 cycles of one engine, and y the cycles left at its end, capped at 125 since a
healthy engine does not show its age.  An engine is at one node and in one split.

FD001's runs to failure train and validate; of its test engines only the published test point, their last window, is
used.  FD003's cycles left are known for every cycle, so its engines are divided: some train and validate, the others
are tested at their last window.  A file of one's own has the format of `train_FD001.txt`, runs to failure: some engines
are cut at a random cycle, as the published test engines are, and tested there.
An engine of fewer than 30 cycles has its first cycle repeated in front; no published one is so short.
Saxena et al., PHM 2008, https://doi.org/10.1109/PHM.2008.4711414; sensors, window and cap as in Li et al., Reliability
Engineering & System Safety, 2018, https://doi.org/10.1016/j.ress.2017.11.021
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from sectors import files, moments, schema
from sectors.base import TEST, TRAIN, VALIDATION, Batch, Pooled, Rows, Sector
from sectors.binary import Squeeze
from sectors.schema import Column
from trellis.errors import ConfigError, DataError
from trellis.types import Counts, MetricSpec
from trellis.vectors import CountSpec

WINDOW = 30
"""Cycles of a row."""
FILTER = 10
"""Cycles of a filter."""

UNIT = Column("unit", low=0, integer=True)
CYCLE = Column("cycle", unit="cycles", low=1, integer=True)
RUL = Column("rul", unit="cycles", low=0, integer=True)
# Wide around what engines of this type show at sea level, healthy or failing; units as Saxena et al. name them.
SENSORS = (
    Column("sensor_1", "°R", 515.0, 522.0),
    Column("sensor_2", "°R", 636.0, 650.0),
    Column("sensor_3", "°R", 1540.0, 1650.0),
    Column("sensor_4", "°R", 1350.0, 1480.0),
    Column("sensor_5", "psia", 14.0, 15.3),
    Column("sensor_6", "psia", 21.0, 22.2),
    Column("sensor_7", "psia", 540.0, 580.0),
    Column("sensor_8", "rpm", 2385.0, 2391.0),
    Column("sensor_9", "rpm", 8950.0, 9350.0),
    Column("sensor_10", "", 1.2, 1.4),
    Column("sensor_11", "psia", 45.5, 49.5),
    Column("sensor_12", "pps/psi", 510.0, 545.0),
    Column("sensor_13", "rpm", 2385.0, 2391.0),
    Column("sensor_14", "rpm", 8030.0, 8400.0),
    Column("sensor_15", "", 8.0, 8.8),
    Column("sensor_16", "", 0.02, 0.04),
    Column("sensor_17", "", 380.0, 408.0),
    Column("sensor_18", "rpm", 2380.0, 2396.0),
    Column("sensor_19", "rpm", 99.0, 101.0),
    Column("sensor_20", "lbm/s", 37.0, 41.0),
    Column("sensor_21", "lbm/s", 22.2, 24.5),
)
SETTINGS = (
    Column("setting_1", "", -0.1, 0.1),
    Column("setting_2", "", -0.05, 0.05),
    Column("setting_3", "", 99.0, 101.0),
)
RECORDED = (UNIT, CYCLE, *SETTINGS, *SENSORS)
"""Columns of a published file."""

INPUTS = tuple(SENSORS[i - 1] for i in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21))
"""The other sensors and the settings are constant or noise in this operating condition."""
LOW, HIGH = np.array([[column.low, column.high] for column in INPUTS], np.float64).T

CENTRE, SCALE = (0.5,) * len(INPUTS), (0.1,) * len(INPUTS)
"""Of positions within the ranges, before anything is fitted."""
SCALE_LEAST = 1e-3
"""A sensor that stands still is not divided by 0."""

FLEETS = ("FD001", "FD003", "own")
FD001, FD003, OWN_FLEET = range(len(FLEETS))
"""Index into FLEETS: the strata that errors are counted by."""
SOURCES = ("train", "test")
"""Of a file that runs to failure; of one that was cut before."""

BLOCK = 10
"""Engines of so many consecutive numbers are divided among the splits together."""
CUT_LEAST, CUT_MOST = 7, 145
"""Cycles left where a test engine of one's own is cut, as FD001's and FD003's were."""
BIN = 25
"""Cycles: rows are stratified by bins of so many."""
MAX_RUL_LIMIT = 250.0
"""A cap above it would let a single score outweigh all counts."""
CYCLE_STEPS, SCORE_STEPS, POSITION_STEPS = 64, 1024, 65_536
"""Errors, scores and positions are rounded to such parts of one: their sums are then exact in any order."""

PARTITIONS = ("fleets", "life_band", "uniform")


@dataclass(frozen=True)
class Production(Sector):
    """Cycles left before an engine fails."""

    name: ClassVar[str] = "production"
    title: ClassVar[str] = "Engines: how many cycles are left before failure (NASA C-MAPSS)"
    primary: ClassVar[MetricSpec] = MetricSpec("rmse", "min")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("rmse", "min"),
        MetricSpec("nasa_score", "min"),
        MetricSpec("rmse_fd001", "min"),
        MetricSpec("nasa_fd001", "min"),
        MetricSpec("rmse_fd003", "min"),
    )
    data_files: ClassVar[tuple[str, ...]] = (
        "production/train_FD001.txt",
        "production/test_FD001.txt",
        "production/RUL_FD001.txt",
        "production/test_FD003.txt",
        "production/RUL_FD003.txt",
    )
    needs_all_files: ClassVar[bool] = True
    schema: ClassVar[tuple[Column, ...]] = (
        Column("fleet", categories=FLEETS, kind="text"),
        Column("source", categories=SOURCES, kind="text"),
        *RECORDED,
        RUL,
    )
    fitted_options: ClassVar[tuple[str, ...]] = ("centre", "scale")
    head: ClassVar[tuple[str, ...]] = ("head.*",)

    partition: str = "fleets"
    """fleets: the last part owns FD003, the others engines of FD001 by how long they live; life_band: all engines by
    how long they live; uniform."""
    max_rul: float = 125.0
    """Cycles; more of them left count as so many."""
    stride: int = 1
    """Cycles between the windows of an engine that trains or validates, counted from its last one."""
    channels: int = 16
    hidden: int = 32
    validation_fraction: float = 0.1
    """Of FD001's runs to failure, of FD003's engines and of a file of one's own."""
    test_fraction: float = 0.4
    """Of FD003's engines and of a file of one's own; FD001 has official test engines."""
    synthetic_rows: int = 27_000
    centre: tuple[float, ...] = ()
    """Mean of each input, as a position 0..1 within its range; empty until it is fitted."""
    scale: tuple[float, ...] = ()
    """Its standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(f"sector production: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}")
        if not 0 < self.max_rul <= MAX_RUL_LIMIT:
            raise ConfigError(
                f"sector production: max_rul is {self.max_rul}; it must be above 0 and at most {MAX_RUL_LIMIT}"
            )
        if min(self.stride, self.channels, self.hidden, self.synthetic_rows) < 1:
            raise ConfigError("sector production: stride, channels, hidden and synthetic_rows must be above 0")
        if self.num_folds:
            raise ConfigError("sector production: its test engines are fixed, so there are no folds: set num_folds=0")
        if {len(self.centre), len(self.scale)} not in ({0}, {len(INPUTS)}) or min(self.scale, default=1.0) <= 0:
            raise ConfigError(
                f"sector production: centre and scale need {len(INPUTS)} numbers each, scale above 0; found "
                f"{list(self.centre)} and {list(self.scale)}"
            )

    def files(self) -> tuple[Path, ...]:
        where = "NASA's Prognostics Center of Excellence (CMAPSSData.zip)"
        return tuple(files.find(name, "C-MAPSS turbofan", where) for name in self.data_files)

    def read(self, paths: tuple[Path, ...]) -> pd.DataFrame:
        """The five published files, or one run to failure: then its engines are of the fleet "own"."""
        if len(paths) == 1:
            return _run_to_failure(_recorded(paths[0]), "own")
        train, test, left, test_3, left_3 = paths
        many = (_run_to_failure(_recorded(train), "FD001"), _cut(test, left, "FD001"), _cut(test_3, left_3, "FD003"))
        return pd.concat(many, ignore_index=True)

    def units(self, table: pd.DataFrame) -> npt.NDArray[np.int64]:
        return _engine_of(table)

    def pool(self, table: pd.DataFrame) -> Pooled:
        schema.check(table, self.schema, "the table of cycles")
        cycles = _Cycles.of(table, "the table of cycles")
        last = cycles.last
        engines = table.iloc[cycles.order[last]]
        split, cut = self._split_engines(engines, last - cycles.first + 1)
        place = np.arange(len(table))
        to_end = (last - cut)[cycles.engine] - place
        regular = (to_end % self.stride == 0) & (place - cycles.first[cycles.engine] >= WINDOW - 1)
        wanted = (to_end == 0) | ((to_end > 0) & regular & (split != TEST)[cycles.engine])
        ends = np.flatnonzero(wanted)
        engine = cycles.engine[ends]
        life = (engines["cycle"] + engines["rul"]).to_numpy()
        keys = {"engine": engine, "life": life[engine], "split": split[engine]}
        return Pooled(_rows(table, cycles, ends, self.max_rul), keys, split[engine])

    def _split_engines(
        self, engines: pd.DataFrame, length: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Split of each of m engines, and how many of its cycles are cut off.  Follows from its number alone.

        -> (m,) index into SPLITS, (m,) cycles.  In a file of one's own one engine trains even if all were drawn.
        """
        fleet, unit = engines["fleet"].to_numpy(), engines["unit"].to_numpy()
        published = (fleet == "FD001").astype(bool)
        draw = np.array([self._draw(str(f), int(u)) for f, u in zip(fleet, unit, strict=True)])
        own = np.flatnonzero(fleet == "own")
        if len(own):
            draw[own[draw[own].argmax()]] = 1.0
        test_fraction = np.where(published, 0.0, self.test_fraction)
        split = np.full(len(engines), TRAIN, np.int8)
        split[draw < test_fraction + self.validation_fraction] = VALIDATION
        split[draw < test_fraction] = TEST
        split[published & (engines["source"] == "test").to_numpy()] = TEST
        cut = np.zeros(len(engines), np.int64)
        for i in np.flatnonzero((fleet == "own") & (split == TEST)):
            most = int(min(CUT_MOST, max(length[i] - WINDOW, 0)))
            cut[i] = self.rng("cut", int(unit[i])).integers(min(CUT_LEAST, most), most + 1)
        return split, cut

    def _draw(self, fleet: str, unit: int) -> float:
        """A number in [0, 1) for an engine: of BLOCK consecutive engines one in each BLOCKth of the interval."""
        block, place = divmod(unit - 1, BLOCK)
        rng = self.rng("engines", fleet, block)
        return float((rng.permutation(BLOCK)[place] + rng.random(BLOCK)[place]) / BLOCK)

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        """Windows of an engine are one group."""
        return pooled.keys["engine"]

    def labels(self, rows: Rows) -> npt.NDArray[Any]:
        """(n,) bins of 25 cycles left."""
        return (rows["y"] // BIN).astype(np.int64)

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        """Engines that train, that validate and that are test points are dealt one after another, each evenly."""
        _, first, row_engine = np.unique(pooled.keys["engine"], return_index=True, return_inverse=True)
        split, life = pooled.keys["split"][first], pooled.keys["life"][first]
        apart = pooled.rows["fleet"][first] == FD003
        if self.partition != "fleets" or num_parts == 1 or apart.all():
            apart = np.zeros(len(first), bool)
        others = num_parts - 1 if apart.any() else num_parts
        training = int((split[~apart] == TRAIN).sum())
        if training < others:
            kept, instead = ("", "") if others == num_parts else (" but the last, FD003's", ", or partition=uniform")
            raise DataError(
                f"{training} training engines cannot be divided into {num_parts} parts, one or more for each{kept}: "
                f"use at most {training + num_parts - others} nodes{instead}"
            )
        rank = self.rng("partition").random(len(first)) if self.partition == "uniform" else life
        owner = np.full(len(first), num_parts - 1, np.int64)
        for name in (TRAIN, VALIDATION, TEST):
            members = np.flatnonzero((split == name) & ~apart)
            members = members[np.argsort(rank[members], kind="stable")]
            owner[members] = np.arange(len(members)) * others // max(len(members), 1)
        return owner[row_engine]

    def features(self, table: pd.DataFrame) -> Rows:
        """x (n, 30, 14) of a raw table: of each of its n cycles the window that ends there.  Raises DataError.

        Needed are unit, cycle and INPUTS.  With `rul` also y (n,), capped, with `fleet` also fleet (n,).
        """
        schema.check(table, (UNIT, CYCLE, *INPUTS), "the table of cycles")
        cycles = _Cycles.of(table, "the table of cycles")
        back = np.argsort(cycles.order)
        return _rows(table, cycles, back, self.max_rul)

    def statistic_specs(self) -> tuple[CountSpec, ...]:
        """Moments of each input's position within its range, at the last cycle of every window."""
        return moments.specs(len(INPUTS))

    def statistics(self, rows: Rows) -> Counts:
        return moments.of(_rounded(rows["x"][:, -1].astype(np.float64), POSITION_STEPS))

    def statistics_problem(self, counts: Counts) -> str | None:
        return moments.problem(counts, int(counts["rows"]))

    def fit(self, totals: Counts) -> dict[str, Any]:
        """`centre` and `scale`: mean and deviation of each input's position."""
        mean, deviation = moments.mean_and_deviation(totals)
        return {"centre": mean.tolist(), "scale": deviation.clip(min=SCALE_LEAST).tolist()}

    def build_model(self) -> nn.Module:
        return network(self.channels, self.hidden)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs (B,): cycles left, as a share of `max_rul`."""
        x = batch["x"]
        centre, scale = (x.new_tensor(v) for v in (self.centre or CENTRE, self.scale or SCALE))
        # Wear grows exponentially, and a failing fan lies 9 deviations out: the logarithm is nearly straight in time.
        outputs: Tensor = model(torch.asinh((x - centre) / scale).transpose(1, 2))
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Squared error of each row as a share of `max_rul`.  -> (B,)"""
        return (outputs - batch["y"].to(outputs.dtype) / self.max_rul) ** 2

    def predict(self, outputs: Tensor) -> npt.NDArray[Any]:
        """(B,) cycles left, 0 to `max_rul`."""
        return (outputs.detach() * self.max_rul).clamp(0.0, self.max_rul).cpu().numpy()

    def count_specs(self) -> tuple[CountSpec, ...]:
        n = len(FLEETS)
        return (
            CountSpec("squared_error", (n,), "float64", self.max_rul**2),
            CountSpec("nasa_score", (n,), "float64", math.exp(self.max_rul / 10)),
            CountSpec("points", (n,), "int64"),
        )

    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        """Squared error, NASA score and rows, by fleet.  A prediction that is no number counts as 0 cycles left."""
        predicted, y = np.nan_to_num(self.predict(outputs).astype(np.float64)), batch["y"].cpu().numpy()
        error = _rounded(predicted, CYCLE_STEPS) - _rounded(y.astype(np.float64), CYCLE_STEPS)
        fleet = batch["fleet"].cpu().numpy()
        score = _rounded(nasa_score(error), SCORE_STEPS)
        return {
            # of no rows it counts in integers
            "squared_error": np.bincount(fleet, error**2, len(FLEETS)).astype(np.float64),
            "nasa_score": np.bincount(fleet, score, len(FLEETS)).astype(np.float64),
            "points": np.bincount(fleet, minlength=len(FLEETS)),
        }

    def counts_problem(self, counts: Counts) -> str | None:
        """Each row is a point of one fleet, and no error is larger than the cap."""
        points = np.asarray(counts["points"], np.float64)
        if points.sum() != int(counts["rows"]):
            return f"{points.sum():.0f} points of {counts['rows']} rows"
        most = {"squared_error": self.max_rul**2, "nasa_score": math.exp(self.max_rul / 10)}
        found = {name: np.asarray(counts[name], np.float64) for name in most}
        over = [name for name, each in most.items() if (found[name] > each * points * (1 + 1e-9)).any()]
        return f"more {' and '.join(over)} in a fleet than its points allow" if over else None

    def metrics(self, counts: Counts) -> dict[str, float]:
        """Root of the mean squared error, and the *sum* of the NASA scores: of all rows, and by fleet."""
        if not counts:
            return {}
        squares, scores, points = counts["squared_error"], counts["nasa_score"], counts["points"]
        found: dict[str, float] = {}
        if points.sum():
            found |= {"rmse": math.sqrt(squares.sum() / points.sum()), "nasa_score": float(scores.sum())}
        if points[FD001]:
            found |= {"rmse_fd001": math.sqrt(squares[FD001] / points[FD001]), "nasa_fd001": float(scores[FD001])}
        if points[FD003]:
            found["rmse_fd003"] = math.sqrt(squares[FD003] / points[FD003])
        return found

    def generate(self) -> pd.DataFrame:
        """The three published kinds of engines, as many of each, short-lived; FD003's second mode moves other sensors.

        A third of them run to failure; `synthetic_rows` is about how many cycles they have together.
        """
        rng = self.rng("synthetic")
        each = max(4, self.synthetic_rows // 270)
        tables = []
        for fleet, source in (("FD001", "train"), ("FD001", "test"), ("FD003", "test")):
            life = rng.integers(90, 171, each)
            left = rng.integers(CUT_LEAST, life - WINDOW - 5) if source == "test" else np.zeros(each, np.int64)
            fan = (rng.random(each) < 0.5) & (fleet == "FD003")
            tables.append(_generated(rng, fleet, source, life, left, fan))
        return pd.concat(tables, ignore_index=True)


def nasa_score(error: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """exp(d / 10) - 1 of predictions that are d cycles late, exp(-d / 13) - 1 of early ones.  (n,) -> (n,)

    A late one lets the engine fail.  Saxena et al., 2008, eq. 11.
    """
    return np.where(error >= 0, np.expm1(error / 10), np.expm1(-error / 13))


def network(channels: int, hidden: int) -> nn.Sequential:
    """Filters over each third of the window, a layer over what they find, one number.  (B, 14, 30) -> (B,)

    Filters of 10 cycles average the sensors' noise; three places keep the trend without many params.
    """
    body = nn.Sequential(
        nn.Conv1d(len(INPUTS), channels, kernel_size=FILTER, stride=FILTER),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * (WINDOW // FILTER), hidden),
        nn.ReLU(),
    )
    return nn.Sequential(OrderedDict(body=body, head=nn.Sequential(nn.Linear(hidden, 1), Squeeze())))


@dataclass(frozen=True, slots=True, eq=False)
class _Cycles:
    """Rows of a table in the order of engines and their cycles: n places of m engines."""

    order: npt.NDArray[np.int64]
    """(n,) row of the table at each place."""
    engine: npt.NDArray[np.int64]
    """(n,) engine 0..m-1 at each place."""
    first: npt.NDArray[np.int64]
    """(m,) place of each engine's first cycle."""

    @classmethod
    def of(cls, table: pd.DataFrame, origin: str) -> _Cycles:
        """Raises DataError where the cycles of an engine do not follow one another."""
        engine, cycle = _engine_of(table), table["cycle"].to_numpy(np.int64)
        order = np.lexsort((cycle, engine))
        engine, cycle = engine[order], cycle[order]
        within = engine[1:] == engine[:-1]
        odd = np.flatnonzero(within & (np.diff(cycle) != 1))
        if len(odd):
            unit = table["unit"].iloc[order[odd[0]]]
            raise DataError(
                f"{origin} has cycle {cycle[odd[0] + 1]} of unit {unit:g} after its cycle {cycle[odd[0]]}: needed is "
                "one line a cycle, none left out"
            )
        return cls(order, engine, np.flatnonzero(np.concatenate([[True], ~within])))

    @property
    def last(self) -> npt.NDArray[np.int64]:
        """(m,) place of each engine's last cycle."""
        return np.append(self.first[1:], len(self.order)) - 1


def _engine_of(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    """(n,) engine 0..m-1 of each row, by those of fleet, source and unit that the table has."""
    by = [name for name in ("fleet", "source", "unit") if name in table]
    return np.asarray(table.groupby(by, sort=True).ngroup(), np.int64)


def _rows(table: pd.DataFrame, cycles: _Cycles, ends: npt.NDArray[np.int64], max_rul: float) -> Rows:
    """The windows that end at the places `ends` (k,): x (k, 30, 14), and y and fleet where the table says them.

    x are positions within the declared ranges: 2388.06 rpm with a spread of 0.07 would lose its digits in float32.
    """
    position = (table[[column.name for column in INPUTS]].to_numpy(np.float64) - LOW) / (HIGH - LOW)
    first = cycles.first[cycles.engine[ends]]
    places = np.maximum(ends[:, None] - np.arange(WINDOW - 1, -1, -1), first[:, None])
    rows: Rows = {"x": position.astype(np.float32)[cycles.order[places]]}
    at = cycles.order[ends]
    if "rul" in table:
        rows["y"] = np.minimum(table["rul"].to_numpy(np.float64)[at], max_rul).astype(np.float32)
    if "fleet" in table:
        rows["fleet"] = pd.Index(FLEETS).get_indexer(pd.Index(table["fleet"]))[at].astype(np.int64)
    return rows


def _rounded(values: npt.NDArray[np.float64], steps: int) -> npt.NDArray[np.float64]:
    return np.round(values * steps) / steps


def _recorded(path: Path) -> pd.DataFrame:
    """A published table of cycles.  Raises DataError."""
    table = files.read_text(path, [column.name for column in RECORDED])
    schema.check(table, RECORDED, str(path))
    _Cycles.of(table, str(path))
    whole = {column.name: np.int64 if column.integer else np.float64 for column in RECORDED}
    return table.astype(whole)


def _run_to_failure(table: pd.DataFrame, fleet: str) -> pd.DataFrame:
    """With the cycles left: the last cycle of an engine is its failure."""
    last = table.groupby("unit")["cycle"].transform("max")
    return _of_fleet(table, fleet, "train", last - table["cycle"])


def _cut(path: Path, left_path: Path, fleet: str) -> pd.DataFrame:
    """Engines that were cut, with the cycles left: after the last cycle as many as `left_path` says, line by line."""
    table = _recorded(path)
    left = files.read_text(left_path, [RUL.name])
    schema.check(left, [RUL], str(left_path))
    units = np.unique(table["unit"])
    if len(units) != len(left):
        raise DataError(f"{left_path} has {len(left)} lines for the {len(units)} engines of {path}; needed is one each")
    after = table["unit"].map(dict(zip(units, left[RUL.name].astype(np.int64), strict=True)))
    last = table.groupby("unit")["cycle"].transform("max")
    return _of_fleet(table, fleet, "test", last + after - table["cycle"])


def _of_fleet(table: pd.DataFrame, fleet: str, source: str, rul: pd.Series) -> pd.DataFrame:
    table = table.assign(rul=rul.astype(np.int64))
    table.insert(0, "fleet", pd.Series(fleet, table.index, dtype="str"))
    table.insert(1, "source", pd.Series(source, table.index, dtype="str"))
    return table


def _generated(
    rng: np.random.Generator,
    fleet: str,
    source: str,
    life: npt.NDArray[np.int64],
    left: npt.NDArray[np.int64],
    fan: npt.NDArray[np.bool_],
) -> pd.DataFrame:
    """Cycles of m engines that live `life` (m,) and are observed until `left` (m,) of it are left.

    Wear grows exponentially towards the end and moves each input by its own share of the range; a failing fan moves
    them by others.
    """
    length = life - left
    engine = np.repeat(np.arange(len(life)), length)
    cycle = np.arange(len(engine)) - np.repeat(np.cumsum(length) - length, length) + 1
    rul = life[engine] - cycle
    wear = np.exp(-rul / 45.0)[:, None]
    moved = np.where(fan[engine][:, None], _FAN, _COMPRESSOR) * wear
    position = 0.5 + 0.25 * moved + rng.normal(0.0, 0.04, (len(engine), len(INPUTS)))
    table = pd.DataFrame({"unit": engine + 1, "cycle": cycle})
    for setting, typical in zip(SETTINGS, (0.0, 0.0, 100.0), strict=True):
        table[setting.name] = typical
    inputs = {column.name: LOW[i] + (HIGH - LOW)[i] * position[:, i].clip(0, 1) for i, column in enumerate(INPUTS)}
    for column in SENSORS:
        table[column.name] = inputs.get(column.name, (column.low + column.high) / 2)  # type: ignore[operator]
    return _of_fleet(table, fleet, source, pd.Series(rul))


_COMPRESSOR = np.array([1.0, 0.9, 1.0, -0.9, 0.7, 0.6, 1.0, -1.0, 0.7, 0.5, 1.0, 0.9, -1.0, -1.0])
_FAN = np.array([0.6, 0.5, 0.6, 0.9, 0.7, 0.6, 0.8, 0.9, 0.7, 0.5, -0.9, 0.6, -0.4, -0.5])
"""How far wear moves each input, in quarters of its range, by fault mode."""
