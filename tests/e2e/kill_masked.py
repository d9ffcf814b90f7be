"""Kill a masked run at every durable step in turn, resume it, and print what came of it.  Driven by test_secagg.py.

A durable step is a rename, or a fact that a node adds to its journal: so a run is killed too between the first share
that a node gives away and the sum that the server keeps.  Each run is a fork of this process, which has imported
everything once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from clients.store import NodeStore
from conf.load import load
from conf.schema import RunConfig
from experiments import simulate as simulation
from experiments.simulate import simulate
from server import run as runs
from server.folder import RunFolder
from trellis.errors import BaseSpent

OVERRIDES = [
    "sector=healthcare_wisconsin",
    "data=synthetic",
    "sector.options.synthetic_rows=200",
    "nodes=pilot",
    "privacy=secagg",
    "privacy.secagg.allow_no_dropout=true",
    "privacy.secagg.insecure_rng=true",
    "server_optimizer=momentum",
    "tracking=none",
    "run_name=run",
]


def forked(folder: Path, overrides: list[str], *, kill_before: int | None) -> dict[str, Any]:
    """Run in a fork that kills itself before its k-th durable step.  -> {"killed"}, {"spent"} or the result"""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        steps = _count_steps(kill_before)
        try:
            result = simulate(overrides)
            closed = [record.closed for record in RunFolder(Path(result.run_dir)).records()]
            found = {"digest": result.model_digest, "metrics": result.metrics, "closed": closed, "steps": steps}
        except BaseSpent as error:
            found = {"spent": str(error)}
        answer.write_text(json.dumps(found))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return {"killed": True}
    return dict(json.loads(answer.read_text()))


def _count_steps(kill_before: int | None) -> list[str]:
    """What was done last, step by step."""
    steps: list[str] = []

    def counted(original: Any, named: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            if len(steps) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            steps.append(named(*arguments))
            return original(*arguments, **options)

        return step

    os.replace = counted(os.replace, lambda source, target: Path(target).name)
    NodeStore.add = counted(NodeStore.add, lambda store, fact: str(fact["fact"]))  # type: ignore[method-assign]
    return steps


@cache
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    return load(overrides)


def _load(overrides: Sequence[str]) -> RunConfig:
    """`load`, composed once for every run of these forks: that takes longer than the run."""
    place = dict(o.split("=", 1) for o in overrides if o.partition("=")[0] in ("runs_dir", "resume"))
    config = _composed(tuple(o for o in overrides if o.partition("=")[0] not in place))
    return dataclasses.replace(copy.deepcopy(config), **place)


def _telling(steps: list[str]) -> list[int]:
    """Steps from the first question to the last sum, without what is the same at other nodes or was tried before."""
    closing = steps.index("state.safetensors", steps.index("update.bin"))
    found = []
    for i, name in enumerate(steps[: len(steps) - 3]):
        if i < steps.index("masked") or name in ("update.bin", "reply.bin") or name.startswith("round-"):
            continue
        of_nodes = name in ("masked", "answered")
        last = of_nodes and name not in steps[i + 1 : closing if i < closing else None]
        first = of_nodes and i < closing and name not in steps[:i]
        if first or last or not of_nodes:
            found.append(i)
    return found


def main() -> None:
    folder, chosen = Path(sys.argv[1]), sys.argv[2]
    base = [*OVERRIDES, "rounds=1"]
    simulation.load = runs.load = _load
    # what torch sets up on first use is set up before the forks, not in each of them
    simulate([*base, f"runs_dir={folder / 'warm'}"])
    simulate([f"runs_dir={folder / 'warm'}", "resume=run"])
    whole = forked(folder, [*base, f"runs_dir={folder / 'whole'}"], kill_before=None)
    outcomes = []
    every = range(len(whole["steps"]))
    for point in every if chosen == "all" else _telling(whole["steps"]):
        where = folder / f"killed-{point:03d}"
        killed = forked(folder, [*base, f"runs_dir={where}"], kill_before=point)
        started = (where / "run" / "config.json").exists()
        again = [f"runs_dir={where}", "resume=run"] if started else [*base, f"runs_dir={where}"]
        found = forked(folder, again, kill_before=None)
        outcomes.append({"point": point, "before": whole["steps"][point], "killed": killed, "found": found})
    print(json.dumps({"whole": whole, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
