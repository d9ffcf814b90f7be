"""A run's folder: everything that must outlive the process, each file written whole or not at all.

<runs_dir>/<run_name>/
    config.json            the composed configuration, its overrides and digests
    state.safetensors      the last committed ServerState (server/checkpoint.py)
    records/               one RoundRecord a file; also the spool of the tracking server
    versions/round-00007/  model.safetensors, card.json, MLmodel (server/versions.py)
    statistics.json        what the sector fitted on the nodes' statistics (server/statistics.py)
    secagg/                sums of masked updates that are not part of a committed round yet (strategies/sums.py)
    nodes/<name>/          the nodes' own stores (simulation only)
    tracking.json          what has been delivered to the tracking server (server/tracking.py)
    result.json            the summary that `--json` prints, once the run has ended
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trellis.durable import write_atomically
from trellis.errors import ResumeError
from trellis.types import Purpose, Refusal, RoundRecord


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def state_path(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def run_path(self) -> Path:
        return self.path / "run.json"

    @property
    def tracking_path(self) -> Path:
        return self.path / "tracking.json"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def statistics_path(self) -> Path:
        return self.path / "statistics.json"

    @property
    def nodes_path(self) -> Path:
        return self.path / "nodes"

    def version_path(self, round_: int) -> Path:
        """Folder of the model after round `round_` (0: the initial one)."""
        return self.path / "versions" / f"round-{round_:05d}"

    def write_json(self, path: Path, value: Any) -> None:
        write_atomically(path, json.dumps(value, indent=1, sort_keys=True).encode())

    def record_path(self, round_: int, purpose: Purpose) -> Path:
        return self.path / "records" / f"round-{round_:05d}-{purpose}.json"

    def write_record(self, record: RoundRecord) -> None:
        self.write_json(self.record_path(record.round, record.purpose), dataclasses.asdict(record))

    def records(self) -> list[RoundRecord]:
        """All records, by round; at the last round training comes before the closing evaluation."""
        paths = (self.path / "records").glob("round-*.json")
        records = [read_record(path) for path in paths]
        return sorted(records, key=lambda r: (r.round, r.purpose == "evaluate"))


def read_record(path: Path) -> RoundRecord:
    """Inverse of `RunFolder.write_record`."""
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ResumeError(f"{path} is damaged: {error}") from error
    tuples: dict[str, Callable[[Any], Any]] = {
        "asked": tuple,
        "answered": tuple,
        "stragglers": tuple,
        "node_bytes": lambda pairs: {name: tuple(pair) for name, pair in pairs.items()},
        "refusals": lambda many: tuple(Refusal(**one) for one in many),
    }
    return RoundRecord(**{k: tuples[k](v) if k in tuples else v for k, v in fields.items()})
