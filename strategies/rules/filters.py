"""Rules that drop rows that look wrong and average the rest: by length (CGE), direction (FLAME), spectrum (DnC)."""

from __future__ import annotations

import numpy as np

from strategies.rows import (
    Float64,
    Rows,
    Updates,
    combine,
    products,
    require_rows,
    rows_of,
    single_threaded_blas,
    squared_norms,
)
from trellis.errors import ConfigError
from trellis.types import Aggregated, RuleSpec


def cge(updates_nd: Updates, *, num_byzantine: int = 0) -> Aggregated:
    """Mean of the n - f shortest rows; ties go to the earlier row.  (n, d) -> (d,)

    Needs n >= 2 f + 1, else CohortTooSmall.  It bounds the length of a lie, not its direction: six honest rows at 10
    and two liars at -9 give 3.67.  Gupta, Liu and Vaidya, DSN-W 2020.  https://arxiv.org/abs/2008.04699
    """
    rows, f = rows_of(updates_nd), num_byzantine
    n = require_rows("cge", rows, 2 * f + 1, f)
    weights_n = np.zeros(n)
    weights_n[np.argsort(squared_norms(rows), kind="stable")[: n - f]] = 1.0 / (n - f)
    return Aggregated(combine(rows, weights_n), weights_n)


def dnc(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    rng: np.random.Generator,
    iterations: int = 5,
    sample_dim: int = 10_000,
    filter_fraction: float = 1.0,
) -> Aggregated:
    """Divide and conquer: mean of the rows that stay in every one of some random views.  (n, d) -> (d,)

    A view is `sample_dim` coordinates, centred; rows are scored by their squared projection on its first singular
    vector, and the `filter_fraction` * f largest are dropped.  When no row stays in every view, those that stay most
    often count.  Needs n >= 2 f + 1, else CohortTooSmall.
    Shejwalkar and Houmansadr, NDSS 2021, Algorithm 2.  https://dx.doi.org/10.14722/ndss.2021.24498
    """
    rows, f = rows_of(updates_nd), num_byzantine
    n = require_rows("dnc", rows, 2 * f + 1, f)
    if iterations < 1 or sample_dim < 1 or not filter_fraction > 0:
        raise ConfigError(
            f"dnc: iterations={iterations}, sample_dim={sample_dim} and filter_fraction={filter_fraction} "
            "must be above 0"
        )
    dropped = min(int(filter_fraction * f), n - 1)
    stays = np.zeros(n, np.int64)
    for _ in range(iterations):
        scores = _spectral_scores(rows, rng, sample_dim)
        stays[np.argsort(scores, kind="stable")[: n - dropped]] += 1
    good = stays == stays.max()
    weights_n = good / good.sum()
    return Aggregated(combine(rows, weights_n), weights_n)


def _spectral_scores(rows: Rows, rng: np.random.Generator, sample_dim: int) -> Float64:
    """Squared projections of the centred rows on their first singular vector.  -> (n,)

    (X v)_i = sigma u_i, and u is the first eigenvector of the small matrix X X^T.
    """
    d = rows.shape[1]
    chosen = np.sort(rng.choice(d, size=min(sample_dim, d), replace=False))
    view = Rows(rows.updates_nd[:, chosen], rows.mix, rows.device)
    wide = view.materialised().astype(np.float64)
    wide -= wide.mean(axis=0)
    with single_threaded_blas():
        values, vectors = np.linalg.eigh(wide @ wide.T)
    scores: Float64 = values[-1] * vectors[:, -1] ** 2
    return scores


def flame(
    updates_nd: Updates,
    *,
    num_byzantine: int = 0,
    rng: np.random.Generator | None = None,
    noise_factor: float = 0.0,
) -> Aggregated:
    """The largest group of rows that point the same way, each cut to the median length, averaged.  (n, d) -> (d,)

    HDBSCAN on cosine distances with clusters of at least n // 2 + 1; where it finds none, all rows are kept, cut.
    `noise_factor` adds Gaussian noise of that many median lengths (the paper's lambda; 0: none).  Needs n >= 2 f + 1,
    else CohortTooSmall.  Nguyen et al., USENIX Security 2022, Algorithm 1.  https://arxiv.org/abs/2101.02281
    """
    rows = rows_of(updates_nd)
    n = require_rows("flame", rows, 2 * num_byzantine + 1, num_byzantine)
    about_nn = products(rows)
    norms = np.sqrt(np.maximum(about_nn.diagonal(), 0.0))
    kept = _majority(about_nn, norms) if n > 2 else np.ones(n, bool)
    most = float(np.median(norms))
    cut = np.minimum(1.0, np.divide(most, norms, out=np.ones(n), where=norms > 0))
    weights_n = kept / kept.sum()
    update_d = combine(rows, weights_n * cut)
    if noise_factor > 0:
        rng = rng or np.random.default_rng(0)
        update_d = update_d + (noise_factor * most * rng.standard_normal(len(update_d))).astype(np.float32)
    return Aggregated(update_d, weights_n)


def _majority(about_nn: Float64, norms: Float64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Members of the one cluster that holds more than half of the rows; all rows where there is none.  -> (n,) bool"""
    from sklearn.cluster import HDBSCAN  # late: scikit-learn takes a second, and few runs need it

    scale = norms[:, None] * norms[None, :]
    cosines = np.divide(about_nn, scale, out=np.zeros_like(about_nn), where=scale > 0)
    apart = np.clip(1.0 - cosines, 0.0, 2.0)
    np.fill_diagonal(apart, 0.0)
    clusters = HDBSCAN(
        min_cluster_size=len(norms) // 2 + 1, min_samples=1, metric="precomputed", allow_single_cluster=True, copy=True
    )
    labels = clusters.fit(apart).labels_
    members = labels == 0
    return members if members.any() else np.ones(len(norms), bool)


CGE = RuleSpec("cge", cge, lambda f: 2 * f + 1)
DNC = RuleSpec("dnc", dnc, lambda f: 2 * f + 1, needs=("rng",))
FLAME = RuleSpec("flame", flame, lambda f: 2 * f + 1, needs=("rng",))
