"""Kill a private node before one durable step after another, start it again, and print what it answers for.

A durable step is a rename or an fsync: of the ledger, of its mark, of the reply that is kept.  The node is a site's own
(its writes are forced to disk); this process plays the server, writes down what was sent, and asks again for what was
not.  Each life of the node is a fork of this process, which has imported everything once.  Driven by
test_private_run.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict

from clients.app import app
from conf.schema import (
    DataSource,
    NodesConfig,
    NodeSpec,
    NodeTask,
    PrivacyConfig,
    RunConfig,
    SectorConfig,
    to_json,
)
from sectors.params import initial_arrays
from server import build
from trellis import wire
from trellis.privacy import accountant
from trellis.privacy.ledger import Ledger
from trellis.types import Privacy, Request
from trellis.vectors import digest

ROUNDS = 2
SITE = "name: ash\npart: 0\npolicy: {dp: {privacy_unit: rows, max_epsilon: 1000, ledger: ledger}}\n"
CONFIG = RunConfig(
    sector=SectorConfig(options={"hidden": [4], "synthetic_rows": 60}),
    nodes=NodesConfig(items=[NodeSpec(name="ash")]),
    data=DataSource.synthetic,
    privacy=PrivacyConfig(name=Privacy.dp, noise_multiplier=1.0),
)


def lived(folder: Path, *, kill_before: int | None) -> int | None:
    """One life of the node.  -> the durable steps it did, None when it was killed"""
    pid = os.fork()
    if pid == 0:
        try:
            steps = _count_steps(kill_before)
            _answer(folder)
            (folder / "steps").write_text(str(steps[0]))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise SystemExit(f"a node failed with status {status}")
    return int((folder / "steps").read_text())


def _count_steps(kill_before: int | None) -> list[int]:
    steps = [0]
    for name in ("replace", "fsync"):
        original = getattr(os, name)

        def counted(*arguments: Any, _original: Any = original, **options: Any) -> Any:
            if steps[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            steps[0] += 1
            return _original(*arguments, **options)

        setattr(os, name, counted)
    return steps


def _answer(folder: Path) -> None:
    """Every round that nobody has an answer to, and once more the last: its answer may have been lost on the way."""
    sector = build.build_sector(CONFIG)
    start = initial_arrays(sector, 0)
    context = Context(1, 2, {"node-file": str(folder / "node.yaml")}, RecordDict(), {})
    wire.identify(1, 1)
    for round_ in range(max(len({r for r, _ in sent(folder)}), 1), ROUNDS + 1):
        params = {name: (a + np.float32(0.01 * round_)).astype(a.dtype) for name, a in start.items()}
        request = Request("r", round_, "train", digest(params), to_json(NodeTask.of(CONFIG)), ("ash",), ())
        message = Message(wire.request_content(wire.to_record(params), request), 2, "train")
        message.metadata.__dict__["_message_id"] = "m"
        reply = app(message, context)
        update = digest(wire.from_record(reply.content.array_records[wire.ARRAYS]))
        with open(folder / "sent", "a") as file:
            file.write(f"{round_} {update}\n")


def sent(folder: Path) -> list[tuple[int, str]]:
    """(round, digest of the update) of everything that left the node."""
    path = folder / "sent"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def answers_for(folder: Path) -> dict[str, Any]:
    """What the ledger says, beside what was sent: different updates, each of one round's steps."""
    ledger = Ledger(folder / "ledger" / "rows.jsonl")
    entries, charges = ledger.entries(), ledger.charges()
    updates = len({update for _, update in sent(folder)})
    one = [c.entry(c.steps) for c in charges[:1]]
    return {
        "updates": updates,
        "charges": len(charges),
        "steps": sum(entry.steps for entry in entries),
        "steps_sent": updates * sum(entry.steps for entry in one),
        "epsilon": accountant.epsilon(entries, 1e-5),
        "epsilon_sent": accountant.epsilon(one * updates, 1e-5),
    }


def site(folder: Path) -> Path:
    (folder / "ledger").mkdir(parents=True)
    (folder / "node.yaml").write_text(SITE)
    return folder


def main() -> None:
    folder = Path(sys.argv[1])
    # what is set up on first use is set up before the forks, not in each of them
    _answer(site(folder / "warm"))
    answers_for(folder / "warm")
    whole = lived(site(folder / "whole"), kill_before=None)
    assert whole is not None
    outcomes = []
    # all of the first round, in which the ledger is started, and some of the second
    for point in [*range(whole * 2 // 3), *range(whole * 2 // 3, whole, 3)]:
        where = site(folder / f"killed-{point:03d}")
        killed = lived(where, kill_before=point) is None
        after = answers_for(where)
        if point % 8 == 0:  # it dies a second time, at its next write, before it lives on
            lived(where, kill_before=0)
        lived(where, kill_before=None)
        outcomes.append({"point": point, "killed": killed, "after": after, "end": answers_for(where)})
    print(json.dumps({"steps": whole, "whole": answers_for(folder / "whole"), "outcomes": outcomes}))


if __name__ == "__main__":
    main()
