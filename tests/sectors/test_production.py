"""Engines: whole ones are split, only the published test points are tested on, and late warnings cost more."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from conf.load import load
from sectors import production, training
from sectors.base import SPLITS, TEST, TRAIN, NodeData, Place, Pooled, Rows, concatenate, num_rows, take, to_batch
from sectors.params import initial_arrays
from sectors.production import FD001, FD003, FLEETS, INPUTS, OWN_FLEET, RECORDED, SENSORS, WINDOW, Production
from trellis.errors import ConfigError, DataError, MissingData
from trellis.types import Counts, Role

CPU = torch.device("cpu")
S2 = 0
"""Index of sensor_2 in x."""


def typical(column: Any) -> float:
    return 0.0 if column.name in ("setting_1", "setting_2") else (column.low + column.high) / 2


def recorded(*lengths: int, units: tuple[int, ...] = ()) -> pd.DataFrame:
    """Engines of so many cycles in the columns of a published file; sensor_2 is 640 + a hundredth of the cycle."""
    tables = []
    for unit, length in zip(units or range(1, len(lengths) + 1), lengths, strict=True):
        table = pd.DataFrame({"unit": unit, "cycle": np.arange(1, length + 1)})
        for column in RECORDED[2:]:
            table[column.name] = typical(column)
        tables.append(table.assign(sensor_2=640.0 + table["cycle"] / 100))
    return pd.concat(tables, ignore_index=True)


def engines(*lengths: int, fleet: str = "FD001", source: str = "train", left: int = 0) -> pd.DataFrame:
    """Raw table of engines of which `left` cycles are left after the last one."""
    table = recorded(*lengths)
    table.insert(0, "fleet", fleet)
    table.insert(1, "source", source)
    return table.assign(rul=table.groupby("unit")["cycle"].transform("max") + left - table["cycle"])


def written(table: pd.DataFrame, path: Path) -> Path:
    """A file as NASA publishes it: blanks between the numbers, two at the end of a line, no header."""
    text = "".join(
        " ".join(f"{v:g}" if v == round(v) else f"{v:.4f}" for v in row) + "  \n" for row in table.to_numpy()
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def cycles_of(x: np.ndarray) -> list[int]:
    """The cycles of a window of `recorded`."""
    low, high = INPUTS[S2].low, INPUTS[S2].high
    assert low is not None
    assert high is not None
    return [round((low + (high - low) * float(v) - 640.0) * 100) for v in x[:, S2]]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    try:
        return Production().read(Production().files())
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pooled(table: pd.DataFrame) -> Pooled:
    return Production().pool(table)


@pytest.fixture
def nodes(table: pd.DataFrame) -> list[NodeData]:
    return [Production().load(Place(p, 4)) for p in range(4)]


# ---------------------------------------------------------------- windows


def test_a_window_is_thirty_cycles_in_their_order_and_ends_where_its_label_is() -> None:
    sector = Production(validation_fraction=0.0)
    rows = sector.pool(engines(32)).rows
    assert rows["x"].shape == (3, WINDOW, 14)
    assert [cycles_of(x) for x in rows["x"]] == [list(range(k, k + 30)) for k in (1, 2, 3)]
    assert rows["y"].tolist() == [2.0, 1.0, 0.0]


def test_windows_are_counted_from_the_last_cycle_of_an_engine() -> None:
    rows = Production(validation_fraction=0.0, stride=4).pool(engines(40, 31)).rows
    assert rows["y"].tolist() == [8.0, 4.0, 0.0, 0.0]


def test_an_engine_that_is_too_short_repeats_its_first_cycle() -> None:
    rows = Production(validation_fraction=0.0).pool(engines(3)).rows
    assert cycles_of(rows["x"][0]) == [1] * 28 + [2, 3]
    assert rows["y"].tolist() == [0.0]


def test_a_healthy_engine_is_capped() -> None:
    rows = Production(validation_fraction=0.0, max_rul=50.0).pool(engines(90)).rows
    assert rows["y"].tolist() == [50.0] * 11 + [float(v) for v in range(49, -1, -1)]


def test_small_spreads_of_large_numbers_survive() -> None:
    one = engines(30).assign(sensor_8=2388.06)
    other = one.assign(sensor_8=2388.07)
    at = [column.name for column in INPUTS].index("sensor_8")
    a, b = (float(Production(validation_fraction=0.0).pool(t).rows["x"][0, 0, at]) for t in (one, other))
    assert b - a == pytest.approx(0.01 / 6.0, rel=1e-4)  # the declared range is 6 rpm


def test_only_the_fourteen_sensors_that_move_are_inputs() -> None:
    moved = [2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21]
    assert [column.name for column in INPUTS] == [f"sensor_{i}" for i in moved]
    plain = engines(35)
    others = {c.name: c.high for c in RECORDED[2:] if c not in INPUTS}
    a, b = (Production().pool(t).rows["x"] for t in (plain, plain.assign(**others)))
    assert np.array_equal(a, b)


def test_features_are_a_window_a_cycle_in_the_order_of_the_table() -> None:
    table = recorded(33, 31).drop(columns=["setting_1", "sensor_1"])
    x = Production().features(table)["x"]
    assert x.shape == (64, WINDOW, 14)
    assert cycles_of(x[32]) == list(range(4, 34))
    assert cycles_of(x[33]) == [1] * 30
    shuffled = np.random.default_rng(0).permutation(64)
    assert np.array_equal(Production().features(table.iloc[shuffled])["x"], x[shuffled])


def test_labels_never_reach_the_inputs() -> None:
    labelled = engines(40)
    found = Production().features(labelled)
    assert set(found) == {"x", "y", "fleet"}
    bare = Production().features(labelled.drop(columns=["rul", "fleet", "source"]))
    assert set(bare) == {"x"}
    assert np.array_equal(bare["x"], found["x"])


# ---------------------------------------------------------------- the published data


def test_the_test_rows_of_fd001_are_the_official_test_points(table: pd.DataFrame, pooled: Pooled) -> None:
    official = (pooled.split == TEST) & (pooled.rows["fleet"] == FD001)
    left = pd.read_csv(Production().files()[2], header=None)[0]
    assert pooled.rows["y"][official].tolist() == np.minimum(left, 125).tolist()
    raw = pd.read_csv(Production().files()[1], sep=r"\s+", header=None)
    last = raw.groupby(0).tail(WINDOW)
    low, high = (np.array([getattr(c, side) for c in INPUTS]) for side in ("low", "high"))
    columns = [4 + int(c.name.split("_")[1]) for c in INPUTS]
    expected = (last[columns].to_numpy() - low) / (high - low)
    assert np.allclose(pooled.rows["x"][official].reshape(-1, 14), expected, atol=1e-6)


def test_earlier_cycles_of_official_test_engines_are_not_used(table: pd.DataFrame, pooled: Pooled) -> None:
    engine = Production().units(table)
    tests = np.unique(engine[(table["fleet"] == "FD001") & (table["source"] == "test")])
    assert len(tests) == 100
    assert np.isin(pooled.keys["engine"], tests).sum() == 100


def test_fd003_tests_on_last_windows_and_trains_on_other_engines(table: pd.DataFrame, pooled: Pooled) -> None:
    fan = pooled.rows["fleet"] == FD003
    numbers = [len(np.unique(pooled.keys["engine"][fan & (pooled.split == s)])) for s in range(3)]
    assert numbers == [50, 10, 40]
    assert int((fan & (pooled.split == TEST)).sum()) == 40
    last = table[table["fleet"] == "FD003"].groupby("unit")["rul"].min().clip(upper=125)
    unit_of = dict(zip(Production().units(table), table["unit"], strict=True))
    for split, may_be_earlier in ((TEST, False), (TRAIN, True)):
        chosen = fan & (pooled.split == split)
        left = np.array([last[unit_of[engine]] for engine in pooled.keys["engine"][chosen]])
        assert (pooled.rows["y"][chosen] >= left).all()
        assert (pooled.rows["y"][chosen] > left).any() == may_be_earlier


def test_no_engine_is_at_two_nodes_or_in_two_splits(pooled: Pooled, nodes: list[NodeData]) -> None:
    engine_of = {x.tobytes(): e for x, e in zip(pooled.rows["x"], pooled.keys["engine"], strict=True)}
    homes: dict[int, set[tuple[int, str]]] = {}
    total = 0
    for number, node in enumerate(nodes):
        for split in SPLITS:
            for x in node.split(split)["x"]:
                total += 1
                homes.setdefault(engine_of[x.tobytes()], set()).add((number, split))
    assert total == len(pooled.rows["x"])
    assert len(homes) == 300
    assert all(len(home) == 1 for home in homes.values())


def test_no_published_engine_is_padded(table: pd.DataFrame) -> None:
    assert table.groupby(["fleet", "source", "unit"]).size().min() == 31


def test_the_last_plant_owns_the_second_fleet_and_the_others_differ_in_how_long_engines_live(
    table: pd.DataFrame, pooled: Pooled
) -> None:
    owner = Production().owners(pooled, 4)
    fleet = pooled.rows["fleet"]
    assert set(fleet[owner == 3]) == {FD003}
    assert FD003 not in fleet[owner != 3]
    for split in range(3):
        lives = [pooled.keys["life"][(owner == p) & (pooled.split == split)] for p in range(3)]
        assert all(a.max() <= b.min() for a, b in pairwise(lives))
        sizes = [len(np.unique(pooled.keys["engine"][(owner == p) & (pooled.split == split)])) for p in range(3)]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("partition", ["life_band", "uniform"])
def test_other_partitions_mix_the_fleets(pooled: Pooled, partition: str) -> None:
    owner = Production(partition=partition).owners(pooled, 3)
    for part in range(3):
        assert {FD001, FD003} == set(pooled.rows["fleet"][owner == part])
        assert {0, 1, 2} == set(pooled.split[owner == part])  # type: ignore[index]


def test_one_part_has_everything(pooled: Pooled) -> None:
    assert set(Production().owners(pooled, 1)) == {0}


def test_more_parts_than_training_engines_are_refused(pooled: Pooled) -> None:
    with pytest.raises(
        DataError, match=r"90 training engines .* 92 parts.*FD003's: use at most 91 nodes, or .*uniform"
    ):
        Production().owners(pooled, 92)
    assert set(Production().owners(pooled, 91)) == set(range(91))
    with pytest.raises(DataError, match=r"140 training engines .* 141 parts, one or more for each: use at most 140"):
        Production(partition="uniform").owners(pooled, 141)


def test_another_split_seed_divides_other_engines_but_never_the_official_ones(table: pd.DataFrame) -> None:
    found = []
    for seed in (0, 1):
        p = Production(split_seed=seed, stride=50).pool(table)
        found.append({s: set(p.keys["engine"][p.split == s]) for s in range(3)})
    assert all(found[0][s] != found[1][s] for s in range(3))
    assert len(found[0][TEST] & found[1][TEST]) >= 100


def test_engines_are_divided_alike_whichever_others_are_there(table: pd.DataFrame, pooled: Pooled) -> None:
    sector = Production()
    engine = sector.units(table)
    chosen = np.random.default_rng(1).choice(np.unique(engine), 20, replace=False)
    few = sector.pool(sector.select(table, np.isin(engine, chosen)))
    among = np.isin(pooled.keys["engine"], chosen)
    assert pooled.split is not None
    assert np.array_equal(few.rows["x"], pooled.rows["x"][among])
    assert few.split is not None
    assert np.array_equal(few.split, pooled.split[among])


def test_held_out_plants_never_train_on_official_test_points(table: pd.DataFrame) -> None:
    trains = Production().load(Place(0, 4, role=Role.train, holds_out=True))
    tests = Production().load(Place(1, 4, role=Role.test, holds_out=True))
    assert num_rows(trains.test) == num_rows(trains.validation) == 0
    assert num_rows(tests.test) in (33, 34)


def test_the_server_may_hold_engines_that_no_plant_has(table: pd.DataFrame, pooled: Pooled) -> None:
    sector = Production(server_fraction=0.05)
    held = {x.tobytes() for x in sector.server_rows(synthetic=False)["x"]}
    engine_of = {x.tobytes(): e for x, e in zip(pooled.rows["x"], pooled.keys["engine"], strict=True)}
    engines_held = {engine_of[x] for x in held}
    assert 2 <= len(engines_held) <= 12
    for part in range(4):
        node = sector.load(Place(part, 4))
        assert not engines_held & {engine_of[x.tobytes()] for x in node.train["x"]}


# ---------------------------------------------------------------- a file of one's own


@pytest.mark.parametrize("name", ["own.txt", "own.txt.gz"])
def test_an_own_file_is_split_by_engine_and_its_test_engines_are_cut(tmp_path: Path, name: str) -> None:
    path = written(recorded(*range(180, 200)), tmp_path / name)
    data = Production().load(Place(2, 5, path=path))
    assert num_rows(data.test) == 8
    assert ((data.test["y"] >= 7) & (data.test["y"] <= 125)).all()
    assert len(set(data.test["y"])) > 4
    assert int((data.train["y"] == 0).sum()) == 10  # windows up to the failure, of all that train
    assert int((data.validation["y"] == 0).sum()) == 2
    assert set(data.train["fleet"]) == {OWN_FLEET}
    # a test engine's window does not show the cycles after its cut
    assert all(cycles_of(x) == list(range(cycles_of(x)[0], cycles_of(x)[0] + 30)) for x in data.test["x"])
    last = {cycles_of(x)[-1] + int(y) for x, y in zip(data.test["x"], data.test["y"], strict=True) if y < 125}
    assert last <= set(range(180, 200))


def test_the_published_training_file_is_an_own_file(table: pd.DataFrame) -> None:
    data = Production(stride=10).load(Place(0, 1, path=Production().files()[0]))
    assert num_rows(data.test) == 40
    assert int((data.train["y"] == 0).sum()) == 50


def test_an_own_file_of_one_engine_trains_on_it(tmp_path: Path) -> None:
    for seed in range(8):
        sector = Production(split_seed=seed)
        data = sector.load(Place(0, 1, path=written(recorded(12, units=(7,)), tmp_path / "own.txt")))
        assert [num_rows(data.split(s)) for s in SPLITS] == [1, 0, 0]


def test_short_engines_of_ones_own_are_tested_where_a_window_is_left(tmp_path: Path) -> None:
    path = written(recorded(*[31] * 10), tmp_path / "own.txt")
    data = Production().load(Place(0, 1, path=path))
    assert num_rows(data.test) == 4
    assert (data.test["y"] <= 1).all()


# ---------------------------------------------------------------- bad input


def lost_line(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(index=10)


def repeated_line(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.iloc[[10]]])


def celsius(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(sensor_2=table["sensor_2"] / 1.8 - 273.15)


def another_condition(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(setting_1=42.0, setting_3=60.0)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lost_line, r"own.txt has cycle 12 of unit 1 after its cycle 10: needed is one line a cycle"),
        (repeated_line, r"own.txt has cycle 11 of unit 1 after its cycle 11"),
        (celsius, r"own.txt .*°R in column sensor_2.*check the unit"),
        (another_condition, r"own.txt .*setting_1.*setting_3"),
        (lambda t: t.iloc[:, :-1], r"own.txt has 25 numbers a line, needed are 26"),
        (lambda t: t.assign(cycle=t["cycle"] + 0.5), r"own.txt .*whole numbers in column cycle"),
        (lambda t: t.assign(cycle=t["cycle"] - 1), r"own.txt .*column cycle"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused(
    tmp_path: Path, spoil: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    path = written(spoil(recorded(40, 40)), tmp_path / "own.txt")
    with pytest.raises(DataError, match=told):
        Production().read((path,))


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    path = written(recorded(40), tmp_path / "own.txt.gz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"own\.txt\.gz cannot be read"):
        Production().read((path,))


def test_as_many_lines_of_cycles_left_are_needed_as_there_are_engines(tmp_path: Path) -> None:
    whole = written(recorded(40, 40), tmp_path / "whole.txt")
    left = tmp_path / "left.txt"
    left.write_text("12 \n30 \n")
    found = Production().read((whole, whole, left, whole, left))
    assert len(found) == 240
    assert found.groupby(["fleet", "source", "unit"])["rul"].min().tolist() == [12, 30, 0, 0, 12, 30]
    left.write_text("12 \n")
    with pytest.raises(DataError, match=r"left\.txt has 1 lines for the 2 engines of .*whole\.txt"):
        Production().read((whole, whole, left, whole, left))


def test_features_need_every_input() -> None:
    with pytest.raises(DataError, match="no column sensor_9"):
        Production().features(recorded(31).drop(columns="sensor_9"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"partition": "plant"}, "no partition 'plant'; there are fleets, life_band, uniform"),
        ({"max_rul": 0.0}, "max_rul is 0.0"),
        ({"stride": 0}, "stride"),
        ({"num_folds": 5}, "no folds"),
        ({"centre": (0.5,), "scale": (0.1,)}, "14 numbers"),
        ({"centre": (0.5,) * 14}, "14 numbers"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Production(**options)


# ---------------------------------------------------------------- errors and metrics


def counts(cycles: list[float], left: list[float], fleet: list[int], sector: Production | None = None) -> Counts:
    """Counts of predictions of so many cycles."""
    sector = sector or Production()
    batch = {"y": torch.tensor(left), "fleet": torch.tensor(fleet, dtype=torch.int64)}
    return sector.counts(torch.tensor(cycles) / sector.max_rul, batch)


def test_the_score_of_late_and_early_predictions_by_hand() -> None:
    late, early, right = production.nasa_score(np.array([10.0, -13.0, 0.0]))
    assert (late, early, right) == (pytest.approx(math.e - 1), pytest.approx(math.e - 1), 0.0)


def test_metrics_by_hand() -> None:
    found = Production().metrics(
        counts([50.0, 7.0, 90.0, 60.0], [40.0, 20.0, 90.0, 54.0], [FD001, FD001, FD003, FD003])
    )
    assert found["rmse"] == pytest.approx(math.sqrt((100 + 169 + 0 + 36) / 4))
    assert found["rmse_fd001"] == pytest.approx(math.sqrt((100 + 169) / 2))
    assert found["rmse_fd003"] == pytest.approx(math.sqrt(36 / 2))
    assert found["nasa_fd001"] == pytest.approx(2 * (math.e - 1), abs=1e-3)
    assert found["nasa_score"] == pytest.approx(2 * (math.e - 1) + math.exp(0.6) - 1, abs=2e-3)


def test_a_fleet_without_rows_has_no_metric_and_an_own_one_counts_in_the_total_only() -> None:
    assert set(Production().metrics(counts([3.0], [4.0], [FD001]))) == {
        "rmse", "nasa_score", "rmse_fd001", "nasa_fd001",
    }  # fmt: skip
    assert set(Production().metrics(counts([3.0], [4.0], [OWN_FLEET]))) == {"rmse", "nasa_score"}
    assert Production().metrics(counts([], [], [])) == Production().metrics({}) == {}


def test_predictions_are_cut_and_counts_stay_within_their_bounds() -> None:
    wild = [math.inf, -math.inf, math.nan, 1e30, -4.0]
    found = counts(wild, [0.0, 125.0, 125.0, 0.0, 0.0], [0] * 5)
    assert found["squared_error"][FD001] == 4 * 125.0**2
    bounds = {spec.name: spec.per_row for spec in Production().count_specs()}
    assert all(np.isfinite(v).all() and v.sum() <= 5 * bounds[k] for k, v in found.items())


def test_counts_that_no_rows_of_a_fleet_can_have_are_found_out() -> None:
    found = {**counts([3.0, 9.0], [4.0, 9.0], [FD001, FD003]), "rows": np.asarray(2, np.int64)}
    sector = Production()
    assert sector.counts_problem(found) is None
    assert sector.counts_problem({**found, "rows": np.asarray(3, np.int64)}) == "2 points of 3 rows"
    moved = {**found, "squared_error": np.array([0.0, 0.0, 1.0])}  # of the fleet that has no rows
    assert "more squared_error in a fleet" in (sector.counts_problem(moved) or "")


def test_sums_of_counts_are_exact_in_any_order() -> None:
    rng = np.random.default_rng(0)
    n = 999
    cycles, left = rng.uniform(-5, 140, n).tolist(), rng.integers(0, 126, n).astype(float).tolist()
    fleet = rng.integers(0, len(FLEETS), n).tolist()
    whole = counts(cycles, left, fleet)
    parts = [counts(cycles[i::7], left[i::7], fleet[i::7]) for i in range(7)]
    assert all(np.array_equal(whole[k], sum(p[k] for p in reversed(parts))) for k in whole)


def test_what_a_user_sees_are_cycles() -> None:
    assert Production().predict(torch.tensor([-0.1, 0.4, 1.2])).tolist() == [0.0, 50.0, 125.0]


# ---------------------------------------------------------------- scaling and learning


def test_statistics_are_exactly_additive_and_give_mean_and_deviation() -> None:
    sector = Production()
    rng = np.random.default_rng(0)
    rows: Rows = {"x": rng.random((50, WINDOW, 14)).astype(np.float32)}
    whole = sector.all_statistics(rows)
    parts = [sector.all_statistics(take(rows, np.arange(i, 50, 3))) for i in range(3)]
    assert all(np.array_equal(whole[k], sum(p[k] for p in parts)) for k in whole)
    fitted = sector.fit(whole)
    assert np.allclose(fitted["centre"], rows["x"][:, -1].mean(axis=0), atol=1e-4)
    assert np.allclose(fitted["scale"], rows["x"][:, -1].std(axis=0), atol=1e-4)


def test_a_sensor_that_stands_still_does_no_harm() -> None:
    rows: Rows = {"x": np.full((4, WINDOW, 14), 0.25, np.float32)}
    sector = Production().fitted_on(rows)
    assert isinstance(sector, Production)
    assert min(sector.scale) == production.SCALE_LEAST
    assert torch.isfinite(sector.forward(sector.build_model(), to_batch(rows, slice(None), CPU))).all()


def test_declared_ranges_scale_until_something_is_fitted(nodes: list[NodeData]) -> None:
    sector = Production()
    scaled: list[torch.Tensor] = []

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled.append(x)
            return x[:, 0, 0]

    train = concatenate([node.train for node in nodes])
    for each in (sector, sector.fitted_on(train)):
        each.forward(Looks(), to_batch(train, slice(None), CPU))
    plain, fitted = (x.movedim(1, 2).reshape(-1, 14) for x in scaled)
    assert plain.shape[1] == 14
    assert plain.abs().max() < 3
    assert plain.std(dim=0).min() > 0.1
    assert fitted.mean(dim=0).abs().max() < 0.3
    assert ((fitted.std(dim=0) > 0.5) & (fitted.std(dim=0) < 1.2)).all()


def test_declared_ranges_hold_every_published_cycle_with_room(table: pd.DataFrame) -> None:
    for column in SENSORS:
        assert column.low is not None
        assert column.high is not None
        quarter = (column.high - column.low) / 8
        assert column.low + quarter < table[column.name].min()
        assert table[column.name].max() < column.high - quarter


def test_generated_engines_can_be_learned_in_a_few_epochs() -> None:
    sector = Production(synthetic_rows=8000)
    nodes = [sector.load(Place(p, 3, synthetic=True)) for p in range(3)]
    assert FD003 in nodes[2].test["fleet"]
    train, test = concatenate([n.train for n in nodes]), concatenate([n.test for n in nodes])
    fitted = sector.fitted_on(train)
    recipe = replace(load(["sector=production"]).sector.training, epochs=8)
    before = initial_arrays(fitted, 0)
    after = training.train(fitted, recipe, before, train, seed=0).arrays
    rmse = [fitted.metrics(training.evaluate(fitted, params, test))["rmse"] for params in (before, after)]
    assert rmse[1] < 12.0 < rmse[0]


def test_generated_tables_are_about_as_long_as_asked() -> None:
    for rows in (5400, 27_000):
        assert len(Production(synthetic_rows=rows).generate()) == pytest.approx(rows, rel=0.15)
    assert TRAIN in Production(synthetic_rows=1).pool(Production(synthetic_rows=1).generate()).split  # type: ignore[operator]
