"""How nodes' inputs differ: by column where they are numbers, by brightness where they are images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.readiness.federation import Federation
from experiments.readiness.findings import Brightness, Shift
from sectors.tabular import Tabular

PROBE = 64
"""Units that are enough to see which raw column moves which input."""
NUM_BINS = 40


def shift_of(f: Federation) -> Shift | None:
    """Standardised mean differences of inputs that are numbers; a window counts by its mean."""
    x = [node.column("x") for node in f.nodes]
    if x[0].dtype.kind != "f" or x[0].ndim not in (2, 3) or len(x) < 2 or _is_image(f, x[0]):
        return None
    flat = [v.astype(np.float64).mean(axis=1) if v.ndim == 3 else v.astype(np.float64) for v in x]
    n = np.array([np.isfinite(v).sum(axis=0) for v in flat], np.float64)
    sums = np.array([np.nansum(v, axis=0) for v in flat])
    total = n.sum(axis=0)
    mean = sums.sum(axis=0) / np.maximum(total, 1)
    deviation = np.sqrt(np.sum([np.nansum((v - mean) ** 2, axis=0) for v in flat], axis=0) / np.maximum(total, 1))
    rest, known = sums.sum(axis=0) - sums, (n > 0) & (total - n > 0) & (deviation > 0)
    apart = sums / np.maximum(n, 1) - rest / np.maximum(total - n, 1)
    values = np.divide(apart, deviation, out=np.zeros_like(apart), where=known)
    return Shift(_input_names(f, flat[0].shape[1]), tuple(tuple(map(float, row)) for row in values))


def brightness_of(f: Federation) -> Brightness | None:
    """Histograms of the mean intensity of images."""
    x = [node.column("x") for node in f.nodes]
    if not _is_image(f, x[0]):
        return None
    means = [v.reshape(len(v), -1).mean(axis=1, dtype=np.float64) for v in x]
    whole = np.concatenate(means)
    edges = np.linspace(whole.min(), max(whole.max(), whole.min() + 1e-9), NUM_BINS + 1)
    shares = [np.histogram(m, edges)[0] / max(len(m), 1) for m in means]
    return Brightness(tuple(map(float, edges)), tuple(tuple(map(float, s)) for s in shares))


def _is_image(f: Federation, x: npt.NDArray[Any]) -> bool:
    return x.ndim >= 3 and (x.dtype == np.uint8 or any(len(c.shape) >= 2 for c in f.sector.schema))


def _input_names(f: Federation, width: int) -> tuple[str, ...]:
    """A name for each column of x: the raw column that moves it, found by moving one after another."""
    if isinstance(f.sector, Tabular):
        inputs = f.sector.inputs
        numbers = [c.name for c in f.sector.numbers]
        categories = [f"{c.name}={value}" for c in inputs for value in c.categories or ()]
        return (*numbers, *categories, *(f"{c.name} missing" for c in inputs if c.optional))
    names = [f"x{i}" for i in range(width)]
    table = next(iter(f.sources.values())).table
    if not isinstance(table, pd.DataFrame):
        return tuple(names)
    units = np.asarray(f.sector.units(table))
    few = f.sector.select(table, np.isin(units, pd.unique(units[:PROBE])))
    before = f.sector.features(few)["x"]
    moves: dict[str, npt.NDArray[np.int64]] = {}
    for name in few.columns:
        try:
            after = f.sector.features(few.assign(**{name: few[name].to_numpy()[::-1]}))["x"]
        except Exception:  # a column that a row cannot be without, such as the cycle of a window
            continue
        moves[name] = np.unique(np.nonzero(~((before == after) | (np.isnan(before) & np.isnan(after))))[-1])
    # columns that move much (a time, an engine) name only what nothing else does
    for name, moved in sorted(moves.items(), key=lambda item: -len(item[1])):
        for place, i in enumerate(moved):
            names[i] = name if len(moved) == 1 else f"{name} {place + 1}"
    return tuple(names)
