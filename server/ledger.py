"""What has been delivered, and what waits.

The run folder is the spool: every record and version is written there first.  The ledger, `tracking.json`, is kept per
store (its URI without a password), so a run can be delivered to a second server later.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from server.folder import RunFolder, read_record
from trellis.types import RoundRecord


@dataclass(slots=True)
class Kept:
    """A version as a store has it."""

    digest: str
    model_id: str
    version: int


@dataclass(slots=True)
class Ledger:
    """What one store already has of a run."""

    run_id: str | None = None
    prepared: bool = False
    """Whether params, config and tags of the federation's run are written."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Node -> child run."""
    records: dict[str, str] = field(default_factory=dict)
    """File name of a delivered record -> digest of the params after it."""
    versions: dict[int, Kept] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    """Primary metric of each measured version."""
    best: int | None = None
    """The round that the alias `best` is on."""
    settled: str | None = None
    """Digest of the delivered records for which last, best and the summary were written."""


def load_ledgers(folder: RunFolder) -> dict[str, Ledger]:
    """Ledgers by URI; none when nothing was delivered yet."""
    if not folder.tracking_path.exists():
        return {}
    stores = json.loads(folder.tracking_path.read_bytes())["stores"]
    return {uri: _ledger(fields) for uri, fields in stores.items()}


def _ledger(fields: dict[str, Any]) -> Ledger:
    versions = {int(k): Kept(**v) for k, v in fields["versions"].items()}
    values = {int(k): v for k, v in fields["values"].items()}
    return Ledger(**{**fields, "versions": versions, "values": values})


def save_ledger(folder: RunFolder, uri: str, ledger: Ledger) -> None:
    """Write one store's ledger; `uri` becomes the folder's latest."""
    ledgers = {**load_ledgers(folder), uri: ledger}
    folder.write_json(folder.tracking_path, {"uri": uri, "stores": {k: asdict(v) for k, v in ledgers.items()}})


class Spool:
    """The records of a folder that a ledger does not have yet.  Looking again costs one `stat` a file."""

    def __init__(self, folder: RunFolder) -> None:
        self._records = folder.path / "records"
        self._delivered: dict[str, int] = {}

    def pending(self, ledger: Ledger) -> list[tuple[str, RoundRecord]]:
        """File names and records, by round.  A round done again with other params counts as new."""
        waiting = []
        for path in self._records.glob("round-*.json"):
            stamp = path.stat().st_mtime_ns
            if self._delivered.get(path.name) == stamp:
                continue
            record = read_record(path)
            if ledger.records.get(path.name) == record.digest:
                self._delivered[path.name] = stamp
            else:
                waiting.append((path.name, record))
        return sorted(waiting, key=lambda item: (item[1].round, item[1].purpose == "evaluate"))


def round_of(name: str) -> int:
    """Round of a record's file name."""
    return int(name.split("-")[1])
