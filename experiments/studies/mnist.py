"""What the studies on MNIST share: data, partitions, models as functions of flat vectors, training, rules.

A model is a point in R^d: `Model` computes gradients, local updates and accuracies at any params (d,), so that a study
reads as its publication's equations.  One process, one thread, no Flower: rules and attacks are the kit's own, the
federation around them is a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sectors.files import find
from sectors.partition import Index, by_quantile
from strategies import preaggregators, rules
from strategies.aggregation import Pipeline
from trellis.types import Aggregated

FILE = "benchmarks/mnist.npz"
NUM_CLASSES = 10

Vector = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images (n, 1, 28, 28) float32, normalised as all four publications do, and labels (n,) int64."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def labels(self) -> Index:
        return self.y.numpy()

    def taken(self, index: Index) -> Digits:
        chosen = torch.from_numpy(np.asarray(index))
        return Digits(self.x[chosen], self.y[chosen])

    def relabelled(self, table: npt.NDArray[np.int64]) -> Digits:
        """The same images, y -> table[y]."""
        return Digits(self.x, torch.from_numpy(table)[self.y])


def load(num_train: int | None = None, num_test: int | None = None) -> tuple[Digits, Digits]:
    """Train and test rows, or the first so many of each.  Raises MissingData."""
    path = find(
        FILE, "MNIST", "http://yann.lecun.com/exdb/mnist (as train_images, train_labels, test_images, test_labels)"
    )
    with np.load(path) as file:
        x, y = file["train_images"][:num_train], file["train_labels"][:num_train]
        x_test, y_test = file["test_images"][:num_test], file["test_labels"][:num_test]
    return _digits(x, y), _digits(x_test, y_test)


def _digits(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Digits:
    x = (images[:, None].astype(np.float32) / 255 - 0.1307) / 0.3081
    return Digits(torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)))


# ---------------------------------------------------------------- partitions: (n,) labels -> (n,) owners


def by_similarity(labels: Index, num_parts: int, gamma: float, rng: np.random.Generator) -> Index:
    """A share gamma of the rows dealt at random, the others sorted by label and cut into equal runs: byzfl's split."""
    alike, other = np.split(rng.permutation(len(labels)), [int(gamma * len(labels))])
    owners = np.empty(len(labels), np.int64)
    for rows, dealt in ((alike, np.zeros(len(alike))), (other, labels[other])):
        owners[rows] = by_quantile(dealt, num_parts) if len(rows) else 0
    return owners


def by_balanced_dirichlet(
    labels: Index, num_parts: int, alpha: float, rng: np.random.Generator, min_rows: int = 10
) -> Index:
    """Classes dealt by Dirichlet(alpha); parts that have their equal share get nothing more: flwr-datasets' split.

    Redrawn until every part has `min_rows`.
    """
    owners = np.empty(len(labels), np.int64)
    while True:
        sizes = np.zeros(num_parts, np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_parts, alpha)) * (sizes <= len(labels) / num_parts)
            bounds = np.cumsum(shares / shares.sum())[:-1] * len(members)
            owners[members] = np.searchsorted(bounds, np.arange(len(members)), side="right")
            sizes = sizes + np.bincount(owners[members], minlength=num_parts)
        if sizes.min() >= min_rows:
            return owners


def by_mixture(labels: Index, num_parts: int, alpha: float, rng: np.random.Generator) -> Index:
    """Equal parts, each with its own class proportions from Dirichlet(alpha) while the classes last: FLANDERS' split.

    Rows beyond num_parts equal parts belong to the last part.
    """
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(NUM_CLASSES)]
    owners = np.full(len(labels), num_parts - 1, np.int64)
    for part in range(num_parts - 1):
        shares = rng.dirichlet(np.full(NUM_CLASSES, alpha))
        for _ in range(len(labels) // num_parts):
            open_shares = (shares + 1e-5) * [bool(rows) for rows in left]
            label = int(np.searchsorted(np.cumsum(open_shares), rng.random() * open_shares.sum(), side="right"))
            owners[left[label].pop()] = part
    return owners


def long_tail(labels: Index, ratio: float = 0.5) -> Index:
    """Rows of which class i keeps the first share ratio^i.  -> index, sorted by label"""
    rows = (np.flatnonzero(labels == label) for label in range(NUM_CLASSES))
    return np.concatenate([members[: int(len(members) * ratio**i)] for i, members in enumerate(rows)])


# ---------------------------------------------------------------- models


class Model:
    """A network as a function of its flat params."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        tensors = list(network.parameters())
        self._params = torch.cat([_channels_last(t.detach()).reshape(-1) for t in tensors])
        self._grad = torch.zeros_like(self._params)
        at = 0
        for t in tensors:  # views of one vector: reading and writing all params is one copy
            like, here = _channels_last(t), slice(at, at + t.numel())
            t.data = _channels_first(self._params[here].view(like.shape))
            t.grad = _channels_first(self._grad[here].view(like.shape))
            at += t.numel()
        self.dim = at

    def initial(self) -> Vector:
        """The params the network was made with, if nothing was computed since.  -> (d,)"""
        return self._params.numpy().copy()

    def gradient(self, params_d: Vector, batch: Digits) -> Vector:
        """Gradient of the mean cross-entropy.  -> (d,)"""
        self._load(params_d)
        self._backward(batch)
        return self._grad.numpy().copy()

    def update(self, params_d: Vector, data: Digits, training: Training, rng: np.random.Generator) -> Vector:
        """What a node sends: its params after local training, less those it was sent.  -> (d,)"""
        self._load(params_d)
        step = training.stepper()
        for batch in training.batches(data, rng):
            self._backward(batch)
            step(self._params, self._grad)
        return self._params.numpy() - params_d

    @torch.no_grad()
    def accuracy(self, params_d: Vector, data: Digits) -> float:
        self._load(params_d)
        hits = [
            (self._network(x).argmax(1) == y).sum() for x, y in zip(data.x.split(500), data.y.split(500), strict=True)
        ]
        return float(torch.stack(hits).sum()) / len(data)

    def _load(self, params_d: Vector) -> None:
        self._params.copy_(torch.from_numpy(params_d))

    def _backward(self, batch: Digits) -> None:
        self._grad.zero_()
        nn.functional.cross_entropy(self._network(batch.x), batch.y).backward()


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    """A convolution's weights as their flat order has them: on a CPU that takes half the time."""
    return t.permute(0, 2, 3, 1) if t.ndim == 4 else t


def _channels_first(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 3, 1, 2) if t.ndim == 4 else t


@dataclass(frozen=True, slots=True)
class Training:
    """Local training: SGD with momentum, or Adam."""

    lr: float
    batch_size: int = 32
    epochs: int = 1
    momentum: float = 0.0
    adam: bool = False

    def stepper(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """step(params, gradient) moves params in place; it remembers, so it serves one local training."""
        momentum, square, count = torch.zeros(()), torch.zeros(()), 0

        def sgd(params: torch.Tensor, gradient: torch.Tensor) -> None:
            nonlocal momentum
            momentum = self.momentum * momentum + gradient
            params.sub_(momentum, alpha=self.lr)

        def adam(params: torch.Tensor, gradient: torch.Tensor) -> None:
            nonlocal momentum, square, count
            count += 1
            momentum = 0.9 * momentum + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            spread = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
            params.addcdiv_(momentum, spread, value=-self.lr / (1 - 0.9**count))

        return adam if self.adam else sgd

    def batches(self, data: Digits, rng: np.random.Generator) -> Iterator[Digits]:
        for _ in range(self.epochs):
            order = torch.from_numpy(rng.permutation(len(data)))
            for rows in order.split(self.batch_size):
                yield Digits(data.x[rows], data.y[rows])


def cnn(seed: int, channels: tuple[int, int], hidden: int) -> Model:
    """Two 5x5 convolutions, each pooled, and a hidden layer.  (20, 50), 500: 431,080 params; (16, 32), 128: 80,202."""
    first, second = channels
    return _seeded(
        seed,
        lambda: [
            nn.Conv2d(1, first, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * second, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES),
        ],
    )  # fmt: skip


def mlp(seed: int, hidden: int = 128) -> Model:
    """One hidden layer; 101,770 params of 128."""
    return _seeded(seed, lambda: [nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES)])


def _seeded(seed: int, layers: Callable[[], Sequence[nn.Module]]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(nn.Sequential(*layers()))


# ---------------------------------------------------------------- rules


class Aggregator:
    """A rule as a study meets it: rows to the aggregate, its state kept from round to round.

    `recipe` names pre-aggregators and the rule behind them, `clip+nnm+trimmed_mean`.
    """

    def __init__(self, recipe: str, num_byzantine: int, *, seed: int = 0, **options: Any) -> None:
        *before, rule = recipe.split("+")
        self._pipeline = Pipeline(rules.get(rule), options, [preaggregators.get(name) for name in before])
        self._num_byzantine = num_byzantine
        self._rng = np.random.default_rng(seed)
        self._state: Any = {}

    def __call__(self, updates_nd: Matrix) -> Vector:
        result = self.tried(updates_nd)
        self._state = result.state or {}
        return np.asarray(result.update_d, np.float32)

    def tried(self, updates_nd: Matrix) -> Aggregated:
        """What it would answer, its state unchanged: what an attacker who knows the rule can compute."""
        offers = {
            "rng": lambda: self._rng,
            "weights": lambda: None,
            "state": lambda: self._state,
            "names": lambda: [(f"{i:04d}",) for i in range(len(updates_nd))],
        }
        return self._pipeline(updates_nd, num_byzantine=self._num_byzantine, offers=offers)


# ---------------------------------------------------------------- federations: params after every round


Lies = Callable[[Matrix, int], Matrix]
"""The rows that reach the server: those of the honest nodes in round t, (h, d), and what the attackers make of them."""


def _no_lies(honest_hd: Matrix, t: int) -> Matrix:
    return honest_hd


def with_lie(honest_hd: Matrix, lie_d: Vector, num_attackers: int) -> Matrix:
    """Honest rows, then the one lie that all attackers tell.  -> (h + f, d)"""
    return np.concatenate([honest_hd, np.repeat(lie_d[None], num_attackers, axis=0)])


def fedavg(
    model: Model,
    parts: Sequence[Digits],
    training: Training,
    aggregate: Callable[[Matrix], Vector],
    *,
    num_rounds: int,
    seed: int,
    beta: float = 0.0,
    lies: Lies = _no_lies,
) -> Iterator[Vector]:
    """Local training, then params += aggregate of the updates.  `beta`: worker momentum, m_1 = u_1."""
    params_d, momenta_hd = model.initial(), None
    for t in range(1, num_rounds + 1):
        rngs = [np.random.default_rng((seed, t, k)) for k in range(len(parts))]
        updates_hd = np.stack(
            [model.update(params_d, part, training, rng) for part, rng in zip(parts, rngs, strict=True)]
        )
        momenta_hd = updates_hd if momenta_hd is None else _momentum(momenta_hd, updates_hd, beta)
        params_d = params_d + aggregate(lies(momenta_hd, t))
        yield params_d


def distributed_sgd(
    model: Model,
    parts: Sequence[Digits],
    aggregate: Callable[[Matrix], Vector],
    *,
    num_steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    beta: float = 0.0,
    weight_decay: float = 0.0,
    lies: Lies = _no_lies,
) -> Iterator[Vector]:
    """params -= lr (aggregate of the nodes' momenta + weight_decay params); m_0 = 0, m_t = beta m + (1 - beta) g."""
    params_d, momenta_hd = model.initial(), np.zeros((len(parts), model.dim), np.float32)
    for t in range(1, num_steps + 1):
        rngs = [np.random.default_rng((seed, t, k)) for k in range(len(parts))]
        batches = [part.taken(rng.integers(len(part), size=batch_size)) for part, rng in zip(parts, rngs, strict=True)]
        gradients_hd = np.stack([model.gradient(params_d, batch) for batch in batches])
        momenta_hd = _momentum(momenta_hd, gradients_hd, beta)
        step_d = aggregate(lies(momenta_hd, t)) + np.float32(weight_decay) * params_d
        params_d = params_d - np.float32(lr) * step_d.astype(np.float32)
        yield params_d


def _momentum(before_hd: Matrix, new_hd: Matrix, beta: float) -> Matrix:
    return np.float32(beta) * before_hd + np.float32(1 - beta) * new_hd


# ---------------------------------------------------------------- what a study prints


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def single_thread() -> None:
    """Small batches: more threads would only wait for each other."""
    torch.set_num_threads(1)
