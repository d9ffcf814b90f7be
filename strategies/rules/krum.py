"""Rules that choose rows by their distances to one another: Krum, Multi-Krum, Bulyan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from strategies.rows import Float64, Updates, by_column, combine, require_rows, rows_of, squared_distances
from strategies.rules.coordinate import nearest_to_median
from trellis.errors import ConfigError
from trellis.types import Aggregated, RuleSpec


def krum(
    updates_nd: Updates, *, num_byzantine: int = 0, sketch_dim: int = 0, rng: np.random.Generator | None = None
) -> Aggregated:
    """The row with the least sum of squared distances to its n - f - 2 nearest others.  (n, d) -> (d,)

    Needs n >= 2 f + 3, else CohortTooSmall.  Ties go to the earlier row.  `sketch_dim`: see `rows.squared_distances`.
    Blanchard et al., NeurIPS 2017.  https://papers.nips.cc/paper/6617
    """
    return multi_krum(updates_nd, num_byzantine=num_byzantine, num_selected=1, sketch_dim=sketch_dim, rng=rng)


def multi_krum(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    num_selected: int | None = None,
    sketch_dim: int = 0,
    rng: np.random.Generator | None = None,
) -> Aggregated:
    """Mean of the m rows with the best Krum scores, m = `num_selected` or n - f.  (n, d) -> (d,)

    Needs n >= 2 f + 3, else CohortTooSmall.  Where fewer rows came, m is n - f at most.
    Blanchard et al., NeurIPS 2017, Section 4.
    """
    rows, f = rows_of(updates_nd), num_byzantine
    n = require_rows("krum", rows, 2 * f + 3, f)
    m = n - f if num_selected is None else min(num_selected, n - f)
    if m < 1:
        raise ConfigError(f"multi_krum: num_selected is {num_selected}; it must be at least 1")
    squared_nn = squared_distances(rows, sketch_dim=sketch_dim, rng=rng)
    weights_n = np.zeros(n)
    weights_n[_by_score(squared_nn, n - f - 2)[:m]] = 1.0 / m
    return Aggregated(combine(rows, weights_n), weights_n)


def bulyan(
    updates_nd: Updates, *, num_byzantine: int = 0, sketch_dim: int = 0, rng: np.random.Generator | None = None
) -> Aggregated:
    """Krum, n - 2 f times, each time without the rows chosen before; then of each coordinate the mean of the n - 4 f
    chosen values nearest to their median.  (n, d) -> (d,)

    Needs n >= 4 f + 3, else CohortTooSmall.  El Mhamdi et al., ICML 2018, Section 4.  https://arxiv.org/abs/1802.07927
    """
    rows, f = rows_of(updates_nd), num_byzantine
    n = require_rows("bulyan", rows, 4 * f + 3, f)
    squared_nn = squared_distances(rows, sketch_dim=sketch_dim, rng=rng)
    left, chosen = np.arange(n), list[int]()
    while len(chosen) < n - 2 * f:
        best = _by_score(squared_nn[np.ix_(left, left)], max(len(left) - f - 2, 1))[0]
        chosen.append(int(left[best]))
        left = np.delete(left, best)
    kept = n - 4 * f
    update_d = by_column(rows.taken(np.sort(chosen)), lambda ranked, xp: nearest_to_median(ranked, kept, xp))
    weights_n = np.zeros(n)
    weights_n[chosen] = 1.0 / len(chosen)
    return Aggregated(update_d, weights_n)


def krum_scores(squared_nn: Float64, num_neighbours: int) -> Float64:
    """Sum of each row's smallest squared distances to others.  (n, n) -> (n,)"""
    others = squared_nn.copy()
    np.fill_diagonal(others, -1.0)  # its own distance by index, not by value: another row may be equal
    ranked = np.sort(others, axis=1)[:, 1:]
    scores: npt.NDArray[np.float64] = ranked[:, :num_neighbours].sum(axis=1)
    return scores


def _by_score(squared_nn: Float64, num_neighbours: int) -> npt.NDArray[np.intp]:
    """Rows by their Krum scores, the best first; of equal ones the earlier, which in a round is the first by name.

    Not by how near they are to all others: then a liar far away would decide between two that tie.
    """
    return np.argsort(krum_scores(squared_nn, num_neighbours), kind="stable")


def _kappa(n: int, f: int) -> float:
    """Of Krum: Allouah et al., AISTATS 2023, Table 1.  Multi-Krum's is not proven there, only never seen violated."""
    return 6 * (1 + f / (n - 2 * f))


KRUM = RuleSpec("krum", krum, lambda f: 2 * f + 3, needs=("rng",), kappa=_kappa)
MULTI_KRUM = RuleSpec("multi_krum", multi_krum, lambda f: 2 * f + 3, needs=("rng",), kappa=_kappa)
BULYAN = RuleSpec("bulyan", bulyan, lambda f: 4 * f + 3, needs=("rng",))
