"""Who gains among four hospitals, and by how much?  sector=healthcare_heart, 5x5 repeated stratified cross-validation.

  python -m experiments.studies.hospitals                 5 repeats of 5 folds inside each hospital (two processes)

In every fold each hospital's rows are tested under its own model alone, the pooled one, the federated one, that one
fine-tuned at the hospital, and one whose head stayed there.  Intervals are of the paired difference to the hospital's
model alone, over folds, at 95 %, with Nadeau and Bengio's correction: the folds of a repeat share their training rows,
so plain intervals would be too narrow (Machine Learning 52, 2003).  A hospital with fewer than ten rows of a class is
shown, not judged.  Exit code 1: a hospital is below its model alone, or the pooled AUC below 0.86.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import stats

import sectors
from conf.load import load
from experiments.simulate import simulate
from sectors.base import Place, num_rows
from trellis.types import Role

SETTINGS = ("sector=healthcare_heart", "nodes=hospitals", "tracking=none")
MODELS = ("local_only", "pooled", "federated", "tuned", "local_head")
LEAST_ROWS = 10
POOLED_BAR = 0.86
NUM_FOLDS = 5

Scores = dict[str, dict[str, float]]
"""AUC by hospital (and "all") and model; NaN where a fold has one class only."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    folds = list(product(range(arguments.repeats), range(NUM_FOLDS)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        scores = list(pool.map(fold, *zip(*folds, strict=True)))
    hospitals = classes()
    validation_fraction = load(list(SETTINGS)).sector.options["validation_fraction"]
    print(f"| hospital | rows of each class | {' | '.join(MODELS)} |")
    print(f"|---|---|{'---|' * len(MODELS)}")
    print(f"| all rows | - | {' | '.join(_mean(scores, 'all', model) for model in MODELS)} |")
    for name, (negatives, positives) in hospitals.items():
        cells = " | ".join(_mean(scores, name, model) for model in MODELS)
        print(f"| {name} | {negatives}, {positives} | {cells} |")
    judged = [name for name, rows in hospitals.items() if min(rows) >= LEAST_ROWS]
    print(f"\n| difference to alone, 95 % | {' | '.join(MODELS[1:])} |")
    print(f"|---|{'---|' * len(MODELS[1:])}")
    below = []
    for name in hospitals:
        cells_ = []
        for model in MODELS[1:]:
            differences = [s[name][model] - s[name]["local_only"] for s in scores]
            mean, low, high = interval(differences, validation_fraction=validation_fraction)
            cells_.append(f"{mean:+.4f} ({low:+.4f} to {high:+.4f})")
            below += [name] if model == "federated" and name in judged and high < 0 else []
        print(f"| {name}{'' if name in judged else ' (not judged)'} | {' | '.join(cells_)} |")
    pooled = float(np.nanmean([s["all"]["pooled"] for s in scores]))
    print(f"\nhospitals below their own model alone: {', '.join(below) or 'none'}; pooled AUC {pooled:.4f}")
    return int(bool(below) or pooled < POOLED_BAR)


def fold(repeat: int, index: int) -> Scores:
    """The runs of one fold: the shipped recipe with fine-tuning, and the one with local heads."""
    with tempfile.TemporaryDirectory() as runs:
        options = [f"sector.options.{k}={v}" for k, v in (("split_seed", repeat), ("fold", index))]
        common = [*SETTINGS, *options, f"sector.options.num_folds={NUM_FOLDS}", f"seed={repeat}", f"runs_dir={runs}"]
        tuned = simulate([*common, "heterogeneity=fine_tune", "baselines=true"])
        local = simulate([*common, "heterogeneity=local_head"])
    assert tuned.baselines is not None
    found: Scores = {
        name: {
            **{model: np.nan if value is None else value for model, value in scores.items()},
            "local_head": np.nan if (own := local.nodes[name]["federated"]) is None else own,
        }
        for name, scores in tuned.nodes.items()
    }
    metrics = {"federated": tuned.metrics["test/auc"], "tuned": tuned.metrics["test_tuned/auc"]}
    baselines = {"pooled": tuned.baselines["pooled"]["auc"], "local_only": tuned.baselines["local_only"]["everywhere"]}
    return {**found, "all": {**metrics, **baselines, "local_head": local.metrics["test/auc"]}}


def interval(
    differences: Sequence[float], num_folds: int = NUM_FOLDS, validation_fraction: float = 0.0
) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences over the folds of repeated cross-validation.

    The variance of the mean of J differences is (1 / J + n_test / n_train) s^2, where of the rows outside the fold all
    but a share of `validation_fraction` train.  Nadeau and Bengio, 2003, Section 4.
    """
    known: npt.NDArray[np.float64] = np.array([d for d in differences if np.isfinite(d)])
    test_to_train = 1.0 / ((num_folds - 1) * (1.0 - validation_fraction))
    spread = (1.0 / len(known) + test_to_train) * known.var(ddof=1)
    half = float(stats.t.ppf(0.975, len(known) - 1) * np.sqrt(spread))
    return float(known.mean()), float(known.mean()) - half, float(known.mean()) + half


def classes() -> dict[str, tuple[int, int]]:
    """Rows without and with the disease, by hospital."""
    sector = sectors.get("healthcare_heart")
    found = {}
    for part, name in enumerate(sector.sites):  # type: ignore[attr-defined]
        rows = sector.load(Place(part, 4, role=Role.test)).test
        positives = int(rows["y"].sum())
        found[name] = (num_rows(rows) - positives, positives)
    return found


def _mean(scores: Sequence[Scores], name: str, model: str) -> str:
    return f"{np.nanmean([s[name][model] for s in scores]):.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
