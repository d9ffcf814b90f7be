"""What a site allows to be spent on its data: charged before training, refused with the numbers, never forgotten."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients import budget as budgets
from clients import identity, node
from clients.app import app
from clients.budget import Budget, Spending
from clients.identity import Identity
from clients.policy import consent
from clients.store import NodeStore
from conf.schema import (
    DataSource,
    DpPolicy,
    DpTask,
    NodesConfig,
    NodeSpec,
    NodeTask,
    PolicyConfig,
    PrivacyConfig,
    Require,
    RunConfig,
    SectorConfig,
    TrainingConfig,
    to_json,
)
from experiments.engines.local import LocalGrid
from sectors import private
from sectors.base import num_rows
from sectors.params import initial_arrays
from server import build, registry
from strategies.exchange import door
from trellis import canonical, wire
from trellis.errors import ConfigError, PolicyRefusal
from trellis.privacy import accountant
from trellis.privacy.accountant import Entry
from trellis.privacy.ledger import Charge, Ledger
from trellis.types import POLICY_CODES, Privacy, Request, ServerState
from trellis.vectors import digest

NAMES = ("ash", "bay", "cob")
DELTA = 1e-5
ROOMY = {"privacy_unit": "ash-rows", "max_epsilon": 100.0}


# ---------------------------------------------------------------- a budget, without a node around it


def own(folder: Path, *, simulated: bool = True, **dp: Any) -> Identity:
    """A node whose site says this of its budget."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = NodeSpec(name="ash", policy=PolicyConfig(dp=DpPolicy(**dp)))
    return Identity(spec, folder / "ash", simulated, None if simulated else folder / "node.yaml")


def budget(folder: Path, *, simulated: bool = True, **dp: Any) -> Budget:
    return Budget.of(own(folder, simulated=simulated, **dp))


def plan(*, rounds: int = 3, noise: float | None = None, target: float | None = None, **dp: Any) -> DpTask:
    """What a run says of its differential privacy; a noise of 1 where it says nothing."""
    noise = 1.0 if noise is None and target is None else noise
    config = RunConfig(
        privacy=PrivacyConfig(name=Privacy.dp, noise_multiplier=noise, target_epsilon=target), rounds=rounds
    )
    return replace(DpTask.of(config), **dp)


def asked(run: str = "r", round: int = 1) -> Request:
    return Request(run=run, round=round, purpose="train", base="b", config={}, members=("ash",), splits=())


def spend(
    of: Budget,
    about: str = "a",
    *,
    run: str = "r",
    round: int = 1,
    task: DpTask | None = None,
    sample_rate: float = 0.25,
    steps: int = 4,
    data: str = "d",
    settle: bool = True,
) -> Spending:
    spending = of.charge(task or plan(), asked(run, round), about, sample_rate=sample_rate, steps=steps, data=data)
    if settle:
        of.settle(spending)
    return spending


def spent(*steps: tuple[float, float, int]) -> float:
    return accountant.epsilon([Entry(*each) for each in steps], DELTA)


def test_a_charge_stands_in_the_ledger_before_anything_is_settled(tmp_path: Path) -> None:
    found = budget(tmp_path)
    spending = spend(found, settle=False)
    (charge,) = Ledger(tmp_path / "ash" / "ledger" / "ash.jsonl").charges()
    assert (charge.run, charge.round, charge.about, charge.kind) == ("r", 1, "a", "dp_sgd")
    assert (charge.noise_multiplier, charge.sample_rate, charge.steps, charge.data_digest) == (1.0, 0.25, 4, "d")
    assert spending == Spending(1.0, charge)
    assert found.ledger.settled() == {}
    assert found.epsilon() == spent((1.0, 0.25, 4)), "in full, though nothing was taken yet"
    found.settle(spending)
    assert found.ledger.settled() == {charge.id: 4}
    assert found.epsilon() == spent((1.0, 0.25, 4))


def test_a_refusal_names_what_is_spent_of_what_and_what_it_would_make_and_what_is_left(tmp_path: Path) -> None:
    one, two = spent((1.0, 0.25, 4)), spent((1.0, 0.25, 8))
    most = (one + two) / 2
    found = budget(tmp_path, privacy_unit="rows", max_epsilon=most)
    spend(found, "a")
    with pytest.raises(PolicyRefusal) as refusal:
        spend(found, "b", round=2)
    assert refusal.value.code == "policy.budget"
    for text in ("ash", f"epsilon {one:.4g} of {most:g}", "rows", f"make it {two:.4g}", f"{most - one:.4g} is left"):
        assert text in refusal.value.reason
    assert len(found.ledger.charges()) == 1, "what is refused is not charged"


def test_a_charge_that_just_fits_is_allowed(tmp_path: Path) -> None:
    found = budget(tmp_path, max_epsilon=spent((1.0, 0.25, 8)))
    spend(found, "a")
    spend(found, "b", round=2)
    with pytest.raises(PolicyRefusal, match="0 is left"):
        spend(found, "c", round=3)


def test_epsilon_is_told_at_the_sites_own_delta(tmp_path: Path) -> None:
    found = budget(tmp_path, delta=1e-3)
    spend(found)
    assert found.epsilon() == accountant.epsilon([Entry(1.0, 0.25, 4)], 1e-3) < spent((1.0, 0.25, 4))


# ---------------------------------------------------------------- who has a budget


def test_a_deployed_node_that_names_no_data_refuses(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash has not named the data.*policy\.dp\.privacy_unit"):
        budget(tmp_path, simulated=False, max_epsilon=1.0)


def test_a_deployed_node_that_sets_no_limit_refuses(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash has set no budget: set policy\.dp\.max_epsilon"):
        budget(tmp_path, simulated=False, privacy_unit="rows")
    assert not (tmp_path / "ash").exists(), "a refusal leaves no ledger behind"


def test_a_simulated_node_needs_neither(tmp_path: Path) -> None:
    found = budget(tmp_path)
    spend(found, task=plan(noise=0.1), steps=1000)
    assert found.epsilon() > 1000
    assert found.ledger.unit == "ash"


def test_a_node_without_any_folder_refuses() -> None:
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash has no folder"):
        Budget.of(Identity(NodeSpec(name="ash"), None, True))


def test_a_ledgers_folder_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash: .*disk, the folder of its ledger, is not there"):
        budget(tmp_path, simulated=False, ledger="disk", **ROOMY)
    assert not (tmp_path / "disk").exists()
    (tmp_path / "disk").mkdir()
    spend(budget(tmp_path, simulated=False, ledger="disk", **ROOMY))
    assert (tmp_path / "disk" / "ash-rows.jsonl").exists()


def test_a_deployed_ledger_is_forced_to_disk_and_lies_in_the_nodes_store_where_no_folder_is_named(
    tmp_path: Path,
) -> None:
    found = budget(tmp_path, simulated=False, **ROOMY)
    assert found.ledger.durable
    assert found.ledger.path == tmp_path / "ash" / "ledger" / "ash-rows.jsonl"
    assert not budget(tmp_path / "other").ledger.durable


def test_a_ledger_of_other_data_is_refused(tmp_path: Path) -> None:
    spend(budget(tmp_path, simulated=False, **ROOMY))
    folder = tmp_path / "ash" / "ledger"
    for end in (".jsonl", ".jsonl.mark"):
        (folder / f"ash-rows{end}").rename(folder / f"others{end}")
    with pytest.raises(PolicyRefusal, match="is the ledger of 'ash-rows', not of 'others'"):
        spend(budget(tmp_path, simulated=False, privacy_unit="others", max_epsilon=100.0))


# ---------------------------------------------------------------- a ledger that cannot be read


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit is flipped": _flip,
    "the last line is gone": _cut,
    "it is empty": lambda path: path.write_bytes(b""),
    "it is gone": Path.unlink,
    "its mark is gone": lambda path: path.with_name(f"{path.name}.mark").unlink(),
    "its mark is damaged": lambda path: path.with_name(f"{path.name}.mark").write_bytes(b"{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_refuses_says_how_to_restore_and_never_starts_at_zero(damage: str, tmp_path: Path) -> None:
    found = budget(tmp_path, **ROOMY)
    spend(found, "a")
    DAMAGE[damage](found.ledger.path)
    files = {path.name: path.read_bytes() for path in found.ledger.path.parent.iterdir()}
    for about in ("a", "b"):
        with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash: .*restore it .*never start at zero"):
            spend(budget(tmp_path, **ROOMY), about)
    assert {path.name: path.read_bytes() for path in found.ledger.path.parent.iterdir()} == files


# ---------------------------------------------------------------- how much noise


def test_noise_below_what_the_site_asks_for_is_refused_with_both(tmp_path: Path) -> None:
    found = budget(tmp_path, min_noise_multiplier=0.8)
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash asks for .*=0\.8 at least, the run has 0\.7"):
        spend(found, task=plan(noise=0.7))
    assert found.ledger.charges() == []
    assert spend(found, task=plan(noise=0.8)).noise_multiplier == 0.8


def test_noise_that_is_solved_for_is_raised_to_what_the_site_asks_for(tmp_path: Path) -> None:
    least = spend(budget(tmp_path / "any"), task=plan(target=8.0)).noise_multiplier
    assert spend(budget(tmp_path, min_noise_multiplier=least + 1), task=plan(target=8.0)).noise_multiplier == least + 1


def test_the_whole_plan_reaches_its_target_and_does_not_exceed_it(tmp_path: Path) -> None:
    found, task = budget(tmp_path), plan(target=3.0, rounds=5)
    by_round = []
    for r in range(1, 6):
        spend(found, f"round {r}", round=r, task=task)
        by_round.append(found.epsilon())
    assert by_round == sorted(by_round)
    assert 2.97 < by_round[-1] <= 3.0
    assert by_round[0] < 2.5


def test_noise_is_solved_once_for_a_run_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    solve = accountant.noise_multiplier_for

    def counted(*arguments: Any, **options: Any) -> float:
        solved.append(options["steps"])
        return solve(*arguments, **options)

    monkeypatch.setattr(accountant, "noise_multiplier_for", counted)
    found, task = budget(tmp_path), plan(target=3.0, rounds=2)
    noise = {spend(found, f"round {r}", round=r, task=task).noise_multiplier for r in (1, 2)}
    assert (len(noise), solved) == (1, [8])
    # a run that is lengthened, on a node that was started again, and whose rows have become more
    longer = plan(target=3.0, rounds=4)
    noise |= {spend(budget(tmp_path), "round 3", round=3, task=longer, steps=5, sample_rate=0.2).noise_multiplier}
    assert (len(noise), solved) == (1, [8])
    noise |= {spend(found, "another run", run="s", task=longer).noise_multiplier}
    assert (len(noise), solved) == (2, [8, 16])


def test_a_target_that_no_noise_reaches_is_refused(tmp_path: Path) -> None:
    found = budget(tmp_path)
    with pytest.raises(PolicyRefusal, match=r"policy\.budget: ash: .*plan fewer"):
        spend(found, task=plan(target=1e-6, rounds=10**6), steps=10**4)
    assert found.ledger.charges() == []


@pytest.mark.parametrize(
    "task",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": None, "target_epsilon": float("nan")},
        {"noise_multiplier": None, "target_epsilon": -1.0},
        {"noise_multiplier": None, "target_epsilon": 1.0, "rounds": -1},
        {"noise_multiplier": None, "target_epsilon": 1.0, "rounds": 0},
        {"noise_multiplier": None},
    ],
)
def test_a_plan_that_makes_no_sense_spends_nothing(task: dict[str, Any], tmp_path: Path) -> None:
    found = budget(tmp_path, simulated=False, **ROOMY)
    with pytest.raises((PolicyRefusal, ConfigError, AssertionError)):
        spend(found, task=replace(plan(), **task))
    assert found.ledger.charges() == []


# ---------------------------------------------------------------- composition


def test_another_run_on_the_same_data_counts(tmp_path: Path) -> None:
    most = spent((1.0, 0.25, 4), (2.0, 0.5, 3))
    found = budget(tmp_path, max_epsilon=most)
    spend(found, "a", run="r")
    spend(found, "b", run="s", task=plan(noise=2.0), sample_rate=0.5, steps=3)
    assert found.epsilon() == pytest.approx(most)
    with pytest.raises(PolicyRefusal, match="0 is left"):
        spend(found, "c", run="t", task=plan(noise=50.0), steps=100)


def test_another_units_budget_is_its_own(tmp_path: Path) -> None:
    spend(budget(tmp_path, privacy_unit="rows"))
    other = budget(tmp_path, privacy_unit="images")
    assert other.epsilon() == 0.0


def test_data_that_changed_keep_what_was_spent(tmp_path: Path) -> None:
    found = budget(tmp_path)
    spend(found, "a", data="monday")
    spend(found, "b", round=2, data="tuesday")
    assert [c.data_digest for c in found.ledger.charges()] == ["monday", "tuesday"]
    assert found.epsilon() == spent((1.0, 0.25, 8))


# ---------------------------------------------------------------- crashes, between any two writes


def test_a_charge_that_was_not_settled_pays_for_the_same_request_again(tmp_path: Path) -> None:
    first = spend(budget(tmp_path), settle=False)
    again = budget(tmp_path)
    assert spend(again, settle=False) == first
    assert len(again.ledger.charges()) == 1
    spend(again, "another", round=2)
    assert len(again.ledger.charges()) == 2


def test_a_charge_that_was_settled_pays_for_nothing_more(tmp_path: Path) -> None:
    found = budget(tmp_path)
    spend(found)
    spend(found)
    spend(found)
    assert found.epsilon() == spent((1.0, 0.25, 12))
    assert len({c.id for c in found.ledger.charges()}) == 3


def test_a_charge_of_fewer_steps_or_a_lower_rate_does_not_pay_for_more(tmp_path: Path) -> None:
    """The node crashed; before it is asked again its site has other rows, so q and the steps are others."""
    found = budget(tmp_path)
    spend(found, sample_rate=0.1, steps=1, settle=False)
    spend(found, sample_rate=0.5, steps=9, data="other")
    assert found.epsilon() >= spent((1.0, 0.5, 9))


# ---------------------------------------------------------------- at once


def test_threads_at_once_cannot_spend_the_same_twice(tmp_path: Path) -> None:
    most = spent((1.0, 0.25, 8))
    together, allowed = threading.Barrier(6), []

    def ask(index: int) -> None:
        mine = budget(tmp_path, max_epsilon=most)
        together.wait()
        try:
            spend(mine, f"request {index}", run=f"run {index}")
        except PolicyRefusal:
            return
        allowed.append(index)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(allowed) == 2
    assert budget(tmp_path).epsilon() == most


def test_processes_at_once_cannot_spend_the_same_twice(tmp_path: Path) -> None:
    most = spent((1.0, 0.25, 8))
    children = []
    for index in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                spend(budget(tmp_path, max_epsilon=most), f"request {index}", run=f"run {index}")
                os._exit(0)
            except PolicyRefusal:
                os._exit(3)
            except BaseException:
                os._exit(1)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0, 0, 3, 3]
    assert budget(tmp_path).epsilon() == most


# ---------------------------------------------------------------- a node, and what it is sent


def run_config(**task: Any) -> RunConfig:
    return RunConfig(
        sector=SectorConfig(options={"hidden": [4], "synthetic_rows": 120}, training=TrainingConfig(batch_size=8)),
        nodes=NodesConfig(items=[NodeSpec(name=name) for name in NAMES]),
        data=DataSource.synthetic,
        rounds=3,
        privacy=PrivacyConfig(name=Privacy.dp, noise_multiplier=1.0),
        **task,
    )


@dataclass
class Site:
    """A site's node as any server meets it; what it is sent is made by hand."""

    folder: Path
    simulated: bool = True
    config: RunConfig = field(default_factory=run_config)
    dp: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.params = initial_arrays(build.build_sector(self.config), 0)
        wire.identify(1, 1)
        given: dict[str, Any] = {"partition-id": 0, "simulated": True}
        if not self.simulated:
            file = self.folder / "node.yaml"
            file.write_text(yaml.safe_dump({"name": "ash", "part": 0, "policy": {**self.policy, "dp": self.dp}}))
            given = {"node-file": str(file)}
        self.context = Context(1, 2, given, RecordDict(), {})
        if self.simulated:
            policy = PolicyConfig(dp=DpPolicy(**self.dp), **self.policy)
            nodes = NodesConfig(items=[NodeSpec(name=name, policy=policy) for name in NAMES])
            identity.enrol(self.context, canonical.encode(to_json(nodes)).decode(), str(self.folder))
            assert not Path(self.folder / "ash").exists()

    def request(self, round: int = 1, *, run: str = "r", params: Any = None, **task: Any) -> Request:
        config = {**to_json(NodeTask.of(self.config)), **task}
        base = digest(self.params if params is None else params)
        return Request(run=run, round=round, purpose="train", base=base, config=config, members=("ash",), splits=())

    def send(self, request: Request, params: Any = None, *, kind: str = "train") -> Message:
        content = wire.request_content(wire.to_record(self.params if params is None else params), request)
        return self.deliver(content, kind)

    def deliver(self, content: RecordDict, kind: str = "train") -> Message:
        message = Message(content, 2, kind)
        message.metadata.__dict__["_message_id"] = "m"
        return app(message, self.context)

    @property
    def budget(self) -> Budget:
        return Budget.of(identity.of(self.context))

    @property
    def charges(self) -> list[Charge]:
        return self.budget.ledger.charges()

    @property
    def rows(self) -> Any:
        return node.data_of(identity.of(self.context), NodeTask.of(self.config)).train


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The noise of every training."""
    return watched(monkeypatch)


def watched(monkeypatch: pytest.MonkeyPatch, crash: Callable[[int], bool] = lambda number: False) -> list[float]:
    found: list[float] = []
    train = private.train

    def watch(*arguments: Any, **options: Any) -> private.PrivateTrained:
        found.append(arguments[4].noise_multiplier)
        if crash(len(found)):
            raise RuntimeError("the lights went out")
        return train(*arguments, **options)

    monkeypatch.setattr(private, "train", watch)
    return found


def refused(reply: Message) -> str:
    assert reply.has_error()
    return next(name for name, code in POLICY_CODES.items() if code == reply.error.code)


def told(reply: Message) -> dict[str, Any]:
    return dict(reply.content.metric_records[wire.METRICS])


def update(reply: Message) -> Any:
    return wire.from_record(reply.content.array_records[wire.ARRAYS])


@pytest.mark.parametrize("simulated", [True, False])
def test_a_private_reply_tells_of_the_budget_and_nothing_of_rows(simulated: bool, tmp_path: Path) -> None:
    site = Site(tmp_path, simulated, dp=ROOMY)
    reply = site.send(site.request())
    (charge,) = site.charges
    expected = private.plan(num_rows(site.rows), 8, 1)
    assert (charge.sample_rate, charge.steps, charge.noise_multiplier) == (expected.sample_rate, expected.steps, 1.0)
    assert charge.data_digest == digest(site.rows)
    assert site.budget.ledger.settled() == {charge.id: charge.steps}
    epsilon = spent((1.0, expected.sample_rate, expected.steps))
    found = told(reply)
    assert (found.pop(wire.EPSILON), found.pop(wire.NOISE)) == (epsilon, 1.0)
    assert set(found) == {wire.NUM_EXAMPLES}
    assert not reply.content.array_records[wire.COUNTS], "no counts of rows"


def test_a_private_reply_declares_the_rows_that_were_trained_on(site: Site) -> None:
    assert told(site.send(site.request()))[wire.NUM_EXAMPLES] == num_rows(site.rows) > 0


def test_training_that_raises_was_charged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    watched(monkeypatch, crash=lambda number: bool(seen.append(site.charges) or True))
    with pytest.raises(Exception, match="lights"):
        site.send(site.request())
    assert [len(charges) for charges in seen] == [1], "before the first step"
    assert site.budget.epsilon() > 0
    assert site.budget.ledger.settled() == {}


def test_a_crash_while_training_is_trained_again_under_the_same_charge(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = watched(monkeypatch, crash=lambda number: number == 1)
    with pytest.raises(Exception, match="lights"):
        site.send(site.request())
    assert site.send(site.request()).has_content()
    (charge,) = site.charges
    assert site.budget.ledger.settled() == {charge.id: charge.steps}
    assert trainings == [1.0, 1.0]


def test_a_crash_before_the_reply_was_kept_is_charged_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, trainings: list[float]
) -> None:
    keep = NodeStore.keep_reply
    with monkeypatch.context() as crashing:
        crashing.setattr(NodeStore, "keep_reply", lambda *_, **__: (_ for _ in ()).throw(OSError("no disk")))
        with pytest.raises(Exception, match="no disk"):
            site.send(site.request())
    assert NodeStore.keep_reply is keep
    reply = site.send(site.request())
    assert len(site.charges) == len(trainings) == 2
    assert told(reply)[wire.EPSILON] == site.budget.epsilon()


def test_the_same_request_gets_the_same_bytes_without_another_charge(site: Site, trainings: list[float]) -> None:
    replies = [wire.pack(site.send(site.request()).content) for _ in range(3)]
    assert len(set(replies)) == 1
    assert len(site.charges) == len(trainings) == 1


def test_an_earlier_request_that_comes_again_is_trained_and_charged_again(site: Site, trainings: list[float]) -> None:
    first = site.send(site.request(1))
    site.send(site.request(2))
    again = site.send(site.request(1))
    assert len(site.charges) == len(trainings) == 3
    assert digest(update(first)) != digest(update(again)), "noise is drawn anew"


def test_a_round_beyond_the_budget_is_refused_before_anything_is_trained(
    tmp_path: Path, trainings: list[float]
) -> None:
    first = Site(tmp_path / "free")
    one = told(first.send(first.request()))[wire.EPSILON]
    site = Site(tmp_path / "node", dp={"max_epsilon": one * 1.01})
    site.send(site.request(1))
    trainings.clear()
    reply = site.send(site.request(2))
    assert refused(reply) == "policy.budget"
    assert re.search(
        r"epsilon [\d.]+ of [\d.]+ is spent on ash .* would make it [\d.]+, [\d.e-]+ is left", reply.error.reason
    )
    assert (trainings, len(site.charges)) == ([], 1)


def test_the_run_goes_on_with_the_others(tmp_path: Path) -> None:
    config = run_config()
    config.nodes.items[1].policy.dp.max_epsilon = 0.01
    grid = LocalGrid(app, len(NAMES))
    ask = door(grid, grid.clock)
    nodes = registry.enrol(grid, ask, config, store=str(tmp_path))
    sector = build.build_sector(config)
    strategy = build.strategy(config, sector, clock=grid.clock, commit=lambda state, record: None)
    start = ServerState(run="r", round=0, params=initial_arrays(sector, 0))
    after, record = strategy.round(start, nodes, ask)
    assert record.answered == ("ash", "cob")
    assert [(r.node, r.reason) for r in record.refusals] == [("bay", "policy.budget")]
    assert "would make it" in record.refusals[0].evidence
    assert record.closed is None
    assert set(record.epsilon) == set(record.noise_multipliers) == {"ash", "cob"}
    assert digest(after.params) != digest(start.params)


@pytest.mark.parametrize("missing", ["privacy_unit", "max_epsilon"])
def test_a_deployed_node_without_a_budget_answers_why(missing: str, tmp_path: Path, trainings: list[float]) -> None:
    site = Site(tmp_path, simulated=False, dp={k: v for k, v in ROOMY.items() if k != missing})
    reply = site.send(site.request())
    assert refused(reply) == "policy.budget"
    assert f"policy.dp.{missing}" in reply.error.reason
    assert trainings == []


def test_a_damaged_ledger_trains_nothing(site: Site, trainings: list[float]) -> None:
    site.send(site.request(1))
    _flip(site.budget.ledger.path)
    trainings.clear()
    reply = site.send(site.request(2))
    assert refused(reply) == "policy.budget"
    assert "never start at zero" in reply.error.reason
    assert trainings == []


def test_every_round_of_a_run_has_the_noise_of_its_first(site: Site, trainings: list[float]) -> None:
    target = {**to_json(plan(target=4.0, rounds=2)), "grad_sample": "auto"}
    replies = [site.send(site.request(r, dp=target)) for r in (1, 2)]
    replies += [site.send(site.request(3, dp={**target, "rounds": 3}))]
    assert len(set(trainings)) == 1
    assert [told(reply)[wire.NOISE] for reply in replies] == trainings
    epsilons = [told(reply)[wire.EPSILON] for reply in replies]
    assert epsilons == sorted(epsilons)
    assert 3.9 < epsilons[1] <= 4.0 < epsilons[2], "who lengthens a run pays for it"


@pytest.mark.parametrize("simulated", [True, False])
def test_a_site_may_hide_what_was_spent(simulated: bool, tmp_path: Path) -> None:
    site = Site(tmp_path, simulated, dp={**ROOMY, "hide_epsilon": True})
    assert set(told(site.send(site.request()))) == {wire.NUM_EXAMPLES}
    assert site.budget.epsilon() > 0
    assert budgets.told(identity.of(site.context), site.request()) == {}


def test_a_refusal_of_a_site_that_hides_what_was_spent_has_no_numbers_either(tmp_path: Path) -> None:
    site = Site(tmp_path, dp={"hide_epsilon": True, "max_epsilon": 0.125})
    reply = site.send(site.request())
    assert refused(reply) == "policy.budget"
    assert "0.125" not in reply.error.reason
    assert "would make it" not in reply.error.reason


def test_the_noise_that_is_told_is_that_of_the_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run r crashed in its round; run s trained since; then r is asked again."""
    watched(monkeypatch, crash=lambda number: number == 1)
    with pytest.raises(Exception, match="lights"):
        site.send(site.request())
    site.send(site.request(run="s", dp={**to_json(plan(noise=5.0))}))
    assert told(site.send(site.request()))[wire.NOISE] == 1.0


def test_one_request_that_is_trained_twice_at_once_is_charged_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one node, as Flower starts one a message: both draw noise, and both send."""
    together, train = threading.Barrier(2), private.train

    def at_once(*arguments: Any, **options: Any) -> private.PrivateTrained:
        with suppress(threading.BrokenBarrierError):  # a node that trains one after the other waits in vain
            together.wait(2)
        return train(*arguments, **options)

    monkeypatch.setattr(private, "train", at_once)
    site = Site(tmp_path)
    request, replies = site.request(), list[Message]()
    threads = [threading.Thread(target=lambda: replies.append(site.send(request))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    different = {digest(update(reply)) for reply in replies if reply.has_content()}
    assert sum(c.steps for c in site.charges) >= site.charges[0].steps * len(different)


# ---------------------------------------------------------------- what is not answered under differential privacy


def test_a_training_that_also_asks_for_scores_is_refused(site: Site, trainings: list[float]) -> None:
    reply = site.send(replace(site.request(), splits=("validation",)))
    assert refused(reply) == "policy.privacy"
    assert (trainings, site.charges) == ([], [])


@pytest.mark.parametrize("splits", [(), ("validation",), ("validation", "test"), ("test_tuned",)])
def test_an_evaluation_is_refused(splits: tuple[str, ...], site: Site) -> None:
    reply = site.send(replace(site.request(), purpose="evaluate", splits=splits), kind="evaluate")
    assert refused(reply) == "policy.privacy"


def test_statistics_are_refused(site: Site) -> None:
    request = replace(site.request(params={}), purpose="statistics", splits=("train",))
    assert refused(site.send(request, {}, kind="evaluate")) == "policy.privacy"


def test_a_message_that_nothing_could_be_charged_for_is_refused(site: Site, trainings: list[float]) -> None:
    task = {wire.NODE_CONFIG: node.node_config(NodeTask.of(site.config))}
    content = RecordDict({wire.ARRAYS: wire.to_record(site.params), wire.CONFIG: ConfigRecord({**task})})
    assert refused(site.deliver(content)) == "policy.privacy"
    assert trainings == []


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_run_that_calls_itself_private_and_says_not_how_is_refused(kind: str, tmp_path: Path) -> None:
    """Else `require: dp` is met by a word: privacy=dp, and no settings to train by."""
    site = Site(tmp_path, simulated=False, dp=ROOMY, policy={"require": "dp"})
    purpose: Any = kind
    reply = site.send(replace(site.request(dp=None), purpose=purpose, splits=("validation",)), kind=kind)
    assert refused(reply) in ("policy.privacy", "policy.protocol")


# ---------------------------------------------------------------- what a site asks of every run


@pytest.mark.parametrize(
    ("require", "allowed"),
    [
        (None, {"none", "central_dp", "secagg", "dp", "distributed_dp", "dp_secagg"}),
        (Require.dp, {"dp", "dp_secagg"}),
        (Require.secagg, {"secagg", "distributed_dp", "dp_secagg"}),
        (Require.both, {"dp_secagg"}),
    ],
)
def test_a_site_may_ask_for_noise_or_masks_or_both(require: Require | None, allowed: set[str]) -> None:
    spec, task = NodeSpec(name="ash", policy=PolicyConfig(require=require)), NodeTask.of(run_config())
    for privacy in Privacy:
        run = replace(task, privacy=privacy, dp=task.dp if privacy.trains_privately else None)
        if privacy in allowed:
            consent(spec, run)
        else:
            with pytest.raises(PolicyRefusal, match=r"policy\.privacy: ash asks for"):
                consent(spec, run)


def test_a_word_does_not_lower_the_least_privacy_that_a_site_asks_for() -> None:
    policy = PolicyConfig(require=Require.dp, least_privacy=Privacy.secagg)
    with pytest.raises(PolicyRefusal, match=r"policy\.privacy: ash asks for privacy=secagg"):
        consent(NodeSpec(name="ash", policy=policy), replace(NodeTask.of(run_config()), privacy=Privacy.dp))


def test_no_more_rows_are_trained_on_than_the_site_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, used = private.drawn, set[int]()

    def seen(*arguments: Any) -> Any:
        found = drawn(*arguments)
        used.update(found.tolist())
        return found

    monkeypatch.setattr(private, "drawn", seen)
    config = run_config()
    config.sector.training.max_examples = 5
    config.sector.training.batch_size = 20
    site = Site(tmp_path, config=config, policy={"max_examples": 5})
    reply = site.send(site.request())
    assert reply.has_error() or len(used) <= 5


# ---------------------------------------------------------------- what follows training


def test_momentum_is_of_noised_updates_and_costs_nothing_more(tmp_path: Path) -> None:
    beta = 0.75
    plain, moving = Site(tmp_path / "plain"), Site(tmp_path / "moving")
    later = {name: (a + np.float32(0.01)).astype(a.dtype) for name, a in plain.params.items()}
    replies = {}
    for name, site, momentum in (("plain", plain, 0.0), ("moving", moving, beta)):
        task = {"insecure_rng": True, "worker_momentum": momentum}
        replies[name] = [site.send(site.request(1, **task)), site.send(site.request(2, params=later, **task), later)]
    (u1, u2), (m1, m2) = ([update(reply) for reply in replies[name]] for name in ("plain", "moving"))
    for key in u1:
        assert np.array_equal(m1[key], u1[key])
        assert m2[key] == pytest.approx(beta * m1[key] + (1 - beta) * u2[key], abs=1e-6)
    assert told(replies["moving"][1]) == told(replies["plain"][1])
    assert moving.budget.epsilon() == plain.budget.epsilon()


def test_a_seed_that_a_deployed_node_is_told_is_refused(tmp_path: Path, trainings: list[float]) -> None:
    site = Site(tmp_path, simulated=False, dp=ROOMY)
    assert refused(site.send(site.request(insecure_rng=True))) == "policy.privacy"
    assert trainings == []


def test_noise_is_drawn_by_the_os_whatever_the_runs_seed(tmp_path: Path) -> None:
    sites = [Site(tmp_path / name) for name in ("one", "two")]
    assert len({digest(update(site.send(site.request()))) for site in sites}) == 2
    assert len({digest(update(site.send(site.request(2, insecure_rng=True)))) for site in sites}) == 1
