"""What secure aggregation costs: against Flower's SecAgg+ functions, mod and workflow in the same run.

    python -m experiments.benchmarks.secagg [--quick] [--large] [--json]

A node's step is quantising, key agreement, masks and the signature, through `Member.mask` after the offline phase of a
real group; Flower's is what its mod does with what was trained.  Shares: ours are combined from as many as are needed,
Flower's from all, as its workflow does.  A round is everything between a request and the sums, all parties in one
process of its own: groups of ten under threat=malicious_server, an app that replies a fixed update.  Flower has no
groups and makes its keys in every round: its workflow runs one group, its seconds are multiplied (marked ~) and stand
beside ours with and without the offline phase.  Seconds are the best of a few.  Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from clients.identity import enrol
from clients.secagg import secagg_mod
from clients.store import NodeStore
from conf.schema import NodesConfig, NodeSpec, simulated_pins, to_json
from experiments.engines.local import LocalGrid
from strategies.exchange import door
from strategies.exchange_secagg import SecAggExchange
from strategies.grouping import Plan
from trellis import canonical, identity, wire
from trellis.secagg import leader, prg, quantise, shamir, transcript
from trellis.secagg.consent import Terms
from trellis.secagg.leader import Leader
from trellis.secagg.member import Member
from trellis.secagg.messages import Unmasked
from trellis.secagg.transcript import Signed
from trellis.types import Collected, Masking, NodeInfo, Request

Vector = npt.NDArray[np.float32]

CLIP_NORM = 10.0
NUM_KEYS = 16
"""Rounds of an epoch.  This and the norm: the defaults of privacy.secagg."""
TIMEOUT_S = 300.0
LARGE_PARAMS = 10_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is run."""

    num_params: int = 1_000_000
    steps: tuple[tuple[int, int], ...] = ((10, 40), (100, 8))
    """(neighbours, how many steps with as many)."""
    num_shares: int = 100
    num_nodes: int = 100
    group_size: int = 10
    num_rounds: int = 3
    """Without and with nodes missing, each."""


QUICK = Sizes(100_000, ((10, 20),), num_shares=20, num_nodes=20, num_rounds=2)
MOST_STEP_S = {10: 0.015, 100: 0.100}
MOST_SPLIT_S, MOST_COMBINE_S, MOST_ROUND_S, MOST_UPLOAD = 0.002, 0.003, 5.0, 4.1


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table."""

    what: str
    found: float
    unit: str
    most: float | None = None
    flower: float | None = None
    scaled: bool = False
    """Whether Flower's was measured on one group and multiplied."""

    @property
    def is_missed(self) -> bool:
        return self.most is not None and self.found > self.most


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds of a whole federation in this process."""

    offline_s: float
    round_s: float
    unmask_s: float
    """Of it, from the question for shares to the sums."""
    missing_s: float
    missing_unmask_s: float
    """The same with one member of each group missing.  0 where that was not asked for."""
    offline_bytes: float
    """What a node sends in an epoch's offline phase, on average."""
    round_bytes: float
    start_bytes: int
    """Peak memory before the first message."""
    peak_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller in everything, and no target of seconds")
    parser.add_argument("--large", action="store_true", help=f"also a round with {LARGE_PARAMS:,} params")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    chosen = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sizes = QUICK if chosen.quick else Sizes()
    rows = []
    if not chosen.json:
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; d = {sizes.num_params:,}\n")
        print("| what | found | target | Flower | ratio | |")
        print("|---|---|---|---|---|---|")
    for row in table(sizes, large=chosen.large):
        rows.append(replace(row, most=None) if chosen.quick and row.unit in ("s", "ms") else row)
        if not chosen.json:
            print(_line(rows[-1]), flush=True)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.is_missed for row in rows))


def table(sizes: Sizes, *, large: bool = False) -> Iterator[Measured]:
    """Every line, as soon as it is measured."""
    for num_neighbours, times in sizes.steps:
        yield from step_rows(num_neighbours, sizes.num_params, times)
    yield from share_rows(sizes.num_shares, sizes.num_shares // 2 + 1)
    yield from round_rows(sizes)
    if large:
        found = in_process_of_its_own(sizes.num_nodes, sizes.group_size, LARGE_PARAMS, 1, missing=False)
        yield Measured(f"round, d = {LARGE_PARAMS:,}", found.round_s, "s")
        yield Measured("its process's peak memory", found.peak_bytes / 1e9, "GB")


# ---------------------------------------------------------------- a node's step


def step_rows(num_neighbours: int, num_params: int, times: int) -> Iterator[Measured]:
    """Ours and Flower's in turn: the machine is as busy for one as for the other."""
    state, params = flower_state(num_neighbours), [update_of(num_params)]
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        steps = member_steps(num_neighbours, num_params, times, Path(folder))
        both = [(_best(step, 1)[0], _best(lambda: flower_step(state, params, 1000), 1)[0]) for step in steps]
    first_s, seconds = both[0][0], min(ours for ours, _ in both[1:])
    flower_ms = 1000 * min(theirs for _, theirs in both)
    name, most_s = f"node step, {num_neighbours} neighbours", MOST_STEP_S.get(num_neighbours)
    yield Measured(name, 1000 * seconds, "ms", most_s and 1000 * most_s, flower_ms)
    yield Measured("the first of an epoch, which checks signatures", 1000 * first_s, "ms", None, flower_ms)


def member_steps(num_neighbours: int, num_params: int, times: int, folder: Path) -> list[Callable[[], Signed]]:
    """A member's steps after the offline phase, one a key index: each can be taken once."""
    size = num_neighbours + 1
    led, members = confirmed_group(federation(size, size), times, folder)
    scale = quantise.scale_for(size, CLIP_NORM, 1)
    name, update_d = led.members[size // 2], update_of(num_params)
    confirmation = led.confirmation(name)

    def step(request: Request) -> Signed:
        rng = prg.Stream(transcript.digest("rounding", request.round))  # as a node makes it
        words, _ = quantise.quantise(update_d, clip_norm=CLIP_NORM, weight=1, scale=scale, dtype="uint32", rng=rng)
        return members[name].mask(request, confirmation, words, np.zeros(2, np.uint64))

    return [partial(step, _request_of(led, index, num_params, scale)) for index in range(times)]


def confirmed_group(nodes: NodesConfig, num_keys: int, folder: Path) -> tuple[Leader, dict[str, Member]]:
    """All nodes as one group, after the offline phase."""
    pins, plan = simulated_pins(nodes), Plan()
    names = sorted(pins)
    asked = leader.ask_keys(
        run="bench",
        epoch="bench",
        group=pins[names[0]].group,
        names=names,
        pins=pins,
        threat=plan.threat,
        quorum=plan.quorum(len(names)),
        num_keys=num_keys,
    )
    led, terms, members = Leader(asked, pins), Terms(code_is_pinned=True), {}
    for name in names:
        (folder / name).mkdir()
        # not forced to disk: what a disk takes is no part of the step
        members[name] = Member(name, identity.simulated(name), pins, terms, NodeStore(folder / name, durable=False))
    answers: dict[str, Callable[[Any], Any]] = {name: member.answer for name, member in members.items()}
    for name in names:
        led.take_keys(name, answers[name](asked))
    for name, deal in led.ask_shares().items():
        led.take_shares(name, answers[name](deal))
    for name, confirm in led.ask_confirm().items():
        led.take_confirmed(name, answers[name](confirm))
    if not led.is_confirmed:
        raise RuntimeError(f"{len(led.confirmed)} of {len(names)} members confirmed the group")
    return led, members


def _request_of(led: Leader, index: int, num_params: int, scale: int) -> Request:
    names = tuple(led.members)
    masking = Masking(
        epoch=led.asked.epoch,
        group=led.asked.group,
        roster=led.asked.roster.hex(),
        confirmed=led.set_digest.hex(),
        members=names,
        quorum=led.asked.quorum,
        clip_norm=CLIP_NORM,
        scale=scale,
        dtype="uint32",
        dim=num_params,
        counts=(),
        weights=tuple(1 for _ in names),
    )
    base = f"base {index}"
    return Request("bench", index + 1, "train", base, {}, names, key_index=index, masking=masking)


def flower_state(num_neighbours: int) -> Any:
    """A node of Flower's as it is after the exchange of keys, with their defaults for everything."""
    from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes

    own, others = num_neighbours // 2, range(num_neighbours + 1)
    pairs = {node: generate_key_pairs() for node in others}
    known: Any = {node: (public_key_to_bytes(pairs[node][1]), b"") for node in others if node != own}
    return SecAggPlusState(
        nid=own,
        clipping_range=8.0,
        target_range=1 << 22,
        mod_range=1 << 32,
        max_weight=1000.0,
        sk1=private_key_to_bytes(pairs[own][0]),
        rd_seed=os.urandom(32),
        public_keys_dict=known,
    )


def flower_step(state: Any, params: list[Vector], num_examples: int) -> list[npt.NDArray[np.int64]]:
    """`_collect_masked_vectors` of Flower's mod, without the decryption before it and the serialisation after it."""
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

    q_ratio = round(num_examples / state.max_weight * state.target_range)
    weighted = arithmetic.parameters_multiply(params, q_ratio / state.target_range)
    words = arithmetic.factor_combine(q_ratio, quantize(weighted, state.clipping_range, state.target_range))
    shapes = [word.shape for word in words]
    words = arithmetic.parameters_addition(words, pseudo_rand_gen(state.rd_seed, state.mod_range, shapes))
    for node, (public, _) in state.public_keys_dict.items():
        key = generate_shared_key(bytes_to_private_key(state.sk1), bytes_to_public_key(public))
        mask = pseudo_rand_gen(key, state.mod_range, shapes)
        move = arithmetic.parameters_addition if state.nid > node else arithmetic.parameters_subtraction
        words = move(words, mask)
    return arithmetic.parameters_mod(words, state.mod_range)


# ---------------------------------------------------------------- shares


def share_rows(n: int, t: int) -> Iterator[Measured]:
    """A seed and a mask key: Flower's is a PEM of 306 bytes, ours has 32."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

    seed, key, points = os.urandom(32), os.urandom(32), range(1, n + 1)
    pem = private_key_to_bytes(generate_key_pairs()[0])

    split_s, (shares, _) = _best(lambda: [shamir.split(secret, points, t) for secret in (seed, key)], 20)
    flower_s, (theirs, their_keys) = _best(lambda: [create_shares(secret, t, n) for secret in (seed, pem)], 2)
    of = f"Shamir n={n} t={t}"
    yield Measured(f"{of}: split seed and key", 1000 * split_s, "ms", 1000 * MOST_SPLIT_S, 1000 * flower_s)
    ours_s, secret = _best(lambda: shamir.combine(shares[:t], shamir.lagrange_at_zero(points[:t])), 20)
    flower_s, their_secret = _best(lambda: combine_shares(theirs), 2)
    if not secret == seed == their_secret:
        raise RuntimeError("the shares do not give the seed")
    yield Measured(f"{of}: combine a seed", 1000 * ours_s, "ms", 1000 * MOST_COMBINE_S, 1000 * flower_s)
    flower_s, _ = _best(lambda: combine_shares(their_keys), 1)
    yield Measured(f"{of}: combine a missing node's key", 1000 * ours_s, "ms", 1000 * MOST_COMBINE_S, 1000 * flower_s)


# ---------------------------------------------------------------- whole rounds


def round_rows(sizes: Sizes) -> Iterator[Measured]:
    nodes, group, d = sizes.num_nodes, sizes.group_size, sizes.num_params
    num_groups = nodes // group
    ours = in_process_of_its_own(nodes, group, d, sizes.num_rounds)
    flower_s, flower_unmask_s, flower_bytes = flower_rounds(group, d, times=2)
    missing_s, missing_unmask_s, _ = flower_rounds(group, d, times=2, num_missing=1)

    def seconds(what: str, found_s: float, one_group_s: float, most_s: float | None = None) -> Measured:
        return Measured(what, found_s, "s", most_s, num_groups * one_group_s, scaled=num_groups > 1)

    yield seconds(f"round, {nodes} nodes in groups of {group}", ours.round_s, flower_s, MOST_ROUND_S)
    yield Measured(f"offline phase, once in {NUM_KEYS} rounds", ours.offline_s, "s")
    yield seconds("round and offline phase", ours.round_s + ours.offline_s, flower_s)
    yield seconds("unmasking, of the round", ours.unmask_s, flower_unmask_s)
    yield seconds(f"round, 1 of {group} missing", ours.missing_s, missing_s)
    yield seconds(f"unmasking, 1 of {group} missing", ours.missing_unmask_s, missing_unmask_s)
    yield Measured("upload of a round, a param", ours.round_bytes / d, "B", MOST_UPLOAD, flower_bytes / d)
    yield Measured("upload of an offline phase, a node", ours.offline_bytes / 1e3, "kB")
    yield Measured("peak memory, all parties", ours.peak_bytes / 1e9, "GB")
    yield Measured("of it before the first message", ours.start_bytes / 1e9, "GB")


def in_process_of_its_own(
    num_nodes: int, group_size: int, num_params: int, times: int, *, missing: bool = True
) -> Rounds:
    """`rounds` in a fresh process, whose memory is nobody else's."""
    call = f"secagg.work({num_nodes}, {group_size}, {num_params}, {times}, missing={missing})"
    code = f"from experiments.benchmarks import secagg; {call}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{call} failed: {done.stderr[-2000:]}")
    return Rounds(**json.loads(done.stdout.splitlines()[-1]))


def work(num_nodes: int, group_size: int, num_params: int, times: int, *, missing: bool) -> None:
    """In the process of its own: run the rounds and print what was found."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        found = rounds(num_nodes, group_size, num_params, times, Path(folder), missing=missing)
    print(json.dumps(asdict(found)))


def rounds(
    num_nodes: int, group_size: int, num_params: int, times: int, folder: Path, *, missing: bool = True
) -> Rounds:
    """An epoch's offline phase and so many rounds, then as many with one member of each group missing."""
    nodes = federation(num_nodes, group_size)
    pins, update_d = simulated_pins(nodes), update_of(num_params)
    names = [spec.name for spec in nodes.expand()]
    groups = {pins[name].group for name in names}
    unlucky = {min(i for i, name in enumerate(names) if pins[name].group == group) for group in groups}
    away: set[int] = set()
    unmask_at = 0.0
    start_bytes = peak_bytes()

    def reachable(index: int, message: Message) -> bool:
        return index not in away or wire.read_request(message) is None

    def ask(messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
        nonlocal unmask_at
        said = messages[0].content.config_records.get(wire.SECAGG)
        if said is not None and said["stage"] == Unmasked.stage:
            unmask_at = time.perf_counter()
        return to_nodes(messages, timeout_s)

    with LocalGrid(client(update_d, nodes, folder / "nodes"), num_nodes, reachable=reachable) as grid:
        to_nodes = door(grid, grid.clock)
        ids = list(grid.get_node_ids())
        enrolments = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in ids]
        if any(reply.has_error() for reply in to_nodes(enrolments, TIMEOUT_S)):
            raise RuntimeError("a node could not be enrolled")
        cohort = [NodeInfo(name, node_id, group=pins[name].group) for name, node_id in zip(names, ids, strict=True)]
        exchange = SecAggExchange(
            pins, clip_norm=CLIP_NORM, num_keys=NUM_KEYS, clock=grid.clock, folder=folder / "sums"
        )
        found: list[tuple[Collected, float]] = []
        for number in range(1, 1 + times * (1 + missing)):
            away |= unlucky if number > times else set()
            request = Request("bench", number, "train", canonical.digest(number), {}, tuple(names))
            collected = exchange.collect(request, cohort, ask, base={"layer": np.zeros(num_params, np.float32)})
            found.append((collected, time.perf_counter() - unmask_at))
            _require_right(collected, update_d, num_groups=len(groups), num_missing=len(away))
    return _rounds(found, times, start_bytes)


def _rounds(found: Sequence[tuple[Collected, float]], times: int, start_bytes: int) -> Rounds:
    def best(part: Sequence[tuple[Collected, float]]) -> tuple[float, float]:
        seconds = [collected.seconds["exchange"] - collected.seconds["offline"] for collected, _ in part]
        return min(seconds, default=0.0), min((unmask for _, unmask in part), default=0.0)

    (round_s, unmask_s), (missing_s, missing_unmask_s) = best(found[:times]), best(found[times:])
    first, num_nodes = found[0][0], len(found[0][0].node_bytes)
    # the offline phase travels with the first round; later ones alone say what a round is
    round_bytes = (found[1][0] if times > 1 else first).bytes_up / num_nodes
    return Rounds(
        offline_s=first.seconds["offline"],
        round_s=round_s,
        unmask_s=unmask_s,
        missing_s=missing_s,
        missing_unmask_s=missing_unmask_s,
        offline_bytes=first.bytes_up / num_nodes - round_bytes,
        round_bytes=round_bytes,
        start_bytes=start_bytes,
        peak_bytes=peak_bytes(),
    )


def _require_right(collected: Collected, update_d: Vector, *, num_groups: int, num_missing: int) -> None:
    """What is timed is right: a row a group, each the update that everybody sent."""
    reasons = [refusal.reason for refusal in collected.refusals]
    if len(collected.rows) != num_groups or reasons != ["unavailable"] * num_missing:
        raise RuntimeError(f"{len(collected.rows)} sums of {num_groups} groups; refused: {collected.refusals[:3]}")
    for row in collected.rows:
        error = float(np.abs(row.update_d - update_d).max())
        if error > 1e-6:
            raise RuntimeError(f"the mean of {row.members} is off by {error}")


def client(update_d: Vector, nodes: NodesConfig, folder: Path) -> ClientApp:
    """An app behind our mask that replies the same update to every request."""
    app, told = ClientApp(mods=[secagg_mod]), json.dumps(to_json(nodes))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        enrol(context, told, str(folder))
        return Message(RecordDict(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = wire.reply_content(
            request=wire.read_request(message),
            arrays={"layer": update_d},
            num_examples=1,
            metrics={"train/loss": 0.5},
            counts={},
        )
        return Message(content, reply_to=message)

    return app


def flower_rounds(num_nodes: int, num_params: int, *, times: int, num_missing: int = 0) -> tuple[float, float, float]:
    """Flower's workflow and mod in the local engine: seconds of a round, of its unmasking, and a node's upload."""
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
    from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState

    def reachable(index: int, message: Message) -> bool:
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        return index >= num_missing or stage != Stage.COLLECT_MASKED_VECTORS

    def delay_s(index: int, message: Message, reply: Message) -> float:
        sent.append(wire.size_bytes(reply.content) if reply.has_content() else 0)
        return 0.0

    update_d, sent = update_of(num_params), list[int]()
    found = []
    for _ in range(times):
        sent.clear()
        with LocalGrid(flower_client(update_d), num_nodes, reachable=reachable, delay_s=delay_s) as grid:
            flow, state = SecAggPlusWorkflow(1.0, 0.7), WorkflowState()
            context = flower_context(list(grid.get_node_ids()), num_params)
            began = time.perf_counter()
            steps = (flow.setup_stage, flow.share_keys_stage, flow.collect_masked_vectors_stage)
            went_on = all(step(grid, context, state) for step in steps)
            masked = time.perf_counter()
            if not went_on or not flow.unmask_stage(grid, context, state):
                raise RuntimeError("Flower's workflow has no sum")
            ended = time.perf_counter()
        (mean,) = wire.from_record(context.state.array_records["parameters"]).values()
        if np.abs(np.asarray(mean, np.float32) - update_d).max() > 1e-5:
            raise RuntimeError("Flower's mean is not the update that everybody sent")
        found.append((ended - began, ended - masked))
    return min(whole for whole, _ in found), min(unmask for _, unmask in found), sum(sent) / num_nodes


def flower_client(update_d: Vector) -> ClientApp:
    """The same app behind Flower's mod."""
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict

    app = ClientApp(mods=[secaggplus_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update_d]), 1000, {})
        return Message(fitres_to_recorddict(trained, keep_input=False), reply_to=message)

    return app


def flower_context(ids: Sequence[int], num_params: int) -> Any:
    """What Flower's workflow starts a round from: params, and a strategy that asks every node."""
    from flwr.common import FitIns, ndarrays_to_parameters
    from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
    from flwr.server import LegacyContext
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    class Everyone(FedAvg):
        def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            return [(SimpleNamespace(node_id=node_id), FitIns(parameters, {})) for node_id in ids]

    params = parameters_to_arrayrecord(ndarrays_to_parameters([np.zeros(num_params, np.float32)]), keep_input=True)
    state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}), MAIN_PARAMS_RECORD: params})
    return LegacyContext(Context(1, 1, {}, state, {}), strategy=Everyone())


# ---------------------------------------------------------------- what all of it needs


def federation(num_nodes: int, group_size: int) -> NodesConfig:
    """Nodes of as many organisations, in pinned groups."""
    each = NodeSpec(name="node-{index:04d}", organisation="organisation-{index:04d}")
    return NodesConfig(name="bench", count=num_nodes, template=each, group_size=group_size)


def update_of(num_params: int) -> Vector:
    """An update of norm 1: nothing is clipped."""
    update_d = np.random.default_rng(0).standard_normal(num_params, dtype=np.float32)
    return update_d / np.float32(np.linalg.norm(update_d))


def peak_bytes() -> int:
    """The most memory this process has had at a time."""
    try:
        # not getrusage: its maximum begins with what the parent process had when it started this one
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _best(function: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Seconds of the fastest call, and what the last one gave."""
    found, given = [], None
    for _ in range(times):
        began = time.perf_counter()
        given = function()
        found.append(time.perf_counter() - began)
    return min(found), given


def _line(row: Measured) -> str:
    target = "-" if row.most is None else f"{row.most:.4g}"
    theirs, ratio = "-", "-"
    if row.flower is not None:
        theirs = f"{'~' if row.scaled else ''}{row.flower:.4g}"
        times = row.flower / row.found
        ratio = f"{times:,.0f}x" if times >= 100 else f"{times:.1f}x"
    verdict = "" if row.most is None else "missed" if row.is_missed else "met"
    return f"| {row.what} | {row.found:.4g} {row.unit} | {target} | {theirs} | {ratio} | {verdict} |"


if __name__ == "__main__":
    raise SystemExit(main())
