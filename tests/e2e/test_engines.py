"""The same apps in every engine: the same model, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.simulation
import pytest
from flwr.app import Context, RecordDict

from conf.load import load
from conf.schema import EngineConfig
from experiments.benchmarks import engines as benchmark
from experiments.engines import ray as ray_engine
from experiments.engines.local import LocalGrid
from experiments.simulate import simulate
from trellis.errors import ConfigError, ResumeError

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# Three nodes of 108, 198 and 37 training rows; the policy of the second turns every training request away.
THREE_NODES = [
    "sector=healthcare_wisconsin",
    "nodes=cross_device",
    "nodes.count=3",
    "nodes.held_out.validation=0",
    "nodes.held_out.test=0",
    "nodes.template.policy.max_examples=150",
    "tracking=none",
    "engine.links=false",  # only the local engine obeys them
    "rounds=2",
]


@pytest.fixture(scope="module")
def on_local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = tmp_path_factory.mktemp("local")
    simulate([*THREE_NODES, f"runs_dir={runs}", "run_name=local"])
    return result(runs / "local")


def result(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_bytes()))


def what_was_computed(found: dict[str, Any]) -> dict[str, Any]:
    return {k: found[k] for k in ("model_digest", "metrics", "refusals", "rounds", "best", "bytes_up", "bytes_down")}


def test_a_policy_refuses_on_the_local_engine(on_local: dict[str, Any]) -> None:
    assert [(r["round"], r["node"], r["reason"]) for r in on_local["refusals"]] == [
        (1, "device-0001", "policy.max_examples"),
        (2, "device-0001", "policy.max_examples"),
    ]


@pytest.mark.slow
def test_ray_gives_the_local_engines_model(
    on_local: dict[str, Any], quiet_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [BIN / "trellis", "simulate", "--json", "engine=ray", f"runs_dir={tmp_path}", "run_name=ray"]
    done = subprocess.run(
        [*map(str, command), *THREE_NODES],
        env=quiet_environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = json.loads(done.stdout)
    assert what_was_computed(printed) == what_was_computed(on_local)
    assert printed["engine"] == "ray"
    assert len(done.stderr.splitlines()) < 10, done.stderr
    stores = sorted(path.name for path in (tmp_path / "ray" / "nodes").iterdir())
    assert stores == ["device-0000", "device-0001", "device-0002"]


@pytest.mark.slow
def test_flwr_run_gives_the_local_engines_model(
    on_local: dict[str, Any], flwr_run: Callable[..., None], tmp_path: Path
) -> None:
    overrides = " ".join([*THREE_NODES, f"runs_dir={tmp_path}", "run_name=flwr"])
    flwr_run(REPOSITORY, f"overrides='{overrides}'", num_nodes=3, until=tmp_path / "flwr" / "result.json")
    assert what_was_computed(result(tmp_path / "flwr")) == what_was_computed(on_local)


# ---------------------------------------------------------------- what needs no process


def test_an_address_reaches_ray_and_no_second_cluster_is_configured() -> None:
    init = ray_engine.backend(EngineConfig(address="10.0.0.7:6379"))["init_args"]
    assert init["address"] == "10.0.0.7:6379"
    assert "include_dashboard" not in init
    assert "_temp_dir" not in init


def test_a_node_occupies_what_the_engine_says() -> None:
    settings = ray_engine.backend(EngineConfig(cpus_per_node=0.5, gpus_per_node=0.25))
    assert settings["client_resources"] == {"num_cpus": 0.5, "num_gpus": 0.25}
    assert "address" not in settings["init_args"]


def test_sockets_keep_short_paths_where_the_temporary_folder_is_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "_temp_dir" not in ray_engine.backend(EngineConfig())["init_args"]
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch" + "/deep" * 12)
    assert ray_engine.backend(EngineConfig())["init_args"]["_temp_dir"] == "/tmp/ray"


def test_an_address_where_nothing_listens_is_misuse(free_port: int, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port}"
    with pytest.raises(ConfigError, match=f"engine.address={address}: no Ray cluster answers there"):
        simulate(["engine=ray", f"engine.address={address}", "tracking=none", f"runs_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_the_runs_own_errors_come_through_flowers_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stub(server_app: Any, client_app: Any, num_supernodes: int, **settings: Any) -> None:
        with LocalGrid(client_app, num_supernodes) as grid:
            server_app(grid, Context(1, 1, {}, RecordDict(), {}))

    monkeypatch.setattr(flwr.simulation, "run_simulation", stub)
    overrides = [*THREE_NODES, "rounds=1", "engine=ray", f"runs_dir={tmp_path}", "run_name=twice"]
    before = dict(os.environ)
    first = ray_engine.simulate(load(overrides), num_nodes=3, overrides=overrides)
    assert first.rounds == 1
    with pytest.raises(ResumeError, match="holds a run already"):
        ray_engine.simulate(load(overrides), num_nodes=3, overrides=overrides)
    assert dict(os.environ) == before


def test_training_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    code = f"""
import sys
from experiments.simulate import simulate
simulate({[*THREE_NODES, "rounds=1", f"runs_dir={tmp_path}"]!r})
print(sorted({{"torch._dynamo", "torch._inductor", "mlflow", "ray", "sqlalchemy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_engine_benchmark_measures_ours_and_flowers_strategy() -> None:
    ours, theirs = (benchmark.measure(engine, 10) for engine in (benchmark.LOCAL, benchmark.GRID))
    assert 0 < ours.start_s < 60
    assert ours.message_ms == pytest.approx(100 * ours.round_s)
    assert theirs.nodes == ours.nodes == 10
