"""A strategy of ours in a stock Flower app: one line is another, and liars are survived."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import strategies
from experiments.engines.local import LocalGrid
from strategies import mean, multi_krum, ready, robust, rules, trimmed_mean
from strategies.flower import RoundStrategy
from trellis import wire
from trellis.errors import ConfigError
from trellis.types import NodeInfo

STOCK_APP = Path(__file__).parent / "stock_app"


@pytest.mark.slow
def test_a_stock_app_runs_with_a_robust_strategy_under_flwr_run(flwr_run: Callable[..., None], tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    flwr_run(STOCK_APP, f"result='{result}'", num_nodes=7, until=result)
    # two of seven nodes reply params of 30 every round: the mean of that tells nothing apart
    assert json.loads(result.read_text()) == {"accuracy": pytest.approx(1.0, abs=0.05), "arrays": 4}


def test_nothing_but_the_strategys_line_is_ours() -> None:
    ours = [path for path in STOCK_APP.rglob("*.py") if "strategies" in path.read_text()]
    assert [path.name for path in ours] == ["server_app.py"]
    lines = [line for line in ours[0].read_text().splitlines() if "strategies" in line or "robust(" in line]
    assert len(lines) == 2


def liars(num_liars: int) -> ClientApp:
    """Node i moves w to 1 + i / 100; the first lie."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        target = 500.0 if index < num_liars else 1 + index / 100
        arrays = {"w": np.full(3, target, np.float32)}
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": wire.to_record(arrays), "metrics": metrics}), reply_to=message)

    return app


START = wire.to_record({"w": np.zeros(3, np.float32)})


@pytest.mark.parametrize("name", [name for name in rules.RULES if name not in ("mean", "foolsgold")])
def test_every_ready_strategy_survives_two_liars_of_eleven_where_fedavg_does_not(name: str) -> None:
    reference = {"reference": lambda state: np.full(3, 1.05, np.float32)} if name == "fltrust" else {}
    strategy = ready.READY[name](num_byzantine=2, **reference)  # type: ignore[arg-type]
    assert isinstance(strategy, RoundStrategy)
    found = strategy.start(LocalGrid(liars(2), 11), START, num_rounds=1).arrays["w"].numpy()
    # one round of centered clipping from 0 goes as far as the median length a step
    assert np.abs(found - 1.06).max() < 0.3
    theirs = FedAvg(fraction_evaluate=0, min_available_nodes=11).start(LocalGrid(liars(2), 11), START, num_rounds=1)
    assert theirs.arrays["w"].numpy().min() > 50


def test_a_node_that_leaves_does_not_hold_up_the_others_for_ever() -> None:
    class Leaving(LocalGrid):
        """Of five nodes one is gone after the first round."""

        def get_node_ids(self) -> Iterable[int]:
            ids = list(super().get_node_ids())
            return ids[:4] if self.asked else ids

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            self.asked = True
            return super().push_messages(messages)

    grid = Leaving(liars(1), 5)
    grid.asked = False
    closed: list[bool] = []
    strategy = trimmed_mean(num_byzantine=2)
    strategy.commit = lambda state, record: closed.append(record.closed is not None)
    strategy.start(grid, START, num_rounds=3, timeout=60)
    assert closed[:3] == [False, True, True]
    assert grid.clock.now() < 4 * 60 + 10, "it waited the timeout, in virtual time, and went on"


def test_a_fraction_waits_for_as_many_as_its_cohorts_need() -> None:
    strategy = trimmed_mean(num_byzantine=2, fraction=0.5)
    nodes = [NodeInfo(str(i), i) for i in range(10)]
    assert [strategy._enough(nodes[:n]) for n in (5, 8, 9, 10)] == [False, False, True, True]


def test_options_of_the_rule_are_keywords_and_preaggregators_names() -> None:
    strategy = multi_krum(num_byzantine=2, num_selected=3, preaggregators=["arc", "nnm"], fraction=0.5, min_replies=4)
    assert strategy.rule_options == {"num_selected": 3}
    assert [spec.name for spec in strategy.preaggregators] == ["arc", "nnm"]
    assert strategy.min_replies == 4
    for wrong, reason in (
        (lambda: trimmed_mean(num_selected=3), r"rule=trimmed_mean has no options \['num_selected'\]"),
        (lambda: mean(num_byzantine=1), r"rule=mean tolerates no liar"),
        (lambda: robust(preaggregators=["magic"]), r"no preaggregator 'magic'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            wrong()


def test_every_rule_is_ready_and_the_maths_needs_no_flower() -> None:
    assert set(ready.READY) == set(rules.RULES) == set(strategies.__all__)
    with pytest.raises(AttributeError, match="magic"):
        _ = strategies.magic
    code = "import sys, strategies.rules; print('flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
