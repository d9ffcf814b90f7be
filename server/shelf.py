"""The versions of one run at one store: a LoggedModel each, and a version of the registered model `trellis-<sector>`.

The alias `best` is on the best version so far, `final` on the last.  Aliases belong to the registered model and move on
with the next run of the sector; the tags `fl.best` and `fl.final` stay with this run's versions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from server import store
from server.folder import RunFolder
from server.ledger import Kept, Ledger
from server.run_info import MAX_TAG, RunInfo
from server.versions import Card, read_card
from trellis.errors import VersionError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


class Shelf:
    """Registers versions.  `careful`: look for what a killed process may have written before writing it again."""

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        folder: RunFolder,
        info: RunInfo,
        ledger: Ledger,
        *,
        experiment: str,
        run_id: str,
        outputs: Iterable[str] = (),
    ) -> None:
        """`outputs`: ids of the models that the MLflow run `run_id` is known to have made."""
        self.careful = False
        self._client, self._folder, self._info, self._ledger = client, folder, info, ledger
        self._experiment, self._run_id, self._outputs = experiment, run_id, set(outputs)
        self._is_sqlite = store.sqlite_path(uri) is not None
        self._is_served = re.match(r"https?:|databricks", uri) is not None

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return self._info.model_name

    def keep(self, round_: int, metrics: Mapping[str, float]) -> bool:
        """Register the version of a round, unless the store has it or the folder does not.  -> whether it did."""
        path = self._folder.version_path(round_)
        try:
            card = read_card(path)
        except VersionError:
            return False
        old = self._ledger.versions.get(round_)
        if old is not None and old.digest == card.digest:
            return False
        model = self._find_model(card) or self._create_model(card)
        self._fill(model, path, round_)
        version = self._find_version(card) or self._create_version(card, model, metrics)
        if not self._is_served:
            self._link(model.model_id, version)
        if old is not None:  # the round was done again, with other params
            self._tag(old.version, "fl.superseded_by", str(version))
        self._ledger.versions[round_] = Kept(card.digest, model.model_id, version)
        return True

    def point_best(self, round_: int) -> None:
        """Move the alias `best`, unless this run's ledger says it is there."""
        if self._ledger.best != round_:
            self._client.set_registered_model_alias(self.name, "best", str(self._ledger.versions[round_].version))
            self._ledger.best = round_

    def crown(self, what: str, round_: int | None) -> None:
        """Alias and tag of the run's `best` or `final` version, at its end; nothing for a version that is not kept."""
        if round_ is None or round_ not in self._ledger.versions:
            return
        version = self._ledger.versions[round_].version
        for old in self._search(f"tags.`fl.{what}` = 'true'"):
            if old != version:
                self._client.delete_model_version_tag(self.name, str(old), f"fl.{what}")
        self._tag(version, f"fl.{what}", "true")
        self._client.set_registered_model_alias(self.name, what, str(version))
        if what == "best":
            self._ledger.best = round_

    def _create_model(self, card: Card) -> LoggedModel:
        params = {"round": str(card.round), "sector": card.sector, "num_params": str(card.num_params)}
        params |= {k.removeprefix("fl."): v for k, v in self._info.choices.items()}
        return self._client.create_logged_model(
            self._experiment,
            name=re.sub(r"[^\w\-]", "-", f"{self._info.run_name}-r{card.round:03d}"),
            source_run_id=self._run_id,
            tags=self._tags(card),
            params=params,
            model_type="federated-global",
        )

    def _fill(self, model: LoggedModel, path: Path, round_: int) -> None:
        """Files, status, and the run's link to the model; each may be done twice."""
        from mlflow.entities import LoggedModelOutput

        if self._is_sqlite and model.artifact_location.startswith("/"):
            # MLflow would get there too, with two more reads of the store.
            shutil.copytree(path, model.artifact_location, dirs_exist_ok=True)
        else:
            self._client.log_model_artifacts(model.model_id, str(path))
        self._client.finalize_logged_model(model.model_id, "READY")
        if model.model_id not in self._outputs:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=round_)])
            self._outputs.add(model.model_id)

    def _create_version(self, card: Card, model: LoggedModel, metrics: Mapping[str, float]) -> int:
        measured = json.dumps(dict(metrics), sort_keys=True)[:MAX_TAG]
        tags = {**self._tags(card), "fl.model_id": model.model_id, "fl.metrics": measured}
        if self._is_served:  # a server refuses paths
            source, model_id = f"models:/{model.model_id}", model.model_id
        else:  # straight on a database `models:/<id>` would be looked up under MLflow's global URI
            source, model_id = model.artifact_location, None
        made = self._client.create_model_version(
            self.name, source, self._run_id, tags, model_id=model_id, await_creation_for=0
        )
        return int(made.version)

    def _link(self, model_id: str, version: int) -> None:
        """What fills the column "Registered models" of MLflow's pages; a server writes it itself."""
        link = json.dumps([{"name": self.name, "version": version}])
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})

    def _tag(self, version: int, key: str, value: str) -> None:
        self._client.set_model_version_tag(self.name, str(version), key, value)

    def _tags(self, card: Card) -> dict[str, str]:
        return {
            "fl.run": self._info.run_id,
            "fl.round": str(card.round),
            "fl.digest": card.digest,
            "fl.nodes": ", ".join(card.nodes)[:MAX_TAG],
            "fl.config_digest": card.config_digest,
            "fl.data": card.data_source,
        }

    def _find_model(self, card: Card) -> LoggedModel | None:
        if not self.careful:
            return None
        mine = f"tags.`fl.run` = '{self._info.run_id}' AND tags.`fl.round` = '{card.round}'"
        found = self._client.search_logged_models([self._experiment], mine)
        return next((m for m in found if m.tags.get("fl.digest") == card.digest), None)

    def _find_version(self, card: Card) -> int | None:
        if not self.careful:
            return None
        found = self._search(f"tags.`fl.round` = '{card.round}' and tags.`fl.digest` = '{card.digest}'")
        return found[0] if found else None

    def _search(self, where: str) -> list[int]:
        mine = f"name = '{self.name}' and run_id = '{self._run_id}' and {where}"
        return [int(v.version) for v in self._client.search_model_versions(mine)]
