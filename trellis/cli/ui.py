"""The MLflow UI on the recorded runs, on this machine only, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from trellis.errors import ConfigError, TrackingError

START_TIMEOUT_S = 120.0
VIEW = "#/experiments?workflowType=machine_learning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-dir", default="runs", help="where the run folders and mlflow.db are (default: runs)")
    parser.add_argument("--port", type=int, default=5000)


def run(arguments: argparse.Namespace) -> int:
    runs = Path(arguments.runs_dir).resolve()
    if not (runs / "mlflow.db").exists():
        raise ConfigError(f"{runs / 'mlflow.db'} does not exist: record a run first, with `trellis simulate`")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(arguments.port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}"),
        *("--artifacts-destination", str(runs / "mlartifacts")),
    ]
    # Without job execution the server is two processes and starts in seconds.
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env={**os.environ, **quiet}, stdout=sys.stderr, stderr=sys.stderr) as server:
        try:
            _await(server, f"http://127.0.0.1:{arguments.port}")
            print(f"http://127.0.0.1:{arguments.port}/{VIEW}", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()


def _await(server: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise TrackingError(f"the MLflow server did not come up at {address}; its messages are above")
