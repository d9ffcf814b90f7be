"""A source of rows: a raw table, shared or a node's own, what is pooled of it, and whom those rows are about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sectors.base import Pooled, Sector


@dataclass(frozen=True, eq=False)
class Source:
    """A raw table and its pooled rows."""

    sector: Sector
    paths: tuple[Path, ...]
    """Empty where the table is generated, or comes with a package."""
    origin: str
    table: Any
    pooled: Pooled

    @cached_property
    def units(self) -> npt.NDArray[Any]:
        """(n,) the unit of each leading row of the table."""
        return np.asarray(self.sector.units(self.table))

    @cached_property
    def half(self) -> npt.NDArray[np.bool_]:
        """(n,) the leading rows of half of the units."""
        ids = pd.unique(self.units)
        return np.isin(self.units, np.random.default_rng(0).permutation(ids)[: len(ids) // 2])

    def pool(self, chosen: npt.NDArray[np.bool_]) -> Pooled:
        """What is pooled of some leading rows of the table without the others."""
        return self.sector.pool(self.sector.select(self.table, chosen))

    @cached_property
    def people(self) -> npt.NDArray[Any] | None:
        """(n,) whom each pooled row is about, by the sector's identifier; None where a row names nobody.

        None instead of all where that cannot be known, or the sector has no identifier.
        """
        key = self._identifying()
        if key is None:
            return None
        who = pd.Series(self.pooled.keys[key]).astype(object)
        return np.asarray(who.where(who.notna(), None))

    def _identifying(self) -> str | None:
        """The key that holds the identifier: by its name, or because half of the table gives it those of that half."""
        name = self.sector.identifier
        if name is None or name in self.pooled.keys:
            return name
        if name not in self.table or not self.half.any():
            return None
        known = set(np.asarray(self.sector.select(self.table, self.half)[name]).tolist())
        keys = self.pool(self.half).keys
        found = [key for key, values in keys.items() if len(values) and set(values.tolist()) <= known]
        return found[0] if len(found) == 1 else None


def read_source(sector: Sector, path: Path | None, *, synthetic: bool) -> Source:
    """The source of a node's own file, or with None the shared one.  Raises whatever the loader does."""
    generated = path is None and synthetic
    paths = (path,) if path is not None else () if generated else sector.files()
    table = sector.generate() if generated else sector.read(paths)
    origin = ", ".join(p.name for p in paths) or ("generated rows" if generated else "the packaged table")
    return Source(sector, paths, origin, table, sector.pool(table))
