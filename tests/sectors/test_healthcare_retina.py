"""Retina: patients that stay whole, pixels that count once, contrast of a photograph alone, files that are no masks."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conf.load import load
from sectors import healthcare_retina, training
from sectors.base import SPLITS, NodeData, Place, Pooled, concatenate, num_rows, take, to_batch
from sectors.healthcare_retina import DARK, ZERO, HealthcareRetina, Table, assemble, cut, local_contrast
from sectors.params import initial_arrays, reproducible
from trellis.errors import ConfigError, DataError, MissingData

Arrays = dict[str, npt.NDArray[Any]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chase() -> Table:
    try:
        return HealthcareRetina().read(HealthcareRetina().files())
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pooled(chase: Table) -> Pooled:
    return HealthcareRetina().pool(chase)


def nodes(num_parts: int, synthetic: bool = True, **options: Any) -> list[NodeData]:
    return [HealthcareRetina(**options).load(Place(p, num_parts, synthetic=synthetic)) for p in range(num_parts)]


def patients_of(node: NodeData, pooled: Pooled) -> dict[str, set[int]]:
    """Whose tiles a node has in each split."""
    owner = {x.tobytes(): int(p) for x, p in zip(pooled.rows["x"], pooled.keys["patient"], strict=True)}
    return {split: {owner[x.tobytes()] for x in node.split(split)["x"]} for split in SPLITS}


def photographs(n: int = 4, height: int = 70, width: int = 90) -> Arrays:
    """Noise with two bright columns, two photographs a patient; other arrays as the published file has them."""
    green = np.random.default_rng(0).integers(DARK, 100, (n, height, width)).astype(np.uint8)
    vessel = np.zeros_like(green)
    vessel[:, :, 10:12] = 1
    return {
        "green": green,
        "vessel": vessel,
        "vessel_2nd_observer": vessel,
        "patient": np.arange(n, dtype=np.int16) // 2 + 1,
        "eye_is_right": np.arange(n, dtype=np.uint8) % 2,
    }


def saved(folder: Path, **arrays: npt.NDArray[Any]) -> Path:
    path = folder / "own.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


# ---------------------------------------------------------------- the published file


def test_the_first_observers_vessels_of_both_eyes_of_fourteen_patients(chase: Table) -> None:
    assert chase["green"].shape == chase["vessel"].shape == (28, 576, 599)
    assert chase["patient"].tolist() == [p for p in range(1, 15) for _ in range(2)]
    assert round(float(chase["vessel"].mean()), 3) == 0.075
    assert set(chase) == {"green", "vessel", "patient"}


def test_no_vessel_is_lost_and_what_is_dropped_is_black(chase: Table, pooled: Pooled) -> None:
    sector, rows = HealthcareRetina(), pooled.rows
    grey, vessel = cut(chase["green"], sector.tile), cut(chase["vessel"], sector.tile)
    black = (grey.max(axis=(1, 2)) < DARK) & ~vessel.any((1, 2))
    assert (len(grey), num_rows(rows), int(black.sum())) == (2800, 2432, 368)
    assert (rows["y"] * rows["inside"]).sum(dtype=int) == chase["vessel"].sum(dtype=int)
    assert len({x.tobytes() for x in rows["x"]}) == num_rows(rows)


def test_nodes_own_patients_in_their_order_and_both_eyes_are_in_one_split(pooled: Pooled) -> None:
    owned = [patients_of(node, pooled) for node in nodes(3, synthetic=False)]
    assert [sorted(set().union(*o.values())) for o in owned] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14]]
    assert [[len(o[s]) for s in SPLITS] for o in owned] == [[3, 1, 1], [3, 1, 1], [2, 1, 1]]
    assert all(sum(map(len, o.values())) == len(set().union(*o.values())) for o in owned)


# ---------------------------------------------------------------- owners and splits


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_drawn_patients_are_whole_and_at_one_node(num_parts: int) -> None:
    pooled = HealthcareRetina().pool(HealthcareRetina().generate())
    owned = [patients_of(node, pooled) for node in nodes(num_parts, partition="uniform")]
    assert sorted(p for o in owned for s in SPLITS for p in o[s]) == list(range(1, 15))
    if num_parts > 1:
        in_order = [patients_of(node, pooled) for node in nodes(num_parts)]
        assert set().union(*owned[0].values()) != set().union(*in_order[0].values())


@pytest.mark.parametrize("partition", healthcare_retina.PARTITIONS)
def test_fourteen_nodes_own_a_patient_each_and_all_of_them_train(partition: str) -> None:
    for node in nodes(14, partition=partition):
        assert num_rows(node.train) > 0
        assert num_rows(node.validation) == num_rows(node.test) == 0


@pytest.mark.parametrize("num_parts", [15, 100_000])
def test_more_nodes_than_patients_are_refused_with_the_numbers(num_parts: int) -> None:
    said = f"14 patients cannot be divided into {num_parts} parts.*at most 14 nodes"
    for partition in healthcare_retina.PARTITIONS:
        with pytest.raises(DataError, match=said):
            HealthcareRetina(partition=partition).load(Place(0, num_parts, synthetic=True))


def test_rows_of_a_patient_do_not_depend_on_who_else_is_in_the_file() -> None:
    sector = HealthcareRetina()
    table = sector.generate()
    chosen = np.isin(sector.units(table), [3, 9])
    whole, part = sector.pool(table), sector.pool(sector.select(table, chosen))
    index = np.flatnonzero(np.isin(whole.keys["patient"], [3, 9]))
    for name, values in take(whole.rows, index).items():
        assert values.tobytes() == part.rows[name].tobytes()


def test_the_server_holds_whole_patients_that_no_node_has() -> None:
    sector = HealthcareRetina(server_fraction=0.1)
    held = {x.tobytes() for x in sector.server_rows(synthetic=True)["x"]}
    of_nodes = {x.tobytes() for n in nodes(3, server_fraction=0.1) for s in SPLITS for x in n.split(s)["x"]}
    assert held
    assert not held & of_nodes


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 10), (3, 9), (2, 3), (4, 4)])
def test_tiles_count_every_pixel_once_and_can_be_put_back(height: int, width: int) -> None:
    images = np.arange(1, 2 * height * width + 1, dtype=np.uint8).reshape(2, height, width)
    tiles = cut(images, 4)
    inside = np.concatenate([healthcare_retina._inside(height, width, 4)] * 2)
    assert tiles.shape == inside.shape
    assert sorted(tiles[inside == 1].tolist()) == sorted(images.reshape(-1).tolist())
    assert np.array_equal(assemble(tiles, (height, width)), images)


def test_tiles_at_the_edge_end_with_the_image_and_count_what_is_left() -> None:
    image = np.arange(30, dtype=np.uint8).reshape(1, 5, 6)
    tiles, inside = cut(image, 4), healthcare_retina._inside(5, 6, 4)
    assert tiles[:, 0, 0].tolist() == [0, 2, 6, 8]
    assert inside.sum((1, 2)).tolist() == [16, 8, 4, 2]
    assert tiles[3][inside[3] == 1].tolist() == [28, 29]


def test_tiles_of_half_an_image_cannot_be_put_back() -> None:
    with pytest.raises(DataError, match=r"3 tiles are no whole images: one of 5 x 6 has 4 tiles"):
        assemble(np.zeros((3, 4, 4)), (5, 6))


def test_predictions_are_probabilities_that_make_images_of_the_photographs_size() -> None:
    sector, green = HealthcareRetina(), photographs()["green"]
    rows = sector.features(green)
    assert set(rows) == {"x", "inside"}
    with torch.no_grad():
        outputs = sector.forward(sector.build_model(), to_batch(rows, slice(None), CPU))
    found = assemble(sector.predict(outputs), (70, 90))
    assert found.shape == green.shape
    assert ((found > 0) & (found < 1)).all()


# ---------------------------------------------------------------- what a model sees


def slowly(green: npt.NDArray[np.uint8], window: int) -> npt.NDArray[np.uint8]:
    """Local contrast pixel by pixel, as it is defined."""
    found = np.full(green.shape, ZERO, np.uint8)
    for y, x in product(*map(range, green.shape)):
        r = window // 2
        around = green[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].astype(float)
        lit = around[around >= DARK]
        if green[y, x] >= DARK:
            contrast = (green[y, x] - lit.mean()) / (lit.std() + healthcare_retina.FLAT)
            found[y, x] = np.rint(ZERO + healthcare_retina.STEPS * contrast).clip(0, 255)
    return found


@pytest.mark.parametrize("window", [3, 7, 41])
def test_local_contrast_is_that_of_the_lit_pixels_around(window: int) -> None:
    green = np.random.default_rng(1).integers(0, 60, (17, 23)).astype(np.uint8)
    difference = local_contrast(green, window).astype(int) - slowly(green, window)
    assert np.abs(difference).max() <= 1  # a tie of rounding


def test_a_pixel_of_contrast_by_hand() -> None:
    green = np.full((3, 3), 100, np.uint8)
    green[1, 1] = 10
    # mean 90, deviation sqrt(800) = 28.28: (10 - 90) / 30.28 = -2.64, which is 128 - 84.5
    assert local_contrast(green, 3)[1, 1] == 43


def test_exposure_cannot_be_seen_in_the_contrast_and_can_in_grey_levels() -> None:
    green = np.random.default_rng(2).integers(50, 90, (1, 60, 60)).astype(np.uint8)
    image, fixed = HealthcareRetina(), HealthcareRetina(normalisation="fixed")
    assert np.array_equal(image.features(green)["x"], image.features(green + np.uint8(60))["x"])
    assert np.array_equal(fixed.features(green)["x"], green)


def test_the_mask_never_reaches_the_inputs() -> None:
    sector, table = HealthcareRetina(), HealthcareRetina().generate()
    turned = {**table, "vessel": table["vessel"][::-1], "patient": table["patient"][::-1]}
    x = sector.features(table)["x"]
    assert np.array_equal(sector.features(turned)["x"], x)
    assert np.array_equal(sector.features(table["green"])["x"], x)
    assert "y" not in sector.features({"green": table["green"]})


# ---------------------------------------------------------------- loss, counts, metrics


def a_batch(y: npt.NDArray[np.uint8], inside: npt.NDArray[np.uint8] | None = None) -> dict[str, torch.Tensor]:
    return {"y": torch.tensor(y), "inside": torch.ones(y.shape) if inside is None else torch.tensor(inside)}


def test_dice_sensitivity_and_precision_by_hand() -> None:
    sector = HealthcareRetina()
    y = np.array([[[1, 1, 1, 0], [0, 0, 0, 0]]], np.uint8)
    outputs = torch.tensor([[[2.0, 1.0, -1.0, 3.0], [-2.0, -2.0, -2.0, -2.0]]])
    found = sector.metrics(sector.counts(outputs, a_batch(y)))
    # tp 2, fn 1, fp 1; each vessel pixel lies above four of the five others
    assert found["dice"] == pytest.approx(4 / 6)
    assert found["sensitivity"] == found["precision"] == pytest.approx(2 / 3)
    assert found["auc"] == pytest.approx(12 / 15)


def test_pixels_that_do_not_count_change_neither_loss_nor_counts() -> None:
    sector, rng = HealthcareRetina(), np.random.default_rng(3)
    y, inside = (rng.integers(0, 2, (2, 8, 8)).astype(np.uint8) for _ in range(2))
    outputs = torch.tensor(rng.normal(size=(2, 8, 8)), dtype=torch.float32)
    moved = torch.where(torch.tensor(inside) > 0, outputs, torch.tensor(50.0))
    batch, other = a_batch(y, inside), a_batch(np.where(inside, y, 1 - y).astype(np.uint8), inside)
    assert torch.equal(sector.losses(outputs, batch), sector.losses(moved, other))
    one, two = sector.counts(outputs, batch), sector.counts(moved, other)
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert sum(int(np.sum(c)) for c in one.values()) == inside.sum()


def test_the_loss_of_a_tile_by_hand() -> None:
    sector = HealthcareRetina()
    y = np.array([[[1, 0], [0, 0]]], np.uint8)
    zero = torch.zeros(1, 2, 2)
    # log 2 a pixel, 2.5 times for the vessel; probabilities of a half: 2 tp = 1, sizes 2 + 1
    entropy = np.log(2) * (2.5 + 3) / 4
    assert float(sector.losses(zero, a_batch(y))) == pytest.approx(entropy + 1 - 101 / 103)
    perfect = torch.tensor([[[50.0, -50.0], [-50.0, -50.0]]])
    assert float(sector.losses(perfect, a_batch(y))) == pytest.approx(0.0, abs=1e-6)


def test_without_a_vessel_there_is_nothing_to_measure() -> None:
    sector = HealthcareRetina()
    counts = sector.counts(torch.zeros(1, 4, 4), a_batch(np.zeros((1, 4, 4), np.uint8)))
    assert sector.metrics(counts) == {}
    assert float(sector.losses(torch.zeros(1, 4, 4), a_batch(np.zeros((1, 4, 4), np.uint8)))) > 0


def test_a_model_that_finds_nothing_has_a_precision_of_0() -> None:
    sector, y = HealthcareRetina(), np.eye(4, dtype=np.uint8)[None]
    found = sector.metrics(sector.counts(torch.full((1, 4, 4), -1.0), a_batch(y)))
    assert (found["dice"], found["sensitivity"], found["precision"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("channels", [(8,), (16, 32), (8, 16, 24)])
def test_a_model_of_any_depth_gives_a_logit_a_pixel_alike_in_every_batch(channels: tuple[int, ...]) -> None:
    sector = HealthcareRetina(channels=channels, tile=24)
    model, x = sector.build_model(), torch.randn(healthcare_retina.CHUNK + 1, 24, 24)
    with reproducible(0):
        trained = model(x)
        with torch.no_grad():
            assert torch.allclose(model(x), trained, atol=1e-5)
        trained.mean().backward()
    assert trained.shape == x.shape
    assert all(p.grad is not None for p in model.parameters())
    assert any(HealthcareRetina(local_layers=("head",)).is_local(name) for name in model.state_dict())


def test_the_shipped_recipe_learns_generated_vessels_in_a_few_rounds() -> None:
    recipe = load(["sector=healthcare_retina"]).sector.training
    sector = HealthcareRetina()
    node = sector.load(Place(0, 1, synthetic=True))
    params = initial_arrays(sector, 0)
    for round_ in range(2):
        params = training.train(sector, recipe, params, node.train, seed=round_).arrays
    found = sector.metrics(training.evaluate(sector, params, concatenate([node.validation, node.test])))
    assert found["dice"] > 0.7


# ---------------------------------------------------------------- files of one's own, options


def test_an_own_file_is_the_whole_part_and_its_other_arrays_are_not_read(tmp_path: Path) -> None:
    given = photographs()
    few = {key: given[key] for key in ("green", "vessel", "patient")}
    sector = HealthcareRetina()
    for arrays in (given, few):
        data = sector.load(Place(5, 10, path=saved(tmp_path, **arrays)))
        assert sum(num_rows(data.split(s)) for s in SPLITS) == 4 * 4
        assert num_rows(data.train) > 0


BAD: dict[str, tuple[Arrays, str]] = {
    "a mask of 0 and 255": ({"vessel": photographs()["vessel"] * 255}, r"outside one of 0, 1 in column vessel .*255"),
    "floats for grey levels": ({"green": photographs()["green"] / 255}, r"float64 under green, needed is uint8"),
    "a mask of truths": ({"vessel": photographs()["vessel"] > 0}, r"bool under vessel, needed is uint8"),
    "colours": ({"green": np.zeros((4, 70, 90, 3), np.uint8)}, r"shape \(4, 70, 90, 3\) under green"),
    "no photographs": ({"green": np.zeros((0, 70, 90), np.uint8)}, r"shape \(0, 70, 90\) under green"),
    "masks of another size": (
        {"vessel": np.zeros((4, 60, 90), np.uint8)},
        r"shape \(4, 70, 90\) under green and \(4, 60, 90\) under vessel",
    ),
    "patients without a number": ({"patient": np.array([1, 1, 2, np.nan])}, r"empty values in column patient"),
    "half a patient": ({"patient": np.array([1, 1, 2, 2.5])}, r"no whole numbers in column patient"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_disagrees_is_refused_with_its_name_and_key(what: str, tmp_path: Path) -> None:
    changed, said = BAD[what]
    path = saved(tmp_path, **{**photographs(), **changed})
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + said):
        HealthcareRetina().read((path,))


@pytest.mark.parametrize("key", ["green", "vessel", "patient"])
def test_a_missing_array_is_named(key: str, tmp_path: Path) -> None:
    arrays = photographs()
    path = saved(tmp_path, **{k: v for k, v in arrays.items() if k != key})
    with pytest.raises(
        DataError, match=re.escape(str(path)) + f" has no array {key}; needed are green, vessel, patient"
    ):
        HealthcareRetina().read((path,))


def test_photographs_to_predict_are_refused_like_those_of_a_file() -> None:
    for bad, said in (
        (np.zeros((1, 60, 60)), "float64 under green"),
        (np.zeros((60, 60), np.uint8), r"shape \(60, 60\) under green, needed is \(n, H, W\)"),
        ({"vessel": np.zeros((1, 60, 60), np.uint8)}, "no column green"),
    ):
        with pytest.raises(DataError, match=said):
            HealthcareRetina().features(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "hospital"}, "no partition 'hospital'; there are patients, uniform"),
        ({"normalisation": "node"}, "no normalisation 'node'; there are image, fixed"),
        ({"tile": 62}, "tile is 62; it must be a multiple of 4 with 2 levels"),
        ({"channels": (16, 20)}, r"channels are \[16, 20\]; needed are multiples of 8"),
        ({"channels": ()}, r"channels are \[\]"),
        ({"window": 24}, "window must be odd"),
        ({"synthetic_rows": 0}, "synthetic_rows above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"sector healthcare_retina: .*{said}"):
        HealthcareRetina(**options)
