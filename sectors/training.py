"""Training and evaluation, at a node and at a server with rows of its own: functions of (params, data, config, seed).

The library owns the loop: shuffling, optimizer, device.  Everything is seeded from (seed, round, node name), runs on
one torch thread and on deterministic kernels, so the same request gives the same bytes in every engine.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from conf.schema import OptimizerName, TrainingConfig
from sectors.base import Rows, Sector, num_rows, to_batch
from sectors.params import arrays_of, load_into, reproducible
from trellis.types import LOSS_MAX, Counts
from trellis.vectors import Arrays

EVALUATION_BATCH = 1024

# torch's optimizers shield their methods from its compiler, and import it for that: 2 s in every fresh process, so with
# every message of a real federation.  Nothing is compiled here; the attribute is where torch keeps a shielded method.
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
vars(_add_param_group).setdefault("__dynamo_disable", _add_param_group)


@dataclass(frozen=True, slots=True)
class Trained:
    """All tensors after training, the mean loss over the rows of the last epoch, and the rows used."""

    arrays: dict[str, npt.NDArray[np.generic]]
    loss: float
    num_examples: int


def train(
    sector: Sector,
    config: TrainingConfig,
    params: Arrays,
    rows: Rows,
    *,
    seed: int,
    device: str = "cpu",
    proximal_mu: float = 0.0,
) -> Trained:
    """`config.epochs` passes over the rows in batches drawn with `seed`.  The params given are not changed.

    Above 0, `proximal_mu` adds mu / 2 ||p - p0||^2 over the shared params, p0 those given.
    Li et al., FedProx, MLSys 2020.  https://arxiv.org/abs/1812.06127
    """
    with reproducible(seed):
        model = _loaded(sector, params, device)
        rng = np.random.default_rng(seed)
        index = _rows_used(rng, num_rows(rows), config.max_examples)
        optimizer = _optimizer(model, config)
        model.train()
        pull = _Pull.of(sector, model, proximal_mu)
        loss = float("nan")
        for _ in range(config.epochs):
            loss = _epoch(sector, model, optimizer, rows, rng.permutation(index), config.batch_size, pull)
        return Trained(arrays_of(model), loss, len(index))


def evaluate(sector: Sector, params: Arrays, rows: Rows, *, device: str = "cpu") -> Counts:
    """Additive counts over the rows, with the library's own `loss_sum` and `rows`.  No rows: zeros."""
    with reproducible(0), torch.no_grad():
        model = _loaded(sector, params, device)
        model.eval()
        totals: Counts = {k: np.zeros(spec.shape, spec.dtype) for k, spec in sector.all_counts().items()}
        for start in range(0, num_rows(rows), EVALUATION_BATCH):
            batch = to_batch(rows, slice(start, start + EVALUATION_BATCH), torch.device(device))
            outputs = sector.forward(model, batch)
            losses = sector.losses(outputs, batch)
            found = {
                **sector.counts(outputs, batch),
                "loss_sum": losses.nan_to_num(nan=LOSS_MAX).clamp(0.0, LOSS_MAX).sum(dtype=torch.float64).cpu().numpy(),
                "rows": np.asarray(len(losses), np.int64),
            }
            totals = {k: np.asarray(totals[k] + found[k], totals[k].dtype) for k in totals}
        return totals


@dataclass(frozen=True, slots=True)
class _Pull:
    """The gradient of the proximal term, for the optimizer and not for the loss: it depends on no row, so gradients of
    single rows can be clipped without it."""

    mu: float
    params: tuple[tuple[nn.Parameter, torch.Tensor], ...]
    """Each shared parameter and where it started."""

    @classmethod
    def of(cls, sector: Sector, model: nn.Module, mu: float) -> _Pull:
        shared = [p for name, p in model.named_parameters() if mu and not sector.is_local(name)]
        return cls(mu, tuple((p, p.detach().clone()) for p in shared))

    def add(self) -> None:
        """p.grad += mu (p - p0)"""
        for p, start in self.params:
            if p.grad is not None:
                p.grad.add_(p.detach() - start, alpha=self.mu)


def _epoch(
    sector: Sector,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    order: npt.NDArray[np.int64],
    batch_size: int,
    pull: _Pull,
) -> float:
    total = 0.0
    device = next(model.parameters()).device
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))  # without the shield
    for start in range(0, len(order), batch_size):
        batch = to_batch(rows, order[start : start + batch_size], device)
        losses = sector.losses(sector.forward(model, batch), batch)
        model.zero_grad()
        losses.mean().backward()
        pull.add()
        step(optimizer)
        total += float(losses.detach().sum(dtype=torch.float64))
    return total / max(len(order), 1)


def _rows_used(rng: np.random.Generator, n: int, most: int | None) -> npt.NDArray[np.int64]:
    if most is None or n <= most:
        return np.arange(n)
    return np.sort(rng.choice(n, size=most, replace=False))


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer is OptimizerName.adam:
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


@lru_cache(maxsize=8)
def _model(sector: Sector, device: str) -> nn.Module:
    """One module per task and process: building costs more than loading params into it."""
    return sector.build_model().to(device)


def _loaded(sector: Sector, params: Arrays, device: str) -> nn.Module:
    return load_into(_model(sector, device), params)
