"""The catalogue of attacks: what lying nodes may send.

Each is a pure function on arrays, rows or a reply, usable without any engine: `attacks.alie(View(own_d, honest_hd))`.
A new attack is a function in the file of its kind, a row in `ATTACKS`, one YAML in `conf/attack/`, and one row in its
contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.attacks.data import backdoor, label_flip, stamped
from experiments.attacks.model import (
    alie,
    alie_z,
    boosted,
    free_rider,
    gaussian,
    infinity,
    ipm,
    mimic,
    not_a_number,
    rop,
    scaling,
    sign_flip,
    top_direction,
)
from experiments.attacks.protocol import inflation, malformed, replay, replies
from experiments.attacks.search import agr_tailored, min_max, min_sum
from experiments.attacks.view import AttackSpec, Reply, View
from trellis import wire
from trellis.errors import ConfigError
from trellis.types import Request

__all__ = [
    "ATTACKS", "AttackSpec", "Reply", "View", "agr_tailored", "alie", "alie_z", "backdoor", "boosted", "defaults",
    "free_rider", "gaussian", "get", "infinity", "inflation", "ipm", "label_flip", "malformed", "mimic", "min_max",
    "min_sum", "not_a_number", "options_for", "replay", "require", "rop", "scaling", "sign_flip", "stamped",
    "top_direction", "toy",
]  # fmt: skip

ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec
    for spec in (
        AttackSpec("sign_flip", sign_flip, others_if={"of": "mean"}),
        AttackSpec("gaussian", gaussian),
        AttackSpec("infinity", infinity),
        AttackSpec("not_a_number", not_a_number),
        AttackSpec("ipm", ipm, needs_others=True),
        AttackSpec("alie", alie, needs_others=True),
        AttackSpec("min_max", min_max, needs_others=True),
        AttackSpec("min_sum", min_sum, needs_others=True),
        AttackSpec("agr_tailored", agr_tailored, needs_others=True),
        AttackSpec("mimic", mimic, needs_others=True, remember=top_direction),
        AttackSpec("rop", rop, needs_others=True, needs_previous=True),
        AttackSpec("free_rider", free_rider, needs_previous=True),
        AttackSpec("scaling", scaling),
        AttackSpec("label_flip", label_flip, "data"),
        AttackSpec("backdoor", backdoor, "data", boost=boosted),
        AttackSpec("inflation", inflation, "protocol"),
        AttackSpec("malformed", malformed, "protocol"),
        AttackSpec("replay", replay, "protocol", remember=replies),
    )
}

GIVEN = frozenset({"view", "reply", "rows", "update_d", "num_classes", "rng"})
"""Parameters that the engine fills in."""


def get(name: str) -> AttackSpec:
    """The spec of an attack.  Raises ConfigError naming the catalogue."""
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}; choose one of: {', '.join(sorted(ATTACKS))}")
    return ATTACKS[name]


def options_for(fn: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an attack's options that one of its functions takes."""
    return {k: v for k, v in options.items() if k in _own(fn)}


def defaults(fn: Callable[..., Any]) -> dict[str, Any]:
    """What an attack's options are where nothing is said."""
    return {name: p.default for name, p in inspect.signature(fn).parameters.items() if p.default is not p.empty}


def require(spec: AttackSpec, options: Mapping[str, Any], *, num_classes: int | None) -> None:
    """Raises ConfigError when the attack does not take these options, or cannot be carried out on such a sector."""
    own = _own(spec.fn) | (_own(spec.boost) if spec.boost else set())
    if odd := sorted(set(options) - own):
        raise ConfigError(f"attack={spec.name} has no options {odd}; it takes: {', '.join(sorted(own)) or 'none'}")
    if spec.kind == "data" and num_classes is None:
        raise ConfigError(f"attack={spec.name} changes classes, and this sector has none: choose another attack")
    try:
        toy(spec, options, num_classes=num_classes or 2)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"attack={spec.name} cannot be carried out with {dict(options)}: {error}") from error


def toy(spec: AttackSpec, options: Mapping[str, Any], *, num_classes: int = 2) -> Any:
    """The attack on a handful of numbers: what its options do, and whether they can be used at all."""
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {}
    subject: Any = {"x": rng.random((8, 6), np.float32), "y": np.arange(8) % num_classes}
    match spec.kind:
        case "model":
            honest_hd = rng.standard_normal((4, 3), np.float32)
            subject = View(honest_hd[0], honest_hd, previous_step_d=honest_hd[1], aggregate=lambda x_nd: x_nd.mean(0))
        case "protocol":
            request = Request("toy", 1, "train", "", {}, ("a",))
            arrays = {"w": np.zeros(3, np.float32)}
            content = wire.reply_content(request=request, arrays=arrays, num_examples=8, metrics={}, counts={})
            subject = Reply(content)
        case "data":
            given = {"num_classes": num_classes, "rng": rng}
    if spec.remember is not None:
        subject = replace(subject, state=spec.remember(subject, **options_for(spec.remember, options)))
    found = spec.fn(subject, **given, **options_for(spec.fn, options))
    return found if spec.boost is None else spec.boost(np.ones(3, np.float32), **options_for(spec.boost, options))


def _own(fn: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(fn).parameters) - GIVEN
