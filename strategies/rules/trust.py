"""Rules that weigh rows by what else the server knows: its own update (FLTrust), the past of each node (FoolsGold)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from strategies.rows import (
    Float64,
    Rows,
    Updates,
    combine,
    dots,
    products,
    require_rows,
    rows_of,
    sketch,
    squared_norms,
)
from trellis.types import Aggregated, RuleSpec

State = Mapping[str, npt.NDArray[np.generic]]

MAX_HISTORY = 1 << 16
"""Longer histories are kept as count sketches of so many entries: cosines are then good to about 0.004."""
MAX_ABSENT = 100
"""Rounds after which the history of a node that does not come is forgotten."""
HISTORY, ABSENT, SEED = "history/", "absent/", "seed"
"""Keys of FoolsGold's state; a node's name stands behind the first two."""


def fltrust(updates_nd: Updates, *, num_byzantine: int = 0, reference_d: npt.NDArray[np.floating]) -> Aggregated:
    """Mean of the rows cut to the length of the server's own update g0, weighted by max(0, cos(x_i, g0)).

    (n, d), (d,) -> (d,).  Survives any number of liars as long as the server's rows are clean: the answer is never
    longer than g0 nor turned against it.  Nobody trusted: zero, the model stays.  Needs n >= f + 1, else
    CohortTooSmall.
    Cao et al., NDSS 2021, Algorithm 2.  https://arxiv.org/abs/2012.13995
    """
    rows = rows_of(updates_nd)
    d = rows.shape[1]
    n = require_rows("fltrust", rows, num_byzantine + 1, num_byzantine)
    if reference_d.shape != (d,):
        raise ValueError(f"reference_d has shape {reference_d.shape}, the rows have {d} coordinates")
    length = float(np.sqrt(squared_norms(np.asarray(reference_d, np.float32)[None])[0]))
    norms = np.sqrt(squared_norms(rows))
    along = dots(rows, reference_d)
    trust = np.maximum(np.divide(along, norms * length, out=np.zeros(n), where=norms * length > 0), 0.0)
    if trust.sum() <= 0:
        return Aggregated(np.zeros(d, np.float32), np.zeros(n))
    weights_n = trust / trust.sum()
    scaled = weights_n * np.divide(length, norms, out=np.zeros(n), where=norms > 0)
    return Aggregated(combine(rows, scaled), weights_n)


def foolsgold(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    names: Sequence[tuple[str, ...]],
    state: State | None = None,
    rng: np.random.Generator | None = None,
) -> Aggregated:
    """Rows whose histories point the same way count less: sybils with one goal give themselves away.  (n, d) -> (d,)

    A history is the sum of a node's updates, by name.  v_i is the largest cosine of i's history to another's; a row
    that is less alike than its twin is pardoned (scaled by v_i / v_j); weights are logit(1 - v) + 0.5, cut to [0, 1],
    and divided by their sum.  Honest nodes with equal data look like sybils: where nodes are alike it does harm, and
    who copies a node silences it.  Needs n >= 2, else CohortTooSmall.  Histories are forgotten after MAX_ABSENT rounds
    without their node.  Fung et al., RAID 2020, Algorithm 1.  https://arxiv.org/abs/1808.04866
    """
    rows = rows_of(updates_nd)
    require_rows("foolsgold", rows, max(2, num_byzantine + 1), num_byzantine)
    kept = _remembered(rows, ["+".join(members) for members in names], state or {}, rng or np.random.default_rng(0))
    own = np.stack([kept[HISTORY + "+".join(members)] for members in names]).astype(np.float32)
    weights_n = _foolsgold_weights(_cosines(products(own)))
    total = weights_n.sum()
    weights_n = weights_n / total if total > 0 else weights_n
    return Aggregated(combine(rows, weights_n), weights_n, state=kept)


def _remembered(
    rows: Rows, names: Sequence[str], state: State, rng: np.random.Generator
) -> dict[str, npt.NDArray[np.generic]]:
    """The state after this round: each row's history with its update added, those of absent nodes as they were."""
    # one sketch for all rounds, and one that no node can foresee
    seed = state.get(SEED, np.asarray(rng.integers(1 << 62)))
    long = rows.shape[1] > MAX_HISTORY
    short = sketch(rows, sketch_dim=MAX_HISTORY, rng=np.random.default_rng(int(seed))) if long else rows
    new = short.materialised()
    kept: dict[str, npt.NDArray[np.generic]] = {SEED: seed}
    for key, history in state.items():
        name = key.removeprefix(HISTORY)
        absent = int(state.get(ABSENT + name, 0)) + 1
        if key.startswith(HISTORY) and name not in names and absent <= MAX_ABSENT:
            kept |= {key: history, ABSENT + name: np.asarray(absent)}
    for i, name in enumerate(names):
        before = state.get(HISTORY + name)
        kept[HISTORY + name] = new[i] if before is None else new[i] + before.astype(np.float32)
    return kept


def _cosines(about_nn: Float64) -> Float64:
    norms = np.sqrt(about_nn.diagonal())
    scale = norms[:, None] * norms[None, :]
    cosines: Float64 = np.divide(about_nn, scale, out=np.zeros_like(about_nn), where=scale > 0)
    return cosines


def _foolsgold_weights(cosines_nn: Float64) -> Float64:
    alike = cosines_nn.copy()
    np.fill_diagonal(alike, -np.inf)
    most = alike.max(axis=1)
    # pardoning: i is less alike than j, so i's likeness to j is scaled down
    ratio = np.divide(most[:, None], most[None, :], out=np.ones_like(alike), where=most[None, :] > 0)
    pardoned = np.where((most[:, None] < most[None, :]) & (most[:, None] > 0), alike * ratio, alike)
    weights = np.clip(1.0 - pardoned.max(axis=1), 0.0, 1.0)
    largest = weights.max()
    weights = weights / largest if largest > 0 else weights
    weights = np.where(weights >= 1.0, 0.99, weights)
    with np.errstate(divide="ignore"):
        logit = np.log(weights / (1.0 - weights)) + 0.5
    clipped: Float64 = np.clip(logit, 0.0, 1.0)
    return clipped


FLTRUST = RuleSpec("fltrust", fltrust, lambda f: f + 1, needs=("reference_d",))
FOOLSGOLD = RuleSpec("foolsgold", foolsgold, lambda f: max(2, f + 1), needs=("names", "state", "rng"))
