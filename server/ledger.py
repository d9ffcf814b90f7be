"""What has been delivered, and what waits.

The run folder is the spool: every record and version is written there first.  The ledger, `tracking.json`, is kept per
store (its URI without a password), so a run can be delivered to a second server later.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from server.folder import RunFolder, read_record
from trellis.errors import TrackingError, TrellisError
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
    """Ledgers by URI; none when nothing was delivered yet.  Raises TrackingError for a damaged file."""
    path = folder.tracking_path
    if not path.exists():
        return {}
    try:
        return {uri: _ledger(fields) for uri, fields in json.loads(path.read_bytes())["stores"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrackingError(
            f"{path} is damaged ({error}); without it a store is asked what it has: remove it, then sync"
        ) from error


def _ledger(fields: dict[str, Any]) -> Ledger:
    versions = {int(k): Kept(**v) for k, v in fields["versions"].items()}
    values = {int(k): v for k, v in fields["values"].items()}
    return Ledger(**{**fields, "versions": versions, "values": values})


def save_ledger(folder: RunFolder, uri: str, ledger: Ledger) -> None:
    """Write one store's ledger; `uri` becomes the folder's latest."""
    ledgers = {**load_ledgers(folder), uri: ledger}
    folder.write_json(folder.tracking_path, {"uri": uri, "stores": {k: asdict(v) for k, v in ledgers.items()}})


class Spool:
    """The records of a folder that a ledger does not have yet.  Looking again costs one `stat` a file.

    A damaged record holds back no other one: it is told in `damaged`, by file name, until it can be read.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._records = folder.path / "records"
        self._delivered: dict[str, int] = {}
        self.damaged: dict[str, str] = {}

    def pending(self, ledger: Ledger) -> list[tuple[str, RoundRecord]]:
        """File names and records, by round.  A round done again with other params counts as new."""
        waiting = []
        for path in self._records.glob("round-*.json"):
            stamp = path.stat().st_mtime_ns
            if self._delivered.get(path.name) == stamp:
                continue
            record = self.read(path)
            if record is None:
                continue
            if ledger.records.get(path.name) == record.digest:
                self._delivered[path.name] = stamp
            else:
                waiting.append((path.name, record))
        return sorted(waiting, key=lambda item: (item[1].round, item[1].purpose == "evaluate"))

    def read(self, path: Path) -> RoundRecord | None:
        """A record; None when it is not there, or when it is damaged."""
        self.damaged.pop(path.name, None)
        try:
            return read_record(path)
        except FileNotFoundError:
            return None
        except TrellisError as error:  # names the file
            self.damaged[path.name] = str(error)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self.damaged[path.name] = f"{path} is damaged: {error}"
        return None


def round_of(name: str) -> int:
    """Round of a record's file name."""
    return int(name.split("-")[1])
