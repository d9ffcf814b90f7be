"""The node's consent, outermost of all Mods: the node's own policy beats the run's config.

A refusal is an error reply with a code and a reason; nothing else of the request is looked at.  The Mod also catches
refusals raised further in (training knows how many rows it would use) and checks what leaves.
"""

from __future__ import annotations

import json

from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from clients import identity
from conf.schema import NodeSpec, NodeTask, from_json
from trellis import wire
from trellis.errors import ConfigError, PolicyRefusal, WireError
from trellis.types import POLICY_CODES


def policy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod: refuse what the node's policy forbids, in the request and in the reply."""
    if message.metadata.message_type.partition(".")[0] == MessageType.QUERY:
        return call_next(message, context)
    try:
        spec = identity.of(context).spec
        if not _is_stage(message):
            task = task_of(message)
            consent(spec, task)
            if task.insecure_rng and not identity.of(context).simulated:
                raise PolicyRefusal("policy.privacy", f"{spec.name} draws its secrets from the OS, not from a seed")
            _require_masking(spec, task, message)
        reply = call_next(message, context)
        _check_reply(spec, reply)
    except PolicyRefusal as refusal:
        return Message(Error(POLICY_CODES[refusal.code], f"{refusal.code}: {refusal.reason}"), reply_to=message)
    except WireError as error:
        return Message(Error(POLICY_CODES["policy.protocol"], str(error)), reply_to=message)
    return reply


def task_of(message: Message) -> NodeTask:
    """The node config of a message: of our request, or of `node-config` where Flower's own strategies send it."""
    request = wire.read_request(message)
    if request is not None:
        return _task(request.config)
    config = message.content.config_records.get(wire.CONFIG)
    if config is None or wire.NODE_CONFIG not in config:
        raise WireError("wrong_request", "the message has neither a request nor a `node-config`")
    return _task(config[wire.NODE_CONFIG])


def _task(value: object) -> NodeTask:
    try:
        return from_json(NodeTask, json.loads(value) if isinstance(value, str) else value)
    except (ConfigError, ValueError) as error:
        raise WireError("wrong_request", f"cannot read the node config: {error}") from error


def _is_stage(message: Message) -> bool:
    """A question of secure aggregation that asks for nothing about the data: it has consent of its own."""
    return wire.SECAGG in message.content.config_records and wire.read_request(message) is None


def _require_masking(spec: NodeSpec, task: NodeTask, message: Message) -> None:
    """Raises PolicyRefusal where a run that calls itself masked asks for something in clear."""
    request = wire.read_request(message)
    if task.privacy.masks and (request is None or request.masking is None):
        reason = f"{spec.name}: the run has privacy={task.privacy}, and the message asks for a reply in clear"
        raise PolicyRefusal("policy.secagg", reason)


def consent(spec: NodeSpec, task: NodeTask) -> None:
    """Raises PolicyRefusal when the node's policy forbids the task."""
    policy = spec.policy
    if "*" not in policy.sectors and task.sector not in policy.sectors:
        allowed = ", ".join(policy.sectors) or "none"
        raise PolicyRefusal("policy.sector", f"{spec.name} takes part in {allowed}, not in {task.sector}")
    if task.privacy.trains_privately != (task.dp is not None):
        said = "has no plan" if task.dp is None else "has a plan"
        raise PolicyRefusal("policy.privacy", f"{spec.name}: the run calls itself privacy={task.privacy}, and {said}")
    for least in policy.least:
        if not task.privacy.at_least(least):
            reason = f"{spec.name} asks for privacy={least} at least, the run has {task.privacy}"
            raise PolicyRefusal("policy.privacy", reason)


def consent_to_rows(spec: NodeSpec, num_rows: float) -> None:
    """Raises PolicyRefusal when more rows would be trained on than the policy allows."""
    limit = spec.policy.max_examples
    if limit is not None and num_rows > limit:
        reason = f"{spec.name} allows {limit} rows a round, {num_rows} would be used: set sector.training.max_examples"
        raise PolicyRefusal("policy.max_examples", reason)


def _check_reply(spec: NodeSpec, reply: Message) -> None:
    if reply.has_content():
        for record in reply.content.metric_records.values():
            declared = record.get(wire.NUM_EXAMPLES)
            if isinstance(declared, int | float) and reply.metadata.message_type.startswith(MessageType.TRAIN):
                consent_to_rows(spec, declared)
