"""The contract of a task.

A `Sector` is a frozen dataclass whose fields are the options of its YAML.  It says what the data are, what the model
is, what a row's loss is and how predictions are counted.  The library owns the rest: loop, optimizer, shuffling,
privacy.

Data are *rows*: a dict of arrays of one leading length (a row may be a vector, an image, a window of cycles, a basket).
Metrics are computed from *additive counts*: summed over nodes they give the federation's metric, exactly as if the rows
had been scored in one place, and they are all that leaves a node under secure aggregation.

Nothing is fitted on rows that are not a node's own.  What preprocessing needs to know comes from published constants,
from the node's own training rows (`localise`), or from one round of additive *statistics* of all nodes' training rows
(`statistics`, summed, `fit`).

    read -> schema -> pool -> owners (which node) -> split (train, validation, test) -> localise
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from conf.schema import DataSource, NodeSpec, NodeTask
from sectors import files, partition
from sectors.schema import Column, Table
from trellis import canonical
from trellis.errors import ConfigError, DataError, MissingData
from trellis.types import LOSS_MAX, Counts, MetricSpec, Role
from trellis.vectors import CountSpec

Rows = dict[str, npt.NDArray[Any]]
Batch = dict[str, Tensor]

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST, OWN = 0, 1, 2, -1
"""Index into SPLITS; OWN: the node's own split decides."""

SERVER_FRACTION_MAX = 0.5


@dataclass(frozen=True, slots=True)
class NodeData:
    """One node's rows, split once.  A held-out node has rows in its own split only."""

    train: Rows
    validation: Rows
    test: Rows

    def split(self, name: str) -> Rows:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True, slots=True)
class Place:
    """Whose rows to load: part `part` of `num_parts` of the shared file, or all of a file of one's own."""

    part: int
    num_parts: int
    role: Role = Role.train
    path: Path | None = None
    synthetic: bool = False
    holds_out: bool = False
    """Whether whole nodes of this federation are held out; then a training node trains on all its rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """All rows of a source before they are divided, and the columns that only the division may look at.

    A column in `keys` (an amount, a time, an engine, a patient) never reaches a model.
    """

    rows: Rows
    keys: Rows
    split: npt.NDArray[np.int8] | None = None
    """(n,) index into SPLITS of rows that are set aside already (an official test set, a split by time), OWN for those
    that the node divides itself.  None: all of them."""


def place_of(spec: NodeSpec, task: NodeTask) -> Place:
    """Whose rows a node of the federation loads for a task."""
    return Place(
        part=spec.part or 0,
        num_parts=task.num_parts,
        role=spec.role,
        path=Path(spec.data_path) if spec.data_path else None,
        synthetic=task.data is DataSource.synthetic,
        holds_out=task.holds_out,
    )


def num_rows(rows: Rows) -> int:
    """Length of the rows; 0 for none."""
    return len(next(iter(rows.values()))) if rows else 0


def take(rows: Rows, index: npt.NDArray[Any]) -> Rows:
    """The rows at `index`, every column."""
    return {k: v[index] for k, v in rows.items()}


def concatenate(many: list[Rows]) -> Rows:
    """Rows of several nodes, one after another."""
    some = [rows for rows in many if num_rows(rows)]
    return {k: np.concatenate([rows[k] for rows in some]) for k in some[0]} if some else {}


@dataclass(frozen=True)
class Sector(ABC):
    """One task.  Subclasses are frozen dataclasses; `sectors.get(name, options)` builds them."""

    name: ClassVar[str]
    title: ClassVar[str]
    """One line for `trellis sectors`."""
    primary: ClassVar[MetricSpec]
    """The metric that decides which version is best."""
    metric_specs: ClassVar[tuple[MetricSpec, ...]]
    """Every metric `metrics` returns besides `loss`, the primary one included."""
    data_files: ClassVar[tuple[str, ...]] = ()
    """Files under the data folder; empty when the data come with a package."""
    needs_all_files: ClassVar[bool] = False
    """Whether all of `data_files` are needed; else the first of them that is there is read."""
    num_classes: ClassVar[int | None] = None
    """Classes 0 .. num_classes - 1 that `y` names; None where rows have none."""
    target: ClassVar[str] = "y"
    """The column of the raw table that `y` comes from."""
    schema: ClassVar[tuple[Column, ...]] = ()
    """The columns of the raw table, with units, categories and ranges: a file that disagrees is refused."""
    fitted_options: ClassVar[tuple[str, ...]] = ()
    """Options that `fit` sets.  Rows never depend on them: only `forward` does."""
    identifier: ClassVar[str | None] = None
    """The column of the raw table that says whom rows are about; one may be known to one node only."""
    head: ClassVar[tuple[str, ...]] = ()
    """Patterns of the names of the last layers' tensors: what `local_layers=["head"]` keeps at the node."""

    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    """Shares of a node's rows that it validates and tests on, unless whole nodes are held out."""
    split_seed: int = 0
    """Partition, split and generated rows follow this seed, never the run's: runs are compared on the same rows."""
    num_folds: int = 0
    """Above 0 a node tests on fold `fold` of so many of its rows, class by class, instead of on `test_fraction`."""
    fold: int = 0
    synthetic_rows: int = 1000
    """How many rows `generate` makes."""
    server_fraction: float = 0.0
    """Share of the pooled rows that the server holds itself: held out before the partition, no node has them."""
    server_path: str | None = None
    """A file of the server's own, in the sector's format."""
    local_layers: tuple[str, ...] = ()
    """Patterns of tensors that stay at the node, never sent and never aggregated; "head": the sector's last layers."""

    def __post_init__(self) -> None:
        shares = (self.validation_fraction, self.test_fraction)
        if min(shares) < 0 or sum(shares) >= 1:
            raise ConfigError(
                f"sector {self.name}: validation_fraction and test_fraction are {shares}; "
                "they must be at least 0 and leave rows to train on"
            )
        if self.num_folds and not (0 <= self.fold < self.num_folds and self.num_folds > 1):
            raise ConfigError(
                f"sector {self.name}: fold is {self.fold} of num_folds={self.num_folds}; folds are counted from 0, "
                "and there must be 2 or more"
            )
        if not 0 <= self.server_fraction <= SERVER_FRACTION_MAX:
            raise ConfigError(
                f"sector {self.name}: server_fraction is {self.server_fraction}; it must be between 0 and "
                f"{SERVER_FRACTION_MAX}: the rows are the nodes'"
            )
        if self.server_fraction and self.server_path is not None:
            raise ConfigError(
                f"sector {self.name}: server_fraction={self.server_fraction} and server_path={self.server_path} both "
                "name rows for the server: set one of the two"
            )

    def load(self, place: Place) -> NodeData:
        """This node's rows, split reproducibly.  Raises DataError, MissingData.

        A training node divides its rows into train, validation and test, unless the federation holds out whole nodes;
        a held-out node has all its rows in the split of its role.  Files are read and divided once a process.
        """
        source = _source(self, place)
        divided = _divide(self, source, None if place.path else place.num_parts)
        # A file of one's own is split alike wherever its node stands in the list.
        part = 0 if place.path else place.part
        if not 0 <= part < len(divided.parts):
            raise DataError(f"sector {self.name}: there is no part {part} of {len(divided.parts)} parts")
        index = divided.parts[part]
        pooled = _pool(self, source)
        rows = take(pooled.rows, index)
        groups = None if divided.groups is None else divided.groups[index]
        fixed = np.full(len(index), OWN, np.int8) if pooled.split is None else pooled.split[index]
        if place.role is not Role.train or place.holds_out:
            split = _whole(fixed, place.role)
        else:
            split = self._split(rows, fixed, groups, self.rng("split", "own" if place.path else part))
        data = NodeData(*(take(rows, np.flatnonzero(split == i)) for i in range(len(SPLITS))))
        return self._localised(data, rows)

    def _split(
        self, rows: Rows, fixed: npt.NDArray[np.int8], groups: npt.NDArray[Any] | None, rng: np.random.Generator
    ) -> npt.NDArray[np.int8]:
        """(n,) index into SPLITS of each row of a node that trains, validates and tests."""
        split = fixed.copy()
        free = fixed == OWN
        if groups is not None:  # what belongs to a row that is set aside for testing must not train, nor test twice
            free &= ~np.isin(groups, groups[fixed == TEST])
        own = np.flatnonzero(free)
        labels, groups = self.labels(take(rows, own)), None if groups is None else groups[own]
        if self.num_folds and (fixed == TEST).any() and not len(own):
            raise ConfigError(f"sector {self.name}: its test rows are set aside already, no folds of them: num_folds=0")
        if self.num_folds:
            drawn = partition.fold_split(labels, self.num_folds, self.fold, self.validation_fraction, rng, groups)
        else:
            fractions = (self.validation_fraction, self.test_fraction)
            drawn = partition.stratified_split(labels, fractions, rng, groups)
        for i, members in enumerate(drawn):
            split[own[members]] = i
        return split

    def _localised(self, data: NodeData, rows: Rows) -> NodeData:
        """The node's splits, normalised by its training rows; a node without any goes by what it has."""
        reference = data.train if num_rows(data.train) else rows
        return NodeData(*(self.localise(data.split(name), reference) for name in SPLITS))

    @property
    def server_data(self) -> str:
        """Where the server's own rows come from: none, fraction or path."""
        if self.server_path is not None:
            return "path"
        return "fraction" if self.server_fraction else "none"

    def server_rows(self, synthetic: bool) -> Rows:
        """The server's own rows, for a rule that trusts them.  Raises ConfigError where it has none; DataError.

        A share of the pooled rows follows `split_seed`, like the partition: with another seed they are others.
        """
        if self.server_data == "none":
            raise ConfigError(
                f"sector {self.name} gives the server no rows of its own: set sector.options.server_fraction=0.02, "
                "or sector.options.server_path to a file in the sector's format"
            )
        path = Path(self.server_path) if self.server_path is not None else None
        source = _source(self, Place(0, 1, path=path, synthetic=synthetic))
        rows = _pool(self, source).rows
        rows = rows if path is not None else take(rows, _held_out(self, source))
        if not num_rows(rows):
            raise DataError(f"sector {self.name}: server_fraction={self.server_fraction} of the rows is not one row")
        return self.localise(rows, rows)

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A generator that depends on `split_seed`, the sector and the purpose only."""
        return np.random.default_rng(canonical.seed_for(self.split_seed, self.name, *purpose))

    def files(self) -> tuple[Path, ...]:
        """The shared data files; none when the data come with a package.  Raises MissingData."""
        return ()

    def fingerprint(self, synthetic: bool) -> str:
        """sha256 of what the shared rows come from, equal wherever the data folder is; "" when the files are not here.

        Of files: their names and bytes.  Of generated or packaged rows: what they follow from.  A server needs no
        files but one of its own (`server_path`), and those that single nodes own (`data_path`) do not count.  A run is
        continued on the data it was started with.
        """
        shared = self._shared_fingerprint(synthetic)
        if self.server_path is None:
            return shared
        return canonical.digest([shared, files.digest(Path(self.server_path))])

    def _shared_fingerprint(self, synthetic: bool) -> str:
        if synthetic:
            return canonical.digest(f"synthetic:{self.name}:{self.split_seed}:{self.synthetic_rows}")
        try:
            found = [[path.name, files.digest(path)] for path in self.files()]
        except MissingData:
            return ""
        return canonical.digest(found or f"packaged:{self.name}")

    @abstractmethod
    def read(self, paths: tuple[Path, ...]) -> Any:
        """The raw table of `files()`, or of a node's own file, with the published columns.  Raises DataError."""

    @abstractmethod
    def generate(self) -> Any:
        """Generated rows with the columns of the raw table and something to learn, from `rng("synthetic")`."""

    @abstractmethod
    def pool(self, table: Any) -> Pooled:
        """Every row of a raw table, repeats dropped, beside what `owners` and `groups` need to know of it."""

    @abstractmethod
    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        """Which part owns each row.  -> (n,) in 0..num_parts-1.  Draws come from `rng("partition")`."""

    def groups(self, pooled: Pooled) -> npt.NDArray[Any] | None:
        """A group id of each row, (n,); rows of a group stay at one node and in one split.  None: rows are alone."""
        return None

    def labels(self, rows: Rows) -> npt.NDArray[Any]:
        """What the split is stratified by, (n,): the label, or bins of a continuous one."""
        return rows["y"]

    def units(self, table: Any) -> npt.NDArray[Any]:
        """An id of each leading row of the raw table; rows with one id (an engine's, a customer's) belong together.

        Law:  rows that `pool` makes of some units do not depend on which others are in the table.
        """
        return np.arange(len(_column(table)))

    def select(self, table: Any, chosen: npt.NDArray[np.bool_]) -> Any:
        """The leading rows of the raw table where `chosen` (n,) holds."""
        if isinstance(table, dict):
            return {key: values[chosen] for key, values in table.items()}
        return table[chosen].reset_index(drop=True)

    def localise(self, rows: Rows, reference: Rows) -> Rows:
        """Rows normalised by the node's own training rows, `reference`: what its scanner adds to all of them."""
        return rows

    def statistic_specs(self) -> tuple[CountSpec, ...]:
        """What `statistics` returns, each with the most that one row adds to it; none: no statistics round."""
        return ()

    def statistics(self, rows: Rows) -> Counts:
        """Additive statistics of a node's training rows: sums and counts, nothing else leaves it.

        Law:  `statistics(a ++ b) == statistics(a) + statistics(b)`.
        """
        return {}

    def statistics_problem(self, counts: Counts) -> str | None:
        """Why no rows can have these statistics, or None.  Shapes, and bounds per row, have been checked."""
        return None

    def fit(self, totals: Counts) -> dict[str, Any]:
        """Summed statistics -> values for this sector's options (a scaler, a vocabulary), of JSON's types."""
        return {}

    def all_statistics(self, rows: Rows) -> Counts:
        """`statistics`, and the number of rows they are of."""
        return {**self.statistics(rows), "rows": np.asarray(num_rows(rows), np.int64)}

    def all_statistic_specs(self) -> dict[str, CountSpec]:
        """`statistic_specs` and the number of rows, by name; empty where nothing is fitted."""
        specs = self.statistic_specs()
        return {spec.name: spec for spec in (*specs, CountSpec("rows", (), "int64"))} if specs else {}

    def fitted_on(self, rows: Rows) -> Sector:
        """This sector with what is fitted taken from some training rows alone."""
        return self.fitted(self.fit(self.all_statistics(rows))) if self.statistic_specs() and num_rows(rows) else self

    def fitted(self, options: Mapping[str, Any]) -> Sector:
        """This sector with what `fit` gave; lists become tuples.  Raises TypeError for types that JSON has not."""
        odd = [k for k, v in options.items() if not isinstance(v, str | int | float | list | tuple)]
        if odd:
            raise TypeError(f"sector {self.name}: fit gives {', '.join(odd)} in a type that JSON has not")
        return replace(self, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A fresh model without hidden state; its initial params follow torch's seed."""

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of each row.  -> (B,), never a mean."""

    @abstractmethod
    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        """Additive counts of a batch, beside those the library keeps (`loss_sum`, `rows`)."""

    @abstractmethod
    def count_specs(self) -> tuple[CountSpec, ...]:
        """Name, shape and dtype of what `counts` returns: the server refuses a reply that has anything else."""

    def all_counts(self) -> dict[str, CountSpec]:
        """`count_specs` and the library's own counts, by name."""
        own = (CountSpec("loss_sum", (), "float64", LOSS_MAX), CountSpec("rows", (), "int64"))
        return {spec.name: spec for spec in (*self.count_specs(), *own)}

    def counts_problem(self, counts: Counts) -> str | None:
        """Why no rows can have these counts (those of `all_counts`), or None; shapes and bounds have been checked.

        Counts are all that is known of a node's rows: they must be those of `rows` rows, neither fewer nor more.
        """
        return None

    @abstractmethod
    def metrics(self, counts: Counts) -> dict[str, float]:
        """Metrics from summed counts.  A metric that the counts cannot give (one class only) is left out."""

    @abstractmethod
    def features(self, table: Any) -> Rows:
        """Rows of a raw table (a pandas DataFrame with the published columns) for prediction; labels may be missing."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's outputs for a batch."""
        outputs: Tensor = model(batch["x"])
        return outputs

    def predict(self, outputs: Tensor) -> npt.NDArray[Any]:
        """What a user of the model sees for a batch of outputs; here probabilities of a binary logit."""
        return torch.sigmoid(outputs).detach().cpu().numpy()

    def is_local(self, name: str) -> bool:
        """Whether the tensor `name` stays at the node (never sent, never aggregated)."""
        return any(fnmatchcase(name, pattern) for pattern in self.local_patterns())

    def local_patterns(self) -> list[str]:
        """`local_layers` with the head's patterns in the place of "head"."""
        return [p for given in self.local_layers for p in (self.head if given == "head" else (given,))]


@dataclass(frozen=True, slots=True)
class _Source:
    """What a pooled table is cached by: files and their stamps, or none for generated and packaged rows."""

    paths: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]
    synthetic: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Divided:
    """Rows of each part, and the group of every row of the pooled table."""

    parts: tuple[npt.NDArray[np.int64], ...]
    groups: npt.NDArray[Any] | None


def _source(sector: Sector, place: Place) -> _Source:
    if place.path is not None:  # a file of one's own is never replaced by generated rows
        return _Source((place.path,), (files.stamp(place.path),), synthetic=False)
    if place.synthetic:
        return _Source((), (), synthetic=True)
    paths = sector.files()
    return _Source(paths, tuple(files.stamp(p) for p in paths), synthetic=False)


def _pool(sector: Sector, source: _Source) -> Pooled:
    return _pooled(_of_rows(sector), source)


def _divide(sector: Sector, source: _Source, num_parts: int | None) -> _Divided:
    """`num_parts` parts; with None all rows are one part and `owners` is not asked."""
    return _divided(_of_rows(sector), source, num_parts)


def _of_rows(sector: Sector) -> Sector:
    """The sector without what no pooled row depends on, so that rows are read once for all of its variants."""
    apart = {*sector.fitted_options, "local_layers", "num_folds", "fold"}
    changed = {f.name: f.default for f in fields(sector) if f.name in apart and getattr(sector, f.name) != f.default}
    return replace(sector, **changed) if changed else sector


@lru_cache(maxsize=64)
def _pooled(sector: Sector, source: _Source) -> Pooled:
    return sector.pool(sector.generate() if source.synthetic else sector.read(source.paths))


@lru_cache(maxsize=64)
def _divided(sector: Sector, source: _Source, num_parts: int | None) -> _Divided:
    pooled = _pooled(sector, source)
    groups = sector.groups(pooled)
    index = np.arange(num_rows(pooled.rows))
    if num_parts is None:
        return _Divided((index,), groups)
    if sector.server_fraction:
        index = np.delete(index, _held_out(sector, source))
        split = None if pooled.split is None else pooled.split[index]
        pooled = Pooled(take(pooled.rows, index), take(pooled.keys, index), split)
    owners = sector.owners(pooled, num_parts)
    if groups is not None:
        owners = partition.together(owners, groups[index])
    return _Divided(tuple(index[part] for part in partition.parts_of(owners, num_parts)), groups)


def _held_out(sector: Sector, source: _Source) -> npt.NDArray[np.int64]:
    """Pooled rows that are the server's: of every class its share, whole groups, none that is set aside already."""
    pooled = _pool(sector, source)
    groups = sector.groups(pooled)
    free = np.arange(num_rows(pooled.rows))
    if pooled.split is not None:
        free = np.flatnonzero((pooled.split == OWN) | (pooled.split == TRAIN))
    shares = (sector.server_fraction, 0.0)
    labels = sector.labels(take(pooled.rows, free))
    drawn = partition.stratified_split(labels, shares, sector.rng("server"), None if groups is None else groups[free])
    return free[drawn[1]]


def _whole(fixed: npt.NDArray[np.int8], role: Role) -> npt.NDArray[np.int8]:
    """(n,) index into SPLITS of the rows of a node that does one thing only; -1: it does not use the row.

    What a publisher set aside for testing is tested on, never trained or chosen by.
    """
    official = fixed == TEST
    if role is Role.test:
        return np.where(official | ~official.any(), TEST, OWN).astype(np.int8)
    return np.where(official, OWN, SPLITS.index(role.value)).astype(np.int8)


def _column(table: Table) -> Sequence[Any]:
    """One column of a raw table, for its length."""
    return next(iter(table.values())) if isinstance(table, dict) else table.index  # type: ignore[no-any-return]


def to_batch(rows: Rows, index: npt.NDArray[Any] | slice, device: torch.device) -> Batch:
    """Columns of some rows as tensors.  float64 becomes float32; other dtypes are kept."""
    return {
        k: torch.as_tensor(v[index].astype(np.float32) if v.dtype == np.float64 else v[index], device=device)
        for k, v in rows.items()
    }
