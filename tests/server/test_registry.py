"""Enrolment: a node is the name it answers with, and a bad answer costs nobody else anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.app import app
from conf.load import load
from conf.schema import LinkConfig, NodesConfig, NodeSpec, PolicyConfig, RunConfig
from experiments.engines.local import LocalGrid
from server import registry
from strategies.exchange import door
from trellis.errors import CohortTooSmall
from trellis.types import NodeInfo, Role

SPECS = [
    NodeSpec(name="cob", organisation="Cob", region="eu", link=LinkConfig(availability=0.5)),
    NodeSpec(name="ash", role=Role.validation),
    NodeSpec(name="bay", policy=PolicyConfig(max_examples=9)),
]
CONFIG = RunConfig(nodes=NodesConfig(items=SPECS))


def enrol(answer: Callable[[int], Any], *, num_nodes: int = 3) -> list[NodeInfo]:
    asked = ClientApp()

    @asked.query()
    def query(message: Message, context: Context) -> Message:
        told = answer(int(context.node_config["partition-id"]))
        return Message(told if isinstance(told, Error | RecordDict) else record(told), reply_to=message)

    grid = LocalGrid(asked, num_nodes)
    return registry.enrol(grid, door(grid, grid.clock), CONFIG, store="")


def record(fields: Any) -> RecordDict:
    return RecordDict({"reply": ConfigRecord({"name": fields} if isinstance(fields, str) else fields)})


def names(nodes: list[NodeInfo]) -> list[str]:
    return [n.name for n in nodes]


def test_names_decide_the_order_and_bring_what_the_federation_says_of_them() -> None:
    found = enrol(lambda i: ["cob", "ash", "bay"][i])
    assert names(found) == ["ash", "bay", "cob"]
    ash, bay, cob = found
    assert (ash.role, bay.max_examples, cob.availability) == (Role.validation, 9, 0.5)
    assert (cob.organisation, cob.region, cob.max_examples) == ("Cob", "eu", None)
    assert len({n.node_id for n in found}) == 3


def test_ids_are_drawn_anew_and_change_nothing_but_the_address() -> None:
    first, second = (enrol(lambda i: ["cob", "ash", "bay"][i]) for _ in range(2))
    assert names(first) == names(second)
    assert {n.node_id for n in first}.isdisjoint(n.node_id for n in second)


def test_a_name_claimed_twice_belongs_to_neither() -> None:
    assert names(enrol(lambda i: ["ash", "ash", "bay"][i])) == ["bay"]


@pytest.mark.parametrize(
    "answer",
    ["zebra", "", "ASH", {"name": 3}, {}, RecordDict(), Error(1, "no"), {"name": ["ash"]}, {"name": b"ash"}],
)
def test_a_node_that_the_federation_does_not_know_is_left_out(answer: Any) -> None:
    assert names(enrol(lambda i: [answer, "cob", "bay"][i])) == ["bay", "cob"]


def test_more_nodes_than_the_federation_lists_are_no_trouble() -> None:
    assert names(enrol(lambda i: ["cob", "ash", "bay", "x", "y"][i], num_nodes=5)) == ["ash", "bay", "cob"]


def test_who_was_left_out_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(registry, "log", lambda level, text, *arguments: lines.append(text % arguments))
    enrol(lambda i: ["ash", "ash", "bay"][i])
    assert any("2 nodes call themselves ash" in line for line in lines)


def test_when_nobody_is_left_the_reasons_are_named() -> None:
    with pytest.raises(CohortTooSmall, match=r"zebra.*2 nodes call themselves ash"):
        enrol(lambda i: ["ash", "ash", "zebra"][i])


# ---------------------------------------------------------------- rows


def test_counted_rows_are_what_the_node_registered() -> None:
    found = enrol(lambda i: {"name": ["cob", "ash", "bay"][i], "num-examples": 10 * i, "num-rows": 30})
    assert {n.name: n.num_examples for n in found} == {"cob": 0, "ash": 10, "bay": 9}, "bay is allowed 9"
    assert {n.name: n.max_examples for n in found} == {"cob": 0, "ash": 10, "bay": 9}
    assert {n.num_rows for n in found} == {30}


@pytest.mark.parametrize(
    ("train", "total"), [(-1, 9), (10, 9), (1.5, 9), ("many", 9), (True, 9), ([3], 9), (None, 9), (9, None), (1, 2**62)]
)
def test_a_node_whose_rows_cannot_be_is_left_out(train: Any, total: Any) -> None:
    def answer(i: int) -> dict[str, Any]:
        told = {"num-examples": train, "num-rows": total} if i == 1 else {"num-examples": 5, "num-rows": 9}
        return {"name": ["cob", "ash", "bay"][i], **{k: v for k, v in told.items() if v is not None}}

    assert names(enrol(answer)) == ["bay", "cob"]


def test_a_node_that_registers_nothing_is_asked_and_weighs_nothing() -> None:
    found = enrol(lambda i: ["cob", "ash", "bay"][i])
    assert {n.name: n.num_examples for n in found} == {"ash": None, "bay": None, "cob": None}


def test_our_own_nodes_enrol_by_name_and_count_their_training_rows() -> None:
    config = load(["nodes=pilot", "data=synthetic"])
    grid = LocalGrid(app, 3)
    found = registry.enrol(grid, door(grid, grid.clock), config, store="")
    assert names(found) == ["north", "south", "west"]
    rows = [n.max_examples for n in found]
    assert all(isinstance(r, int) and r > 0 for r in rows)
    # 569 generated rows, of which a fifth validate and a fifth test
    assert sum(r or 0 for r in rows) == pytest.approx(0.6 * 569, abs=6)
    assert sum(n.num_rows or 0 for n in found) == 569
