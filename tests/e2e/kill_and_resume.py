"""Kill a run at every durable step in turn, resume it, and print what came of it.  Driven by test_resume.py.

A durable step is a rename: everything Trellis keeps is written to a temporary file and renamed into place, by server
and nodes alike, so killing before each rename visits every state that a crash can leave behind, inside a round too.
Each run is a fork of this process, which has imported everything once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sectors
from experiments.simulate import simulate
from sectors.healthcare_wisconsin import HealthcareWisconsin

OVERRIDES = [
    "sector=healthcare_wisconsin",
    "rounds=2",
    "server_optimizer=momentum",
    "server_optimizer.momentum=0.5",
    "rule.worker_momentum=0.9",
    "run_name=run",
]


@dataclass(frozen=True)
class WithLocalHead(HealthcareWisconsin):
    """The last layer stays at the node: then a node's own state must survive too."""

    def is_local(self, name: str) -> bool:
        return name.startswith("head.")


def forked(folder: Path, overrides: list[str], *, kill_before: int | None) -> dict[str, Any] | None:
    """Run in a fork that kills itself before its k-th rename.  -> the result, None when it was killed"""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            steps = _count_renames(kill_before)
            result = simulate(overrides)
            answer.write_text(json.dumps({"digest": result.model_digest, "metrics": result.metrics, "steps": steps[0]}))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise SystemExit(f"a run failed with status {status}")
    return dict(json.loads(answer.read_text()))


def _count_renames(kill_before: int | None) -> list[int]:
    steps = [0]
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def counted(*arguments: Any, _original: Any = original, **options: Any) -> None:
            if steps[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            steps[0] += 1
            _original(*arguments, **options)

        setattr(os, name, counted)
    return steps


def lengthened(folder: Path, base: list[str], point: int) -> None:
    """A run that had ended is lengthened, killed on the way, and resumed without being told its length again."""
    longer = forked(folder, [*base, "rounds=4", f"runs_dir={folder / 'longer'}"], kill_before=None)
    runs = f"runs_dir={folder / 'runs'}"
    forked(folder, [*base, runs], kill_before=None)
    killed = forked(folder, ["resume=run", "rounds=4", runs], kill_before=point) is None
    resumed = forked(folder, ["resume=run", runs], kill_before=None)
    assert longer is not None
    assert resumed is not None
    print(json.dumps({"killed": killed, "same": {k: resumed[k] == longer[k] for k in ("digest", "metrics")}}))


def main() -> None:
    folder, tracking, points = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    sectors.SECTORS["healthcare_wisconsin"] = f"{__name__}:WithLocalHead"
    sys.modules.setdefault(__name__, sys.modules["__main__"])
    # What torch sets up on first use is set up before the forks, not in each of them.
    simulate([*OVERRIDES, "tracking=none", f"runs_dir={folder / 'warm'}"])
    base = [*OVERRIDES, f"tracking={tracking}"]
    if points.startswith("lengthened:"):
        lengthened(folder, base, int(points.partition(":")[2]))
        return
    whole = forked(folder, [*base, f"runs_dir={folder / 'whole'}"], kill_before=None)
    assert whole is not None
    chosen = range(whole["steps"]) if points == "all" else [int(p) for p in points.split(",")]
    outcomes = []
    for point in chosen:
        runs = folder / f"killed-{point:03d}"
        killed = forked(folder, [*base, f"runs_dir={runs}"], kill_before=point) is None
        started = (runs / "run" / "config.json").exists()
        again = [f"runs_dir={runs}", "resume=run"] if started else [*base, f"runs_dir={runs}"]
        resumed = forked(folder, again, kill_before=None)
        assert resumed is not None
        same = (resumed["digest"], resumed["metrics"]) == (whole["digest"], whole["metrics"])
        outcomes.append({"point": point, "killed": killed, "resumed": started, "same": same})
    print(json.dumps({"digest": whole["digest"], "steps": whole["steps"], "outcomes": outcomes}))


if __name__ == "__main__":
    main()
