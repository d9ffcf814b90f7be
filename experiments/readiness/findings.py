"""What the exam of a loader finds: verdicts in words, and what is shown of the data beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SCHEMA, SHAPES, MODEL, LEAKAGE, IDENTIFIERS = "schema", "shapes", "model", "leakage", "identifiers"
POOLED, STATISTICS, REPEATABLE = "fitted on pooled rows", "statistics", "repeatable"
SPLIT, BALANCE, OFFICIAL = "splits", "label balance", "official splits"

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 5
"""Nodes or columns that a finding names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, what was needed, what to do."""

    check: str
    passed: bool | None
    """None: a remark, not a verdict."""
    said: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class NodeRows:
    """How many rows a node has by split, and of what."""

    node: str
    role: str
    origin: str
    """Its part of the shared rows, or its own file."""
    rows: dict[str, int]
    classes: dict[str, tuple[int, ...]]
    """By split, labels of each class; empty where `y` names no classes."""
    quantiles: tuple[float, ...]
    """QUANTILES of y where it is a number, else empty."""

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @property
    def by_class(self) -> tuple[int, ...]:
        """Labels of each class in all splits."""
        return tuple(sum(counts) for counts in zip(*self.classes.values(), strict=True))


@dataclass(frozen=True, slots=True)
class ColumnSeen:
    """A column of the raw table as it was declared, and the share of its values that are missing."""

    name: str
    unit: str
    needed: str
    missing: float
    by_node: tuple[float | None, ...]
    """In the order of the nodes; None where the loader does not say whose a raw row is."""


@dataclass(frozen=True, slots=True)
class Shift:
    """How far each node's inputs lie from those of the others, in standard deviations."""

    names: tuple[str, ...]
    by_node: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Brightness:
    """Histogram of the mean intensity of a node's images: the share of its images in each bin."""

    edges: tuple[float, ...]
    by_node: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Readiness:
    """All findings, and what the report shows of the data."""

    sector: str
    title: str
    data: str
    federation: str
    findings: tuple[Finding, ...]
    nodes: tuple[NodeRows, ...] = ()
    columns: tuple[ColumnSeen, ...] = ()
    shift: Shift | None = None
    brightness: Brightness | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed; remarks do not count."""
        return not any(f.passed is False for f in self.findings)


def failures(check: str, problems: Iterable[str]) -> list[Finding]:
    """A failed finding for each problem."""
    return [Finding(check, False, said) for said in problems]


def each(check: str, passed: bool | None, said: Mapping[str, str]) -> list[Finding]:
    """A finding a node, or one for all where they are many."""
    if len(said) <= SHOWN:
        return [Finding(check, passed, text, name) for name, text in said.items()]
    name, text = next(iter(said.items()))
    return [Finding(check, passed, f"{len(said)} nodes ({some(list(said))}); of {name}: {text}")]


def some(names: Sequence[object], shown: int = SHOWN) -> str:
    """The first few, and how many more there are."""
    return ", ".join(map(str, names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def span(values: Mapping[str, float], spec: str = "g") -> str:
    """The least and the most, and whose they are: `3 (west) to 20 (north)`."""
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[least] == values[most]:
        return f"{values[least]:{spec}} each"
    return f"{values[least]:{spec}} ({least}) to {values[most]:{spec}} ({most})"


def raised(error: Exception) -> str:
    """An error in words; one that a loader did not raise on purpose with its kind."""
    kind = "" if type(error).__module__ == "trellis.errors" else f"{type(error).__name__}: "
    return f"{kind}{error}"
