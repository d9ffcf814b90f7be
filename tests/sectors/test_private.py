"""DP-SGD at a node: gradients of single rows, clipping, noise, draws, and every trap of Opacus that was found."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule, compute_conv_grad_sample
from opacus.grad_sample.embedding import compute_embeddingbag_gradsampler
from scipy import stats
from torch import Tensor, nn

import sectors
from conf.schema import OptimizerName, TrainingConfig
from sectors import private
from sectors.base import Batch, Place, Rows, Sector, num_rows, take, to_batch
from sectors.binary import mlp
from sectors.healthcare_wisconsin import HealthcareWisconsin
from sectors.params import initial_arrays, load_into, reproducible
from sectors.private import Plan, PrivateSettings, PrivateTrained, default_mode, drawn, fixed, plan, problems, train
from trellis import canonical
from trellis.errors import ConfigError
from trellis.vectors import Arrays

ERROR_RATE = 1e-6
"""Of each statistical test, were its seed not fixed."""

MODES = ("direct", "hooks", "ew", "ghost", "functorch")
CLIPPINGS = [(m, c) for m in MODES for c in ("flat", "per_layer") if (m, c) != ("ghost", "per_layer")]
CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "banks": {"synthetic_rows": 200},
    "healthcare_heart": {"synthetic_rows": 100},
    "healthcare_pneumonia": {"synthetic_rows": 60},
    "healthcare_retina": {"synthetic_rows": 4, "channels": [8, 16]},
    "healthcare_wisconsin": {"synthetic_rows": 100},
    "production": {"synthetic_rows": 1500},
    "retail": {"synthetic_rows": 600},
}
UNKNOWN = {("healthcare_retina", "ew"): "ConvTranspose2d"}
"""Modes that cannot take a sector's model, and why."""


@cache
def case(name: str, n: int = 6) -> tuple[Sector, Rows, Arrays]:
    """A sector, some of its generated rows, and params to start from."""
    sector = sectors.get(name, SMALL[name])
    rows = sector.load(Place(0, 1, synthetic=True)).train
    sector = sector.fitted_on(rows)
    return sector, take(rows, np.arange(n)), initial_arrays(sector, 0)


def tabular(n: int) -> tuple[Sector, Rows, Arrays]:
    """A network of 513 params and n rows."""
    return case("healthcare_wisconsin", n)


def once(sector: Sector, params: Arrays, rows: Rows, **settings: Any) -> PrivateTrained:
    """One step on all rows, with rate 1: params less the private gradient, a mean over the rows."""
    config = TrainingConfig(batch_size=max(num_rows(rows), 1), lr=1.0)
    return train(
        sector, config, params, rows, PrivateSettings(**{"noise_multiplier": 0.0, "insecure_seed": 0, **settings})
    )


def flat(arrays: Arrays) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def summed(params: Arrays, trained: PrivateTrained, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The sum of clipped gradients that `once` moved by."""
    return (flat(params) - flat(trained.arrays)) * n


def by_loop(sector: Sector, params: Arrays, rows: Rows) -> dict[str, Tensor]:
    """Gradients of each row by itself, (n, ...) by tensor."""
    with reproducible(0):
        model = load_into(sector.build_model(), params).train()
        found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for i in range(num_rows(rows)):
            batch = to_batch(rows, np.array([i]), CPU)
            model.zero_grad()
            sector.losses(sector.forward(model, batch), batch).sum().backward()
            for name, p in model.named_parameters():
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


def whole(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def clipped(grads: Tensor, clip: float) -> Tensor:
    return grads * (clip / (grads.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)


# ---------------------------------------------------------------- what is charged


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "q", "steps"),
    [(200, 32, 1, 0.16, 7), (85, 17, 3, 0.2, 15), (86, 17, 3, 17 / 86, 18), (5, 32, 4, 1.0, 4), (32, 32, 1, 1.0, 1)],
)
def test_the_plan_by_hand(n: int, batch: int, epochs: int, q: float, steps: int) -> None:
    assert plan(n, batch, epochs) == Plan(q, steps)


def test_max_examples_shortens_the_work_and_leaves_the_rate() -> None:
    assert plan(1000, 50, 2, max_examples=120) == Plan(0.05, 6)
    assert plan(100, 50, 2, max_examples=120) == plan(100, 50, 2)


def test_training_takes_the_steps_and_the_rate_of_the_plan() -> None:
    sector, rows, params = tabular(50)
    config = TrainingConfig(batch_size=8, epochs=60, lr=0.01)
    trained = train(sector, config, params, rows, PrivateSettings(1.0, 1.0, insecure_seed=1))
    assert Plan(trained.sample_rate, trained.steps) == plan(50, 8, 60) == Plan(0.16, 420)
    drawn_rows = trained.log["drawn"]
    assert len(drawn_rows) == 420
    assert abs(sum(drawn_rows) - 8 * 420) < 5 * math.sqrt(420 * 8 * 0.84), (
        "not 50 / ceil(50 / 8) a step, as a loader has"
    )


def test_no_rows_take_no_steps_and_give_the_base_back() -> None:
    sector, rows, params = tabular(5)
    none = take(rows, np.arange(0))
    trained = train(sector, TrainingConfig(), params, none, PrivateSettings(1.0, 1.0))
    assert (trained.steps, trained.num_examples, trained.log) == (0, 0, {})
    assert all(np.array_equal(trained.arrays[k], params[k]) for k in params)


def test_fewer_rows_than_a_batch_are_all_drawn_in_every_step() -> None:
    sector, rows, params = tabular(5)
    trained = train(sector, TrainingConfig(batch_size=64, epochs=3), params, rows, PrivateSettings(1.0, 1.0))
    assert (trained.sample_rate, trained.log["drawn"], trained.num_examples) == (1.0, [5, 5, 5], 5)
    of_64, of_5 = (
        train(sector, TrainingConfig(batch_size=b), params, rows, PrivateSettings(1.0, 1.0, insecure_seed=0))
        for b in (64, 5)
    )
    assert np.array_equal(flat(of_64.arrays), flat(of_5.arrays)), "a mean over the 5 rows there are"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"clip_norm": math.nan}, "clip_norm is nan"),
        ({"clip_norm": math.inf}, "finite wherever there is noise"),
        ({"clipping": "by_hand"}, "flat or per_layer"),
        ({"mode": "fast"}, "auto, direct, hooks"),
        ({"mode": "ghost", "clipping": "per_layer"}, "mode ghost clips the whole"),
        ({"max_physical_batch": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        PrivateSettings(**{"noise_multiplier": 1.0, "clip_norm": 1.0, **settings})


# ---------------------------------------------------------------- gradients of single rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sectors.names())
def test_gradients_of_single_rows_are_those_of_a_plain_loop(name: str, mode: str) -> None:
    sector, rows, params = case(name)
    expected = by_loop(sector, params, rows)
    norms = whole(expected).norm(dim=1)
    clip = float(norms.median())
    with reproducible(0), private._without_known_warnings():
        model = load_into(sector.build_model(), params).train()
        bundles = private._bundles(sector, model, 0.0, apart=True)
        if (name, mode) in UNKNOWN:
            with pytest.raises(ConfigError, match=UNKNOWN[name, mode]):
                private._wrapped(sector, model, mode, bundles, clip)
            return
        wrapped, measure = private._wrapped(sector, model, mode, bundles, clip)
        batch = to_batch(rows, np.arange(num_rows(rows)), CPU)
        found = measure(sector.losses(sector.forward(wrapped, batch), batch))
    assert torch.allclose(found.norm(dim=0), norms, rtol=1e-5)
    for bundle, grads in zip(bundles, expected.values(), strict=True):
        size = float(grads.abs().max()) + 1e-12
        if mode == "ghost":  # it never makes them: their clipped sum
            coefficients = (clip / (norms + 1e-6)).clamp(max=1.0)
            assert bundle.flat.grad is not None
            difference = bundle.flat.grad - (coefficients @ grads.flatten(1))
            assert float(difference.abs().max()) < 1e-5 * num_rows(rows) * size
        else:
            assert float((bundle.flat.grad_sample - grads.flatten(1)).abs().max()) < 1e-5 * size


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_a_step_is_the_mean_of_clipped_gradients(mode: str) -> None:
    sector, rows, params = tabular(12)
    grads = whole(by_loop(sector, params, rows))
    clip = float(grads.norm(dim=1).median())
    trained = once(sector, params, rows, clip_norm=clip, mode=mode)
    assert np.allclose(summed(params, trained, 12), clipped(grads, clip).sum(0).numpy(), atol=1e-5)
    assert trained.log["clip_fraction"] == 0.5
    assert trained.log["norm_max"] == pytest.approx(float(grads.norm(dim=1).max()), rel=1e-5)
    assert trained.log["norm_mean"] == pytest.approx(float(grads.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("mode", ["direct", "hooks", "ew"])
def test_per_layer_every_tensor_is_clipped_to_its_share(mode: str) -> None:
    sector, rows, params = tabular(12)
    grads = by_loop(sector, params, rows)
    clip = 0.5
    expected = torch.cat([clipped(g.flatten(1), clip / math.sqrt(len(grads))) for g in grads.values()], dim=1)
    trained = once(sector, params, rows, clip_norm=clip, mode=mode, clipping="per_layer")
    assert np.allclose(summed(params, trained, 12), expected.sum(0).numpy(), atol=1e-5)
    assert float(expected.norm(dim=1).max()) <= clip
    over = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]) > clip / math.sqrt(len(grads))
    assert trained.log["clip_fraction"] == float(over.any(0).float().mean())


@pytest.mark.parametrize(("mode", "clipping"), CLIPPINGS)
def test_no_row_moves_the_sum_by_more_than_the_clip_norm(mode: str, clipping: str) -> None:
    sector, rows, params = tabular(8)
    rows = {**rows, "x": rows["x"] * np.linspace(0.1, 100, 8)[:, None].astype(np.float32)}
    clip = 0.03
    of_all = summed(params, once(sector, params, rows, clip_norm=clip, mode=mode, clipping=clipping), 8)
    assert np.linalg.norm(of_all) <= 8 * clip
    for i in range(8):
        others = take(rows, np.delete(np.arange(8), i))
        without = summed(params, once(sector, params, others, clip_norm=clip, mode=mode, clipping=clipping), 7)
        assert np.linalg.norm(of_all - without) <= clip * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("column", "bad"), [("x", math.nan), ("x", math.inf), ("y", math.nan), ("y", 1e30)])
def test_a_row_whose_gradient_is_no_number_adds_nothing(mode: str, column: str, bad: float) -> None:
    sector, rows, params = tabular(6)
    spoilt = rows[column].copy()
    spoilt[2] = bad
    trained = once(sector, params, {**rows, column: spoilt}, clip_norm=0.5, mode=mode)
    without = once(sector, params, take(rows, np.array([0, 1, 3, 4, 5])), clip_norm=0.5, mode=mode)
    assert np.allclose(summed(params, trained, 6), summed(params, without, 5), atol=1e-5)
    assert trained.log["not_finite"] == 1
    assert math.isfinite(trained.log["norm_max"])


def test_only_rows_that_are_no_numbers_leave_noise() -> None:
    sector, rows, params = tabular(3)
    rows = {**rows, "x": np.full_like(rows["x"], np.nan)}
    trained = once(sector, params, rows, clip_norm=1.0, noise_multiplier=1.0)
    assert np.isfinite(flat(trained.arrays)).all()
    assert stats.kstest((flat(params) - flat(trained.arrays)) * 3, "norm").pvalue > ERROR_RATE
    assert trained.log == {"drawn": [3], "not_finite": 3}


@dataclass(frozen=True)
class Twice(HealthcareWisconsin):
    """Layers that are called twice, a tensor of two names, and one that no loss depends on."""

    def build_model(self) -> nn.Module:
        return _Twice(len(self.schema) - 1)


class _Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.head = nn.Linear(width, 1)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.one(x))))))).squeeze(-1)


@pytest.mark.parametrize("mode", ["direct", "hooks", "ew"])
def test_layers_called_twice_tied_tensors_and_idle_ones(mode: str) -> None:
    _, rows, _ = tabular(6)
    sector = Twice()
    params = initial_arrays(sector, 0)
    expected = by_loop(sector, params, rows)
    norms = whole(expected).norm(dim=1)
    trained = once(sector, params, rows, clip_norm=float(norms.median()), mode=mode)
    factors = (float(norms.median()) / (norms + 1e-6)).clamp(max=1.0)
    for name, grads in expected.items():
        sums = torch.tensordot(factors, grads, dims=1).numpy()
        assert np.allclose((params[name] - trained.arrays[name]) * 6, sums, atol=1e-5), name
    assert np.array_equal(trained.arrays["two.weight"], trained.arrays["one.weight"])
    assert np.array_equal(trained.arrays["idle.weight"], params["idle.weight"])


# ---------------------------------------------------------------- Opacus' formulas


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(0, 1), dilation=2, groups=2), (4, 9, 8)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=2, groups=2), (4, 5, 6)),
    (nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    (nn.ConvTranspose1d(4, 6, 3), (4, 9)),
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.GroupNorm(2, 4), (4, 6, 5)),
    (nn.LayerNorm(5), (4, 5)),
    (nn.InstanceNorm2d(4, affine=True), (4, 5, 5)),
]


@pytest.mark.parametrize("mode", ["direct", "hooks"])
@pytest.mark.parametrize(("layer", "shape", "last"), [(*a, last) for a in LAYERS for last in {False, len(a[1]) == 3}])
def test_every_layer_alone(layer: nn.Module, shape: tuple[int, ...], last: bool, mode: str) -> None:
    layer, x = copy.deepcopy(layer), torch.from_numpy(np.random.default_rng(0).standard_normal((3, *shape), np.float32))
    loops = []
    for i in range(3):
        layer.zero_grad()
        (layer(x[i : i + 1]) ** 3).sum().backward()
        loops.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    layer.zero_grad()
    # as in a network: torch 2.13 crashes in GroupNorm's backward on channels_last that need no gradient
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    with private._without_known_warnings():
        wrapped = (private.Direct if mode == "direct" else GradSampleModule)(layer, loss_reduction="sum")
        losses = (wrapped(x) ** 3).flatten(1).sum(1)
        wrapped.backward(losses) if mode == "direct" else losses.sum().backward()
    for p, *grads in zip(layer.parameters(), *loops, strict=True):
        expected = torch.stack(grads)
        assert float((p.grad_sample - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_opacus_still_reads_other_pixels_in_channels_last() -> None:
    """When this fails Opacus is mended, and `private._conv2d` can go."""
    layer, x = nn.Conv2d(4, 5, 3, padding=1), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    backprops = torch.ones(2, 5, 6, 6)
    right = compute_conv_grad_sample(layer, [x], backprops)[layer.weight]
    wrong = compute_conv_grad_sample(layer, [x.contiguous(memory_format=torch.channels_last)], backprops)[layer.weight]
    assert not torch.allclose(right, wrong, atol=0.1)


def test_opacus_still_counts_once_what_a_bag_holds_twice() -> None:
    """When this fails Opacus is mended, and EmbeddingBag need not be refused."""
    bag = nn.EmbeddingBag(3, 1, mode="sum")
    found = compute_embeddingbag_gradsampler(bag, [torch.tensor([1, 1, 2]), torch.tensor([0])], torch.ones(1, 1))
    assert found[bag.weight].flatten().tolist() == [0.0, 1.0, 1.0], "autograd has 2 for the code that is there twice"


# ---------------------------------------------------------------- which models


EXPECTED_MODES = {
    "banks": "direct",
    "healthcare_heart": "direct",
    "healthcare_pneumonia": "direct",
    "healthcare_retina": "direct",
    "healthcare_wisconsin": "direct",
    "production": "direct",
    "retail": "direct",
}


@pytest.mark.parametrize("name", sectors.names())
def test_every_sector_is_private_as_it_is(name: str) -> None:
    sector, rows, params = case(name)
    assert problems(sector) == []
    assert default_mode(sector) == EXPECTED_MODES[name]
    trained = train(sector, TrainingConfig(batch_size=3), params, rows, PrivateSettings(1.0, 1.0))
    assert {k: (a.shape, a.dtype) for k, a in trained.arrays.items()} == {
        k: (a.shape, a.dtype) for k, a in params.items()
    }
    assert np.isfinite(flat(trained.arrays)).all()
    assert not np.array_equal(flat(trained.arrays), flat(params))


def test_a_wide_network_of_linear_layers_is_clipped_by_ghosts() -> None:
    wide = sectors.get("banks", {"hidden": [128, 128]})
    assert default_mode(wide) == "ghost"
    _, rows, _ = case("banks")
    settings = PrivateSettings(1.0, 1.0, clipping="per_layer")
    assert train(wide, TrainingConfig(), initial_arrays(wide, 0), rows, settings).steps == 1, "direct in its place"


@dataclass(frozen=True)
class Spoilt(HealthcareWisconsin):
    """Everything that Opacus, or privacy, cannot take."""

    def build_model(self) -> nn.Module:
        layers = OrderedDict(
            dense=nn.Linear(30, 8),
            seen=nn.BatchNorm1d(8),
            unseen=nn.BatchNorm1d(8, affine=False),
            kept=nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
            rnn=nn.LSTM(8, 8),
            relu=nn.ReLU(inplace=True),
            bag=nn.EmbeddingBag(3, 2),
            often=nn.Embedding(3, 2, scale_grad_by_freq=True),
            round=nn.Conv2d(1, 2, 3, padding_mode="circular"),
        )
        return nn.Sequential(layers)


def test_a_model_that_cannot_be_private_is_refused_with_every_reason_at_once() -> None:
    _, rows, params = tabular(4)
    with pytest.raises(ConfigError) as refused:
        train(Spoilt(), TrainingConfig(), params, rows, PrivateSettings(1.0, 1.0))
    for layer in ("seen", "unseen", "kept", "rnn", "relu", "bag", "often", "round"):
        assert f"{layer} (" in str(refused.value)
    assert "dense" not in str(refused.value)


def test_batch_norm_without_params_is_found_where_opacus_does_not_look() -> None:
    from opacus.validators import ModuleValidator

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    assert ModuleValidator.validate(model.train()) == []
    assert list(private._layer_problems("1", model[1])) == ["1 (BatchNorm1d) mixes the rows of a batch: use GroupNorm"]


def test_fixing_says_what_it_replaced_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.LSTM(8, 8)))
    changed, said = fixed(model)
    assert [line.partition(":")[0] for line in said] == ["1", "2.0"]
    assert "BatchNorm2d" in said[0]
    assert "became GroupNorm" in said[0]
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(changed[1], nn.GroupNorm)
    assert fixed(nn.Sequential(nn.Linear(2, 2)))[1] == []


def test_rows_normalised_by_the_nodes_other_rows_are_refused() -> None:
    sector = sectors.get("healthcare_pneumonia", {"normalisation": "node"})
    assert problems(sector) == [
        "localise normalises rows by the node's other rows, so that one row moves the gradients of all"
    ]
    for other in ("image", "fixed"):
        assert problems(sectors.get("healthcare_pneumonia", {"normalisation": other})) == []


@dataclass(frozen=True)
class Column(HealthcareWisconsin):
    """Losses (B, 1), which ghost clipping would broadcast to (B, B)."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().losses(outputs, batch)[:, None]


@dataclass(frozen=True)
class Mean(HealthcareWisconsin):
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().losses(outputs, batch).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sector", [Column(), Mean()])
def test_losses_that_are_not_one_a_row_are_refused(sector: Sector, mode: str) -> None:
    _, rows, params = tabular(4)
    with pytest.raises(ConfigError, match=r"private training needs one a row, \(4,\)"):
        once(sector, params, rows, clip_norm=1.0, mode=mode)


@dataclass(frozen=True)
class InPlace(HealthcareWisconsin):
    def build_model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(30, 4), nn.Linear(4, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.two(torch.relu_(self.one(x))).squeeze(-1)

        return Model()


def test_a_layers_output_changed_in_place_is_noticed() -> None:
    _, rows, _ = tabular(4)
    with pytest.raises(ConfigError, match="in place"):
        once(InPlace(), initial_arrays(InPlace(), 0), rows, clip_norm=1.0, mode="direct")


@dataclass(frozen=True)
class Odd(HealthcareWisconsin):
    """A layer with a tensor of its own, which no list of layers knows."""

    def build_model(self) -> nn.Module:
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 30))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale

        return nn.Sequential(Scale(), *mlp(30, (4,)))


def test_a_layer_of_ones_own_is_taken_by_hooks() -> None:
    _, rows, _ = tabular(6)
    sector = Odd()
    params = initial_arrays(sector, 0)
    assert default_mode(sector) == "hooks"
    grads = whole(by_loop(sector, params, rows))
    trained = once(sector, params, rows, clip_norm=0.2)
    assert np.allclose(summed(params, trained, 6), clipped(grads, 0.2).sum(0).numpy(), atol=1e-5)
    for mode in ("direct", "ew"):
        with pytest.raises(ConfigError, match=f"mode {mode} does not know Scale: use mode=hooks"):
            once(sector, params, rows, clip_norm=0.2, mode=mode)


@dataclass(frozen=True)
class Remembering(HealthcareWisconsin):
    """A buffer that follows the rows, in a layer without params."""

    def build_model(self) -> nn.Module:
        class Memory(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("mean", torch.zeros(30))

            def forward(self, x: Tensor) -> Tensor:
                self.mean += x.detach().mean(0)
                return x

        return nn.Sequential(Memory(), *mlp(30, (4,)))


def test_buffers_are_the_bases_whatever_the_rows_did_to_them() -> None:
    _, rows, _ = tabular(6)
    params = initial_arrays(Remembering(), 0)
    assert not once(Remembering(), params, rows, clip_norm=1.0).arrays["0.mean"].any()


# ---------------------------------------------------------------- steps


def plain_sgd(
    sector: Sector, config: TrainingConfig, params: Arrays, rows: Rows, seed: int, *, mu: float = 0.0
) -> Arrays:
    """SGD on the batches that `train` draws: the sum of their gradients by the batch that is expected."""
    n = num_rows(rows)
    planned = plan(n, config.batch_size, config.epochs)
    rng = np.random.default_rng(canonical.seed_for(seed, "rows"))
    with reproducible(0):
        model = load_into(sector.build_model(), params).train()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        kind = torch.optim.Adam if config.optimizer is OptimizerName.adam else torch.optim.SGD
        extra = {} if config.optimizer is OptimizerName.adam else {"momentum": config.momentum}
        optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **extra)
        for _ in range(planned.steps):
            index = drawn(rng, n, planned.sample_rate)
            model.zero_grad(set_to_none=False)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            if len(index):
                batch = to_batch(rows, index, CPU)
                (sector.losses(sector.forward(model, batch), batch).sum() / min(config.batch_size, n)).backward()
            for name, p in model.named_parameters():
                if mu and not sector.is_local(name) and p.grad is not None:
                    p.grad += mu * (p.detach() - start[name])
            optimizer.step()
        return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


RECIPES = [
    TrainingConfig(batch_size=4, epochs=3, lr=0.1),
    TrainingConfig(batch_size=4, epochs=3, lr=0.1, momentum=0.9, weight_decay=0.01),
    TrainingConfig(batch_size=4, epochs=3, lr=0.01, optimizer=OptimizerName.adam, weight_decay=0.01),
    TrainingConfig(batch_size=1, epochs=2, lr=0.1, momentum=0.5),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", RECIPES)
def test_without_noise_and_clipping_it_is_plain_sgd_on_poisson_batches(config: TrainingConfig, mode: str) -> None:
    sector, rows, params = tabular(24)
    trained = train(sector, config, params, rows, PrivateSettings(0.0, math.inf, mode=mode, insecure_seed=3))
    expected = plain_sgd(sector, config, params, rows, 3)
    assert np.allclose(flat(trained.arrays), flat(expected), atol=2e-6)
    assert config.batch_size > 1 or 0 in trained.log["drawn"], "a batch without rows is a step too"


@pytest.mark.parametrize("mode", MODES)
def test_the_proximal_term_is_kept_and_pulls_shared_params_only(mode: str) -> None:
    sector, rows, params = tabular(24)
    sector = replace(sector, local_layers=("head",))
    config = TrainingConfig(batch_size=4, epochs=3, lr=0.1)
    settings = PrivateSettings(0.0, math.inf, mode=mode, insecure_seed=3)
    trained = train(sector, config, params, rows, settings, proximal_mu=2.0)
    expected = plain_sgd(sector, config, params, rows, 3, mu=2.0)
    assert np.allclose(flat(trained.arrays), flat(expected), atol=2e-6)
    free = train(sector, config, params, rows, settings)
    moved, freely = (
        sum(np.square(t.arrays[k] - params[k]).sum() for k in params if not sector.is_local(k)) for t in (trained, free)
    )
    assert moved < 0.7 * freely


@pytest.mark.parametrize("mode", MODES)
def test_the_denominator_is_the_batch_that_is_expected(mode: str) -> None:
    sector, rows, params = tabular(1)
    rows = take(rows, np.zeros(4, np.int64))  # four times the same row
    config = TrainingConfig(batch_size=2, lr=1.0, max_examples=2)
    sizes = set()
    for seed in range(8):
        trained = train(sector, config, params, rows, PrivateSettings(0.0, 0.1, mode=mode, insecure_seed=seed))
        (size,) = trained.log["drawn"]
        moved = np.linalg.norm(flat(params) - flat(trained.arrays))
        assert moved == pytest.approx(size * 0.1 / 2, rel=1e-4)
        sizes.add(size)
    assert len(sizes) > 2


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_in_parts_is_the_batch_in_one_and_memory_is_that_of_a_part(mode: str, monkeypatch: Any) -> None:
    sector, rows, params = tabular(30)
    config = TrainingConfig(batch_size=20, epochs=3, lr=0.5, momentum=0.9)
    seen: list[int] = []
    forward = type(sector).forward
    monkeypatch.setattr(type(sector), "forward", lambda s, m, b: seen.append(len(b["x"])) or forward(s, m, b))
    found = {}
    for most in (1000, 7, 1):
        seen.clear()
        settings = PrivateSettings(1.0, 0.2, mode=mode, max_physical_batch=most, insecure_seed=5)
        found[most] = train(sector, config, params, rows, settings)
        assert max(seen) <= most
        assert sum(seen) == sum(found[most].log["drawn"])
    for most in (7, 1):
        assert np.allclose(flat(found[most].arrays), flat(found[1000].arrays), atol=1e-6)
        assert found[most].log["drawn"] == found[1000].log["drawn"]
        assert found[most].log["loss"] == pytest.approx(found[1000].log["loss"], rel=1e-5)
        assert found[most].log["clip_fraction"] == found[1000].log["clip_fraction"]


def test_all_modes_take_the_same_steps_empty_batches_included() -> None:
    sector, rows, params = tabular(30)
    config = TrainingConfig(batch_size=1, epochs=2, lr=0.1)
    found = [train(sector, config, params, rows, PrivateSettings(1.0, 0.5, mode=m, insecure_seed=1)) for m in MODES]  # type: ignore[arg-type]
    assert found[0].log["drawn"].count(0) > 10
    for other in found[1:]:
        assert np.allclose(flat(other.arrays), flat(found[0].arrays), atol=1e-6)


def test_nothing_is_called_on_an_empty_batch_and_no_row_takes_its_place(monkeypatch: Any) -> None:
    sector, rows, params = tabular(30)
    seen: list[int] = []
    forward = type(sector).forward
    monkeypatch.setattr(type(sector), "forward", lambda s, m, b: seen.append(len(b["x"])) or forward(s, m, b))
    trained = train(
        sector, TrainingConfig(batch_size=1, lr=0.1), params, rows, PrivateSettings(1.0, 1.0, insecure_seed=1)
    )
    assert seen == [size for size in trained.log["drawn"] if size]


# ---------------------------------------------------------------- local layers


def test_local_layers_are_trained_under_the_same_clip_norm() -> None:
    sector, rows, params = tabular(12)
    local = replace(sector, local_layers=("head",))
    for seed in (0, 1):
        one, other = (
            once(s, params, rows, clip_norm=0.2, noise_multiplier=1.0, insecure_seed=seed) for s in (sector, local)
        )
        assert np.array_equal(flat(one.arrays), flat(other.arrays))


@pytest.mark.parametrize("mode", MODES)
def test_frozen_local_layers_stay_and_the_rest_is_clipped_without_them(mode: str) -> None:
    sector, rows, params = tabular(12)
    sector = replace(sector, local_layers=("head",))
    settings = PrivateSettings(0.0, 0.2, mode=mode, insecure_seed=0)
    trained = train(sector, TrainingConfig(batch_size=12, lr=1.0), params, rows, settings, frozen_local=True)
    grads = by_loop(sector, params, rows)
    shared = {k: g for k, g in grads.items() if not sector.is_local(k)}
    expected = clipped(whole(shared), 0.2).sum(0).numpy()
    assert np.allclose(flat({k: (params[k] - trained.arrays[k]) * 12 for k in shared}), expected, atol=1e-5)
    assert all(np.array_equal(trained.arrays[k], params[k]) for k in params if sector.is_local(k))


def test_where_all_layers_are_local_and_frozen_there_is_nothing_to_train() -> None:
    sector, rows, params = tabular(4)
    sector = replace(sector, local_layers=("*",))
    with pytest.raises(ConfigError, match="no tensor to train"):
        train(sector, TrainingConfig(), params, rows, PrivateSettings(1.0, 1.0), frozen_local=True)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(("mode", "clipping"), CLIPPINGS)
def test_the_noise_has_the_deviation_that_is_charged(mode: str, clipping: str) -> None:
    sector, rows, params = case("banks")
    sigma, clip, n = 1.7, 0.3, num_rows(rows)
    with_noise, without = (
        once(sector, params, rows, clip_norm=clip, noise_multiplier=s, mode=mode, clipping=clipping, insecure_seed=4)
        for s in (sigma, 0.0)
    )
    noise = (flat(without.arrays) - flat(with_noise.arrays)) * n / (sigma * clip)
    assert len(noise) == 1505
    spread = stats.chi2(len(noise))
    assert spread.ppf(ERROR_RATE / 2) < np.square(noise).sum() < spread.ppf(1 - ERROR_RATE / 2)
    assert stats.kstest(noise, "norm").pvalue > ERROR_RATE
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / math.sqrt(len(noise))


def test_every_step_has_noise_of_its_own() -> None:
    """Two steps on no gradient at all: their noise adds up to variance 2."""
    sector, rows, params = case("banks")
    rows = {**rows, "x": np.full_like(rows["x"], np.nan)}
    config = TrainingConfig(batch_size=6, epochs=2, lr=1.0)
    trained = train(sector, config, params, rows, PrivateSettings(1.0, 1.0, insecure_seed=4))
    noise = (flat(params) - flat(trained.arrays)) * 6
    spread = stats.chi2(len(noise))
    assert spread.ppf(ERROR_RATE / 2) < np.square(noise).sum() / 2 < spread.ppf(1 - ERROR_RATE / 2)


def test_torchs_own_generators_have_only_32_bits_of_a_seed() -> None:
    """Why noise is not seeded: 2^32 tries give it away."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + (1 << 40)))
    assert torch.equal(torch.randn(100, generator=one), torch.randn(100, generator=other))


def test_the_noise_generators_whole_state_comes_from_the_os() -> None:
    generator = private._secret(torch.Generator())
    words = generator.get_state().numpy().view(np.uint64)[3:627].astype(np.uint32)
    assert len(set(words.tolist())) > 600
    other = private._secret(torch.Generator()).get_state().numpy().view(np.uint64)[3:627]
    assert (words != other).mean() > 0.99
    # the words are the state: numpy's twister goes on from them as torch's does
    twister: Any = np.random.MT19937()
    state = twister.state
    state["state"] = {"key": words, "pos": 624}
    twister.state = state
    expected = twister.random_raw(1000) % 1_000_003
    assert torch.empty(1000, dtype=torch.int64).random_(0, 1_000_003, generator=generator).tolist() == expected.tolist()


def test_a_generator_of_another_layout_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(private, "_WORDS", slice(4, 628))
    with pytest.raises(RuntimeError, match="keeps its generator's state elsewhere"):
        private._secret(torch.Generator())


def test_seeds_that_others_know_make_neither_noise_nor_draws_predictable() -> None:
    sector, rows, params = tabular(50)
    config = TrainingConfig(batch_size=8, epochs=3, lr=0.1)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        found.append(train(sector, config, params, rows, PrivateSettings(1.0, 1.0)))
    assert found[0].log["drawn"] != found[1].log["drawn"]
    empty = take(rows, np.arange(1))
    one, other = (train(sector, TrainingConfig(), params, empty, PrivateSettings(1.0, 1e-3)) for _ in range(2))
    difference = (flat(one.arrays) - flat(other.arrays)) / (math.sqrt(2) * 0.05 * 1e-3)
    assert stats.kstest(difference, "norm").pvalue > ERROR_RATE, "independent noise"


def test_training_leaves_the_global_generators_and_threads_alone() -> None:
    sector, rows, params = tabular(20)
    before = torch.get_rng_state(), np.random.get_state()[1], torch.get_num_threads()  # noqa: NPY002
    train(sector, TrainingConfig(batch_size=4), params, rows, PrivateSettings(1.0, 1.0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.get_num_threads() == before[2]


@pytest.mark.parametrize("mode", MODES)
def test_an_insecure_seed_makes_it_reproducible_to_the_bit(mode: str) -> None:
    sector, rows, params = tabular(30)
    config = TrainingConfig(batch_size=5, epochs=2, lr=0.1)
    found = []
    for seed, known, threads in ((7, 0, 1), (7, 1, 2), (8, 0, 1)):
        torch.manual_seed(known)
        torch.set_num_threads(threads)
        found.append(train(sector, config, params, rows, PrivateSettings(1.0, 1.0, mode=mode, insecure_seed=seed)))
    torch.set_num_threads(1)
    assert found[0].log == found[1].log
    assert np.array_equal(flat(found[0].arrays), flat(found[1].arrays))
    assert found[0].log["drawn"] != found[2].log["drawn"]
    assert not np.array_equal(flat(found[0].arrays), flat(found[2].arrays))


def test_the_params_given_are_not_changed_and_names_are_theirs() -> None:
    sector, rows, params = tabular(20)
    before = {k: a.copy() for k, a in params.items()}
    for mode in MODES:
        trained = train(sector, TrainingConfig(), params, rows, PrivateSettings(1.0, 1.0, mode=mode))  # type: ignore[arg-type]
        assert list(trained.arrays) == list(params), "no _module. before them"
    assert all(np.array_equal(params[k], before[k]) for k in params)


@pytest.mark.parametrize("mode", MODES)
def test_torchs_warnings_of_opacus_hooks_are_not_passed_on(mode: str) -> None:
    sector, rows, params = tabular(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(sector, TrainingConfig(batch_size=4), params, rows, PrivateSettings(1.0, 1.0, mode=mode))


# ---------------------------------------------------------------- draws


NUM_DRAWS = 20_000


@pytest.mark.parametrize(("n", "q"), [(40, 0.3), (200, 0.02), (3, 0.5), (30, 0.97)])
def test_batches_are_binomial(n: int, q: float) -> None:
    rng = np.random.default_rng(0)
    sizes = np.bincount([len(drawn(rng, n, q)) for _ in range(NUM_DRAWS)], minlength=n + 1)
    expected = stats.binom(n, q).pmf(np.arange(n + 1)) * NUM_DRAWS
    usual = expected >= 5
    observed = np.append(sizes[usual], sizes[~usual].sum())
    likely = np.append(expected[usual], expected[~usual].sum())
    observed, likely = (a if likely[-1] >= 5 else np.append(a[:-2], a[-2:].sum()) for a in (observed, likely))
    assert stats.chisquare(observed, likely).pvalue > ERROR_RATE


def test_rows_enter_independently_of_one_another_and_of_the_step_before() -> None:
    rng = np.random.default_rng(1)
    n, q = 30, 0.2
    entered = np.zeros((NUM_DRAWS, n))
    for step in range(NUM_DRAWS):
        entered[step, drawn(rng, n, q)] = 1
    counts = entered.sum(0)
    bound = stats.norm.ppf(1 - ERROR_RATE / (2 * n * n))  # of all pairs together
    assert np.abs((counts - NUM_DRAWS * q) / math.sqrt(NUM_DRAWS * q * (1 - q))).max() < bound
    pairs = np.corrcoef(entered.T)[np.triu_indices(n, 1)]
    assert np.abs(pairs).max() * math.sqrt(NUM_DRAWS) < bound
    later = np.corrcoef(entered[:-1].T, entered[1:].T)[:n, n:]
    assert np.abs(later).max() * math.sqrt(NUM_DRAWS) < bound


def test_all_sets_of_three_rows_are_as_likely_as_coins_make_them() -> None:
    rng = np.random.default_rng(2)
    found = np.zeros(8)
    for _ in range(NUM_DRAWS):
        found[sum(1 << int(i) for i in drawn(rng, 3, 0.4))] += 1
    sets = itertools.product((0, 1), repeat=3)
    expected = {sum(b << i for i, b in enumerate(bits)): 0.4 ** sum(bits) * 0.6 ** (3 - sum(bits)) for bits in sets}
    assert stats.chisquare(found, [expected[i] * NUM_DRAWS for i in range(8)]).pvalue > ERROR_RATE


@pytest.mark.parametrize(("n", "q"), [(1, 1.0), (5, 1.0), (1, 1e-9), (100_000, 1e-6), (7, 0.999)])
def test_draws_at_the_edges(n: int, q: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        index = drawn(rng, n, q)
        assert len(set(index.tolist())) == len(index)
        assert not len(index) or (index.min() >= 0 and index.max() < n)
        assert (np.diff(index) > 0).all()
        assert q < 1 or len(index) == n


def test_draws_go_on_until_the_last_row_however_small_the_gaps() -> None:
    class Ones:
        """Gaps that the first batch of them does not bring to the end."""

        def geometric(self, q: float, size: int) -> Any:
            return np.ones(min(size, 100), np.int64)

    assert drawn(Ones(), 250, 0.01).tolist() == list(range(250))  # type: ignore[arg-type]
