"""A run folder to deliver from and a real MLflow store to deliver to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import NodeSpec, RunConfig, TrackingConfig, config_digest, to_json
from sectors import get
from sectors.params import initial_arrays
from server import store, versions
from server.folder import RunFolder
from server.run_info import RunInfo
from server.tracking import NoTracker, Tracker
from trellis import vectors
from trellis.types import RoundRecord

SECTOR = "healthcare_wisconsin"
STARTED_AT = 1_700_000_000.0


@dataclass
class WrittenRun:
    """What the run loop would have written so far."""

    runs_dir: Path
    nodes: tuple[str, ...] = ("alba", "borealis", "cadmus")
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str = "demo-1"
    started_at: float = STARTED_AT

    def __post_init__(self) -> None:
        self.config = RunConfig()
        self.config.nodes.items = [NodeSpec(name=name) for name in self.nodes]
        self.sector = get(SECTOR)
        self.digests: dict[int, str] = {}
        NoTracker(self.folder, self.tracking, self.info).start()
        self.write_version(0)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs_dir / self.name)

    @property
    def uri(self) -> str:
        return store.embedded_uri(self.runs_dir)

    @property
    def info(self) -> RunInfo:
        c = self.config
        return RunInfo(
            f"id-of-{self.name}", self.name, SECTOR, self.sector.primary, to_json(c), config_digest(c), "a" * 40
        )

    def params(self, round_: int, salt: int = 0) -> dict[str, Any]:
        rng = np.random.default_rng([round_, salt])
        first = initial_arrays(self.sector, 0)
        return {k: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for k, a in first.items()}

    def write_version(self, round_: int, salt: int = 0) -> Path:
        params = self.params(round_, salt)
        self.digests[round_] = vectors.digest(params)
        card = versions.Card.of(
            self.config,
            run=self.info.run_id,
            round=round_,
            digest=self.digests[round_],
            nodes=self.nodes if round_ else (),
            num_params=sum(a.size for a in params.values()),
            created_at=self.started_at + round_,
        )
        return versions.write_version(self.folder, round_, params, card)

    def write_round(self, round_: int, auc: float = 0.5, salt: int = 0, **changes: Any) -> RoundRecord:
        """Version and record of a round; `auc` is what the round measured of the version before."""
        self.write_version(round_, salt)
        record = self._record(round_, auc)
        record = replace(
            record,
            base_metrics={**record.base_metrics, "train/loss": 0.4},
            update_norms={name: float(i + 1) for i, name in enumerate(self.nodes)},
            weights=dict.fromkeys(self.nodes, 1.0),
            num_examples=dict.fromkeys(self.nodes, 100),
            aggregate_norm=1.5,
        )
        record = replace(record, **changes)
        self.folder.write_record(record)
        return record

    def write_end(self, round_: int, auc: float = 0.5) -> RoundRecord:
        """The closing evaluation after `round_` rounds."""
        record = self._record(round_ + 1, auc)
        record = replace(
            record,
            purpose="evaluate",
            digest=record.base_digest,
            base_metrics={**record.base_metrics, "test/auc": 0.77},
        )
        self.folder.write_record(record)
        return record

    def write_rounds(self, aucs: Mapping[int, float]) -> None:
        """Rounds 1..n and the end; `aucs[k]` is what version k turns out to have, k = 0..n."""
        last = max(aucs)
        for round_ in range(1, last + 1):
            self.write_round(round_, aucs[round_ - 1])
        self.write_end(last, aucs[last])

    def tracker(self) -> Tracker:
        return Tracker(self.folder, self.tracking, self.info)

    def _record(self, round_: int, auc: float) -> RoundRecord:
        return RoundRecord(
            run=self.info.run_id,
            round=round_,
            purpose="train",
            started_at=self.started_at + 10 * round_,
            base_digest=self.digests[round_ - 1],
            digest=self.digests.get(round_, ""),
            asked=self.nodes,
            answered=self.nodes,
            refusals=(),
            base_metrics={"val/auc": auc, "val/loss": 1.0 - auc},
            node_metrics={name: {"val/auc": auc + 0.01 * i} for i, name in enumerate(self.nodes)},
            bytes_up=3000,
            bytes_down=4000,
            seconds={"collect": 0.5},
        )


@pytest.fixture
def runs_dir(tmp_path: Path, template_db: Path) -> Path:
    """A folder of runs with an empty store beside them."""
    path = tmp_path / "runs"
    path.mkdir()
    shutil.copy(template_db, path / "mlflow.db")
    return path


@pytest.fixture
def written(runs_dir: Path) -> WrittenRun:
    return WrittenRun(runs_dir)
