"""What is examined: the tables of all nodes in one place, each node's rows, and where those stand in the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.schema import DataSource, NodeSpec, NodeTask, RunConfig
from experiments.readiness.findings import SCHEMA, SPLIT, ColumnSeen, Finding, each, raised
from experiments.readiness.source import Source, read_source
from experiments.readiness.variants import ROW, Given, Traced, variant
from sectors.base import SPLITS, NodeData, Place, Rows, Sector, concatenate, place_of, take
from trellis.types import Role


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A node's rows as it loads them, and where they stand in the pooled table."""

    spec: NodeSpec
    place: Place
    source: Source
    data: NodeData
    index: dict[str, npt.NDArray[np.int64]]
    """By split."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def trains(self) -> bool:
        return self.spec.role is Role.train

    def pooled(self, split: str) -> Rows:
        """Its rows of a split as they were before `localise`."""
        return take(self.source.pooled.rows, self.index[split])

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column of all its rows."""
        return np.concatenate([self.data.split(split)[name] for split in SPLITS])


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """All nodes that could be loaded."""

    sector: Sector
    synthetic: bool
    sources: dict[Path | None, Source]
    """By the file of a node's own; None: the shared one."""
    nodes: list[Node]
    columns: tuple[ColumnSeen, ...] = ()

    def split(self, name: str) -> Rows:
        """Rows of all nodes in a split."""
        return concatenate([node.data.split(name) for node in self.nodes])

    def again(self) -> Sector:
        """The sector as it loads a second time, from the tables that were read."""
        return variant(self.sector, Given, tables=self._tables())

    def traced(self) -> Sector:
        """The sector with a mark on every row."""
        return variant(self.sector, Traced, tables=self._tables())

    def source_of_server(self) -> Source:
        """Where the server's own rows come from; its own file is no node's."""
        path = Path(self.sector.server_path) if self.sector.server_path is not None else None
        return self.sources.get(path) or read_source(self.sector, path, synthetic=self.synthetic)

    def _tables(self) -> dict[tuple[Path, ...], Any]:
        return {source.paths: source.table for source in self.sources.values()}


def evenly(n: int, most: int) -> npt.NDArray[np.int64]:
    """Places of up to `most` of n things, spread over all of them."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def gather(config: RunConfig, sector: Sector) -> tuple[Federation, list[Finding]]:
    """The federation, and what of it is refused.  Raises ConfigError where the nodes do not compose."""
    specs, task = config.nodes.expand(), NodeTask.of(config)
    places = {spec.name: place_of(spec, task) for spec in specs}
    federation = Federation(sector, config.data is DataSource.synthetic, {}, [])
    unread = _read(federation, places)
    return federation, unread + _load(federation, specs, places)


def _read(federation: Federation, places: Mapping[str, Place]) -> list[Finding]:
    """Reads the tables of all nodes; a file that is refused is a finding."""
    found = []
    owner = {place.path: name if place.path else "" for name, place in places.items()}
    for path, name in owner.items():
        try:
            federation.sources[path] = read_source(federation.sector, path, synthetic=federation.synthetic)
        except Exception as error:  # whatever a loader raises, its owner is told which file it was
            found.append(Finding(SCHEMA, False, raised(error), name))
    return found


def _load(federation: Federation, specs: Sequence[NodeSpec], places: Mapping[str, Place]) -> list[Finding]:
    """Loads the nodes whose tables were read; what keeps one from it is a finding."""
    traced, refused = federation.traced(), {}
    for spec in specs:
        place = places[spec.name]
        if place.path not in federation.sources:
            continue
        try:
            data, where = federation.sector.load(place), traced.load(place)
            index = {split: where.split(split)[ROW] for split in SPLITS}
            federation.nodes.append(Node(spec, place, federation.sources[place.path], data, index))
        except Exception as error:  # see above
            refused[spec.name] = raised(error)
    if len(set(refused.values())) == 1 and len(refused) > 1:
        return [Finding(SPLIT, False, next(iter(refused.values())))]
    return each(SPLIT, False, refused)
