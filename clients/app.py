"""The ClientApp.  `clients.app:app` runs unchanged in every engine.

Imports are light on purpose: on a real federation every message starts a fresh process, and a refusal by policy must
not wait for torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients import identity
from clients.momentum import momentum_mod
from clients.policy import policy_mod
from clients.secagg import remember_mod, secagg_mod
from clients.store import store_of
from trellis import wire


def replay_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Mod: a request answered already gets the same bytes again, with no second training."""
    request = wire.read_request(message)
    if request is None:
        return call_next(message, context)
    store = store_of(identity.of(context))
    if store is None:
        return call_next(message, context)
    kept = store.reply(request.digest)
    if kept is not None:
        return Message(kept, reply_to=message)
    reply = call_next(message, context)
    if reply.has_content():
        store.keep_reply(request.digest, reply.content)
    return reply


def query(message: Message, context: Context) -> Message:
    from clients import node

    return Message(node.enrol(message, context), reply_to=message)


def train(message: Message, context: Context) -> Message:
    from clients import node

    return Message(node.train(message, context), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    from clients import node

    return Message(node.evaluate(message, context), reply_to=message)


def client_app(*innermost: Mod, replying: Sequence[Mod] = (), outermost: Sequence[Mod] = ()) -> ClientApp:
    """Our ClientApp.  An engine that simulates adds Mods of its own to training, as it adds attackers.

    `innermost` Mods change what training gives; `replying` ones see and change what the node would reply in clear, its
    momentum; `outermost` ones what it sends.
    """
    app = ClientApp(mods=[policy_mod])
    app.query()(query)
    inside = [*replying, momentum_mod, *innermost]
    app.train(mods=[*outermost, replay_mod, secagg_mod, remember_mod, *inside])(train)
    app.evaluate(mods=[replay_mod, secagg_mod, remember_mod])(evaluate)
    return app


app = client_app()
