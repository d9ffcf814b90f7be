"""What an engine costs: start, round and message, against Flower's own simulation in the same run.

    python -m experiments.benchmarks.engines [--quick] [--json]

The client returns the 0.4 MB it receives, so what is measured is the engine.  Every engine sends one training message
a node and round.  Each row is a fresh process: `start` is from its creation to the first message handled at a client,
imports included.  Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

RAY, GRID, LOCAL = "flower, ray", "flower, local grid", "trellis, local"
NUM_PARAMS = 100_000
ROUNDS = {RAY: {10: 8, 100: 4, 1000: 2}, GRID: {10: 20, 100: 10, 1000: 4}, LOCAL: {10: 20, 100: 10, 1000: 4}}
TIMEOUT_S = 300.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_DEDUP_LOGS": "0"}
FIRST = "TRELLIS_BENCH_FIRST"
"""Environment variable: the file whose creation marks the first message handled."""

TARGET_RATIO, TARGET_START_S, TARGET_MESSAGE_MS = 25.0, 3.0, 0.3
TARGETS = (
    f"targets: at 100 nodes a round at least {TARGET_RATIO:.0f}x faster than Flower's simulation; "
    f"start under {TARGET_START_S:.0f} s; under {TARGET_MESSAGE_MS} ms a message beside the client's own work"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine at one size."""

    nodes: int
    engine: str
    rounds: int
    start_s: float
    round_s: float
    """Median over the rounds."""
    message_ms: float
    client_ms: float
    """Of a message, the client's own work: making its reply.  0 where it runs in other processes."""
    ratio: float | None = None
    """How often its round fits into one of Flower's simulation."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 and 100 nodes only")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--nodes", type=int, nargs="+", choices=[10, 100, 1000], help="other sizes")
    chosen = parser.parse_args(arguments)
    sizes = chosen.nodes or ([10, 100] if chosen.quick else [10, 100, 1000])
    if not chosen.json:
        print(
            f"{'nodes':>5}  {'engine':<19} {'start s':>8} {'s/round':>9} "
            f"{'ms/message':>11} {'client ms':>10} {'ratio':>8}"
        )
    rows: list[Measured] = []
    for num_nodes in sizes:
        for found in _compared([measure(engine, num_nodes) for engine in (RAY, GRID, LOCAL)]):
            rows.append(found)
            if not chosen.json:
                print(_line(found), flush=True)
    print(json.dumps([asdict(row) for row in rows], indent=1) if chosen.json else TARGETS)
    return int(any(_misses(row) for row in rows))


def measure(engine: str, num_nodes: int) -> Measured:
    """Run one engine in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        first = Path(folder) / "first"
        rounds = ROUNDS[engine][num_nodes]
        code = f"from experiments.benchmarks import engines; engines.work({engine!r}, {num_nodes}, {rounds})"
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **QUIET, FIRST: str(first)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise RuntimeError(f"{engine} with {num_nodes} nodes failed: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        round_s = statistics.median(found["rounds"])
        start_s = float(first.read_text()) - began
    return Measured(num_nodes, engine, rounds, start_s, round_s, 1000 * round_s / num_nodes, 1000 * found["client"])


# ---------------------------------------------------------------- in the engine's own process


def work(engine: str, num_nodes: int, rounds: int) -> None:
    """Run the rounds and print the seconds of each."""
    import logging

    logging.getLogger("flwr").setLevel(logging.ERROR)
    if engine == RAY:
        seconds = _on_ray(num_nodes, rounds)
    else:
        from experiments.engines.local import LocalGrid

        run = _fedavg if engine == GRID else _trellis
        with LocalGrid(client(), num_nodes) as grid:
            seconds = run(grid, rounds)
    print(json.dumps({"rounds": seconds, "client": statistics.median(_client_seconds) if _client_seconds else 0.0}))


_client_seconds: list[float] = []
"""Of each message handled in this process."""


def client() -> ClientApp:
    """A ClientApp that returns what it receives."""
    from flwr.app import Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()
    handled = False

    @app.train()
    def train(message: Message, context: Context) -> Message:
        nonlocal handled
        if not handled:
            handled = True
            _mark_first()
        began = time.perf_counter()
        metrics = MetricRecord({"num-examples": 1})
        reply = Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
        _client_seconds.append(time.perf_counter() - began)
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """For the closing evaluation of our strategy, after the last round that is timed."""
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def _on_ray(num_nodes: int, rounds: int) -> list[float]:
    import warnings

    from flwr.app import Context
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    seconds: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seconds.extend(_fedavg(grid, rounds))

    warnings.simplefilter("ignore")
    # One core a node: as many nodes at a time as there are cores.
    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}}
    run_simulation(server, client(), num_nodes, backend_config=backend)
    return seconds


def _fedavg(grid: Grid, rounds: int) -> list[float]:
    from flwr.serverapp.strategy import FedAvg

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=1, min_train_nodes=1)
    return _timed(rounds, lambda each: strategy.start(grid, _model(), num_rounds=rounds, evaluate_fn=each))


def _trellis(grid: Grid, rounds: int) -> list[float]:
    from strategies.flower import RoundStrategy

    strategy = RoundStrategy(clock=grid.clock)  # type: ignore[attr-defined]
    return _timed(rounds, lambda each: strategy.start(grid, _model(), num_rounds=rounds, evaluate_fn=each))


def _timed(rounds: int, start: Callable[[Callable[[int, ArrayRecord], MetricRecord | None]], Any]) -> list[float]:
    """Seconds between the ends of rounds: a strategy calls `evaluate_fn` before the first and after each."""
    ends: list[float] = []

    def ended(server_round: int, arrays: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    start(ended)
    if len(ends) != rounds + 1:
        raise RuntimeError(f"{rounds} rounds were asked for, {len(ends) - 1} ended")
    return [after - before for before, after in pairwise(ends)]


def _model() -> ArrayRecord:
    import numpy as np
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({"layer": Array(np.random.default_rng(0).standard_normal(NUM_PARAMS).astype(np.float32))})


def _mark_first() -> None:
    path = Path(os.environ[FIRST])
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(repr(time.time()))
    with suppress(FileExistsError):  # another process was the first
        os.link(own, path)


# ---------------------------------------------------------------- the table


def _compared(rows: list[Measured]) -> list[Measured]:
    """The rows of one size, each with its ratio to Flower's simulation."""
    flower = next(row for row in rows if row.engine == RAY)
    return [Measured(**{**asdict(row), "ratio": flower.round_s / row.round_s}) for row in rows]


def _line(row: Measured) -> str:
    missed = f"   missed: {_misses(row)}" if _misses(row) else ""
    return (
        f"{row.nodes:5d}  {row.engine:<19} {row.start_s:8.2f} {row.round_s:9.4f} {row.message_ms:11.3f} "
        f"{row.client_ms:10.3f} {row.ratio or 0.0:7.1f}x{missed}"
    )


def _misses(row: Measured) -> str:
    """The targets that a row of ours misses."""
    if row.engine != LOCAL:
        return ""
    found = {
        "start": row.start_s < TARGET_START_S,
        "message": row.nodes < 100 or row.message_ms - row.client_ms < TARGET_MESSAGE_MS,
        "ratio": row.nodes != 100 or (row.ratio or 0.0) >= TARGET_RATIO,
    }
    return ", ".join(name for name, met in found.items() if not met)


if __name__ == "__main__":
    raise SystemExit(main())
