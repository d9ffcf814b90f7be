"""ClientApps for worker processes, which import them by name.  Not tests."""

from __future__ import annotations

import os
import threading

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
"""Says in which process it ran and how often its node was asked; partition 1 dies, partition 2 cannot be sent home."""


@app.train()
def train(message: Message, context: Context) -> Message:
    index = int(context.node_config["partition-id"])
    if index == 1:
        os._exit(7)
    if index == 2:
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_lock"] = threading.Lock()
        return reply
    return _counted(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _counted(message, context)


def _counted(message: Message, context: Context) -> Message:
    state = context.state.config_records.setdefault("memory", ConfigRecord({"asked": 0}))
    state["asked"] = int(state["asked"]) + 1  # type: ignore[arg-type]
    return Message(RecordDict({"told": ConfigRecord({"pid": os.getpid(), "asked": state["asked"]})}), reply_to=message)
