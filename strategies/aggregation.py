"""Rows -> one update: pre-aggregators, then the rule.  What a round does, and what an attacker who knows it expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from strategies import rules
from strategies.rows import Rows, rows_of
from trellis.errors import CohortTooSmall, ConfigError
from trellis.types import Aggregated, PreAggregatorSpec, RuleSpec

Offers = Mapping[str, Callable[[], Any]]
"""What a round can give to those that need it, by the names of `types.Need`; made only when asked for."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Pre-aggregators in their order, then the rule with its options."""

    rule: RuleSpec = field(default_factory=lambda: rules.get("mean"))
    options: Mapping[str, Any] = field(default_factory=dict)
    preaggregators: Sequence[PreAggregatorSpec] = ()

    def num_rows(self, num_rows: int) -> int:
        """Rows that the rule sees of so many."""
        for spec in self.preaggregators:
            num_rows = spec.num_rows(num_rows)
        return num_rows

    def require_rows(self, num_rows: int, num_byzantine: int) -> None:
        """Raises CohortTooSmall when the rule cannot survive so many liars among so many rows."""
        seen, needed = self.num_rows(num_rows), self.rule.min_rows(num_byzantine)
        if seen < needed:
            names = ", ".join(spec.name for spec in self.preaggregators)
            left = "" if seen == num_rows else f" ({seen} rows after {names})"
            raise CohortTooSmall(
                f"{num_rows} good replies{left}, {needed} are needed: rule={self.rule.name} with "
                f"num_byzantine={num_byzantine}"
            )

    def require_names(self, *, weighted: bool = False) -> None:
        """Raises ConfigError when the rule looks at whose a row is, and the rows are mixtures."""
        mixing = [spec.name for spec in self.preaggregators if spec.mixes]
        by_name = "names" in self.rule.needs or (weighted and "weights" in self.rule.needs)
        if mixing and by_name:
            raise ConfigError(
                f"rule={self.rule.name} looks at whose a row is{' (weighted)' if weighted else ''}, and behind "
                f"{', '.join(mixing)} a row is several nodes': take another rule, or no such preaggregator"
            )

    def __call__(self, updates: Any, *, num_byzantine: int, offers: Offers) -> Aggregated:
        """(n, d) rows -> the aggregate, its weights those of the n rows.

        Raises CohortTooSmall, NotFinite; ConfigError where the rule needs what `offers` has not.
        """
        rows = rows_of(updates)
        self.require_rows(rows.num_rows, num_byzantine)
        mixed = rows
        for spec in self.preaggregators:
            mixed = rows_of(spec.fn(mixed, num_byzantine=num_byzantine, **_needed(spec.name, spec.needs, offers)))
        given = _needed(self.rule.name, self.rule.needs, offers)
        result = self.rule.fn(_plain(mixed), num_byzantine=num_byzantine, **given, **self.options)
        aggregated = result if isinstance(result, Aggregated) else Aggregated(result)
        return _of_original(aggregated, rows, mixed)


def _plain(rows: Rows) -> Any:
    """An array where the rows are one: anyone's rule may stand behind no pre-aggregator."""
    return rows.updates_nd if rows.mix is None and rows.device is None else rows


def _needed(name: str, needs: Sequence[str], offers: Offers) -> dict[str, Any]:
    missing = [need for need in needs if need not in offers]
    if missing:
        raise ConfigError(f"rule={name} needs {missing}, which this run does not have")
    return {need: offers[need]() for need in needs}


def _of_original(aggregated: Aggregated, rows: Rows, mixed: Rows) -> Aggregated:
    """Weights of mixed rows as weights of the rows they are made of."""
    if aggregated.weights_n is None or mixed is rows or mixed.updates_nd is not rows.updates_nd:
        return aggregated
    return replace(aggregated, weights_n=aggregated.weights_n @ mixed.coefficients())
