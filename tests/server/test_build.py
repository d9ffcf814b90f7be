"""Promises between fields are checked before anything starts, and scores come from summed counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sectors
from conf.load import load
from conf.schema import HeldOutConfig, NodesConfig, NodeSpec, NodeTask, to_json
from server import build
from strategies.exchange import PlainExchange, WallClock
from strategies.observers.suspicion import Suspicion
from trellis.errors import ConfigError, MissingData


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["num_byzantine=1"], r"rule=mean tolerates no liar, but num_byzantine=1"),
        (["min_replies=4"], r"at most 3 of 3 training nodes: 4 are needed"),
        (["nodes=consortium", "sampler=uniform", "min_replies=3"], r"at most 2 of 10"),
        (["device=cuda:99"], r"device=cuda:99 cannot be used here"),
        (["device=toaster"], r"device=toaster cannot be used here"),
        (["rule.name=mode"], r"no rule 'mode'"),
        (["sampler.name=oracle"], r"no sampler 'oracle'"),
        (["server_optimizer.name=lion"], r"no server optimizer 'lion'"),
        (["sector.name=weather"], r"unknown sector 'weather'"),
        (["attack.name=sign_flop"], r"attack=sign_flop does not exist; choose one of: agr_tailored, alie"),
        (["attack=alie"], r"attack=alie with num_byzantine=0 attacks nobody: set attack.num_attackers"),
        (["attack=alie", "attack.num_attackers=4"], r"attack=alie on 4 nodes, but there are 3 training nodes"),
        (["attack=alie", "attack.nodes=[north,ash,elm]"], r"attack.nodes: ash, elm are no training nodes"),
        (["suspicion.name=hunch"], r"suspicion=hunch does not exist; choose one of: none, sequential"),
        (["suspicion=sequential", "suspicion.released=[elm]"], r"elm are no nodes of .* are: north, south, west"),
        (["suspicion.released=[north]"], r"suspicion\.released is for a run with suspicion=sequential"),
        (["nodes.items=[]"], r"`items` or a `count`"),
        (
            ["rule=fltrust"],
            r"fltrust needs rows of the server's own: set .*server_fraction=0\.02, or .*server_path",
        ),
        (["rule.name=median", "rule.weighted=true"], r"rule=median weighs no rows: set rule\.weighted=false"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build.check(load(overrides))


def test_held_out_nodes_are_no_cohort() -> None:
    config = load(["min_replies=8"])
    nodes = NodesConfig(count=10, template=NodeSpec(name="n{index}"), held_out=HeldOutConfig(0.2, 0.2))
    with pytest.raises(ConfigError, match="of 6 training nodes"):
        build.check(replace(config, nodes=nodes))


def test_the_strategy_holds_what_the_config_says() -> None:
    config = load(["nodes=consortium", "min_replies=3", "checks.max_update_norm=7", "round_timeout_s=9"])
    strategy = build.strategy(config, build.check(config), clock=WallClock(), commit=lambda state, record: None)
    assert isinstance(strategy.exchange, PlainExchange)
    assert (strategy.exchange.native, strategy.exchange.timeout_s, strategy.exchange.max_update_norm) == (True, 9, 7)
    assert (strategy.rule.name, strategy.min_replies, strategy.weighted) == ("mean", 3, False)
    assert strategy.node_config == to_json(NodeTask.of(config))


def test_the_detector_is_that_of_the_config_and_counts_every_node() -> None:
    def built(*overrides: str) -> Suspicion | None:
        config = load(["nodes=consortium", *overrides])
        return build.strategy(config, build.check(config), clock=WallClock(), commit=lambda *_: None).suspicion

    assert built() is None
    found = built(
        "suspicion=sequential", "suspicion.alpha=0.05", "suspicion.released=[elm,fir]", "rule=krum", "num_byzantine=2"
    )
    assert found == Suspicion(num_nodes=10, num_byzantine=2, alpha=0.05, released=frozenset({"elm", "fir"}))


def test_a_large_matrix_goes_where_the_run_says(tmp_path: Path) -> None:
    config = load(["checks.max_matrix_mb=2.5"])
    strategy = build.strategy(
        config, build.check(config), clock=WallClock(), commit=lambda state, record: None, scratch=tmp_path
    )
    assert isinstance(strategy.exchange, PlainExchange)
    assert (strategy.exchange.max_matrix_bytes, strategy.exchange.scratch) == (5 << 19, tmp_path)


@pytest.mark.parametrize(("rule", "needed"), [("fltrust", True), ("mean", False), ("median", False)])
def test_only_a_rule_that_needs_the_servers_update_has_it_trained(rule: str, needed: bool) -> None:
    config = load([f"rule={rule}", "sector.options.server_fraction=0.1"])
    strategy = build.strategy(config, build.check(config), clock=WallClock(), commit=lambda state, record: None)
    assert (strategy.reference is not None) is needed


def test_rows_of_the_servers_own_that_are_not_there_are_missed_before_the_run_starts(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"gone\.csv"):
        build.check(load(["rule=fltrust", f"sector.options.server_path={tmp_path / 'gone.csv'}"]))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("name", sectors.names())
def test_no_counts_that_pass_the_checks_can_break_a_score(name: str) -> None:
    # a node may lie about its counts: any that are not negative reach the score
    sector = sectors.get(name)
    scoring = build.scoring(sector)
    rng = np.random.default_rng(0)
    for kind in range(60):
        counts = {}
        for key, spec in sector.all_counts().items():
            value = rng.integers(0, [1, 2, 100, 1 << 50][rng.integers(4)], spec.shape)
            counts[key] = np.asarray(value * (rng.random(spec.shape) < 0.1 * (kind % 11)), spec.dtype)
        metrics = scoring.metrics(counts)
        assert all(np.isfinite(v) for v in metrics.values()), (kind, metrics)


def test_the_loss_is_the_mean_over_all_rows() -> None:
    sector = sectors.get("healthcare_wisconsin")
    counts = {k: np.zeros(s.shape, s.dtype) for k, s in sector.all_counts().items()}
    assert build.scoring(sector).metrics(counts) == {}
    counts |= {"rows": np.asarray(4), "loss_sum": np.asarray(3.0)}
    assert build.scoring(sector).metrics(counts)["loss"] == 0.75


def test_an_engine_that_obeys_no_links_is_not_asked_to() -> None:
    assert build.check(load(["engine=ray"])).name == "healthcare_wisconsin"
    with pytest.raises(ConfigError, match=r"engine=ray obeys no links: set engine\.links=false"):
        build.check(load(["engine=ray", "engine.links=true"]))
