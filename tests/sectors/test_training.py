"""Training at a node is a function of (params, data, config, seed), and leaves the caller's process as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sectors
from conf.schema import OptimizerName, TrainingConfig
from sectors import training
from sectors.base import Place, Rows, num_rows, take
from sectors.params import initial_arrays
from trellis.vectors import Layout, digest

SECTOR = sectors.get("healthcare_wisconsin", {"hidden": [4]})
DATA = SECTOR.load(Place(0, 3, synthetic=True))
PARAMS = initial_arrays(SECTOR, 0)
ONCE = TrainingConfig(batch_size=16, epochs=1, lr=0.1)


def trained(config: TrainingConfig = ONCE, rows: Rows = DATA.train, seed: int = 1) -> training.Trained:
    return training.train(SECTOR, config, PARAMS, rows, seed=seed)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    assert digest(trained(seed=1).arrays) == digest(trained(seed=1).arrays)
    assert digest(trained(seed=1).arrays) != digest(trained(seed=2).arrays)


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_training_lowers_the_loss(optimizer: OptimizerName) -> None:
    config = replace(ONCE, epochs=5, optimizer=optimizer, lr=0.1 if optimizer is OptimizerName.sgd else 0.01)
    before, after = (
        float(training.evaluate(SECTOR, params, DATA.train)["loss_sum"]) for params in (PARAMS, trained(config).arrays)
    )
    assert after < 0.8 * before


def test_one_full_batch_step_is_gradient_descent_by_hand() -> None:
    config = TrainingConfig(batch_size=10_000, epochs=1, lr=0.5)
    result = trained(config)
    model = SECTOR.build_model()
    model.load_state_dict({k: torch.tensor(v) for k, v in PARAMS.items()})
    batch = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in DATA.train.items()}
    loss = SECTOR.losses(SECTOR.forward(model, batch), batch).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = PARAMS[name] - 0.5 * parameter.grad.numpy()
        assert np.allclose(result.arrays[name], expected, atol=1e-6)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_params_given_are_not_changed() -> None:
    before = digest(PARAMS)
    trained()
    assert digest(PARAMS) == before


def test_an_epoch_is_a_pass_over_all_rows() -> None:
    assert trained().num_examples == num_rows(DATA.train)
    assert digest(trained(replace(ONCE, epochs=2)).arrays) != digest(trained().arrays)


@pytest.mark.parametrize(("most", "used"), [(1, 1), (17, 17), (10_000, num_rows(DATA.train)), (None, None)])
def test_at_most_max_examples_rows_are_used(most: int | None, used: int | None) -> None:
    seen: list[float] = []

    class Watched(type(SECTOR)):  # type: ignore[misc]
        def losses(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            seen.extend(batch["x"][:, 0].tolist())
            return super().losses(outputs, batch)

    sector = Watched(hidden=(4,))
    result = training.train(sector, replace(ONCE, epochs=3, max_examples=most), PARAMS, DATA.train, seed=1)
    expected = num_rows(DATA.train) if used is None else used
    assert result.num_examples == expected
    assert len(seen) == 3 * expected
    assert len(set(seen)) <= expected
    if most == 17:
        assert len(set(seen)) > 1, "the same 17 rows in every epoch, not one row 17 times"
        assert sorted(seen[:17]) == sorted(seen[17:34]) == sorted(seen[34:])


def test_max_examples_draws_other_rows_in_another_round() -> None:
    few = replace(ONCE, max_examples=5)
    assert digest(trained(few, seed=1).arrays) != digest(trained(few, seed=2).arrays)


def test_no_rows_train_nothing_and_score_zero() -> None:
    none = take(DATA.train, np.arange(0))
    result = trained(rows=none)
    assert digest(result.arrays) == digest(PARAMS)
    assert result.num_examples == 0
    counts = training.evaluate(SECTOR, PARAMS, none)
    assert set(counts) == set(SECTOR.all_counts())
    for name, spec in SECTOR.all_counts().items():
        assert (counts[name].shape, counts[name].dtype.name) == (spec.shape, spec.dtype)
        assert not counts[name].any()


def test_counts_add_up_over_rows_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = training.evaluate(SECTOR, PARAMS, DATA.train)
    assert whole["rows"] == num_rows(DATA.train)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 7)
    half = num_rows(DATA.train) // 2
    first, second = take(DATA.train, np.arange(half)), take(DATA.train, np.arange(half, num_rows(DATA.train)))
    halves = [training.evaluate(SECTOR, PARAMS, rows) for rows in (first, second)]
    parts = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    for name, spec in SECTOR.all_counts().items():
        assert np.allclose(whole[name], parts[name], rtol=1e-6)
        assert (whole[name].shape, whole[name].dtype.name) == (spec.shape, spec.dtype)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_torch_is_left_as_it_was(deterministic: bool, threads: int) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.manual_seed(3)
        expected = torch.rand(3).tolist()
        torch.manual_seed(3)
        trained()
        training.evaluate(SECTOR, PARAMS, DATA.validation)
        assert torch.rand(3).tolist() == expected
        assert torch.get_num_threads() == threads
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def test_the_callers_torch_does_not_change_the_result() -> None:
    alone = digest(trained().arrays)
    threads = torch.get_num_threads()
    try:
        torch.manual_seed(99)
        torch.set_num_threads(2)
        assert digest(trained().arrays) == alone
    finally:
        torch.set_num_threads(threads)


def test_the_trained_tensors_are_the_models_in_its_order() -> None:
    assert Layout.of(trained().arrays) == Layout.of(PARAMS)
