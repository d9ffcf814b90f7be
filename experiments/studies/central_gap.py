"""What did federating gain, and what did it cost?  Every task, against one model on pooled rows and one on each node's.

  python -m experiments.studies.central_gap                          the seven tasks, seeds 0, 1, 2 (two processes)
  python -m experiments.studies.central_gap --tasks banks/pilot      one of them; SECTOR/NODES, or SECTOR
  python -m experiments.studies.central_gap --by-node                and a table by node
  python -m experiments.studies.central_gap --set heterogeneity=fedprox    with overrides of your own

Both sides start from the same params and have the same budget of epochs, batch size and learning rate; both are tested
on the same rows, those of all nodes' test splits.  "alone" is the mean over nodes of a model trained on that node's
rows only, tested on everyone's.  The bar is a mean gap to the pooled model of at most 0.02 of the primary metric, and
for an error (RMSE) at most pooled / 0.97.  Exit code 1: it is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.load import choices
from experiments.simulate import simulate

BAR = 0.02
ERROR_BAR = 0.97

TASKS: Mapping[str, Sequence[str]] = {
    "retail": ("countries",),
    "healthcare_retina": ("pilot",),
    "production": ("plants",),
    "healthcare_pneumonia": ("pilot", "consortium"),
    "banks": ("pilot", "consortium"),
    "healthcare_heart": ("hospitals",),
    "healthcare_wisconsin": ("pilot", "consortium"),
}
"""Each sector and the federations it is shown with; the longest runs first, so that processes end together."""


@dataclass(frozen=True, slots=True)
class Task:
    sector: str
    nodes: str

    @property
    def settings(self) -> list[str]:
        """The overrides of the shipped recipe; an experiment of the sector's name has what lies outside its group."""
        recipe = [f"experiment={self.sector}"] if self.sector in choices("experiment") else [f"sector={self.sector}"]
        return [*recipe, f"nodes={self.nodes}"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: the primary metric of each model on all nodes' test rows, and by node on its own."""

    metric: str
    direction: str
    federated: float
    pooled: float
    alone: float
    tuned: float | None
    """Where nodes fine-tune: each with its own model, on its own rows, all counted together."""
    nodes: Mapping[str, Mapping[str, float | None]]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="SECTOR[/NODES]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split-seed", type=int, default=0, help="another partition and other splits")
    parser.add_argument("--set", nargs="*", default=[], metavar="OVERRIDE", help="overrides on top of the recipe")
    parser.add_argument("--by-node", action="store_true", help="also print each node's own test rows")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    more = [f"sector.options.split_seed={arguments.split_seed}", *arguments.set]
    wanted = [task for name in arguments.tasks for task in tasks_of(name)]
    found = measure(wanted, arguments.seeds, more, arguments.processes)
    print("| sector | nodes | metric | federated | pooled, central | alone | gap | within the bar | seconds a run |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in wanted:
        print(row(task, found[task]), flush=True)
    if arguments.by_node:
        for task in wanted:
            print(f"\n{task.sector}, nodes={task.nodes}, {found[task][0].metric} on each node's own test rows\n")
            print("\n".join(node_table(found[task])), flush=True)
    print(f"\n{time.monotonic() - started:.0f} s with {arguments.processes} processes")
    return int(not all(within(found[task]) for task in wanted))


def tasks_of(name: str) -> list[Task]:
    """`banks` -> banks with every federation it is shown with; `banks/pilot` -> that one."""
    sector, _, nodes = name.partition("/")
    return [Task(sector, each) for each in ([nodes] if nodes else TASKS.get(sector, ("pilot",)))]


def measure(
    tasks: Iterable[Task], seeds: Sequence[int], more: Sequence[str], processes: int
) -> dict[Task, list[Outcome]]:
    """Every task with every seed; runs are single-threaded, so as many at once as there are processes."""
    tasks = list(tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {task: [pool.submit(outcome, task, seed, list(more)) for seed in seeds] for task in tasks}
        return {task: [future.result() for future in futures] for task, futures in running.items()}


def outcome(task: Task, seed: int, more: list[str]) -> Outcome:
    """One run with its baselines."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as runs:
        where = [f"seed={seed}", "baselines=true", "tracking=none", f"runs_dir={runs}"]
        result = simulate([*task.settings, *more, *where])
    baselines: dict[str, Any] = result.baselines or {}
    metric = result.primary_metric["name"]
    return Outcome(
        metric=metric,
        direction=result.primary_metric["direction"],
        federated=result.primary_metric["value"],
        pooled=baselines["pooled"][metric],
        alone=baselines["local_only"]["everywhere"],
        tuned=result.metrics.get(f"test_tuned/{metric}"),
        nodes=result.nodes,
        seconds=time.monotonic() - started,
    )


def gap(outcomes: Sequence[Outcome]) -> float:
    """Pooled less federated, in the direction of better; means over seeds."""
    sign = 1.0 if outcomes[0].direction == "max" else -1.0
    return float(sign * (np.mean([o.pooled for o in outcomes]) - np.mean([o.federated for o in outcomes])))


def within(outcomes: Sequence[Outcome]) -> bool:
    """Whether the federation is within the bar of the pooled model."""
    federated, pooled = (float(np.mean([getattr(o, key) for o in outcomes])) for key in ("federated", "pooled"))
    return federated <= pooled / ERROR_BAR if outcomes[0].direction == "min" else pooled - federated <= BAR


def row(task: Task, outcomes: Sequence[Outcome]) -> str:
    """One line of the table: means over seeds, lowest to highest."""
    columns = (_spread([getattr(o, key) for o in outcomes]) for key in ("federated", "pooled", "alone"))
    seconds = float(np.mean([o.seconds for o in outcomes]))
    return (
        f"| {task.sector} | {task.nodes} | test {outcomes[0].metric} | {' | '.join(columns)} "
        f"| {gap(outcomes):+.4f} | {'yes' if within(outcomes) else 'NO'} | {seconds:.0f} |"
    )


def node_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of a table by node, means over seeds."""
    columns = [
        c for c in ("local_only", "pooled", "federated", "tuned") if any(c in v for v in outcomes[0].nodes.values())
    ]
    lines = [f"| node | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for node in outcomes[0].nodes:
        cells = []
        for column in columns:
            values = [v for o in outcomes if (v := o.nodes[node].get(column)) is not None]
            cells.append(f"{np.mean(values):.4f}" if values else "-")
        lines.append(f"| {node} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    raise SystemExit(main())
