"""Flower's own processes, started for one test and ended with it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@pytest.fixture
def quiet_environment() -> dict[str, str]:
    """Of a process that finds our commands, downloads nothing and reports nothing."""
    return ENVIRONMENT


@pytest.fixture
def free_port() -> int:
    """A port on 127.0.0.1 where nobody listens."""
    return _free_port()


@pytest.fixture
def flwr_run(tmp_path: Path) -> Callable[..., None]:
    """`flwr run` of an app on a SuperLink of its own, until a file that it writes is there."""

    def run(app: Path, run_config: str, *, num_nodes: int, until: Path) -> None:
        with superlink() as environment:
            command = ["flwr", "run", str(app), "here", "--stream"]
            command += ["--federation-config", f"num-supernodes={num_nodes}", "--run-config", run_config]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            wait_for(until.exists, 60, lambda: done.stdout[-4000:])

    return run


@contextmanager
def superlink() -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode, in a home of its own; all its processes end with it."""
    home = tempfile.mkdtemp(prefix="fl", dir="/tmp")  # short: Ray's sockets may lie below
    environment = {**ENVIRONMENT, "FLWR_HOME": home, "PYTHONPATH": str(REPOSITORY)}
    port = _free_port()
    (Path(home) / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    with open(Path(home) / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: answers(port), 60)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(holds: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"nothing for {seconds} s; {told()}"
        time.sleep(0.1)
