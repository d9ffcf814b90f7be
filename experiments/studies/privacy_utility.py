"""What does differential privacy cost?  The primary metric at epsilon 1, 3 and 8 at every node, and without.

  python -m experiments.studies.privacy_utility                        five federations, seeds 0, 1, 2 (two processes)
  python -m experiments.studies.privacy_utility --tasks banks          one sector, or one SECTOR/NODES
  python -m experiments.studies.privacy_utility --seeds 10 11 --split validation --set sector.training.lr=1
                                                                       how a recipe was chosen

The simulation scores the last version on the test rows of all nodes: under privacy=dp no node says how its model does.
Epsilon is a node's, at delta 1e-5, for all rounds together; the unit is a row.  "without" is privacy=none with the
recipe that ships.  Private recipes have larger batches and fewer steps, since the noise of a step does not grow with
its batch, and higher learning rates, since gradients are clipped.  Where nodes differ in size they are weighed by
their rows, whose number is public here: a small node's mean of gradients is the noisiest.  healthcare_heart has its
numbers centred by the ranges that its schema declares, where its own recipe fits them on the nodes' rows.

Recipes were chosen by the validation rows of split_seed 0, at epsilon 1 and 8, with seeds 10 and 11 (12 too for five
nodes of healthcare_wisconsin, 10 only for healthcare_pneumonia): neither the seeds nor the rows of the table.  Noise
follows from the seed (privacy.secagg.insecure_rng), so that the table can be made again: such a run protects nobody.
Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import sectors
from conf.schema import NodeTask
from experiments.simulate import prepare, simulate
from sectors import training
from sectors.base import concatenate, place_of
from sectors.tabular import Tabular
from server import build, versions

EPSILONS = (1.0, 3.0, 8.0)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A federation, the private recipe for it, and what it must reach."""

    sector: str
    nodes: str
    federation: tuple[str, ...]
    """Overrides that make its nodes."""
    recipe: Mapping[str, float | str]
    """Overrides of the private recipe, short: see `PLACES`."""
    targets: Mapping[float, float] = field(default_factory=dict)
    """Least mean by epsilon."""

    @property
    def name(self) -> str:
        return f"{self.sector}/{self.nodes}"

    def settings(self, epsilon: float | None) -> list[str]:
        """Overrides of a run; epsilon None: the shipped recipe, without privacy."""
        federation = [f"sector={self.sector}", *self.federation]
        if epsilon is None:
            return [*federation, "privacy=none"]
        recipe = [f"{PLACES[key]}={value}" for key, value in self.recipe.items()]
        private = ["privacy=dp", f"privacy.target_epsilon={epsilon:g}", "privacy.secagg.insecure_rng=true"]
        return [*federation, *private, *recipe, *published(self.sector)]

    @property
    def told(self) -> str:
        """The recipe as a line of text."""
        return ", ".join(f"{key} {value}" for key, value in self.recipe.items())


PLACES = {
    "rounds": "rounds",
    "epochs": "sector.training.epochs",
    "batch": "sector.training.batch_size",
    "optimizer": "sector.training.optimizer",
    "lr": "sector.training.lr",
    "momentum": "sector.training.momentum",
    "decay": "sector.training.weight_decay",
    "clip": "privacy.dp.clip_norm",
    "weighted": "rule.weighted",
}


def five(name: str = "clinic") -> tuple[str, ...]:
    """A federation of five nodes, one each of five organisations."""
    items = ", ".join(f"{{name: {name}-{i}, organisation: {name} {i}}}" for i in range(1, 6))
    return ("nodes.name=five", f"nodes.items=[{items}]")


TASKS = (
    Task(
        "healthcare_pneumonia",
        "pilot",
        ("nodes=pilot",),
        {"rounds": 8, "epochs": 1, "batch": 64, "optimizer": "sgd", "lr": 1.0, "clip": 1.0, "weighted": "true"},
    ),
    Task(
        "banks",
        "consortium",
        ("nodes=consortium",),
        {"rounds": 15, "epochs": 1, "batch": 512, "lr": 3.0, "momentum": 0.0, "decay": 0.0, "clip": 1.0},
    ),
    Task(
        "healthcare_heart",
        "hospitals",
        ("nodes=hospitals",),
        {"rounds": 15, "epochs": 1, "batch": 512, "lr": 1.0, "decay": 0.0, "clip": 1.0, "weighted": "true"},
    ),
    Task(
        "healthcare_wisconsin",
        "five",
        five(),
        {"rounds": 10, "epochs": 1, "batch": 128, "lr": 1.0, "clip": 1.0, "weighted": "true"},
        {8.0: 0.98, 1.0: 0.96},
    ),
    Task(
        "healthcare_wisconsin",
        "pilot",
        ("nodes=pilot",),
        {"rounds": 10, "epochs": 1, "batch": 256, "lr": 1.0, "clip": 1.0, "weighted": "true"},
    ),
)
"""The longest run first, so that processes end together."""


def published(sector: str) -> list[str]:
    """Centre and scale of a table's numbers from the ranges its schema declares: no row is looked at.

    A fit on the nodes' rows is what private runs refuse.  Values spread evenly over [low, high] have the centre
    (low + high) / 2 and the deviation (high - low) / sqrt(12).
    """
    made = sectors.get(sector)
    if not isinstance(made, Tabular):
        return []
    ranges = [(float(c.low or 0.0), float(c.high or 0.0)) for c in made.numbers]
    centre = [round((low + high) / 2, 4) for low, high in ranges]
    scale = [round((high - low) / np.sqrt(12), 4) for low, high in ranges]
    return [f"sector.options.centre={_listed(centre)}", f"sector.options.scale={_listed(scale)}"]


def _listed(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{v:g}' for v in values)}]"


@dataclass(frozen=True, slots=True)
class Outcome:
    metric: str
    value: float
    epsilon: float | None
    """What the node that spent most has spent; None: without privacy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS], metavar="SECTOR[/NODES]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="validation: to choose a recipe"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="OVERRIDE", help="overrides of private recipes")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    wanted = [task for task in TASKS if {task.name, task.sector} & set(arguments.tasks)]
    if not wanted:
        parser.error(f"--tasks: choose among {', '.join(task.name for task in TASKS)}")
    started = time.monotonic()
    # the shipped recipe of a sector that is fitted is scored by the run itself, on test rows
    columns = (*EPSILONS, None) if arguments.split == "test" else EPSILONS
    found = measure(wanted, columns, arguments.seeds, arguments.split, arguments.set, arguments.processes)
    print("\n".join(table(found)))
    missed = [line for task in wanted for line in misses(task, found[task])]
    print("\n" + "\n".join(missed or ["every target is reached"]))
    print(f"{time.monotonic() - started:.0f} s with {arguments.processes} processes")
    return int(bool(missed))


Found = Mapping[float | None, Sequence[Outcome]]
"""Outcomes by epsilon, one a seed; None: without privacy."""


def measure(
    tasks: Sequence[Task],
    columns: Sequence[float | None],
    seeds: Sequence[int],
    split: str,
    more: Sequence[str],
    processes: int,
) -> dict[Task, Found]:
    """Every task at every epsilon with every seed; overrides are of private runs only."""
    jobs = [(task, epsilon, seed) for task in tasks for epsilon in columns for seed in seeds]
    context = multiprocessing.get_context("spawn")
    found: dict[Task, dict[float | None, list[Outcome]]] = {
        task: {epsilon: [] for epsilon in columns} for task in tasks
    }
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = [
            pool.submit(outcome, [*task.settings(epsilon), *(more if epsilon else ())], seed, split)
            for task, epsilon, seed in jobs
        ]
        for (task, epsilon, seed), future in zip(jobs, running, strict=True):
            found[task][epsilon].append(future.result())
            said = f"{task.name}, epsilon {epsilon}, seed {seed}: {future.result().value:.4f}"
            print(said, file=sys.stderr, flush=True)
    return dict(found)


def outcome(settings: Sequence[str], seed: int, split: str = "test") -> Outcome:
    """The primary metric of the last version on all nodes' rows of a split."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [*settings, f"seed={seed}", "tracking=none", f"runs_dir={runs}"]
        result = simulate(overrides)
        metric = result.primary_metric["name"]
        on_test = result.primary_metric["value"]
        value = on_test if split == "test" else score(overrides, Path(str(result.model_path)), split)[metric]
    return Outcome(metric, float(value), result.epsilon_max)


def score(overrides: Sequence[str], version: Path, split: str) -> Mapping[str, float]:
    """Metrics of a version on all nodes' rows of a split; nothing may be fitted on rows."""
    config, _ = prepare(overrides)
    sector, task = build.check(config), NodeTask.of(config)
    rows = concatenate([sector.load(place_of(spec, task)).split(split) for spec in config.nodes.expand()])
    params, _ = versions.read_version(version)
    return build.scoring(sector).metrics(training.evaluate(sector, params, rows))


# ---------------------------------------------------------------- what is said


def table(found: Mapping[Task, Found]) -> list[str]:
    """Lines of the table: means over seeds, lowest to highest."""
    columns = next(iter(found.values()))
    heads = ["without" if epsilon is None else f"epsilon {epsilon:g}" for epsilon in columns]
    lines = [
        f"| sector | nodes | metric | {' | '.join(heads)} | private recipe |",
        f"|---|---|---|{'---|' * len(heads)}---|",
    ]
    for task, outcomes in found.items():
        cells = " | ".join(_spread([o.value for o in outcomes[epsilon]]) for epsilon in columns)
        metric = next(iter(outcomes.values()))[0].metric
        lines.append(f"| {task.sector} | {task.nodes} | {metric} | {cells} | {task.told} |")
    return lines


def misses(task: Task, outcomes: Found) -> list[str]:
    """A sentence for every target that the mean over seeds is below, and for every budget that was overspent."""
    found = []
    for epsilon, least in task.targets.items():
        mean = float(np.mean([o.value for o in outcomes[epsilon]]))
        if mean < least:
            found.append(f"{task.name}: {mean:.4f} at epsilon {epsilon:g}, and {least:g} is the target")
    for epsilon, each in outcomes.items():
        spent = max((o.epsilon or 0.0 for o in each), default=0.0)
        if epsilon is not None and spent > epsilon:
            found.append(f"{task.name}: epsilon {spent:.4g} was spent, and {epsilon:g} planned")
    return found


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    raise SystemExit(main())
