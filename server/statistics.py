"""The statistics round: one question before the first round, where a sector has something to fit.

Every training node replies additive statistics of its training rows (sums and counts per feature, in how many rows a
code was bought); their sum gives the scaler or the vocabulary of the run, as values of the sector's options.  It goes
through the run's own exchange with the limits of each statistic per row, so that whatever hides or checks counts hides
and checks these; and each node's statistics must be such as rows can have (`Sector.statistics_problem`): a sum bounds
what one liar can do only where no single reply is impossible.  What was fitted is kept in the run's folder: a resumed
run asks nobody again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

from flwr.common import log

from conf.schema import NodeTask, RunConfig, to_json
from sectors.base import Sector
from server.folder import RunFolder
from strategies.exchange import Ask, Exchange
from trellis.errors import CohortTooSmall, ResumeError
from trellis.types import Collected, Counts, NodeInfo, Refusal, Request, Role, Update
from trellis.vectors import digest


@dataclass(frozen=True, slots=True)
class Fitted:
    """What the statistics round came to: values of the sector's options, of whose rows, and who was turned away."""

    options: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    rows: int = 0
    refusals: tuple[Refusal, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0


def fitted(
    folder: RunFolder,
    config: RunConfig,
    sector: Sector,
    exchange: Exchange,
    nodes: Sequence[NodeInfo],
    ask: Ask,
    run: str,
) -> Fitted:
    """What the run's sector is fitted to; nothing where it fits nothing.  Asks the nodes once a run.

    Raises CohortTooSmall when fewer than `min_replies` of them answer, ResumeError when the folder's file is damaged.
    """
    if not sector.statistic_specs() or given(config, sector):
        return Fitted()
    found = of_run(folder)
    if found is None:
        found = _ask(config, sector, exchange, nodes, ask, run)
        for refusal in found.refusals:
            log(WARNING, "statistics: refused %s: %s, %s", refusal.node, refusal.reason, refusal.evidence)
        folder.write_json(folder.statistics_path, dataclasses.asdict(found))
    return found


def with_fitted(config: RunConfig, found: Fitted) -> RunConfig:
    """The configuration that nodes and versions get: what was given, and what was fitted."""
    options = {**config.sector.options, **found.options}
    return dataclasses.replace(config, sector=dataclasses.replace(config.sector, options=options))


def given(config: RunConfig, sector: Sector) -> bool:
    """Whether the configuration says what is otherwise fitted: published constants are not measured again."""
    return any(config.sector.options.get(name) for name in sector.fitted_options)


def of_run(folder: RunFolder) -> Fitted | None:
    """What a run was fitted to; None before it was.  Raises ResumeError when its file is damaged."""
    try:
        kept = json.loads(folder.statistics_path.read_bytes())
        kept |= {"nodes": tuple(kept["nodes"]), "refusals": tuple(Refusal(**one) for one in kept["refusals"])}
        return Fitted(**kept)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ResumeError(f"{folder.statistics_path} is damaged: {error}") from error


def _ask(
    config: RunConfig, sector: Sector, exchange: Exchange, nodes: Sequence[NodeInfo], ask: Ask, run: str
) -> Fitted:
    """The statistics of all nodes that registered training rows, checked one by one, summed in the order of names."""
    trainers = (n for n in nodes if n.role is Role.train and n.num_examples is not None)
    cohort = sorted(trainers, key=lambda n: n.name)
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
    refused = {u.node: why for u in collected.updates if (why := _more_rows(u, cohort)) is not None}
    refusals = (*collected.refusals, *(Refusal(node, "num_examples", why) for node, why in refused.items()))
    answered = _behind(collected, refused)
    counts = [found["train"] for found, _ in answered]
    many = sorted(name for _, names in answered for name in names)
    if len(many) < config.min_replies or not sum(int(c["rows"]) for c in counts):
        told = "; ".join(f"{r.node}: {r.reason}, {r.evidence}" for r in refusals[:5])
        raise CohortTooSmall(
            f"{len(many)} of {len(cohort)} nodes sent the statistics that {sector.name} is fitted on, "
            f"{config.min_replies} with training rows are needed ({told or 'they have no training rows'})"
        )
    totals = {k: sum((c[k] for c in counts[1:]), start=counts[0][k]) for k in counts[0]}
    return Fitted(
        options=sector.fit(totals),
        nodes=tuple(many),
        rows=int(totals["rows"]),
        refusals=refusals,
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down,
    )


def _behind(collected: Collected, refused: Mapping[str, str]) -> list[tuple[Mapping[str, Counts], tuple[str, ...]]]:
    """Counts, and whose they are: each node's own, or the sum of a group."""
    if collected.groups is not None:
        return [(group.counts, group.survivors) for group in collected.groups if "train" in group.counts]
    return [(update.counts, (update.node,)) for update in collected.updates if update.node not in refused]


def _more_rows(update: Update, cohort: Sequence[NodeInfo]) -> str | None:
    """What is wrong with a node's statistics of more training rows than it registered, or the federation allows it."""
    if "train" not in update.counts:  # masked: the exchange has held the sum against what was registered
        return None
    most = next(node.num_examples for node in cohort if node.name == update.node)
    rows = int(update.counts["train"]["rows"])
    return f"statistics of {rows} rows, {most} are registered" if most is not None and rows > most else None
