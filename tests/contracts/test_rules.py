"""The exam of a rule.  One row a rule; every law is asked of every row.

What a rule promises against liars is the robustness inequality where its constant is known, else a property of its own
and an input that breaks it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize

from conf.load import choices, load
from experiments.benchmarks import peers
from server import build
from strategies import preaggregators, rules
from strategies.aggregation import Pipeline
from strategies.preaggregators import PREAGGREGATORS, arc, bucketing, clip, nnm
from strategies.rows import Rows
from trellis.errors import CohortTooSmall, ConfigError
from trellis.types import Aggregated

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A rule and what holds of it: aggregates move with their rows (translation), grow with them (scale)."""

    name: str
    translates: bool = True
    scales: bool = True


CASES = [
    Case("mean"),
    Case("median"),
    Case("trimmed_mean"),
    Case("meamed"),
    Case("krum"),
    Case("multi_krum"),
    Case("bulyan"),
    Case("geometric_median"),
    Case("centered_clipping", translates=False),  # it starts from the last aggregate
    Case("fltrust", translates=False, scales=False),  # directions about 0; the length is the server's
    Case("foolsgold", translates=False),  # directions about 0
    Case("cge", translates=False),  # lengths
    Case("flame", translates=False),  # directions and lengths
    Case("dnc"),
    Case("robust", translates=False),  # arc looks at lengths
]
NAMES = [case.name for case in CASES]
WITH_KAPPA = [name for name in NAMES if rules.get(name).kappa is not None]


def call(name: str, updates: Any, f: int = 0, **options: Any) -> Array:
    return full(name, updates, f, **options).update_d


def full(name: str, updates: Any, f: int = 0, **options: Any) -> Aggregated:
    """The rule on the rows, with everything it may need."""
    spec = rules.get(name)
    n, d = updates.shape
    offers = {
        "rng": np.random.default_rng(3),
        "names": [(f"node-{i:03d}",) for i in range(n)],
        "weights": None,
        "state": {},
        "reference_d": np.linspace(-1, 1, d).astype(np.float32),
    }
    given = {need: offers[need] for need in spec.needs if need not in options}
    result = spec.fn(updates, num_byzantine=f, **given, **options)
    return result if isinstance(result, Aggregated) else Aggregated(result)


def rows(n: int = 11, d: int = 40, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0.3, 1, (n, d)).astype(np.float32)


def f_of(name: str, n: int) -> int:
    """The most liars that the rule survives among n rows, 3 at most."""
    spec = rules.get(name)
    return max((f for f in range(4) if spec.min_rows(f) <= n), default=0) if spec.tolerates else 0


def test_the_catalogue_the_exam_and_the_yamls_list_the_same_rules() -> None:
    assert sorted(NAMES) == sorted(rules.RULES) == choices("rule")
    assert sorted(PREAGGREGATORS) == [name for name in choices("preaggregator") if name != "none"]


# ---------------------------------------------------------------- by hand

COLUMN = np.array([[1.0], [2.0], [3.0], [4.0], [100.0]], np.float32)
PLANE = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [9, 9], [1, 2], [2, 1]], np.float32)


@pytest.mark.parametrize(
    ("name", "f", "expected"),
    [
        ("mean", 0, 22.0),
        ("median", 1, 3.0),
        ("trimmed_mean", 0, 22.0),
        ("trimmed_mean", 1, 3.0),
        ("trimmed_mean", 2, 3.0),
        ("meamed", 1, 2.5),  # 1 2 3 4
        ("meamed", 2, 3.0),  # 2 3 4
        ("krum", 1, 2.0),  # 2 neighbours: scores 1+4, 1+1, 1+1, 1+4, ...; the earlier of the two
        ("multi_krum", 1, 2.5),  # 1 2 3 4
        ("cge", 1, 2.5),
    ],
)
def test_small_cases_by_hand(name: str, f: int, expected: float) -> None:
    assert call(name, COLUMN, f).tolist() == pytest.approx([expected])


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle() -> None:
    assert call("median", COLUMN[1:], 1).tolist() == [3.5]


def test_krum_by_hand_in_the_plane() -> None:
    # n = 7, f = 1: 4 neighbours.  Squared distances of (1,1): 1 1 1 1; of (1,0) and (0,1): 1 1 2 2; of (0,0): 1 1 2 5
    assert call("krum", PLANE, 1).tolist() == [1, 1]
    assert full("krum", PLANE, 1).weights_n.tolist() == [0, 0, 0, 1, 0, 0, 0]  # type: ignore[union-attr]
    chosen = full("multi_krum", PLANE, 1).weights_n
    assert chosen is not None
    assert np.flatnonzero(chosen == 0).tolist() == [4]


def test_bulyan_by_hand() -> None:
    # f = 1, n = 7: five rows are chosen by Krum, one after another, then the mean of the 3 values around their median
    column = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [1000.0]], np.float32)
    # 1: scores with 4 neighbours 30 15 10 10 15 30: row 2.  2: of 0 1 3 4 5 1000, 3 neighbours: 26 14 9 11 21: row 3.
    # 3: of 0 1 4 5 1000, 2: 17 10 10 17: row 1.  4: of 0 4 5 1000, 1: 16 1 1: row 4.  5: of 0 5 1000, 1: 25 25: row 0.
    result = full("bulyan", column, 1)
    assert result.weights_n is not None
    assert np.flatnonzero(result.weights_n).tolist() == [0, 1, 2, 3, 4]
    assert result.update_d.tolist() == [2.0]


def test_bulyan_needs_four_f_plus_three_rows() -> None:
    with pytest.raises(CohortTooSmall, match="needs at least 7 rows"):
        call("bulyan", rows(6), 1)


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    # equilateral: the centre; and with an angle above 120 degrees the corner itself
    equal = np.array([[0, 0], [2, 0], [1, 3**0.5]], np.float32)
    assert call("geometric_median", equal, 1).tolist() == pytest.approx([1, 3**-0.5], abs=1e-6)
    flat = np.array([[-10, 0], [10, 0], [0, 1]], np.float32)
    assert call("geometric_median", flat, 1).tolist() == pytest.approx([0, 1], abs=1e-4)


def test_the_geometric_median_stands_where_most_rows_are() -> None:
    many = np.array([[5, 5], [5, 5], [5, 5], [0, 1e3], [-1e3, 0]], np.float32)
    assert call("geometric_median", many, 2).tolist() == pytest.approx([5, 5], abs=1e-3)  # of distances of 1e3


def test_centered_clipping_by_hand_and_its_memory() -> None:
    column = np.array([[1.0], [2.0], [30.0]], np.float32)
    first = full("centered_clipping", column, 1, radius=2.0, iterations=1)
    assert first.update_d.tolist() == pytest.approx([5 / 3])  # (1 + 2 + 2) / 3 from 0
    second = full("centered_clipping", column, 1, radius=2.0, iterations=1, state=first.state)
    assert second.update_d.tolist() == pytest.approx([5 / 3 + (-2 / 3 + 1 / 3 + 2) / 3])
    twice = full("centered_clipping", column, 1, radius=2.0, iterations=2)
    assert twice.update_d.tolist() == pytest.approx(second.update_d.tolist())


def test_fltrust_by_hand() -> None:
    reference = np.array([2.0, 0.0], np.float32)
    updates = np.array([[4, 0], [0, 5], [-1, 0], [1, 1]], np.float32)
    # trust 1, 0, 0, 1/sqrt 2; rows cut to length 2
    result = full("fltrust", updates, 1, reference_d=reference)
    trust = np.array([1, 0, 0, 0.5**0.5])
    expected = (trust[0] * np.array([2, 0]) + trust[3] * np.array([2**0.5, 2**0.5])) / trust.sum()
    assert result.update_d.tolist() == pytest.approx(expected.tolist())
    assert result.weights_n is not None
    assert result.weights_n.tolist() == pytest.approx((trust / trust.sum()).tolist())
    against = full("fltrust", -np.abs(updates), 1, reference_d=reference)
    assert against.update_d.tolist() == [0, 0], "nobody is trusted: the model stays"


def test_foolsgold_by_hand_sybils_lose_their_weight_and_others_keep_it() -> None:
    honest = np.eye(4, 6, dtype=np.float32)
    sybils = np.tile(np.array([0, 0, 0, 0, 3, 4], np.float32), (3, 1))
    result = full("foolsgold", np.concatenate([honest, sybils]), 3)
    assert result.weights_n is not None
    assert result.weights_n.tolist() == pytest.approx([0.25] * 4 + [0] * 3)


def test_foolsgold_remembers_nodes_by_name_not_by_row() -> None:
    names = [("a",), ("b",), ("c",)]
    first = full("foolsgold", np.eye(3, dtype=np.float32), names=names)
    assert first.state is not None
    second = full("foolsgold", np.eye(3, dtype=np.float32)[:2], names=[("c",), ("a",)], state=first.state)
    assert second.state is not None
    histories = {k: v.tolist() for k, v in second.state.items() if k.startswith("history/")}
    assert histories == {"history/a": [1, 1, 0], "history/b": [0, 1, 0], "history/c": [1, 0, 1]}


def test_foolsgold_forgets_a_node_that_never_comes_back() -> None:
    state = full("foolsgold", np.eye(3, dtype=np.float32), names=[("a",), ("b",), ("c",)]).state
    for round_ in range(101):
        assert state is not None
        assert ("history/c" in state) == (round_ <= 100)
        state = full("foolsgold", np.eye(3, dtype=np.float32)[:2], names=[("a",), ("b",)], state=state).state
    assert state is not None
    assert not [key for key in state if key.endswith("/c")]


def test_long_histories_are_kept_short() -> None:
    from strategies.rules.trust import MAX_HISTORY

    wide = rows(3, MAX_HISTORY + 5)
    state = full("foolsgold", wide).state
    assert state is not None
    assert {v.shape for k, v in state.items() if k.startswith("history/")} == {(MAX_HISTORY,)}
    assert state["seed"] == full("foolsgold", wide, state=state).state["seed"], "one sketch for all rounds"  # type: ignore[index]


def test_dnc_drops_the_rows_along_the_first_singular_direction() -> None:
    honest = rows(8, 30) * 0.1
    liars = np.full((2, 30), 3.0, np.float32)
    result = full("dnc", np.concatenate([honest, liars]), 2)
    assert result.weights_n is not None
    assert (result.weights_n[8:] == 0).all()
    assert result.update_d.tolist() == pytest.approx(
        np.concatenate([honest, liars])[result.weights_n > 0].mean(0).tolist(), rel=1e-5, abs=1e-6
    )


def test_flame_keeps_the_group_of_one_direction_cut_to_the_median_length() -> None:
    direction = np.ones(20, np.float32)
    near = rows(7, 20) * 0.05
    honest = direction + near
    honest[0] *= 10
    liars = -5 * direction + rows(3, 20, seed=1) * 0.05
    result = full("flame", np.concatenate([honest, liars]), 3)
    assert result.weights_n is not None
    kept = result.weights_n > 0
    assert not kept[7:].any()
    assert kept.sum() >= 6  # of more than half; HDBSCAN may leave the outermost out
    both = np.concatenate([honest, liars])
    norms = np.linalg.norm(both, axis=1)
    cut = np.minimum(1, np.median(norms) / norms)
    assert result.update_d.tolist() == pytest.approx((both * cut[:, None])[kept].mean(0).tolist(), rel=1e-4)
    noisy = full("flame", both, 3, noise_factor=0.1).update_d - result.update_d
    assert 0.05 < noisy.std() / np.median(norms) < 0.2


def test_nnm_by_hand() -> None:
    mixed = nnm(COLUMN, num_byzantine=1)
    assert mixed.tolist() == [[2.5]] * 4 + [[27.25]]


def test_arc_by_hand() -> None:
    # n = 5, f = 1: k = floor(2 * 1 * 4 / 5) = 1 row is cut, to the length of the next
    assert arc(COLUMN, num_byzantine=1).tolist() == [[1], [2], [3], [4], [4]]
    assert arc(COLUMN, num_byzantine=0).tolist() == COLUMN.tolist()


def test_clip_by_hand() -> None:
    assert clip(np.array([[3, 4], [0.3, 0.4]], np.float32), num_byzantine=0, max_norm=1.0).tolist() == [
        pytest.approx([0.6, 0.8]),
        pytest.approx([0.3, 0.4]),
    ]


def test_buckets_are_means_of_disjoint_rows_and_cover_them() -> None:
    mixed = bucketing(np.eye(5, dtype=np.float32), num_byzantine=1, size=2, rng=np.random.default_rng(0))
    assert mixed.shape == (3, 5)
    assert sorted((mixed > 0).sum(1).tolist()) == [1, 2, 2]
    assert (mixed > 0).sum(0).tolist() == [1] * 5
    assert mixed.sum(1).tolist() == pytest.approx([1] * 3)


# ---------------------------------------------------------------- laws of every rule


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.mark.parametrize("n", [3, 11, 30])
@pytest.mark.parametrize("d", [1, 7, 3000])
def test_the_aggregate_is_float32_finite_and_of_the_rows_length(case: Case, n: int, d: int) -> None:
    found = call(case.name, rows(n, d), f_of(case.name, n))
    assert (found.shape, found.dtype) == ((d,), np.float32)
    assert np.isfinite(found).all()


def test_inputs_are_left_as_they_were_and_equal_inputs_give_equal_bits(case: Case) -> None:
    updates = rows()
    before = updates.tobytes()
    first, second = (call(case.name, updates, f_of(case.name, 11)) for _ in range(2))
    assert updates.tobytes() == before
    assert first.tobytes() == second.tobytes()


def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    # 15 rows: with fewer, Bulyan's last choice has one neighbour to look at, and the two nearest always tie
    updates, f = rows(15), f_of(case.name, 15)
    order = np.random.default_rng(1).permutation(15)
    names = [(f"node-{i:03d}",) for i in range(15)]
    mine = {"names": [names[i] for i in order]} if "names" in rules.get(case.name).needs else {}
    assert call(case.name, updates[order], f, **mine) == pytest.approx(call(case.name, updates, f), rel=1e-5, abs=1e-6)


def test_it_moves_with_its_rows(case: Case) -> None:
    if not case.translates:
        pytest.skip("its formula looks at 0, a reference or a past")
    updates, f = rows(), f_of(case.name, 11)
    shift = np.linspace(-2, 2, 40).astype(np.float32)
    assert call(case.name, updates + shift, f) == pytest.approx(call(case.name, updates, f) + shift, abs=1e-5)


@pytest.mark.parametrize("factor", [-1.0, 1e-6, 1e4])
def test_it_grows_with_its_rows(case: Case, factor: float) -> None:
    if not case.scales:
        pytest.skip("its length is the server's")
    updates, f = rows(), f_of(case.name, 11)
    expected = factor * call(case.name, updates, f)
    assert call(case.name, np.float32(factor) * updates, f) == pytest.approx(expected, rel=1e-4, abs=1e-5 * abs(factor))


def test_too_few_rows_are_refused_with_the_numbers(case: Case) -> None:
    spec = rules.get(case.name)
    for f in range(4) if spec.tolerates else [0]:
        least = spec.min_rows(f)
        with pytest.raises(CohortTooSmall, match=str(least)):
            call(case.name, rows(least - 1), f)
        assert np.isfinite(call(case.name, rows(least), f)).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_numbers_at_the_ends_of_float32_are_survived(case: Case, size: float) -> None:
    updates, f = rows(), f_of(case.name, 11)
    everyone = np.float32(size) * updates
    assert np.isfinite(call(case.name, everyone, f)).all()
    if f:
        updates[-f:] *= np.float32(size)
        assert np.isfinite(call(case.name, updates, f)).all()


def test_rows_that_are_mixed_are_never_written_out_and_give_the_same(case: Case) -> None:
    updates, f = rows(), f_of(case.name, 11)
    coefficients = np.random.default_rng(2).dirichlet(np.ones(11), 11)
    lazy = Rows(updates).combined(coefficients)
    assert call(case.name, lazy, f) == pytest.approx(call(case.name, lazy.materialised(), f), rel=1e-4, abs=1e-6)


def test_torch_computes_the_same(case: Case) -> None:
    updates, f = rows(25, 3000), f_of(case.name, 25)
    plain = call(case.name, updates, f)
    for given in (torch.from_numpy(updates), Rows(updates, device="cpu")):
        assert call(case.name, given, f) == pytest.approx(plain, rel=1e-4, abs=1e-5)
    lazy = Rows(updates, device="cpu").combined(np.eye(25)[::-1] * 0.5).taken(np.arange(20))
    assert call(case.name, lazy, 1 if f else 0) == pytest.approx(
        call(case.name, lazy.materialised(), 1 if f else 0), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("bad", [np.zeros((3, 2)), np.zeros(3, np.float32), np.zeros((3, 2), np.int32)])
def test_what_is_no_matrix_of_float32_is_refused(case: Case, bad: Any) -> None:
    spec = rules.get(case.name)
    given: dict[str, Any] = dict.fromkeys(spec.needs)
    with pytest.raises(ValueError, match=r"\(n, d\) float32"):
        spec.fn(bad, num_byzantine=0, **given)


def test_weights_are_those_of_the_rows_and_add_up_to_one(case: Case) -> None:
    weights_n = full(case.name, rows(), f_of(case.name, 11)).weights_n
    if weights_n is None or case.name == "centered_clipping":  # its shares of a step do not
        return
    assert weights_n.shape == (11,)
    assert weights_n.sum() == pytest.approx(1)
    assert (weights_n >= 0).all()


def test_f_liars_far_away_cannot_drag_the_aggregate(case: Case) -> None:
    spec = rules.get(case.name)
    if not spec.tolerates or case.name == "foolsgold":
        pytest.skip("tolerates sybils only" if spec.tolerates else "tolerates no liar")
    honest, f = rows(15, 200), 2
    for size in (10.0, 1e3, 1e6):
        for sign in (1, -1):
            liars = sign * np.float32(size) * np.ones((f, 200), np.float32)
            for place in ("first", "last"):
                both = [liars, honest] if place == "first" else [honest, liars]
                found = call(case.name, np.concatenate(both), f)
                longest = np.linalg.norm(honest, axis=1).max()
                assert np.linalg.norm(found) <= 1.5 * longest


# ---------------------------------------------------------------- the robustness inequality


def adversarial(rng: np.random.Generator, n: int, f: int, d: int) -> Array:
    """Honest rows of random spread, and f rows of a random malice, anywhere among them."""
    spread = rng.choice([0.01, 1.0, 10.0])
    honest = rng.normal(0, spread, (n - f, d)) * rng.choice([0.1, 1.0, 3.0], (n - f, 1)) + rng.normal(0, 1, d)
    centre, deviation = honest.mean(0), honest.std(0)
    kind = rng.integers(7)
    lies = [
        rng.normal(0, 100 * spread, (f, d)),
        np.tile(centre - 1.5 * deviation, (f, 1)),
        np.tile(-rng.choice([0.1, 1, 10]) * centre, (f, 1)),
        np.tile(honest[rng.integers(n - f)], (f, 1)),
        np.tile(centre + rng.choice([1, 3, 10, 1e3, 1e8]) * spread * rng.choice([-1, 1], d), (f, 1)),
        centre + spread * rng.standard_t(1, (f, d)),
        honest[:1] + rng.normal(0, 1e-3 * spread, (f, d)),
    ]
    both = np.concatenate([honest, lies[kind]]) if rng.random() < 0.5 else np.concatenate([lies[kind], honest])
    return both[rng.permutation(n)].astype(np.float32)


INPUTS = 500
SIZES = [(7, 1), (7, 2), (8, 2), (9, 3)]


def inputs(f_most: Callable[[int], int]) -> Iterator[tuple[Array, int]]:
    rng = np.random.default_rng(7)
    for k in range(INPUTS):
        n, f = SIZES[k % len(SIZES)]
        yield adversarial(rng, n, f, int(rng.integers(1, 5))), min(f, f_most(n))


def violation(found: Array, updates: Array, f: int, kappa: float) -> float:
    """max over all subsets S of n - f rows of ||F - mean_S||^2 / (kappa mean_S ||x - mean_S||^2), 1 at most."""
    wide, n = updates.astype(np.float64), len(updates)
    subsets = np.array(list(itertools.combinations(range(n), n - f)))
    chosen = wide[subsets]
    means = chosen.mean(1)
    variances = ((chosen - means[:, None]) ** 2).sum(-1).mean(1)
    errors = ((found.astype(np.float64) - means) ** 2).sum(-1)
    # of float32, beside the rows of the subset: a liar's size excuses nothing
    rounding = 1e-11 * (chosen**2).sum(-1).max(-1)
    return float((errors / (kappa * variances + rounding)).max())


def most_liars(name: str) -> Callable[[int], int]:
    return lambda n: max(f for f in range(4) if rules.get(name).min_rows(f) <= n)


@pytest.mark.parametrize("before", [(), ("nnm",), ("arc",), ("arc", "nnm")], ids="+".join)
@pytest.mark.parametrize("name", WITH_KAPPA)
def test_the_error_is_at_most_kappa_times_the_spread_of_any_honest_subset(name: str, before: tuple[str, ...]) -> None:
    spec = rules.get(name)
    assert spec.kappa is not None
    line = Pipeline(spec, {}, [preaggregators.get(each) for each in before])
    offers = {"rng": lambda: np.random.default_rng(0)}
    for updates, f in inputs(most_liars(name)):
        n = len(updates)
        kappa = spec.kappa(n, f)
        for each in reversed(line.preaggregators):
            assert each.kappa is not None
            kappa = each.kappa(kappa, n, f)
        found = line(updates, num_byzantine=f, offers=offers).update_d
        assert violation(found, updates, f, kappa) <= 1.0


@pytest.mark.parametrize(("n", "f"), [(9, 3), (101, 50), (201, 100)])
@pytest.mark.parametrize(("spread", "far"), [(1e-5, 1e3), (1e-2, 1e6), (1.0, 3.0)])
def test_the_geometric_median_converges_wherever_the_liars_are(n: int, f: int, spread: float, far: float) -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(0, spread, (n - f, 8))
    updates = np.concatenate([np.tile(rng.normal(0, far, 8), (f, 1)), honest]).astype(np.float32)
    wide = updates.astype(np.float64)
    found = call("geometric_median", updates, f).astype(np.float64)
    honest_mean = wide[f:].mean(0)
    kappa = rules.get("geometric_median").kappa
    assert kappa is not None
    assert ((found - honest_mean) ** 2).sum() <= kappa(n, f) * ((wide[f:] - honest_mean) ** 2).sum(1).mean()

    def total(z_d: npt.NDArray[np.float64]) -> float:
        return float(np.linalg.norm(wide - z_d, axis=1).sum())

    assert minimize(total, found).fun >= total(found) * (1 - 1e-6), "nothing near is better"


def test_the_inequality_can_be_violated() -> None:
    # what the exam above would say of the mean with the trimmed mean's constant
    spec = rules.get("trimmed_mean")
    assert spec.kappa is not None
    worst = max(violation(u.mean(0), u, f, spec.kappa(len(u), f)) for u, f in inputs(most_liars("trimmed_mean")))
    assert worst > 100


# Rules without a constant: the property they hold, and the input that breaks them.


def test_the_mean_follows_one_liar_anywhere() -> None:
    with pytest.raises(ConfigError, match="tolerates no liar"):
        rules.require(rules.get("mean"), 1, {})
    assert call("mean", np.concatenate([rows(9, 3), np.full((1, 3), 1e6, np.float32)])).min() > 9e4


def test_cge_is_never_longer_than_the_honest_rows_but_is_turned_by_short_lies() -> None:
    for seed in range(50):
        honest = rows(7, 5, seed)
        liars = np.random.default_rng(seed).normal(0, 10, (2, 5)).astype(np.float32)
        found = call("cge", np.concatenate([honest, liars]), 2)
        assert np.linalg.norm(found) <= np.linalg.norm(honest, axis=1).max() * (1 + 1e-6)
    broken = np.array([[10.0]] * 6 + [[-9.0]] * 2, np.float32)
    assert call("cge", broken, 2)[0] == pytest.approx((4 * 10 - 2 * 9) / 6)  # 3.67, the honest all say 10


def test_centered_clipping_moves_at_most_its_radius_a_step_but_that_far_it_is_led() -> None:
    for size in (1, 100, 1e6):
        updates = np.concatenate([np.zeros((6, 4), np.float32), np.full((5, 4), size, np.float32)])
        found = call("centered_clipping", updates, 5, radius=1.0, iterations=3)
        assert np.linalg.norm(found) <= 3.0
    led = call("centered_clipping", updates, 5, radius=1.0, iterations=1)
    assert np.linalg.norm(led) == pytest.approx(5 / 11, rel=1e-5)


def test_fltrust_is_never_longer_than_the_reference_nor_against_it_but_a_poor_reference_blinds_it() -> None:
    reference = np.array([1.0, 0, 0], np.float32)
    for seed in range(50):
        found = call("fltrust", 100 * rows(6, 3, seed), 5, reference_d=reference)
        assert np.linalg.norm(found) <= 1 + 1e-5
        assert found[0] >= 0
    honest = np.tile(np.array([0.0, 1, 0], np.float32), (6, 1))  # right, but square to what the server's rows say
    assert call("fltrust", honest, 0, reference_d=reference).tolist() == [0, 0, 0]


def test_foolsgold_silences_sybils_but_not_one_liar_alone() -> None:
    honest = np.eye(5, 8, dtype=np.float32)
    lone = np.zeros((1, 8), np.float32)
    lone[0, 7] = 100
    weights_n = full("foolsgold", np.concatenate([honest, lone]), 1).weights_n
    assert weights_n is not None
    assert weights_n[5] == pytest.approx(1 / 6)


def test_dnc_finds_liars_of_one_direction_but_not_as_many_directions_as_liars() -> None:
    honest = 0.1 * rows(12, 50)
    together = np.concatenate([honest, np.tile(2 * np.ones(50, np.float32), (3, 1))])
    assert np.abs(call("dnc", together, 3) - honest.mean(0)).max() < 0.1
    apart = np.zeros((3, 50), np.float32)
    apart[[0, 1, 2], [0, 1, 2]] = (50, 40, 30)
    found = full("dnc", np.concatenate([honest, apart]), 1).weights_n  # three liars where one is expected
    assert found is not None
    assert (found[12:] > 0).any()


def test_flame_bounds_every_row_by_the_median_length_but_a_majority_of_one_direction_rules() -> None:
    updates = np.concatenate([rows(8, 30), 1e6 * rows(3, 30, seed=5)])
    assert np.linalg.norm(call("flame", updates, 3)) <= np.median(np.linalg.norm(updates, axis=1)) * (1 + 1e-5)
    scattered = np.eye(5, 30, dtype=np.float32)
    sybils = np.tile(np.full(30, -(30**-0.5), np.float32), (6, 1))
    assert call("flame", np.concatenate([scattered, sybils]), 5).max() < 0


def test_bulyan_stays_within_the_honest_values_of_each_coordinate_up_to_their_spread() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        honest = rng.normal(0, 1, (9, 3)).astype(np.float32)
        liars = (rng.choice([1, 10, 1e4]) * rng.normal(0, 1, (2, 3))).astype(np.float32)
        found = call("bulyan", np.concatenate([honest, liars]), 2)
        spread = honest.max(0) - honest.min(0)
        assert (found <= honest.max(0) + spread).all()
        assert (found >= honest.min(0) - spread).all()
    # beyond its breakdown: as many liars as make a majority of the chosen
    assert call("bulyan", np.concatenate([np.zeros((3, 1)), np.full((8, 1), 9)]).astype(np.float32), 2)[0] == 9


# ---------------------------------------------------------------- against ByzFL


BYZFL = peers.byzfl()


@pytest.mark.skipif(BYZFL is None, reason="byzfl is not installed: make setup installs it")
@pytest.mark.parametrize("seed", range(6))
def test_rules_that_byzfl_defines_alike_agree(seed: int) -> None:
    assert BYZFL is not None
    n, f = 13, 3
    updates = rows(n, 300, seed)
    wide = updates.astype(np.float64)
    theirs = {
        "mean": BYZFL.Average()(wide),
        "median": BYZFL.Median()(wide),
        "trimmed_mean": BYZFL.TrMean(f=f)(wide),
        "meamed": BYZFL.Meamed(f=f)(wide),
        "geometric_median": BYZFL.GeometricMedian(nu=1e-9, T=2000)(wide),
        "centered_clipping": BYZFL.CenteredClipping(L=3, tau=5.0)(wide),
    }
    options = {"centered_clipping": {"radius": 5.0, "iterations": 3}}
    for name, expected in theirs.items():
        found = call(name, updates, 0 if name == "mean" else f, **options.get(name, {}))
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), name
    assert nnm(updates, num_byzantine=f) == pytest.approx(BYZFL.NNM(f=f)(wide), abs=1e-5)
    assert clip(updates, num_byzantine=f, max_norm=9.0) == pytest.approx(BYZFL.Clipping(c=9.0)(wide.copy()), abs=1e-5)
    assert arc(updates, num_byzantine=f) == pytest.approx(BYZFL.ARC(f=f)(wide.copy()), abs=1e-5)


@pytest.mark.skipif(BYZFL is None, reason="byzfl is not installed: make setup installs it")
@pytest.mark.parametrize("seed", range(6))
def test_byzfls_krum_is_ours_with_one_neighbour_more(seed: int) -> None:
    # ByzFL sums n - f - 1 distances where the paper (and Flower) sum n - f - 2
    from strategies.rows import squared_distances
    from strategies.rules.krum import krum_scores

    assert BYZFL is not None
    n, f = 13, 3
    updates = rows(n, 300, seed)
    scores = krum_scores(squared_distances(updates), n - f - 1)
    best = np.argsort(scores, kind="stable")
    wide = updates.astype(np.float64)
    assert updates[best[0]] == pytest.approx(BYZFL.Krum(f=f)(wide), abs=1e-6)
    assert updates[best[: n - f]].mean(0) == pytest.approx(BYZFL.MultiKrum(f=f)(wide), abs=1e-5)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean"])
def test_an_impossible_f_is_refused_at_composition_with_the_numbers(name: str) -> None:
    own = ["sector.options.server_fraction=0.05"] if name == "fltrust" else []
    f = next(f for f in range(1, 20) if rules.get(name).min_rows(f) > 10)
    with pytest.raises(ConfigError, match=rf"10 good replies, {rules.get(name).min_rows(f)} are needed"):
        build.check(load(["nodes=consortium", f"rule={name}", f"num_byzantine={f}", *own]))


def test_buckets_count_when_rows_do() -> None:
    with pytest.raises(ConfigError, match=r"10 good replies \(5 rows after bucketing\), 7 are needed"):
        build.check(load(["nodes=consortium", "rule=krum", "num_byzantine=2", "preaggregator=bucketing"]))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rule.name=mode"], r"no rule 'mode'; choose one of: bulyan, .*trimmed_mean"),
        (["rule=multi_krum", "num_byzantine=2", "rule.options.num_selected=9"], r"with 10 rows and num_byzantine=2"),
        (["rule=multi_krum", "rule.options.num_selected=0"], r"num_selected is 0; it must be at least 1"),
        (["rule=foolsgold", "preaggregator=nnm"], r"behind nnm a row is several nodes'"),
        (["rule.weighted=true", "preaggregator=bucketing"], r"\(weighted\), and behind bucketing"),
        (["rule=multi_krum", "rule.options.num_selected=two"], r"options of multi_krum cannot be used"),
        (["rule=dnc", "rule.options.iterations=0"], r"must be above 0"),
        (["rule=centered_clipping", "rule.options.radius=-1"], r"must be above 0"),
        (["preaggregator=clip", "preaggregator.clip.options.max_norm=0"], r"must be above 0"),
        (["preaggregator=bucketing", "preaggregator.bucketing.options.size=0"], r"must be at least 1"),
        (["+rule.options.speed=9"], r"rule=mean has no options \['speed'\]"),
        (["preaggregator=nnm", "+preaggregator.nnm.options.k=9"], r"preaggregator=nnm has no options \['k'\]"),
    ],
)
def test_options_that_no_rule_takes_are_refused_at_composition(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build.check(load(["nodes=consortium", *overrides]))


def test_preaggregators_compose_in_the_order_they_are_given() -> None:
    names = [
        [spec.name for spec in build.pipeline(load([f"preaggregator={given}"])).preaggregators]
        for given in ("[arc,nnm]", "[nnm,arc]", "nnm", "none")
    ]
    assert names == [["arc", "nnm"], ["nnm", "arc"], ["nnm"], []]


def test_the_recipe_is_arc_nnm_and_the_trimmed_mean() -> None:
    config = load(["nodes=consortium", "rule=trimmed_mean", "preaggregator=[arc,nnm]", "num_byzantine=3"])
    updates = rows(10, 50)
    line = build.pipeline(config)
    assert line(updates, num_byzantine=3, offers={}).update_d.tobytes() == call("robust", updates, 3).tobytes()
    assert call("robust", updates, 0) == pytest.approx(updates.mean(0), abs=1e-6)


def test_weights_of_mixed_rows_are_those_of_the_nodes() -> None:
    line = Pipeline(rules.get("multi_krum"), {}, [preaggregators.get("nnm")])
    updates = np.concatenate([rows(9, 50), np.full((2, 50), 40, np.float32)])
    found = line(updates, num_byzantine=2, offers={"rng": lambda: None})
    assert found.weights_n is not None
    assert found.weights_n.shape == (11,)
    assert found.weights_n[9:].tolist() == [0, 0]
    assert found.weights_n @ updates.astype(np.float64) == pytest.approx(found.update_d, abs=1e-5)
