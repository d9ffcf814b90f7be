"""A simulated federation: compose, choose the engine, run, compare with the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conf.load import load
from conf.schema import DataSource, EngineName, NodeSpec, NodeTask, RunConfig
from experiments import baselines
from experiments.attacks import outcome
from experiments.engines.adversary import Plot, attacked_app, plot_of
from experiments.engines.links import Links
from experiments.engines.local import App, LocalGrid, load_app
from sectors.base import SPLITS, NodeData, Sector, num_rows, place_of
from server import build, statistics
from server.folder import RunFolder
from server.run import OnRound, RunResult, resumed, run
from trellis.errors import DataError, MissingData
from trellis.types import Role

CLIENT_APP = "clients.app:app"


def simulate(overrides: Sequence[str], *, on_round: OnRound | None = None) -> RunResult:
    """Run one federation to its end.  Raises ConfigError, DataError or ResumeError before anything is written."""
    config, overrides = prepare(overrides)
    sector = build.check(config)
    plot = plot_of(config, sector)
    _check_data(config, sector)
    result = _run(config, plot, list(overrides), on_round)
    fitted = statistics.of_run(RunFolder(Path(result.run_dir)))
    sector = sector.fitted(fitted.options) if fitted is not None else sector
    found: dict[str, Any] = {}
    if config.baselines:
        found["baselines"] = compared = baselines.baselines(config, sector)
        found["nodes"] = _with_baselines(result.nodes, compared)
    if result.primary_metric["value"] is None and config.privacy.name.trains_privately:
        found |= _measured(config, sector, result)
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
    # a sampler that goes by availability has asked only those that are there
    links = Links(specs, config.seed, obeys_availability=config.sampler.name != "availability")
    obeyed: dict[str, Any] = {"delay_s": links.delay_s, "reachable": links.reachable} if config.engine.links else {}
    with LocalGrid(made, len(specs), workers=config.engine.workers, last=last, **obeyed) as grid:
        return run(config, grid, overrides=overrides, on_round=on_round)


def _with_baselines(nodes: dict[str, dict[str, Any]], found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each node's scores beside those of its model made alone and of the pooled one."""
    alone, pooled = found.get("local_only", {}).get("nodes", {}), found["pooled_nodes"]
    return {
        name: {**scores, "pooled": pooled[name], **({"local_only": alone[name]} if name in alone else {})}
        for name, scores in nodes.items()
    }


def _measured(config: RunConfig, sector: Sector, result: RunResult) -> dict[str, Any]:
    """Metrics of the last version that the simulation takes itself: it sees the rows, and releases nothing."""
    scores = baselines.measured(config, sector, Path(str(result.model_path)))
    primary = {**result.primary_metric, "value": scores.get(sector.primary.name), "split": "test"}
    return {
        "primary_metric": {**primary, "measured_by": "simulation"},
        "metrics": {f"test/{name}": value for name, value in scores.items()},
    }


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
    """Every node's rows can be loaded and learned from, before anything starts.

    Raises DataError naming the node, and the file and column where there is one.
    """
    specs, task = config.nodes.expand(), NodeTask.of(config)
    data = {spec.name: _loaded(sector, spec, task) for spec in specs}
    starved = [s.name for s in specs if s.role is Role.train and not num_rows(data[s.name].train)]
    if starved:
        files = {s.name: f" in {s.data_path}" for s in specs if s.data_path}
        raise DataError(
            f"{len(starved)} of {len(specs)} nodes have no training rows "
            f"({', '.join(name + files.get(name, '') for name in starved[:5])}): "
            f"use fewer nodes than nodes={config.nodes.name}, another partition, or files with more rows to train on"
        )
    if not sum(num_rows(d.validation) for d in data.values()):
        raise DataError("no node has validation rows: raise validation_fraction, or hold nodes out for validation")
    if sector.num_classes is not None:
        _check_classes(config, sector, specs, data)
    _check_files(specs)
    _check_identifiers(config, sector, specs)


def _loaded(sector: Sector, spec: NodeSpec, task: NodeTask) -> NodeData:
    try:
        return sector.load(place_of(spec, task))
    except MissingData as error:
        raise MissingData(f"node {spec.name}: {error}" if spec.data_path else str(error)) from error
    except DataError as error:
        raise DataError(f"node {spec.name}: {error}") from error


def _check_classes(config: RunConfig, sector: Sector, specs: Sequence[NodeSpec], data: Mapping[str, NodeData]) -> None:
    """Refuse one class only: in all rows there are, or in a node that trains on rows and validates on others."""
    everything = {label for each in data.values() for split in SPLITS for label in np.unique(each.split(split)["y"])}
    if len(everything) < 2:
        raise DataError(
            f"all rows of sector {sector.name} are of one class ({_named(sector, everything)}): nothing is to learn"
        )
    for spec in specs:
        own = data[spec.name]
        if config.checks.allow_one_class or spec.role is not Role.train or not num_rows(own.validation):
            continue
        found = {label for split in SPLITS for label in np.unique(own.split(split)["y"])}
        if len(found) < 2:
            where = f" in {spec.data_path}" if spec.data_path else ""
            raise DataError(
                f"node {spec.name}: all {sum(num_rows(own.split(s)) for s in SPLITS)} rows{where} are of one class "
                f"({_named(sector, found)}), so it cannot validate a model: give it rows of another class, choose "
                "another partition (dirichlet: a larger sector.options.alpha), hold out whole nodes for validation, "
                "or set checks.allow_one_class=true"
            )


def _named(sector: Sector, labels: set[Any]) -> str:
    return f"column {sector.target}: y = {', '.join(f'{label:g}' for label in sorted(labels)) or 'none'}"


def _check_files(specs: Sequence[NodeSpec]) -> None:
    """Refuse one file for two nodes."""
    owners: dict[Path, str] = {}
    for spec in specs:
        if spec.data_path is not None:
            other = owners.setdefault(Path(spec.data_path).resolve(), spec.name)
            if other != spec.name:
                raise DataError(f"node {spec.name}: {spec.data_path} is the file of node {other} already")


def _check_identifiers(config: RunConfig, sector: Sector, specs: Sequence[NodeSpec]) -> None:
    """Refuse one person, customer or engine at two nodes: rows about them would train and test at once.

    The shared file is divided by the sector, which keeps each at one node; files of nodes' own may hold anyone.
    """
    files = [spec for spec in specs if spec.data_path is not None]
    if sector.identifier is None or not files:
        return
    known: dict[Any, str] = {}
    if len(files) < len(specs):
        shared = sector.generate() if config.data is DataSource.synthetic else sector.read(sector.files())
        known |= dict.fromkeys(_different(shared, sector.identifier), "the shared data")
    for spec in files:
        own = _different(sector.read((Path(str(spec.data_path)),)), sector.identifier)
        twice = next((value for value in own if value in known), None)
        if twice is not None:
            raise DataError(
                f"node {spec.name}: {spec.data_path} holds {str(twice)[:40]!r} in column {sector.identifier}, which "
                f"{known[twice]} holds too: each may be at one node only"
            )
        known |= dict.fromkeys(own, f"{spec.data_path} of node {spec.name}")


def _different(table: Any, column: str) -> list[Any]:
    """The different values of a raw table's column, as they first stand there."""
    return list(pd.unique(pd.Series(table[column]).dropna()))
