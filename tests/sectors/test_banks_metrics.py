"""What a histogram of logits costs against exact scores, on real payments that a trained model scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from conf.schema import TrainingConfig
from sectors import metrics, training
from sectors.banks import STRATUM_WEIGHTS, Banks
from sectors.base import Place
from sectors.params import initial_arrays
from trellis.errors import MissingData


@cache
def scored(partition: str, epochs: int, split_seed: int) -> tuple[Any, Any, Any]:
    """Logits, labels and strata of the test rows of ten banks, by a model that learned from all their training rows."""
    sector = Banks(partition=partition, split_seed=split_seed)
    try:
        banks = [sector.load(Place(p, 10)) for p in range(10)]
    except MissingData as error:
        pytest.skip(str(error))
    rows, test = (
        {k: np.concatenate([getattr(b, s)[k] for b in banks]) for k in banks[0].test} for s in ("train", "test")
    )
    # as the shipped recipe trains
    config = TrainingConfig(batch_size=32, epochs=epochs, lr=0.05, momentum=0.9, weight_decay=0.001)
    trained = training.train(sector, config, initial_arrays(sector, 0), rows, seed=0)
    model = sector.build_model()
    model.load_state_dict({k: torch.from_numpy(a.copy()) for k, a in trained.arrays.items()})
    with torch.no_grad():
        logits = model(torch.from_numpy(test["x"])).reshape(-1).numpy()
    return logits, test["y"], test["stratum"]


def errors(partition: str, epochs: int, split_seed: int) -> dict[str, float]:
    """By metric, how far the histogram's is from scikit-learn's, which sees every score."""
    logits, labels, strata = scored(partition, epochs, split_seed)
    weight = np.where(labels > 0.5, 1.0, np.array(STRATUM_WEIGHTS)[strata])
    assert 50 < labels.sum() < len(labels) / 5
    assert labels.sum() / weight.sum() < 0.003, "the prevalence of the full file"
    found = Banks().metrics(metrics.score_counts(logits, labels, strata, len(STRATUM_WEIGHTS)))
    exact = {
        "auc": roc_auc_score(labels, logits),
        "ap": average_precision_score(labels, logits),
        "ap_true": average_precision_score(labels, logits, sample_weight=weight),
    }
    return {name: abs(found[name] - value) for name, value in exact.items()}


LONG = [("uniform", 10, 0), ("amount_band", 10, 1), ("time_block", 10, 2)]
SHORT = [("uniform", 1, 2), ("uniform", 1, 1)]


@pytest.mark.parametrize("trained", [*LONG, *SHORT])
def test_auc_from_a_histogram_is_the_exact_one_within_what_is_stated(trained: tuple[str, int, int]) -> None:
    assert errors(*trained)["auc"] < 0.001


@pytest.mark.parametrize("trained", LONG)
def test_average_precision_of_a_model_that_trained_long_is_too(trained: tuple[str, int, int]) -> None:
    found = errors(*trained)
    assert found["ap"] < 0.005
    assert found["ap_true"] < 0.02


@pytest.mark.parametrize("trained", SHORT)
@pytest.mark.parametrize(("name", "stated"), [("ap", 0.02), ("ap_true", 0.2)])
def test_average_precision_of_a_model_that_trained_briefly_is_within_what_is_stated_too(
    name: str, stated: float, trained: tuple[str, int, int]
) -> None:
    assert errors(*trained)[name] < stated


@pytest.mark.parametrize("trained", [*LONG, *SHORT])
def test_no_logit_of_a_trained_model_lies_in_the_open_bins(trained: tuple[str, int, int]) -> None:
    assert np.abs(scored(*trained)[0]).max() < metrics.LIMIT * (1 - 2 / metrics.NUM_BINS)
