"""Train a federation on this machine.

trellis simulate                                      without overrides, experiment=demo: real data, three nodes
trellis simulate sector=banks nodes=consortium        choose config groups (folders of conf/)
trellis simulate rounds=5 sector.training.lr=0.1      set values
trellis simulate --multirun seed=0,1,2                one run a combination
trellis simulate resume=RUN rounds=20                 continue a run, or lengthen it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trellis.cli.show import console, plain
from trellis.types import RoundRecord, ServerState

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from server.run import RunResult

DEMO = ["experiment=demo"]
RUNS_DIR = "runs"
"""Where runs are unless told otherwise: what need not be repeated in a next command."""
SHOWN_REFUSALS = 10
SHOWN_NODES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="Hydra overrides: group=choice, key=value (default: experiment=demo)",
    )
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of a=1,2 b=x,y")
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object (a list with --multirun)"
    )


def run(arguments: argparse.Namespace) -> int:
    from conf.load import sweep

    given = arguments.overrides or DEMO
    runs = sweep(given) if arguments.multirun else [given]
    progress = Console(stderr=True)
    results = []
    for index, overrides in enumerate(runs):
        if len(runs) > 1:
            progress.print(plain(f"run {index + 1} of {len(runs)}", "bold"), plain(" ".join(overrides)))
        results.append(_one(overrides, progress))
    if arguments.json:
        values = [dataclasses.asdict(result) for result in results]
        print(json.dumps(values if arguments.multirun else values[0]))
    else:
        _show(results)
    failed = [r.run_name for r in results if r.primary_metric["value"] is None]
    for name in failed:
        progress.print(plain(f"{name}: no node's rows could be scored; see its refusals"))
    return 1 if failed else 0


def _one(overrides: list[str], err: Console) -> RunResult:
    import sectors
    from conf.load import load
    from experiments.simulate import prepare, simulate

    load(overrides)  # misuse is told before anything slow is imported
    config, _ = prepare(overrides)
    source = "SYNTHETIC rows" if config.data == "synthetic" else "real data"
    title = f"{config.sector.name}: {len(config.nodes.expand())} nodes, {source}, engine {config.engine.name}"
    primary = sectors.get(config.sector.name, config.sector.options).primary.name
    err.print(plain(title))
    if config.privacy.name.masks:
        for line in _masked(config):
            err.print(plain(line), soft_wrap=True)
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[metric]}", markup=False),
        TextColumn("{task.fields[refusals]} refused"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=not err.is_terminal) as progress:
        task = progress.add_task("", total=config.rounds, metric="", refusals=0)
        refused = 0

        def on_round(state: ServerState, record: RoundRecord) -> None:
            nonlocal refused
            refused += len(record.refusals)
            metric = _metric(record, primary, state.best.value if state.best else None)
            progress.update(task, completed=state.round, metric=metric, refusals=refused)
            if record.closed:
                err.print(plain(f"round {record.round} closed, the model stays: {record.closed}"))

        return simulate(overrides, on_round=on_round)


def _masked(config: RunConfig) -> list[str]:
    """What secure aggregation gives in this run, and what it survives, line by line."""
    from server import masking

    masking.check(config)  # before anything is promised
    found = masking.plan_of(config)
    weakest, sizes = found.weakest, sorted({len(group) for group in found.groups})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return [
        f"secure aggregation ({weakest.threat}), groups: {len(found.groups)} of {size} nodes",
        f"  privacy set  every sum is over {weakest.privacy_set} nodes at least, of {config.privacy.secagg.min_group} "
        "organisations",
        f"  a group      survives {weakest.colluders} colluders and {weakest.dropouts} dropouts",
        f"  the rule     {config.rule.name} survives {found.num_byzantine} liars, {found.num_lost_groups} groups lost",
        "  keys         simulated: this run shows the protocol, and keeps no secret from who runs it",
    ]


def _metric(record: RoundRecord, primary: str, best: float | None) -> str:
    """What the round measured, and the best so far; the loss where the primary metric could not be had."""
    name = next((name for name in (primary, "loss") if f"val/{name}" in record.base_metrics), None)
    measured = f"val {name} {record.base_metrics[f'val/{name}']:.4f}" if name else ""
    return f"{measured} (best {best:.4f})".strip() if best is not None else measured


def _show(results: list[RunResult]) -> None:
    out = console()
    out.print(_table(results))
    for r in results[-1:]:
        _advise(r, out)


def _table(results: list[RunResult]) -> Table:
    """One line a run; a single run reads better as a column."""
    table = Table(box=None, pad_edge=False)
    cells = [_cells(r) for r in results]
    if len(results) == 1:
        table.show_header = False
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for heading, value in cells[0].items():
            table.add_row(plain(heading), plain(value))
        return table
    for heading in cells[0]:
        table.add_column(plain(heading), overflow="fold")
    for row in cells:
        table.add_row(*(plain(value) for value in row.values()))
    return table


def _cells(r: RunResult) -> dict[str, str]:
    metric, others = r.primary_metric, r.metrics
    value = "-" if metric["value"] is None else f"{metric['value']:.4f}"
    test = {k: v for k, v in others.items() if k.startswith("test/") and k != f"test/{metric['name']}"}
    return {
        "run": r.run_name,
        "data": "SYNTHETIC" if r.data_source == "synthetic" else r.data_source,
        "rounds": str(r.rounds),
        f"{metric['split']} {metric['name']}": value,
        "also": "  ".join(f"{k.removeprefix('test/')} {v:.4f}" for k, v in test.items()),
        "best round": f"{r.best['round']} (validation {r.best['value']:.4f})" if r.best else "-",
        "attack": _attack(r.attack),
        "masked": _groups(r.secagg),
        "epsilon": "-" if r.epsilon_max is None else f"{r.epsilon_max:.3g} (the most of any node)",
        "refused": str(len(r.refusals)),
        "up, down": f"{_size(r.bytes_up)}, {_size(r.bytes_down)}",
        "seconds": f"{r.seconds:.1f}",
        "version": "-" if r.model_version is None else str(r.model_version),
    }


COLUMNS = {"local_only": "alone", "pooled": "pooled", "federated": "federated", "tuned": "fine-tuned"}


def _node_table(r: RunResult) -> Table:
    """Each node's own test rows under the models made with it and without it; the best one of a line is bold."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    shown = [key for key in COLUMNS if any(key in scores for scores in r.nodes.values())]
    table.add_column(plain(f"test {r.primary_metric['name']} of"))
    for key in shown:
        table.add_column(COLUMNS[key], justify="right")
    better = max if r.primary_metric["direction"] == "max" else min
    for node, scores in list(r.nodes.items())[:SHOWN_NODES]:
        best = better((v for v in scores.values() if v is not None), default=None)
        cells = ((scores.get(key), "bold" if scores.get(key) == best else "") for key in shown)
        table.add_row(plain(node), *(plain("-" if v is None else f"{v:.4f}", style) for v, style in cells))
    if len(r.nodes) > SHOWN_NODES:
        table.add_row(plain(f"... and {len(r.nodes) - SHOWN_NODES} more in {r.run_dir}/result.json"))
    return table


def _groups(found: dict[str, Any] | None) -> str:
    """What the server did not see, of a run with secure aggregation."""
    if found is None:
        return "-"
    return f"{len(found['groups'])} groups, {found['holds_for']}"


def _attack(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    sleeping = f" from round {found['start_round']}" if found["start_round"] > 1 else ""
    opens = "" if found["success_rate"] is None else f", succeeds on {found['success_rate']:.1%} of stamped test rows"
    return f"{found['name']} by {', '.join(found['nodes'])}{sleeping}{opens}"


def _advise(r: RunResult, out: Console) -> None:
    def line(text: str) -> None:
        out.print(plain(text), soft_wrap=True)

    if r.primary_metric.get("measured_by") == "simulation":
        line("metrics    by the simulation, which sees the rows: under differential privacy no node releases them")
    if r.baselines:
        name = r.primary_metric["name"]
        pooled = r.baselines["pooled"].get(name)
        line(f"pooled baseline: test {name} {pooled:.4f}" if pooled is not None else "pooled baseline: no test rows")
    if any(len(scores) > 1 for scores in r.nodes.values()):
        line("")
        out.print(_node_table(r))
    for (node, reason), many in _grouped(r.refusals).items():
        line(f"refused    {node}, {len(many)} times: {reason} ({many[0]['evidence']})")
    for caught in r.quarantined:
        line(f"quarantined  {caught['node']}, round {caught['round']}: {caught['evidence']}")
    if r.quarantined:
        line("let a node in again, its evidence forgotten:")
        line(f"       {_resume(r)} {_release(r.quarantined[0]['node'])}")
    line("")
    line(f"model      {r.model_path}")
    if r.model_version is not None:
        line(f"registry   models:/{r.model_name}/{r.model_version}  in {r.tracking_uri}")
    if r.records_pending:
        line(f"{r.records_pending} records wait for the tracking server; send them with:")
        line(f"       trellis sync {shlex.quote(r.run_dir)}")
    line(f"digest     {r.model_digest}")
    line("")
    line("next:")
    for command in _next(r):
        line(f"       {command}")


def _next(r: RunResult) -> list[str]:
    """Commands that can be copied: they find this run wherever its folder is."""
    folder = Path(r.run_dir)
    where = "" if _usual(folder) else f" --runs-dir {shlex.quote(str(folder.parent))}"
    return [
        # the UI reads the database beside the run folders; there is none without tracking, or on another server
        *([f"trellis ui{where}"] if (folder.parent / "mlflow.db").exists() else []),
        f"trellis compare{where}",
        _resume(r),
        "trellis simulate sector=banks nodes=consortium",
    ]


def _resume(r: RunResult) -> str:
    """The command that lengthens this run."""
    folder = Path(r.run_dir)
    resume = shlex.quote(f"resume={_hydra_value(folder.name if _usual(folder) else str(folder))}")
    return f"trellis simulate {resume} rounds={r.rounds * 2}"


def _usual(folder: Path) -> bool:
    return folder.parent.resolve() == Path(RUNS_DIR).resolve()


def _release(node: str) -> str:
    return shlex.quote(f"suspicion.released=[{_hydra_value(node)}]")


def _hydra_value(text: str) -> str:
    """`text` as the value of an override, in quotes where Hydra would read something else (`1e5`, `null`)."""
    if re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def _grouped(refusals: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Refusals by node and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for refusal in refusals:
        groups.setdefault((refusal["node"], refusal["reason"]), []).append(refusal)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1]))[:SHOWN_REFUSALS])


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
