"""Pneumonia: official splits that stay apart, exposure that cannot tell, and files that are not MedMNIST's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conf.load import load
from sectors import healthcare_pneumonia, training
from sectors.base import OWN, SPLITS, TEST, TRAIN, VALIDATION, NodeData, Place, Rows, concatenate, num_rows
from sectors.healthcare_pneumonia import HealthcarePneumonia, Table
from sectors.params import initial_arrays
from trellis.errors import ConfigError, DataError, MissingData
from trellis.types import Role

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def official() -> Table:
    try:
        return HealthcarePneumonia().read(HealthcarePneumonia().files())
    except MissingData as error:
        pytest.skip(str(error))


def nodes(num_parts: int, synthetic: bool = False, **options: Any) -> list[NodeData]:
    return [HealthcarePneumonia(**options).load(Place(p, num_parts, synthetic=synthetic)) for p in range(num_parts)]


def images(*levels: int) -> npt.NDArray[np.uint8]:
    """One flat image a level."""
    return np.stack([np.full((28, 28), level, np.uint8) for level in levels])


def medmnist(path: Path, **arrays: npt.NDArray[Any]) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def three_splits() -> Arrays:
    return {
        "train_images": images(1, 2, 2, 3, 4),
        "train_labels": np.array([[0], [1], [1], [0], [1]], np.uint8),
        "val_images": images(4, 5),
        "val_labels": np.array([[1], [0]], np.uint8),
        "test_images": images(6, 7, 7),
        "test_labels": np.array([[0], [1], [1]], np.uint8),
    }


# ---------------------------------------------------------------- the official file


def test_the_official_counts_less_training_copies_of_validation_images(official: Table) -> None:
    assert len(official["image"]) == 4708 + 524 + 624
    pooled = HealthcarePneumonia().pool(official)
    assert pooled.split is not None
    # 8 images stand in training and validation, 2 of them twice in training
    assert np.bincount(pooled.split).tolist() == [4708 - 10, 524, 624]
    shares = [round(float(pooled.rows["y"][pooled.split == s].mean()), 3) for s in (TRAIN, VALIDATION, TEST)]
    assert shares == [0.742, 0.742, 0.625]


@pytest.mark.parametrize("partition", healthcare_pneumonia.PARTITIONS)
def test_official_splits_stay_apart_and_copies_together_at_every_clinic(official: Table, partition: str) -> None:
    homes: dict[bytes, set[tuple[int, str]]] = {}
    sizes = dict.fromkeys(SPLITS, 0)
    for number, node in enumerate(nodes(10, partition=partition)):
        for split in SPLITS:
            sizes[split] += num_rows(node.split(split))
            for x in node.split(split)["x"]:
                homes.setdefault(x.tobytes(), set()).add((number, split))
    assert sizes == {"train": 4698, "validation": 524, "test": 624}
    assert all(len(home) == 1 for home in homes.values())


def test_brightness_bands_differ_in_exposure_and_in_pneumonia(official: Table) -> None:
    parts = [concatenate([node.split(s) for s in SPLITS]) for node in nodes(3, partition="brightness")]
    means = [part["x"].mean(axis=(1, 2)) for part in parts]
    assert all(below.max() <= above.min() + 1e-9 for below, above in pairwise(means))
    assert abs(len(means[0]) - len(means[2])) < 10
    assert parts[2]["y"].mean() > parts[0]["y"].mean() + 0.2


def test_dirichlet_clinics_have_their_least_rows_and_other_shares_of_pneumonia(official: Table) -> None:
    parts = [concatenate([node.split(s) for s in SPLITS]) for node in nodes(10)]
    assert min(num_rows(part) for part in parts) >= 19  # a copy may have followed its twin elsewhere
    shares = [float(part["y"].mean()) for part in parts]
    assert max(shares) - min(shares) > 0.4


def test_a_test_node_tests_on_official_test_images_only(official: Table) -> None:
    data = HealthcarePneumonia(partition="uniform").load(Place(0, 2, role=Role.test, holds_out=True))
    test = {x.tobytes() for x in official["image"][official["split"] == TEST]}
    assert num_rows(data.test)
    assert {x.tobytes() for x in data.test["x"]} <= test


# ---------------------------------------------------------------- files of one's own


def test_copies_are_counted_once_a_split_and_only_where_they_are_held_out(tmp_path: Path) -> None:
    table = HealthcarePneumonia().read((medmnist(tmp_path / "own.npz", **three_splits()),))
    pooled = HealthcarePneumonia().pool(table)
    assert pooled.split is not None
    found = [(int(x[0, 0]), int(split)) for x, split in zip(pooled.rows["x"], pooled.split, strict=True)]
    assert found == [(1, 0), (2, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2), (7, 2)]
    assert pooled.keys["brightness"].tolist() == [1, 2, 2, 3, 4, 5, 6, 7, 7]
    groups = HealthcarePneumonia().groups(pooled)
    assert len(np.unique(groups)) == 7
    assert groups[1] == groups[2]
    assert groups[7] == groups[8]


def test_training_images_alone_are_divided_by_the_clinic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (100, 28, 28), np.uint8), (np.arange(100) % 2).astype(np.uint8)
    own = medmnist(tmp_path / "own.npz", train_images=x, train_labels=y)  # labels (n,) do as well
    assert (HealthcarePneumonia().read((own,))["split"] == OWN).all()
    data = HealthcarePneumonia().load(Place(4, 10, path=own))
    assert [num_rows(data.split(s)) for s in SPLITS] == [60, 20, 20]
    assert [float(data.split(s)["y"].mean()) for s in SPLITS] == [0.5, 0.5, 0.5]


def test_without_validation_images_the_test_images_stay_test_images(tmp_path: Path) -> None:
    arrays = {k: v for k, v in three_splits().items() if not k.startswith("val")}
    table = HealthcarePneumonia().read((medmnist(tmp_path / "own.npz", **arrays),))
    assert table["split"].tolist() == [OWN] * 5 + [TEST] * 3


def test_the_official_file_as_a_file_of_ones_own_keeps_its_splits(official: Table) -> None:
    (path,) = HealthcarePneumonia().files()
    data = HealthcarePneumonia().load(Place(0, 3, path=path))
    assert [num_rows(data.split(s)) for s in SPLITS] == [4698, 524, 624]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"own.npz has no array train_images"),
        ({"val_labels": None}, r"own.npz has no array val_labels"),
        ({"train_images": images(1, 2, 2, 3, 4) / 255.0}, r"own.npz holds float64 .* under train_images, .* uint8"),
        ({"test_images": np.zeros((3, 64, 64), np.uint8)}, r"\(3, 64, 64\) under test_images, .*\(n, 28, 28\)"),
        ({"val_images": np.zeros((2, 28, 28, 3), np.uint8)}, r"\(2, 28, 28, 3\) under val_images"),
        ({"train_images": np.uint8(0)}, r"shape \(\) under train_images"),
        ({"train_labels": np.zeros((4, 1), np.uint8)}, r"\(4, 1\) under train_labels, needed is \(5, 1\)"),
        ({"train_labels": np.array([0, 1, 2, 0, 1])}, r"0, 1 in column train_labels \(1 of 5 rows, first row 3: 2\)"),
        ({"test_labels": np.array(["a", "b", "c"])}, r"non-numeric values in column test_labels"),
    ],
)
def test_a_file_that_is_not_medmnists_is_refused_by_name_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arrays = {k: v for k, v in {**three_splits(), **changes}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        HealthcarePneumonia().read((medmnist(tmp_path / "own.npz", **arrays),))


def test_a_file_without_an_image_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    empty = medmnist(tmp_path / "empty.npz", train_images=images(1)[:0], train_labels=np.zeros((0, 1), np.uint8))
    with pytest.raises(DataError, match=r"empty.npz has no images under train_images"):
        HealthcarePneumonia().read((empty,))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(medmnist(tmp_path / "whole.npz", **three_splits()).read_bytes()[:-40])
    with pytest.raises(DataError, match=r"broken.npz cannot be read as .npz"):
        HealthcarePneumonia().read((broken,))


# ---------------------------------------------------------------- what a model sees


def test_features_take_images_or_a_table_with_or_without_labels() -> None:
    x = images(3, 9)
    alone, table = (
        HealthcarePneumonia().features(x),
        HealthcarePneumonia().features({"image": x, "label": np.array([0, 1])}),
    )
    assert list(alone) == ["x"]
    assert np.array_equal(alone["x"], x)
    assert alone["x"].dtype == np.uint8
    assert table["y"].tolist() == [0.0, 1.0]
    assert table["y"].dtype == np.float32


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": images(1)}, "the table of X-rays has no column image"),
        (images(1)[0], r"shape \(28,\) in column image, needed is \(28, 28\)"),
        (images(1) / 255.0, "whole numbers in column image"),
        (images(1).astype(np.int64), "holds int64 of shape .* under image, needed is uint8"),
        ({"image": images(1, 2), "label": [0, 2]}, "column label"),
    ],
)
def test_features_of_anything_else_say_what_is_wrong(table: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        HealthcarePneumonia().features(table)


def seen_by_the_model(sector: HealthcarePneumonia, rows: Rows) -> torch.Tensor:
    return sector.forward(torch.nn.Identity(), {k: torch.as_tensor(v) for k, v in rows.items()})


def test_each_normalisation_by_hand() -> None:
    x = np.zeros((2, 28, 28), np.uint8)
    x[0, :14] = 204  # 0.8 above, 0 below: mean 0.4
    x[1] = 51  # 0.2 everywhere
    rows: Rows = {"x": x}

    def seen(normalisation: str) -> list[list[float]]:
        sector = HealthcarePneumonia(normalisation=normalisation)
        found = seen_by_the_model(sector, sector.localise(rows, rows))
        assert found.shape == (2, 1, 28, 28)
        return [[round(float(image[0, 0, 0]), 4), round(float(image[0, -1, 0]), 4)] for image in found]

    assert seen("image") == [[0.8, -0.8], [0.0, 0.0]]
    assert seen("fixed") == [[0.6, -1.0], [-0.6, -0.6]]
    # of all pixels: mean 0.3, variance (0.5^2 + 0.3^2 + 2 * 0.1^2) / 4 = 0.09
    assert seen("node") == [[1.6667, -1.0], [-0.3333, -0.3333]]


def test_exposure_alone_changes_nothing_under_image_normalisation() -> None:
    x = np.random.default_rng(0).integers(50, 200, (4, 28, 28)).astype(np.uint8)
    sector = HealthcarePneumonia()
    model = sector.build_model()
    dark, bright = (sector.forward(model, {"x": torch.as_tensor(x + np.uint8(more))}) for more in (0, 50))
    assert torch.allclose(dark, bright, atol=1e-4)


def test_node_normalisation_is_of_the_nodes_training_images_only(tmp_path: Path) -> None:
    own = medmnist(tmp_path / "own.npz", **three_splits())
    data = HealthcarePneumonia(normalisation="node").load(Place(0, 1, path=own))
    trained = np.array([1, 2, 2, 3]) / 255
    for split in SPLITS:
        assert np.allclose(data.split(split)["mean"], trained.mean())
        assert np.allclose(data.split(split)["std"], 1 / 255)  # 0.7 / 255 is less than the least


def test_images_without_their_clinic_are_taken_by_the_published_constants() -> None:
    rows: Rows = {"x": images(0, 255)}
    found = seen_by_the_model(HealthcarePneumonia(normalisation="node"), rows)
    assert found.mean((1, 2, 3)).tolist() == [-1.0, 1.0]


# ---------------------------------------------------------------- model, options, recipe


def test_the_model_has_the_size_of_the_published_baseline() -> None:
    model = HealthcarePneumonia().build_model()
    assert 20_000 < sum(p.numel() for p in model.parameters()) < 26_000
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3,)


@pytest.mark.parametrize(
    "options",
    [
        {"normalisation": "scanner"},
        {"widths": (16, 30, 64)},
        {"widths": (16, 32)},
        {"widths": (0, 32, 64)},
        {"alpha": 0.0},
        {"min_rows": 0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sector healthcare_pneumonia: "):
        HealthcarePneumonia(**options)


def test_the_recipe_learns_generated_images_in_a_few_rounds() -> None:
    recipe = load(["sector=healthcare_pneumonia"]).sector.training
    sector = HealthcarePneumonia(synthetic_rows=1000)
    parts = [sector.load(Place(p, 3, synthetic=True)) for p in range(3)]
    params = initial_arrays(sector, 0)
    for round in range(4):
        trained = [training.train(sector, recipe, params, part.train, seed=round).arrays for part in parts]
        params = {k: np.stack([np.asarray(t[k], np.float32) for t in trained]).mean(axis=0) for k in params}
    found = training.evaluate(sector, params, concatenate([part.test for part in parts]))
    assert sector.metrics(found)["auc"] > 0.8
