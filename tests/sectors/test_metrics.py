"""Histogram metrics against scikit-learn, which sees every score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from sectors import metrics


def scored(n: int, prevalence: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a good, calibrated-looking model: most frauds far out, some among the normals."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < prevalence).astype(np.float32)
    severity = rng.gamma(2.0, 2.5, n)
    return np.where(labels > 0, -6.0 + severity * 1.6, -6.0) + rng.normal(0.0, 1.2, n), labels


@pytest.mark.parametrize("prevalence", [0.07, 0.0017])
@pytest.mark.parametrize("seed", range(5))
def test_auc_and_average_precision_are_scikit_learns_within_a_bin(prevalence: float, seed: int) -> None:
    logits, labels = scored(200_000 if prevalence < 0.01 else 5_000, prevalence, seed)
    counts = metrics.score_counts(logits, labels)
    auc = metrics.auc_from_counts(counts["positives"], counts["negatives"][0])
    ap = metrics.average_precision_from_counts(counts["positives"], counts["negatives"])
    assert auc == pytest.approx(roc_auc_score(labels, logits), abs=0.001)
    assert ap == pytest.approx(average_precision_score(labels, logits), abs=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_average_precision_is_scikit_learns_with_sample_weights(seed: int) -> None:
    logits, labels = scored(6_000, 0.07, seed)
    strata = np.random.default_rng(seed).integers(0, 2, len(labels))
    counts = metrics.score_counts(logits, labels, strata, 2)
    ap = metrics.average_precision_from_counts(counts["positives"], counts["negatives"], (24.2, 234.8))
    weight = np.where(labels > 0, 1.0, np.where(strata == 0, 24.2, 234.8))
    # In a bin all rows share a threshold: exactly what scikit-learn makes of the binned scores.
    tied = np.floor((logits + metrics.LIMIT) * metrics.NUM_BINS / (2 * metrics.LIMIT))
    assert ap == pytest.approx(average_precision_score(labels, tied, sample_weight=weight), abs=1e-12)
    assert ap == pytest.approx(average_precision_score(labels, logits, sample_weight=weight), abs=0.02)


def test_equal_scores_are_ties_exactly_as_in_scikit_learn() -> None:
    logits, labels = np.array([0.0, 0.0, 1.0, 1.0, -2.0]), np.array([1, 0, 1, 0, 0])
    counts = metrics.score_counts(logits, labels)
    pos, neg = counts["positives"], counts["negatives"]
    assert metrics.auc_from_counts(pos, neg[0]) == pytest.approx(roc_auc_score(labels, logits))
    assert metrics.average_precision_from_counts(pos, neg) == pytest.approx(average_precision_score(labels, logits))
    assert metrics.accuracy_from_counts(pos, neg[0]) == accuracy_score(labels, logits >= 0)


def test_end_bins_are_open_and_nan_is_the_lowest_score() -> None:
    counts = metrics.score_counts(np.array([1e9, np.inf, -np.inf, np.nan]), np.array([1, 1, 0, 0]))
    assert counts["positives"][-1] == 2
    assert counts["negatives"][0, 0] == 2


def test_a_missing_class_gives_no_metric() -> None:
    counts = metrics.score_counts(np.array([0.5, 1.0]), np.array([0, 0]))
    assert metrics.auc_from_counts(counts["positives"], counts["negatives"][0]) is None
    assert metrics.average_precision_from_counts(counts["positives"], counts["negatives"]) is None
    nothing = metrics.score_counts(np.zeros(0), np.zeros(0))
    assert metrics.accuracy_from_counts(nothing["positives"], nothing["negatives"][0]) is None


def test_counts_of_a_whole_are_the_sum_of_its_parts() -> None:
    logits, labels = scored(999, 0.1, 0)
    whole = metrics.score_counts(logits, labels)
    parts = [metrics.score_counts(logits[s], labels[s]) for s in (slice(400), slice(400, None))]
    assert all((whole[k] == parts[0][k] + parts[1][k]).all() for k in whole)
    assert all(v.dtype == np.int64 for v in whole.values())
