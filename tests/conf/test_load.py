"""Composing a run: every shipped file, what overrides may not do, and what an error says."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from conf import load as loading
from conf.load import choices, groups, load, sweep
from conf.schema import RunConfig, TrainingConfig
from server import build
from strategies.exchange import WallClock
from strategies.flower import RoundStrategy
from trellis.errors import ConfigError

OPTIONS = [(group, option) for group in groups() for option in choices(group)]


def built(config: RunConfig) -> RoundStrategy:
    return build.strategy(config, build.check(config), clock=WallClock(), commit=lambda state, record: None)


def test_there_is_a_folder_for_every_noun() -> None:
    nouns = "attack engine experiment nodes privacy rule sampler sector server_optimizer tracking"
    assert set(nouns.split()) <= set(groups())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_shipped_option_composes_and_builds(group: str, option: str) -> None:
    # nodes=consortium: some rules and experiments need more rows than the pilot's three
    first = [] if group in ("nodes", "experiment") else ["nodes=consortium"]
    more = ["attack.num_attackers=2"] if group == "attack" and option != "none" else []
    more += ["sector.options.server_fraction=0.02"] if option == "fltrust" else []
    strategy = built(load([*first, f"{group}={option}", *more]))
    assert strategy.node_config["sector"] in choices("sector")


def test_the_defaults_are_the_pilot_on_real_rows() -> None:
    config = load()
    assert (config.nodes.name, config.data, config.rule.name, config.num_byzantine) == ("pilot", "real", "mean", 0)
    assert isinstance(config.sector.training, TrainingConfig)


def test_rounds_follow_the_sector_unless_set() -> None:
    assert load(["sector=banks"]).rounds == load(["sector=banks"]).sector.rounds
    assert load(["sector=banks", "rounds=3"]).rounds == 3
    assert load(["experiment=demo"]).rounds == 8
    assert load(["experiment=demo", "rounds=2"]).rounds == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sector._target_=os.system", "_target_"),
        ("+x._target_=pandas.read_pickle", "_target_"),
        ("sector.options={_target_: os.system}", "_target_"),
        ("run_name=${oc.env:HOME}", "interpolates"),
        ("run_name='${oc.env:HOME}'", "interpolates"),
        (r"run_name=$\{oc.env:HOME\}", "interpolates"),
        (r"sector.options={a: [$\{oc.env:HOME\}]}", "interpolates"),
        ("hydra.run.dir=/tmp", "Hydra itself"),
        ("+hydra.x=1", "Hydra itself"),
        ("++hydra.x=1", "Hydra itself"),
        ("hydra/launcher=joblib", "Hydra itself"),
        (" hydra.run.dir=/tmp", "Hydra itself"),
        ("~rule", "deletes"),
        (" ~rule.name", "deletes"),
    ],
)
def test_an_override_is_data_and_never_code(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load([override])
    with pytest.raises(ConfigError, match=reason):
        sweep([override])


def test_no_shipped_file_names_a_target() -> None:
    for group, option in OPTIONS:
        assert "_target_" not in (loading.resources.files("conf") / group / f"{option}.yaml").read_text()


@pytest.mark.parametrize("group", [g for g in groups() if g != "experiment"])
def test_an_unknown_option_is_answered_with_the_choices(group: str) -> None:
    with pytest.raises(ConfigError) as found:
        load([f"{group}=nosuchthing"])
    assert f"{group}=nosuchthing does not exist" in str(found.value)
    assert all(option in str(found.value) for option in choices(group))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way from a group's folder to a file that nobody shipped; it would tell what is in the environment."""
    monkeypatch.setenv("SECRET", "hunter2")
    text = "# @package _global_\nrun_name: ${oc.env:SECRET}\n"
    (tmp_path / "evil.yaml").write_text(text)
    return os.path.relpath(tmp_path / "evil", Path(loading.__file__).parent / "sector")


@pytest.mark.parametrize(
    "written",
    ["sector={}", "sector='{}'", "+sector={}", "++sector={}", "sector@x={}", "+sector@x={}", "+sector@_global_={}",
     "sector=[{}]", "experiment=[demo,{}]", "sector={}.yaml", "+__pycache__={}", "+hydra={}", "override /sector={}",
     "/sector={}", "+sector/x={}", "+defaults=[{{sector: '{}'}}]"],
)  # fmt: skip
def test_a_group_has_no_options_outside_its_folder(written: str, outside: str) -> None:
    for compose_ in (load, sweep):
        with pytest.raises(ConfigError) as found:
            compose_([written.format(outside)])
        assert "hunter2" not in str(found.value)


@pytest.mark.parametrize("written", ["sector=banks,{}", "sector={},banks", "sector=choice(banks,'{}')"])
def test_each_option_of_a_sweep_must_be_shipped(written: str, outside: str) -> None:
    with pytest.raises(ConfigError, match="choose one of: banks, healthcare_heart"):
        sweep([written.format(outside)])


@pytest.mark.parametrize("value", ["null", "1", "true", "{name: banks}", "", "banks.yaml"])
def test_a_group_takes_the_name_of_an_option_and_nothing_else(value: str) -> None:
    with pytest.raises(ConfigError, match="choose one of: banks, healthcare_heart"):
        load([f"sector={value}"])


def test_a_group_may_take_several_of_its_options() -> None:
    assert load(["experiment=[demo,none]"]).rounds == 8


@pytest.mark.parametrize("written", ["sector=glob(*)", "seed=interval(0,1)"])
def test_a_sweep_that_does_not_list_its_values_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="does not list its values"):
        sweep([written])


@pytest.mark.parametrize("compose_", [load, sweep])
def test_an_override_without_a_value_is_told_how_to_give_one(compose_: Callable[[list[str]], object]) -> None:
    with pytest.raises(ConfigError, match="'rounds' has no value: write key=value"):
        compose_(["rounds"])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("rouds=3", "rounds"), ("sector.training.lrr=1", "sector.training.lr"), ("num_byzantin=1", "num_byzantine")],
)
def test_an_unknown_key_is_answered_with_the_near_one(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}( |\\?)"):
        load([typo])


def test_a_suggestion_is_made_once() -> None:
    with pytest.raises(ConfigError) as found:
        load(["rouds=3"])
    assert str(found.value).count("nodes") <= 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rounds=abc", "rounds"),
        ("num_byzantine=1.5", "num_byzantine"),
        ("data=fake", "real, synthetic"),
        ("sector.training.lr=true", "sector.training.lr"),
        ("engine.name=cloud", "local, ray"),
        ("rounds=null", "rounds"),
        ("rounds=0", "rounds is 0"),
        ("num_byzantine=-1", "num_byzantine is -1"),
        ("min_replies=0", "min_replies is 0"),
        ("round_timeout_s=0", "round_timeout_s"),
        ("sector.training.batch_size=0", "batch_size is 0"),
        ("sector.training.lr=0", "training.lr"),
        ("sector.training.max_examples=0", "max_examples is 0"),
        ("sector.training.lr=nan", "training.lr is nan"),
        ("sector.training.lr=inf", "training.lr is inf; it must be above 0, and finite"),
        ("sector.training.momentum=1", "training.momentum is 1.0; it must be at least 0 and below 1"),
        ("sector.training.momentum=-0.1", "training.momentum is -0.1"),
        ("sector.training.weight_decay=-1", "training.weight_decay is -1"),
        ("sector.training.weight_decay=inf", "training.weight_decay is inf"),
        ("engine.workers=0", "engine.workers is 0; it must be at least 1$"),
        ("engine.workers=-2", "engine.workers is -2"),
        ("+engine.cpus_per_node=0", "engine.cpus_per_node is 0"),
        ("+engine.gpus_per_node=-1", "engine.gpus_per_node is -1"),
        ("checks.max_update_norm=0", "checks.max_update_norm is 0"),
        ("checks.max_update_norm=-1", "checks.max_update_norm is -1"),
        ("checks.max_update_norm=inf", "checks.max_update_norm is inf"),
        ("checks.max_update_norm=nan", "checks.max_update_norm is nan"),
        ("round_timeout_s=inf", "round_timeout_s is inf"),
        ("round_timeout_s=nan", "round_timeout_s is nan"),
        ("server_optimizer.lr=0", "server_optimizer.lr is 0"),
        ("server_optimizer.lr=nan", "server_optimizer.lr is nan"),
        ("+server_optimizer.momentum=1", "server_optimizer.momentum is 1"),
        ("+server_optimizer.beta1=1", "server_optimizer.beta1 is 1"),
        ("+server_optimizer.beta2=-0.5", "server_optimizer.beta2 is -0.5"),
        ("+server_optimizer.tau=0", "server_optimizer.tau is 0"),
        ("+sampler.fraction=nan", "sampler.fraction is nan"),
        ("+sampler.min_nodes=0", "sampler.min_nodes is 0"),
        ("+nodes.held_out.test=1", "held_out.test is 1"),
        ("+nodes.held_out.validation=-0.1", "held_out.validation is -0.1"),
        ("+nodes.held_out={validation: 0.5, test: 0.5}", r"validation \+ nodes.held_out.test is 1.0"),
        ("nodes.items.0.link.latency_ms=nan", "link.latency_ms is nan"),
        ("nodes.items.0.link.uplink_mbit_s=inf", "link.uplink_mbit_s is inf"),
        ("nodes.items.0.link.availability=nan", "link.availability is nan"),
        ("tracking.every=0", "tracking.every is 0"),
        ("tracking.max_node_runs=-1", "tracking.max_node_runs is -1"),
        ("tracking.close_timeout_s=-1", "tracking.close_timeout_s is -1"),
        ("tracking.close_timeout_s=nan", "tracking.close_timeout_s is nan"),
        ("device=meta", "device=meta cannot be used here: choose cpu"),
        ("device=cuda:", "device=cuda: cannot"),
        ("device=cpu:0", "device=cpu:0 cannot"),
        ("run_name=../escaped", r"run_name is '../escaped'; it must be 1 to 64 letters"),
        ("run_name=.", "run_name is '.'"),
        ("run_name=a/b", "run_name is 'a/b'"),
        ("run_name=", "run_name is ''"),
        ("+foo=1", "foo"),
        ("seed", "seed"),
    ],
)
def test_a_value_that_does_not_fit_is_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load([override])


@pytest.mark.parametrize(
    "override", ["device=cuda:0", "device=mps", "run_name=a.B-3_c", "tracking.close_timeout_s=0",
                 "tracking.max_node_runs=0", "sector.training.momentum=0", "sector.training.weight_decay=0"],
)  # fmt: skip
def test_a_value_at_its_limit_is_taken(override: str) -> None:
    load([override])


def test_composing_in_eight_threads_at_once_gives_each_its_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        configs = list(pool.map(lambda seed: load([f"seed={seed}"]), range(8)))
    assert [c.seed for c in configs] == list(range(8))


def test_composing_inside_another_hydra_gives_it_back() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert load(["seed=5"]).seed == 5
        assert GlobalHydra.instance().hydra is outer
        with pytest.raises(ConfigError):
            load(["rule=nosuchrule"])
        assert GlobalHydra.instance().hydra is outer
        assert compose(config_name="config", overrides=["seed=6"]).seed == 6
    assert GlobalHydra.instance().hydra is None


@pytest.mark.parametrize(
    ("written", "runs"),
    [
        ([], [[]]),
        (["seed=3"], [["seed=3"]]),
        (["seed=0,1"], [["seed=0"], ["seed=1"]]),
        (["seed=range(1,4)"], [["seed=1"], ["seed=2"], ["seed=3"]]),
        (
            ["seed=0,1", "sector=banks,healthcare_wisconsin"],
            [[f"seed={s}", f"sector={n}"] for s in (0, 1) for n in ("banks", "healthcare_wisconsin")],
        ),
        (["tracking.experiment='a b','c'"], [["tracking.experiment='a b'"], ["tracking.experiment='c'"]]),
        (["sector.options.hidden=[1,2]"], [["sector.options.hidden=[1,2]"]]),
        (["sector.options.hidden=[8],[4,4]"], [["sector.options.hidden=[8]"], ["sector.options.hidden=[4,4]"]]),
    ],
)
def test_a_sweep_is_the_product_of_its_choices_in_the_order_written(written: list[str], runs: list[list[str]]) -> None:
    assert sweep(written) == runs
    for run in runs:
        load(run)


def test_a_sweep_is_not_one_run() -> None:
    with pytest.raises(ConfigError, match="use --multirun to run all of seed=1,2"):
        load(["seed=1,2"])
