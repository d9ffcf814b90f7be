"""The catalogue of tasks.

A sector is a file here and one in `conf/sector`, of one name.  Names only: a sector's file, and with it torch, is
imported when the sector is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from trellis.errors import ConfigError

if TYPE_CHECKING:
    from sectors.base import Sector

SECTORS: dict[str, str] = {
    name: f"sectors.{name}:{''.join(word.capitalize() for word in name.split('_'))}"
    for name in sorted(
        file.name.removesuffix(".yaml")
        for file in (resources.files("conf") / "sector").iterdir()
        if file.name.endswith(".yaml")
    )
}
"""Name of a sector -> where its class is: conf/sector/<a_name>.yaml and class AName in sectors/<a_name>.py."""


def names() -> list[str]:
    """Every sector, sorted."""
    return sorted(SECTORS)


def get(name: str, options: Mapping[str, Any] | None = None) -> Sector:
    """The sector `name` with its options (lists, as YAML has them, become tuples).

    Raises ConfigError for an unknown sector, an unknown option, or an option of another type.
    """
    if name not in SECTORS:
        raise ConfigError(f"unknown sector {name!r}; the sectors are {', '.join(names())}")
    cls = _class(name)
    return cls(**_checked(name, cls, options or {}))


def _class(name: str) -> type[Sector]:
    """The sector's class.  Raises ConfigError saying which file or class is missing."""
    where, _, attribute = SECTORS[name].partition(":")
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name != where:
            raise
        raise ConfigError(f"conf/sector/{name}.yaml has no sector: write {where.replace('.', '/')}.py") from error
    cls: type[Sector] | None = getattr(module, attribute, None)
    if cls is None:
        raise ConfigError(
            f"{where.replace('.', '/')}.py has no class {attribute}: the sector {name} is looked for there"
        )
    return cls


def _checked(name: str, cls: type[Sector], options: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = ", ".join(f"{k}: {f.type} = {f.default!r}" for k, f in fields.items())
    checked = {}
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(f"sector {name} has no option {key!r} (found {value!r}); its options are {known}")
        try:
            checked[key] = _converted(hints[key], value)
        except TypeError:
            raise ConfigError(
                f"sector {name}: option {key} must be {fields[key].type}, "
                f"found {value!r} ({type(value).__name__}); its options are {known}"
            ) from None
    return checked


def _converted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`: int to float, list to tuple, nothing else changes.  Raises TypeError."""
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_converted(typing.get_args(kind)[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        return _converted(next(k for k in typing.get_args(kind) if k is not types.NoneType), value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # `is`: a bool is not an int here
        raise TypeError
    return value
