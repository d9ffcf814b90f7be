"""Secure aggregation at a node, as a Mod around any ClientApp: what leaves is masked, or nothing leaves.

    the server's question of a stage  -> the member answers it; the app is not called
    a request with `masking`          -> the app's reply is clipped, quantised and masked; only that is sent

The reply is built from an allow-list, so nothing in clear slips beside the mask.  Secrets live in `Context.state`, the
node's memory; what must not be forgotten (keys that are used up, bases that are answered) is in its store.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients import budget, identity
from clients.identity import Identity
from clients.store import store_of
from conf.schema import NodesConfig, RepeatBase, SurvivorSets, from_json, simulated_pins
from trellis import canonical, wire
from trellis import identity as keys
from trellis.errors import ConfigError, PolicyRefusal, SecAggError, WireError
from trellis.identity import IdentityKey
from trellis.identity import Member as Pin
from trellis.secagg import counts, draws, epoch, messages, prg, quantise, transcript
from trellis.secagg.consent import DENIED, Terms
from trellis.secagg.member import Member
from trellis.secagg.messages import AskDraw, AskKeys, AskReveal, Confirmation
from trellis.types import LOSS_MAX, POLICY_CODES, Masking, Request, Threat
from trellis.vectors import Arrays, Layout

STATE = "trellis.secagg"
PINNED, DRAWN = "pinned", "drawn"
"""Two epochs may go on at once: that of the group its site has pinned, and that of a group that was drawn."""


def secagg_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod of our app: masks what a request asks to be masked.  The node's policy sees to it that it must be."""
    return _answered(message, context, call_next, always=False)


def secagg() -> Mod:
    """Mod for anyone's ClientApp: `ClientApp(mods=[secagg()])` sends nothing that is not masked."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return _answered(message, context, call_next, always=True)

    return mod


def remember_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod inside the mask: what was trained for a base is masked again under other keys, not trained again."""
    request = wire.read_request(message)
    store = store_of(identity.of(context)) if request is not None and request.masking is not None else None
    if request is None or store is None:
        return call_next(message, context)
    kept = store.reply(about(request), slot="update")
    if kept is not None:
        return Message(_renamed(kept, request), reply_to=message)
    reply = call_next(message, context)
    if reply.has_content():
        store.keep_reply(about(request), reply.content, slot="update")
    return reply


def about(request: Request) -> str:
    """What an unmasked reply is about, whatever keys it is masked with.  -> hex"""
    return canonical.digest([request.run, request.purpose, request.base, request.config, list(request.splits)])


def _renamed(content: RecordDict, request: Request) -> RecordDict:
    """A reply to an earlier request about the same base, as the reply to this one."""
    if wire.REPLY in content.config_records:
        content[wire.REPLY] = ConfigRecord({wire.REQUEST: request.digest})
    return content


def _answered(message: Message, context: Context, call_next: ClientAppCallable, *, always: bool) -> Message:
    try:
        request = wire.read_request(message)
        if request is None and wire.SECAGG in message.content.config_records:
            return Message(RecordDict({wire.SECAGG: _stage(message, context)}), reply_to=message)
        if request is not None and request.masking is not None:
            return _masked(message, context, call_next, request, request.masking)
        if always:
            raise SecAggError(DENIED, "this node sends nothing that is not masked, and the message asks for no masking")
    except PolicyRefusal as refusal:
        return Message(Error(POLICY_CODES[refusal.code], str(refusal)), reply_to=message)
    except (SecAggError, WireError, ConfigError) as error:
        return Message(Error(POLICY_CODES[DENIED], str(error)), reply_to=message)
    return call_next(message, context)


def _stage(message: Message, context: Context) -> ConfigRecord:
    """The answer to one question of the protocol."""
    question = messages.asked(dict(message.content.config_records[wire.SECAGG]))
    with _Memory(context, question) as member:
        reply = member.answer(question)
    return ConfigRecord({**messages.fields_of(reply)})


def _masked(
    message: Message, context: Context, call_next: ClientAppCallable, request: Request, masking: Masking
) -> Message:
    """The app's reply, masked.  Nothing is trained for a request that this node would not mask."""
    said = message.content.config_records.get(wire.SECAGG, ConfigRecord())
    confirmation = messages.from_fields(Confirmation, dict(said))
    _require_fitting(message, request, masking)
    with _Memory(context, masking.epoch) as member:
        member.require_maskable(request, confirmation)
    # from here on nothing of the node's rows may decide whether it answers: a failure is masked too, and counted
    update, values = _worked_out(message, context, call_next, request, masking)
    # of the ledger, not of the app: it is told whether the app fails or not
    told = budget.told(identity.of(context), request)
    words = counts.encode(masking.counts, values)
    with _Memory(context, masking.epoch) as member:
        signed = member.mask(request, confirmation, update, words)
    answer = ConfigRecord(
        {wire.REQUEST: request.digest, "payload": signed.payload, "signature": signed.signature, **told}
    )
    arrays = wire.to_record({wire.UPDATE: update, wire.COUNTS: words})
    return Message(RecordDict({wire.ARRAYS: arrays, wire.REPLY: answer}), reply_to=message)


def _worked_out(
    message: Message, context: Context, call_next: ClientAppCallable, request: Request, masking: Masking
) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """What the app replies, as words and counts that are not masked yet; zeros where it fails."""
    name, dtype = identity.of(context).spec.name, np.dtype(masking.dtype)
    try:
        reply = call_next(message, context)
        if not reply.has_content():
            raise SecAggError("error_reply", str(reply.error.reason))
        update, clipped = _update(message, reply.content, request, masking, name)
        values = _values(reply.content)
        return update, {**values, counts.CLIPPED: int(clipped), counts.FAILED: 0}
    except PolicyRefusal:  # the site's own word on how many of its rows are used
        raise
    except Exception:
        logging.getLogger(__name__).exception("%s: the app failed; zeros are sent, masked", name)
        return np.zeros(masking.dim if request.purpose == "train" else 0, dtype), {counts.FAILED: 1}


def _update(
    message: Message, content: RecordDict, request: Request, masking: Masking, name: str
) -> tuple[npt.NDArray[Any], bool]:
    """The app's update as words, and whether it was clipped.  (dim,)  ValueError where it is not finite."""
    if request.purpose != "train":
        return np.zeros(0, masking.dtype), False
    base = wire.from_record(message.content.array_records[wire.ARRAYS])
    layout = Layout.of(base)
    sent = wire.from_record(_arrays_of(content))
    # our app replies a delta to a request, other apps their params
    moved = wire.REPLY in content.config_records
    delta = layout.flatten(_fitting(layout, sent)) if moved else layout.subtract(_fitting(layout, sent), base)
    # from the base, not from the round: the same update is rounded in the same way
    rng = prg.Stream(transcript.digest("rounding", str(request.config.get("seed", 0)), request.base, name))
    weight = masking.weights[masking.members.index(name)]
    return quantise.quantise(
        delta,
        clip_norm=masking.clip_norm,
        weight=weight,
        scale=masking.scale,
        dtype=np.dtype(masking.dtype),
        rng=rng,
    )


def _require_fitting(message: Message, request: Request, masking: Masking) -> None:
    """Words of 32 or 64 bits, as many as the model has coordinates.  Raises SecAggError."""
    if masking.dtype not in ("uint32", "uint64"):
        raise SecAggError(DENIED, f"masks are of 32 or 64 bits, not {masking.dtype[:20]}")
    if masking.scale < 1 or not 0 < masking.clip_norm < math.inf:
        raise SecAggError(DENIED, f"scale {masking.scale} and clip norm {masking.clip_norm} are not above 0")
    dim = 0
    if request.purpose == "train":
        dim = Layout.of(wire.from_record(message.content.array_records[wire.ARRAYS])).dim
    if masking.dim != dim:
        raise SecAggError(DENIED, f"there are {dim} coordinates to mask, not {masking.dim}")
    counts.encode(masking.counts, {})  # what could not be told is refused now, not when there is something to tell


def _arrays_of(content: RecordDict) -> ArrayRecord:
    records = content.array_records
    if wire.ARRAYS in records:
        return records[wire.ARRAYS]
    others = [record for name, record in records.items() if name != wire.COUNTS]
    if len(others) != 1:
        raise SecAggError("wrong_keys", "the app's reply has no arrays")
    return others[0]


def _fitting(layout: Layout, arrays: Arrays) -> Arrays:
    """Arrays with the model's names and shapes.  Raises SecAggError where they are not."""
    for t in layout.floating:
        if t.name not in arrays or arrays[t.name].shape != t.shape:
            raise SecAggError("wrong_shape", f"the app's reply has no {t.name} of shape {t.shape}")
    return arrays


def _values(content: RecordDict) -> dict[str, Any]:
    """Everything that may leave as a count, by name."""
    found: dict[str, Any] = {}
    record = content.array_records.get(wire.COUNTS)
    if record is not None:
        found |= wire.from_record(record)
    metrics = content.metric_records.get(wire.METRICS)
    loss = metrics.get("train/loss", 0.0) if metrics is not None else 0.0
    found[counts.LOSS] = loss if isinstance(loss, int | float) else LOSS_MAX
    return found


# ---------------------------------------------------------------- who this node is to the others


class _Memory:
    """The member with its memory of an epoch, which is kept where nothing went wrong."""

    def __init__(self, context: Context, about: Any) -> None:
        self._context = context
        self._own = identity.of(context)
        self._slot = self._slot_of(about)

    def __enter__(self) -> Member:
        store = store_of(self._own)
        if store is None:
            raise SecAggError(DENIED, "this node has no store, where what it answered could be written down")
        self._lock = store.locked()
        self._lock.__enter__()
        kept = self._kept()
        data = kept.get(self._slot)
        self._member = Member(
            name=self._own.spec.name,
            key=_key(self._own),
            pins=_pins(self._own, self._context),
            terms=_terms(self._own),
            journal=store,
            epoch=epoch.loads(data) if isinstance(data, bytes) and data else None,
            draw=draws.loads(kept["draw"]) if "draw" in kept else None,
        )
        return self._member

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.__exit__(None, None, None)
        if kind is not None:
            return
        kept = self._kept()
        if self._member.epoch is not None:
            kept[self._slot] = epoch.dumps(self._member.epoch)
        if self._member.draw is not None:
            kept["draw"] = draws.dumps(self._member.draw)
        self._context.state[STATE] = ConfigRecord(kept)

    def _kept(self) -> dict[str, Any]:
        return dict(self._context.state.config_records.get(STATE, ConfigRecord()))

    def _slot_of(self, about: Any) -> str:
        """The epoch that a question, or the id of one, is about."""
        if isinstance(about, AskKeys):
            return DRAWN if about.drawn_names else PINNED
        asked = about if isinstance(about, str) else getattr(about, "epoch", "")
        if isinstance(about, AskDraw | AskReveal):
            return DRAWN
        kept = self._kept()
        known = {slot: epoch.loads(kept[slot]).epoch for slot in (PINNED, DRAWN) if kept.get(slot)}
        return next((slot for slot, found in known.items() if found == asked), PINNED)


def _terms(own: Identity) -> Terms:
    policy = own.spec.policy.secagg
    default = Threat.semi_honest if own.simulated else Threat.malicious_server
    return Terms(
        least_threat=policy.least_threat or default,
        min_group=policy.min_group or (2 if own.simulated else 3),
        max_per_organisation=policy.max_per_organisation or (sys.maxsize if own.simulated else 1),
        max_share=policy.max_share,
        max_weight_ratio=_ratio(own),
        colluding=policy.colluding,
        max_keys=policy.max_keys,
        max_draws=policy.max_draws,
        max_regroupings=_regroupings(own),
        allow_repeat=policy.repeat_base is RepeatBase.allow,
        fixed_survivors=policy.survivor_sets is SurvivorSets.fixed,
        # a site that starts its node from an allow-list of code will say so here; simulation plays such a site
        code_is_pinned=own.simulated,
    )


def _ratio(own: Identity) -> float:
    """How much more one update may weigh than another: in simulation as much as the run likes."""
    given = own.spec.policy.secagg.max_weight_ratio
    return given if given is not None else math.inf if own.simulated else 1.0


def _regroupings(own: Identity) -> int:
    """Drawn groups that it is ever summed with: in simulation, whose nodes forget, as many as the run draws."""
    given = own.spec.policy.secagg.max_regroupings
    return given if given is not None else sys.maxsize if own.simulated else 4


def _key(own: Identity) -> IdentityKey:
    if own.simulated:
        return _simulated_key(own.spec.name)
    return keys.load(_beside(own, "identity_key", own.spec.policy.secagg.identity_key))


def _pins(own: Identity, context: Context) -> dict[str, Pin]:
    """The members this node accepts: its own site's list; of a simulated node, the federation it is part of."""
    if own.simulated:
        return _simulated_pins(identity.federation_of(context))
    members = keys.load_members(_beside(own, "members", own.spec.policy.secagg.members))
    return {member.name: member for member in members}


def _beside(own: Identity, setting: str, path: str | None) -> Path:
    """A file that the node's own file names, relative to it."""
    if path is None or own.file is None:
        raise SecAggError(DENIED, f"policy.secagg.{setting} is not set in this node's own file")
    return own.file.parent / path


@lru_cache(maxsize=4096)
def _simulated_key(name: str) -> IdentityKey:
    return keys.simulated(name)


@lru_cache(maxsize=8)
def _simulated_pins(federation: str) -> dict[str, Pin]:
    return simulated_pins(from_json(NodesConfig, json.loads(federation)))
