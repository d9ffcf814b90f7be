"""The ClientApp as the server meets it: consent, identity, replay, local layers, and how light it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import sectors
from clients import identity, node
from clients.app import app
from clients.policy import policy_mod
from clients.store import NodeStore
from conf.schema import DataSource, NodesConfig, NodeSpec, NodeTask, PolicyConfig, RunConfig, SectorConfig, to_json
from experiments.engines.local import LocalGrid
from sectors import training
from sectors.healthcare_wisconsin import HealthcareWisconsin
from sectors.params import initial_arrays
from server import build, registry
from strategies.exchange import door
from trellis import canonical, wire
from trellis.errors import PolicyRefusal
from trellis.types import POLICY_CODES, NodeInfo, Privacy, Request, RoundRecord, ServerState
from trellis.vectors import digest

ROOT = Path(__file__).parents[2]
NAMES = ("ash", "bay", "cob")


@dataclass(frozen=True)
class WithLocalHead(HealthcareWisconsin):
    """The last layer stays at the node."""

    def is_local(self, name: str) -> bool:
        return name.startswith("head.")


@pytest.fixture(autouse=True)
def local_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sectors.SECTORS, "with_local_head", f"{__name__}:WithLocalHead")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[WithLocalHead.__module__])


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


def run_config(sector: str = "healthcare_wisconsin", **policies: PolicyConfig) -> RunConfig:
    nodes = [NodeSpec(name=name, policy=policies.get(name, PolicyConfig())) for name in NAMES]
    return RunConfig(
        sector=SectorConfig(name=sector, options={"hidden": [4], "synthetic_rows": 120}),
        nodes=NodesConfig(items=nodes),
        data=DataSource.synthetic,
    )


@dataclass
class Run:
    """A run of the real app, a round at a time."""

    config: RunConfig
    store: Path
    told: str | None = None
    """The node config that is sent, where it is not that of the run."""
    grid: LocalGrid = field(init=False)
    nodes: list[NodeInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = LocalGrid(app, len(NAMES))
        self.ask = door(self.grid, self.grid.clock)
        self.nodes = registry.enrol(self.grid, self.ask, self.config, store=str(self.store))
        self.sector = build.build_sector(self.config)
        arrays = initial_arrays(self.sector, self.config.seed)
        shared = {k: v for k, v in arrays.items() if not self.sector.is_local(k)}
        self.start = ServerState(run="r", round=0, params=shared)
        self.strategy = build.strategy(
            self.config, self.sector, clock=self.grid.clock, commit=lambda state, record: None
        )

    def round(self, state: ServerState | None = None, **task: Any) -> tuple[ServerState, RoundRecord]:
        strategy = replace(self.strategy, node_config={**self.strategy.node_config, **task})
        return strategy.round(state or self.start, self.nodes, self.ask)

    def send(self, request: Request, params: Any, name: str = "ash") -> Message:
        (info,) = (n for n in self.nodes if n.name == name)
        content = wire.request_content(wire.to_record(params), request)
        (reply,) = self.ask([Message(content, info.node_id, request.purpose)], 60)
        return reply

    def request(self, state: ServerState) -> Request:
        return self.strategy.request(state, self.nodes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(run_config(), tmp_path)


# ---------------------------------------------------------------- consent


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (PolicyConfig(sectors=["banks"]), "policy.sector"),
        (PolicyConfig(sectors=[]), "policy.sector"),
        (PolicyConfig(least_privacy=Privacy.dp), "policy.privacy"),
        (PolicyConfig(max_examples=5), "policy.max_examples"),
        (PolicyConfig(max_examples=0), "policy.max_examples"),
    ],
)
def test_a_nodes_policy_beats_the_runs_config_and_the_record_says_so(
    policy: PolicyConfig, code: str, tmp_path: Path, trainings: list[int]
) -> None:
    _, record = Run(run_config(bay=policy), tmp_path).round()
    assert record.answered == ("ash", "cob")
    assert [(r.node, r.reason) for r in record.refusals] == [("bay", code)]
    assert record.refusals[0].evidence.startswith(f"{code}: bay ")
    assert record.closed is None
    assert len(trainings) == 2, "the node that refused did not train"
    assert not (tmp_path / "bay").exists()


def test_a_policy_that_allows_the_run_does_not_stand_in_its_way(tmp_path: Path) -> None:
    policy = PolicyConfig(sectors=["banks", "healthcare_wisconsin"], max_examples=1000)
    _, record = Run(run_config(bay=policy), tmp_path).round()
    assert record.refusals == ()


def test_fewer_rows_a_round_are_enough_for_a_policy_of_few_rows(tmp_path: Path) -> None:
    config = run_config(bay=PolicyConfig(max_examples=5))
    config.sector.training.max_examples = 5
    _, record = Run(config, tmp_path).round()
    assert record.refusals == ()
    assert record.num_examples == dict.fromkeys(NAMES, 5)


def refused(reply: Message) -> str:
    assert reply.has_error()
    return next(name for name, code in POLICY_CODES.items() if code == reply.error.code)


def test_a_node_that_nobody_enrolled_refuses(tmp_path: Path, trainings: list[int]) -> None:
    run = Run(run_config(), tmp_path)
    run.grid._contexts[run.nodes[0].node_id].state = RecordDict()
    assert refused(run.send(run.request(run.start), run.start.params)) == "policy.identity"
    assert trainings == []


@pytest.mark.parametrize(
    "text",
    ['{"protocol": 2}', "{}", "no json", "null"],
)
def test_a_node_refuses_another_protocol(run: Run, text: str, trainings: list[int]) -> None:
    config = ConfigRecord({"server-round": 1, "request": text})
    content = RecordDict({"arrays": wire.to_record(run.start.params), "config": config})
    (reply,) = run.ask([Message(content, run.nodes[0].node_id, "train")], 60)
    assert refused(reply) == "policy.protocol"
    assert trainings == []


@pytest.mark.parametrize(
    "task",
    [{"surprise": 1}, {"privacy": "homoeopathic"}, {"sector": None}, {"training": {"lr": "high"}}, {"num_parts": "3"}],
)
def test_a_node_refuses_a_task_it_cannot_read(run: Run, task: dict[str, Any], trainings: list[int]) -> None:
    _, record = run.round(**task)
    assert [r.reason for r in record.refusals] == ["policy.protocol"] * 3
    assert trainings == []


def test_a_message_without_request_or_node_config_is_refused(run: Run) -> None:
    for content in (RecordDict(), RecordDict({"config": ConfigRecord({"node-config": "{"})})):
        (reply,) = run.ask([Message(content, run.nodes[0].node_id, "train")], 60)
        assert refused(reply) == "policy.protocol"


# ---------------------------------------------------------------- consent around anyone's app


@pytest.mark.parametrize(("declared", "allowed"), [(5, True), (6, False), (6.0, False), (5.0, True)])
def test_the_policy_mod_guards_a_foreign_app(declared: float, allowed: bool, tmp_path: Path) -> None:
    foreign = ClientApp(mods=[policy_mod])

    @foreign.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": declared})}), reply_to=message)

    config = run_config(ash=PolicyConfig(max_examples=5, sectors=["healthcare_wisconsin"]))
    grid = LocalGrid(foreign, 1)
    (node_id,) = grid.get_node_ids()
    context = grid._contexts[node_id]
    identity.enrol(context, canonical.encode(to_json(config.nodes)).decode(), "")
    task = ConfigRecord({"node-config": node.node_config(NodeTask.of(config))})
    (reply,) = grid.send_and_receive([Message(RecordDict({"config": task}), node_id, "train")])
    assert reply.has_content() is allowed
    if not allowed:
        assert refused(reply) == "policy.max_examples"
    config.sector.name = "banks"
    task = ConfigRecord({"node-config": node.node_config(NodeTask.of(config))})
    (reply,) = grid.send_and_receive([Message(RecordDict({"config": task}), node_id, "train")])
    assert refused(reply) == "policy.sector"


# ---------------------------------------------------------------- identity of a simulated node


def enrolled(names: list[str], store: str) -> Context:
    context = Context(1, 2, {"partition-id": 0, identity.SIMULATED: True}, RecordDict(), {})
    federation = to_json(NodesConfig(items=[NodeSpec(name=name) for name in names]))
    identity.enrol(context, canonical.encode(federation).decode(), store)
    return context


def test_a_simulated_node_keeps_its_state_in_a_folder_of_its_own(tmp_path: Path) -> None:
    assert identity.of(enrolled(["ash"], str(tmp_path))).store == tmp_path / "ash"
    assert identity.of(enrolled(["ash"], "")).store is None


@pytest.mark.parametrize("name", ["../x", "..", ".", "/etc", "a/b"])
def test_a_name_that_leads_out_of_the_store_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal, match=r"policy\.identity: .*it must be 1 to 64 letters"):
        enrolled([name], str(tmp_path / "nodes"))


def test_a_store_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "ash").symlink_to(tmp_path)
    with pytest.raises(PolicyRefusal, match=r"policy\.identity: the state of node 'ash' would be kept outside"):
        enrolled(["ash"], str(tmp_path / "nodes"))


# ---------------------------------------------------------------- identity of a deployed node


def deployed(node_file: Path | None) -> Context:
    config: dict[str, Any] = {} if node_file is None else {"node-file": str(node_file)}
    return Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})


def ask_who(context: Context, config: RunConfig) -> RecordDict:
    wire.identify(1, 1)
    asked = {"federation": canonical.encode(to_json(config.nodes)).decode(), "store": "/nowhere"}
    task = {"node-config": node.node_config(NodeTask.of(config))}
    message = Message(RecordDict({"config": ConfigRecord({**asked, **task})}), 2, MessageType.QUERY)
    message.metadata.__dict__["_message_id"] = "m"
    return app(message, context).content


def test_a_deployed_node_is_who_its_own_file_says_whatever_the_server_sends(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("name: elder\npart: 1\npolicy:\n  sectors: [banks]\n  max_examples: 10\n")
    context = deployed(file)
    context.node_config["partition-id"] = 0
    assert ask_who(context, run_config()).config_records["reply"]["name"] == "elder"
    assert not list(context.state), "nothing of what the server sent was kept"
    me = identity.of(context)
    assert (me.spec.name, me.spec.policy.sectors, me.simulated) == ("elder", ["banks"], False)
    assert me.store == tmp_path / "elder.store"


def test_a_deployed_node_counts_only_rows_it_consents_to(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("name: ash\npart: 0\n")
    config = run_config()
    rows = ask_who(deployed(file), config).config_records["reply"]["num-examples"]
    assert isinstance(rows, int)
    assert rows > 0
    file2 = tmp_path / "other.yaml"
    file2.write_text("name: ash\npart: 0\npolicy: {sectors: [banks]}\n")
    assert dict(ask_who(deployed(file2), config).config_records["reply"]) == {"name": "ash"}


@pytest.mark.parametrize(
    "text", [None, "", "part: 1\n", "- a list\n", "name: [\n", "name: a\npolicy: {sectors: banks}\n", "nom: a\n",
             "name: ../a\n", "name: a/b\n", "name: .\n"],
)  # fmt: skip
def test_a_deployed_node_without_a_good_file_refuses_everything(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PolicyRefusal) as found:
        identity.of(deployed(file))
    assert found.value.code == "policy.identity"
    with pytest.raises(PolicyRefusal, match="node-file"):
        identity.of(deployed(None))


def test_a_node_config_cannot_make_a_simulated_node_by_a_word(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("name: elder\n")
    for almost in ("true", 1, "yes", False):
        context = deployed(file)
        context.node_config["simulated"] = almost
        assert not identity.of(context).simulated


# ---------------------------------------------------------------- replay


def test_the_same_request_gets_the_same_bytes_and_no_second_training(run: Run, trainings: list[int]) -> None:
    request = run.request(run.start)
    first = run.send(request, run.start.params)
    again = run.send(request, run.start.params)
    assert wire.pack(first.content) == wire.pack(again.content)
    assert again.metadata.reply_to_message_id != first.metadata.reply_to_message_id
    assert len(trainings) == 1
    run.send(replace(request, round=2), run.start.params)
    assert len(trainings) == 2


def test_another_round_and_another_node_train_differently(run: Run, trainings: list[int]) -> None:
    request = run.request(run.start)
    arrays = [
        digest(wire.from_record(reply.content.array_records["arrays"]))
        for reply in (
            run.send(request, run.start.params),
            run.send(replace(request, round=2), run.start.params),
            run.send(request, run.start.params, "bay"),
        )
    ]
    assert len(set(arrays)) == len(set(trainings)) == 3


def test_a_refusal_is_not_kept_and_a_node_without_a_store_trains_again(tmp_path: Path, trainings: list[int]) -> None:
    run = Run(run_config(ash=PolicyConfig(sectors=[])), tmp_path)
    refused(run.send(run.request(run.start), run.start.params))
    assert not (tmp_path / "ash").exists()
    free = Run(run_config(), tmp_path / "none")
    for context in free.grid._contexts.values():
        context.state["trellis.node"]["store"] = ""
    request = free.request(free.start)
    replies = [free.send(request, free.start.params) for _ in range(2)]
    assert len(trainings) == 2
    assert wire.pack(replies[0].content) == wire.pack(replies[1].content)


def test_an_evaluation_trains_nothing(run: Run, trainings: list[int]) -> None:
    request = replace(run.request(run.start), purpose="evaluate", splits=("validation", "test"))
    reply = run.send(request, run.start.params)
    assert trainings == []
    assert wire.ARRAYS not in reply.content
    counts = wire.from_record(reply.content.array_records["counts"])
    assert counts["validation/rows"] > 0
    assert counts["test/rows"] > 0


# ---------------------------------------------------------------- local layers


@pytest.fixture
def local_run(tmp_path: Path) -> Run:
    return Run(run_config("with_local_head"), tmp_path)


def test_local_tensors_never_leave_their_node(local_run: Run) -> None:
    assert {k for k in local_run.start.params if k.startswith("head.")} == set()
    reply = local_run.send(local_run.request(local_run.start), local_run.start.params)
    assert set(reply.content.array_records["arrays"]) == set(local_run.start.params)
    head = NodeStore(local_run.store / "ash").local("another base", run="r")
    assert head is not None
    assert {k.partition(".")[0] for k in head} == {"head"}


def test_local_tensors_live_on_from_round_to_round_and_differ_between_nodes(local_run: Run) -> None:
    state, heads = local_run.start, []
    for _ in range(2):
        state, record = local_run.round(state)
        assert record.refusals == ()
        heads.append([NodeStore(local_run.store / n).local("another base", run="r") for n in NAMES])
    digests = [digest(head) for round_ in heads for head in round_ if head is not None]
    assert len(set(digests)) == 6


def test_training_starts_from_the_nodes_own_head(local_run: Run) -> None:
    state, _ = local_run.round()
    kept = NodeStore(local_run.store / "ash").local("another base", run="r")
    assert kept is not None
    loss = local_run.send(replace(local_run.request(state), purpose="evaluate"), state.params)
    own = {**state.params, **kept}
    task = NodeTask.of(local_run.config)
    data = node.data_of(identity.Identity(NodeSpec(name="ash", part=0), None, True), task)
    model = {k: own[k] for k in initial_arrays(local_run.sector, 0)}
    expected = training.evaluate(local_run.sector, model, data.validation)
    found = wire.from_record(loss.content.array_records["counts"])["validation/loss_sum"]
    assert found == expected["loss_sum"]


def test_another_run_does_not_start_from_the_head_of_this_one(local_run: Run) -> None:
    state, _ = local_run.round()
    mine = local_run.send(replace(local_run.request(state), purpose="evaluate"), state.params)
    other = local_run.send(replace(local_run.request(state), purpose="evaluate", run="s"), state.params)
    losses = [wire.from_record(r.content.array_records["counts"])["validation/loss_sum"] for r in (mine, other)]
    assert losses[0] != losses[1]


def test_a_repeated_round_starts_from_the_same_local_state(local_run: Run, trainings: list[int]) -> None:
    first, _ = local_run.round()
    request = local_run.request(first)
    once = local_run.send(request, first.params)
    # another request in between, so that the kept reply is not what answers
    other = replace(request, config={**request.config, "seed": 1})
    local_run.send(other, first.params)
    again = local_run.send(request, first.params)
    assert len(trainings) == 6
    assert wire.pack(again.content) == wire.pack(once.content)


def test_a_discarded_rounds_local_state_is_forgotten_when_its_base_comes_again(local_run: Run) -> None:
    after, _ = local_run.round()
    closing = replace(local_run.strategy, min_replies=9)
    closed, record = closing.round(after, local_run.nodes, local_run.ask)
    assert record.closed
    store = NodeStore(local_run.store / "ash")
    kept = store.local(digest(closed.params), run="r")
    fresh = store.local("another base", run="r")
    assert kept is not None
    assert fresh is not None
    assert digest(kept) != digest(fresh)


# ---------------------------------------------------------------- light

IMPORTS = """
import sys
import clients.app
heavy = {"torch", "mlflow", "opacus", "pandas", "sklearn", "hydra", "ray", "sectors.base", "server", "experiments"}
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_the_app_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_refusal_needs_nothing_heavy_either(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text("name: elder\npolicy: {sectors: [banks]}\n")
    run = Run(run_config(), tmp_path / "run")
    request = run.request(run.start).encode().decode()
    script = f"""
import sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from trellis import wire
from clients.app import app
wire.identify(1, 1)
config = ConfigRecord({{"server-round": 1, "request": {json.dumps(request)}}})
message = Message(RecordDict({{"config": config}}), 2, "train")
message.metadata.__dict__["_message_id"] = "m"
context = Context(1, 2, {{"node-file": {str(tmp_path / "node.yaml")!r}}}, RecordDict(), {{}})
reply = app(message, context)
print(reply.error.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(POLICY_CODES["policy.sector"]), "False"]


def test_a_reply_holds_what_flower_needs_where_no_request_was_made(run: Run) -> None:
    task = ConfigRecord({"node-config": node.node_config(NodeTask.of(run.config)), "server-round": 1})
    content = RecordDict({"arrays": wire.to_record(run.start.params), "config": task})
    (reply,) = run.ask([Message(content, run.nodes[0].node_id, "train")], 60)
    arrays: ArrayRecord = reply.content.array_records["arrays"]
    assert list(arrays) == list(run.start.params)
    moved = np.concatenate([a.reshape(-1) for a in wire.from_record(arrays).values()])
    start = np.concatenate([a.reshape(-1) for a in run.start.params.values()])
    assert 0 < np.abs(moved - start).max() < 1, "params, not a delta"
    assert dict(reply.content.metric_records["metrics"]).keys() == {"num-examples", "train/loss"}
