"""What a node does with a message: load its rows, evaluate the base, train, reply once."""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

import sectors
from clients import identity, secagg
from clients.budget import Budget, told
from clients.identity import Identity
from clients.policy import consent, consent_to_rows, task_of
from clients.store import NodeStore, store_of
from conf.schema import DpTask, NodeTask, from_json, to_json
from sectors import schema, training
from sectors.base import SPLITS, NodeData, Place, Rows, Sector, num_rows, place_of, take
from sectors.params import initial_arrays
from sectors.training import Trained
from trellis import canonical, wire
from trellis.errors import ConfigError, DataError, PolicyRefusal, WireError
from trellis.types import Purpose, Request
from trellis.vectors import Arrays, Layout, digest

if TYPE_CHECKING:
    from sectors.private import PrivateSettings

EVALUATED = {"evaluate": {"validation", "test", "test_tuned"}, "train": {"validation", "test"}, "statistics": {"train"}}
"""Splits a request of each purpose may ask about."""


def train(message: Message, context: Context) -> RecordDict:
    """Evaluate the params received, train on them, reply the delta (or params, where no request asks for a delta)."""
    node, task = identity.of(context), task_of(message)
    request = wire.read_request(message)
    sector, data = sector_of(task), data_of(node, task)
    used = min(num_rows(data.train), task.training.max_examples or num_rows(data.train))
    consent_to_rows(node.spec, used)
    shared, base_digest = _received(message, request, "train")
    store = store_of(node)
    run = request.run if request else None
    base = with_local(sector, task, shared, store, base_digest, run)
    round_ = request.round if request else _round(message)
    splits = request.splits if request else ("validation",)
    if task.dp is not None:
        trained, spent = private_round(node, task, request, base, data)
        counts = {}
    else:
        trained, spent = trained_on(task, base, data.train, round=round_, name=node.spec.name), {}
        counts = {
            s: training.evaluate(sector, base, scored(task, data, s, node, round_), device=task.device) for s in splits
        }
    if store is not None and set(base) != set(shared):
        store.commit(base_digest, {k: v for k, v in trained.arrays.items() if sector.is_local(k)}, run=run)
    # what training saw of single rows, its loss, leaves a private node as little as they do
    losses = {"train/loss": trained.loss} if trained.num_examples and task.dp is None else {}
    return wire.reply_content(
        request=request,
        arrays=_reply_arrays(request, shared, trained.arrays),
        num_examples=trained.num_examples,
        metrics={**losses, **spent},
        counts=counts,
    )


def private_round(
    node: Identity, task: NodeTask, request: Request | None, base: Arrays, data: NodeData
) -> tuple[Trained, dict[str, float]]:
    """Training by DP-SGD, charged before its first step; and what the site tells of its budget."""
    from sectors import private

    assert task.dp is not None
    if request is None or request.splits:
        # neither without a name for what is charged, nor with exact counts of rows
        raise PolicyRefusal("policy.privacy", f"{node.spec.name} scores nothing under privacy={task.privacy}")
    # a step draws from all rows, however many steps there are
    consent_to_rows(node.spec, num_rows(data.train))
    budget, dp = Budget.of(node), task.dp
    plan = private.plan(
        num_rows(data.train), task.training.batch_size, task.training.epochs, max_examples=task.training.max_examples
    )
    settings = _settings(node, task, dp, request)
    # one at a time: two trainings at once would be two updates for one charge
    with budget.ledger.locked():
        spending = budget.charge(
            dp,
            request,
            secagg.about(request),
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            data=digest(data.train),
        )
        found = private.train(
            sector_of(task),
            task.training,
            base,
            data.train,
            replace(settings, noise_multiplier=spending.noise_multiplier),
            device=task.device,
            proximal_mu=task.proximal_mu,
            frozen_local=dp.frozen_local,
        )
        budget.settle(spending)
    return Trained(found.arrays, 0.0, found.num_examples), told(node, request)


def _settings(node: Identity, task: NodeTask, dp: DpTask, request: Request) -> PrivateSettings:
    """How to train, but for the noise.  Raises PolicyRefusal before anything is charged where the plan cannot be."""
    from sectors import private

    try:
        return private.PrivateSettings(
            noise_multiplier=1.0,
            clip_norm=dp.clip_norm,
            clipping=dp.clipping.value,
            mode=dp.grad_sample.value,
            max_physical_batch=dp.max_physical_batch,
            insecure_seed=_insecure_seed(node, task, request),
        )
    except ConfigError as error:
        raise PolicyRefusal("policy.protocol", f"{node.spec.name}: {error}") from error


def _insecure_seed(node: Identity, task: NodeTask, request: Request) -> int | None:
    if not task.insecure_rng or not node.simulated:
        return None
    return canonical.seed_for(task.seed, "private", request.round, node.spec.name)


def scored(task: NodeTask, data: NodeData, split: str, node: Identity, round: int) -> Rows:
    """The rows that are scored: all, or of masked validation counts a fresh random half.

    Two sums whose survivors differ by one node tell that node's counts: of half its rows, and never of the same half.
    """
    rows = data.split(split)
    if not task.privacy.masks or split != "validation":
        return rows
    foreseen = task.insecure_rng and node.simulated
    seed = canonical.seed_for(task.seed, "half", round, node.spec.name) if foreseen else secrets.randbits(128)
    return take(rows, np.flatnonzero(np.random.default_rng(seed).random(num_rows(rows)) < 0.5))


def trained_on(task: NodeTask, base: Arrays, rows: Rows, *, round: int, name: str) -> Trained:
    """A node's training of a round: what it does to `base` follows from the task, the round and the node's name."""
    seed = canonical.seed_for(task.seed, "train", round, name)
    mu = task.proximal_mu
    return training.train(sector_of(task), task.training, base, rows, seed=seed, device=task.device, proximal_mu=mu)


def tuned_on(task: NodeTask, base: Arrays, rows: Rows, *, name: str) -> Arrays:
    """`base` fine-tuned on a node's own rows; it never leaves the node."""
    lr = task.training.lr if task.fine_tune_lr is None else task.fine_tune_lr
    config = replace(task.training, epochs=task.fine_tune_epochs, lr=lr)
    seed = canonical.seed_for(task.seed, "tune", name)
    return training.train(sector_of(task), config, base, rows, seed=seed, device=task.device).arrays


def statistics(message: Message, context: Context) -> RecordDict:
    """Additive statistics of this node's training rows: what a scaler or a vocabulary is made of."""
    node, task = identity.of(context), task_of(message)
    request = wire.read_request(message)
    if _received(message, request, "statistics")[0]:
        raise WireError("wrong_request", "statistics are of rows, and the message carries params")
    sector, rows = sector_of(task), data_of(node, task).train
    most = task.training.max_examples
    if most is not None and num_rows(rows) > most:  # no more rows are looked at than a round would train on
        rng = np.random.default_rng(canonical.seed_for(task.seed, "statistics", node.spec.name))
        rows = take(rows, np.sort(rng.choice(num_rows(rows), most, replace=False)))
    used = num_rows(rows)
    consent_to_rows(node.spec, used)
    if task.dp is not None:
        raise PolicyRefusal(
            "policy.privacy", f"{node.spec.name} gives no exact statistics under privacy={task.privacy}"
        )
    counts = {"train": sector.all_statistics(rows)}
    return wire.reply_content(request=request, arrays=None, num_examples=used, metrics={}, counts=counts)


def evaluate(message: Message, context: Context) -> RecordDict:
    """Counts of the params received, on the splits the request names."""
    node, task = identity.of(context), task_of(message)
    request = wire.read_request(message)
    if request is not None and request.purpose == "statistics":
        return statistics(message, context)
    if task.dp is not None:
        raise PolicyRefusal("policy.privacy", f"{node.spec.name} scores nothing under privacy={task.privacy}")
    sector, data = sector_of(task), data_of(node, task)
    shared, base_digest = _received(message, request, "evaluate")
    base = with_local(sector, task, shared, store_of(node), base_digest, request.run if request else None)
    splits = request.splits if request else ("validation",)
    round_ = request.round if request else _round(message)
    counts = {
        s: training.evaluate(sector, base, scored(task, data, s, node, round_), device=task.device)
        for s in splits
        if s in SPLITS
    }
    rows = sum(int(c["rows"]) for c in counts.values())
    losses = sum(float(c["loss_sum"]) for c in counts.values())
    if "test_tuned" in splits:
        # what trains on a node's rows asks the same consent whatever the message is called
        consent_to_rows(node.spec, min(num_rows(data.train), task.training.max_examples or num_rows(data.train)))
        tuned = tuned_on(task, base, data.train, name=node.spec.name) if num_rows(data.train) else base
        counts["test_tuned"] = training.evaluate(sector, tuned, data.test, device=task.device)
    # Flower's own strategies average metrics by num-examples; ours reads the counts.
    metrics = {} if request else {"val/loss": losses / max(rows, 1)}
    return wire.reply_content(request=request, arrays=None, num_examples=rows, metrics=metrics, counts=counts)


def enrol(message: Message, context: Context) -> RecordDict:
    """Answer "who are you?": the name and, where the node consents to the task, how many rows it has.

    A node that does not consent gives its name only; asked to train, it refuses and says why.
    """
    asked = message.content.config_records[wire.CONFIG]
    if identity.is_simulated(context):
        identity.enrol(context, str(asked["federation"]), str(asked["store"]))
    node = identity.of(context)
    reply: dict[str, str | int] = {"name": node.spec.name}
    task = from_json(NodeTask, json.loads(str(asked[wire.NODE_CONFIG])))
    with suppress(PolicyRefusal):
        consent(node.spec, task)
        _agree_on_schema(node.spec.name, sector_of(task), str(asked.get(wire.SCHEMA, "")))
        data = data_of(node, task)
        reply[wire.NUM_EXAMPLES] = num_rows(data.train)
        reply[wire.NUM_ROWS] = sum(num_rows(data.split(name)) for name in SPLITS)
    return RecordDict({wire.REPLY: ConfigRecord({**reply})})


def _agree_on_schema(name: str, sector: Sector, declared: str) -> None:
    """Raises DataError where the server's sector reads other columns, units or ranges than this node's."""
    own = schema.digest(sector.schema)
    if declared and declared != own:
        raise DataError(
            f"node {name}: the server's sector {sector.name} declares other columns, units or ranges (schema "
            f"{declared[:12]}) than this node's (schema {own[:12]}): both need the same version of "
            f"sectors/{sector.name}.py"
        )


def _received(message: Message, request: Request | None, purpose: Purpose) -> tuple[Arrays, str]:
    """The params of a message and their digest.  Raises WireError when the request is not about them or for this."""
    arrays = message.content.array_records.get(wire.ARRAYS)
    if arrays is None:
        raise WireError("wrong_request", "the message carries no params")
    shared = wire.from_record(arrays)
    found = digest(shared)
    if request is not None:
        if request.base != found:
            raise WireError(
                "wrong_request", f"the params' digest is {found[:12]}, the request says {request.base[:12]}"
            )
        if request.purpose != purpose or not set(request.splits) <= EVALUATED[purpose]:
            asked = f"{request.purpose} on {list(request.splits)}"
            raise WireError("wrong_request", f"a {purpose} message that asks to {asked}")
    return shared, found


def _round(message: Message) -> int:
    return int(message.content.config_records[wire.CONFIG].get(wire.ROUND, 0))  # type: ignore[arg-type]


def _reply_arrays(request: Request | None, shared: Arrays, trained: Arrays) -> Arrays:
    if request is None:
        return {name: trained[name] for name in shared}
    layout = Layout.of(shared)
    return layout.unflatten(layout.subtract(trained, shared))


def with_local(
    sector: Sector, task: NodeTask, shared: Arrays, store: NodeStore | None, base: str, run: str | None = None
) -> Arrays:
    """The shared params and this node's local layers of the run, in the model's order."""
    initial = _initial(sector, task.seed)
    if all(name in shared for name in initial):
        return shared
    kept = (store.local(base, run=run) if store is not None else None) or {}
    return {name: shared[name] if name in shared else kept.get(name, initial[name]) for name in initial}


@lru_cache(maxsize=8)
def _initial(sector: Sector, seed: int) -> Arrays:
    return initial_arrays(sector, seed)


def sector_of(task: NodeTask) -> Sector:
    """The task's sector, built once a process."""
    return _built(task.sector, canonical.encode(task.options).decode())


@lru_cache(maxsize=32)
def _built(name: str, options: str) -> Sector:
    return sectors.get(name, json.loads(options))


def data_of(node: Identity, task: NodeTask) -> NodeData:
    """This node's rows for a task, loaded once a process: they are read only."""
    return _loaded(sector_of(task), place_of(node.spec, task))


@lru_cache(maxsize=4096)
def _loaded(sector: Sector, place: Place) -> NodeData:
    return sector.load(place)


def node_config(task: NodeTask) -> str:
    """A task as the `node-config` text that Flower's own strategies send in `train_config`."""
    return canonical.encode(to_json(task)).decode()
