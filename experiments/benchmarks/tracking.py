"""What a full round record costs at the tracking store.

    python -m experiments.benchmarks.tracking [--rounds 20] [--nodes 0 10 50]

A full record is: the version's LoggedModel, files and registered version, about 20 metrics of the federation, a batch
for each node's child run, alias, tags and the ledger.  The store is a fresh SQLite file.  Exit code 1: a target is
missed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from conf.schema import RunConfig, TrackingConfig, config_digest, to_json
from server import store, versions
from server.delivery import Session
from server.folder import RunFolder
from server.run_info import RunInfo
from trellis import vectors
from trellis.types import MetricSpec, RoundRecord

TARGETS_MS = {10: 100.0, 50: 350.0}
METRICS = ("auc", "ap", "accuracy", "loss", "brier", "recall")


def write_run(folder: RunFolder, rounds: int, num_nodes: int) -> RunInfo:
    """A run whose records and versions wait in `folder`, as many rounds as asked."""
    config = RunConfig()
    rng = np.random.default_rng(0)
    nodes = tuple(f"node-{i:02d}" for i in range(num_nodes))
    digest = ""
    for round_ in range(rounds + 1):
        params = {"layer.weight": rng.standard_normal((64, 31)).astype(np.float32)}
        base, digest = digest, vectors.digest(params)
        card = versions.Card.of(
            config, run="bench", round=round_, digest=digest, nodes=nodes, num_params=64 * 31, created_at=time.time()
        )
        versions.write_version(folder, round_, params, card)
        if round_:
            folder.write_record(_record(round_, nodes, base, digest, rng))
    primary = MetricSpec("auc", "max")
    return RunInfo("bench", folder.path.name, "bench", primary, to_json(config), config_digest(config))


def seconds_per_record(num_nodes: int, rounds: int, runs_dir: Path) -> list[float]:
    """Deliver one record after another.  -> seconds of each; the first ones (new child runs) are left out."""
    folder = RunFolder(runs_dir / f"nodes-{num_nodes}")
    config = TrackingConfig()
    info = write_run(folder, rounds, num_nodes)
    hidden = folder.path / "records-to-come"
    (folder.path / "records").rename(hidden)
    session = Session(folder, config, info, store.embedded_uri(runs_dir))
    return list(_timed(session, folder, sorted(hidden.iterdir())))[2:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 10, 50])
    chosen = parser.parse_args(arguments)
    missed = False
    with tempfile.TemporaryDirectory() as runs_dir:
        print("nodes  median ms    p90 ms  target ms")
        for num_nodes in chosen.nodes:
            found_ms = [1000 * s for s in seconds_per_record(num_nodes, chosen.rounds + 2, Path(runs_dir))]
            median, p90 = statistics.median(found_ms), float(np.quantile(found_ms, 0.9))
            target = TARGETS_MS.get(num_nodes)
            missed |= target is not None and median > target
            print(f"{num_nodes:5d}  {median:9.1f} {p90:9.1f}  {'-' if target is None else f'{target:.0f}':>9}")
    return int(missed)


def _timed(session: Session, folder: RunFolder, waiting: list[Path]) -> Iterator[float]:
    (folder.path / "records").mkdir()
    for path in waiting:
        path.rename(folder.path / "records" / path.name)
        began = time.perf_counter()
        session.deliver()
        yield time.perf_counter() - began


def _record(round_: int, nodes: tuple[str, ...], base: str, digest: str, rng: np.random.Generator) -> RoundRecord:
    def metrics() -> dict[str, float]:
        return {**{f"val/{m}": float(rng.random()) for m in METRICS}, "train/loss": float(rng.random())}

    return RoundRecord(
        run="bench",
        round=round_,
        purpose="train",
        started_at=time.time(),
        base_digest=base,
        digest=digest,
        asked=nodes,
        answered=nodes,
        refusals=(),
        base_metrics=metrics(),
        node_metrics={node: metrics() for node in nodes},
        num_examples=dict.fromkeys(nodes, 100),
        update_norms={node: float(rng.random()) for node in nodes},
        weights=dict.fromkeys(nodes, 1.0),
        aggregate_norm=1.0,
        bytes_up=8000,
        bytes_down=8000,
        seconds={"train": 1.0, "collect": 0.5, "aggregate": 0.01},
    )


if __name__ == "__main__":
    raise SystemExit(main())
