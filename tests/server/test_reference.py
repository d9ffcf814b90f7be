"""The server's own update: trained like a node's, from the same base, on rows that no node has."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sectors
from conf.load import load
from conf.schema import RunConfig
from experiments.simulate import simulate
from sectors import training
from sectors.healthcare_wisconsin import HealthcareWisconsin
from sectors.params import initial_arrays
from server import build
from server.reference import reference
from trellis import canonical
from trellis.errors import ConfigError
from trellis.types import ServerState
from trellis.vectors import Layout

OPTIONS = ["data=synthetic", "tracking=none", "sector.options.server_fraction=0.2"]


@dataclass(frozen=True)
class WithLocalHead(HealthcareWisconsin):
    """The last layer stays at the node."""

    def is_local(self, name: str) -> bool:
        return name.startswith("head.")


@pytest.fixture
def config() -> RunConfig:
    return load(OPTIONS)


def start(config: RunConfig) -> ServerState:
    sector = build.build_sector(config)
    arrays = {k: a for k, a in initial_arrays(sector, config.seed).items() if not sector.is_local(k)}
    return ServerState(run="r", round=0, params=arrays, seed=config.seed)


def test_one_full_batch_step_is_gradient_descent_on_the_servers_rows(config: RunConfig) -> None:
    config.sector.training = replace(config.sector.training, batch_size=10_000, epochs=1, lr=0.5)
    sector, state = build.build_sector(config), start(config)
    update_d = reference(config, sector)(state)
    model = sector.build_model()
    model.load_state_dict({k: torch.tensor(v) for k, v in state.params.items()})
    batch = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in sector.server_rows(synthetic=True).items()}
    sector.losses(sector.forward(model, batch), batch).mean().backward()
    gradient = np.concatenate([p.grad.numpy().reshape(-1) for p in model.parameters() if p.grad is not None])
    assert update_d.dtype == np.float32
    assert update_d.shape == (Layout.of(state.params).dim,)
    assert np.allclose(update_d, -0.5 * gradient, atol=1e-6)


def test_it_is_the_nodes_own_training_with_a_seed_of_its_own(config: RunConfig) -> None:
    sector, state = build.build_sector(config), start(config)
    seed = canonical.seed_for(config.seed, "reference", 1)
    rows = sector.server_rows(synthetic=True)
    expected = training.train(sector, config.sector.training, state.params, rows, seed=seed).arrays
    found = reference(config, sector)(state)
    assert np.array_equal(found, Layout.of(state.params).subtract(expected, state.params))


def test_it_is_the_same_twice_and_another_in_another_round(config: RunConfig) -> None:
    sector, state = build.build_sector(config), start(config)
    update = reference(config, sector)
    assert np.array_equal(update(state), update(state))
    assert np.array_equal(update(state), reference(config, sector)(state))
    assert not np.array_equal(update(state), update(replace(state, round=1)))
    moved = {k: np.asarray(a * 2, a.dtype) for k, a in state.params.items()}
    assert not np.array_equal(update(state), update(replace(state, params=moved)))


def test_local_layers_take_their_initial_values_and_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sectors.SECTORS, "with_local_head", f"{__name__}:WithLocalHead")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[WithLocalHead.__module__])
    config = load([*OPTIONS, "sector.name=with_local_head"])
    state = start(config)
    assert not [name for name in state.params if name.startswith("head.")]
    update = reference(config, build.build_sector(config))
    assert update(state).shape == (Layout.of(state.params).dim,)
    assert np.array_equal(update(state), update(state)), "the head it trained is forgotten"


def test_a_server_without_rows_has_no_update() -> None:
    config = load(["data=synthetic"])
    with pytest.raises(ConfigError, match="server_fraction"):
        reference(config, build.build_sector(config))


def test_a_run_with_fltrust_learns_and_is_reproducible(tmp_path: Path) -> None:
    settings = [*OPTIONS, "rule=fltrust", "rounds=6", f"runs_dir={tmp_path}"]
    once = simulate([*settings, "run_name=once"])
    simulate([*settings[:-2], "rounds=3", f"runs_dir={tmp_path}", "run_name=short"])
    resumed = simulate(["resume=short", "rounds=6", f"runs_dir={tmp_path}"])
    assert resumed.model_digest == once.model_digest
    assert once.metrics["test/auc"] > 0.9
