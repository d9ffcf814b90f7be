"""Flower's simulation engine, with the two apps as they are: one machine, or an existing Ray cluster."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.app import app as client_app
from conf.schema import EngineConfig
from server.run import OnRound, RunResult, run
from trellis.errors import TrellisError

# Before Flower is asked for anything: nothing is downloaded, nothing is reported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def simulate(config: Any, *, num_nodes: int, overrides: list[str], on_round: OnRound | None = None) -> RunResult:
    """Run `server.app`'s work on Flower's engine.  -> the result; the run's own errors come through."""
    from flwr.simulation import run_simulation

    results: list[RunResult] = []
    errors: list[TrellisError] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(run(config, grid, overrides=overrides, on_round=on_round))
        except TrellisError as error:  # Flower would wrap it; the launcher wants it as it is
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        run_simulation(server_app, client_app, num_nodes, backend_config=backend(config.engine))
    if errors:
        raise errors[0]
    return results[0]


def backend(engine: EngineConfig) -> dict[str, Any]:
    """Flower's backend settings for an engine config."""
    init: dict[str, Any] = {"address": engine.address} if engine.address else {"include_dashboard": False}
    return {
        "init_args": {**init, "log_to_driver": False, "logging_level": "error"},
        "client_resources": {"num_cpus": engine.cpus_per_node, "num_gpus": engine.gpus_per_node},
    }
