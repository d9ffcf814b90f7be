"""The harness of the studies: partitions, training, attackers, and a few steps of each on few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from experiments.studies import byzfl_heatmap, label_flip, min_max_100, mnist, no_attack
from experiments.studies.mnist import Digits, Training, Vector
from trellis.errors import MissingData

LABELS = np.random.default_rng(0).integers(0, 10, 2000)

Partition = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
PARTITIONS: dict[str, Partition] = {
    "similarity 0": lambda labels, n, rng: mnist.by_similarity(labels, n, 0.0, rng),
    "similarity 0.33": lambda labels, n, rng: mnist.by_similarity(labels, n, 0.33, rng),
    "similarity 1": lambda labels, n, rng: mnist.by_similarity(labels, n, 1.0, rng),
    "balanced dirichlet": lambda labels, n, rng: mnist.by_balanced_dirichlet(labels, n, 0.1, rng),
    "mixture": lambda labels, n, rng: mnist.by_mixture(labels, n, 0.5, rng),
}


@pytest.fixture(scope="module")
def data() -> tuple[Digits, Digits]:
    mnist.single_thread()
    try:
        return mnist.load(1200, 200)
    except MissingData as error:
        pytest.skip(str(error))


# ---------------------------------------------------------------- partitions


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_gives_every_row_to_one_of_its_parts(name: str) -> None:
    owners = PARTITIONS[name](LABELS, 10, np.random.default_rng(1))
    assert owners.shape == LABELS.shape
    assert set(owners) == set(range(10))


@pytest.mark.parametrize("name", PARTITIONS)
def test_equal_generators_give_equal_partitions(name: str) -> None:
    first, second = (PARTITIONS[name](LABELS, 10, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (PARTITIONS[name](LABELS, 10, np.random.default_rng(2)) != first).any()


def test_similarity_is_the_share_of_rows_dealt_without_looking_at_labels() -> None:
    def most_common(gamma: float) -> float:
        owners = mnist.by_similarity(LABELS, 10, gamma, np.random.default_rng(1))
        return float(np.mean([np.bincount(LABELS[owners == k]).max() / (owners == k).sum() for k in range(10)]))

    assert most_common(0.0) > 0.85 > most_common(0.33) > 0.5 > 0.2 > most_common(1.0)


def test_parts_of_similarity_and_mixture_are_equal() -> None:
    for name in ("similarity 0.33", "mixture"):
        sizes = np.bincount(PARTITIONS[name](LABELS, 10, np.random.default_rng(1)))
        assert sizes.max() - sizes.min() <= 2


def test_the_long_tail_halves_every_class() -> None:
    kept = np.bincount(LABELS[mnist.long_tail(LABELS)], minlength=10)
    np.testing.assert_array_equal(kept, [int(count * 0.5**i) for i, count in enumerate(np.bincount(LABELS))])


# ---------------------------------------------------------------- models and training


def _noise_digits(n: int) -> Digits:
    import torch

    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, 1, 28, 28)).astype(np.float32)
    return Digits(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 10, n)))


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    import torch

    model, batch = mnist.cnn(0, (2, 3), 8), _noise_digits(6)
    params_d = model.initial()
    gradient_d = model.gradient(params_d, batch)
    direction_d = gradient_d / np.linalg.norm(gradient_d)

    def loss(at_d: Vector) -> float:
        model.gradient(at_d.astype(np.float32), batch)  # leaves the params in the network
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model._network(batch.x), batch.y))

    step = np.float32(1e-2)
    slope = (loss(params_d + step * direction_d) - loss(params_d - step * direction_d)) / (2 * float(step))
    assert slope == pytest.approx(float(np.linalg.norm(gradient_d)), rel=0.02)


def test_one_step_of_sgd_is_the_gradient_times_the_rate() -> None:
    model, data = mnist.mlp(0, hidden=8), _noise_digits(16)
    params_d = model.initial()
    update_d = model.update(params_d, data, Training(lr=0.1, batch_size=16), np.random.default_rng(0))
    np.testing.assert_allclose(update_d, -0.1 * model.gradient(params_d, data), atol=1e-6)


def test_momentum_adds_up_gradients_and_adam_steps_by_their_sign() -> None:
    import torch

    gradients = torch.tensor([[1.0, -2.0], [0.5, -2.0]])
    sgd, adam = torch.zeros(2), torch.zeros(2)
    step, step_adam = Training(lr=0.1, momentum=0.9).stepper(), Training(lr=0.1, adam=True).stepper()
    for gradient in gradients:
        step(sgd, gradient)
        step_adam(adam, gradient)
    np.testing.assert_allclose(sgd, [-0.1 * (1 + 1.4), 0.1 * (2 + 3.8)], rtol=1e-6)
    second = (0.09 * 1 + 0.1 * 0.5) / 0.19 / np.sqrt((0.000999 * 1 + 0.001 * 0.25) / 0.001999)
    np.testing.assert_allclose(adam, [-0.1 * (1 + second), 0.2], rtol=1e-5)


# ---------------------------------------------------------------- attackers


def test_a_search_on_some_coordinates_sends_all_of_them() -> None:
    rng = np.random.default_rng(0)
    honest_hd = rng.standard_normal((8, 500)).astype(np.float32)
    aggregator = mnist.Aggregator(byzfl_heatmap.RECIPE, 2)
    columns = np.arange(0, 500, 5)
    for attack in byzfl_heatmap.ATTACKS.values():
        rows_nd = byzfl_heatmap.Attackers(attack, byzfl_heatmap.published, 2, aggregator, columns)(honest_hd, 1)
        assert rows_nd.shape == (10, 500)
        np.testing.assert_array_equal(rows_nd[:8], honest_hd)
        np.testing.assert_array_equal(rows_nd[8], rows_nd[9])


def test_the_published_search_never_steps_back_and_the_thorough_one_does() -> None:
    def hill(at: float) -> float:
        return -((at - 23.0) ** 2)

    assert byzfl_heatmap.published(hill) == 30.0  # 0, 10, 30; 70 is worse, and so is every place beyond 30
    assert byzfl_heatmap.thorough(hill) == pytest.approx(23.0, abs=0.5)


def test_liars_of_min_max_hide_among_the_honest() -> None:
    honest_hd = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    rows_nd = min_max_100.lied("min_max", honest_hd, 1)
    assert len(rows_nd) == 10
    apart = np.linalg.norm(honest_hd[:, None] - honest_hd[None], axis=2).max()
    assert np.linalg.norm(honest_hd - rows_nd[-1], axis=1).max() == pytest.approx(apart, rel=1e-4)


def test_flippers_call_eight_classes_two_and_leave_two_and_nine(data: tuple[Digits, Digits]) -> None:
    honest, flipped = data[0].labels, data[0].relabelled(label_flip.FLIPPED).labels
    assert set(flipped) == {2, 9}
    np.testing.assert_array_equal(flipped == 9, honest == 9)


# ---------------------------------------------------------------- three steps of every study

Study = Callable[[Digits], Iterator[Vector]]


def _heatmap(attack: str, train: Digits) -> Iterator[Vector]:
    owners = mnist.by_similarity(train.labels, 10, 0.33, np.random.default_rng(0))
    parts = [train.taken(np.flatnonzero(owners == k)) for k in range(10)]
    model = mnist.cnn(0, (2, 3), 8)
    return byzfl_heatmap.trained(model, parts, byzfl_heatmap.RECIPE, 2, attack, "thorough", num_steps=3, seed=0)


STUDIES: dict[str, Study] = {
    **{f"heatmap {attack}": partial(_heatmap, attack) for attack in byzfl_heatmap.ATTACKS},
    "min_max": lambda train: min_max_100.trained(train, "robust", "min_max", num_rounds=3, seed=0, num_nodes=10),
    "no_attack": lambda train: no_attack.trained(train, no_attack.Choice("robust", 5), num_steps=3, seed=0),
    "label_flip": lambda train: label_flip.trained(mnist.cnn(0, (2, 3), 8), train, "robust", num_rounds=3, seed=0),
}


@pytest.mark.parametrize("name", STUDIES)
def test_three_steps_of_a_study_are_finite_and_the_same_again(name: str, data: tuple[Digits, Digits]) -> None:
    first, second = (list(STUDIES[name](data[0])) for _ in range(2))
    assert len(first) == 3
    assert np.isfinite(first[-1]).all()
    assert not np.array_equal(first[0], first[-1])
    np.testing.assert_array_equal(first[-1], second[-1])
