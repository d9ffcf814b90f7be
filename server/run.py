"""One run, from its configuration to its result: restore or start, enrol, train, record.

commit of a round:  version -> record -> state.  The state is written last; until then the round has not happened.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from conf.load import load
from conf.schema import DataSource, RunConfig, config_digest, to_json
from sectors import schema
from sectors.base import Sector
from sectors.params import initial_arrays
from server import build, checkpoint, masking, registry, statistics, versions
from server.folder import RunFolder
from server.statistics import Fitted
from server.tracking import Delivery, RunInfo, TrackerLike, git_digest, make_tracker
from strategies.exchange import Clock, StoppedClock, WallClock, door
from strategies.flower import fresh_secret
from strategies.records import contributors
from trellis import wire
from trellis.errors import ConfigError, ResumeError
from trellis.types import NodeInfo, RoundRecord, ServerState
from trellis.vectors import digest

OnRound = Callable[[ServerState, RoundRecord], None]

PLACE = ("resume", "run_name", "runs_dir")
"""Settings that say which folder a run has; they are not kept in it."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to; `--json` prints it.  Keys are only ever added."""

    run_id: str
    run_name: str
    run_dir: str
    tracking_uri: str | None
    sector: str
    data_source: str
    engine: str
    rounds: int
    primary_metric: dict[str, Any]
    baselines: dict[str, Any] | None
    model_digest: str
    model_version: int | None
    refusals: list[dict[str, Any]]
    seconds: float
    bytes_up: int
    bytes_down: int
    epsilon_max: float | None
    best: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    model_name: str | None = None
    model_path: str | None = None
    records_pending: int = 0
    attack: dict[str, Any] | None = None
    """Of a simulation with liars: name, nodes, start_round, and the success_rate of a backdoor."""
    nodes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By node, the primary metric on its own test rows: `federated`, `tuned` where it fine-tunes, and of a simulation
    with baselines `local_only` and `pooled`; None where its rows cannot be scored."""
    secagg: dict[str, Any] | None = None
    """Of a run with secure aggregation: its groups, and what each of them gives and survives.  Then nodes' own scores
    are masked, and `nodes` has none."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Nodes that are asked no more: {"node", "round", "evidence"}, the round being the last they were asked in."""


def run(
    config: RunConfig,
    grid: Grid,
    *,
    overrides: Sequence[str] = (),
    on_round: OnRound | None = None,
) -> RunResult:
    """Run to the end, or resume to the end.

    Raises ConfigError, DataError or ResumeError before the first round; CohortTooSmall when no node enrols.
    """
    sector = build.check(config)
    started = time.monotonic()
    with _opened(config, sector, overrides) as (folder, run_id):
        clock = clock_of(grid)
        ask = door(grid, clock)
        simulated = engine_of(grid) != "deployment"
        _require_secure(config, simulated)
        grouped = replace(config, nodes=masking.federation(config))
        nodes = registry.enrol(grid, ask, grouped, schema=schema.digest(sector.schema), store=_store(folder))
        specs, problem = sector.all_statistic_specs(), sector.statistics_problem
        asking = build.exchange(config, specs, problem, clock, folder.path, simulated=simulated)
        found = statistics.fitted(folder, config, sector, asking, nodes, ask, run_id)
        sector = sector.fitted(found.options)
        state = _restored(folder, config, sector, found, run_id, fresh_secret(grid))
        earlier_s = sum(r.seconds.get("total", 0.0) for r in _counted(folder, state))
        info = _run_info(folder, config, sector, state, engine_of(grid))
        with make_tracker(folder, config.tracking, info) as tracker:
            state = _train(folder, config, sector, found, state, grid, nodes, tracker, on_round)
            delivery = tracker.close(config.tracking.close_timeout_s)
        seconds = earlier_s + time.monotonic() - started
        result = summarise(folder, config, sector, found, state, delivery, engine_of(grid), seconds)
        folder.write_json(folder.result_path, asdict(result))
        return result


def _require_secure(config: RunConfig, simulated: bool) -> None:
    """Raises ConfigError where a real federation would draw its secrets from a seed."""
    if config.privacy.secagg.insecure_rng and not simulated:
        raise ConfigError("privacy.secagg.insecure_rng=true is for simulations: anybody could foresee what is drawn")


def _train(
    folder: RunFolder,
    config: RunConfig,
    sector: Sector,
    found: Fitted,
    state: ServerState,
    grid: Grid,
    nodes: Sequence[NodeInfo],
    tracker: TrackerLike,
    on_round: OnRound | None,
) -> ServerState:
    """Every round still to be done, each committed to the folder.  -> the last state"""
    local_layers = _local_layers(sector)

    def commit(after: ServerState, record: RoundRecord) -> None:
        if record.purpose == "train":
            versions.write_version(folder, after.round, after.params, _card(config, found, local_layers, after, record))
        folder.write_record(record)
        checkpoint.save(folder.state_path, after)
        tracker.notify()
        if on_round is not None:
            on_round(after, record)

    fitted = statistics.with_fitted(config, found)
    simulated = engine_of(grid) != "deployment"
    clock = clock_of(grid)
    strategy = build.strategy(fitted, sector, clock=clock, commit=commit, scratch=folder.path, simulated=simulated)
    return strategy.run(grid, state, nodes, rounds=config.rounds)


def _store(folder: RunFolder) -> str:
    """Where simulated nodes keep what is theirs."""
    return str(folder.nodes_path.resolve())


def resumed(resume: str, overrides: Sequence[str], runs_dir: str) -> tuple[RunConfig, list[str]]:
    """The configuration of a run to be continued, with what may change on top.  Raises ResumeError.

    Only where it runs, where it is recorded, how many rounds it has and whom an operator lets in again may differ from
    the first start.
    """
    folder = _find(resume, runs_dir)
    kept = _start_of(folder)
    more = [o for o in overrides if o.partition("=")[0] not in PLACE]
    for given in overrides:
        key, _, value = given.partition("=")
        if key == "run_name" and value != folder.path.name:
            raise ResumeError(f"run_name={value} would make it another run: {folder.path.name} keeps its name")
    # Another engine or tracker chosen: the settings of the old one go with it.
    chosen = {o.partition("=")[0] for o in more if o.partition("=")[0] in ("engine", "tracking")}
    again = {o.partition("=")[0] for o in more}
    earlier = [
        o for o in kept["overrides"] if (k := o.partition("=")[0]) not in again and k.partition(".")[0] not in chosen
    ]
    merged = [*earlier, *more]
    config = load(merged)
    if config_digest(config) != kept["config_digest"]:
        raise ResumeError(
            f"{folder.path.name} was started with {' '.join(kept['overrides']) or 'the defaults'}; "
            f"{' '.join(more) or 'what is shipped now'} would make it another run. Only rounds, engine, tracking, "
            "baselines and suspicion.released may change: start a new run instead"
        )
    path = folder.path
    return replace(config, resume=str(path), run_name=path.name, runs_dir=str(path.parent)), merged


def _find(resume: str, runs_dir: str) -> RunFolder:
    """A run's folder, by path or by name under `runs_dir`."""
    candidates = [RunFolder(Path(runs_dir) / resume), RunFolder(Path(resume))]
    found = next((folder for folder in candidates if folder.config_path.exists()), None)
    if found is None:
        known = sorted(p.parent.name for p in Path(runs_dir).glob("*/config.json"))
        raise ResumeError(f"there is no run {resume!r} to resume; under {runs_dir} are: {', '.join(known) or 'none'}")
    return found


def _start_of(folder: RunFolder) -> dict[str, Any]:
    """What `config.json` says of how the run was started."""
    try:
        kept: dict[str, Any] = json.loads(folder.config_path.read_bytes())
        if not {"run_id", "overrides", "config_digest"} <= set(kept):
            raise ValueError("run_id, overrides or config_digest is missing")
        return kept
    except ValueError as error:
        raise ResumeError(f"{folder.config_path} is damaged: {error}") from error


def clock_of(grid: Grid) -> Clock:
    """Virtual time in simulation, the machine's in deployment."""
    own = getattr(grid, "clock", None)
    if own is not None:
        clock: Clock = own
        return clock
    return StoppedClock() if wire.runs_on_ray(grid) else WallClock()


def engine_of(grid: Grid) -> str:
    """The engine this Grid belongs to: local, ray or deployment."""
    if hasattr(grid, "clock"):
        return "local"
    return "ray" if wire.runs_on_ray(grid) else "deployment"


@contextmanager
def _opened(config: RunConfig, sector: Sector, overrides: Sequence[str]) -> Iterator[tuple[RunFolder, str]]:
    """The run's folder, held by this process alone, and the run's id."""
    folder = RunFolder(Path(config.runs_dir) / (config.run_name or _new_name(config)))
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResumeError(f"{folder.path.name} is running in another process") from error
        started = folder.config_path.exists()
        if started and config.resume is None:
            name = folder.path.name
            raise ResumeError(f"{folder.path} holds a run already: choose another run_name, or resume={name}")
        data = sector.fingerprint(config.data is DataSource.synthetic)
        start = _start_of(folder) if started else {"run_id": secrets.token_hex(8), "data_digest": data}
        kept = start.get("data_digest")
        if kept and data and kept != data:  # a deployed server holds no data, and has no digest to compare
            raise ResumeError(
                f"the data of sector {config.sector.name} are not those {folder.path.name} was started with "
                f"(sha256 {str(start['data_digest'])[:12]}, now {data[:12]}): start a new run"
            )
        # Written before the first round that follows from it: a lengthened run that is killed stays lengthened.
        described = {
            "overrides": [o for o in overrides if o.partition("=")[0] not in PLACE],
            "config_digest": config_digest(config),
            "config": to_json(config),
            "git_digest": git_digest(),
        }
        folder.write_json(folder.config_path, {**start, **described})
        yield folder, str(start["run_id"])


def _new_name(config: RunConfig) -> str:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.sector.name}-{config.rule.name}-{stamp}-{secrets.token_hex(2)}"


def _restored(
    folder: RunFolder, config: RunConfig, sector: Sector, found: Fitted, run_id: str, secret: str
) -> ServerState:
    """The last committed state, or the first one, committed now."""
    if folder.state_path.exists():
        state = checkpoint.load(folder.state_path)
        if state.round > config.rounds:
            raise ResumeError(
                f"{folder.path.name} has {state.round} rounds already; rounds={config.rounds} cannot undo any"
            )
        return state
    arrays = initial_arrays(sector, config.seed)
    shared = {name: a for name, a in arrays.items() if not sector.is_local(name)}
    state = ServerState(run=run_id, round=0, params=shared, seed=config.seed, secret=secret)
    versions.write_version(folder, 0, state.params, _card(config, found, _local_layers(sector), state, None))
    checkpoint.save(folder.state_path, state)
    return state


def _local_layers(sector: Sector) -> list[str]:
    """Names of the tensors that stay at the nodes."""
    return [name for name in sector.build_model().state_dict() if sector.is_local(name)]


def _card(
    config: RunConfig, found: Fitted, local_layers: Sequence[str], state: ServerState, record: RoundRecord | None
) -> versions.Card:
    """The card of the version that `record` made; the initial version has no record and no contributors."""
    stepped = record is not None and record.closed is None
    return versions.Card.of(
        config,
        fitted=found.options,
        run=state.run,
        round=state.round,
        digest=digest(state.params),
        nodes=contributors(record) if record is not None and stepped else [],
        num_params=sum(a.size for a in state.params.values()),
        created_at=record.started_at if record is not None else time.time(),
        base_metrics=record.base_metrics if record is not None else None,
        local_layers=local_layers,
    )


def _run_info(folder: RunFolder, config: RunConfig, sector: Sector, state: ServerState, engine: str) -> RunInfo:
    return RunInfo(
        run_id=state.run,
        run_name=folder.path.name,
        sector=config.sector.name,
        primary=sector.primary,
        config=to_json(config),
        config_digest=config_digest(config),
        git_digest=git_digest(),
        tags={"fl.engine": engine, **masking.tags(config, engine)},
    )


def _counted(folder: RunFolder, state: ServerState) -> list[RoundRecord]:
    """The committed rounds and the closing evaluation after the last; that of an earlier, shorter end is left out."""
    return [r for r in folder.records() if (r.round <= state.round) == (r.purpose == "train")]


def _quarantined(records: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """Who is asked no more at the end, each with the round in which that was decided."""
    since: dict[str, int] = {}
    trained = [r for r in records if r.purpose == "train"]
    for record in trained:
        since = {node: since.get(node, record.round) for node in record.quarantined}
    return [{"node": n, "round": since[n], "evidence": trained[-1].quarantined[n]} for n in sorted(since)]


def summarise(
    folder: RunFolder,
    config: RunConfig,
    sector: Sector,
    found: Fitted,
    state: ServerState,
    delivery: Delivery,
    engine: str,
    seconds: float,
) -> RunResult:
    """The run's result, from its folder: a resumed run counts its earlier rounds too, each once."""
    records = _counted(folder, state)
    closing = next((r for r in records if r.purpose == "evaluate"), None)
    metrics = dict(closing.base_metrics) if closing else {}
    primary = sector.primary
    split = "test" if f"test/{primary.name}" in metrics else "val"
    epsilons = [e for r in records for e in r.epsilon.values()]
    return RunResult(
        run_id=state.run,
        run_name=folder.path.name,
        run_dir=str(folder.path.resolve()),
        tracking_uri=delivery.uri,
        sector=config.sector.name,
        data_source=DataSource(config.data).value,
        engine=engine,
        rounds=state.round,
        primary_metric={
            "name": primary.name,
            "value": metrics.get(f"{split}/{primary.name}"),
            "direction": primary.direction,
            "split": "test" if split == "test" else "validation",
        },
        baselines=None,
        model_digest=digest(state.params),
        model_version=delivery.versions.get(state.round),
        refusals=[
            *({"round": 0, **asdict(refusal)} for refusal in found.refusals),
            *({"round": r.round, **asdict(refusal)} for r in records for refusal in r.refusals),
        ],
        seconds=round(seconds, 3),
        bytes_up=found.bytes_up + sum(r.bytes_up for r in records),
        bytes_down=found.bytes_down + sum(r.bytes_down for r in records),
        epsilon_max=max(epsilons) if epsilons else None,
        best=asdict(state.best) if state.best else None,
        metrics=metrics,
        model_name=delivery.model_name,
        model_path=str(folder.version_path(state.round).resolve()),
        records_pending=delivery.pending,
        nodes=_by_node(closing, sector) if closing else {},
        secagg=masking.plan_of(config).described(config, engine) if config.privacy.name.masks else None,
        quarantined=_quarantined(records),
    )


def _by_node(closing: RoundRecord, sector: Sector) -> dict[str, dict[str, float | None]]:
    """The final model on each node's own test rows, of the nodes that have any."""
    found: dict[str, dict[str, float | None]] = {}
    for node, metrics in sorted(closing.node_metrics.items()):
        if "test/loss" in metrics:
            found[node] = {"federated": metrics.get(f"test/{sector.primary.name}")}
        if "test_tuned/loss" in metrics:
            found.setdefault(node, {})["tuned"] = metrics.get(f"test_tuned/{sector.primary.name}")
    return found
