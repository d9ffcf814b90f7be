"""A sector with some of its methods replaced: what tells where rows come from, and on what they depend.

`Given` reads nothing again, `Traced` marks every row with its place, `Disturbed` replaces the rows of other nodes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sectors.base import Pooled, Rows, Sector, num_rows, take

ROW = "_row"
"""Column of a traced row: its place in the pooled table."""


class Given(Sector):
    """Mixed into a sector: reads nothing again, and is cached apart from it."""

    tables: ClassVar[dict[tuple[Path, ...], Any]]

    def read(self, paths: tuple[Path, ...]) -> Any:
        return self.tables[paths] if paths in self.tables else super().read(paths)  # type: ignore[safe-super]

    def generate(self) -> Any:
        return self.tables[()]


class _Marked(Sector):
    """Every row carries its place in the pooled table, which nothing of the sector sees."""

    def _unmarked(self, rows: Rows) -> Rows:
        """The rows as the sector is to see them."""
        return untraced(rows)

    def groups(self, pooled: Pooled) -> npt.NDArray[Any] | None:
        return super().groups(dataclasses.replace(pooled, rows=self._unmarked(pooled.rows)))

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        bare = dataclasses.replace(pooled, rows=self._unmarked(pooled.rows))
        return super().owners(bare, num_parts)  # type: ignore[safe-super]

    def labels(self, rows: Rows) -> npt.NDArray[Any]:
        return super().labels(self._unmarked(rows))


class Traced(_Marked, Given):
    """Nothing is localised."""

    def pool(self, table: Any) -> Pooled:
        pooled = super().pool(table)  # type: ignore[safe-super]
        return dataclasses.replace(pooled, rows={**pooled.rows, ROW: np.arange(num_rows(pooled.rows))})

    def localise(self, rows: Rows, reference: Rows) -> Rows:
        return rows


class Disturbed(_Marked):
    """The rows `replaced` are all the same one, yet everything is divided as if they were what they were."""

    original: ClassVar[Pooled]
    replaced: ClassVar[npt.NDArray[np.bool_]]

    def read(self, paths: tuple[Path, ...]) -> Any:
        return None

    def generate(self) -> Any:
        return None

    def pool(self, table: Any) -> Pooled:
        place = np.arange(len(self.replaced))
        shown = np.where(self.replaced, self.replaced.argmax(), place)
        return dataclasses.replace(self.original, rows={**take(self.original.rows, shown), ROW: place})

    def _unmarked(self, rows: Rows) -> Rows:
        return take(self.original.rows, rows[ROW])

    def localise(self, rows: Rows, reference: Rows) -> Rows:
        return super().localise(untraced(rows), untraced(reference))


def untraced(rows: Rows) -> Rows:
    """Rows without their marks."""
    return {k: v for k, v in rows.items() if k != ROW}


def variant(sector: Sector, mixin: type[Any], **given: Any) -> Sector:
    """`sector` with some of its methods replaced by those of `mixin`."""
    kind: type[Sector] = type(type(sector).__name__, (mixin, type(sector)), given)
    return kind(**{f.name: getattr(sector, f.name) for f in dataclasses.fields(sector)})
