"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports Flower or MLflow: nothing is downloaded, nothing is reported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Tests run in as many processes as there are cores: torch's own threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is the machine's business.
settings.register_profile("trellis", deadline=None)
settings.load_profile("trellis")


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


@pytest.fixture(scope="module")
def simulated_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`simulated_once(*overrides)`: the run, made once a module."""
    from experiments.simulate import simulate

    @cache
    def run(*overrides: str) -> Any:
        return simulate([*overrides, f"runs_dir={tmp_path_factory.mktemp('runs')}"])

    return run
