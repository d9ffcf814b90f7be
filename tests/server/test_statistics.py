"""The statistics round, whole: asked once, of training nodes, believed within limits, and kept with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import sectors
from clients import identity, node
from conf.load import load
from conf.schema import NodeTask, RunConfig
from experiments.engines.local import LocalGrid
from experiments.simulate import simulate
from sectors.base import NodeData, concatenate, num_rows, place_of
from sectors.healthcare_heart import HealthcareHeart
from server import run as server_run
from server import statistics
from server.folder import RunFolder
from server.run import RunResult
from server.versions import load_predictor, read_version
from trellis import wire
from trellis.errors import CohortTooSmall, ResumeError
from trellis.types import Request, Role

HEART = (
    "sector=healthcare_heart",
    "data=synthetic",
    "sector.options.partition=uniform",
    "sector.options.synthetic_rows=300",
    "tracking=none",
)
PILOT = (*HEART, "nodes=pilot")
CENTRE = [54.0, 132.0, 245.0, 138.0, 0.9, 0.7]
SCALE = [9.0, 19.0, 60.0, 26.0, 1.1, 0.9]
GIVEN = (f"sector.options.centre={CENTRE}", f"sector.options.scale={SCALE}")


@cache
def composed(*overrides: str) -> RunConfig:
    """A configuration, composed once: it is only read."""
    return load(overrides)


def data_of(config: RunConfig, sector: Any) -> dict[str, NodeData]:
    task = NodeTask.of(config)
    return {spec.name: sector.load(place_of(spec, task)) for spec in config.nodes.expand()}


def mean_and_deviation(overrides: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of the numbers in all training rows, by numpy."""
    config = composed(*overrides)
    nodes = data_of(config, sectors.get(config.sector.name, config.sector.options))
    x = concatenate([data.train for data in nodes.values()])["x"][:, :6].astype(np.float64)
    return np.nanmean(x, axis=0), np.nanstd(x, axis=0)


def kept(run: RunResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run.run_dir) / "statistics.json").read_bytes())
    return found


Asked = list[tuple[str, str]]


@contextmanager
def watched() -> Iterator[Asked]:
    """(purpose, name of the node) of every request that is sent."""
    asked: Asked = []
    push = LocalGrid.push_messages

    def watching(self: LocalGrid, messages: Any) -> Any:
        many = list(messages)
        for message in many:
            request = wire.read_request(message)
            if request is not None:
                context = self._contexts[message.metadata.dst_node_id]
                asked.append((request.purpose, identity.of(context).spec.name))
        return push(self, many)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGrid, "push_messages", watching)
        yield asked


def of_statistics(asked: Asked) -> list[str]:
    return sorted(name for purpose, name in asked if purpose == "statistics")


@pytest.fixture
def ran(simulated_once: Callable[..., RunResult]) -> Callable[..., RunResult]:
    """`ran(*overrides)`: the run, made once."""
    return simulated_once


Ran = Callable[..., RunResult]


# ---------------------------------------------------------------- what is fitted


def test_a_run_is_fitted_on_the_training_rows_of_all_nodes(ran: Ran) -> None:
    found = kept(ran(*PILOT, "rounds=2"))
    mean, deviation = mean_and_deviation(PILOT)
    assert found["options"]["centre"] == pytest.approx(mean)
    assert found["options"]["scale"] == pytest.approx(deviation)
    assert found["nodes"] == ["north", "south", "west"]
    config = composed(*PILOT)
    nodes = data_of(config, sectors.get(config.sector.name, config.sector.options))
    assert found["rows"] == sum(num_rows(data.train) for data in nodes.values())


def test_every_node_is_asked_once_before_anything_is_trained(tmp_path: Path) -> None:
    with watched() as asked:
        simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    purposes = [purpose for purpose, _ in asked]
    assert purposes == ["statistics"] * 3 + ["train"] * 3 + ["evaluate"] * 3
    assert of_statistics(asked) == ["north", "south", "west"]


def test_the_order_in_which_nodes_answer_does_not_matter(ran: Ran) -> None:
    latencies = (("north", 900), ("south", 500), ("west", 1))
    items = ",".join(f"{{name: {name}, link: {{latency_ms: {ms}}}}}" for name, ms in latencies)
    reversed_ = ran(*PILOT, "rounds=2", f"nodes.items=[{items}]")
    assert kept(reversed_) == kept(ran(*PILOT, "rounds=2"))
    assert reversed_.model_digest == ran(*PILOT, "rounds=2").model_digest


def test_held_out_nodes_are_not_asked(tmp_path: Path) -> None:
    held_out = ("nodes=cross_device", "nodes.count=10", "nodes.held_out.validation=0.2", "nodes.held_out.test=0.2")
    overrides = [*HEART, *held_out, "nodes.template.link.availability=1.0", "rounds=1"]
    with watched() as asked:
        result = simulate([*overrides, f"runs_dir={tmp_path}"])
    trainers = [s.name for s in composed(*overrides).nodes.expand() if s.role is Role.train]
    assert len(trainers) == 6
    assert of_statistics(asked) == trainers == kept(result)["nodes"]
    mean, deviation = mean_and_deviation(tuple(overrides))
    assert kept(result)["options"]["centre"] == pytest.approx(mean)
    assert kept(result)["options"]["scale"] == pytest.approx(deviation)


def test_given_constants_are_not_measured_again(tmp_path: Path) -> None:
    with watched() as asked:
        result = simulate([*PILOT, *GIVEN, "rounds=1", f"runs_dir={tmp_path}"])
    assert of_statistics(asked) == []
    assert not (Path(result.run_dir) / "statistics.json").exists()
    sector = load_predictor(Path(str(result.model_path))).sector
    assert (sector.centre, sector.scale) == (tuple(CENTRE), tuple(SCALE))  # type: ignore[attr-defined]


def test_the_fitted_values_given_as_constants_make_the_same_model(ran: Ran) -> None:
    options = kept(ran(*PILOT, "rounds=2"))["options"]
    given = [f"sector.options.{k}={[float(v) for v in values]}" for k, values in options.items()]
    assert ran(*PILOT, "rounds=2", *given).model_digest == ran(*PILOT, "rounds=2").model_digest


def test_a_sector_with_nothing_to_fit_asks_nobody(tmp_path: Path) -> None:
    with watched() as asked:
        result = simulate(["data=synthetic", "rounds=1", "tracking=none", f"runs_dir={tmp_path}"])
    assert of_statistics(asked) == []
    assert not (Path(result.run_dir) / "statistics.json").exists()


# ---------------------------------------------------------------- the model and its card


def test_a_version_predicts_with_the_fitted_scaler(ran: Ran) -> None:
    result = ran(*PILOT, "rounds=2")
    path = Path(str(result.model_path))
    predictor = load_predictor(path)
    options = kept(result)["options"]
    assert predictor.card.options["centre"] == options["centre"]
    table = HealthcareHeart(synthetic_rows=50, split_seed=5).generate()
    params, _ = read_version(path)
    x = HealthcareHeart().features(table)["x"].astype(np.float32)
    numbers = np.nan_to_num((x[:, :6] - np.float32(options["centre"])) / np.float32(options["scale"]))
    hidden = np.tanh(np.hstack([numbers, x[:, 6:]]) @ params["body.0.weight"].T + params["body.0.bias"])
    logits = (hidden @ params["head.weight"].T + params["head.bias"])[:, 0]
    assert predictor.predict(table) == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-5)


def test_the_first_version_has_the_fitted_scaler_too(ran: Ran) -> None:
    folder = RunFolder(Path(ran(*PILOT, "rounds=2").run_dir))
    cards = [load_predictor(folder.version_path(r)).card for r in range(3)]
    assert len({json.dumps(card.options, sort_keys=True) for card in cards}) == 1


def test_a_card_names_the_configuration_of_its_run(ran: Ran) -> None:
    result = ran(*PILOT, "rounds=2")
    started = json.loads((Path(result.run_dir) / "config.json").read_bytes())["config_digest"]
    assert load_predictor(Path(str(result.model_path))).card.config_digest == started


# ---------------------------------------------------------------- resume


def test_a_run_killed_after_the_statistics_asks_nobody_again(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(*arguments: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(server_run, "_restored", dies)
        with pytest.raises(Killed):
            simulate([*PILOT, "rounds=2", f"runs_dir={tmp_path}", "run_name=cut"])
    assert (tmp_path / "cut" / "statistics.json").exists()
    with watched() as asked:
        result = simulate(["resume=cut", f"runs_dir={tmp_path}"])
    assert of_statistics(asked) == []
    whole = ran(*PILOT, "rounds=2")
    assert (result.model_digest, result.metrics) == (whole.model_digest, whole.metrics)
    assert kept(result)["options"] == kept(whole)["options"]


def test_a_run_killed_before_its_statistics_were_written_gets_the_same_answers(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    measure = node.statistics

    def counted(message: Message, context: Context) -> RecordDict:
        computed.append(identity.of(context).spec.name)
        return measure(message, context)

    monkeypatch.setattr(node, "statistics", counted)
    write = RunFolder.write_json

    def dies(self: RunFolder, path: Path, value: Any) -> None:
        if path == self.statistics_path:
            raise KeyboardInterrupt
        write(self, path, value)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            simulate([*PILOT, "rounds=2", f"runs_dir={tmp_path}", "run_name=cut"])
    result = simulate(["resume=cut", f"runs_dir={tmp_path}"])
    assert sorted(computed) == ["north", "south", "west"], "the second question is answered from the nodes' stores"
    assert result.model_digest == ran(*PILOT, "rounds=2").model_digest


def test_a_lengthened_run_asks_nobody_again_and_ends_where_a_longer_one_does(ran: Ran, tmp_path: Path) -> None:
    simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}", "run_name=short"])
    with watched() as asked:
        result = simulate(["resume=short", "rounds=2", f"runs_dir={tmp_path}"])
    assert of_statistics(asked) == []
    whole = ran(*PILOT, "rounds=2")
    assert (result.model_digest, result.metrics) == (whole.model_digest, whole.metrics)


def test_damaged_statistics_are_refused_with_their_file(tmp_path: Path) -> None:
    result = simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}", "run_name=torn"])
    path = Path(result.run_dir) / "statistics.json"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ResumeError, match=r"statistics\.json is damaged"):
        simulate(["resume=torn", "rounds=2", f"runs_dir={tmp_path}"])


# ---------------------------------------------------------------- liars

Lie = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@contextmanager
def lying(lie: Lie, *names: str) -> Iterator[None]:
    """Nodes that answer the statistics round with other numbers than their own."""
    measure = node.statistics

    def tell(message: Message, context: Context) -> RecordDict:
        reply = measure(message, context)
        if identity.of(context).spec.name in names:
            honest = {k: v.copy() for k, v in wire.from_record(reply.array_records[wire.COUNTS]).items()}
            reply[wire.COUNTS] = wire.to_record(lie({k: np.array(v) for k, v in honest.items()}))
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "statistics", tell)
        yield


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Lie:
    return lambda counts: {**counts, f"train/{name}": np.asarray(change(counts[f"train/{name}"]))}


LIES: dict[str, tuple[Lie, str]] = {
    "another shape": (changed("sums", lambda v: v[:3]), "wrong_shape"),
    "another dtype": (changed("sums", lambda v: v.astype(np.float32)), "wrong_dtype"),
    "not a number": (changed("sums", lambda v: v * np.nan), "counts"),
    "infinite": (changed("squares", lambda v: v + np.inf), "counts"),
    "negative": (changed("sums", lambda v: -v), "counts"),
    "more than its rows allow": (changed("sums", lambda v: v * 0 + 1e6), "counts"),
    "more known than there are rows": (changed("known", lambda v: v * 7), "counts"),
    "more rows than it registered": (changed("rows", lambda v: v * 1000), "num_examples"),
    "a statistic less": (lambda counts: {k: v for k, v in counts.items() if k != "train/sums"}, "counts"),
    "a statistic more": (lambda counts: {**counts, "train/secret": np.zeros(2)}, "counts"),
    "nothing": (lambda counts: {}, "counts"),
}


@cache
def options_without(name: str) -> dict[str, list[float]]:
    config = composed(*PILOT)
    sector = sectors.get(config.sector.name, config.sector.options)
    each = [sector.all_statistics(d.train) for n, d in data_of(config, sector).items() if n != name]
    return sector.fit({k: sum((c[k] for c in each[1:]), start=each[0][k]) for k in each[0]})


def asked_alone(names: tuple[str, ...], lie: Lie, folder: Path, **settings: Any) -> tuple[dict[str, Any], Any]:
    """`statistics.fitted` over a grid of its own, without a run around it.  -> what was kept, what exchange refused"""
    from clients.app import app
    from server import build, registry
    from strategies.exchange import PlainExchange, door

    config = composed(*PILOT, *(f"{k}={v}" for k, v in settings.items()))
    sector = build.check(config)
    refused: list[Any] = []
    collect = PlainExchange.collect

    def watching(self: PlainExchange, request: Request, *arguments: Any, **more: Any) -> Any:
        found = collect(self, request, *arguments, **more)
        refused.extend(found.refusals)
        return found

    grid = LocalGrid(app, 3)
    ask = door(grid, grid.clock)
    nodes = registry.enrol(grid, ask, config, store="")
    exchange = build.exchange(config, sector.all_statistic_specs(), sector.statistics_problem, grid.clock)
    with lying(lie, *names), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainExchange, "collect", watching)
        statistics.fitted(RunFolder(folder), config, sector, exchange, nodes, ask, "r")
    return json.loads((folder / "statistics.json").read_bytes()), refused


@pytest.mark.parametrize("name", LIES)
def test_a_liar_is_refused_with_the_reason_and_the_sum_of_the_others_counts(name: str, tmp_path: Path) -> None:
    lie, reason = LIES[name]
    found, refused = asked_alone(("south",), lie, tmp_path)
    assert [(r.node, r.reason) for r in refused] == [("south", reason)]
    assert found["nodes"] == ["north", "west"]
    assert found["options"] == options_without("south")


def test_a_liar_is_named_where_the_run_goes_on_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lying(LIES["negative"][0], "south"):
        result = simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    told = [(Path(result.run_dir) / "statistics.json").read_text(), caplog.text, json.dumps(result.refusals)]
    assert any("south" in text and "counts" in text for text in told)


def test_a_run_with_a_liar_is_fitted_without_it_and_trains_with_all(tmp_path: Path) -> None:
    with lying(LIES["not a number"][0], "south"):
        result = simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    assert kept(result)["options"] == options_without("south")
    (record,) = (r for r in RunFolder(Path(result.run_dir)).records() if r.purpose == "train")
    assert record.answered == ("north", "south", "west")


def test_where_all_lie_nothing_is_trained_and_all_are_named(tmp_path: Path) -> None:
    with (
        watched() as asked,
        lying(LIES["negative"][0], "north", "south", "west"),
        pytest.raises(CohortTooSmall) as caught,
    ):
        simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}", "run_name=none"])
    message = str(caught.value)
    assert message.startswith(
        "0 of 3 nodes sent the statistics that healthcare_heart is fitted on, 1 with training rows"
    )
    assert all(
        f"{name}: counts, train/sums has values that are negative" in message for name in ("north", "south", "west")
    )
    assert {purpose for purpose, _ in asked} == {"statistics"}
    assert not list((tmp_path / "none").glob("versions/*"))
    assert not (tmp_path / "none" / "state.safetensors").exists()


def test_fewer_answers_than_min_replies_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(CohortTooSmall, match=r"2 of 3 nodes .* 3 with training rows are needed \(south: wrong_shape"):
        asked_alone(("south",), LIES["another shape"][0], tmp_path, min_replies=3)
    assert not (tmp_path / "statistics.json").exists()


def test_nodes_without_a_row_fit_nothing(tmp_path: Path) -> None:
    nothing: Lie = lambda counts: {k: v * 0 for k, v in counts.items()}  # noqa: E731
    with pytest.raises(CohortTooSmall, match="they have no training rows"):
        asked_alone(("north", "south", "west"), nothing, tmp_path)


def only_first(total: Callable[[dict[str, np.ndarray]], float]) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """All that the limit of a statistic allows in its first entry."""
    return lambda counts: np.array([total(counts), 0, 0, 0, 0, 0], np.float64)


LIMIT = only_first(lambda counts: 6.0 * float(counts["train/rows"]))
IMPOSSIBLE: dict[str, Lie] = {
    "sums above the number of values": lambda counts: {**counts, "train/sums": LIMIT(counts)},
    "squares above sums": lambda counts: {**counts, "train/squares": LIMIT(counts)},
    "squares below the square of the mean": lambda counts: {
        **counts,
        "train/sums": counts["train/known"].astype(np.float64),
        "train/squares": 0 * counts["train/squares"],
    },
}


@pytest.mark.parametrize("lie", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_statistics_that_no_rows_can_have_are_refused_or_do_little(lie: Lie, tmp_path: Path) -> None:
    found, refused = asked_alone(("south",), lie, tmp_path)
    if refused:
        return
    centre, scale = (np.array(found["options"][k]) for k in ("centre", "scale"))
    honest = np.array(options_without("south")["scale"])
    low, high = (np.array(v) for v in zip(*((c.low, c.high) for c in HealthcareHeart().numbers), strict=True))
    assert ((low <= centre) & (centre <= high)).all()
    assert ((scale > honest / 3) & (scale < honest * 3)).all()


# ---------------------------------------------------------------- schemas that differ


@contextmanager
def with_another_schema(*names: str) -> Iterator[None]:
    """Nodes whose sector declares other columns than the server's."""
    here: list[str] = []
    enrol, digest_of = node.enrol, node.schema.digest

    def enrolling(message: Message, context: Context) -> RecordDict:
        federation = json.loads(str(message.content.config_records[wire.CONFIG]["federation"]))
        here[:] = [sorted(item["name"] for item in federation["items"])[int(context.node_config["partition-id"])]]
        return enrol(message, context)

    other = SimpleNamespace(digest=lambda columns: "f" * 64 if here[0] in names else digest_of(columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "enrol", enrolling)
        patch.setattr(node, "schema", other)
        yield


def test_a_node_with_another_schema_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr("server.registry.log", lambda level, text, *arguments: logged.append(text % arguments))
    with watched() as asked, with_another_schema("south"):
        result = simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    assert {name for _, name in asked} == {"north", "west"}
    assert kept(result)["nodes"] == ["north", "west"]
    assert kept(result)["options"] == options_without("south")
    (line,) = logged
    assert "sector healthcare_heart declares other columns, units or ranges" in line
    assert "than this node's (schema ffffffffffff)" in line


def test_the_node_that_is_left_out_is_named_and_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr("server.registry.log", lambda level, text, *arguments: logged.append(text % arguments))
    with with_another_schema("south"):
        simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    assert "south" in logged[0]
    assert "both need the same version of sectors/healthcare_heart.py" in logged[0]


def test_where_all_differ_nobody_enrols_and_the_reason_is_said(tmp_path: Path) -> None:
    with with_another_schema("north", "south", "west"), pytest.raises(CohortTooSmall) as caught:
        simulate([*PILOT, "rounds=1", f"runs_dir={tmp_path}"])
    assert "no node of nodes=pilot enrolled" in str(caught.value)
    assert "declares other columns, units or ranges" in str(caught.value)


def test_statistics_of_more_rows_than_a_node_registered_are_refused(tmp_path: Path) -> None:
    tenfold: Lie = lambda counts: {k: v * 10 for k, v in counts.items()}  # noqa: E731
    asked_alone(("south",), tenfold, tmp_path)
    found = statistics.of_run(RunFolder(tmp_path))
    assert found is not None
    assert [(r.node, r.reason) for r in found.refusals] == [("south", "num_examples")]
    assert found.options == options_without("south")


def test_a_node_whose_policy_forbids_so_many_rows_gives_no_statistics_of_them(tmp_path: Path) -> None:
    policy = "nodes.items.0.policy.max_examples=20"
    result = simulate([*PILOT, policy, "rounds=1", f"runs_dir={tmp_path}"])
    assert kept(result)["nodes"] == ["south", "west"]
    assert {(r["round"], r["node"], r["reason"]) for r in result.refusals} == {
        (0, "north", "policy.max_examples"),
        (1, "north", "policy.max_examples"),
    }


def test_where_a_round_takes_some_rows_the_statistics_are_of_as_many(tmp_path: Path) -> None:
    result = simulate([*PILOT, "sector.training.max_examples=20", "rounds=1", f"runs_dir={tmp_path}"])
    assert kept(result)["rows"] == 60
