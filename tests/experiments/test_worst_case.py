"""The report of attacks names the worst, and the benchmark of rules measures what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import attacks
from experiments.benchmarks import rules as benchmark
from experiments.studies import worst_case
from experiments.studies.worst_case import Outcome, worst

CALM = Outcome("mean", "none", 0, 0.95, (0.5, 0.95), "test ap", "max", None)


def outcomes(*values: float | None, direction: str = "max") -> list[Outcome]:
    lies = [replace(CALM, attack="alie", seed=i, value=v, direction=direction) for i, v in enumerate(values)]
    return [replace(CALM, value=0.0, direction=direction), *lies]


@pytest.mark.parametrize(
    ("values", "direction", "seed"),
    [((0.9, 0.2, 0.7), "max", 1), ((0.9, 0.2, 0.7), "min", 0), ((0.9, None, 0.7), "max", 1)]
    + [((0.9, 0.1, float("nan")), direction, 2) for direction in ("max", "min")],
)
def test_the_worst_is_the_lowest_or_highest_and_no_score_is_worst_of_all(
    values: tuple[float | None, ...], direction: str, seed: int
) -> None:
    assert worst(outcomes(*values, direction=direction), "mean").seed == seed
    assert worst(outcomes(*values, direction=direction), "mean", "alie").seed == seed


def test_a_line_shows_the_worst_seed_and_never_a_mean() -> None:
    found = outcomes(0.9, 0.2, 0.7)
    assert worst_case._line("alie", found, ["mean"]) == "| alie | 0.2000 (seed 1) |"
    assert worst_case._worst_line(found, ["mean"]) == "| **worst** | **0.2000** (alie, seed 1) |"


def test_every_attack_of_the_report_is_in_the_catalogue_and_passes_the_checks() -> None:
    named = {attack.split()[0] for attack in worst_case.ATTACKS} - {"none"}
    refused = {"infinity", "not_a_number", "inflation", "malformed", "replay"}
    assert named == set(attacks.ATTACKS) - refused


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    worst_case.draw(outcomes(0.9, 0.2), ["mean"], tmp_path / "picture.png", "banks")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_compares_with_flower_byzfl_and_the_machine() -> None:
    machine = benchmark.Machine(read_gb_s=10.0, gemm_gflop_s=50.0, threads=2)
    updates = np.random.default_rng(0).standard_normal((100, 2000)).astype(np.float32)
    job = benchmark.large_jobs()[0]
    found = benchmark.measure(job, updates, 20, machine, timed=False)
    assert found.limit_s == pytest.approx(updates.nbytes / 10e9)
    assert found.flower_s is not None
    assert found.seconds > 0
    slow = replace(job, least_ratio=1e9, most_s=0.0)
    assert benchmark.measure(slow, updates, 20, machine, timed=True).missed == "seconds, 1000000000x Flower"
