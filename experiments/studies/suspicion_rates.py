"""How often are honest nodes flagged, and is any quarantined?

  python -m experiments.studies.suspicion_rates                       every shipped sector, unequal nodes, 15 rounds
  python -m experiments.studies.suspicion_rates --outlier-factor 3    a stricter limit

Nobody lies in these runs: every flag is a false one.  Half of them aggregate by a robust rule, which is harder on an
unusual honest node: what is left out of the model is not fitted by it, and its updates stay long.  Exit code 1: an
honest node was quarantined.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments.simulate import simulate
from server.run import RunResult
from trellis.types import RoundRecord, ServerState

PARTITIONS = {
    "banks": ("amount_band", "dirichlet 0.1", "dirichlet 0.3", "dirichlet 0.5"),
    "healthcare_wisconsin": ("radius_band", "dirichlet 0.1", "dirichlet 0.3", "dirichlet 0.5"),
}
RULES = (("mean", 0), ("geometric_median", 2))


@dataclass(slots=True)
class Tally:
    """Flags and judged rounds, by node of a run."""

    flags: Counter[tuple[int, str]] = field(default_factory=Counter)
    judged: Counter[tuple[int, str]] = field(default_factory=Counter)
    quarantined: list[str] = field(default_factory=list)

    def add(self, seed: int, records: list[RoundRecord], result: RunResult) -> None:
        """One run: a node was flagged in the rounds in which what speaks against it grew."""
        before: dict[str, float] = {}
        for record in records:
            for node, llr in record.suspicion.items():
                self.flags[seed, node] += llr > before.get(node, 0.0)
                self.judged[seed, node] += node in record.answered
            before = dict(record.suspicion)
        self.quarantined += [f"{q['node']} (seed {seed}, round {q['round']})" for q in result.quarantined]

    @property
    def rate(self) -> float:
        return self.flags.total() / self.judged.total()

    @property
    def worst(self) -> float:
        return max(self.flags[key] / self.judged[key] for key in self.judged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sectors", nargs="+", default=list(PARTITIONS))
    parser.add_argument("--nodes", default="consortium")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the run and of the partition")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--outlier-factor", type=float, default=None, help="default: the shipped one")
    arguments = parser.parse_args()
    print("| sector | partition | rule | seeds | rounds | flags per node and round | max over nodes | quarantined |")
    print("|---|---|---|---|---|---|---|---|")
    caught = 0
    for sector, partition, rule, num_byzantine in cases(arguments.sectors):
        tally = Tally()
        for seed in arguments.seeds:
            records, result = honest_run(
                [
                    *(f"sector={sector}", *partitioned(partition), f"sector.options.split_seed={seed}"),
                    *(f"rule={rule}", f"num_byzantine={num_byzantine}", f"seed={seed}"),
                    *(f"nodes={arguments.nodes}", f"rounds={arguments.rounds}"),
                    *([f"suspicion.outlier_factor={arguments.outlier_factor}"] if arguments.outlier_factor else []),
                ]
            )
            tally.add(seed, records, result)
        print(
            f"| {sector} | {partition} | {rule} | {len(arguments.seeds)} | {arguments.rounds} | {tally.rate:.4f} "
            f"| {tally.worst:.2f} | {', '.join(tally.quarantined) or 'none'} |",
            flush=True,
        )
        caught += len(tally.quarantined)
    return int(caught > 0)


def cases(sectors: list[str]) -> Iterator[tuple[str, str, str, int]]:
    """(sector, partition, rule, num_byzantine) of each line."""
    for sector in sectors:
        for partition in PARTITIONS[sector]:
            for rule, num_byzantine in RULES:
                yield sector, partition, rule, num_byzantine


def partitioned(partition: str) -> list[str]:
    """`dirichlet 0.1` -> the overrides that make it."""
    name, _, alpha = partition.partition(" ")
    return [f"sector.options.partition={name}", *([f"sector.options.alpha={alpha}"] if alpha else [])]


def honest_run(overrides: list[str]) -> tuple[list[RoundRecord], RunResult]:
    """A run in which everyone is honest, with the detector on.  -> its rounds, its result"""
    records: list[RoundRecord] = []

    def keep(state: ServerState, record: RoundRecord) -> None:
        records.extend([record] if record.purpose == "train" else [])

    with tempfile.TemporaryDirectory() as runs:
        # everyone is there in every round: what is measured is the detector
        settings = [
            "suspicion=sequential",
            "engine.links=false",
            "checks.allow_one_class=true",
            "tracking=none",
            f"runs_dir={runs}",
        ]
        result = simulate([*overrides, *settings], on_round=keep)
    return records, result


if __name__ == "__main__":
    raise SystemExit(main())
