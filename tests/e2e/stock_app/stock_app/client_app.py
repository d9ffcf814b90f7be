"""The ClientApp, as in Flower's quickstart."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from stock_app.task import Net, load_data
from stock_app.task import test as test_fn
from stock_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition_id = context.node_config["partition-id"]
    trainset, _ = load_data(partition_id, context.node_config["num-partitions"])
    train_loss = train_fn(model, trainset, context.run_config["local-epochs"], msg.content["config"]["lr"])

    state = model.state_dict()
    if partition_id < context.run_config["liars"]:  # the first nodes lie: what the strategy is for
        state = {name: torch.full_like(value, 30.0) for name, value in state.items()}
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(trainset[1])})
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, testset = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    eval_loss, eval_acc = test_fn(model, testset)
    metrics = MetricRecord({"eval_loss": eval_loss, "eval_acc": eval_acc, "num-examples": len(testset[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
