"""What a run is to a tracking server: its name, its tags, its params."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from server import points, store
from trellis import canonical
from trellis.types import MetricSpec

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F3C8D", "#5D69B1", "#A5AA00")
"""Told apart by colour-blind eyes too; MLflow's own choice gave two runs the same red."""

MAX_PARAM, MAX_TAG = 6000, 5000
"""Characters of one value; MLflow refuses more."""


MASKED = "masked: this node's update, metrics and counts were sent under secure aggregation, and nobody saw them"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One federated run.  `tags` are added to those the config gives (`choices`)."""

    run_id: str
    """Trellis's id of the run; survives resume."""
    run_name: str
    sector: str
    primary: MetricSpec
    config: Mapping[str, Any]
    """The composed config, JSON values."""
    config_digest: str
    git_digest: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return f"trellis-{self.sector}"

    @property
    def choices(self) -> dict[str, str]:
        """What runs are compared by: rule, privacy, attack, engine and data source, then `tags`."""
        named = {f"fl.{group}": self._name_of(group) for group in ("rule", "privacy", "attack", "engine")}
        named["fl.data"] = str(self.config.get("data") or "")
        return {**{k: v for k, v in named.items() if v}, **self.tags}

    @property
    def num_nodes(self) -> int:
        """Nodes of the federation, as configured; 0 when the config does not say."""
        nodes = self.config.get("nodes") or {}
        return max(int(nodes.get("count") or 0), len(nodes.get("items") or ()))

    def run_tags(self) -> dict[str, str]:
        """Tags of the federation's run."""
        tags = {
            "fl.role": "federation",
            "fl.run": self.run_id,
            "fl.sector": self.sector,
            "fl.config_digest": self.config_digest,
            **self.choices,
            "mlflow.runColor": COLORS[canonical.seed_for("color", self.run_name) % len(COLORS)],
            "mlflow.source.name": "trellis",
            "mlflow.source.type": "PROJECT",
        }
        if self.git_digest:
            commit = self.git_digest.removesuffix("-dirty")
            tags |= {"fl.git_digest": self.git_digest, "mlflow.source.git.commit": commit}
        return {k: v[:MAX_TAG] for k, v in tags.items()}

    def node_tags(self, node: str, parent: str) -> dict[str, str]:
        """Tags of a node's child run."""
        names = {"fl.node": node, "fl.run": self.run_id, "fl.sector": self.sector}
        if self.tags.get("fl.masked"):
            names |= {"fl.masked": "true", "mlflow.note.content": MASKED}
        return {"mlflow.parentRunId": parent, "fl.role": "node", **names}

    def _name_of(self, group: str) -> str:
        value = self.config.get(group)
        return str(value.get("name") or "") if isinstance(value, Mapping) else ""


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Nested config -> MLflow params.

    Keys are joined by dots, lists are JSON, passwords in URIs are hidden, a value has at most 6000 characters.
    """

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield points.clean(prefix), store.without_password(text)[:MAX_PARAM]

    return dict(walk("", config))
