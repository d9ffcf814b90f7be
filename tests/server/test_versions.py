from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sectors import get
from sectors.base import to_batch
from sectors.params import initial_arrays
from server import versions
from server.folder import RunFolder
from server.versions import Card, VersionError
from trellis import vectors

PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(0.5).reshape(()), "n": np.array([3])}


def card_of(params: dict[str, Any], round_: int = 7, **changes: Any) -> Card:
    card = Card("run", round_, vectors.digest(params), "s", {"hidden": [4]}, "c0ffee", "real", ("n1", "n2"), 1.7e9, 8)
    return replace(card, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "demo")


def test_what_is_written_is_read_back(folder: RunFolder) -> None:
    path = versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    params, card = versions.read_version(path)
    assert path == folder.version_path(7)
    assert sorted(p.name for p in path.iterdir()) == ["MLmodel", "card.json", "model.safetensors"]
    assert card == card_of(PARAMS)
    assert vectors.digest(params) == vectors.digest(PARAMS)
    assert params["b"].shape == ()


def test_transposed_params_keep_their_values(folder: RunFolder) -> None:
    params = {"w": PARAMS["w"].T}
    read, _ = versions.read_version(versions.write_version(folder, 1, params, card_of(params, 1)))
    assert np.array_equal(read["w"], params["w"])


def test_writing_again_changes_nothing(folder: RunFolder) -> None:
    path = versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    versions.write_version(folder, 7, PARAMS, card_of(PARAMS, created_at=1.8e9))
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before


def test_a_round_done_again_replaces_its_version(folder: RunFolder) -> None:
    versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    other = {**PARAMS, "w": PARAMS["w"] + 1}
    params, card = versions.read_version(versions.write_version(folder, 7, other, card_of(other)))
    assert card.digest == vectors.digest(other) == vectors.digest(params)


def test_what_a_kill_left_behind_is_no_version(folder: RunFolder) -> None:
    left = folder.version_path(7).with_name(".round-00007.tmp")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    assert [p.name for p in left.parent.iterdir()] == ["round-00007"]


def test_a_version_is_written_with_its_own_card_only(folder: RunFolder) -> None:
    with pytest.raises(VersionError, match="own card"):
        versions.write_version(folder, 7, {"w": PARAMS["w"]}, card_of(PARAMS))
    with pytest.raises(VersionError, match="own card"):
        versions.write_version(folder, 8, PARAMS, card_of(PARAMS))
    assert not folder.version_path(7).exists()


def test_changed_params_are_refused(folder: RunFolder) -> None:
    path = versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    model = bytearray((path / "model.safetensors").read_bytes())
    model[-1] ^= 1
    (path / "model.safetensors").write_bytes(model)
    with pytest.raises(VersionError, match="changed after it was written"):
        versions.read_version(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"short"), ("card.json", b"{}"), ("card.json", b"not json"), ("model.safetensors", None)],
)
def test_a_damaged_version_is_refused(folder: RunFolder, name: str, content: bytes | None) -> None:
    path = versions.write_version(folder, 7, PARAMS, card_of(PARAMS))
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(VersionError):
        versions.read_version(path)


def test_a_predictor_gives_what_the_sector_predicts(written: Any) -> None:
    path = written.write_version(1)
    sector = get("healthcare_wisconsin")
    table = sector.generate().drop(columns="target").head(10)
    model = sector.build_model()
    model.load_state_dict({k: torch.from_numpy(a) for k, a in written.params(1).items()})
    with torch.no_grad():
        rows = to_batch(sector.features(table), slice(None), torch.device("cpu"))
        expected = sector.predict(sector.forward(model.eval(), rows))
    found = versions.load_predictor(path).predict(table)
    assert np.array_equal(found, expected)
    assert found.shape == (10,)
    assert versions.load_predictor(path).predict(table.head(0)).shape == (0,)


def test_a_version_of_another_model_is_refused(written: Any) -> None:
    path = written.write_version(1)
    card = json.loads((path / "card.json").read_bytes())
    (path / "card.json").write_text(json.dumps({**card, "options": {"hidden": [5]}}))
    with pytest.raises(VersionError, match="does not fit"):
        versions.load_predictor(path)


def test_layers_that_stay_at_nodes_predict_with_their_initial_values(
    written: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sector_class = type(written.sector)
    whole = versions.load_predictor(written.write_version(0))
    local = sorted(written.params(1))[0]
    monkeypatch.setattr(sector_class, "is_local", lambda self, name: name == local)
    shared = {k: a for k, a in written.params(1).items() if k != local}
    card = replace(whole.card, round=1, digest=vectors.digest(shared))
    predictor = versions.load_predictor(versions.write_version(written.folder, 1, shared, card))
    initial = initial_arrays(written.sector, 0)
    assert np.array_equal(predictor.model.state_dict()[local].numpy(), initial[local])
    assert "stay at nodes" in caplog.text


def test_mlflow_reads_the_model_file(written: Any) -> None:
    from mlflow.models import Model

    model = Model.load(str(written.write_version(3) / "MLmodel"))
    assert model.flavors["python_function"]["loader_module"] == "server.versions"
    assert model.metadata["digest"] == written.digests[3]
    assert model.metadata["round"] == 3


def test_neither_versions_nor_the_tracker_import_mlflow_in_the_caller() -> None:
    code = "import sys, server.versions, server.tracking; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
