"""What federating is compared with: the same model, budget and split, trained on each node alone and on pooled rows.

Baselines see rows together, which no deployment may: they exist in simulation only, and never leave it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.schema import NodeSpec, NodeTask, RunConfig
from sectors import training
from sectors.base import NodeData, Rows, Sector, concatenate, num_rows, place_of
from sectors.params import initial_arrays
from server import build, statistics, versions
from trellis import canonical
from trellis.types import Role


def baselines(config: RunConfig, sector: Sector) -> dict[str, Any]:
    """The primary metric without a federation, and by node.  `sector` has what the run fitted.

    -> {"pooled": test metrics, "pooled_nodes": {name: primary or None},
        "local_only": {"nodes": {name: primary or None}, "everywhere": primary}}
    """
    specs, task = config.nodes.expand(), NodeTask.of(config)
    data = [sector.load(place_of(spec, task)) for spec in specs]
    found: dict[str, Any] = pooled(config, sector, specs, data)
    if all(spec.role is Role.train for spec in specs):
        found["local_only"] = local_only(config, sector, specs, data)
    return found


def pooled(config: RunConfig, sector: Sector, specs: Sequence[NodeSpec], data: Sequence[NodeData]) -> dict[str, Any]:
    """One model on all training rows, for as many epochs as the federation, on all test rows and on each node's."""
    rows = concatenate([d.train for d in data])
    test = concatenate([d.test for d in data])
    params = _trained(config, sector, rows, "pooled", sum(_used(config, d.train) for d in data))
    nodes = {spec.name: _primary(sector, params, own.test) for spec, own in zip(specs, data, strict=True)}
    return {"pooled": _score(sector, params, test), "pooled_nodes": nodes}


def local_only(
    config: RunConfig, sector: Sector, specs: Sequence[NodeSpec], data: Sequence[NodeData]
) -> dict[str, Any]:
    """Each node's own model, for as many epochs: on its own test rows, and on those of all nodes (mean over models).

    What is fitted is fitted on the node's own rows.  A node whose test rows cannot be scored (one class only) has no
    score of its own.  `everywhere` is what a model made alone is worth elsewhere.
    """
    test = concatenate([d.test for d in data])
    nodes: dict[str, float | None] = {}
    everywhere: list[float] = []
    for spec, own in zip(specs, data, strict=True):
        alone = sector if statistics.given(config, sector) else sector.fitted_on(own.train)
        params = _trained(config, alone, own.train, spec.name, _used(config, own.train))
        nodes[spec.name] = _primary(alone, params, own.test)
        everywhere += [value for value in (_primary(alone, params, test),) if value is not None]
    return {"nodes": nodes, "everywhere": sum(everywhere) / len(everywhere) if everywhere else None}


def measured(config: RunConfig, sector: Sector, version: Path) -> dict[str, float]:
    """What a version is worth on all nodes' test rows, where no node may say it: under differential privacy."""
    specs, task = config.nodes.expand(), NodeTask.of(config)
    test = concatenate([sector.load(place_of(spec, task)).test for spec in specs])
    params, _ = versions.read_version(version)
    # layers that stay at the nodes are in no version: the initial ones stand in for them
    return _score(sector, {**initial_arrays(sector, config.seed), **params}, test)


def _used(config: RunConfig, rows: Rows) -> int:
    """Rows that a node trains on in a round."""
    most = config.sector.training.max_examples
    return num_rows(rows) if most is None else min(num_rows(rows), most)


def _trained(config: RunConfig, sector: Sector, rows: Rows, who: str, used: int) -> dict[str, Any]:
    """As many epochs as the federation has; where a round takes `used` of the rows, each round draws others."""
    seed = canonical.seed_for(config.seed, "baseline", who)
    params, recipe = initial_arrays(sector, config.seed), config.sector.training
    if used >= num_rows(rows):
        budget = dataclasses.replace(recipe, epochs=recipe.epochs * config.rounds, max_examples=None)
        return training.train(sector, budget, params, rows, seed=seed, device=config.device).arrays
    for round_ in range(config.rounds):
        one, again = dataclasses.replace(recipe, max_examples=used), canonical.seed_for(seed, round_)
        params = training.train(sector, one, params, rows, seed=again, device=config.device).arrays
    return params


def _primary(sector: Sector, params: dict[str, Any], test: Rows) -> float | None:
    return _score(sector, params, test).get(sector.primary.name)


def _score(sector: Sector, params: dict[str, Any], test: Rows) -> dict[str, float]:
    return dict(build.scoring(sector).metrics(training.evaluate(sector, params, test)))
