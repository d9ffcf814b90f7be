"""A simulated federation: compose, choose the engine, run, compare with the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from conf.load import load
from conf.schema import EngineName, NodeTask, RunConfig
from experiments import baselines
from experiments.engines.local import LocalGrid
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
    _check_data(config, sector)
    specs = config.nodes.expand()
    if config.engine.name is EngineName.ray:
        from experiments.engines import ray

        result = ray.simulate(config, num_nodes=len(specs), overrides=list(overrides), on_round=on_round)
    else:
        with LocalGrid(CLIENT_APP, len(specs), workers=config.engine.workers) as grid:
            result = run(config, grid, overrides=overrides, on_round=on_round)
    if config.baselines:
        result = dataclasses.replace(result, baselines=baselines.baselines(config, sector))
        folder = RunFolder(Path(result.run_dir))
        folder.write_json(folder.result_path, dataclasses.asdict(result))
    return result


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
