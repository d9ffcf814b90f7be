"""Which nodes there are, and who each of them is.

Flower's node ids are drawn anew at every registration; a node is its name.  One `query` message asks every connected
node for it (and, where rows are weighed, for the number of its training rows: registered once, not believed per
round).
"""

from __future__ import annotations

import time
from dataclasses import replace
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from conf.schema import NodeSpec, NodeTask, RunConfig, to_json
from strategies.exchange import Ask
from trellis import canonical, wire
from trellis.errors import CohortTooSmall
from trellis.types import NodeInfo

CONNECT_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 600.0
"""A node that says nothing for so long is left out; counting rows may mean reading them first."""
MAX_ROWS = 100_000_000
"""A node that registers more is not believed."""


def enrol(grid: Grid, ask: Ask, config: RunConfig, *, schema: str = "", store: str) -> list[NodeInfo]:
    """Every connected node that the federation knows, sorted by name.

    Each registers the number of its rows, once a run, capped by its `max_examples` in the federation: every count it
    declares later is held against it, and it is its weight where rows are weighed (a node that registers none weighs
    nothing).  `schema` is the digest of the columns the sector declares: a node whose sector declares others is left
    out.  A name that two nodes claim belongs to neither; left out are names the federation does not list and
    numbers of rows that cannot be.  Raises CohortTooSmall when no node is left.
    """
    specs = {spec.name: spec for spec in config.nodes.expand()}
    content = _question(config, schema, store)
    ids = _connected(grid, len(specs))
    messages = [Message(content=content, message_type=MessageType.QUERY, dst_node_id=node_id) for node_id in ids]
    claims: dict[str, list[NodeInfo]] = {}
    problems: list[str] = []
    for reply in ask(messages, min(config.round_timeout_s, ANSWER_TIMEOUT_S)):
        if reply.has_error():
            problems.append(str(reply.error.reason)[:500])
            continue
        answer = reply.content.config_records.get(wire.REPLY, ConfigRecord())
        spec = specs.get(str(answer.get("name")))
        if spec is None:
            problems.append(
                f"a node calls itself {str(answer.get('name'))[:60]!r}, which nodes={config.nodes.name} lacks"
            )
            continue
        info = _info(spec, reply.metadata.src_node_id)
        train, total = answer.get(wire.NUM_EXAMPLES), answer.get(wire.NUM_ROWS)
        if type(train) is int and type(total) is int and 0 <= train <= total <= MAX_ROWS:
            most = train if info.max_examples is None else min(train, info.max_examples)
            info = replace(info, max_examples=most, num_examples=most, num_rows=total)
        elif train is not None or total is not None:
            problems.append(f"{spec.name} registers {str(train)[:30]} of {str(total)[:30]} rows: not believed")
            continue
        claims.setdefault(spec.name, []).append(info)
    problems += [f"{len(infos)} nodes call themselves {name}" for name, infos in claims.items() if len(infos) > 1]
    nodes = [infos[0] for _, infos in sorted(claims.items()) if len(infos) == 1]
    if not nodes:
        raise CohortTooSmall(f"no node of nodes={config.nodes.name} enrolled: {'; '.join(problems) or 'none answered'}")
    for problem in problems:
        log(WARNING, "enrolment: %s", problem)
    return nodes


def _connected(grid: Grid, expected: int) -> list[int]:
    """Ids of the connected nodes; waits a while for the expected number."""
    end = time.monotonic() + CONNECT_TIMEOUT_S
    while len(ids := sorted(grid.get_node_ids())) < expected and time.monotonic() < end:
        time.sleep(0.2)
    return ids


def _question(config: RunConfig, schema: str, store: str) -> RecordDict:
    asked: dict[str, str | bool] = {
        "federation": canonical.encode(to_json(config.nodes)).decode(),
        "store": store,
        wire.SCHEMA: schema,
        wire.NODE_CONFIG: canonical.encode(to_json(NodeTask.of(config))).decode(),
    }
    return RecordDict({wire.CONFIG: ConfigRecord({**asked})})


def _info(spec: NodeSpec, node_id: int) -> NodeInfo:
    return NodeInfo(
        name=spec.name,
        node_id=node_id,
        organisation=spec.organisation,
        region=spec.region,
        role=spec.role,
        availability=spec.link.availability,
        max_examples=spec.policy.max_examples,
        group=spec.group,
        public_key=bytes.fromhex(spec.public_key),
    )
