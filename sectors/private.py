"""Training at a node under example-level differential privacy: DP-SGD, a function of (params, data, config).

Each step draws every row independently with probability q, clips each row's gradient to norm C, adds N(0, (sigma C)^2)
to their sum and divides by q n, the batch size that is expected, never by the one that was drawn.  What a step releases
is the Poisson-subsampled Gaussian mechanism with add-or-remove-one neighbours; `plan` says how many there are, and the
accountant what they cost.  Opacus computes gradients of single rows, clips them and adds the noise; this file draws the
rows, drives Opacus, and keeps everything else out of what leaves the node.
Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133; Yousefpour et al., Opacus, https://arxiv.org/abs/2109.12298

What is covered.  The arrays, shared and local ones alike.  The unit is a row: a payment, a window, a tile.  A customer,
an engine or a patient with k rows is covered k-fold worse.  The number of rows n is public, as it is in every formula
here.  `PrivateTrained.log` is NOT covered: losses, gradient norms and drawn batch sizes are exact.  It stays at the
node, and no message may carry any of it.

Randomness.  Noise and draws come from the OS, by generators of their own: torch's global one is seeded in training, and
a seed that another knows takes the noise away.  Neither generator is cryptographic; noise is the sum of four normals,
as Opacus' secure mode has it (Holohan and Braghin, 2021, https://arxiv.org/abs/2107.10138), in float32.
"""

from __future__ import annotations

import inspect
import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
    compute_conv_grad_sample,
    compute_linear_grad_sample,
    register_grad_sampler,
)
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from opacus.utils.module_utils import trainable_modules
from opacus.utils.tensor_utils import unfold2d
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from conf.schema import OptimizerName, TrainingConfig
from sectors import training  # noqa: F401  (it makes torch's optimizers without torch's compiler)
from sectors.base import Rows, Sector, num_rows, take, to_batch
from sectors.params import arrays_of, load_into, reproducible
from trellis import canonical
from trellis.errors import ConfigError
from trellis.vectors import Arrays

Clipping = Literal["flat", "per_layer"]
Mode = Literal["auto", "direct", "hooks", "ew", "ghost", "functorch"]
Index = npt.NDArray[np.int64]

BUNDLED = 1 << 12
"""Tensors of at most so many elements are shown to the optimizer as one."""
GHOST_LEAST = 1 << 14
"""Params of a model of linear layers from which ghost clipping is faster."""
UNBOUNDED = 1e15
"""The clip norm where none is asked for: an infinite one makes Opacus' noise of deviation 0 * inf."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DIRECT = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_NORMS)
"""Layers of one input and one output, rows first: all that mode `direct` knows."""
EXPANDED = (nn.Linear, nn.Embedding, *_CONVOLUTIONS[:3], *_NORMS)
"""Layers that mode `ew` knows."""


@dataclass(frozen=True, slots=True)
class PrivateSettings:
    """How private, and by which of Opacus' ways to per-sample gradients.  Raises ConfigError."""

    noise_multiplier: float
    """sigma: the noise's deviation in clip norms.  0: no privacy, for tests."""
    clip_norm: float
    """C, of a row's whole gradient; inf only without noise."""
    clipping: Clipping = "flat"
    """per_layer: every tensor of L to C / sqrt(L), so that the whole is within C too."""
    mode: Mode = "auto"
    max_physical_batch: int = 128
    """Rows whose gradients are in memory at once; a larger batch is summed in parts, noised once."""
    insecure_seed: int | None = None
    """Tests and studies only: makes draws and noise reproducible, and so worthless.  One a run, round and node."""

    def __post_init__(self) -> None:
        sigma, clip = self.noise_multiplier, self.clip_norm
        found = []
        if not (math.isfinite(sigma) and sigma >= 0):
            found.append(f"noise_multiplier is {sigma}; it must be a number, at least 0")
        if not clip > 0 or (math.isinf(clip) and sigma != 0):
            found.append(f"clip_norm is {clip}; it must be above 0, and finite wherever there is noise")
        if self.clipping not in Clipping.__args__:  # type: ignore[attr-defined]
            found.append(f"clipping is {self.clipping!r}; it must be flat or per_layer")
        if self.mode not in Mode.__args__:  # type: ignore[attr-defined]
            found.append(f"mode is {self.mode!r}; it must be one of {', '.join(Mode.__args__)}")  # type: ignore[attr-defined]
        if self.mode == "ghost" and self.clipping == "per_layer":
            found.append("mode ghost clips the whole gradient only: set clipping=flat, or another mode")
        if self.max_physical_batch < 1:
            found.append(f"max_physical_batch is {self.max_physical_batch}; it must be at least 1")
        if found:
            raise ConfigError("private training: " + "; ".join(found))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the accountant charges: `steps` of sampling rate `sample_rate`."""

    sample_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class PrivateTrained:
    """All tensors after training, what was spent, and `log`, which is exact and stays at the node."""

    arrays: dict[str, npt.NDArray[np.generic]]
    num_examples: int
    steps: int
    sample_rate: float
    log: dict[str, Any]
    """Of this node's journal alone: loss (mean over the rows drawn in the last epoch), drawn (rows by step), norm_mean,
    norm_quantiles (10, 50, 90 %), norm_max, clip_fraction, not_finite (rows that were left out)."""


def plan(num_rows: int, batch_size: int, epochs: int, *, max_examples: int | None = None) -> Plan:
    """q = min(batch_size / n, 1), the rate that `train` draws with, and epochs * ceil(n / batch_size) steps.

    `max_examples` shortens the work, so n in the number of steps, and leaves q: all rows take part.  To train on m rows
    chosen of n is no add-or-remove-one mechanism, since a row that goes makes way for another.
    """
    worked = num_rows if max_examples is None else min(num_rows, max_examples)
    return Plan(batch_size / num_rows if num_rows > batch_size else 1.0, epochs * math.ceil(worked / batch_size))


def train(
    sector: Sector,
    config: TrainingConfig,
    params: Arrays,
    rows: Rows,
    settings: PrivateSettings,
    *,
    device: str = "cpu",
    proximal_mu: float = 0.0,
    frozen_local: bool = False,
) -> PrivateTrained:
    """DP-SGD from the params given, which are not changed.  Raises ConfigError for a model that cannot be private.

    Local layers are trained with the shared ones under one clip norm, unless `frozen_local`.  The proximal term (see
    `sectors.training.train`) and weight decay depend on no row: they are added after the noise and cost nothing.  A row
    whose gradient is not finite adds nothing: what one row can do must stay bounded whatever the row.  Buffers are the
    base's.
    """
    if found := problems(sector):
        raise ConfigError(f"sector {sector.name} cannot be trained privately: " + "; ".join(found))
    n = num_rows(rows)
    planned = plan(n, config.batch_size, config.epochs, max_examples=config.max_examples)
    base = {name: np.array(a) for name, a in params.items()}
    if not planned.steps:
        return PrivateTrained(base, 0, 0, planned.sample_rate, {})
    chance = _Chance.of(settings.insecure_seed, device)
    with reproducible(chance.model), _without_known_warnings():
        model = load_into(sector.build_model().to(device), params).train()
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and not (frozen_local and sector.is_local(name)))
        # all names of a tensor: state_dict has them
        moved = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        if not moved:
            raise ConfigError(f"sector {sector.name} has no tensor to train: all are local, and frozen_local is set")
        steps = _Steps.of(sector, model, config, settings, min(config.batch_size, n), chance.noise, proximal_mu)
        for _ in range(planned.steps):
            steps.take(rows, drawn(chance.rows, n, planned.sample_rate))
        arrays = {name: a if name in moved else base[name] for name, a in arrays_of(model).items()}
    used = min(n, config.max_examples or n)
    log = steps.journal.log(planned.steps // config.epochs)
    return PrivateTrained(arrays, used, planned.steps, planned.sample_rate, log)


def drawn(rng: np.random.Generator, n: int, sample_rate: float) -> Index:
    """Which of n rows enter a step, ascending: each independently with probability `sample_rate`.

    The gaps between them are geometric: the law of n coins, from about as many draws as rows enter.
    """
    expected = n * sample_rate
    some = math.ceil(expected + 5 * math.sqrt(expected)) + 5
    found = rng.geometric(sample_rate, some).cumsum()
    while found[-1] < n:
        found = np.concatenate([found, found[-1] + rng.geometric(sample_rate, some).cumsum()])
    return found[: found.searchsorted(n, side="right")] - 1


# ---------------------------------------------------------------- which models


def problems(sector: Sector) -> list[str]:
    """Every reason why this sector cannot be trained privately; none: it can."""
    return list(_problems(sector))


def default_mode(sector: Sector) -> str:
    """The fastest mode that is exact for the sector's model.

    ghost    all trainable layers are linear, with 16,384 params or more: no gradient of a row is ever made
    direct   all are in `DIRECT`: Opacus' formulas, fed by one `autograd.grad` of the layers' outputs, without Opacus'
             backward hooks and without the gradients of whole batches, which DP-SGD throws away
    hooks    anything else that Opacus knows

    ew (torch's ExpandedWeights) is nowhere faster, and cannot take transposed convolutions or an empty batch, which is
    why no model here is called on one.  In times of a step of plain SGD (`python -m experiments.benchmarks.private
    --all`, two busy cores, one thread; the last column is Opacus' own engine and loader):

                                 direct   ew  hooks  ghost  functorch  Opacus
        banks                       2.8  3.7    4.5    5.2       10.2     6.5
        healthcare_heart            2.1  2.9    3.2    4.2        7.1     4.1
        healthcare_pneumonia        1.9  2.1    2.3    2.9        3.1     2.4
        healthcare_retina           1.6    -    2.6    3.1        3.9       -
        healthcare_wisconsin        2.6  3.5    4.0    5.1        8.7     5.0
        production                  1.5  1.6    1.8    2.3        3.5     2.2
        retail                      0.7  0.8    1.5   18.1        3.0     1.6
        banks, hidden 400, 400     16.7 21.0   39.4    5.6       40.6    33.7
    """
    return _default_mode(sector)


def fixed(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy with what Opacus can replace replaced, and a sentence for each replacement.

    For authors of sectors, who write the result into `build_model`: another architecture has other tensors, so a node
    cannot change it alone.
    """
    before = dict(module.named_modules())
    changed = ModuleValidator.fix(module)
    new = {name: layer for name, layer in changed.named_modules() if name in before}
    return changed, [
        f"{name or 'the model'}: {before[name]} became {layer}"
        for name, layer in new.items()
        if type(layer) is not type(before[name])
    ]


@lru_cache(maxsize=32)
def _problems(sector: Sector) -> tuple[str, ...]:
    with reproducible(0):
        model = sector.build_model().train()
    found = [reason for name, layer in model.named_modules() for reason in _layer_problems(name or "the model", layer)]
    if not any(p.requires_grad for p in model.parameters()):
        found.append("the model has no tensor to train")
    if _normalised_by_all(sector):
        found.append("localise normalises rows by the node's other rows, so that one row moves the gradients of all")
    return tuple(found)


def _layer_problems(name: str, layer: nn.Module) -> Iterator[str]:
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        # also where it has no params, and Opacus does not look
        yield f"{name} ({kind}) mixes the rows of a batch: use GroupNorm"
    elif check := ModuleValidator.VALIDATORS.get(type(layer)):
        yield from (f"{name} ({kind}): {str(error).partition('. ')[0]}" for error in check(layer))
    elif list(layer.parameters(recurse=False)) and (kept := [b for b, _ in layer.named_buffers(recurse=False)]):
        yield f"{name} ({kind}) keeps {', '.join(kept)} between batches"
    if getattr(layer, "inplace", False):
        yield f"{name} ({kind}) works in place: set inplace=False"
    if isinstance(layer, nn.EmbeddingBag):
        yield f"{name} (EmbeddingBag): Opacus counts an index once that a bag holds twice: use Embedding and a sum"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        yield f"{name} (Embedding): max_norm and scale_grad_by_freq depend on all rows of a batch"
    if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode != "zeros":
        yield f"{name} ({kind}): Opacus takes padding for zeros, not for {layer.padding_mode}"


def _normalised_by_all(sector: Sector) -> bool:
    """Whether a row, localised, depends on which rows it is localised by.  Asked of generated rows."""
    if type(sector).localise is Sector.localise:
        return False
    few = replace(sector, synthetic_rows=16)
    rows = few.pool(few.generate()).rows
    half = num_rows(rows) // 2
    by = (take(rows, np.arange(half)), take(rows, np.arange(half, num_rows(rows))))
    one, other = (few.localise(take(rows, np.arange(1)), reference) for reference in by)
    return one.keys() != other.keys() or any(not np.array_equal(one[k], other[k]) for k in one)


@lru_cache(maxsize=32)
def _default_mode(sector: Sector) -> str:
    with reproducible(0):
        model = sector.build_model()
    layers = [layer for _, layer in trainable_modules(model)]
    if all(type(layer) is nn.Linear for layer in layers):
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return "ghost" if size >= GHOST_LEAST else "direct"
    return "direct" if all(type(layer) in DIRECT for layer in layers) else "hooks"


# ---------------------------------------------------------------- randomness


@dataclass(frozen=True, slots=True)
class _Chance:
    """Generators of a private training, each its own."""

    rows: np.random.Generator
    noise: torch.Generator
    model: int
    """The seed of what a model draws itself (dropout)."""

    @classmethod
    def of(cls, insecure_seed: int | None, device: str) -> _Chance:
        if insecure_seed is None:
            rng = np.random.default_rng(secrets.randbits(128))
            return cls(rng, _secret(torch.Generator(device)), secrets.randbits(63))
        rows, noise, model = (canonical.seed_for(insecure_seed, what) for what in ("rows", "noise", "model"))
        return cls(np.random.default_rng(rows), torch.Generator(device).manual_seed(noise), model)


_MARK = 0x7E115
_WORDS = slice(3, 3 + 624)


def _secret(generator: torch.Generator) -> torch.Generator:
    """The generator with a state from the OS.

    On a CPU torch's generator is a Mersenne Twister, and `manual_seed` takes 32 bits of the seed: who has seen a noised
    sum can try them all.  So its 624 words are written, where torch keeps them.  On CUDA a seed has 64 bits.
    """
    if generator.device.type != "cpu":
        return generator.manual_seed(secrets.randbits(63))
    state = generator.manual_seed(_MARK).get_state()
    words = state.numpy().view(np.uint64)
    if len(words) != 632 or words[0] != _MARK or words[_WORDS.start] != _MARK:
        raise RuntimeError(f"torch {torch.__version__} keeps its generator's state elsewhere: see sectors/private.py")
    words[_WORDS] = np.frombuffer(secrets.token_bytes(624 * 4), np.uint32)
    generator.set_state(state)
    return generator


# ---------------------------------------------------------------- steps


@dataclass(frozen=True, slots=True)
class _Steps:
    """One logical step after another: rows in, the model moved."""

    sector: Sector
    model: nn.Module
    """Opacus' wrapper, which the sector calls."""
    bundles: list[_Bundle]
    measure: Callable[[Tensor], Tensor]
    """Losses (B,) -> norms (bundles or 1, B), with gradients left in the bundles."""
    optimizer: Any
    move: Callable[[Any], Any]
    """The step of the optimizer that Opacus wraps."""
    max_physical_batch: int
    journal: _Journal

    @classmethod
    def of(
        cls,
        sector: Sector,
        model: nn.Module,
        config: TrainingConfig,
        settings: PrivateSettings,
        expected_batch: int,
        noise: torch.Generator,
        proximal_mu: float,
    ) -> _Steps:
        mode = default_mode(sector) if settings.mode == "auto" else settings.mode
        if mode == "ghost" and settings.clipping == "per_layer":
            mode = "direct"
        bundles = _bundles(sector, model, proximal_mu, apart=settings.clipping == "per_layer")
        clip = settings.clip_norm if math.isfinite(settings.clip_norm) else UNBOUNDED
        clips = [clip / math.sqrt(len(bundles))] * len(bundles) if settings.clipping == "per_layer" else [clip]
        wrapped, measure = _wrapped(sector, model, mode, bundles, clip)
        private = get_optimizer_class(settings.clipping, distributed=False, grad_sample_mode=mode)
        optimizer = private(
            _optimizer([b.flat for b in bundles], config),
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=clips if settings.clipping == "per_layer" else clip,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
            generator=noise,
            # of the optimizer, not of PrivacyEngine, which would ask for torchcsprng
            secure_mode=True,
        )
        # without the shield, see sectors/training.py
        move = torch.no_grad()(inspect.unwrap(type(optimizer.original_optimizer).step))
        most = settings.max_physical_batch
        return cls(sector, wrapped, bundles, measure, optimizer, move, most, _Journal(clips))

    def take(self, rows: Rows, index: Index) -> None:
        """One step on the rows drawn, which may be none: noise all the same."""
        self.journal.begin(len(index))
        most = self.max_physical_batch
        parts = [index[start : start + most] for start in range(0, len(index), most)] or [index]
        for bundle in self.bundles:
            bundle.begin()
        for i, part in enumerate(parts):
            self._gradients(rows, part)
            self.optimizer.signal_skip_step(do_skip=i + 1 < len(parts))
            self.optimizer.pre_step()
        for bundle in self.bundles:
            bundle.pull()
        self.move(self.optimizer.original_optimizer)

    def _gradients(self, rows: Rows, index: Index) -> None:
        """Leave the gradients of these rows in the bundles; of rows whose gradient is not finite, none."""
        while len(index):
            batch = to_batch(rows, index, self.bundles[0].flat.device)
            losses = self.sector.losses(self.sector.forward(self.model, batch), batch)
            if losses.shape != (len(index),):
                # (B, 1) would pass for (B, B) in ghost clipping, and the sum exceed its bound
                raise ConfigError(
                    f"sector {self.sector.name}: losses are {tuple(losses.shape)} for {len(index)} rows; "
                    f"private training needs one a row, ({len(index)},)"
                )
            norms = self.measure(losses)
            # the sum first: one number to look at, nearly always
            if math.isfinite(norms.sum()) or bool((finite := torch.isfinite(norms).all(dim=0)).all()):
                self.journal.add(losses, norms)
                return
            index = index[finite.cpu().numpy()]
            self.journal.num_not_finite += len(finite) - len(index)
        # nothing is called on an empty batch: not every model and mode can be
        for bundle in self.bundles:
            bundle.clear()


class _Bundle:
    """Tensors that the optimizer sees as one, since it does a dozen small things with each that it sees."""

    def __init__(self, members: list[tuple[nn.Parameter, bool]], mu: float) -> None:
        """Tensors, each with whether it is shared."""
        self.tensors = [t for t, _ in members]
        self.flat = nn.Parameter(torch.cat([t.detach().reshape(-1) for t in self.tensors]))
        parts = torch.split(self.flat.data, [t.numel() for t in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor.data = part.view_as(tensor)
        pulled = torch.cat([torch.full((t.numel(),), mu * shared) for t, shared in members]).to(self.flat.device)
        self._pulled = (pulled, self.flat.detach().clone()) if mu else None

    def begin(self) -> None:
        """Forget the last step: what DPOptimizer.zero_grad does, and Opacus would do for every part."""
        self.flat.summed_grad = None  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Gradients of no rows."""
        self.flat.grad_sample = self.flat.new_zeros((0, len(self.flat)))  # type: ignore[attr-defined]
        self.flat.grad = torch.zeros_like(self.flat)

    def take_samples(self, size: int) -> Tensor:
        """The tensors' per-sample gradients become the bundle's.  -> their norms, (size,)"""
        found = [_taken(t, "grad_sample", (size, t.numel())) for t in self.tensors]
        samples = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        self.flat.grad_sample = samples  # type: ignore[attr-defined]
        norms: Tensor = torch.linalg.vector_norm(samples, dim=1)
        return norms

    def take_sums(self) -> None:
        """The tensors' gradients, clipped and summed already, become the bundle's."""
        self.flat.grad = torch.cat([_taken(t, "grad", (t.numel(),)) for t in self.tensors])

    def pull(self) -> None:
        """p.grad += mu (p - p0), of shared params"""
        if self._pulled is not None and self.flat.grad is not None:
            mu, start = self._pulled
            self.flat.grad += mu * (self.flat.detach() - start)


def _taken(tensor: nn.Parameter, name: str, shape: tuple[int, ...]) -> Tensor:
    """A gradient of a tensor, which then has none; zeros where no loss depends on it."""
    found: Tensor | None = getattr(tensor, name)
    tensor.grad = tensor.grad_sample = None  # type: ignore[attr-defined]
    return tensor.new_zeros(shape) if found is None else found.reshape(shape)


def _bundles(sector: Sector, model: nn.Module, mu: float, *, apart: bool) -> list[_Bundle]:
    """Small tensors of one dtype together, each large one, or with `apart` every one, by itself."""
    together: dict[Any, list[tuple[nn.Parameter, bool]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name if apart or p.numel() > BUNDLED else p.dtype
            together.setdefault(key, []).append((p, not sector.is_local(name)))
    return [_Bundle(members, mu) for members in together.values()]


def _optimizer(tensors: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer is OptimizerName.adam:
        return torch.optim.Adam(tensors, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(tensors, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


# ---------------------------------------------------------------- gradients of single rows


@register_grad_sampler(nn.Conv2d)  # type: ignore[untyped-decorator]
def _conv2d(layer: nn.Conv2d, inputs: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus' formula, which reads other pixels than it means to where the input is `channels_last`."""
    return dict(compute_conv_grad_sample(layer, [x.contiguous() for x in inputs], backprops))


@register_grad_sampler(nn.Linear)  # type: ignore[untyped-decorator]
def _linear(layer: Any, inputs: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus' formula; where rows are vectors without `einsum`, which is a third of a small network's step."""
    found: dict[nn.Parameter, Tensor] = {}
    if backprops.ndim != 2:
        return dict(compute_linear_grad_sample(layer, inputs, backprops))
    if layer.weight.requires_grad:
        found[layer.weight] = backprops[:, :, None] * inputs[0].to(backprops.dtype)[:, None, :]
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops
    return found


@register_grad_sampler(nn.ConvTranspose2d)  # type: ignore[untyped-decorator]
def _transposed2d(layer: Any, inputs: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The convolution's formula with input and output exchanged.  Opacus has none and takes functorch, which is slower
    and imports torch's compiler (2 s in a fresh process)."""
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        like = {"kernel_size": layer.kernel_size, "padding": layer.padding, "stride": layer.stride}
        patches = unfold2d(backprops.contiguous(), dilation=layer.dilation, **like)
        # by group; the last axis is the input's pixels
        x, y = (t.reshape(len(t), layer.groups, -1, patches.shape[-1]) for t in (inputs[0].flatten(2), patches))
        found[layer.weight] = (x.to(y.dtype) @ y.transpose(2, 3)).reshape(-1, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.sum((2, 3))
    return found


class Direct(GradSampleModule):  # type: ignore[misc]
    """Opacus' formulas of per-sample gradients, fed by one `autograd.grad` of the layers' outputs."""

    def add_hooks(self, **_: Any) -> None:
        """Note every call of a trainable layer; nothing is hooked to the backward pass."""
        self.calls: list[tuple[nn.Module, list[Tensor], Tensor, Any]] = []
        for layer in self.iterate_submodules(self._module):
            if type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer)
            layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls.append((layer, [t.detach() for t in inputs], output, output.grad_fn))

    def backward(self, losses: Tensor) -> None:
        """Leave in each trainable tensor's `grad_sample` the gradients of the losses (B,), one a row."""
        calls, self.calls = self.calls, []
        if any(output.grad_fn is not made for _, _, output, made in calls):
            raise ConfigError("the model changes a layer's output in place: private training needs it as it was")
        outputs = [output for _, _, output, _ in calls]
        found = torch.autograd.grad(losses, outputs, torch.ones_like(losses), allow_unused=True)
        for (layer, inputs, _, _), backprops in zip(calls, found, strict=True):
            if backprops is not None:
                sampler = self.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
                for p, g in sampler(layer, inputs, backprops).items():
                    if p.requires_grad:  # a layer, or a tensor, may be used twice
                        p.grad_sample = g if p.grad_sample is None else p.grad_sample + g


def _wrapped(
    sector: Sector, model: nn.Module, mode: str, bundles: list[_Bundle], clip: float
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model as the sector is to call it, and `_Steps.measure`."""
    if mode == "ghost":
        return _ghost(model, bundles, clip)
    known = {"direct": DIRECT, "ew": EXPANDED}.get(mode)
    odd = {type(layer) for _, layer in trainable_modules(model)} - set(known) if known else set()
    if odd:
        names = ", ".join(sorted(kind.__name__ for kind in odd))
        raise ConfigError(f"sector {sector.name}: mode {mode} does not know {names}: use mode=hooks")
    if mode == "direct":
        wrapped = Direct(model, loss_reduction="sum")
        backward = wrapped.backward
    else:
        backward = _summed
        if mode == "ew":
            wrapped = GradSampleModuleExpandedWeights(model, loss_reduction="sum")
        else:
            wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=mode == "functorch")

    def measure(losses: Tensor) -> Tensor:
        backward(losses)
        norms = [b.take_samples(len(losses)) for b in bundles]
        return norms[0][None] if len(norms) == 1 else torch.stack(norms)

    return wrapped, measure


def _summed(losses: Tensor) -> None:
    torch.autograd.backward(losses.sum())


def _ghost(model: nn.Module, bundles: list[_Bundle], clip: float) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=clip)

    class Cleared:
        """What Opacus clears between its two passes: the model's gradients, not the sum of earlier parts."""

        def zero_grad(self) -> None:
            wrapped.zero_grad(set_to_none=True)

    def measure(losses: Tensor) -> Tensor:
        two_passes: Any = DPTensorFastGradientClipping(wrapped, Cleared(), losses, "sum")
        two_passes.backward()
        for bundle in bundles:
            bundle.take_sums()
        for p in wrapped.trainable_parameters:  # a layer that is not called must not count with an earlier norm
            del p._norm_sample
        norms: Tensor = wrapped.per_sample_gradient_norms.detach()[None]
        return norms

    return wrapped, measure


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """torch warns of Opacus' hooks on a first layer, and of functorch on whole numbers; gradients are right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing|In CPU autocast, but the target")
        yield


# ---------------------------------------------------------------- the node's own journal


@dataclass(slots=True)
class _Journal:
    """Exact statistics of a training, as Python's numbers: small tensors that outlive a step keep the memory of large
    ones from being used again."""

    clips: list[float]
    """Bounds of the norms by bundle, or of the whole."""
    drawn: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    """By step."""
    norms: list[list[float]] = field(default_factory=list)
    """By bundle, or of the whole."""
    num_not_finite: int = 0

    def begin(self, size: int) -> None:
        self.drawn.append(size)
        self.losses.append([])

    def add(self, losses: Tensor, norms: Tensor) -> None:
        self.losses[-1] += losses.tolist()
        by_bundle = norms.tolist()
        self.norms = self.norms or [[] for _ in by_bundle]
        for known, new in zip(self.norms, by_bundle, strict=True):
            known += new

    def log(self, last: int) -> dict[str, Any]:
        """`PrivateTrained.log`; its loss is of the `last` steps."""
        found: dict[str, Any] = {"drawn": self.drawn, "not_finite": self.num_not_finite}
        if losses := [loss for step in self.losses[-last:] for loss in step]:
            found["loss"] = float(np.mean(losses))
        if self.norms:
            norms = np.array(self.norms)
            whole = np.linalg.norm(norms, axis=0)
            clipped = (norms if len(self.clips) > 1 else whole) > np.array(self.clips)[:, None]
            found |= {"norm_mean": float(whole.mean()), "norm_max": float(whole.max())}
            found["norm_quantiles"] = [float(q) for q in np.quantile(whole, (0.1, 0.5, 0.9))]
            found["clip_fraction"] = float(clipped.any(axis=0).mean())
        return found
