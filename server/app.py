"""The ServerApp.  `server.app:app` runs unchanged in every engine.

Its run config is one text: Hydra overrides, as one would type them after `trellis simulate`.  They come over a network:
whoever may submit runs to the SuperLink may choose run folders, the tracking server and data paths of the machine that
runs the ServerApp, so an operator lets only those submit who may.  `nodes.items[].data_path` is read by simulated nodes
only; a real node reads what its own file names.
"""

from __future__ import annotations

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.load import load
from server.run import resumed, run
from trellis.errors import ConfigError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Compose, run, say where the result is."""
    overrides = shlex.split(str(context.run_config.get("overrides", "")))
    config = load(overrides)
    if config.resume is not None:
        config, overrides = resumed(config.resume, overrides, config.runs_dir)
    if config.attack.name != "none":
        raise ConfigError(f"attack={config.attack.name}: attacks exist in simulation only, use `trellis simulate`")
    result = run(config, grid, overrides=overrides)
    value = result.primary_metric["value"]
    print(
        f"{result.run_name}: {result.primary_metric['name']} {value} after {result.rounds} rounds, in {result.run_dir}"
    )
