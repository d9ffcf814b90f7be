"""The catalogue of aggregation rules.

A rule is a pure function on an (n, d) float32 array; its `RuleSpec` says what else it needs and what it promises.  A
new rule is a function and a spec in a file of this folder, one row in `RULES`, one YAML in `conf/rule/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from strategies.rules.centre import CENTERED_CLIPPING, GEOMETRIC_MEDIAN, centered_clipping, geometric_median
from strategies.rules.coordinate import MEAMED, MEDIAN, TRIMMED_MEAN, meamed, median, trimmed_mean
from strategies.rules.filters import CGE, DNC, FLAME, cge, dnc, flame
from strategies.rules.krum import BULYAN, KRUM, MULTI_KRUM, bulyan, krum, multi_krum
from strategies.rules.mean import MEAN, mean
from strategies.rules.robust import ROBUST, robust
from strategies.rules.trust import FLTRUST, FOOLSGOLD, fltrust, foolsgold
from trellis.errors import ConfigError
from trellis.types import RuleSpec

RULES: dict[str, RuleSpec] = {
    spec.name: spec
    for spec in (
        MEAN, MEDIAN, TRIMMED_MEAN, MEAMED, KRUM, MULTI_KRUM, BULYAN, GEOMETRIC_MEDIAN, CENTERED_CLIPPING, FLTRUST,
        FOOLSGOLD, CGE, DNC, FLAME, ROBUST,
    )
}  # fmt: skip

__all__ = [
    "RULES", "bulyan", "centered_clipping", "cge", "dnc", "flame", "fltrust", "foolsgold", "geometric_median", "get",
    "krum", "meamed", "mean", "median", "multi_krum", "require", "robust", "trimmed_mean",
]  # fmt: skip


def require(rule: RuleSpec, num_byzantine: int, options: Mapping[str, object]) -> None:
    """Raises ConfigError when the rule cannot survive so many liars, or does not take these options."""
    if num_byzantine and not rule.tolerates:
        raise ConfigError(
            f"rule={rule.name} tolerates no liar, but num_byzantine={num_byzantine}: "
            "choose a robust rule, or set num_byzantine=0"
        )
    parameters = inspect.signature(rule.fn).parameters
    own = set(parameters) - {"updates_nd", "num_byzantine", *rule.needs}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if (odd := sorted(set(options) - own)) and not takes_any:
        raise ConfigError(f"rule={rule.name} has no options {odd}; it takes: {', '.join(sorted(own)) or 'none'}")


def get(name: str) -> RuleSpec:
    """The spec of a rule.  Raises ConfigError naming the catalogue."""
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}; choose one of: {', '.join(sorted(RULES))}")
    return RULES[name]
