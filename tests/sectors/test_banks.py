"""Card fraud: what must not leak, and what the sample's weights mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sectors import banks
from sectors.banks import Banks
from sectors.base import SPLITS, NodeData, Place, num_rows
from trellis.errors import DataError, MissingData
from trellis.types import Role


@pytest.fixture(scope="module")
def sample() -> pd.DataFrame:
    try:
        path = Banks().files()
    except MissingData as error:
        pytest.skip(str(error))
    if "sample" not in path[0].name:
        pytest.skip("the full file is here, not the sample")
    return Banks().read(path)


def nodes(num_parts: int, **options: object) -> list[NodeData]:
    return [Banks(**options).load(Place(p, num_parts)) for p in range(num_parts)]  # type: ignore[arg-type]


def test_the_nineteen_repeats_of_frauds_are_gone(sample: pd.DataFrame) -> None:
    y = Banks().pool(sample).rows["y"]
    assert (len(sample), len(y), int(y.sum())) == (6697, 6678, 473)


@pytest.mark.parametrize("partition", banks.PARTITIONS)
def test_no_payment_stands_in_two_splits_or_at_two_nodes(sample: pd.DataFrame, partition: str) -> None:
    seen: dict[bytes, tuple[int, str]] = {}
    total = 0
    for number, node in enumerate(nodes(10, partition=partition)):
        for split in SPLITS:
            for row in node.split(split)["x"]:
                total += 1
                assert seen.setdefault(row.tobytes(), (number, split)) == (number, split)
    assert total == 6678


def test_time_and_source_never_reach_the_inputs(sample: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    moved = sample.assign(Time=rng.permutation(sample["Time"]), src=rng.permutation(sample["src"]))
    without = sample.drop(columns=["Time", "src", "Class"])
    x = Banks().features(sample)["x"]
    assert np.array_equal(Banks().features(moved)["x"], x)
    assert np.array_equal(Banks().features(without)["x"], x)
    assert list(Banks().features(without)) == ["x"]
    assert set(Banks().load(Place(0, 3)).train) == {"x", "y", "stratum"}


def test_published_scales_fit_the_normals_of_the_sample(sample: pd.DataFrame) -> None:
    normal = sample[sample["Class"] == 0]
    weight = np.where(normal["Time"] <= banks.EARLY, 24.2, 234.8)
    v = normal[list(banks.COMPONENTS)].to_numpy()
    mean = np.average(v, axis=0, weights=weight)
    std = np.sqrt(np.average((v - mean) ** 2, axis=0, weights=weight))
    assert np.abs(mean / banks.SCALES).max() < 0.1
    assert np.abs(std / banks.SCALES - 1).max() < 0.2
    assert abs(weight.sum() / 284_315 - 1) < 0.01


def test_amount_bands_differ_in_amount_and_in_fraud(sample: pd.DataFrame) -> None:
    parts = nodes(3)
    assert [num_rows(n.train) + num_rows(n.validation) + num_rows(n.test) for n in parts] == [2226, 2226, 2226]
    largest = [n.train["x"][:, -1].max() for n in parts]
    assert largest == sorted(largest)
    shares = [float(n.train["y"].mean()) for n in parts]
    assert max(shares) > 3 * min(shares)


def test_only_the_sample_is_weighted(sample: pd.DataFrame) -> None:
    sector = Banks()

    def measured(table: pd.DataFrame) -> dict[str, float]:
        rows = sector.features(table)
        batch = {k: torch.as_tensor(v) for k, v in rows.items()}
        return sector.metrics(sector.counts(-batch["x"][:, 13], batch))  # V14 alone finds most frauds

    here, full = measured(sample), measured(sample.drop(columns="src"))
    assert here["ap_true"] < here["ap"] - 0.1
    assert full["ap_true"] == full["ap"] == here["ap"]


def test_a_node_of_normals_only_loads_and_leaves_out_what_cannot_be_computed(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    table = Banks(synthetic_rows=50).generate()
    table[table["Class"] == 0].to_csv(own, index=False)
    sector = Banks()
    data = sector.load(Place(0, 1, path=own))
    batch = {k: torch.as_tensor(v) for k, v in data.test.items()}
    assert sector.metrics(sector.counts(torch.zeros(len(batch["y"])), batch)) == {}


def test_a_node_of_one_row_trains_on_it(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    Banks(synthetic_rows=1).generate().to_csv(own, index=False)
    data = Banks().load(Place(4, 10, path=own))
    assert [num_rows(data.split(s)) for s in SPLITS] == [1, 0, 0]
    assert data.test["x"].shape == (0, 29)


def test_an_own_file_is_split_alike_wherever_its_node_stands(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    Banks(synthetic_rows=100).generate().to_csv(own, index=False)
    first, moved = (Banks().load(Place(p, n, path=own)) for p, n in ((0, 3), (7, 10)))
    assert np.array_equal(first.test["x"], moved.test["x"])


def test_an_own_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    for n in (30, 40):
        Banks(synthetic_rows=n).generate().to_csv(own, index=False)
        assert num_rows(Banks().load(Place(0, 1, role=Role.test, path=own)).test) == n


def test_features_of_a_table_without_an_input_name_it() -> None:
    with pytest.raises(DataError, match="no column V7"):
        Banks().features(Banks().generate().drop(columns="V7"))
