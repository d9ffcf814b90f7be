"""What federating is compared with: the same model, budget and split, trained on each node alone and on pooled rows.

Baselines see rows together, which no deployment may: they exist in simulation only, and never leave it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from conf.schema import NodeSpec, NodeTask, RunConfig
from sectors import training
from sectors.base import NodeData, Rows, Sector, concatenate, place_of
from sectors.params import initial_arrays
from server import build
from trellis import canonical
from trellis.types import Role


def baselines(config: RunConfig, sector: Sector) -> dict[str, Any]:
    """-> {"pooled": test metrics, "local_only": {"nodes": {name: primary or None}, "everywhere": primary}}"""
    specs, task = config.nodes.expand(), NodeTask.of(config)
    data = [sector.load(place_of(spec, task)) for spec in specs]
    found: dict[str, Any] = {"pooled": pooled(config, sector, data)}
    if all(spec.role is Role.train for spec in specs):
        found["local_only"] = local_only(config, sector, specs, data)
    return found


def pooled(config: RunConfig, sector: Sector, data: Sequence[NodeData]) -> dict[str, float]:
    """One model on all training rows, for as many epochs as the federation, tested on all test rows."""
    rows = concatenate([d.train for d in data])
    test = concatenate([d.test for d in data])
    return _score(sector, _trained(config, sector, rows, "pooled"), test)


def local_only(
    config: RunConfig, sector: Sector, specs: Sequence[NodeSpec], data: Sequence[NodeData]
) -> dict[str, Any]:
    """Each node's own model, for as many epochs: on its own test rows, and on those of all nodes (mean over models).

    A node with one class only has no score of its own.  `everywhere` is what a model made alone is worth elsewhere.
    """
    test = concatenate([d.test for d in data])
    nodes: dict[str, float | None] = {}
    everywhere: list[float] = []
    for spec, own in zip(specs, data, strict=True):
        params = _trained(config, sector, own.train, spec.name)
        nodes[spec.name] = _score(sector, params, own.test).get(sector.primary.name)
        everywhere.append(_score(sector, params, test)[sector.primary.name])
    return {"nodes": nodes, "everywhere": sum(everywhere) / len(everywhere)}


def _trained(config: RunConfig, sector: Sector, rows: Rows, who: str) -> dict[str, Any]:
    budget = dataclasses.replace(config.sector.training, epochs=config.sector.training.epochs * config.rounds)
    seed = canonical.seed_for(config.seed, "baseline", who)
    params = initial_arrays(sector, config.seed)
    return training.train(sector, budget, params, rows, seed=seed, device=config.device).arrays


def _score(sector: Sector, params: dict[str, Any], test: Rows) -> dict[str, float]:
    return dict(build.scoring(sector).metrics(training.evaluate(sector, params, test)))
