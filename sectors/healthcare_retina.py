"""Vessels of the retina between eye clinics: one label a pixel, and patients too few for any clinic alone.

CHASE_DB1 (CC BY 4.0): 28 fundus photographs of 14 children, both eyes of each, and the vessels as the first of two
observers drew them, 7.5 % of the pixels.  A node owns patients, and a patient's two eyes are never divided: they look
alike, and one would tell of the other.  The second observer's mask is no input and no truth: against the first it
reaches a Dice of 0.79, which is what to compare a model with.

A row is a square tile of a photograph's green channel, where vessels stand out.  Tiles cover a photograph; where they
overlap at its edges a pixel counts in the first of them (`inside`).  Vessels are thin and dark whatever the camera, so
a pixel is seen by its local contrast: less the mean of the window around it, in standard deviations, both of that
photograph alone.  A file of one's own is a `.npz` with green (n, H, W) uint8, vessel (n, H, W) uint8 of 0 and 1, and
patient (n,); other arrays in it are not read.  The scale is that of CHASE_DB1 at 0.6 of its published size, a large
vessel about 8 pixels wide.
Fraz et al., IEEE Transactions on Biomedical Engineering, 2012, https://doi.org/10.1109/TBME.2012.2205687
Ronneberger et al., U-Net, MICCAI 2015, https://arxiv.org/abs/1505.04597; soft Dice as in Milletari et al., 3DV 2016.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sectors import files, partition, schema
from sectors import metrics as measures
from sectors.base import Batch, Pooled, Rows, Sector
from sectors.schema import Column
from trellis.errors import ConfigError, DataError
from trellis.types import Counts, MetricSpec
from trellis.vectors import CountSpec

GREEN = Column("green", "grey levels", low=0, high=255, integer=True, shape=(-1, -1))
VESSEL = Column("vessel", categories=(0, 1), integer=True, shape=(-1, -1))
PATIENT = Column("patient", integer=True)
IMAGES = (GREEN, VESSEL)
"""Of any height and width: tiles are of one size."""

DARK = 8
"""Grey levels below this lie outside the camera's field of view, or are as good as black."""
FLAT = 2.0
"""Grey levels added to a window's standard deviation, so that noise of flat tissue stays small."""
ZERO, STEPS = 128, 32
"""Local contrast as a byte: 128 is none, 32 a standard deviation; more than 4 of them are cut."""
MEAN, STD = 50.0, 30.0
"""Of grey levels under normalisation=fixed: round numbers near those of a fundus photograph's green channel."""

FOLD = 2
"""Squares of 2 x 2 pixels enter the network as 4 channels: most of a U-Net's time goes into its finest grid."""
GROUP = 8
"""Channels that GroupNorm normalises together."""
PRIOR = -2.5
"""The head's first logit: 7.5 % of pixels are vessel."""
VESSEL_WEIGHT = 2.5
"""Of vessel pixels in the cross entropy.  Dice is largest where pixels above a probability of half the Dice are taken,
about 0.38 and so a weight of 1.6 (Lipton et al., ECML 2014, https://arxiv.org/abs/1402.1892).  More than that because
models miss vessels of patients they have not seen: on validation 2.5 beats 1.5, and 4 is no better."""
SMOOTH = 100.0
"""Pixels added to both sides of the soft Dice: a tile with few vessels does not outweigh the others."""
CHUNK = 64
"""Tiles that go through the network at once where nothing is trained: a thousand do not fit a small node's memory."""

PARTITIONS = ("patients", "uniform")
NORMALISATIONS = ("image", "fixed")

Table = dict[str, npt.NDArray[Any]]
"""green and vessel (n, H, W) uint8, patient (n,) int64."""


@dataclass(frozen=True)
class HealthcareRetina(Sector):
    """Vessel or not, for every pixel.  Outputs are (B, T, T) logits; `assemble` puts tiles back into photographs."""

    name: ClassVar[str] = "healthcare_retina"
    title: ClassVar[str] = "Retina: which pixels of a fundus photograph are vessels (CHASE_DB1)"
    primary: ClassVar[MetricSpec] = MetricSpec("dice", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (
        MetricSpec("dice", "max"),
        MetricSpec("sensitivity", "max"),
        MetricSpec("precision", "max"),
        MetricSpec("auc", "max"),
    )
    data_files: ClassVar[tuple[str, ...]] = ("healthcare/retina_chase.npz",)
    schema: ClassVar[tuple[Column, ...]] = (GREEN, VESSEL, PATIENT)
    head: ClassVar[tuple[str, ...]] = ("head.*",)

    partition: str = "patients"
    """patients: nodes own patients in the order of their numbers; uniform: drawn patients."""
    normalisation: str = "image"
    """image: local contrast of the photograph; fixed: grey levels by constants."""
    window: int = 25
    """Side of the window of local contrast in pixels, odd; about three large vessels wide."""
    tile: int = 60
    """Side of a tile in pixels."""
    channels: tuple[int, ...] = (16, 32)
    """Of the U-Net by level, multiples of 8."""
    synthetic_rows: int = 28
    """How many photographs `generate` makes, two a patient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(
                f"sector healthcare_retina: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}"
            )
        if self.normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"sector healthcare_retina: no normalisation {self.normalisation!r}; "
                f"there are {', '.join(NORMALISATIONS)}"
            )
        if not self.channels or any(c < 1 or c % GROUP for c in self.channels):
            raise ConfigError(
                f"sector healthcare_retina: channels are {list(self.channels)}; needed are multiples of {GROUP}"
            )
        halved = FOLD * 2 ** (len(self.channels) - 1)
        if self.tile < 1 or self.tile % halved:
            raise ConfigError(
                f"sector healthcare_retina: tile is {self.tile}; it must be a multiple of {halved} with "
                f"{len(self.channels)} levels"
            )
        if self.window < 3 or self.window % 2 == 0 or self.synthetic_rows < 1:
            raise ConfigError("sector healthcare_retina: window must be odd and at least 3, synthetic_rows above 0")

    def files(self) -> tuple[Path, ...]:
        where = "https://researchdata.kingston.ac.uk/96, with the arrays green, vessel and patient as .npz"
        return (files.find(self.data_files, "CHASE_DB1", where),)

    def read(self, paths: tuple[Path, ...]) -> Table:
        table = files.read_npz(paths[0], [column.name for column in self.schema])
        _check(table, self.schema, str(paths[0]))
        return {**table, "patient": table["patient"].astype(np.int64)}

    def units(self, table: Table) -> npt.NDArray[Any]:
        """The patient: both eyes belong together."""
        return table["patient"]

    def pool(self, table: Table) -> Pooled:
        # Black corners have nothing to see and no vessel; alike in all photographs, they would be in every split.
        rows = self.features(table)
        blank = (rows["x"] == rows["x"][:, :1, :1]).all((1, 2)) & ~rows["y"].any((1, 2))
        patient = np.repeat(table["patient"], len(blank) // len(table["patient"]))
        return Pooled({name: values[~blank] for name, values in rows.items()}, {"patient": patient[~blank]})

    def groups(self, pooled: Pooled) -> npt.NDArray[Any]:
        return pooled.keys["patient"]

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        patients, inverse = np.unique(pooled.keys["patient"], return_inverse=True)
        if num_parts > len(patients):
            raise DataError(
                f"{len(patients)} patients cannot be divided into {num_parts} parts, a patient is at one node: "
                f"use at most {len(patients)} nodes, or generated rows (two of sector.options.synthetic_rows a patient)"
            )
        if self.partition == "patients":
            return partition.by_quantile(patients, num_parts)[inverse]
        return partition.uniform(len(patients), num_parts, self.rng("partition"))[inverse]

    def labels(self, rows: Rows) -> npt.NDArray[Any]:
        """One class: patients are divided by their number alone."""
        return np.zeros(len(rows["x"]), np.int64)

    def features(self, table: npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]) -> Rows:
        """Tiles of photographs (n, H, W) uint8, or of a table with `green`; k a photograph, row by row of its grid.

        -> x (n k, T, T) uint8, inside (n k, T, T) uint8, 1 where a pixel counts; with `vessel` also y (n k, T, T).
        Raises DataError.
        """
        raw = table if isinstance(table, Mapping) else {"green": np.asarray(table)}
        _check(raw, IMAGES if "vessel" in raw else (GREEN,), "the table of photographs")
        green = raw["green"]
        # both are bytes, an eighth of what floats take with their copies; `forward` scales them
        fixed = self.normalisation == "fixed"
        seen = green if fixed else np.stack([local_contrast(image, self.window) for image in green])
        rows: Rows = {"x": cut(seen, self.tile, fill=0 if fixed else ZERO)}
        n, height, width = green.shape
        rows["inside"] = np.tile(_inside(height, width, self.tile), (n, 1, 1))
        return rows | ({"y": cut(raw["vessel"], self.tile)} if "vessel" in raw else {})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, T, T) of vessel."""
        centre, scale = (MEAN, STD) if self.normalisation == "fixed" else (ZERO, STEPS)
        outputs: Tensor = model((batch["x"].to(torch.float32) - centre) / scale)
        return outputs

    def build_model(self) -> nn.Module:
        return UNet(self.channels)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of a tile's pixels, their mean, and 1 - its soft Dice.  -> (B,)"""
        target, inside = batch["y"].to(outputs.dtype), batch["inside"].to(outputs.dtype)
        weight = outputs.new_tensor(VESSEL_WEIGHT)
        entropy = nn.functional.binary_cross_entropy_with_logits(outputs, target, reduction="none", pos_weight=weight)
        mean = (entropy * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1.0)
        found, truth = torch.sigmoid(outputs) * inside, target * inside
        sizes = found.sum((1, 2)) + truth.sum((1, 2))
        return mean + 1.0 - (2.0 * (found * truth).sum((1, 2)) + SMOOTH) / (sizes + SMOOTH)

    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        """Histograms of the logits of pixels that count: of vessels, and of the others."""
        counted = batch["inside"].bool()
        logits, vessel = outputs.detach()[counted].cpu().numpy(), batch["y"][counted].cpu().numpy()
        return measures.score_counts(logits, vessel)

    def count_specs(self) -> tuple[CountSpec, ...]:
        pixels = float(self.tile**2)
        return (
            CountSpec("positives", (measures.NUM_BINS,), "int64", pixels),
            CountSpec("negatives", (1, measures.NUM_BINS), "int64", pixels),
        )

    def counts_problem(self, counts: Counts) -> str | None:
        """No more pixels than the tiles have."""
        pixels, most = int(counts["positives"].sum() + counts["negatives"].sum()), int(counts["rows"]) * self.tile**2
        return f"{pixels} pixels of tiles that have {most}" if pixels > most else None

    def metrics(self, counts: Counts) -> dict[str, float]:
        """Over all pixels, not a mean over photographs: Dice, sensitivity and precision at probability 0.5, and AUC.

        Dice = 2 tp / (2 tp + fp + fn).  None of them without a vessel to find.
        """
        if not counts or not counts["positives"].sum():
            return {}
        vessel, other = counts["positives"], counts["negatives"].sum(axis=0)
        half = measures.NUM_BINS // 2  # logit 0, a border of bins
        tp, fn, fp = int(vessel[half:].sum()), int(vessel[:half].sum()), int(other[half:].sum())
        auc = measures.auc_from_counts(vessel, other)
        return {
            "dice": 2 * tp / (2 * tp + fp + fn),
            "sensitivity": tp / (tp + fn),
            "precision": tp / max(tp + fp, 1),
            **({"auc": auc} if auc is not None else {}),
        }

    def generate(self) -> Table:
        """Eyes of 180 x 200 pixels: a bright disc from which dark, winding vessels run, lit from one side."""
        rng, n = self.rng("synthetic"), self.synthetic_rows
        drawn = [_eye(rng) for _ in range(n)]
        return {
            "green": np.stack([green for green, _ in drawn]),
            "vessel": np.stack([vessel for _, vessel in drawn]),
            "patient": np.arange(n, dtype=np.int64) // 2 + 1,
        }


class UNet(nn.Module):
    """Levels of two convolutions, the grid halved between them and doubled on the way back.  (B, T, T) -> (B, T, T)

    GroupNorm, not BatchNorm: nothing is kept between calls, and no tile depends on others of its batch.  Average
    pooling and transposed convolutions: gradients of max pooling and of interpolation are not deterministic on CUDA.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (FOLD**2, *channels)
        self.down = nn.ModuleList(_level(a, b) for a, b in zip(widths, channels, strict=False))
        back = list(zip(channels[::-1], channels[-2::-1], strict=False))
        self.lift = nn.ModuleList(nn.ConvTranspose2d(a, b, kernel_size=2, stride=2) for a, b in back)
        self.up = nn.ModuleList(_level(2 * b, b) for _, b in back)
        self.head = nn.Conv2d(channels[0], FOLD**2, kernel_size=1)
        nn.init.constant_(self.head.bias, PRIOR)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):  # nothing to shuffle
            return x.new_zeros(x.shape)
        if torch.is_grad_enabled():
            return self._logits(x)
        return torch.cat([self._logits(chunk) for chunk in torch.split(x, CHUNK)])

    def _logits(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_unshuffle(x[:, None], FOLD).contiguous(memory_format=torch.channels_last)
        kept: list[Tensor] = []
        for level in self.down:
            x = level(nn.functional.avg_pool2d(x, 2) if kept else x)
            kept.append(x)
        for lift, level, fine in zip(self.lift, self.up, kept[-2::-1], strict=True):
            x = level(torch.cat([lift(x), fine], 1))
        return nn.functional.pixel_shuffle(self.head(x), FOLD)[:, 0]


def _level(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(channels, width), *_convolution(width, width))


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width // GROUP, width), nn.ReLU()


def local_contrast(green: npt.NDArray[np.uint8], window: int) -> npt.NDArray[np.uint8]:
    """(g - mean) / (std + FLAT) of the lit pixels in the window around each pixel.  (H, W) -> (H, W)

    As bytes, ZERO + STEPS a standard deviation.  Dark pixels have no contrast and count in no window.
    """
    lit = green >= DARK
    grey = np.where(lit, green, 0).astype(np.int64)
    # sums of whole numbers are exact: the same bytes on every machine
    number, total, squares = (_window_sums(a, window // 2) for a in (lit.astype(np.int64), grey, grey**2))
    mean = total / np.maximum(number, 1)
    deviation = np.sqrt(np.maximum(squares / np.maximum(number, 1) - mean**2, 0.0))
    contrast = np.where(lit, (grey - mean) / (deviation + FLAT), 0.0)
    seen: npt.NDArray[np.uint8] = np.rint(ZERO + STEPS * contrast).clip(0, 255).astype(np.uint8)
    return seen


def _window_sums(values: npt.NDArray[np.int64], reach: int) -> npt.NDArray[np.int64]:
    """Sums over the square of `reach` pixels to each side, as far as it lies in the image.  (H, W) -> (H, W)"""
    side = 2 * reach + 1
    for _ in range(2):  # down, then across
        running = np.pad(values, ((reach + 1, reach), (0, 0))).cumsum(axis=0)
        values = (running[side:] - running[:-side]).T
    return values


def cut(images: npt.NDArray[np.uint8], tile: int, fill: int = 0) -> npt.NDArray[np.uint8]:
    """Tiles of images, row by row of the grid; images smaller than a tile are filled up.  (n, H, W) -> (n k, T, T)"""
    n, height, width = images.shape
    filled = ((0, 0), (0, max(0, tile - height)), (0, max(0, tile - width)))
    whole = np.pad(images, filled, constant_values=fill)
    tiles = [whole[:, y : y + tile, x : x + tile] for y, x in _corners(height, width, tile)]
    return np.stack(tiles, axis=1).reshape(n * len(tiles), tile, tile)


def assemble(tiles: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Tiles of predictions put back into images of `shape` (H, W).  (n k, T, T) -> (n, H, W)

    Law:  `assemble(cut(images, tile), shape) == images`.  A pixel is taken from the tile that it counts in.
    Raises DataError where tiles are not those of whole images.
    """
    (height, width), tile = shape, tiles.shape[-1]
    corners, inside = _corners(height, width, tile), _inside(height, width, tile).astype(bool)
    if len(tiles) % len(corners):
        raise DataError(f"{len(tiles)} tiles are no whole images: one of {height} x {width} has {len(corners)} tiles")
    by_image = tiles.reshape(-1, len(corners), tile, tile)
    images = np.zeros((len(by_image), max(height, tile), max(width, tile)), tiles.dtype)
    for i, (y, x) in enumerate(corners):
        images[:, y : y + tile, x : x + tile][:, inside[i]] = by_image[:, i][:, inside[i]]
    return images[:, :height, :width]


def _corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """First row and column of each tile; the last ones end with the image and overlap those before."""
    down, across = ([max(0, min(i * tile, side - tile)) for i in range(-(-side // tile))] for side in (height, width))
    return [(y, x) for y in down for x in across]


def _inside(height: int, width: int, tile: int) -> npt.NDArray[np.uint8]:
    """1 where a pixel of a tile counts: in the first tile that has it.  -> (k, T, T)"""
    free = np.zeros((max(height, tile), max(width, tile)), np.uint8)
    free[:height, :width] = 1
    masks = []
    for y, x in _corners(height, width, tile):
        here = free[y : y + tile, x : x + tile]
        masks.append(here.copy())
        here[:] = 0
    return np.stack(masks)


def _check(table: Mapping[str, npt.NDArray[Any]], columns: Sequence[Column], origin: str) -> None:
    """Refuse photographs and masks that are not bytes, not alike in shape, or no masks.  Raises DataError."""
    sized = [
        replace(c, shape=_size(table[c.name], c, origin)) if c in IMAGES and c.name in table else c for c in columns
    ]
    schema.check(table, sized, origin)
    if VESSEL in columns and table["vessel"].shape != table["green"].shape:
        raise DataError(
            f"{origin} holds arrays of shape {table['green'].shape} under green and {table['vessel'].shape} under "
            "vessel: needed is a mask of each photograph"
        )


def _size(images: npt.NDArray[Any], column: Column, origin: str) -> tuple[int, int]:
    """Height and width of (n, H, W) bytes, which may be any.  Raises DataError."""
    # floats of 0..1 lie within the bounds of grey levels, and would be black to the model
    if images.dtype != np.uint8:
        raise DataError(f"{origin} holds {images.dtype} under {column.name}, needed is uint8, {column.range}")
    if images.ndim != 3 or not images.size:
        raise DataError(f"{origin} holds an array of shape {images.shape} under {column.name}, needed is (n, H, W)")
    return images.shape[1], images.shape[2]


def _eye(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A photograph and its vessels, (180, 200) each."""
    height, width = 180, 200
    row, column = np.mgrid[:height, :width]
    disc = np.array([height / 2, width / 2]) + rng.uniform(-30, 30, 2)
    vessel = np.zeros((height, width), bool)
    for direction in rng.uniform(0, 2 * np.pi) + np.arange(8) * np.pi / 4:
        _draw(vessel, rng, disc, direction, thickness=int(rng.integers(1, 4)))
    seen = (row - height / 2) ** 2 + (column - width / 2) ** 2 < (0.49 * height) ** 2
    vessel &= seen
    slope = rng.normal(0.0, 0.1, 2)
    light = rng.uniform(50, 90) + slope[0] * (row - height / 2) + slope[1] * (column - width / 2)
    light += 40.0 * np.exp(-((row - disc[0]) ** 2 + (column - disc[1]) ** 2) / 200.0)
    green = light * np.where(vessel, 0.75, 1.0) + rng.normal(0.0, 3.0, vessel.shape)
    return np.where(seen, green.clip(DARK, 255), 0).astype(np.uint8), vessel.astype(np.uint8)


def _draw(
    vessel: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    start: npt.NDArray[np.float64],
    direction: float,
    *,
    thickness: int,
) -> None:
    """Mark a winding line of 120 pixels, 2 thickness + 1 wide."""
    angle = direction + np.cumsum(rng.normal(0.0, 0.06, 240))
    path = start + 0.5 * np.cumsum(np.column_stack([np.sin(angle), np.cos(angle)]), axis=0)
    reach = np.arange(-thickness, thickness + 1)
    brush = np.array([(y, x) for y in reach for x in reach if y * y + x * x <= thickness**2])
    marked = (np.rint(path).astype(np.int64)[:, None] + brush).reshape(-1, 2)
    marked = marked[((marked >= 0) & (marked < vessel.shape)).all(axis=1)]
    vessel[marked[:, 0], marked[:, 1]] = True
