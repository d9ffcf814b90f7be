"""Delivery to an MLflow server over HTTP, as a consortium runs one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from server.tracking import sync

pytestmark = pytest.mark.slow


class Server:
    """`mlflow server` on a SQLite file; starts and stops."""

    def __init__(self, db: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{db}"]
        self._command += ["--artifacts-destination", str(db.parent / "artifacts")]
        self._command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            self._command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise TimeoutError(self.uri)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, template_db: Path) -> Iterator[Server]:
    db = tmp_path / "served" / "mlflow.db"
    db.parent.mkdir()
    db.write_bytes(template_db.read_bytes())
    server = Server(db)
    server.start()
    yield server
    server.stop()


def test_a_server_killed_in_the_middle_of_a_run_has_everything_once_in_the_end(
    written: Any, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    written.tracking.uri = server.uri
    marks = written.folder.tracking_path
    with written.tracker() as tracker:
        written.write_round(1, 0.5)
        tracker.notify()
        deadline = time.monotonic() + 60
        while not (marks.exists() and "round-00001" in marks.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        server.stop()
        written.write_round(2, 0.6)
        tracker.notify()
        server.start()
        written.write_end(2, 0.7)
        tracker.close(60)
    done = sync(written.folder)
    assert (done.delivered, done.pending, done.versions, done.error) == (3, 0, {1: 1, 2: 2}, None)
    client = MlflowClient(server.uri, server.uri)
    points = client.get_metric_history(str(done.run_id), "val/auc")
    assert [(p.step, p.value) for p in points] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    version = client.get_model_version(str(done.model_name), "2")
    assert version.source == f"models:/{version.tags['fl.model_id']}"
    assert "mlflow.modelVersions" in client.get_logged_model(version.tags["fl.model_id"]).tags
    assert client.get_model_version_by_alias(str(done.model_name), "best").version == version.version
    assert capfd.readouterr().out == ""
    marks.unlink()
    assert sync(written.folder).versions == {1: 1, 2: 2}
    assert len(client.search_model_versions(f"name = '{done.model_name}'")) == 2
