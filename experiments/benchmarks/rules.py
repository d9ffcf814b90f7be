"""What a rule costs: against Flower's functions and ByzFL's classes in the same run, and against the machine's limits.

    python -m experiments.benchmarks.rules [--quick] [--json]

100 nodes (20 liars) and 1e6 float32 coordinates, and 10 nodes (2 liars).  Seconds are the best of a few; a peer that
would take minutes or tens of GB is run on fewer coordinates and scaled, since all of them are linear in d (marked ~).
The limit is the time to read the matrix as often as needed at the measured bandwidth, and to multiply at the measured
FLOP/s, with all cores.  Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.benchmarks import peers
from strategies import rules
from strategies.preaggregators import nnm
from strategies.rows import rows_of

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine can do with all its cores."""

    read_gb_s: float
    gemm_gflop_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Job:
    """One rule, its peers, its targets, and the least work it takes: passes over the matrix and n * n * d products."""

    name: str
    ours: Callable[[Array, int], Any]
    most_s: float
    passes: float
    products: float = 0.0
    flower: Callable[[Array, int], Any] | None = None
    least_ratio: float | None = None
    byzfl: Callable[[Any, int], Any] | None = None
    byzfl_d: int | None = None
    """Coordinates ByzFL is run on; None: all."""
    memory: bool = False
    """Whether the memory beside the matrix is a target: at most half of it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table."""

    rule: str
    n: int
    d: int
    seconds: float
    most_s: float
    limit_s: float
    memory: float
    """Peak memory with the matrix, in matrices."""
    flower_s: float | None
    byzfl_s: float | None
    byzfl_scaled: bool
    missed: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the coordinates, and no target of seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args(arguments)
    d = 100_000 if chosen.quick else 1_000_000
    machine = measure_machine()
    rng = np.random.default_rng(0)
    lines = []
    if not chosen.json:
        print(
            f"{machine.threads} threads; read {machine.read_gb_s:.1f} GB/s, "
            f"multiply {machine.gemm_gflop_s:.0f} GFLOP/s; d = {d:,}\n"
        )
        print("| rule | n | seconds | target | limit | times the limit | memory | Flower | ByzFL |")
        print("|---|---|---|---|---|---|---|---|---|")
    for n, f, jobs in ((100, 20, large_jobs()), (10, 2, small_jobs())):
        updates = rng.standard_normal((n, d), dtype=np.float32)
        for job in jobs:
            lines.append(measure(job, updates, f, machine, timed=not chosen.quick))
            if not chosen.json:
                print(_line(lines[-1]), flush=True)
    if chosen.json:
        print(json.dumps({"machine": asdict(machine), "rules": [asdict(line) for line in lines]}, indent=1))
    return int(any(line.missed for line in lines))


def large_jobs() -> list[Job]:
    """100 nodes, 20 of them liars."""
    b = peers.byzfl()
    jobs = [
        Job("trimmed_mean", _rule("trimmed_mean"), 0.30, 1, flower=_flower_trimmed, least_ratio=6),
        Job("median", _rule("median"), 0.30, 1, flower=_flower_median, least_ratio=6),
        Job("multi_krum", _rule("multi_krum"), 0.60, 2, 0.5, flower=_flower_krum),
        Job("geometric_median", _rule("geometric_median"), 0.80, 2, 0.5),
        Job("nnm + trimmed_mean", _mixed, 2.5, 2, 1.5, byzfl_d=50_000, memory=True),
        Job("robust", _rule("robust"), 3.0, 3, 1.5, memory=True),
        Job("meamed", _rule("meamed"), 0.60, 1),
        Job("bulyan", _rule("bulyan"), 1.0, 2, 0.5),
        Job("centered_clipping", _rule("centered_clipping"), 0.80, 2, 0.5),
    ]
    if b is None:
        return jobs
    theirs: dict[str, Callable[[Any, int], Any]] = {
        "trimmed_mean": lambda x, f: b.TrMean(f=f)(x),
        "median": lambda x, f: b.Median()(x),
        "multi_krum": lambda x, f: b.MultiKrum(f=f)(x),
        "geometric_median": lambda x, f: b.GeometricMedian(nu=0.1, T=3)(x),
        "nnm + trimmed_mean": lambda x, f: b.TrMean(f=f)(b.NNM(f=f)(x)),
        "meamed": lambda x, f: b.Meamed(f=f)(x),
    }
    return [replace(job, byzfl=theirs.get(job.name)) for job in jobs]


def small_jobs() -> list[Job]:
    return [
        Job("trimmed_mean", _rule("trimmed_mean"), 0.025, 1, flower=_flower_trimmed),
        Job("median", _rule("median"), 0.025, 1, flower=_flower_median),
        Job("multi_krum", _rule("multi_krum"), 0.06, 2, 0.5, flower=_flower_krum),
        Job("robust", _rule("robust"), 0.25, 3, 1.5, memory=True),
    ]


def measure(job: Job, updates: Array, f: int, machine: Machine, *, timed: bool) -> Measured:
    """Ours, the peers' and the limit, on one matrix."""
    n, d = updates.shape
    seconds = _best(lambda: job.ours(updates, f), 5)
    flower_s = _best(lambda: job.flower(updates, f), 2) if job.flower else None  # type: ignore[misc]
    byzfl_d = min(job.byzfl_d or d, d)
    byzfl_s = _byzfl_seconds(job, updates[:, :byzfl_d], f) if job.byzfl else None
    limit_s = job.passes * updates.nbytes / machine.read_gb_s / 1e9
    limit_s += job.products * 2 * n * n * d / machine.gemm_gflop_s / 1e9
    memory = _memory(lambda: job.ours(updates, f), updates.nbytes)
    missed = []
    if timed and seconds > job.most_s:
        missed.append("seconds")
    if job.least_ratio is not None and flower_s is not None and flower_s < job.least_ratio * seconds:
        missed.append(f"{job.least_ratio:.0f}x Flower")
    if job.memory and memory > 1.5:
        missed.append("memory")
    scaled = None if byzfl_s is None else byzfl_s * d / byzfl_d
    return Measured(
        job.name, n, d, seconds, job.most_s, limit_s, memory, flower_s, scaled, byzfl_d != d, ", ".join(missed)
    )


def measure_machine() -> Machine:
    """Read bandwidth and single-precision multiplication, with all cores."""
    threads = len(os.sched_getaffinity(0))
    many = np.ones(100_000_000, np.float32)
    parts = np.array_split(many, threads * 8)
    with ThreadPoolExecutor(threads) as pool:
        read_s = _best(lambda: list(pool.map(np.max, parts)), 5)
    square = np.random.default_rng(0).standard_normal((3000, 3000), dtype=np.float32)
    gemm_s = _best(lambda: square @ square, 3)
    return Machine(many.nbytes / read_s / 1e9, 2 * 3000**3 / gemm_s / 1e9, threads)


def _rule(name: str) -> Callable[[Array, int], Any]:
    return lambda x, f: rules.get(name).fn(x, num_byzantine=f)


def _mixed(x: Array, f: int) -> Any:
    return rules.trimmed_mean(nnm(rows_of(x), num_byzantine=f), num_byzantine=f)


def _flower_trimmed(x: Array, f: int) -> Any:
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

    return trim_mean(x, f / len(x))


def _flower_median(x: Array, f: int) -> Any:
    return np.median(x, axis=0)  # FedMedian.aggregate_train, on stacked arrays


def _flower_krum(x: Array, f: int) -> Any:
    """Flower's distances, whose input is records, and the mean of what they choose."""
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy.multikrum import compute_distances

    key = (id(x), x.shape)
    if key not in _records:
        _records.clear()
        _records[key] = [ArrayRecord({"w": FlowerArray(row)}) for row in x]
    scores = np.sort(compute_distances(_records[key]), axis=1)[:, 1 : len(x) - f - 1].sum(1)
    return x[np.argsort(scores)[: len(x) - f]].mean(0)


_records: dict[tuple[int, tuple[int, ...]], list[Any]] = {}


def _byzfl_seconds(job: Job, updates: Array, f: int) -> float:
    import torch

    assert job.byzfl is not None
    tensor, run = torch.from_numpy(np.ascontiguousarray(updates)), job.byzfl
    return _best(lambda: run(tensor, f), 1)


def _best(function: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return min(found)


def _memory(function: Callable[[], Any], matrix_bytes: int) -> float:
    """Peak of what numpy allocates, with the matrix itself, in matrices."""
    tracemalloc.start()
    try:
        function()
        return 1 + tracemalloc.get_traced_memory()[1] / matrix_bytes
    finally:
        tracemalloc.stop()


def _line(m: Measured) -> str:
    def peer(seconds: float | None, scaled: bool = False) -> str:
        return "-" if seconds is None else f"{'~' if scaled else ''}{seconds:.2f} ({seconds / m.seconds:.1f}x)"

    return (
        f"| {m.rule} | {m.n} | {m.seconds:.4f} | {m.most_s:g} | {m.limit_s:.4f} | {m.seconds / m.limit_s:.1f} "
        f"| {m.memory:.2f} | {peer(m.flower_s)} | {peer(m.byzfl_s, m.byzfl_scaled)} |"
        f"{'  missed: ' + m.missed if m.missed else ''}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
