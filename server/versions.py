"""Model versions: the params after a round, on disk, whole and verifiable.

    versions/round-00007/
        model.safetensors   the shared params
        card.json           a `Card`: which run and round made it, from what, and the digest of its params
        MLmodel             lets `mlflow.pyfunc.load_model` build the sector's model and predict

A version is written once, in one rename.  The digest binds names, shapes, dtypes and bytes of the params; every reader
recomputes it, so a changed file is refused: `read_version(write_version(f, r, params, card)) == (params, card)`.
MLflow is not needed to write a version, nor to read one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from conf.schema import RunConfig, config_digest, sector_options, to_json
from trellis import canonical, vectors
from trellis.errors import VersionError

if TYPE_CHECKING:
    from torch import nn

    from sectors.base import Sector
    from server.folder import RunFolder

Params = dict[str, npt.NDArray[np.generic]]

_logger = logging.getLogger(__name__)

MODEL, CARD, MLMODEL = "model.safetensors", "card.json", "MLmodel"


@cache
def _release(package: str) -> str:
    """Installed release of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _trellis_release() -> str:
    return _release("trellis")


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a version when it is written.  Its metrics arrive a round later, in the next record."""

    run: str
    round: int
    digest: str
    """`vectors.digest` of the params."""
    sector: str
    options: Mapping[str, Any]
    """Options of the sector; with its name they rebuild the model."""
    config_digest: str
    data_source: str
    nodes: tuple[str, ...]
    """Nodes whose updates were combined in this round; none for the initial model."""
    created_at: float
    num_params: int = 0
    base_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the version before, which the round was told."""
    local_layers: tuple[str, ...] = ()
    """Tensors that stay at the nodes.  They are not in this version: it predicts with their initial values."""
    seed: int = 0
    """The run's seed; the initial local layers follow it."""
    trellis: str = field(default_factory=_trellis_release)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        run: str,
        round: int,
        digest: str,
        nodes: Sequence[str],
        num_params: int,
        created_at: float,
        base_metrics: Mapping[str, float] | None = None,
        local_layers: Sequence[str] = (),
        fitted: Mapping[str, Any] | None = None,
    ) -> Card:
        """A version's card; what does not change within a run comes from its configuration, and from what it fitted."""
        return cls(
            run=run,
            round=round,
            digest=digest,
            sector=config.sector.name,
            options=to_json({**sector_options(config), **(fitted or {})}),
            config_digest=config_digest(config),
            data_source=config.data.value,
            nodes=tuple(nodes),
            created_at=created_at,
            num_params=num_params,
            base_metrics=dict(base_metrics or {}),
            local_layers=tuple(local_layers),
            seed=config.seed,
        )


def write_version(folder: RunFolder, round_: int, params: vectors.Arrays, card: Card) -> Path:
    """Write the version of `round_`, whole or not at all.  -> its folder

    Asked again for the same params it changes nothing; for other params (a round that a resumed run did again) it
    replaces the version.  Raises VersionError when the card is of other params or of another round.
    """
    found = vectors.digest(params)
    if (card.round, card.digest) != (round_, found):
        raise VersionError(
            f"the card is of round {card.round}, digest {card.digest[:12]}; the params are of round {round_}, "
            f"digest {found[:12]}: a version is written with its own card"
        )
    path = folder.version_path(round_)
    if _is_written(path, card):
        return path
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(temporary / MODEL, save({k: np.ascontiguousarray(a).reshape(a.shape) for k, a in params.items()}))
    _write(temporary / CARD, json.dumps(dataclasses.asdict(card), indent=1, sort_keys=True).encode())
    _write(temporary / MLMODEL, _mlmodel(card).encode())
    _sync_folder(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    _sync_folder(path.parent)
    return path


def read_card(path: Path) -> Card:
    """The card of a version's folder.  Raises VersionError."""
    try:
        fields: dict[str, Any] = json.loads((path / CARD).read_bytes())
        fields |= {k: tuple(fields[k]) for k in ("nodes", "local_layers")}
        return Card(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VersionError(f"{path} holds no version that can be read: {error}") from error


def read_version(path: Path) -> tuple[Params, Card]:
    """Params and card of a version, verified.  Raises VersionError when the digest differs from the card's."""
    card = read_card(path)
    try:
        params: Params = load((path / MODEL).read_bytes())
    except (OSError, SafetensorError) as error:
        raise VersionError(f"{path / MODEL} cannot be read: {error}") from error
    found = vectors.digest(params)
    if found != card.digest:
        raise VersionError(
            f"{path / MODEL} has digest {found[:12]}, its card says {card.digest[:12]}: the file was changed after it "
            "was written; take this version from another copy"
        )
    return params, card


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """A version that predicts.  `predict(table)` takes a DataFrame with the columns of the sector's published data."""

    sector: Sector
    model: nn.Module
    card: Card

    def predict(self, table: Any) -> npt.NDArray[Any]:
        """(n rows) -> (n, ...) predictions, as `Sector.predict` gives them."""
        import torch

        from sectors.base import num_rows, to_batch

        rows = self.sector.features(table)
        parts = []
        with torch.no_grad():
            for start in range(0, num_rows(rows), 4096):
                batch = to_batch(rows, slice(start, start + 4096), torch.device("cpu"))
                parts.append(self.sector.predict(self.sector.forward(self.model, batch)))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)


def load_predictor(path: Path) -> Predictor:
    """The sector's model with a version's params, verified.  Raises VersionError."""
    import sectors
    from sectors.params import initial_arrays, load_into

    params, card = read_version(path)
    sector = sectors.get(card.sector, card.options)
    initial = initial_arrays(sector, card.seed)
    local = {name for name in initial if sector.is_local(name)}
    if set(initial) - local != set(params) or any(initial[k].shape != a.shape for k, a in params.items()):
        raise VersionError(
            f"{path} does not fit the model of sector {card.sector}: it holds {sorted(params)}, the model has "
            f"{sorted(set(initial) - local)}; load it with Trellis {card.trellis}, which wrote it"
        )
    if local:
        _logger.warning("round %d predicts with the initial values of layers that stay at nodes: %s", card.round, local)
    model = load_into(sector.build_model(), {**initial, **params})
    return Predictor(sector, model.eval(), card)


def _load_pyfunc(path: str) -> Predictor:
    """What `mlflow.pyfunc.load_model` calls."""
    return load_predictor(Path(path))


def _is_written(path: Path, card: Card) -> bool:
    # The folder came by a rename after fsync: if its card can be read, all of it was written.
    try:
        old = read_card(path)
    except VersionError:
        return False
    return (old.run, old.round, old.digest) == (card.run, card.round, card.digest)


def _mlmodel(card: Card) -> str:
    """The YAML that MLflow would write for this loader, without MLflow and its seconds."""
    created = datetime.fromtimestamp(card.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    uuid = canonical.digest([card.run, card.round, card.digest])[:32]
    # json.dumps: a JSON text is a YAML text, whatever the run is called
    lines = [
        "flavors:",
        "  python_function:",
        "    loader_module: server.versions",
        f"    python_version: {platform.python_version()}",
        "metadata:",
        f"  digest: {json.dumps(card.digest)}",
        f"  round: {card.round}",
        f"  run: {json.dumps(card.run)}",
        f"  sector: {json.dumps(card.sector)}",
        f"mlflow_version: {_release('mlflow')}",
        f"model_uuid: {json.dumps(uuid)}",
        f"utc_time_created: {json.dumps(created)}",
    ]
    return "\n".join(lines) + "\n"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
