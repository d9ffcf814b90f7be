"""Overrides -> one `RunConfig`.

Hydra composes here and nowhere else, once, in the launcher or in the ServerApp's process.  Overrides are data that may
come over a network: they choose among shipped files and set values, and never name a target or a file outside a group's
folder, reach Hydra's own settings or interpolate (an interpolation could read the server's environment).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import RunConfig
from trellis.errors import ConfigError

# GlobalHydra is one per process and not thread-safe.
_lock = threading.Lock()


def load(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose, convert and check.  Raises ConfigError with the choices when an override does not fit."""
    for override in overrides:
        if _guarded(override).is_sweep_override():
            raise ConfigError(
                f"override {override!r} is several values: use --multirun to run all of {override}; "
                "quote the value where it is one text"
            )
    try:
        with _hydra():
            composed = compose(config_name="config", overrides=list(overrides))
        OmegaConf.resolve(composed)
        # a list, not a dict by name: their order is part of what the run is
        OmegaConf.set_struct(composed, False)
        composed["preaggregator"] = list((composed.get("preaggregator") or {}).values())
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), composed)
        return cast(RunConfig, OmegaConf.to_object(typed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """`seed=0,1 rule=mean` -> one list of overrides a run: the product of all choices, in the order written."""
    runs: list[list[str]] = [[]]
    for override in overrides:
        runs = [[*run, one] for run in runs for one in _each(override)]
    return runs


def _each(override: str) -> list[str]:
    """The overrides that one of a sweep stands for, each as fit as if it stood alone."""
    parsed = _guarded(override)
    key = parsed.get_key_element()
    if not parsed.is_sweep_override():
        return [f"{key}={parsed.get_value_element_as_str()}"]
    if parsed.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        raise ConfigError(f"override {override!r} does not list its values: write them, e.g. {key}=a,b")
    each = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
    for one in each:
        _guarded(one)
    return each


def groups() -> list[str]:
    """The config groups."""
    return sorted(p.name for p in resources.files("conf").iterdir() if p.is_dir() and not p.name.startswith("_"))


def choices(group: str) -> list[str]:
    """The options of a group, e.g. `choices("sector")`."""
    folder = resources.files("conf") / group
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _guard(override: str) -> None:
    override = override.strip()
    key, _, _ = override.partition("=")
    if "_target_" in override:
        raise ConfigError(f"override {override!r} names `_target_`: an override sets values, it never names code")
    if "${" in override:
        raise ConfigError(f"override {override!r} interpolates: write the value itself")
    if override.startswith("~"):
        raise ConfigError(f"override {override!r} deletes a setting: every setting is needed")
    if key.lstrip("+").startswith("hydra"):
        raise ConfigError(f"override {override!r} changes Hydra itself: only the run's own settings can be set")
    if "=" not in override:
        raise ConfigError(f"override {override!r} has no value: write key=value, e.g. rounds=5")


def _guarded(override: str) -> Override:
    """The override, parsed.  Raises ConfigError where its text, key or value is not for an override to give."""
    _guard(override)
    try:
        with _lock:
            parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(_explain(error, [override])) from error
    # Escapes are undone by the parser: a text without an interpolation may hold one now.
    if not parsed.is_sweep_override() and "${" in str(parsed.value()):
        raise ConfigError(f"override {override!r} interpolates: write the value itself")
    # Hydra takes any folder of its search path for a group, and any path for an option of a group.
    key = parsed.key_or_group
    root = re.split("[./]", key)[0]
    if root not in groups() and root not in {f.name for f in dataclasses.fields(RunConfig)}:
        raise ConfigError(_unknown_key(key))
    if "/" in key:
        raise ConfigError(f"override {override!r}: {root} has no groups inside it; groups: {', '.join(groups())}")
    if key in groups() and not parsed.is_sweep_override():
        value = parsed.value()
        for option in value if isinstance(value, list) else [value]:
            if option not in choices(key):
                raise ConfigError(f"{key}={option} does not exist; choose one of: {', '.join(choices(key))}")
    return parsed


@contextmanager
def _hydra() -> Iterator[None]:
    with _lock:
        saved = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_module("conf", version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = saved


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message, shortened, or the nearest key."""
    text = str(error).strip()
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _unknown_key(unknown.group(1))
    cause = error.__cause__
    lines = [
        line for line in (str(cause) if cause else text).splitlines() if line.strip() and "object_type" not in line
    ]
    return f"cannot compose {' '.join(overrides) or 'the defaults'}: {' '.join(lines)}"


def _unknown_key(key: str) -> str:
    known = _keys(OmegaConf.to_container(OmegaConf.structured(RunConfig)))
    if key in known:
        group = key.partition(".")[0]
        return f"the chosen {group} has no setting {key!r}; choose another {group}: {', '.join(choices(group))}"
    near = difflib.get_close_matches(key, sorted({*known, *groups()}), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"groups: {', '.join(groups())}"
    return f"there is no setting {key!r}; {hint}"


def _keys(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return []
    found = []
    for key, inner in value.items():
        path = f"{prefix}{key}"
        found += [path, *_keys(inner, f"{path}.")]
    return found
