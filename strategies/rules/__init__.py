"""The catalogue of aggregation rules.

A rule is a pure function on an (n, d) float32 array; its `RuleSpec` says what else it needs and what it promises.  A
new rule is a function and a spec in a file of this folder, one row in `RULES`, one YAML in `conf/rule/`.
"""

from __future__ import annotations

from strategies.rules.mean import MEAN, mean
from trellis.errors import ConfigError
from trellis.types import RuleSpec

RULES: dict[str, RuleSpec] = {spec.name: spec for spec in (MEAN,)}

__all__ = ["RULES", "get", "mean"]


def get(name: str) -> RuleSpec:
    """The spec of a rule.  Raises ConfigError naming the catalogue."""
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}; choose one of: {', '.join(sorted(RULES))}")
    return RULES[name]
