"""Typed values of a run: JSON round trips, digests, and the nodes a federation expands to."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from conf.load import choices, load
from conf.schema import (
    HeldOutConfig,
    NodesConfig,
    NodeSpec,
    NodeTask,
    PolicyConfig,
    RunConfig,
    TrainingConfig,
    config_digest,
    from_json,
    to_json,
)
from trellis.errors import ConfigError
from trellis.types import Privacy, Role

DEFAULT = config_digest(load())


@pytest.mark.parametrize("nodes", choices("nodes"))
def test_from_json_undoes_to_json(nodes: str) -> None:
    config = load([f"nodes={nodes}", "sector=banks", "sector.training.max_examples=7", "engine=ray"])
    text = json.dumps(to_json(config))
    assert from_json(RunConfig, json.loads(text)) == config
    task = NodeTask.of(config)
    assert from_json(NodeTask, json.loads(json.dumps(to_json(task)))) == task
    for spec in config.nodes.expand()[:3]:
        assert from_json(NodeSpec, json.loads(json.dumps(to_json(spec)))) == spec


def test_json_has_no_enums_and_whole_numbers_become_floats() -> None:
    assert to_json(PolicyConfig())["least_privacy"] == "none"
    assert type(to_json(PolicyConfig())["least_privacy"]) is str
    assert type(from_json(TrainingConfig, {"lr": 1}).lr) is float


@pytest.mark.parametrize(
    "value",
    [
        {"name": "a", "polcy": {}},
        {"policy": {"least_privacy": "homoeopathic"}},
        {"policy": {"sectors": "banks*"}},
        {"policy": {"max_examples": "100"}},
        {"policy": {"max_examples": 1.5}},
        {"policy": {"max_examples": True}},
        {"policy": []},
        {"link": {"latency_ms": "fast"}},
        {"link": {"availability": 0}},
        {"name": 3},
        {"role": "teacher"},
        ["name"],
        "name",
        None,
    ],
)
def test_a_node_that_is_not_described_rightly_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        from_json(NodeSpec, value)


def test_a_task_with_a_missing_field_is_refused() -> None:
    task = to_json(NodeTask.of(load()))
    for field in ("sector", "seed", "privacy", "training"):
        with pytest.raises(ConfigError, match="NodeTask"):
            from_json(NodeTask, {k: v for k, v in task.items() if k != field})


@pytest.mark.parametrize(
    "elsewhere",
    ["engine=ray", "engine.workers=2", "tracking=none", "tracking.every=3", "rounds=99", "runs_dir=x", "run_name=y",
     "baselines=true"],
)  # fmt: skip
def test_where_and_how_long_a_run_is_does_not_change_its_digest(elsewhere: str) -> None:
    assert config_digest(load([elsewhere])) == DEFAULT


@pytest.mark.parametrize(
    "other",
    ["seed=1", "sector.training.lr=0.2", "nodes=consortium", "sector=banks", "data=synthetic", "server_optimizer=adam",
     "num_byzantine=1", "checks.max_update_norm=5", "min_replies=2", "sector.options.split_seed=1"],
)  # fmt: skip
def test_what_a_run_computes_changes_its_digest(other: str) -> None:
    assert config_digest(load([other])) != DEFAULT


def test_the_pilot_has_three_nodes_and_the_consortium_ten() -> None:
    pilot = load(["nodes=pilot"]).nodes.expand()
    assert [s.name for s in pilot] == ["north", "south", "west"]
    consortium = load(["nodes=consortium"]).nodes.expand()
    assert len(consortium) == 10
    for specs in (pilot, consortium):
        assert sorted(s.part or 0 for s in specs) == list(range(len(specs)))
        assert all(s.organisation and s.region and s.role is Role.train for s in specs)


def test_a_thousand_devices_come_from_one_template_and_a_fifth_is_held_out() -> None:
    specs = load(["nodes=cross_device"]).nodes.expand()
    assert len(specs) == len({s.name for s in specs}) == 1000
    assert specs[7].name == "device-0007"
    roles = Counter(s.role for s in specs)
    assert roles[Role.validation] == pytest.approx(100, abs=1)
    assert roles[Role.test] == pytest.approx(100, abs=1)
    # evenly over the indices: every run of 50 devices holds some of each role
    for start in range(0, 1000, 50):
        assert len({s.role for s in specs[start : start + 50]}) == 3


def test_nodes_are_sorted_by_name_and_keep_their_place_as_part() -> None:
    specs = NodesConfig(items=[NodeSpec(name="b"), NodeSpec(name="a"), NodeSpec(name="c", part=9)]).expand()
    assert [(s.name, s.part) for s in specs] == [("a", 1), ("b", 0), ("c", 9)]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (NodesConfig(items=[NodeSpec(name="a"), NodeSpec(name="a"), NodeSpec(name="b")]), r"repeated: \['a'\]"),
        (NodesConfig(count=3, template=NodeSpec(name="device")), r"repeated: \['device'\]"),
        (NodesConfig(items=[NodeSpec(name="a"), NodeSpec()]), "its own name"),
        (NodesConfig(count=-1), "nodes.count is -1"),
        (NodesConfig(), "either `items` or a `count`"),
        (NodesConfig(items=[NodeSpec(name="a")], count=2), "either `items` or a `count`"),
    ],
)
def test_a_federation_of_unnamed_or_equally_named_nodes_is_refused(nodes: NodesConfig, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        nodes.expand()


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", ".hidden", "-x", "a/b", "a b", "a\n", "a\x1b[31m", "ä", "[/x]", "a" * 65]
)
def test_a_name_that_is_no_folders_name_is_refused(name: str) -> None:
    needed = r"it must be 1 to 64 letters, digits"
    for nodes in (NodesConfig(items=[NodeSpec(name=name)]), NodesConfig(count=1, template=NodeSpec(name=name))):
        with pytest.raises(ConfigError, match=needed) as found:
            nodes.expand()
        assert repr(name) in str(found.value)
    with pytest.raises(ConfigError, match=needed):
        RunConfig(run_name=name)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "device-0007", "A.b_c-1"])
def test_a_name_that_is_a_folders_name_is_taken(name: str) -> None:
    assert NodesConfig(items=[NodeSpec(name=name)]).expand()[0].name == name
    assert RunConfig(run_name=name).run_name == name


def test_the_name_that_counts_is_the_one_with_its_index() -> None:
    template = NodeSpec(name="d" * 60 + "{index:05d}")
    with pytest.raises(ConfigError, match=f"'{'d' * 60}00000'"):
        NodesConfig(count=1, template=template).expand()


@pytest.mark.parametrize(
    ("text", "seventh"),
    [("n{index}", "n7"), ("n{index:04d}-{index}", "n0007-7"), ("n{index:09d}", "n000000007"),
     ("n{index:3d}", "n  7"), ("n", "n")],
)  # fmt: skip
def test_a_template_writes_the_index_where_it_says_so(text: str, seventh: str) -> None:
    specs = NodesConfig(count=8, template=NodeSpec(name="n{index}", organisation=text)).expand()
    assert specs[7].organisation == seventh


@pytest.mark.parametrize(
    "text",
    ["{index:999999999d}", "{index:d}", "{index:010d}", "{index.__class__}", "{index!r}", "{index:x}", "{index:>9}",
     "{0}", "{}", "{name}", "{{index}}", "{", "}", "{index", "{index:{index}d}"],
)  # fmt: skip
def test_nothing_else_in_braces_means_anything(text: str) -> None:
    for field in ("name", "organisation", "region"):
        template = NodeSpec(**{"name": "n{index}", field: f"n{text}"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"nodes.template.{field} is .*only {{index}}"):
            NodesConfig(count=2, template=template).expand()


def test_a_task_says_whether_whole_nodes_are_held_out() -> None:
    held = NodesConfig(count=10, template=NodeSpec(name="n{index}"), held_out=HeldOutConfig(test=0.2))
    assert NodeTask.of(RunConfig(nodes=held)).holds_out
    assert NodeTask.of(RunConfig(nodes=held)).num_parts == 10
    assert not NodeTask.of(load()).holds_out


@pytest.mark.parametrize(
    ("mode", "least", "enough"),
    [
        ("none", "none", True),
        ("none", "dp", False),
        ("dp", "none", True),
        ("secagg", "dp", False),
        ("dp", "secagg", False),
        ("dp_secagg", "dp", True),
        ("dp_secagg", "secagg", True),
        ("dp_secagg", "distributed_dp", True),
        ("distributed_dp", "central_dp", True),
        ("distributed_dp", "dp", False),
    ],
)
def test_a_privacy_mode_is_enough_when_it_gives_every_guarantee_asked_for(mode: str, least: str, enough: bool) -> None:
    assert Privacy(mode).at_least(Privacy(least)) is enough
