"""What DP-SGD costs a node: each of Opacus' ways to per-sample gradients against plain SGD in the same run.

    python -m experiments.benchmarks.private [--quick] [--all] [--json]

A step is an epoch of `train` by its number of steps, with all that a round pays once; plain SGD is
`sectors.training.train` on the same generated rows, which slices arrays and has no DataLoader.  One thread.  Plain and
private epochs take turns, and the best of several counts, so that a busy machine slows all alike.  The mode marked * is
the default, and has the target: 2.4 times plain SGD for the tabular network, 1.9 for convolutions.  The last column is
Opacus as its tutorials have it: `PrivacyEngine.make_private`, its DataLoader and its hooks.  Memory is the peak of a
process of its own, with 64 rows of gradients at a time: a batch 64 times larger may take 5 % more.  `--all` adds the
other sectors and a wide network.  Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

import sectors
from conf.schema import TrainingConfig
from sectors import private, training
from sectors.base import Place, Rows, Sector, num_rows, take, to_batch
from sectors.params import initial_arrays, load_into, reproducible
from sectors.private import PrivateSettings
from trellis.errors import ConfigError
from trellis.vectors import Arrays

MODES = ("direct", "ew", "hooks", "ghost", "functorch")
SMALL_BATCH, LARGE_BATCH = 64, 4096
MEMORY_RATIO = 1.05


@dataclass(frozen=True, slots=True)
class Job:
    """A sector's model, a batch, and how many times plain SGD the default mode may take."""

    sector: str
    batch: int
    num_steps: int
    most_ratio: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    def data(self) -> tuple[Sector, Rows, Arrays]:
        """Generated rows, repeated until there are `num_steps` batches, and the params to start from."""
        sector = sectors.get(self.sector, self.options)
        rows = sector.load(Place(0, 1, synthetic=True)).train
        sector = sector.fitted_on(rows)
        wanted = np.arange(self.batch * self.num_steps) % num_rows(rows)
        return sector, take(rows, wanted), initial_arrays(sector, 0)


JOBS = (
    Job("banks", 64, 60, 2.4),
    Job("healthcare_pneumonia", 64, 10, 1.9),
)
OTHERS = (
    Job("healthcare_heart", 16, 30),
    Job("healthcare_retina", 4, 6),
    Job("healthcare_wisconsin", 16, 30),
    Job("production", 96, 20),
    Job("retail", 64, 5),
    Job("banks", 64, 10, options={"hidden": [400, 400]}, title="banks, 400 x 400"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table; seconds a step by mode, None where the mode does not know the model."""

    title: str
    params: int
    batch: int
    plain_s: float
    by_mode: dict[str, float | None]
    engine_s: float | None
    """Opacus' own loop; None where it fails."""
    default: str
    most_ratio: float | None

    @property
    def missed(self) -> bool:
        seconds = self.by_mode[self.default]
        return self.most_ratio is not None and (seconds is None or seconds > self.most_ratio * self.plain_s)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, and no targets")
    parser.add_argument("--all", action="store_true", help="all sectors, and a wide network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.memory_of:
        print(peak_mb(chosen.memory_of))
        return 0
    if not chosen.json:
        print("| model | params | batch | plain SGD, ms | " + " | ".join(MODES) + " | Opacus' loop | target |")
        print("|---|---|---|---|" + "---|" * (len(MODES) + 2))
    lines = []
    for job in (*JOBS, *(OTHERS if chosen.all else ())):
        lines.append(measure(job, repeats=2 if chosen.quick else 15, timed=not chosen.quick))
        if not chosen.json:
            print(_line(lines[-1]), flush=True)
    small, large = (_memory(batch) for batch in (SMALL_BATCH, LARGE_BATCH))
    flat = large <= MEMORY_RATIO * small
    if chosen.json:
        found = [asdict(line) | {"missed": line.missed} for line in lines]
        print(json.dumps({"steps": found, "peak_mb": {SMALL_BATCH: small, LARGE_BATCH: large}}, indent=1))
    else:
        print(
            f"\npeak memory, healthcare_pneumonia: {small:.0f} MB with a batch of {SMALL_BATCH}, {large:.0f} MB with "
            f"{LARGE_BATCH}{'' if flat else '  missed: flat'}"
        )
    return int(any(line.missed for line in lines) or not flat)


def measure(job: Job, *, repeats: int, timed: bool) -> Measured:
    """Seconds a step of plain SGD and of every mode, by turns."""
    sector, rows, params = job.data()
    config = TrainingConfig(batch_size=job.batch, epochs=1, lr=0.01)
    runs: dict[str, Callable[[], Any]] = {"plain": lambda: training.train(sector, config, params, rows, seed=0)}
    for mode in MODES:
        settings = PrivateSettings(1.0, 1.0, mode=mode, max_physical_batch=2 * job.batch)  # type: ignore[arg-type]
        runs[mode] = partial(private.train, sector, config, params, rows, settings)
    runs["engine"] = partial(_engine, sector, config, params, rows)
    best: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first one warms up
        for name, run in list(runs.items()):
            began = time.perf_counter()
            try:
                run()
            except (ConfigError, RuntimeError):  # Opacus' loop on an empty batch of some models
                del runs[name]
                best.pop(name, None)
                continue
            best[name] = min(best.get(name, float("inf")), (time.perf_counter() - began) / job.num_steps)
    return Measured(
        job.title or job.sector,
        sum(a.size for a in params.values()),
        job.batch,
        best["plain"],
        {mode: best.get(mode) for mode in MODES},
        best.get("engine"),
        private.default_mode(sector),
        job.most_ratio if timed else None,
    )


def peak_mb(batch: int) -> float:
    """Peak memory of this process after private steps of a logical batch, 64 rows of gradients at a time."""
    sector = sectors.get("healthcare_pneumonia")
    rng = np.random.default_rng(0)
    rows = {"x": rng.integers(0, 256, (LARGE_BATCH, 28, 28), np.uint8), "y": rng.integers(0, 2, LARGE_BATCH)}
    settings = PrivateSettings(1.0, 1.0, max_physical_batch=SMALL_BATCH)
    config = TrainingConfig(batch_size=batch, lr=0.01, max_examples=max(batch, 10 * SMALL_BATCH))
    private.train(sector, config, initial_arrays(sector, 0), rows, settings)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says of a child began with its parent
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # macOS, in bytes


def _memory(batch: int) -> float:
    command = [sys.executable, "-m", "experiments.benchmarks.private", "--memory-of", str(batch)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout)


def _engine(sector: Sector, config: TrainingConfig, params: Arrays, rows: Rows) -> None:
    """An epoch of Opacus' own: DataLoader, hooks and engine."""
    with reproducible(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = list(rows)
        data = TensorDataset(*to_batch(rows, slice(None), torch.device("cpu")).values())
        model = load_into(sector.build_model(), params).train()
        wrapped, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=config.lr),
            data_loader=DataLoader(data, batch_size=config.batch_size),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        for columns in loader:
            batch = dict(zip(names, columns, strict=True))
            optimizer.zero_grad()
            torch.autograd.backward(sector.losses(sector.forward(wrapped, batch), batch).mean())
            optimizer.step()


def _line(m: Measured) -> str:
    def cell(seconds: float | None, mark: str = "") -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.2f} ({seconds / m.plain_s:.1f}x){mark}"

    by_mode = [cell(seconds, " *" if mode == m.default else "") for mode, seconds in m.by_mode.items()]
    cells = " | ".join([*by_mode, cell(m.engine_s)])
    target = "-" if m.most_ratio is None else f"{m.most_ratio}x"
    return (
        f"| {m.title} | {m.params} | {m.batch} | {m.plain_s * 1e3:.2f} | {cells} | {target} |"
        f"{'  missed' if m.missed else ''}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
