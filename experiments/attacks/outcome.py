"""Whether a backdoor opens: measured on the final model and all nodes' test rows, so in simulation only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from conf.schema import NodeTask, RunConfig
from experiments import attacks
from experiments.attacks.data import backdoor, stamped
from sectors.base import Rows, Sector, concatenate, num_rows, place_of, take, to_batch
from server.versions import load_predictor

BATCH = 4096


def success_rate(config: RunConfig, sector: Sector, version: Path) -> float | None:
    """The share of all nodes' test rows of other classes that the version takes for the target once they are stamped.

    None where no node has such rows.
    """
    task = NodeTask.of(config)
    test = concatenate([sector.load(place_of(spec, task)).test for spec in config.nodes.expand()])
    options = {**attacks.defaults(backdoor), **config.attack.options}
    others = take(test, np.flatnonzero(test["y"] != options["target"])) if num_rows(test) else test
    if not num_rows(others):
        return None
    others = {**others, "x": stamped(others["x"], **attacks.options_for(stamped, options))}
    return float((classes(sector, load_predictor(version).model, others) == options["target"]).mean())


def classes(sector: Sector, model: nn.Module, rows: Rows) -> npt.NDArray[np.int64]:
    """The class that a model takes each row for.  -> (n,)"""
    found = []
    with torch.no_grad():
        for start in range(0, num_rows(rows), BATCH):
            batch = to_batch(rows, slice(start, start + BATCH), torch.device("cpu"))
            found.append(_class_of(sector.forward(model, batch)).numpy())
    return np.concatenate(found)


def _class_of(outputs: Tensor) -> Tensor:
    """(B,) logits of class 1, or (B, C) logits.  -> (B,)"""
    return outputs.argmax(-1) if outputs.ndim > 1 else (outputs > 0).long()
