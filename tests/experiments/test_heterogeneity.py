"""FedProx, a head that stays at the node, fine-tuning: each by hand, then in a run, then together."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

import sectors
from clients import identity, node
from clients.store import NodeStore
from conf.load import load
from conf.schema import HeterogeneityConfig, NodeTask, OptimizerName, RunConfig, TrainingConfig
from experiments.simulate import simulate
from sectors import training
from sectors.base import Place, Rows, Sector, num_rows, place_of
from sectors.params import initial_arrays
from server import build
from server.folder import RunFolder
from server.run import RunResult
from server.versions import load_predictor, read_version
from trellis import wire
from trellis.errors import ConfigError, ResumeError
from trellis.types import RoundRecord
from trellis.vectors import Arrays, Layout, digest

SMALL = (
    "sector=healthcare_wisconsin",
    "data=synthetic",
    "sector.options.synthetic_rows=200",
    "sector.options.hidden=[4]",
    "tracking=none",
)
NODES = ("north", "south", "west")
HEAD = ("head.weight", "head.bias")

SECTOR = sectors.get("healthcare_wisconsin", {"hidden": [4]})
DATA = SECTOR.load(Place(0, 3, synthetic=True))
PARAMS = initial_arrays(SECTOR, 0)
EVERYTHING = 100_000
STEP = TrainingConfig(batch_size=EVERYTHING, epochs=1, lr=0.5)


@cache
def composed(*overrides: str) -> RunConfig:
    """A configuration, composed once: it is only read."""
    return load([*SMALL, *overrides])


@pytest.fixture
def ran(simulated_once: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """`ran(*overrides)`: the small run with them, made once."""
    return partial(simulated_once, *SMALL)


Ran = Callable[..., RunResult]


def records(result: RunResult) -> list[RoundRecord]:
    return RunFolder(Path(result.run_dir)).records()


def final(result: RunResult) -> dict[str, Any]:
    return read_version(Path(str(result.model_path)))[0]


# ---------------------------------------------------------------- fedprox, by hand


def gradient(sector: Sector, params: Arrays, rows: Rows) -> dict[str, np.ndarray]:
    """Of the mean loss over the rows, by torch and nothing of ours."""
    model = sector.build_model()
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in params.items()})
    batch = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in rows.items()}
    sector.losses(sector.forward(model, batch), batch).mean().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def prox(mu: float, config: TrainingConfig = STEP, sector: Sector = SECTOR, seed: int = 1) -> training.Trained:
    return training.train(sector, config, PARAMS, DATA.train, seed=seed, proximal_mu=mu)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_each_step_goes_against_the_gradient_and_the_way_from_the_start(mu: float) -> None:
    lr, steps = 0.5, 3
    p = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    for _ in range(steps):
        g = gradient(SECTOR, {k: v.astype(np.float32) for k, v in p.items()}, DATA.train)
        p = {k: p[k] - lr * (g[k] + mu * (p[k] - PARAMS[k])) for k in p}
    found = prox(mu, TrainingConfig(batch_size=EVERYTHING, epochs=steps, lr=lr)).arrays
    plain = prox(0.0, TrainingConfig(batch_size=EVERYTHING, epochs=steps, lr=lr)).arrays
    for name in p:
        assert np.allclose(found[name], p[name], atol=2e-6)
    assert any(np.abs(found[name] - plain[name]).max() > 1e-4 for name in p), "the pull is felt"


def test_momentum_and_weight_decay_act_on_the_pulled_gradient() -> None:
    lr, mu, beta, decay = 0.3, 0.5, 0.9, 0.01
    p, m = {k: v.astype(np.float64) for k, v in PARAMS.items()}, dict.fromkeys(PARAMS, 0.0)
    for _ in range(3):
        g = gradient(SECTOR, {k: v.astype(np.float32) for k, v in p.items()}, DATA.train)
        m = {k: beta * m[k] + g[k] + mu * (p[k] - PARAMS[k]) + decay * p[k] for k in p}
        p = {k: p[k] - lr * m[k] for k in p}
    config = TrainingConfig(batch_size=EVERYTHING, epochs=3, lr=lr, momentum=beta, weight_decay=decay)
    found = prox(mu, config).arrays
    assert all(np.allclose(found[k], p[k], atol=5e-6) for k in p)


def test_the_first_step_feels_no_pull() -> None:
    assert digest(prox(0.7).arrays) == digest(prox(0.0).arrays)


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_without_a_pull_not_a_bit_changes(optimizer: OptimizerName) -> None:
    config = TrainingConfig(batch_size=16, epochs=2, lr=0.05, optimizer=optimizer, momentum=0.5)
    plain = training.train(SECTOR, config, PARAMS, DATA.train, seed=1)
    zero = prox(0.0, config)
    assert digest(zero.arrays) == digest(plain.arrays)
    assert zero.loss == plain.loss


def test_the_stronger_the_pull_the_smaller_the_update() -> None:
    config = TrainingConfig(batch_size=16, epochs=5, lr=0.05)
    layout = Layout.of(PARAMS)
    lengths = [float(np.linalg.norm(layout.subtract(prox(mu, config).arrays, PARAMS))) for mu in (0, 0.1, 1, 10, 19)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.15 * lengths[0]


def test_the_loss_that_is_reported_is_that_of_the_rows() -> None:
    config = TrainingConfig(batch_size=EVERYTHING, epochs=2, lr=0.5)
    after = training.train(SECTOR, STEP, PARAMS, DATA.train, seed=1)
    counts = training.evaluate(SECTOR, after.arrays, DATA.train)
    assert prox(5.0, config).loss == pytest.approx(float(counts["loss_sum"]) / num_rows(DATA.train), rel=1e-5)


def test_layers_that_stay_at_the_node_are_not_pulled() -> None:
    sector = sectors.get("healthcare_wisconsin", {"hidden": [4], "local_layers": ["head"]})
    lr, mu = 0.5, 1.5
    p = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    for _ in range(3):
        g = gradient(SECTOR, {k: v.astype(np.float32) for k, v in p.items()}, DATA.train)
        p = {k: p[k] - lr * (g[k] + (0.0 if k in HEAD else mu) * (p[k] - PARAMS[k])) for k in p}
    found = prox(mu, TrainingConfig(batch_size=EVERYTHING, epochs=3, lr=lr), sector).arrays
    assert all(np.allclose(found[k], p[k], atol=2e-6) for k in p)


# ---------------------------------------------------------------- fedprox, in a run


def test_no_pull_is_the_run_without_fedprox_and_a_strong_one_stays_near(ran: Ran) -> None:
    plain = ran("rounds=2")
    zero = ran("rounds=2", "heterogeneity=fedprox", "heterogeneity.proximal_mu=0")
    strong = ran("rounds=2", "heterogeneity=fedprox", "heterogeneity.proximal_mu=8")
    assert (zero.model_digest, zero.metrics) == (plain.model_digest, plain.metrics)
    one, other = records(strong)[0], records(plain)[0]
    assert all(one.update_norms[name] < 0.7 * other.update_norms[name] for name in NODES)


def test_a_node_does_in_a_run_what_training_does_by_hand(ran: Ran) -> None:
    result = ran("rounds=2", "heterogeneity=fedprox", "heterogeneity.proximal_mu=8")
    config = composed("heterogeneity=fedprox", "heterogeneity.proximal_mu=8")
    sector, task = build.build_sector(config), NodeTask.of(config)
    base = initial_arrays(sector, 0)
    steps = []
    for spec in config.nodes.expand():
        trained = node.trained_on(task, base, sector.load(place_of(spec, task)).train, round=1, name=spec.name)
        steps.append(Layout.of(base).subtract(trained.arrays, base))
    norms = records(result)[0].update_norms
    assert [norms[name] for name in NODES] == pytest.approx([np.linalg.norm(s) for s in steps], rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("proximal_mu=-1", "heterogeneity.proximal_mu is -1"),
        ("proximal_mu=.inf", "heterogeneity.proximal_mu is inf"),
        ("fine_tune_epochs=-1", "heterogeneity.fine_tune_epochs is -1"),
        ("fine_tune_lr=0", "heterogeneity.fine_tune_lr is 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, message: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ConfigError, match=message):
        HeterogeneityConfig(**{name: float(value.removeprefix(".")) if "." in value else int(value)})  # type: ignore[arg-type]


# ---------------------------------------------------------------- a head of one's own


def heads(result: RunResult) -> dict[str, Any]:
    """What each node keeps after the last round."""
    return {
        name: NodeStore(Path(result.run_dir) / "nodes" / name).local("none of them", run=result.run_id)
        for name in NODES
    }


def test_the_head_stays_at_its_node(ran: Ran) -> None:
    result, plain = ran("rounds=2", "heterogeneity=local_head"), ran("rounds=2")
    assert set(final(plain)) - set(final(result)) == set(HEAD)
    kept = heads(result)
    assert all(set(head) == set(HEAD) for head in kept.values())
    assert len({digest(head) for head in kept.values()}) == 3, "each node's own"
    # five numbers a node, each way, and their headers
    assert result.bytes_up < plain.bytes_up
    assert result.bytes_down < plain.bytes_down
    card = load_predictor(Path(str(result.model_path))).card
    assert card.local_layers == HEAD
    assert card.num_params == sum(a.size for a in final(plain).values()) - 5


def test_nodes_score_the_shared_body_with_their_own_head(ran: Ran) -> None:
    result = ran("rounds=2", "heterogeneity=local_head")
    config = composed("heterogeneity=local_head")
    sector, task = build.build_sector(config), NodeTask.of(config)
    kept, closing = heads(result), records(result)[-1]
    for spec in config.nodes.expand():
        own = {**final(result), **kept[spec.name]}
        params = {name: own[name] for name in initial_arrays(sector, 0)}
        counts = training.evaluate(sector, params, sector.load(place_of(spec, task)).test)
        expected = build.scoring(sector).metrics(counts)
        assert closing.node_metrics[spec.name]["test/loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert result.nodes[spec.name]["federated"] == pytest.approx(expected["auc"])
    other = records(ran("rounds=2"))[-1].node_metrics
    assert all(closing.node_metrics[name]["test/loss"] != other[name]["test/loss"] for name in NODES)


def test_patterns_name_tensors_and_head_names_the_sectors_last_layers(ran: Ran) -> None:
    by_name = ran("rounds=2", "heterogeneity.local_layers=[head.weight,'*.bias']")
    assert set(final(by_name)) == {"body.0.weight"}
    spelled = ran("rounds=2", "heterogeneity.local_layers=['head.*']")
    assert digest(final(spelled)) == digest(final(ran("rounds=2", "heterogeneity=local_head")))


@pytest.mark.parametrize("layers", ["[nothing.*]", "['*']", "[head,'body.*']", "['']"])
def test_layers_that_leave_nothing_to_share_or_to_keep_are_refused_with_the_names(layers: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate([*SMALL, f"heterogeneity.local_layers={layers}", f"runs_dir={tmp_path}"])
    message = str(caught.value)
    assert message.startswith("heterogeneity.local_layers=[")
    for name in ("body.0.weight", "body.0.bias", *HEAD, "its head is head.*"):
        assert name in message
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_names_no_tensor_is_refused_beside_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"boddy\.\*"):
        build.build_sector(composed("heterogeneity.local_layers=[head,'boddy.*']"))


def test_a_resumed_run_goes_on_with_every_nodes_head(ran: Ran, tmp_path: Path) -> None:
    options = [*SMALL, "heterogeneity=local_head", f"runs_dir={tmp_path}"]
    simulate([*options, "rounds=1", "run_name=short"])
    longer = simulate(["resume=short", "rounds=2", f"runs_dir={tmp_path}"])
    whole = ran("rounds=2", "heterogeneity=local_head")
    assert (longer.model_digest, longer.metrics, longer.nodes) == (whole.model_digest, whole.metrics, whole.nodes)
    assert {n: digest(h) for n, h in heads(longer).items()} == {n: digest(h) for n, h in heads(whole).items()}


# ---------------------------------------------------------------- fine-tuning


TUNE = ("rounds=2", "heterogeneity=fine_tune")


def test_fine_tuning_leaves_the_global_model_as_it_is_and_tells_both_scores(ran: Ran) -> None:
    tuned, plain = ran(*TUNE), ran("rounds=2")
    assert tuned.model_digest == plain.model_digest
    assert {k: v for k, v in tuned.metrics.items() if not k.startswith("test_tuned/")} == plain.metrics
    assert {f"test_tuned/{k}" for k in ("auc", "ap", "accuracy", "loss")} <= set(tuned.metrics)
    assert {name: scores["federated"] for name, scores in tuned.nodes.items()} == {
        name: scores["federated"] for name, scores in plain.nodes.items()
    }
    assert all(set(scores) == {"federated", "tuned"} for scores in tuned.nodes.values())
    assert all(set(scores) == {"federated"} for scores in plain.nodes.values())
    assert tuned.primary_metric == plain.primary_metric, "the run is judged by the shared model"
    assert json.loads((Path(tuned.run_dir) / "result.json").read_text())["nodes"] == tuned.nodes


def test_the_tuned_score_is_that_of_training_by_hand(ran: Ran) -> None:
    result = ran(*TUNE)
    config = composed(*TUNE)
    sector, task = build.build_sector(config), NodeTask.of(config)
    recipe = config.sector.training
    params, closing = final(result), records(result)[-1]
    for spec in config.nodes.expand():
        data = sector.load(place_of(spec, task))
        tuned = node.tuned_on(task, params, data.train, name=spec.name)
        counts = training.evaluate(sector, tuned, data.test)
        assert closing.node_metrics[spec.name]["test_tuned/loss"] == pytest.approx(
            float(counts["loss_sum"]) / num_rows(data.test)
        )
        loss = [float(training.evaluate(sector, p, data.train)["loss_sum"]) for p in (params, tuned)]
        assert loss[1] < loss[0]
    assert (task.fine_tune_epochs, task.fine_tune_lr, recipe.epochs) == (5, None, 2)


def test_another_learning_rate_tunes_otherwise_and_the_training_is_the_same(ran: Ran) -> None:
    slow = ran(*TUNE, "heterogeneity.fine_tune_lr=0.000001")
    assert slow.model_digest == ran(*TUNE).model_digest
    assert slow.metrics["test_tuned/loss"] == pytest.approx(slow.metrics["test/loss"], abs=1e-4)
    assert abs(ran(*TUNE).metrics["test_tuned/loss"] - slow.metrics["test/loss"]) > 1e-3


def test_a_repeated_closing_evaluation_finds_the_same(ran: Ran) -> None:
    first = ran(*TUNE)
    # other answers than those kept: the nodes tune once more
    for store in (Path(first.run_dir) / "nodes").iterdir():
        (store / "reply.bin").unlink()
    again = simulate([f"resume={first.run_dir}"])
    assert (again.model_digest, again.metrics, again.nodes) == (first.model_digest, first.metrics, first.nodes)


def test_only_the_last_model_is_tuned(ran: Ran) -> None:
    for record in records(ran(*TUNE))[:-1]:
        assert not [k for metrics in record.node_metrics.values() for k in metrics if k.startswith("test_tuned")]


def test_a_node_is_tuned_on_no_more_rows_than_the_recipe_and_its_policy_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    train = training.train

    def watched(*arguments: Any, **more: Any) -> training.Trained:
        found = train(*arguments, **more)
        used.append(found.num_examples)
        return found

    monkeypatch.setattr(training, "train", watched)
    items = f"nodes.items=[{', '.join(f'{{name: {n}, policy: {{max_examples: 20}}}}' for n in NODES)}]"
    few = [*SMALL, "rounds=1", "heterogeneity=fine_tune", items, f"runs_dir={tmp_path}"]
    result = simulate([*few, "sector.training.max_examples=20"])
    assert result.refusals == []
    assert used == [20] * 6, "three trainings and three tunings"
    used.clear()
    refused = simulate(few)
    assert used == [], "a node whose policy forbids so many rows tunes as little as it trains"
    assert [(r["round"], r["node"], r["reason"]) for r in refused.refusals] == [
        (round_, name, "policy.max_examples") for round_ in (1, 2) for name in NODES
    ]
    assert refused.nodes == {}


# ---------------------------------------------------------------- a node that lies about its scores


def without_test_rows(message: Message, context: Context) -> RecordDict:
    """A closing evaluation in which south says it has no test rows, and scores its tuned model on some."""
    reply = _evaluate(message, context)
    counts = reply.array_records.get(wire.COUNTS)
    if identity.of(context).spec.name == "south" and counts is not None and "test_tuned/rows" in counts:
        arrays = wire.from_record(counts)
        reply[wire.COUNTS] = wire.to_record({k: v * 0 if k.startswith("test/") else v for k, v in arrays.items()})
    return reply


_evaluate = node.evaluate


def test_a_liar_about_its_test_rows_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "evaluate", without_test_rows)
    result = simulate([*SMALL, "rounds=1", "heterogeneity=fine_tune", f"runs_dir={tmp_path}"])
    assert {"north", "west"} <= set(result.nodes)


# ---------------------------------------------------------------- together


def test_all_three_at_once(ran: Ran, tmp_path: Path) -> None:
    together = (
        "rounds=2",
        "heterogeneity=local_head",
        "heterogeneity.proximal_mu=8",
        "heterogeneity.fine_tune_epochs=2",
    )
    result = ran(*together)
    assert result.refusals == []
    assert all(set(scores) == {"federated", "tuned"} for scores in result.nodes.values())
    assert set(final(result)) == {"body.0.weight", "body.0.bias"}
    one, other = records(result)[0], records(ran("rounds=2", "heterogeneity=local_head"))[0]
    assert all(one.update_norms[name] < other.update_norms[name] for name in NODES)
    simulate([*SMALL, *together, "rounds=1", f"runs_dir={tmp_path}", "run_name=short"])
    again = simulate(["resume=short", "rounds=2", f"runs_dir={tmp_path}"])
    assert (again.model_digest, again.metrics, again.nodes) == (result.model_digest, result.metrics, result.nodes)


def test_the_settings_are_part_of_what_a_run_is(ran: Ran) -> None:
    folder = ran("rounds=2").run_dir
    for setting in ("heterogeneity=fedprox", "heterogeneity.local_layers=[head]"):
        with pytest.raises(ResumeError, match="would make it another run"):
            simulate([f"resume={folder}", setting])


def test_held_out_nodes_have_no_rows_to_tune_on(tmp_path: Path) -> None:
    held_out = ["nodes=cross_device", "nodes.count=10", "nodes.held_out.validation=0.2", "nodes.held_out.test=0.2"]
    whole = ["nodes.template.link.availability=1.0", "rounds=1", f"runs_dir={tmp_path}"]
    result = simulate([*SMALL, *held_out, *whole, "heterogeneity=fine_tune"])
    assert result.refusals == []
    assert result.metrics["test_tuned/loss"] == result.metrics["test/loss"]
