"""From a run's folder to MLflow, each thing once.

One federated run is one MLflow run (`fl.role=federation`); its nodes are child runs, its versions stand on a `Shelf`.
The ledger (`tracking.json`) says what a store already has.

A kill can fall between a write to MLflow and its mark in the ledger.  Then the write is found again by its tags
(`fl.run`, `fl.round`) before it would be repeated: delivering twice is delivering once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from conf.schema import TrackingConfig
from server import points, store
from server.folder import RunFolder
from server.ledger import Kept, Ledger, Spool, load_ledgers, round_of, save_ledger
from server.points import Point
from server.run_info import MAX_TAG, RunInfo, flatten
from server.shelf import Shelf
from trellis import canonical
from trellis.errors import TrackingError
from trellis.types import Purpose, RoundRecord

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

PURPOSES: tuple[Purpose, ...] = ("train", "evaluate")


class Session:
    """One connection to one store.  After any error it is thrown away and a new one looks at what is there."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrackingConfig,
        info: RunInfo,
        uri: str,
        go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        """`go_on` turns False when somebody else may take over: nothing is marked after that."""
        self._folder, self._config, self._info, self._uri = folder, config, info, uri
        self._go_on = go_on
        self._key = store.without_password(uri)
        self._ledger = load_ledgers(folder).get(self._key, Ledger())
        self._spool = Spool(folder)
        self._client = store.connect(uri)
        self._experiment = self._find_experiment()
        found = self._find_run()
        self._run_id = self._resume_run(found) if found else self._create_run()
        outputs = found.outputs.model_outputs if found and found.outputs else []
        self._shelf = Shelf(
            self._client,
            uri,
            folder,
            info,
            self._ledger,
            experiment=self._experiment,
            run_id=self._run_id,
            outputs=[output.model_id for output in outputs],
        )
        # A write may be there without its mark: any, if the ledger was lost; else only the next one.
        self._shelf.careful = found is not None
        self._prepare(found)

    def deliver(self) -> None:
        """Send every record that waits, oldest first."""
        only_next = bool(self._ledger.records)
        for name, record in self._spool.pending(self._ledger):
            self._check()
            self._deliver(name, record)
            self._shelf.careful = self._shelf.careful and not only_next
        self._shelf.careful = False

    def settle(self) -> None:
        """Keep the last and the best version whatever `every` says, move the aliases, sum up, end the MLflow runs."""
        state = canonical.digest(sorted(self._ledger.records.items()))[:16]
        if self._ledger.settled == state:
            return
        self._shelf.careful = True
        ended = self._has_ended()
        # The initial model can be the best one; before the end that only means that nothing else was measured yet.
        values = {r: v for r, v in self._ledger.values.items() if r > 0 or ended}
        last, best = self._last(), self._best(values)
        for round_ in sorted({r for r in (last, best) if r is not None}):
            self._keep_late(round_)
        self._shelf.crown("best", best)
        self._shelf.crown("final", last)
        # The param `rounds` is what the run began with: params cannot change.
        self._client.set_tag(self._run_id, "fl.rounds", str(max(self._trained(), default=0)))
        self._client.set_tag(self._run_id, "mlflow.note.content", self._summary(last, best)[:MAX_TAG])
        for run_id in (*self._ledger.nodes.values(), self._run_id):
            self._client.set_terminated(run_id, "FINISHED" if ended else "FAILED")
        self._ledger.settled = state
        self._save()

    # Opening: what is already there is found by its tags.

    def _find_experiment(self) -> str:
        name = self._config.experiment or self._info.sector
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = store.artifact_location(self._uri, name)
            store.unless_there(lambda: self._client.create_experiment(name, location))
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {name!r} is deleted at {self._key}: restore it, or set tracking.experiment"
            )
        return str(found.experiment_id)

    def _find_run(self) -> Run | None:
        mine = f"tags.`fl.run` = '{self._info.run_id}' and tags.`fl.role` = 'federation'"
        runs = self._client.search_runs([self._experiment], mine, max_results=1)
        return runs[0] if runs else None

    def _create_run(self) -> str:
        self._ledger = Ledger()  # whatever it said, this store has nothing of the run
        waiting = self._spool.pending(self._ledger)
        began = waiting[0][1].started_at if waiting else time.time()
        run = self._client.create_run(
            self._experiment,
            start_time=int(1000 * began),
            tags=self._info.run_tags(),
            run_name=self._info.run_name,
        )
        return str(run.info.run_id)

    def _resume_run(self, run: Run) -> str:
        run_id = str(run.info.run_id)
        if run.info.status != "RUNNING" and self._spool.pending(self._ledger):
            self._client.update_run(run_id, status="RUNNING")
        mine, token = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`fl.role` = 'node'", None
        while True:
            page = self._client.search_runs([self._experiment], mine, max_results=1000, page_token=token)
            self._ledger.nodes |= {child.data.tags["fl.node"]: child.info.run_id for child in page}
            token = page.token
            if not token:
                return run_id

    def _prepare(self, found: Run | None) -> None:
        """Params, config, data set and registered model; all may be done twice."""
        from mlflow.entities import Dataset, DatasetInput, Param

        self._ledger.run_id = self._run_id
        if self._ledger.prepared:
            return
        self._check()
        # Params cannot change: a prolonged run keeps those it began with.
        known = set(found.data.params) if found else set()
        params = [Param(k, v) for k, v in flatten(self._info.config).items() if k not in known]
        self._client.log_batch(self._run_id, params=params)
        config = json.loads(store.without_password(json.dumps(self._info.config)))
        self._client.log_dict(self._run_id, config, "config/resolved.json")
        source = json.dumps({"sector": self._info.sector, "data": self._info.choices.get("fl.data")})
        rows = Dataset(self._info.sector, self._info.config_digest[:36], "trellis", source)
        self._client.log_inputs(self._run_id, datasets=[DatasetInput(rows)])
        tags = {"fl.sector": self._info.sector}
        store.unless_there(lambda: self._client.create_registered_model(self._info.model_name, tags))
        self._ledger.prepared = True
        self._save()

    # One record.

    def _deliver(self, name: str, record: RoundRecord) -> None:
        """The record of round r, and with it version r - 1: what was measured of it is in this record."""
        round_ = record.round - 1
        is_last = record.purpose == "evaluate"
        if round_ > 0 and (is_last or round_ % self._config.every == 0):
            self._shelf.keep(round_, _measured(record))
        self._deliver_nodes(record)
        self._deliver_points(record)
        self._note_best(record)
        self._ledger.records[name] = record.digest
        self._save()

    def _deliver_nodes(self, record: RoundRecord) -> None:
        nodes = points.nodes_of(record)
        if max(self._info.num_nodes, len({*nodes, *self._ledger.nodes})) > self._config.max_node_runs:
            suffix = "" if record.purpose == "train" else "-evaluate"
            table = points.node_table(record)
            self._client.log_dict(self._run_id, table, f"nodes/round-{record.round:05d}{suffix}.json")
            return
        other = self._other(record)
        for node in nodes:
            if node not in self._ledger.nodes:
                tags = self._info.node_tags(node, self._run_id)
                run = self._client.create_run(self._experiment, start_time=_stamp(record), tags=tags, run_name=node)
                self._ledger.nodes[node] = run.info.run_id
            run_id = self._ledger.nodes[node]
            if self._sent_at(run_id, "refused", record) is None:
                many = points.of_node(record, node)
                if other is not None and self._has(run_id, "refused", other):
                    many = _without(many, points.of_node(other, node))
                self._client.log_batch(run_id, metrics=_metrics(many, record))

    def _deliver_points(self, record: RoundRecord) -> None:
        many = [*self._new_of_version(record), *points.of_round(record)]
        sent_at = self._sent_at(self._run_id, "round/num_asked", record)
        if sent_at is not None:
            # One batch is one transaction: all points are there.  Their links to the model are another one.
            many = [p for p in many if p.of_version]
        kept = self._ledger.versions.get(record.round - 1)
        self._client.log_batch(self._run_id, metrics=_metrics(many, record, kept, sent_at))

    def _new_of_version(self, record: RoundRecord) -> list[Point]:
        """Without what the other record of this round already said of this version."""
        found, other = points.of_version(record), self._other(record)
        if other is not None and self._has(self._run_id, "round/num_asked", other):
            return _without(found, points.of_version(other))
        return found

    def _other(self, record: RoundRecord) -> RoundRecord | None:
        """The round's other record: a run that was prolonged has a closing evaluation and a training of one round."""
        path = self._folder.record_path(record.round, "evaluate" if record.purpose == "train" else "train")
        return self._spool.read(path)

    def _has(self, run_id: str, key: str, record: RoundRecord) -> bool:
        """Whether an MLflow run has the record's points, marked or not."""
        return self._name(record) in self._ledger.records or self._sent_at(run_id, key, record) is not None

    def _name(self, record: RoundRecord) -> str:
        return self._folder.record_path(record.round, record.purpose).name

    def _sent_at(self, run_id: str, key: str, record: RoundRecord) -> int | None:
        """Time stamp under which a killed process sent the record's points; None when they are still to be sent."""
        if not self._shelf.careful:
            return None
        marked = int(self._name(record) in self._ledger.records)
        history = self._client.get_metric_history(run_id, points.named(record, key))
        found = sorted(int(m.timestamp) for m in history if m.step == record.round)
        return found[-1] if len(found) > marked else None

    def _note_best(self, record: RoundRecord) -> None:
        round_ = record.round - 1
        value = record.base_metrics.get(f"val/{self._info.primary.name}")
        if value is not None and math.isfinite(value):
            self._ledger.values[round_] = value
        if self._best({r: v for r, v in self._ledger.values.items() if r in self._ledger.versions}) == round_:
            self._shelf.point_best(round_)

    # The end of a run.

    def _keep_late(self, round_: int) -> None:
        """Keep a version that no record brought, and link the metrics that were sent without it."""
        paths = [self._folder.record_path(round_ + 1, purpose) for purpose in PURPOSES]
        found = [self._spool.read(path) for path in paths if path.name in self._ledger.records]
        measured = [record for record in found if record is not None]
        metrics = {k: v for record in measured for k, v in _measured(record).items()}
        if self._shelf.keep(round_, metrics):
            for record in measured:
                late = [p for p in points.of_version(record) if p.of_version]
                self._client.log_batch(self._run_id, metrics=_metrics(late, record, self._ledger.versions[round_]))

    def _last(self) -> int | None:
        return max((r for r in self._trained() if self._folder.version_path(r).exists()), default=None)

    def _trained(self) -> list[int]:
        return [round_of(name) for name in self._ledger.records if name.endswith("-train.json")]

    def _best(self, values: Mapping[int, float]) -> int | None:
        """Round of the best value; of equal ones the first."""
        best: int | None = None
        for round_, value in sorted(values.items()):
            if best is None or self._info.primary.better(value, values[best]):
                best = round_
        return best

    def _has_ended(self) -> bool:
        """The closing evaluation is the last thing a run does; without it the run was interrupted."""
        newest = max(self._ledger.records, key=lambda name: (round_of(name), "evaluate" in name), default="")
        return newest.endswith("-evaluate.json")

    def _summary(self, last: int | None, best: int | None) -> str:
        choices = ", ".join(f"{k.removeprefix('fl.')} {v}" for k, v in sorted(self._info.choices.items()))
        lines = [f"**{self._info.sector}**, {len(self._trained())} rounds: {choices}", ""]
        for what, round_ in (("Best", best), ("Last", last)):
            if round_ is not None:
                value, kept = self._ledger.values.get(round_), self._ledger.versions.get(round_)
                measured = f", val/{self._info.primary.name} {value:.4g}" if value is not None else ""
                registered = f", {self._info.model_name} version {kept.version}" if kept else ""
                lines.append(f"- {what}: round {round_}{measured}{registered}")
        lines.append(f"- Config `{self._info.config_digest[:12]}`, run `{self._info.run_id}`")
        return "\n".join(lines)

    def _check(self) -> None:
        if not self._go_on():
            raise TrackingError("delivery was stopped; the records stay in the run folder")

    def _save(self) -> None:
        self._check()
        store.flush(self._uri)
        save_ledger(self._folder, self._key, self._ledger)


def _measured(record: RoundRecord) -> dict[str, float]:
    return {p.key: p.value for p in points.of_version(record) if p.of_version}


def _without(many: Iterable[Point], sent: Iterable[Point]) -> list[Point]:
    """The points that stand where no sent one does."""
    taken = {(p.key, p.step) for p in sent}
    return [p for p in many if (p.key, p.step) not in taken]


def _metrics(
    many: Iterable[Point], record: RoundRecord, kept: Kept | None = None, stamp: int | None = None
) -> list[Metric]:
    from mlflow.entities import Metric

    at = _stamp(record) if stamp is None else stamp
    return [Metric(p.key, p.value, at, p.step, model_id=kept.model_id if kept and p.of_version else None) for p in many]


def _stamp(record: RoundRecord) -> int:
    # The round's own time: a point sent twice is then the same point, and MLflow drops it.
    return int(record.started_at * 1000)
