"""The statistics round: one question before the first round, where a sector has something to fit.

Every training node replies additive statistics of its training rows (sums and counts per feature, in how many rows a
code was bought); their sum gives the scaler or the vocabulary of the run, as values of the sector's options.  It goes
through the run's own exchange with the limits of each statistic per row, so that whatever hides or checks counts hides
and checks these.  What was fitted is kept in the run's folder: a resumed run asks nobody again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from conf.schema import NodeTask, RunConfig, to_json
from sectors.base import Sector
from server.folder import RunFolder
from strategies.exchange import Ask, Exchange
from trellis.errors import CohortTooSmall
from trellis.types import Counts, NodeInfo, Request, Role
from trellis.vectors import digest


def fitted(
    folder: RunFolder,
    config: RunConfig,
    sector: Sector,
    exchange: Exchange,
    nodes: Sequence[NodeInfo],
    ask: Ask,
    run: str,
) -> tuple[RunConfig, Sector]:
    """The run's configuration and sector with what is fitted.  Asks the nodes once a run.

    Raises CohortTooSmall when fewer than `min_replies` of them answer.
    """
    if not sector.statistic_specs() or given(config, sector):
        return config, sector
    options = _kept(folder)
    if options is None:
        totals, names = _ask(config, sector, exchange, nodes, ask, run)
        options = sector.fit(totals)
        folder.write_json(folder.statistics_path, {"options": options, "nodes": names, "rows": int(totals["rows"])})
    known = dataclasses.replace(config.sector, options={**config.sector.options, **options})
    return dataclasses.replace(config, sector=known), sector.fitted(options)


def given(config: RunConfig, sector: Sector) -> bool:
    """Whether the configuration says what is otherwise fitted: published constants are not measured again."""
    return any(config.sector.options.get(name) for name in sector.fitted_options)


def of_run(folder: RunFolder, sector: Sector) -> Sector:
    """The sector as a finished run fitted it."""
    options = _kept(folder)
    return sector if options is None else sector.fitted(options)


def _kept(folder: RunFolder) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(folder.statistics_path.read_bytes())["options"]
    except FileNotFoundError:
        return None
    return found


def _ask(
    config: RunConfig, sector: Sector, exchange: Exchange, nodes: Sequence[NodeInfo], ask: Ask, run: str
) -> tuple[Counts, list[str]]:
    """The summed statistics of all training nodes, and whose they are."""
    cohort = sorted((n for n in nodes if n.role is Role.train), key=lambda n: n.name)
    request = Request(
        run=run,
        round=0,
        purpose="statistics",
        base=digest({}),
        config=to_json(NodeTask.of(config)),
        members=tuple(n.name for n in cohort),
        splits=("train",),
    )
    collected = exchange.collect(request, cohort, ask, base={})
    many = [update.counts["train"] for update in collected.updates]
    if len(many) < config.min_replies or not sum(int(c["rows"]) for c in many):
        told = "; ".join(f"{r.node}: {r.reason}, {r.evidence}" for r in collected.refusals[:5])
        raise CohortTooSmall(
            f"{len(many)} of {len(cohort)} nodes sent the statistics that {sector.name} is fitted on, "
            f"{config.min_replies} with training rows are needed ({told or 'they have no training rows'})"
        )
    # in the order of names: sums of floats follow it
    totals = {k: sum((c[k] for c in many[1:]), start=many[0][k]) for k in many[0]}
    return totals, [update.node for update in collected.updates]
