"""The exam: all checks in the order in which they are told, and what is shown beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from conf.schema import RunConfig
from experiments.readiness import findings as named
from experiments.readiness.federation import Federation, gather
from experiments.readiness.findings import Finding, Readiness, raised
from experiments.readiness.fitted import check_pooled, check_repeatable, check_statistics
from experiments.readiness.leakage import check_identifiers, check_leakage
from experiments.readiness.model import check_model, check_shapes
from experiments.readiness.schema import check_schema, columns_of
from experiments.readiness.shift import brightness_of, shift_of
from experiments.readiness.splits import check_balance, check_official, check_splits, rows_of
from sectors.base import Sector

CHECKS: dict[str, Callable[[Federation], list[Finding]]] = {
    named.SCHEMA: check_schema,
    named.SHAPES: check_shapes,
    named.MODEL: check_model,
    named.LEAKAGE: check_leakage,
    named.IDENTIFIERS: check_identifiers,
    named.POOLED: check_pooled,
    named.STATISTICS: check_statistics,
    named.REPEATABLE: check_repeatable,
    named.SPLIT: check_splits,
    named.OFFICIAL: check_official,
    named.BALANCE: check_balance,
}

SHOWN: dict[str, Callable[[Federation], Any]] = {
    "nodes": lambda f: tuple(rows_of(f.sector, node) for node in f.nodes),
    "columns": columns_of,
    "shift": shift_of,
    "brightness": brightness_of,
}
"""By field of `Readiness`."""


def examine(config: RunConfig, sector: Sector, *, on_check: Callable[[str], None] | None = None) -> Readiness:
    """Every check of a sector on the nodes of a configuration.  Raises ConfigError where the nodes do not compose.

    `on_check` hears the name of each check before it starts.
    """
    tell = on_check or (lambda name: None)
    tell("reading")
    federation, found = gather(config, sector)
    shown: dict[str, Any] = {}
    for name, show in SHOWN.items() if federation.nodes else ():
        try:
            shown[name] = show(federation)
        except Exception as error:  # a loader that is examined may do anything; the checks still count
            found.append(Finding("report", None, f"{name} cannot be shown: {raised(error)}"))
    federation = dataclasses.replace(federation, columns=shown.get("columns", ()))
    for name, check in CHECKS.items() if federation.nodes else ():
        tell(name)
        try:
            found += check(federation)
        except Exception as error:  # see above
            found.append(Finding(name, False, f"the check ended with {raised(error)}"))
    return Readiness(
        sector=sector.name,
        title=sector.title,
        data=config.data.value,
        federation=config.nodes.name,
        findings=tuple(found),
        **shown,
    )
