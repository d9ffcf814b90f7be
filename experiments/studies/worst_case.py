"""What happens to a sector's model when some nodes lie: every rule under every attack, and the worst of them.

  python -m experiments.studies.worst_case                              banks, ten nodes, two liars
  python -m experiments.studies.worst_case --picture docs/images/attack.png
  python -m experiments.studies.worst_case --sector healthcare_wisconsin --rules robust krum --attacks alie ipm

One line an attack, with the primary metric on test rows of the worst seed; the last line is the worst over attacks and
seeds, never the mean.  Rules that survive liars are told how many there are; the mean cannot be.  `x*` options of an
attack are written as in an override: --attacks ipm "ipm tau=10".
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.simulate import simulate
from server.folder import RunFolder
from strategies import rules

ATTACKS = (
    "none", "sign_flip", "gaussian std=1.0", "ipm", "ipm optimised=true", "alie z=1.5", "alie optimised=true",
    "min_max", "min_max direction=unit", "min_max direction=sign", "min_sum", "min_sum direction=unit",
    "min_sum direction=sign", "agr_tailored", "agr_tailored direction=unit", "agr_tailored direction=sign", "mimic",
    "rop", "scaling gamma=-10", "label_flip", "backdoor scale=5.0", "free_rider", "free_rider mode=previous",
)  # fmt: skip
"""Attacks that pass the checks of a reply; the others cost their senders the round under every rule."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its final metric on test rows, and the metric on validation rows of each version."""

    rule: str
    attack: str
    seed: int
    value: float | None
    """None where nothing could be scored."""
    curve: tuple[float, ...]
    metric: str
    direction: str
    success_rate: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sector", default="banks")
    parser.add_argument("--nodes", default="consortium")
    parser.add_argument("--rules", nargs="+", default=["mean", "robust"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-attackers", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="for every run, e.g. rounds=5")
    parser.add_argument("--picture", type=Path, help="draw the metric over rounds under each rule's worst attack")
    chosen = parser.parse_args()
    started = time.monotonic()
    found: list[Outcome] = []
    for attack in chosen.attacks:
        found += [
            outcome(chosen.sector, chosen.nodes, rule, attack, seed, chosen.num_attackers, chosen.set)
            for rule, seed in itertools.product(chosen.rules, chosen.seeds)
        ]
        if attack == chosen.attacks[0]:
            _head(chosen.rules, found[0].metric)
        print(_line(attack, found, chosen.rules), flush=True)
    print(_worst_line(found, chosen.rules))
    seeds = ", ".join(map(str, chosen.seeds))
    print(
        f"\n{chosen.sector}, nodes={chosen.nodes}, {chosen.num_attackers} liars, seeds {seeds}: "
        f"{time.monotonic() - started:.0f} s"
    )
    if chosen.picture:
        draw(found, chosen.rules, chosen.picture, f"{chosen.sector}, {chosen.num_attackers} liars")
    return 0


def outcome(sector: str, nodes: str, rule: str, attack: str, seed: int, num_attackers: int, more: list[str]) -> Outcome:
    """One run of a rule under an attack, written as its name and options."""
    name, *options = attack.split()
    overrides = [f"sector={sector}", f"nodes={nodes}", f"rule={rule}", f"seed={seed}", f"attack={name}", *more]
    overrides += [f"attack.options.{option}" for option in options]
    if name != "none":
        overrides.append(f"attack.num_attackers={num_attackers}")
    if rules.get(rule).tolerates:
        overrides.append(f"num_byzantine={num_attackers}")
    with tempfile.TemporaryDirectory() as runs:
        # everyone is there in every round: what is measured is the rule
        result = simulate([*overrides, "engine.links=false", "tracking=none", f"runs_dir={runs}"])
        metric = result.primary_metric
        key = f"val/{metric['name']}"
        records = RunFolder(Path(result.run_dir)).records()
        curve = tuple(r.base_metrics[key] for r in records if key in r.base_metrics)
    success = result.attack["success_rate"] if result.attack else None
    shown = f"{metric['split']} {metric['name']}"
    return Outcome(rule, attack, seed, metric["value"], curve, shown, metric["direction"], success)


def worst(found: list[Outcome], rule: str, attack: str | None = None) -> Outcome:
    """The run of a rule that ended worst, among all attacks or of one; worst of all is one that has no score."""

    def goodness(o: Outcome) -> float:
        if o.value is None or not math.isfinite(o.value):
            return -math.inf
        return o.value if o.direction == "max" else -o.value

    return min(
        (o for o in found if o.rule == rule and o.attack == (attack or o.attack) and (attack or o.attack != "none")),
        key=goodness,
    )


def _head(names: list[str], metric: str) -> None:
    print(f"| attack ({metric}, worst seed) | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))


def _line(attack: str, found: list[Outcome], names: list[str]) -> str:
    cells = []
    for rule in names:
        one = worst(found, rule, attack)
        opened = "" if one.success_rate is None else f", trigger opens {one.success_rate:.0%}"
        cells.append(f"{_shown(one)} (seed {one.seed}{opened})")
    return f"| {attack} | " + " | ".join(cells) + " |"


def _worst_line(found: list[Outcome], names: list[str]) -> str:
    lows = [worst(found, rule) for rule in names if any(o.attack != "none" for o in found)]
    return "| **worst** | " + " | ".join(f"**{_shown(o)}** ({o.attack}, seed {o.seed})" for o in lows) + " |"


def _shown(o: Outcome) -> str:
    return "no score" if o.value is None else f"{o.value:.4f}"


def draw(found: list[Outcome], names: list[str], path: Path, title: str) -> None:
    """The metric over rounds: each rule without an attack (thin), and under its own worst attack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=120)
    for rule, color in zip(names, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=False):
        low = worst(found, rule)
        axes.plot(low.curve, color=color, linewidth=2.5, label=f"{rule}, worst attack: {low.attack}")
        calm = [o for o in found if o.rule == rule and o.attack == "none" and o.seed == low.seed]
        if calm:
            axes.plot(calm[0].curve, color=color, linewidth=1, linestyle="--", label=f"{rule}, no attack")
    axes.set(xlabel="round", ylabel=f"validation {low.metric.split()[-1]}", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=8, framealpha=0.9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
