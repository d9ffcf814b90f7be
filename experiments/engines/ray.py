"""Flower's simulation engine, with the two apps as they are: one machine, or an existing Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.app import app as honest_app
from conf.schema import EngineConfig, RunConfig
from server.run import OnRound, RunResult, run
from trellis.errors import ConfigError, TrellisError

# Nothing is downloaded, nothing is reported; Ray keeps its advice on accelerators to itself.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

PROBE_S = 10.0
LONGEST_TEMP_DIR = 40
"""Characters: Ray keeps sockets about 60 characters below, and a socket's path has at most 107."""


def simulate(
    config: RunConfig,
    *,
    num_nodes: int,
    overrides: list[str],
    on_round: OnRound | None = None,
    app: ClientApp = honest_app,
) -> RunResult:
    """Run `server.app`'s work on Flower's engine, with `app` at the nodes.  -> the result

    The run's own errors come through.  Raises ConfigError when the cluster at `engine.address` cannot be reached.
    """
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

    with _surroundings():
        _connect(config.engine)
        run_simulation(server_app, app, num_nodes, backend_config=backend(config.engine))
    if errors:
        raise errors[0]
    return results[0]


def backend(engine: EngineConfig) -> dict[str, Any]:
    """Flower's backend settings for an engine config; `init_args` go to `ray.init`."""
    init: dict[str, Any] = {"address": engine.address} if engine.address else {"include_dashboard": False}
    if not engine.address and len(tempfile.gettempdir()) > LONGEST_TEMP_DIR:
        init["_temp_dir"] = "/tmp/ray"
    return {
        "init_args": {**init, "log_to_driver": False, "logging_level": "error"},
        "client_resources": {"num_cpus": engine.cpus_per_node, "num_gpus": engine.gpus_per_node},
    }


def _connect(engine: EngineConfig) -> None:
    """Connect to a cluster before the run begins: Flower would start the run beside it, and wait for its nodes."""
    import ray

    if engine.address is None or ray.is_initialized():
        return
    host, _, port = engine.address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise ConfigError(f"engine.address={engine.address}: no Ray cluster answers there: {error}") from error
    # A cluster's workers import the apps from where this process does.
    python_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        ray.init(**backend(engine)["init_args"], runtime_env={"env_vars": {"PYTHONPATH": python_path}})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"engine.address={engine.address}: no Ray cluster can be used there: {error}") from error


@contextmanager
def _surroundings() -> Iterator[None]:
    """Flower and Ray made quiet; afterwards no Ray is left, and the process is as it was."""
    import ray

    logger, python_path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ray.shutdown()
        logger.setLevel(level)
        if python_path is None:  # Flower sets it for Ray's workers
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = python_path
