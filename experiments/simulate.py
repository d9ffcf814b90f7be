"""A simulated federation: compose, choose the engine, run, compare with the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conf.load import load
from conf.schema import EngineName, NodeTask, RunConfig
from experiments import baselines
from experiments.attacks import outcome
from experiments.engines.adversary import Plot, attacked_app, plot_of
from experiments.engines.local import App, LocalGrid, load_app
from sectors.base import Sector, num_rows, place_of
from server import build
from server.folder import RunFolder
from server.run import OnRound, RunResult, resumed, run
from trellis.errors import DataError
from trellis.types import Role

CLIENT_APP = "clients.app:app"


def simulate(overrides: Sequence[str], *, on_round: OnRound | None = None) -> RunResult:
    """Run one federation to its end.  Raises ConfigError, DataError or ResumeError before anything is written."""
    config, overrides = prepare(overrides)
    sector = build.check(config)
    plot = plot_of(config, sector)
    _check_data(config, sector)
    result = _run(config, plot, list(overrides), on_round)
    found: dict[str, Any] = {}
    if config.baselines:
        found["baselines"] = baselines.baselines(config, sector)
    if plot is not None:
        found["attack"] = _attack(config, sector, plot, result)
    if found:
        result = dataclasses.replace(result, **found)
        folder = RunFolder(Path(result.run_dir))
        folder.write_json(folder.result_path, dataclasses.asdict(result))
    return result


def _run(config: RunConfig, plot: Plot | None, overrides: list[str], on_round: OnRound | None) -> RunResult:
    """The run on the engine of its configuration, with the attackers of its plot."""
    specs = config.nodes.expand()
    if config.engine.name is EngineName.ray:
        from experiments.engines import ray

        app = load_app(CLIENT_APP) if plot is None else attacked_app(plot)
        return ray.simulate(config, num_nodes=len(specs), overrides=overrides, on_round=on_round, app=app)
    made: App = CLIENT_APP if plot is None else partial(attacked_app, plot, config)
    # honest nodes first, so that attackers see what they sent
    last = {i for i, spec in enumerate(specs) if plot is not None and spec.name in plot.nodes}
    with LocalGrid(made, len(specs), workers=config.engine.workers, last=last) as grid:
        return run(config, grid, overrides=overrides, on_round=on_round)


def _attack(config: RunConfig, sector: Sector, plot: Plot, result: RunResult) -> dict[str, Any]:
    """Who lied, how, and whether a backdoor opens."""
    rate = outcome.success_rate(config, sector, Path(str(result.model_path))) if plot.attack == "backdoor" else None
    return {
        "name": plot.attack,
        "nodes": list(plot.nodes),
        "start_round": plot.start_round,
        "success_rate": rate,
    }


def prepare(overrides: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Overrides -> the configuration, that of an earlier run where they resume one."""
    config = load(overrides)
    if config.resume is not None:
        return resumed(config.resume, overrides, config.runs_dir)
    return config, list(overrides)


def _check_data(config: RunConfig, sector: Sector) -> None:
    """Every node's rows can be loaded, and someone has rows to train on and to validate on."""
    specs, task = config.nodes.expand(), NodeTask.of(config)
    data = {spec.name: sector.load(place_of(spec, task)) for spec in specs}
    starved = [s.name for s in specs if s.role is Role.train and not num_rows(data[s.name].train)]
    if starved:
        raise DataError(
            f"{len(starved)} of {len(specs)} nodes have no training rows ({', '.join(starved[:5])}): "
            f"use fewer nodes than nodes={config.nodes.name}, or another partition"
        )
    if not sum(num_rows(d.validation) for d in data.values()):
        raise DataError("no node has validation rows: raise validation_fraction, or hold nodes out for validation")
