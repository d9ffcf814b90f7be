"""Secure aggregation at the node: what leaves is masked, what must not be asked is refused, what matters is kept."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import clients.secagg
from clients import identity as own_identity
from clients import node
from clients.app import app as our_app
from clients.identity import Identity
from clients.momentum import momentum
from clients.policy import policy_mod
from clients.secagg import secagg
from clients.store import NodeStore
from conf.schema import (
    DataSource,
    NodesConfig,
    NodeSpec,
    NodeTask,
    PolicyConfig,
    PrivacyConfig,
    RunConfig,
    SecAggConfig,
    SectorConfig,
    to_json,
)
from experiments.engines.local import LocalGrid
from sectors import training
from sectors.base import num_rows
from sectors.params import initial_arrays
from server import build, masking, registry
from strategies.exchange import door
from strategies.grouping import Plan
from tests.strategies.masked_nodes import BASE, GROUPS, Federation, Sites, Tamper, light, make_sites, stage_of
from trellis import identity, wire
from trellis.secagg import counts, epoch, messages
from trellis.secagg.messages import Confirmation
from trellis.types import POLICY_CODES, Collected, Masking, Privacy, Request, ServerState, Threat
from trellis.vectors import Layout, TensorSpec, digest

A, B = GROUPS["a"], GROUPS["b"]
VICTIM = "a0"


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with light():
        yield


@pytest.fixture
def nodes(sites: Sites, tmp_path: Path) -> Federation:
    return Federation(sites, tmp_path / "nodes")


def refused(reply: Message) -> str:
    """The code of a node's refusal."""
    assert reply.has_error()
    return next(name for name, code in POLICY_CODES.items() if code == reply.error.code)


def evidence_of(collected: Collected, name: str) -> tuple[str, str]:
    return next((r.reason, r.evidence) for r in collected.refusals if r.node == name)


# ---------------------------------------------------------------- what a server may not ask


def request_in(content: RecordDict) -> Request:
    wire.identify(1, 1)
    found = wire.read_request(Message(content, 2, "train"))
    assert found is not None
    return found


def with_request(**changes: Any) -> Tamper:
    """Another request, and whatever `masking` says in another masking."""

    def tamper(content: RecordDict) -> RecordDict:
        request = request_in(content)
        assert request.masking is not None
        told = changes.get("masking", {})
        fields = {**changes, "masking": None if told is None else dataclasses.replace(request.masking, **told)}
        arrays = content.array_records["arrays"]
        return RecordDict({**content, **wire.request_content(arrays, dataclasses.replace(request, **fields))})

    return tamper


FEWER = Layout.of(BASE).dim - 1
UNSIGNED = messages.fields_of(Confirmation((), (), ()))
QUESTIONS: dict[str, tuple[Tamper, str]] = {
    "a reply in clear": (with_request(masking=None), "sends nothing that is not masked"),
    "more coordinates than the model has": (with_request(masking={"dim": FEWER + 2}), "9 coordinates to mask, not 10"),
    "fewer coordinates": (with_request(masking={"dim": FEWER}), "9 coordinates to mask, not 8"),
    "masks of 16 bits": (with_request(masking={"dtype": "uint16"}), "masks are of 32 or 64 bits, not uint16"),
    "masks of floats": (with_request(masking={"dtype": "float32"}), "masks are of 32 or 64 bits"),
    "no steps": (with_request(masking={"scale": 0}), "are not above 0"),
    "no clipping": (with_request(masking={"clip_norm": 0.0}), "are not above 0"),
    "another epoch": (with_request(masking={"epoch": "old"}), "no such epoch here"),
    "another group": (with_request(masking={"group": "b"}), "not about the set of members"),
    "another roster": (with_request(masking={"roster": "00" * 32}), "not about the set of members"),
    "another set": (with_request(masking={"confirmed": "00" * 32}), "not about the set of members"),
    "a member less": (with_request(masking={"members": A[:3], "weights": (1, 1, 1)}), "not about the set of members"),
    "a lower quorum": (with_request(masking={"quorum": 1}), "not about the set of members"),
    "another run": (with_request(run="another"), "not about the set of members"),
    "a key that is not there": (with_request(key_index=3), "none of 3 that are unused"),
    "a key below the first": (with_request(key_index=-1), "none of 3 that are unused"),
    "no key": (with_request(key_index=None), "none of 3 that are unused"),
    "other members": (with_request(members=("a1", "a2", "a3")), "not for this node"),
    "a weight too few": (with_request(masking={"weights": (1, 1, 1)}), "every member must have a weight"),
    "all weight on one": (with_request(masking={"weights": (1, 0, 0, 0)}), "the site allows a ratio of 1"),
    "nothing signed": (
        lambda content: RecordDict({**content, "secagg": ConfigRecord({**UNSIGNED})}),
        "0 members confirmed the set, 3 are needed",
    ),
    "no confirmation": (
        lambda content: RecordDict({k: v for k, v in content.items() if k != "secagg"}), "not a message of stage mask"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "reason"), QUESTIONS.values(), ids=QUESTIONS)
def test_a_request_that_a_node_cannot_mask_safely_is_refused_and_nothing_leaves(
    tamper: Tamper, reason: str, nodes: Federation
) -> None:
    nodes.tampered[VICTIM, "request"] = tamper
    collected = nodes.collect(nodes.exchange())
    code, evidence = evidence_of(collected, VICTIM)
    assert code == "policy.secagg"
    assert reason in evidence
    assert [row.members for row in collected.rows] == [A[1:], B]
    assert not [content for name, stage, content in nodes.sent if (name, stage) == (VICTIM, "request")]
    assert [f["fact"] for f in nodes.store(VICTIM).facts()] == [], "no key was used up"


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
@pytest.mark.parametrize("stage", ["by Flower's convention", "a stage that does not exist", "empty"])
def test_whatever_else_is_asked_is_refused(kind: str, stage: str, nodes: Federation) -> None:
    if stage == "a stage that does not exist" and kind == "query":
        pytest.skip("a question of the protocol may come in any message")
    content = {
        "by Flower's convention": RecordDict(
            {"arrays": wire.to_record(BASE), "config": ConfigRecord({"server-round": 1})}
        ),
        "a stage that does not exist": RecordDict({"secagg": ConfigRecord({"stage": "tell all"})}),
        "empty": RecordDict({"secagg": ConfigRecord()}),
    }[stage]
    if kind == "query":
        nodes.grid._app.query()(nodes._evaluate)  # type: ignore[union-attr]
    reply = nodes.send(VICTIM, content, kind)
    assert refused(reply) == "policy.secagg"


def test_a_run_that_calls_itself_masked_and_asks_in_clear_is_refused_by_the_policy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    request = dataclasses.replace(run.request(), masking=None, key_index=None)
    reply = run.send("ash", wire.request_content(wire.to_record(run.state.params), request))
    assert refused(reply) == "policy.secagg"
    assert "privacy=secagg, and the message asks for a reply in clear" in reply.error.reason
    config = ConfigRecord({"node-config": node.node_config(NodeTask.of(run.config)), "server-round": 1})
    reply = run.send("ash", RecordDict({"arrays": wire.to_record(run.state.params), "config": config}))
    assert refused(reply) == "policy.secagg"


def test_a_run_that_calls_itself_clear_is_refused_where_the_policy_asks_for_masks(tmp_path: Path) -> None:
    run = Run(tmp_path, PolicyConfig(least_privacy=Privacy.secagg))
    request = run.request()
    request = dataclasses.replace(request, config={**request.config, "privacy": "none"})
    reply = run.send("ash", wire.request_content(wire.to_record(run.state.params), request))
    assert refused(reply) == "policy.privacy"


# ---------------------------------------------------------------- what leaves


def talkative(message: Message, context: Context) -> Message:
    """Anyone's app that replies more than it is asked for."""
    request = wire.read_request(message)
    base = wire.from_record(message.content.array_records["arrays"])
    moved = {k: a + np.float32(0.1) if a.dtype == np.float32 else a for k, a in base.items()}
    return Message(
        RecordDict(
            {
                "arrays": wire.to_record(moved),
                "metrics": MetricRecord({"num-examples": 3, "loss": 0.25, "train/loss": 0.75}),
                "more metrics": MetricRecord({"rows": [1, 2]}),
                "notes": ConfigRecord({"patient": "Smith", "request": request.digest if request else ""}),
                "counts": ArrayRecord({"secret": Array(np.arange(5))}),
            }
        ),
        reply_to=message,
    )


def test_a_reply_has_what_is_allowed_and_nothing_else(sites: Sites, tmp_path: Path) -> None:
    app = ClientApp(mods=[secagg()])
    app.train()(talkative)
    nodes = Federation(sites, tmp_path / "nodes", app=app)
    replies: list[RecordDict] = []

    def watched(questions: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        for reply in nodes.ask(questions, timeout_s):
            if "reply" in reply.content:
                replies.append(reply.content)
            yield reply

    collected = nodes.collect(nodes.exchange(), ask=watched)
    assert collected.refusals == ()
    assert len(replies) == 7
    for content in replies:
        assert {k: sorted(v) for k, v in content.items()} == {
            "arrays": ["counts", "update"], "reply": ["payload", "request", "signature"]
        }  # fmt: skip
        arrays = wire.from_record(content.array_records["arrays"])
        assert (arrays["update"].shape, arrays["update"].dtype) == ((9,), np.uint32)
        assert (arrays["counts"].shape, arrays["counts"].dtype) == ((2,), np.uint64)


NOT_NUMBERS = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}


@pytest.mark.parametrize("value", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_an_update_that_is_no_number_is_sent_as_masked_zeros_and_counted_by_nobodys_name(
    value: float, nodes: Federation
) -> None:
    moved = nodes.moved

    def odd(name: str, *arguments: Any) -> dict[str, Any]:
        return {**moved(name, *arguments), **({"b": np.full(3, value, np.float32)} if name == VICTIM else {})}

    nodes.moved = odd  # type: ignore[method-assign]
    collected = nodes.collect(nodes.exchange())
    assert collected.refusals == (), "a refusal would tell something of its rows"
    assert [row.members for row in collected.rows] == [A, B]
    assert (collected.groups or ())[0].metrics == {"num_failed": 1.0, "num_clipped": 0.0}
    # it counts as an update of zeros: were the mean divided by fewer, a liar could say how many
    assert collected.rows[0].weight == 4
    assert np.allclose(collected.rows[0].update_d, 0.75 * nodes.plain_mean(A[1:]), atol=1e-6)


def test_whose_app_failed_cannot_be_seen_from_what_stands_beside_the_masks(sites: Sites, tmp_path: Path) -> None:
    told = {"num-examples": 3, "train/loss": 0.5, **dict.fromkeys(getattr(wire, "TOLD", ()), 1.5)}
    nodes = Federation(sites, tmp_path / "nodes", metrics=told)
    moved = nodes.moved

    def odd(name: str, *arguments: Any) -> dict[str, Any]:
        return {**moved(name, *arguments), **({"b": np.full(3, np.nan, np.float32)} if name == VICTIM else {})}

    nodes.moved = odd  # type: ignore[method-assign]
    nodes.collect(nodes.exchange())
    replies = {name: content for name, stage, content in nodes.sent if stage == "request"}
    fields = {n: sorted(f"{record}/{key}" for record in c for key in c[record]) for n, c in replies.items()}
    assert fields[VICTIM] == fields["a1"]
    assert wire.size_bytes(replies[VICTIM]) == wire.size_bytes(replies["a1"])


ODD_REPLIES: dict[str, Callable[[dict[str, Any]], RecordDict | Error]] = {
    "no arrays": lambda arrays: RecordDict({"metrics": MetricRecord({"num-examples": 3})}),
    "two records of arrays": lambda arrays: RecordDict({"a": wire.to_record(arrays), "b": wire.to_record(arrays)}),
    "a tensor too few": lambda arrays: RecordDict({"arrays": wire.to_record({"w": arrays["w"]})}),
    "another shape": lambda arrays: RecordDict({"arrays": wire.to_record({**arrays, "w": arrays["w"].reshape(3, 2)})}),
    "an error": lambda arrays: Error(17, "row 17 of patients.csv: blood pressure 731"),
    "an exception": lambda arrays: raised(ValueError("row 17 of patients.csv: blood pressure 731")),
}


def raised(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("odd", ODD_REPLIES.values(), ids=ODD_REPLIES)
def test_an_app_that_fails_says_nothing_of_its_data(
    odd: Callable[[dict[str, Any]], RecordDict | Error], sites: Sites, tmp_path: Path
) -> None:
    def train(message: Message, context: Context) -> Message:
        return Message(odd(wire.from_record(message.content.array_records["arrays"])), reply_to=message)

    app = ClientApp(mods=[secagg()])
    app.train()(train)
    nodes = Federation(sites, tmp_path / "nodes", app=app)
    collected = nodes.collect(nodes.exchange())
    assert collected.rows == ()
    assert {r.reason for r in collected.refusals} == {"group_lost"}
    assert all("its survivors failed" in r.evidence for r in collected.refusals)
    assert not [r for r in collected.refusals if "731" in r.evidence or "patients" in r.evidence]


def told(loss: Any) -> float:
    """The training loss that leaves of one that an app reports."""
    field = counts.field_of(counts.LOSS, TensorSpec(counts.LOSS, (), "float64"), most=100.0, num_members=4)
    content = RecordDict({"metrics": MetricRecord({"train/loss": loss})})
    words = counts.encode([field], clients.secagg._values(content))
    return float(counts.decode([field], words, num_members=1)[counts.LOSS])


@pytest.mark.parametrize(("loss", "expected"), [(0.5, 0.5), (0, 0.0), (-3.0, 0.0), (1e9, 100.0), ([1.0], 100.0)])
def test_a_loss_is_told_within_its_limits(loss: Any, expected: float) -> None:
    assert told(loss) == expected


@pytest.mark.parametrize(("loss", "expected"), [(np.nan, 100.0), (np.inf, 100.0), (-np.inf, 0.0)])
def test_a_loss_that_is_no_number_is_told_as_the_most_there_is_or_the_least(loss: float, expected: float) -> None:
    assert told(loss) == expected


def test_anyones_app_with_momentum_replies_its_momentum_masked(sites: Sites, tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        request, base = wire.read_request(message), wire.from_record(message.content.array_records["arrays"])
        assert request is not None
        moved = {k: a + np.float32(request.round) if a.dtype == np.float32 else a for k, a in base.items()}
        content = {"arrays": wire.to_record(moved), "metrics": MetricRecord({"num-examples": 3})}
        return Message(RecordDict(content), reply_to=message)

    app = ClientApp(mods=[secagg(), momentum(0.5)])
    app.train()(train)
    nodes = Federation(sites, tmp_path / "nodes", app=app)
    exchange = nodes.exchange()
    first = nodes.collect(exchange, 1).updates_nd
    assert np.allclose(first, 1.0, atol=1e-5)
    nodes.base = {**BASE, "b": BASE["b"] + np.float32(1)}
    second = nodes.collect(exchange, 2).updates_nd
    assert np.allclose(second, 0.5 * 1.0 + 0.5 * 2.0, atol=1e-5)


# ---------------------------------------------------------------- what a site says


POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fewer keys": ({"max_keys": 2}, {}, "3 keys for an epoch, the site allows 2"),
    "more organisations": ({"min_group": 5}, {}, "4 organisations, the site asks for 5 behind a sum"),
    "a higher threat": ({"least_threat": "malicious_server"}, {}, "the site asks for malicious_server at least"),
    "no draws": ({"max_draws": 0}, {"drawn_size": 3}, "groups were drawn 0 times"),
    "no drawn groups": ({"max_regroupings": 0}, {"drawn_size": 3}, "the site allows 0"),
}


@pytest.mark.parametrize(("policy", "options", "reason"), POLICIES.values(), ids=POLICIES)
def test_what_a_sites_own_file_says_beats_the_run(
    policy: dict[str, Any], options: dict[str, Any], reason: str, sites: Sites, tmp_path: Path
) -> None:
    nodes = Federation(sites, tmp_path / "nodes", policy=policy)
    collected = nodes.collect(nodes.exchange(**options))
    assert collected.rows == ()
    code, evidence = evidence_of(collected, VICTIM)
    assert code == "policy.secagg"
    assert reason in evidence


def test_a_site_bounds_the_share_of_a_weight(sites: Sites, tmp_path: Path) -> None:
    rows = dict(zip(A, (10, 10, 10, 15), strict=True)) | dict.fromkeys(B, 5)
    nodes = Federation(sites, tmp_path / "nodes", policy={"max_share": 0.3, "max_weight_ratio": 9}, rows=rows)
    collected = nodes.collect(nodes.exchange(max_weight=100))
    assert "one member has 100 of 301 parts of the sum, the site allows a share of 0.3" in str(collected.refusals)


def test_a_site_that_allows_one_set_of_survivors_gives_no_other(sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", policy={"survivor_sets": "fixed"})
    exchange = nodes.exchange()
    assert len(nodes.collect(exchange, 1).rows) == 2
    nodes.base = {**BASE, "b": BASE["b"] + np.float32(1)}
    nodes.late.add(("a3", "request"))
    collected = nodes.collect(exchange, 2)
    assert [row.members for row in collected.rows] == [B]
    assert "the site allows one set" in evidence_of(collected, "a1")[1]


@pytest.mark.parametrize(
    ("policy", "threat", "reason"),
    [
        ({"least_threat": None}, Threat.malicious_server, "a site that runs whatever code the server sends"),
        ({"least_threat": None}, Threat.semi_honest, "threat=semi_honest, the site asks for malicious_server at least"),
        ({}, Threat.malicious_server, "set least_threat: semi_honest in its own policy"),
        ({}, Threat.semi_honest, None),
    ],
)
def test_a_deployed_node_takes_part_where_its_code_is_pinned_or_its_own_file_is_content_with_less(
    policy: dict[str, Any], threat: Threat, reason: str | None, sites: Sites, tmp_path: Path
) -> None:
    nodes = Federation(sites, tmp_path / "nodes", policy=policy)
    collected = nodes.collect(nodes.exchange(plan=Plan(threat)))
    if reason is None:
        assert collected.refusals == ()
        return
    assert {r.reason for r in collected.refusals} == {"policy.secagg"}
    assert all(reason in r.evidence for r in collected.refusals)


@pytest.mark.parametrize("missing", ["identity_key", "members"])
def test_a_deployed_node_without_its_key_or_its_list_takes_no_part(missing: str, sites: Sites, tmp_path: Path) -> None:
    nodes = Federation(sites, tmp_path / "nodes", policy={missing: None})
    collected = nodes.collect(nodes.exchange())
    assert all(f"policy.secagg.{missing} is not set in this node's own file" in r.evidence for r in collected.refusals)
    assert len(collected.refusals) == 7


def test_a_key_that_others_can_read_is_not_used(sites: Sites, tmp_path: Path) -> None:
    key = tmp_path / "open.pem"
    identity.generate(key)
    key.chmod(0o644)
    nodes = Federation(sites, tmp_path / "nodes", policy={"identity_key": str(key)})
    reply = nodes.send(VICTIM, RecordDict({"secagg": ConfigRecord({"stage": "hello", "nonce": b"n"})}))
    assert refused(reply) == "policy.secagg"
    assert "can be read by others" in reply.error.reason


def test_a_node_is_summed_with_its_sites_list_and_not_with_the_servers(sites: Sites, tmp_path: Path) -> None:
    shorter = yaml.safe_load((sites.folder / "members.yaml").read_text())
    shorter["members"] = [m for m in shorter["members"] if m["name"] != "a3"]
    (tmp_path / "members.yaml").write_text(yaml.safe_dump(shorter))
    nodes = Federation(sites, tmp_path / "nodes", policy={"members": str(tmp_path / "members.yaml")})
    collected = nodes.collect(nodes.exchange())
    assert "is not the whole group of 3" in evidence_of(collected, "a0")[1]
    assert "is no member that this site has pinned" in evidence_of(collected, "a3")[1]
    assert [row.members for row in collected.rows] == [B]


def test_the_policy_of_a_node_stands_before_the_mask_around_anyones_app(sites: Sites, tmp_path: Path) -> None:
    app = ClientApp(mods=[policy_mod, secagg()])
    app.train()(talkative)
    nodes = Federation(sites, tmp_path / "nodes", app=app)
    config = to_json(dataclasses.replace(TASK, options={}))
    assert nodes.collect(nodes.exchange(), config=config).refusals == ()
    lower = {**config, "privacy": "none"}
    for name in nodes.sites.names:
        file = nodes.folder / f"{name}.yaml"
        found = yaml.safe_load(file.read_text())
        found["policy"]["least_privacy"] = "secagg"
        file.write_text(yaml.safe_dump(found))
    own_identity._from_file.cache_clear()  # type: ignore[attr-defined]
    nodes.base = {**BASE, "b": BASE["b"] + np.float32(1)}
    assert {r.reason for r in nodes.collect(nodes.exchange(), config=lower).refusals} >= {"policy.privacy"}


# ---------------------------------------------------------------- what is kept


def test_what_a_node_writes_down_is_no_secret(nodes: Federation) -> None:
    exchange = nodes.exchange()
    with pytest.raises(Stopped):
        nodes.collect(exchange, ask=stopping_at(nodes, "unmask"))
    kept = epoch.loads(nodes.context(VICTIM).state[clients.secagg.STATE][clients.secagg.PINNED])  # type: ignore[index,arg-type]
    secrets = [kept.mask_secrets[32:64], kept.seeds[32:64], next(iter(kept.shares.values()))[:33]]
    assert all(any(secret) for secret in secrets)
    files = b"".join(path.read_bytes() for path in nodes.store(VICTIM).path.rglob("*") if path.is_file())
    for secret in secrets:
        assert secret not in files
        assert secret.hex().encode() not in files
    assert [f["fact"] for f in nodes.store(VICTIM).facts()] == ["masked"]


class Stopped(Exception):
    pass


def stopping_at(nodes: Any, stage: str) -> Any:
    def ask(questions: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        if questions and stage_of(questions[0]) == stage:
            raise Stopped
        return nodes.ask(questions, timeout_s)

    return ask


def test_a_key_is_used_once_even_where_a_nodes_memory_was_set_back(nodes: Federation) -> None:
    earlier: dict[str, Any] = {}

    def remember(content: RecordDict) -> RecordDict:
        earlier["state"] = copy.deepcopy(nodes.context(VICTIM).state)
        return content

    nodes.tampered[VICTIM, "request"] = remember
    nodes.collect(nodes.exchange())
    asked = nodes.questions[VICTIM, "request"]
    nodes.context(VICTIM).state = earlier["state"]  # a virtual machine that was restored
    again = nodes.send(VICTIM, with_request(round=2)(asked))
    assert refused(again) == "policy.secagg"
    assert "key index 0 has masked a vector already" in again.error.reason


def test_a_node_that_has_no_store_masks_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for context in run.grid._contexts.values():
        told = context.state.config_records[own_identity.STATE]
        context.state[own_identity.STATE] = ConfigRecord({**told, "store": ""})
    collected = run.collect()
    assert {r.reason for r in collected.refusals} == {"policy.secagg"}
    assert all("this node has no store" in r.evidence for r in collected.refusals)


def test_facts_are_read_back_in_order_and_a_torn_last_line_never_counted(tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "node")
    assert store.facts() == []
    with store.locked():
        for number in range(3):
            store.add({"fact": "masked", "index": number})
    path = tmp_path / "node" / "secagg.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, len(whole) - 12, -1):
        path.write_bytes(whole[:cut])
        assert [f["index"] for f in store.facts()] == [0, 1]
        store.add({"fact": "answered"})
        assert [f["fact"] for f in store.facts()] == ["masked", "masked", "answered"]
    path.write_bytes(b'{"fact"')
    assert store.facts() == []
    store.add({"fact": "masked"})
    assert path.read_bytes() == b'{"fact": "masked"}\n'


def test_a_fact_is_on_the_disk_before_anything_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for durable in (True, False):
        store = NodeStore(tmp_path / str(durable), durable=durable)
        with store.locked():
            store.add({"fact": "masked"})
            store.add({"fact": "masked"})
    assert len(synced) == 3  # two facts, and the folder of their file


def test_a_first_fact_survives_the_loss_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    store = NodeStore(tmp_path / "node")
    with store.locked():
        store.add({"fact": "masked"})
    assert str(tmp_path / "node") in synced


def test_facts_are_added_by_one_process_at_a_time(tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "node")

    def free() -> bool:
        with open(tmp_path / "node" / "secagg.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with store.locked():
        assert not free()
    assert free()
    with pytest.raises(Stopped), store.locked():
        raise Stopped
    assert free()


def test_a_node_looks_and_writes_under_one_lock(nodes: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = [0], []
    locked, add, facts = NodeStore.locked, NodeStore.add, NodeStore.facts

    class Held:
        def __init__(self, store: NodeStore) -> None:
            self._lock = locked(store)

        def __enter__(self) -> None:
            held[0] += 1
            self._lock.__enter__()

        def __exit__(self, *error: Any) -> None:
            held[0] -= 1
            self._lock.__exit__(*error)

    monkeypatch.setattr(NodeStore, "locked", lambda self: Held(self))
    monkeypatch.setattr(NodeStore, "add", lambda self, fact: (seen.append(held[0]), add(self, fact))[1])
    monkeypatch.setattr(NodeStore, "facts", lambda self: (seen.append(held[0]), facts(self))[1])
    assert nodes.collect(nodes.exchange()).refusals == ()
    assert seen
    assert set(seen) == {1}
    assert held == [0]


# ---------------------------------------------------------------- our app


NAMES = ("ash", "bay", "cob", "dew")


class Run:
    """A masked run of the real app, a round at a time."""

    def __init__(self, store: Path, policy: PolicyConfig | None = None, **secagg: Any) -> None:
        specs = [NodeSpec(name=n, organisation=n, policy=policy or PolicyConfig()) for n in NAMES]
        self.config = RunConfig(
            sector=SectorConfig(name="healthcare_wisconsin", options={"hidden": [4], "synthetic_rows": 160}),
            nodes=NodesConfig(items=specs),
            data=DataSource.synthetic,
            privacy=PrivacyConfig(name=Privacy.secagg, secagg=SecAggConfig(num_keys=3, **secagg)),
        )
        grouped = dataclasses.replace(self.config, nodes=masking.federation(self.config))
        self.grid = LocalGrid(our_app, len(NAMES))
        self.questions: dict[tuple[str, str], RecordDict] = {}
        self.replies: dict[tuple[str, str], RecordDict] = {}
        self.nodes = registry.enrol(self.grid, self.ask, grouped, store=str(store))
        self.names = {n.node_id: n.name for n in self.nodes}
        sector = build.build_sector(self.config)
        self.state = ServerState(run="r", round=0, params=initial_arrays(sector, 0))
        self.strategy = build.strategy(self.config, sector, clock=self.grid.clock, commit=lambda *_: None)

    def ask(self, questions: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        stages = {m.metadata.dst_node_id: stage_of(m) for m in questions if m.metadata.message_type != "query"}
        names = {n.node_id: n.name for n in getattr(self, "nodes", [])}
        self.questions |= {(names[m.metadata.dst_node_id], stages[m.metadata.dst_node_id]): m.content
                           for m in questions if m.metadata.dst_node_id in stages}  # fmt: skip
        for reply in door(self.grid, self.grid.clock)(questions, timeout_s):
            source = reply.metadata.src_node_id
            if source in stages and reply.has_content():
                self.replies[names[source], stages[source]] = reply.content
            yield reply

    def request(self, round: int = 1, **options: Any) -> Request:
        return dataclasses.replace(self.strategy.request(self.state, self.nodes, **options), round=round)

    def collect(self, round: int = 1, ask: Any = None, **options: Any) -> Collected:
        request = self.request(round, **options)
        return self.strategy.exchange.collect(request, self.nodes, ask or self.ask, base=self.state.params)

    def send(self, name: str, content: RecordDict, kind: str = "train") -> Message:
        (node_id,) = (n.node_id for n in self.nodes if n.name == name)
        (reply,) = door(self.grid, self.grid.clock)([Message(content, node_id, kind)], 60)
        return reply


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that nodes trained with."""
    seeds: list[int] = []
    train = training.train

    def watched(*arguments: Any, seed: int, **options: Any) -> training.Trained:
        seeds.append(seed)
        return train(*arguments, seed=seed, **options)

    monkeypatch.setattr(training, "train", watched)
    return seeds


def test_the_same_request_gets_the_same_masked_bytes_and_no_second_training(
    tmp_path: Path, trainings: list[int]
) -> None:
    run = Run(tmp_path)
    assert run.collect().refusals == ()
    again = run.send("ash", run.questions["ash", "request"])
    assert wire.pack(again.content) == wire.pack(run.replies["ash", "request"])
    assert len(trainings) == 4
    assert [f["fact"] for f in NodeStore(tmp_path / "ash").facts()] == ["masked", "answered"]


def test_the_same_base_under_another_key_is_trained_on_once(tmp_path: Path, trainings: list[int]) -> None:
    run = Run(tmp_path)
    with pytest.raises(Stopped):
        run.collect(1, ask=stopping_at(run, "unmask"))
    first = run.replies["ash", "request"]
    collected = run.collect(2)
    assert collected.refusals == ()
    second = run.replies["ash", "request"]
    updates = [wire.from_record(c.array_records["arrays"])["update"] for c in (first, second)]
    assert (updates[0] != updates[1]).mean() > 0.9, "masked with other keys"
    assert len(trainings) == 4
    assert [f.get("index") for f in NodeStore(tmp_path / "ash").facts()] == [0, 1, None]


def test_another_base_another_config_and_another_purpose_are_worked_out_anew(
    tmp_path: Path, trainings: list[int]
) -> None:
    run = Run(tmp_path)
    requests = [run.request(), run.request(2), run.request(purpose="evaluate"), run.request(splits=("test",))]
    requests.append(dataclasses.replace(requests[0], config={**requests[0].config, "seed": 1}))
    requests.append(dataclasses.replace(requests[0], base="0" * 64))
    requests.append(dataclasses.replace(requests[0], run="another"))
    about = [clients.secagg.about(r) for r in requests]
    assert about[0] == about[1], "the round is not what it is about"
    assert len(set(about)) == len(about) - 1


def test_the_update_that_is_remembered_is_masked_and_not_what_was_masked(tmp_path: Path) -> None:
    run = Run(tmp_path)
    row = run.collect().rows[0]
    layout = Layout.of(run.state.params)
    kept = []
    for name in NAMES:
        found = NodeStore(tmp_path / name).reply(clients.secagg.about(run.request()), slot="update")
        assert found is not None
        kept.append(layout.flatten(wire.from_record(found.array_records["arrays"])))
    assert np.abs(np.mean(kept, axis=0) - row.update_d).max() < 1e-6


def test_the_same_update_is_rounded_in_the_same_way_under_every_key(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(Stopped):
        run.collect(1, ask=stopping_at(run, "unmask"))
    later = run.collect(2).updates_nd
    assert np.array_equal(later, Run(tmp_path / "other").collect(1).updates_nd)


# ---------------------------------------------------------------- rows that are scored


TASK = NodeTask.of(
    RunConfig(
        sector=SectorConfig(name="healthcare_wisconsin", options={"synthetic_rows": 400}),
        data=DataSource.synthetic,
        privacy=PrivacyConfig(name=Privacy.secagg),
        nodes=NodesConfig(items=[NodeSpec(name="ash")]),
    )
)
ASH = Identity(NodeSpec(name="ash", part=0), None, simulated=True)


def rows_scored(split: str = "validation", round: int = 1, name: str = "ash", **task: Any) -> set[bytes]:
    me = dataclasses.replace(ASH, spec=dataclasses.replace(ASH.spec, name=name))
    found = node.scored(dataclasses.replace(TASK, **task), node.data_of(ASH, TASK), split, me, round)
    return {row.tobytes() for row in found["x"]}


def test_validation_counts_are_of_a_fresh_half_of_the_rows() -> None:
    everyone = {row.tobytes() for row in node.data_of(ASH, TASK).validation["x"]}
    halves = [rows_scored() for _ in range(8)]
    assert len({frozenset(half) for half in halves}) == 8
    assert all(half < everyone for half in halves)
    sizes = [len(half) for half in halves]
    # eight binomials: six standard deviations are one chance in 10^9
    deviation = 6 * np.sqrt(8 * len(everyone)) / 2
    assert abs(sum(sizes) - 4 * len(everyone)) < deviation


def test_test_rows_and_a_run_in_clear_are_scored_whole() -> None:
    data = node.data_of(ASH, TASK)
    assert len(rows_scored("test")) == num_rows(data.test)
    assert len(rows_scored(privacy=Privacy.none)) == num_rows(data.validation)


def test_halves_of_a_study_follow_from_seed_round_and_name() -> None:
    seeded = {"insecure_rng": True}
    assert rows_scored(**seeded) == rows_scored(**seeded)
    others = [rows_scored(round=2, **seeded), rows_scored(name="bay", **seeded), rows_scored(seed=1, **seeded)]
    assert all(other != rows_scored(**seeded) for other in others)


def test_a_masked_sum_counts_fewer_rows_than_there_are_and_another_half_of_every_base(tmp_path: Path) -> None:
    run = Run(tmp_path)
    task = NodeTask.of(run.config)
    sites = [dataclasses.replace(ASH, spec=NodeSpec(name=n, part=i)) for i, n in enumerate(NAMES)]
    everyone = sum(num_rows(node.data_of(site, task).validation) for site in sites)
    found = []
    for round_ in range(1, 7):
        (group,) = run.collect(round_).groups or ()
        rows = int(group.counts["validation"]["rows"])
        assert 0 < rows < everyone
        found.append((rows, float(group.counts["validation"]["loss_sum"])))
        params = {k: np.nextafter(a, np.float32(9)) for k, a in run.state.params.items()}
        run.state = dataclasses.replace(run.state, params=params)
    assert len(set(found)) > 1


def test_masking_travels_in_the_request_and_back() -> None:
    masking_ = Masking(
        epoch="e", group="g", roster="r", confirmed="c", members=("a", "b"), quorum=2, clip_norm=1.5, scale=7,
        dtype="uint32", dim=3, counts=(), weights=(1, 2),
    )  # fmt: skip
    request = Request("run", 1, "train", digest(BASE), {}, ("a", "b"), key_index=4, masking=masking_)
    assert request_in(wire.request_content(wire.to_record(BASE), request)) == request
