"""Who this node is, from its own side.

A site describes its node in a file of its own (`node-file` in the SuperNode's node config), and no message changes
that. A simulated node has no site: it is told who it is once, by an enrolment message, and keeps it in
`Context.state`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context

from conf.schema import NodesConfig, NodeSpec, check_name, from_json, to_json
from trellis import canonical
from trellis.errors import ConfigError, PolicyRefusal

STATE = "trellis.node"
SIMULATED = "simulated"
"""Set in the node config by the local engine."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A node and the folder that keeps its durable state (None: nothing is kept)."""

    spec: NodeSpec
    store: Path | None
    simulated: bool
    file: Path | None = None
    """Where a real node is described."""


def of(context: Context) -> Identity:
    """This node.  Raises PolicyRefusal("policy.identity") when nobody said who it is."""
    if is_simulated(context):
        told = context.state.config_records.get(STATE)
        if told is None:
            raise PolicyRefusal("policy.identity", "this simulated node has not been enrolled")
        return _from_text(str(told["spec"]), str(told["store"]))
    if "node-file" in context.node_config:
        return _from_file(str(context.node_config["node-file"]))
    raise PolicyRefusal("policy.identity", "start the SuperNode with --node-config 'node-file=\"/path/to/node.yaml\"'")


def is_simulated(context: Context) -> bool:
    """Whether this process simulates nodes: our local engine says so, and Flower's engine runs in a Ray actor.

    A SuperNode's process never holds a connected Ray, so no server can pass a real node off as a simulated one.
    """
    if context.node_config.get(SIMULATED) is True:
        return True
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def enrol(context: Context, federation: str, store_root: str) -> NodeSpec:
    """Tell a simulated node who it is: node `partition-id` of the federation (JSON of a NodesConfig).

    Raises PolicyRefusal("policy.identity") where its name is none, or would keep its state outside `store_root`.
    """
    try:
        spec = _specs(federation)[int(context.node_config["partition-id"])]
    except ConfigError as error:
        raise PolicyRefusal("policy.identity", f"cannot read this node from the federation: {error}") from error
    text = canonical.encode(to_json(spec)).decode()
    store = _store_path(store_root, spec.name)
    context.state[STATE] = ConfigRecord({"spec": text, "store": store, "federation": federation})
    return spec


def federation_of(context: Context) -> str:
    """The federation that a simulated node was told of, JSON of a NodesConfig.

    Raises PolicyRefusal("policy.identity") before it was.
    """
    told = context.state.config_records.get(STATE)
    if told is None:
        raise PolicyRefusal("policy.identity", "this simulated node has not been enrolled")
    return str(told["federation"])


def _store_path(root: str, name: str) -> str:
    """The folder of a simulated node's state; "" keeps none.  It lies under the root, symlinks followed."""
    if not root:
        return ""
    path = Path(root) / name
    if path == Path(root) or not path.resolve().is_relative_to(Path(root).resolve()):
        raise PolicyRefusal("policy.identity", f"the state of node {name!r} would be kept outside {root}")
    return str(path)


@lru_cache(maxsize=8)
def _specs(federation: str) -> list[NodeSpec]:
    return from_json(NodesConfig, json.loads(federation)).expand()


@lru_cache(maxsize=4096)
def _from_text(spec: str, store: str) -> Identity:
    return Identity(from_json(NodeSpec, json.loads(spec)), Path(store) if store else None, simulated=True)


def from_file(path: str) -> Identity:
    """A real node, as its own file describes it.  Raises PolicyRefusal("policy.identity")."""
    return _from_file(path)


def _from_file(path: str) -> Identity:
    import yaml

    try:
        spec = from_json(NodeSpec, yaml.safe_load(Path(path).read_text()))
        if spec.name:
            check_name("name", spec.name)
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise PolicyRefusal("policy.identity", f"cannot read this node from {path}: {error}") from error
    if not spec.name:
        raise PolicyRefusal("policy.identity", f"{path} names no node: it needs at least `name: ...`")
    file = Path(path).resolve()
    return Identity(spec, file.parent / f"{spec.name}.store", simulated=False, file=file)
