"""Every task from its configuration to a model that has learned something, on its real data where they are here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import sectors
from conf.load import choices
from experiments.simulate import simulate
from server.folder import RunFolder
from trellis.errors import MissingData

SECONDS = 20.0
"""What a smoke run may take on an idle core; here it only says that something is wrong."""

SMALL = {
    "healthcare_pneumonia": ["rounds=2", "sector.training.max_examples=300"],
    "healthcare_retina": ["rounds=2", "sector.training.max_examples=40"],
    "production": ["rounds=2", "sector.training.max_examples=1000"],
    "retail": ["rounds=2", "sector.training.max_examples=2000"],
}
NODES = {"healthcare_heart": "hospitals", "production": "plants", "retail": "countries"}


@pytest.mark.parametrize("name", sectors.names())
def test_a_short_run_lowers_the_loss_on_rows_it_did_not_train_on(name: str, tmp_path: Path) -> None:
    recipe = f"experiment={name}" if name in choices("experiment") else f"sector={name}"
    settings = [recipe, f"nodes={NODES.get(name, 'pilot')}", "tracking=none", f"runs_dir={tmp_path}"]
    started = time.monotonic()
    try:
        result = simulate([*settings, *SMALL.get(name, ["rounds=3"])])
    except MissingData:
        result = simulate([*settings, *SMALL.get(name, ["rounds=3"]), "data=synthetic"])
    seconds = time.monotonic() - started
    losses = [record.base_metrics["val/loss"] for record in RunFolder(Path(result.run_dir)).records()]
    assert losses[-1] < losses[0]
    assert result.primary_metric["value"] is not None
    assert result.refusals == []
    assert seconds < 4 * SECONDS, f"{seconds:.0f} s"
