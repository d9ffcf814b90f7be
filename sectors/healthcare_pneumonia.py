"""Pneumonia on chest X-rays of children, between clinics whose scanners differ in exposure.

PneumoniaMNIST (MedMNIST v2, CC BY 4.0): 5,856 X-rays of 28 x 28 grey levels, 1 = pneumonia, in the official splits of
4,708 / 524 / 624.  Clinics divide the images of all three, and no image moves from its split: each trains, validates
and tests on its share.  Pneumonia is 74 % of the training images and 62.5 % of the test images, so accuracy at 0.5 says
little and AUC decides.  Eight images stand in training and in validation: the training copies are dropped.  Copies
within a split stay together at one clinic.

A file of one's own is a `.npz` with MedMNIST's keys: train_images (n, 28, 28) uint8, train_labels (n, 1), and val_* and
test_*.  Where either of those is absent the clinic divides its training images itself.
Yang et al., Scientific Data, 2023, https://doi.org/10.1038/s41597-022-01721-8; images of Kermany et al., Cell, 2018.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sectors import files, partition, schema
from sectors.base import OWN, TEST, TRAIN, VALIDATION, Batch, Pooled, Rows
from sectors.binary import Binary, Squeeze
from sectors.schema import Column
from trellis.errors import ConfigError, DataError
from trellis.types import MetricSpec

SIDE = 28
WHITE = 255.0
MEAN, STD = 0.5, 0.5
"""Of grey levels in 0..1, as MedMNIST's own experiments normalise them."""
STD_LEAST = 1 / 255
"""A clinic of blank images is not divided by 0."""

GROUPS = 4
"""Of channels that GroupNorm normalises together."""

OFFICIAL = {"train": TRAIN, "val": VALIDATION, "test": TEST}
"""MedMNIST's names of the splits."""

IMAGE = Column("image", unit="grey levels", low=0, high=255, integer=True, shape=(SIDE, SIDE))
LABEL = Column("label", categories=(0, 1), integer=True)
SPLIT = Column("split", categories=(OWN, TRAIN, VALIDATION, TEST), integer=True)

PARTITIONS = ("dirichlet", "brightness", "uniform")
NORMALISATIONS = ("image", "fixed", "node")

Table = dict[str, npt.NDArray[Any]]
"""image (n, 28, 28) uint8, label (n,) uint8, split (n,) int8."""


@dataclass(frozen=True)
class HealthcarePneumonia(Binary):
    """Pneumonia or not."""

    name: ClassVar[str] = "healthcare_pneumonia"
    title: ClassVar[str] = "Pneumonia: which chest X-rays of children show it (PneumoniaMNIST)"
    primary: ClassVar[MetricSpec] = MetricSpec("auc", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("auc", "max"),
        MetricSpec("ap", "max"),
        MetricSpec("accuracy", "max"),
    )
    data_files: ClassVar[tuple[str, ...]] = ("healthcare/pneumoniamnist.npz",)
    target: ClassVar[str] = "label"
    schema: ClassVar[tuple[Column, ...]] = (IMAGE, LABEL, SPLIT)
    head: ClassVar[tuple[str, ...]] = ("head.*",)

    partition: str = "dirichlet"
    """dirichlet: clinics differ in their share of pneumonia; brightness: in the mean grey level, as scanners do;
    uniform."""
    alpha: float = 0.5
    """Dirichlet concentration: smaller is less alike."""
    min_rows: int = 20
    """Least rows of a part under dirichlet."""
    normalisation: str = "image"
    """image: less its own mean, so that exposure cannot tell; fixed: MedMNIST's constants; node: mean and standard
    deviation of the clinic's training images."""
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels of the three convolutions, multiples of 4."""
    synthetic_rows: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(
                f"sector healthcare_pneumonia: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}"
            )
        if self.normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"sector healthcare_pneumonia: no normalisation {self.normalisation!r}; "
                f"there are {', '.join(NORMALISATIONS)}"
            )
        if self.alpha <= 0 or self.synthetic_rows < 1 or self.min_rows < 1:
            raise ConfigError("sector healthcare_pneumonia: alpha, synthetic_rows and min_rows must be above 0")
        if len(self.widths) != 3 or any(width < 1 or width % GROUPS for width in self.widths):
            raise ConfigError(
                f"sector healthcare_pneumonia: widths are {list(self.widths)}; needed are three multiples of {GROUPS}"
            )

    def files(self) -> tuple[Path, ...]:
        return (files.find(self.data_files, "PneumoniaMNIST", "https://medmnist.com (28 x 28)"),)

    def read(self, paths: tuple[Path, ...]) -> Table:
        return _read(paths[0])

    def pool(self, table: Table) -> Pooled:
        # An image that is held out counts there only: its copies in training would be learnt by heart.
        image = _ids(table["image"])
        last = np.full(image.max(initial=-1) + 1, OWN, np.int8)
        np.maximum.at(last, image, table["split"])
        kept = self.select(table, table["split"] == last[image])
        return Pooled(self.features(kept), {"brightness": kept["image"].mean(axis=(1, 2))}, kept["split"])

    def units(self, table: Table) -> npt.NDArray[Any]:
        """Copies of an image are one unit."""
        return _ids(table["image"])

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        """Copies of an image are one group."""
        return _ids(pooled.rows["x"])

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        labels = pooled.rows["y"]
        match self.partition:
            case "brightness":
                return partition.by_quantile(pooled.keys["brightness"], num_parts)
            case "dirichlet":
                return partition.by_dirichlet(labels, num_parts, self.alpha, self.rng("partition"), self.min_rows)
            case _:
                return partition.uniform(len(labels), num_parts, self.rng("partition"))

    def features(self, table: npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]) -> Rows:
        """x (n, 28, 28) uint8 of images, or of a table with `image`; with its `label` also y (n,).  Raises DataError.

        Rows stay bytes, a quarter of what floats take; `forward` scales them.
        """
        raw = {k: np.asarray(v) for k, v in (table if isinstance(table, Mapping) else {"image": table}).items()}
        schema.check(raw, (IMAGE, LABEL) if "label" in raw else (IMAGE,), "the table of X-rays")
        _require_bytes(raw["image"], "the table of X-rays", "image")
        rows: Rows = {"x": np.ascontiguousarray(raw["image"])}
        return rows | ({"y": raw["label"].astype(np.float32)} if "label" in raw else {})

    def localise(self, rows: Rows, reference: Rows) -> Rows:
        """Under normalisation=node also `mean` and `std` (n,): of the clinic's training images, in 0..1."""
        if self.normalisation != "node":
            return rows
        x = reference["x"]
        mean, std = (x.mean() / WHITE, max(x.std() / WHITE, STD_LEAST)) if len(x) else (MEAN, STD)
        n = len(rows["x"])
        return {**rows, "mean": np.full(n, mean, np.float32), "std": np.full(n, std, np.float32)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B,) of pneumonia.  Images without their clinic's mean and std are taken by MedMNIST's constants."""
        grey = batch["x"].to(torch.float32) / WHITE
        if self.normalisation == "image":
            # The mean alone: contrast is a sign (low: pneumonia, AUC 0.81 by itself), exposure is the scanner's.
            scaled = (grey - grey.mean((1, 2), keepdim=True)) / STD
        elif "mean" in batch:
            scaled = (grey - batch["mean"][:, None, None]) / batch["std"][:, None, None]
        else:
            scaled = (grey - MEAN) / STD
        outputs: Tensor = model(scaled[:, None])
        return outputs

    def build_model(self) -> nn.Module:
        return convolutions(self.widths)

    def generate(self) -> Table:
        """74 % with a bright blob in one of two lungs, a noisy chest, and the exposure of one of four scanners."""
        rng, n = self.rng("synthetic"), self.synthetic_rows
        label = rng.random(n) < 0.74
        chest = 150.0 - 70.0 * (_blob(9, 14, 5.0) + _blob(19, 14, 5.0))
        lung = np.where(rng.random(n) < 0.5, 9.0, 19.0)
        shadow = _blob(lung + rng.normal(0.0, 1.5, n), 14 + rng.normal(0.0, 3.0, n), 3.5)
        exposure = np.array([-40.0, -10.0, 15.0, 40.0])[rng.integers(0, 4, n)]
        strength = np.where(label, rng.uniform(50.0, 110.0, n), 0.0)
        images = chest + strength[:, None, None] * shadow + exposure[:, None, None] + rng.normal(0, 12, (n, SIDE, SIDE))
        split = rng.choice([TRAIN, VALIDATION, TEST], n, p=[0.7, 0.1, 0.2])
        return {
            "image": images.clip(0, 255).astype(np.uint8),
            "label": label.astype(np.uint8),
            "split": split.astype(np.int8),
        }


def convolutions(widths: tuple[int, int, int]) -> nn.Sequential:
    """Three convolutions on grids of 14, 14 and 7 pixels, their mean over the image, and one logit.

    (B, 1, 28, 28) -> (B,).  GroupNorm, not BatchNorm: nothing is kept between calls, and no row depends on others of
    its batch.  Average pooling: the gradient of max pooling is not deterministic on CUDA.
    """
    first, second, third = widths
    body = nn.Sequential(
        *_convolution(1, first, size=5, stride=2),
        *_convolution(first, second),
        nn.AvgPool2d(2),
        *_convolution(second, third),
        nn.AvgPool2d(SIDE // 4),
        nn.Flatten(),
    )
    head = nn.Sequential(nn.Linear(third, 1), Squeeze())
    return nn.Sequential(OrderedDict(body=body, head=head))


def _convolution(channels: int, width: int, size: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2), nn.GroupNorm(GROUPS, width), nn.ReLU()


def _read(path: Path) -> Table:
    """The splits of a `.npz` with MedMNIST's keys, one after another.  Raises DataError naming file and key."""
    found = {"train": _split(path, "train")}
    if not len(found["train"][0]):
        raise DataError(f"{path} has no images under train_images")
    with np.load(path) as archive:  # which was just read
        present = [name for name in OFFICIAL if f"{name}_images" in archive.files]
    found |= {name: _split(path, name) for name in present if name != "train"}
    splits = OFFICIAL if len(found) == len(OFFICIAL) else {**OFFICIAL, "train": OWN}
    images, labels = zip(*found.values(), strict=True)
    split = [np.full(len(y), splits[name], np.int8) for name, (_, y) in found.items()]
    return {"image": np.concatenate(images), "label": np.concatenate(labels), "split": np.concatenate(split)}


def _split(path: Path, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images (n, 28, 28) and labels (n,) of one of MedMNIST's splits."""
    keys = images, labels = f"{name}_images", f"{name}_labels"
    found = files.read_npz(path, keys)
    _require_bytes(found[images], str(path), images)
    n = len(found[images])
    if found[labels].shape not in ((n, 1), (n,)):
        raise DataError(
            f"{path} holds an array of shape {found[labels].shape} under {labels}, needed is ({n}, 1): a label for "
            f"each of {images}"
        )
    found[labels] = found[labels].reshape(n)
    schema.check(found, [replace(IMAGE, name=images), replace(LABEL, name=labels)], str(path))
    return found[images], found[labels].astype(np.uint8)


def _require_bytes(images: npt.NDArray[Any], origin: str, key: str) -> None:
    # Floats of 0..1 lie within the schema's bounds, and would be black to the model.
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE):
        raise DataError(
            f"{origin} holds {images.dtype} of shape {images.shape} under {key}, needed is uint8 of shape "
            f"(n, {SIDE}, {SIDE}), 0 (black) to 255 (white)"
        )


def _ids(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """An id of each image, equal for copies.  (n, 28, 28) -> (n,)"""
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    _, ids = np.unique(flat.view(f"V{SIDE * SIDE}").reshape(-1), return_inverse=True)
    return ids


def _blob(row: npt.ArrayLike, column: npt.ArrayLike, radius: float) -> npt.NDArray[np.float64]:
    """Gaussian blobs of height 1 at the given pixels.  (n,) rows and columns -> (n, 28, 28); numbers -> (28, 28)"""
    pixel = np.arange(SIDE)
    down = np.exp(-((pixel - np.asarray(row)[..., None]) ** 2) / (2 * radius**2))
    across = np.exp(-((pixel - np.asarray(column)[..., None]) ** 2) / (2 * radius**2))
    blobs: npt.NDArray[np.float64] = down[..., :, None] * across[..., None, :]
    return blobs
