"""The ServerApp, as in Flower's quickstart but for the strategy."""

import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from stock_app.task import Net
from strategies import robust

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    num_rounds = context.run_config["num-server-rounds"]
    lr = context.run_config["learning-rate"]

    torch.manual_seed(0)
    global_model = Net()
    arrays = ArrayRecord(global_model.state_dict())

    # in Flower's quickstart: strategy = FedAvg(fraction_train=context.run_config["fraction-train"])
    strategy = robust(num_byzantine=context.run_config["num-byzantine"], fraction=context.run_config["fraction-train"])

    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=num_rounds,
    )

    if context.run_config["result"]:
        found = {"accuracy": result.evaluate_metrics_clientapp[num_rounds]["eval_acc"], "arrays": len(result.arrays)}
        with open(context.run_config["result"], "w") as file:
            json.dump(found, file)
