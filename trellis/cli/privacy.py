"""What differential privacy costs, and what was spent.

trellis privacy show runs/RUN                                   each simulated node's ledger of a run
trellis privacy show --node-file /etc/trellis/node.yaml         this site's own
trellis privacy plan --rows 5000 --batch-size 32 --epochs 2 --rounds 15 --epsilon 8      the noise that takes
trellis privacy plan --rows 5000 --batch-size 32 --epochs 2 --rounds 15 --noise 1.1      the epsilon that comes to
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from trellis.cli.show import console, plain
from trellis.errors import ConfigError, PolicyRefusal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", choices=["show", "plan"])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="show: a run folder, or a node's store")
    parser.add_argument("--node-file", type=Path, help="show: a site's own file")
    parser.add_argument("--rows", type=int, help="plan: training rows of the node")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1, help="plan: epochs a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epsilon", type=float, help="plan: what may be spent")
    parser.add_argument("--noise", type=float, help="plan: the noise multiplier")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plan: epsilon over rounds, as a picture")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    return _show(arguments) if arguments.verb == "show" else _plan(arguments)


# ---------------------------------------------------------------- show


def _show(arguments: argparse.Namespace) -> int:
    """Every ledger that is found, with what is left of its budget."""
    from trellis.errors import LedgerError

    if arguments.run is not None and arguments.node_file is not None:
        raise ConfigError("a run folder and --node-file: say one of them")
    found = _ledgers(arguments)
    if not found:
        raise ConfigError("no ledger is there: nothing was ever trained privately")
    lines, damaged = [], []
    for node, path, delta, most in found:
        try:
            lines.append(_line(node, path, delta, most))
        except LedgerError as error:
            damaged.append(str(error))
    if arguments.json:
        print(json.dumps({"ledgers": lines, "damaged": damaged}))
        return 1 if damaged else 0
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "data", "charges", "runs", "steps", "epsilon", "of", "delta"):
        table.add_column(heading)
    for line in lines:
        limit = "no limit" if line["max_epsilon"] is None else f"{line['max_epsilon']:g}"
        cells = [str(line[key]) for key in ("node", "unit", "charges", "runs", "steps")]
        table.add_row(*(plain(cell) for cell in (*cells, f"{line['epsilon']:.4g}", limit, f"{line['delta']:g}")))
    console().print(table)
    for why in damaged:
        console().print(plain(why))
    return 1 if damaged else 0


def _ledgers(arguments: argparse.Namespace) -> list[tuple[str, Path, float, float | None]]:
    """(node, ledger, delta, budget) of everything that was asked for."""
    if arguments.node_file is not None:
        from clients import budget, identity

        try:
            own = identity.from_file(str(arguments.node_file))
            folder = budget.folder_of(own)
        except PolicyRefusal as error:
            raise ConfigError(error.reason) from error
        policy = own.spec.policy.dp
        return [
            (own.spec.name, path, policy.delta, policy.max_epsilon if path.stem == policy.privacy_unit else None)
            for path in _files(folder)
        ]
    if arguments.run is None:
        raise ConfigError("say whose: a run folder, or --node-file")
    if not arguments.run.is_dir():
        raise ConfigError(f"{arguments.run} is no folder of a run or of a node")
    specs = _specs(arguments.run)
    found = []
    for path in (path for folder in sorted(arguments.run.glob("**/ledger")) for path in _files(folder)):
        node = path.parent.parent.name
        known = specs[node].policy.dp if node in specs else None
        found.append((node, path, known.delta if known else arguments.delta, known.max_epsilon if known else None))
    return found


def _files(folder: Path) -> list[Path]:
    """Ledgers, also those of which only the mark is left."""
    marked = {path.with_name(path.name.removesuffix(".mark")) for path in folder.glob("*.jsonl.mark")}
    return sorted({*folder.glob("*.jsonl"), *marked})


def _specs(run: Path) -> dict[str, Any]:
    """The nodes of a run, by name; none where the folder is no run's."""
    from conf.schema import NodesConfig, from_json

    try:
        nodes = json.loads((run / "config.json").read_bytes())["config"]["nodes"]
    except (OSError, ValueError, KeyError):
        return {}
    return {spec.name: spec for spec in from_json(NodesConfig, nodes).expand()}


def _line(node: str, path: Path, delta: float, most: float | None) -> dict[str, Any]:
    from trellis.privacy import accountant
    from trellis.privacy.ledger import Ledger

    ledger = Ledger(path)
    charges = ledger.charges()
    return {
        "node": node,
        "unit": path.stem,
        "file": str(path),
        "charges": len(charges),
        "runs": len({charge.run for charge in charges}),
        "steps": sum(charge.steps for charge in charges),
        "epsilon": accountant.epsilon(ledger.entries(), delta),
        "max_epsilon": most,
        "delta": delta,
    }


# ---------------------------------------------------------------- plan


def _plan(arguments: argparse.Namespace) -> int:
    """The noise for an epsilon, or the epsilon for a noise, over so many rounds."""
    from sectors import private
    from trellis.privacy import accountant
    from trellis.privacy.accountant import Entry

    if arguments.run is not None:
        raise ConfigError("a plan is of --rows, not of a run")
    if arguments.noise is not None and not 0 < arguments.noise < 1e6:
        raise ConfigError(f"--noise is {arguments.noise}; it must be above 0")
    if arguments.rows is None or (arguments.epsilon is None) == (arguments.noise is None):
        raise ConfigError("a plan needs --rows, and one of --epsilon and --noise")
    counts = (arguments.rows, arguments.batch_size, arguments.epochs, arguments.rounds)
    if min(counts) < 1:
        raise ConfigError(f"--rows, --batch-size, --epochs and --rounds must be 1 at least; they are {counts}")
    each = private.plan(arguments.rows, arguments.batch_size, arguments.epochs)
    steps = each.steps * arguments.rounds
    noise = arguments.noise
    if noise is None:
        noise = accountant.noise_multiplier_for(
            arguments.epsilon, arguments.delta, sample_rate=each.sample_rate, steps=steps
        )
    by_round = {
        r: accountant.epsilon([Entry(noise, each.sample_rate, each.steps * r)], arguments.delta)
        for r in sorted({*range(1, arguments.rounds + 1, max(arguments.rounds // 20, 1)), arguments.rounds})
    }
    found = {
        "noise_multiplier": noise,
        "epsilon": by_round[arguments.rounds],
        "delta": arguments.delta,
        "sample_rate": each.sample_rate,
        "steps": steps,
        "by_round": by_round,
    }
    warning = accountant.warn_delta(arguments.delta, arguments.rows)
    if arguments.plot is not None:
        _picture(arguments.plot, by_round, noise, arguments.delta)
    if arguments.json:
        print(json.dumps({**found, "warning": warning}))
        return 0
    out = console()
    out.print(plain(f"noise multiplier  {noise:.4f}"))
    out.print(
        plain(f"epsilon           {found['epsilon']:.4f} after {arguments.rounds} rounds, delta {arguments.delta:g}")
    )
    out.print(plain(f"sample rate       {each.sample_rate:.5f}, {each.steps} steps a round"))
    if warning is not None:
        out.print(plain(warning))
    if arguments.plot is not None:
        out.print(plain(f"picture           {arguments.plot}"))
    return 0


def _picture(path: Path, by_round: dict[int, float], noise: float, delta: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(list(by_round), list(by_round.values()), color="#0072B2")
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon spent")
    axes.set_title(f"noise multiplier {noise:.3g}, delta {delta:g}", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {path}: {error}") from error
    finally:
        pyplot.close(figure)
