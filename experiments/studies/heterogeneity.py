"""Where sites differ: for whom does each remedy help?

  python -m experiments.studies.heterogeneity                         hospitals, plants, clinics, banks; seeds 0, 1, 2
  python -m experiments.studies.heterogeneity --tasks banks/consortium
  python -m experiments.studies.heterogeneity --tasks healthcare_pneumonia --set sector.options.partition=brightness

The primary metric on each node's own test rows (mean over seeds), under its model made alone, the pooled one, the
shipped federated recipe, and that recipe with one more line of config; `fine_tune` is the final model of the shipped
recipe, trained on at the node before it is tested there.  The last line is of all nodes' test rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.studies.central_gap import Outcome, Task, measure, tasks_of

TASKS = ("healthcare_heart/hospitals", "production/plants", "healthcare_pneumonia/pilot", "banks/consortium")
REMEDIES = ("fedprox", "local_head")
COLUMNS = ("local_only", "pooled", "federated", *REMEDIES, "fine_tune")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="SECTOR/NODES")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="OVERRIDE", help="overrides on top of the recipe")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    for task in (task for name in arguments.tasks for task in tasks_of(name)):
        found = {
            remedy: measure([task], arguments.seeds, [*arguments.set, f"heterogeneity={remedy}"], arguments.processes)
            for remedy in ("fine_tune", *REMEDIES)
        }
        print("\n".join(table(task, {remedy: each[task] for remedy, each in found.items()})), flush=True)
    return 0


def table(task: Task, found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Lines of a table: nodes down, models across; the best of a line is bold."""
    base = found["fine_tune"]
    lines = [
        f"\n| {task.sector}, {task.nodes}: test {base[0].metric} of | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for node in base[0].nodes:
        values = {column: _of_node(base, node, column) for column in ("local_only", "pooled", "federated")}
        values |= {remedy: _of_node(found[remedy], node, "federated") for remedy in REMEDIES}
        values |= {"fine_tune": _of_node(base, node, "tuned")}
        lines.append(_line(node, values, base[0].direction))
    whole = {key: _mean([getattr(o, key) for o in base]) for key in ("pooled", "federated")}
    whole |= {"local_only": _mean([o.alone for o in base])}
    whole |= {remedy: _mean([o.federated for o in found[remedy]]) for remedy in REMEDIES}
    whole |= {"fine_tune": _mean([o.tuned for o in base])}
    return [*lines, _line("all", whole, base[0].direction)]


def _of_node(outcomes: Sequence[Outcome], node: str, column: str) -> float | None:
    return _mean([o.nodes[node].get(column) for o in outcomes])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _line(name: str, values: Mapping[str, float | None], direction: str) -> str:
    known = [v for v in values.values() if v is not None]
    best = (min(known) if direction == "min" else max(known)) if known else None
    cells = ["-" if (v := values[c]) is None else f"**{v:.4f}**" if v == best else f"{v:.4f}" for c in COLUMNS]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
