"""Shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports Flower or MLflow: nothing is downloaded, nothing is reported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def template_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store, made once for all test processes: MLflow takes 5 s to make one."""
    from server import store

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / "template" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    store.connect(f"sqlite:///{path}")
    return path
