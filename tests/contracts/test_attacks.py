"""The exam of an attack.  One row an attack; every law is asked of every row, and each formula once by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from conf.load import choices, load
from experiments import attacks
from experiments.attacks import ATTACKS, Reply, View
from experiments.attacks.search import largest, line_maximum
from strategies.aggregation import Pipeline
from strategies.rules import get as rule
from trellis import wire
from trellis.errors import CohortTooSmall, ConfigError
from trellis.types import Aggregated, Request


@dataclass(frozen=True)
class Case:
    """An attack, options that make it do all it can, and whether what it sends is finite."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    finite: bool = True

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


CASES = [
    Case("sign_flip"),
    Case("sign_flip", {"of": "mean"}),
    Case("gaussian"),
    Case("infinity", finite=False),
    Case("infinity", {"coordinates": "one"}, finite=False),
    Case("not_a_number", finite=False),
    Case("not_a_number", {"coordinates": "one"}, finite=False),
    Case("ipm"),
    Case("ipm", {"optimised": True}),
    Case("alie"),
    Case("alie", {"optimised": True}),
    *(Case(name, {"direction": p}) for name in ("min_max", "min_sum", "agr_tailored") for p in ("unit", "sign", "std")),
    Case("min_sum", {"bound": "min"}),
    Case("mimic"),
    Case("rop", {"angle": 30.0}),
    *(Case("free_rider", {"mode": mode}) for mode in ("zero", "noise", "previous", "previous_noise")),
    Case("scaling", {"gamma": 3.0, "max_norm": 2.0}),
    Case("label_flip"),
    Case("label_flip", {"to": 1, "fraction": 0.5}),
    Case("label_flip", {"pairs": [[0, 1]]}),
    Case("backdoor", {"scale": 2.0}),
    *(Case("inflation", {"mode": mode}) for mode in ("times", "not_a_number", "zero", "negative")),
    *(Case("malformed", {"kind": kind}) for kind in ("shape", "key", "dtype", "oversize", "empty")),
    Case("replay", {"age": 2}),
]
MODEL = [case for case in CASES if ATTACKS[case.name].kind == "model"]
D = 20_000
"""More than one block of columns."""


def honest(h: int = 7, d: int = D, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((h, d)) * rng.random(d) + 0.3).astype(np.float32)


def view(updates_hd: Any, *, num_attackers: int = 2, **more: Any) -> View:
    updates_hd = np.asarray(updates_hd, np.float32)
    return View(updates_hd[0].copy(), updates_hd, num_attackers=num_attackers, **more)


def seen(case: Case, at: View) -> View:
    """What the attack sees after it has remembered this round."""
    remember = ATTACKS[case.name].remember
    return at if remember is None else replace(at, state=remember(at))


def full_view() -> View:
    updates_hd = honest()
    return view(updates_hd, previous_step_d=updates_hd[1] / 2, aggregate=lambda x_nd: np.median(x_nd, axis=0))


def sent(case: Case, at: View) -> Any:
    return ATTACKS[case.name].fn(seen(case, at), **case.options)


# ---------------------------------------------------------------- laws


def test_every_attack_sits_the_exam_and_has_a_file() -> None:
    assert {case.name for case in CASES} == set(ATTACKS) == set(choices("attack")) - {"none"}


@pytest.mark.parametrize("case", MODEL, ids=lambda case: case.id)
def test_a_lie_is_a_float32_vector_and_finite_unless_it_means_not_to_be(case: Case) -> None:
    lie_d = sent(case, full_view())
    assert (lie_d.shape, lie_d.dtype) == ((D,), np.float32)
    assert np.isfinite(lie_d).all() == case.finite


@pytest.mark.parametrize("case", MODEL, ids=lambda case: case.id)
def test_the_same_view_gives_the_same_lie_and_stays_as_it_was(case: Case) -> None:
    first, second = full_view(), full_view()
    before = [first.own_d.tobytes(), first.honest_hd.tobytes(), first.previous_step_d.tobytes()]  # type: ignore[union-attr]
    lie_d = sent(case, first)
    assert lie_d.tobytes() == sent(case, second).tobytes()
    assert [first.own_d.tobytes(), first.honest_hd.tobytes(), first.previous_step_d.tobytes()] == before  # type: ignore[union-attr]
    assert not np.shares_memory(lie_d, first.honest_hd)
    assert not np.shares_memory(lie_d, first.own_d)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_its_options_are_taken_and_no_others(case: Case) -> None:
    spec = attacks.get(case.name)
    attacks.require(spec, case.options, num_classes=2)
    with pytest.raises(ConfigError, match=rf"attack={case.name} has no options \['tua'\]; it takes: "):
        attacks.require(spec, {**case.options, "tua": 1}, num_classes=2)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_its_file_composes_names_it_and_gives_options_it_takes(name: str) -> None:
    config = load(["nodes=consortium", f"attack={name}", "attack.num_attackers=2"])
    assert config.attack.name == name
    attacks.require(attacks.get(name), config.attack.options, num_classes=2)
    assert set(config.attack.options) == set(attacks.defaults(attacks.get(name).fn)) | set(
        attacks.defaults(attacks.get(name).boost) if attacks.get(name).boost else {}
    ), "every option is in the file, to be found and overridden"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sign_flip", {"of": "all"}, "of is 'all'"),
        ("gaussian", {"std": -1.0}, "std is -1"),
        ("infinity", {"coordinates": "two"}, "coordinates is 'two'"),
        ("ipm", {"tau": "much"}, "attack=ipm cannot be carried out with"),
        ("min_max", {"direction": "up"}, "direction is 'up'"),
        ("min_sum", {"bound": "mean"}, "bound is 'mean'"),
        ("free_rider", {"mode": "sleep"}, "mode is 'sleep'"),
        ("label_flip", {"to": 2}, "no class 2"),
        ("label_flip", {"pairs": [[0]]}, "cannot be carried out"),
        ("label_flip", {"fraction": 0}, "fraction is 0"),
        ("backdoor", {"target": -1}, "no class -1"),
        ("backdoor", {"size": 0}, "size is 0"),
        ("inflation", {"mode": "more"}, "mode is 'more'"),
        ("malformed", {"kind": "odd"}, "kind is 'odd'"),
        ("replay", {"age": 0}, "age is 0"),
    ],
)
def test_an_option_it_cannot_use_is_refused_before_a_run(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        attacks.require(attacks.get(name), options, num_classes=2)


@pytest.mark.parametrize("name", ["label_flip", "backdoor"])
def test_classes_are_not_changed_where_there_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"attack={name} changes classes, and this sector has none"):
        attacks.require(attacks.get(name), {}, num_classes=None)


def test_an_unknown_attack_is_answered_with_the_catalogue() -> None:
    with pytest.raises(ConfigError, match="no attack 'sign_flop'; choose one of: agr_tailored, alie"):
        attacks.get("sign_flop")


@pytest.mark.parametrize("name", sorted(n for n, spec in ATTACKS.items() if spec.needs_others))
def test_what_needs_the_others_says_so_when_it_has_none(name: str) -> None:
    state = {"z": np.ones(3, np.float32)}
    with pytest.raises(ConfigError, match="needs the honest nodes' updates"):
        (ATTACKS[name].remember or ATTACKS[name].fn)(View(np.ones(3, np.float32), state=state))


# ---------------------------------------------------------------- formulas, by hand

TWO = [[1.0, 2.0], [3.0, 6.0]]  # mu = (2, 4), sigma = sqrt(2) (1, 2)


def test_the_sign_is_flipped_of_the_own_update_or_of_the_mean() -> None:
    assert attacks.sign_flip(view(TWO)).tolist() == [-1.0, -2.0]
    assert attacks.sign_flip(view(TWO), of="mean").tolist() == [-2.0, -4.0]


def test_ipm_is_minus_tau_times_the_mean() -> None:
    assert np.allclose(attacks.ipm(view(TWO)), [-0.2, -0.4])
    assert attacks.ipm(view(TWO), tau=2.0).tolist() == [-4.0, -8.0]


@pytest.mark.parametrize(
    ("n", "f", "z"),
    [
        # s = floor(50/2 + 1) - 24 = 2, so z = Phi^-1(24/26)
        (50, 24, 1.4260769),
        (20, 5, 0.2533471),  # s = 6, Phi^-1(9/15)
        (10, 2, 0.0),  # s = 4, Phi^-1(4/8)
        (9, 5, 0.6744898),  # a majority needs no one: s = 1, Phi^-1(3/4)
        (2, 1, 0.0),
    ],
)
def test_z_of_alie_follows_from_the_numbers_of_nodes_and_attackers(n: int, f: int, z: float) -> None:
    assert math.isclose(attacks.alie_z(n, f), z, abs_tol=1e-6)


def test_alie_is_the_mean_less_z_deviations() -> None:
    assert np.allclose(attacks.alie(view(TWO), z=1.5), [2 - 1.5 * math.sqrt(2), 4 - 3 * math.sqrt(2)])
    updates_hd = honest()
    mu, sigma = updates_hd.mean(0, dtype=np.float64), updates_hd.std(0, dtype=np.float64, ddof=1)
    assert np.allclose(attacks.alie(view(updates_hd, num_nodes=20, num_attackers=5)), mu - 0.2533471 * sigma, atol=1e-6)


def squared(updates_hd: Any, lie_d: Any) -> Any:
    difference = updates_hd.astype(np.float64) - lie_d.astype(np.float64)
    return (difference**2).sum(axis=1)


def pairwise(updates_hd: Any) -> Any:
    return np.array([squared(updates_hd, row) for row in updates_hd])


def test_min_max_on_two_points_of_a_line_is_as_far_as_they_are_apart() -> None:
    # mu = 1, p = -1: |1 - gamma - 2| <= 2 at gamma = 1
    assert np.allclose(attacks.min_max(view([[0.0], [2.0]]), direction="unit"), [0.0])


def test_min_sum_on_two_points_of_a_line_is_one_of_them() -> None:
    # (1 - g)^2 + (1 + g)^2 <= 4 at gamma = 1
    assert np.allclose(attacks.min_sum(view([[0.0], [2.0]]), direction="unit"), [0.0])


@pytest.mark.parametrize("direction", ["unit", "sign", "std"])
def test_min_max_goes_as_far_as_honest_updates_are_apart_and_no_further(direction: str) -> None:
    updates_hd = honest()
    lie_d = attacks.min_max(view(updates_hd), direction=direction)
    assert math.isclose(squared(updates_hd, lie_d).max(), pairwise(updates_hd).max(), rel_tol=1e-4)


@pytest.mark.parametrize("direction", ["unit", "sign", "std"])
@pytest.mark.parametrize("bound", ["max", "min"])
def test_min_sum_is_as_far_from_all_as_an_honest_update_is(direction: str, bound: str) -> None:
    updates_hd = honest()
    lie_d = attacks.min_sum(view(updates_hd), direction=direction, bound=bound)
    sums = pairwise(updates_hd).sum(axis=1)
    assert math.isclose(squared(updates_hd, lie_d).sum(), getattr(sums, bound)(), rel_tol=1e-4)


def test_there_is_nowhere_to_go_among_equal_updates() -> None:
    equal = np.ones((4, 3))
    for attack in (attacks.min_max, attacks.min_sum):
        assert attack(view(equal)).tolist() == [1.0, 1.0, 1.0]


def krum(x_nd: Any) -> Aggregated:
    """Krum in four lines: the row with the least distance to its n - f - 2 nearest."""
    distances = np.sort(pairwise(x_nd), axis=1)[:, 1 : len(x_nd) - 4]
    chosen = int(np.argmin(distances.sum(axis=1)))
    return Aggregated(x_nd[chosen], np.eye(len(x_nd))[chosen])


def test_the_tailored_lie_is_the_furthest_that_a_selecting_rule_takes() -> None:
    updates_hd = honest(h=8, d=50)
    at = view(updates_hd, aggregate=krum)
    lie_d = attacks.agr_tailored(at, evaluations=30)
    mu_d = at.mean()

    def taken(lie_d: Any) -> bool:
        answer = krum(np.vstack([updates_hd, lie_d, lie_d]).astype(np.float32))
        return bool((answer.weights_n[-2:] > 0).any())  # type: ignore[index]

    assert np.linalg.norm(lie_d - mu_d) > 0
    assert taken(lie_d)
    assert not taken(mu_d + 1.01 * (lie_d - mu_d))


@pytest.mark.parametrize("name", ["multi_krum", "cge", "flame", "dnc", "median", "robust"])
def test_no_other_gamma_does_more_harm_than_the_tailored_one(name: str) -> None:
    updates_hd = honest(h=8, d=50)
    line = Pipeline(rule(name))

    def aggregate(x_nd: Any) -> Any:
        return line(x_nd, num_byzantine=2, offers={"rng": lambda: np.random.default_rng(0)})

    at = view(updates_hd, aggregate=aggregate)
    mu_d = at.mean()

    def harm(lie_d: Any) -> float:
        answer = aggregate(np.vstack([updates_hd, lie_d, lie_d]).astype(np.float32))
        return float(np.linalg.norm(answer.update_d - mu_d))

    away = attacks.min_max(at) - mu_d
    found = harm(attacks.agr_tailored(at))
    # steps of a rule's choice lie between the searched places: a tenth may be lost
    assert found >= 0.9 * max(harm(mu_d + gamma * away) for gamma in np.linspace(0, 10, 201))


def test_where_no_row_is_selected_the_tailored_lie_moves_the_aggregate_the_furthest() -> None:
    updates_hd = honest(h=8, d=50)
    line = Pipeline(rule("trimmed_mean"))

    def aggregate(x_nd: Any) -> Any:
        return line(x_nd, num_byzantine=2, offers={})

    at = view(updates_hd, aggregate=aggregate)

    def moved(lie_d: Any) -> float:
        answer = aggregate(np.vstack([updates_hd, lie_d, lie_d]).astype(np.float32))
        return float(np.linalg.norm(answer.update_d - at.mean()))

    assert moved(attacks.agr_tailored(at)) >= 0.99 * max(moved(attacks.alie(at, z=z)) for z in (0.5, 1, 1.5, 2, 3))


@pytest.mark.parametrize("attack", [attacks.ipm, attacks.alie])
def test_an_optimised_attack_does_at_least_the_harm_of_the_fixed_one(attack: Callable[..., Any]) -> None:
    updates_hd = honest(h=8, d=50)
    at = view(updates_hd, aggregate=lambda x_nd: np.median(x_nd, axis=0))

    def harm(lie_d: Any) -> float:
        return float(np.linalg.norm(np.median(np.vstack([updates_hd, lie_d, lie_d]), axis=0) - at.mean()))

    assert harm(attack(at, optimised=True)) >= harm(attack(at))


def test_a_round_that_would_close_does_no_harm() -> None:
    def closed(x_nd: Any) -> Any:
        raise CohortTooSmall("too few")

    assert attacks.ipm(view(TWO, aggregate=closed), optimised=True).tolist() == [0.0, 0.0]


def test_searching_needs_the_runs_own_rule() -> None:
    for attack in (attacks.agr_tailored, lambda at: attacks.alie(at, optimised=True)):
        with pytest.raises(ConfigError, match="has no `aggregate`"):
            attack(view(TWO))


def test_mimic_copies_the_node_that_differs_most_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    updates_hd = np.vstack([rng.normal(0, 0.01, (5, 40)), np.full((1, 40), 3.0)]).astype(np.float32)
    at, state = view(updates_hd), {}
    for _ in range(4):
        state = dict(attacks.top_direction(replace(at, state=state)))
    assert int(state["rounds"]) == 4
    assert math.isclose(np.linalg.norm(state["z"]), 1.0, rel_tol=1e-5)
    assert abs(state["z"] @ np.full(40, 1 / math.sqrt(40))) > 0.999, "z is the direction of the odd one"
    along = updates_hd @ state["z"]
    assert attacks.mimic(replace(at, state=state)).tobytes() == updates_hd[int(np.argmax(along))].tobytes()


def test_a_free_rider_sends_nothing_noise_or_the_step_it_was_sent() -> None:
    step = np.linspace(-1, 1, D, dtype=np.float32)
    at = view(honest(), previous_step_d=step)
    assert not attacks.free_rider(at).any()
    assert attacks.free_rider(at, mode="previous").tolist() == step.tolist()
    assert math.isclose(attacks.free_rider(at, mode="noise", std=0.2).std(), 0.2, rel_tol=0.05)
    noise = attacks.free_rider(at, mode="previous_noise") - step
    assert math.isclose(noise.std(), step.std(), rel_tol=0.05)
    assert not attacks.free_rider(view(honest()), mode="previous").any(), "there is no step before the first round"


def test_attackers_share_what_is_common_and_draw_noise_of_their_own() -> None:
    one, other = (view(honest(), private_rng=np.random.default_rng(i)) for i in (1, 2))
    assert (
        np.isinf(attacks.infinity(one, coordinates="one")) == np.isinf(attacks.infinity(other, coordinates="one"))
    ).all()
    assert not np.array_equal(
        attacks.gaussian(view(honest(), private_rng=np.random.default_rng(3))), attacks.gaussian(other)
    )


def test_one_coordinate_lies_and_the_others_are_honest() -> None:
    at = view(honest())
    lie_d = attacks.not_a_number(at, coordinates="one")
    assert np.isnan(lie_d).sum() == 1
    assert (lie_d[~np.isnan(lie_d)] == at.own_d[~np.isnan(lie_d)]).all()


def test_scaling_replaces_the_model_up_to_a_norm() -> None:
    at = view([[3.0, 4.0]], num_nodes=10)
    assert attacks.scaling(at).tolist() == [15.0, 20.0]
    assert attacks.scaling(at, gamma=-2.0).tolist() == [-6.0, -8.0]
    assert np.allclose(attacks.scaling(at, max_norm=1.0), [0.6, 0.8])
    assert attacks.boosted(at.own_d, scale=1.0, max_norm=9.0).tolist() == [3.0, 4.0]


def test_rop_leaves_the_centre_at_a_right_angle() -> None:
    step = np.linspace(1, 2, D, dtype=np.float32)
    at = view(honest(), previous_step_d=step)
    offset = attacks.rop(at, blend=1.0, length=2.0).astype(np.float64) - step
    assert abs(offset @ step) < 1e-4 * np.linalg.norm(offset) * np.linalg.norm(step)
    assert math.isclose(np.linalg.norm(offset), 2 * np.linalg.norm(at.mean()), rel_tol=1e-4)
    along = attacks.rop(at, blend=1.0, angle=0.0).astype(np.float64) - step
    assert math.isclose(along @ step, np.linalg.norm(along) * np.linalg.norm(step), rel_tol=1e-4)


def test_halving_finds_the_edge_and_a_line_search_the_top() -> None:
    assert math.isclose(largest(lambda at: at <= 3.25, start=10.0, evaluations=30), 3.25, abs_tol=1e-6)
    assert largest(lambda at: False, start=10.0, evaluations=30) == 0.0
    assert math.isclose(
        line_maximum(lambda at: -((at - 3.3) ** 2), step=1.0, most=9, evaluations=40), 3.3, abs_tol=0.01
    )
    assert line_maximum(lambda at: at, step=1.0, most=9.0, evaluations=20) == 9.0
    calls: list[float] = []
    line_maximum(lambda at: calls.append(at) or 0.0, step=1.0, most=9.0, evaluations=20)  # type: ignore[func-returns-value]
    assert len(calls) == 20


# ---------------------------------------------------------------- rows


def rows(n: int = 10, num_classes: int = 5) -> dict[str, Any]:
    return {"x": np.zeros((n, 6, 4), np.float32), "y": (np.arange(n) % num_classes).astype(np.float32)}


def test_labels_are_mirrored_mapped_or_made_one() -> None:
    def flipped(**options: Any) -> list[float]:
        given = rows()
        found = attacks.label_flip(given, num_classes=5, rng=np.random.default_rng(0), **options)
        assert given["y"].tolist() == rows()["y"].tolist(), "the node's own rows stay"
        assert found["x"] is given["x"]
        assert found["y"].dtype == np.float32
        return list(found["y"].tolist())

    assert flipped() == [4, 3, 2, 1, 0] * 2
    assert flipped(to=2) == [2] * 10
    assert flipped(pairs=[[0, 1], [3, 0]]) == [1, 1, 2, 0, 4] * 2
    changed = np.array(flipped(to=2, fraction=0.5)) != rows()["y"]
    assert changed.sum() == 4, "half of the eight rows of other classes"


def test_the_trigger_is_the_first_pixels_of_an_image_and_the_first_columns_of_a_table() -> None:
    image = attacks.stamped(np.zeros((2, 3, 5, 5), np.float32), size=2, value=7.0)
    assert image[0, 0].tolist() == [[7, 7, 0, 0, 0], [7, 7, 0, 0, 0], *[[0] * 5] * 3]
    assert (image == image[0, 0]).all()
    assert attacks.stamped(np.zeros((1, 4)), size=3, value=2.0).tolist() == [[2, 2, 2, 0]]


def test_a_backdoor_stamps_rows_of_other_classes_and_calls_them_the_target() -> None:
    given = rows()
    found = attacks.backdoor(given, num_classes=5, rng=np.random.default_rng(0), target=1, fraction=0.5, size=2)
    stamped = found["x"].any(axis=(1, 2))
    assert stamped.sum() == 4
    assert (found["y"][stamped] == 1).all()
    assert (found["y"][~stamped] == given["y"][~stamped]).all()
    assert not (given["y"][stamped] == 1).any()
    assert not given["x"].any()


# ---------------------------------------------------------------- replies


def content(round_: int = 1) -> RecordDict:
    request = Request("run", round_, "train", "base", {}, ("a",))
    arrays = {"w": np.full((2, 3), round_, np.float32), "b": np.zeros(3, np.float32)}
    return wire.reply_content(request=request, arrays=arrays, num_examples=8, metrics={"train/loss": 0.5}, counts={})


@pytest.mark.parametrize("case", [c for c in CASES if ATTACKS[c.name].kind == "protocol"], ids=lambda case: case.id)
def test_a_changed_reply_leaves_the_honest_one_as_it_was(case: Case) -> None:
    honest_content = content()
    before = wire.pack(honest_content)
    ATTACKS[case.name].fn(Reply(honest_content), **case.options)
    assert wire.pack(honest_content) == before


def test_the_number_of_examples_is_inflated_and_nothing_else() -> None:
    def declared(**options: Any) -> Any:
        metrics = attacks.inflation(Reply(content()), **options).metric_records["metrics"]
        assert metrics["train/loss"] == 0.5
        return metrics["num-examples"]

    assert (declared(), declared(mode="zero"), declared(mode="negative")) == (800, 0, -8)
    assert math.isnan(declared(mode="not_a_number"))


def test_a_malformed_reply_has_another_shape_key_dtype_or_size() -> None:
    def lie(kind: str) -> RecordDict:
        return attacks.malformed(Reply(content()), kind=kind)

    assert lie("shape")["arrays"]["w"].shape == (1, 2, 3)
    assert list(lie("key")["arrays"]) == ["w.lie", "b"]
    assert lie("dtype")["arrays"]["w"].dtype == "float64"
    assert wire.size_bytes(lie("oversize")) > 1 << 20
    assert not lie("empty")


def test_a_replay_is_the_reply_of_so_many_rounds_before_byte_for_byte() -> None:
    state: Any = {}
    for round_ in (1, 2, 4, 5):
        reply = Reply(content(round_), round_, state)
        state = ATTACKS["replay"].remember(reply, age=2)  # type: ignore[misc]
        assert len(state) <= 3
        told = wire.pack(attacks.replay(replace(reply, state=state), age=2))
        expected = {1: 1, 2: 2, 4: 2, 5: 2}[round_]  # round 3 was not asked; honest while there is none so old
        assert told == wire.pack(content(expected))
