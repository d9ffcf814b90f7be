"""Who is asked: sizes by hand, independence of ids and of order, and coins that fall as often as they should."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import samplers
from strategies.samplers import Sampler, by_availability, cohort_size, everyone, uniform
from trellis.errors import ConfigError
from trellis.types import NodeInfo


def federation(n: int, *, availability: float = 1.0) -> list[NodeInfo]:
    return [NodeInfo(f"node-{i:04d}", 1000 + i, availability=availability) for i in range(n)]


def names(sampler: Sampler, nodes: list[NodeInfo], seed: int = 0) -> list[str]:
    return [n.name for n in sampler(np.random.default_rng(seed), nodes)]


@pytest.mark.parametrize(
    ("n", "fraction", "least", "size"),
    [
        (10, 0.1, 1, 1),
        (10, 0.11, 1, 2),
        (10, 0.5, 1, 5),
        (10, 1.0, 1, 10),
        (10, 0.1, 4, 4),
        (10, 0.1, 40, 10),
        (3, 0.001, 1, 1),
        (0, 0.5, 2, 0),
        (100, 0.07, 1, 7),
        (1000, 0.125, 1, 125),
        (1000, 0.001, 1, 1),
        (50, 0.14, 1, 7),
    ],
)
def test_a_share_is_rounded_up_and_kept_between_the_least_and_all(
    n: int, fraction: float, least: int, size: int
) -> None:
    assert cohort_size(n, fraction, least) == size
    assert len(names(uniform(fraction=fraction, min_nodes=least), federation(n))) == size


@given(st.integers(1, 300), st.integers(1, 100))
def test_a_percentage_of_nodes_is_exact(n: int, percent: int) -> None:
    assert cohort_size(n, percent / 100, 1) == max(-(-n * percent // 100), 1)


SAMPLERS = {
    "everyone": everyone,
    "uniform": uniform(fraction=0.3),
    "availability": by_availability(fraction=0.5),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_cohort_depends_on_names_and_the_seed_never_on_ids_or_order(sampler: Sampler) -> None:
    nodes = federation(40, availability=0.7)
    shuffled = [replace(n, node_id=random.Random(i).getrandbits(60)) for i, n in enumerate(nodes)]
    random.Random(1).shuffle(shuffled)
    cohort = names(sampler, nodes)
    assert cohort == names(sampler, shuffled)
    assert cohort == sorted(set(cohort))
    if sampler is not everyone:
        assert len({tuple(names(sampler, nodes, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_node_that_is_not_active_is_never_asked(sampler: Sampler) -> None:
    nodes = [replace(n, status="revoked") if i % 2 else n for i, n in enumerate(federation(40))]
    asked = {name for seed in range(20) for name in names(sampler, nodes, seed)}
    assert asked == {n.name for n in nodes if n.status == "active"}


def test_everyone_is_everyone() -> None:
    assert names(everyone, federation(5)) == [f"node-{i:04d}" for i in range(5)]


def test_a_uniform_draw_asks_everyone_equally_often() -> None:
    # 2000 draws of 3 of 10: each count is binomial(2000, 0.3), sd 20.5.  Ten counts within 4.5 sd: an honest sampler
    # fails with probability below 10 * 7e-6 = 1e-4, and the seeds are fixed.
    counts = dict.fromkeys((n.name for n in federation(10)), 0)
    for seed in range(2000):
        for name in names(uniform(fraction=0.3), federation(10), seed):
            counts[name] += 1
    assert all(abs(c - 600) < 4.5 * 20.5 for c in counts.values())


def test_a_coin_falls_as_often_as_a_node_is_available() -> None:
    # 4000 coins each; sd = sqrt(4000 p (1 - p)) <= 31.6; 4.5 sd: error rate below 3 * 7e-6.
    nodes = [NodeInfo(f"n{p}", i, availability=p) for i, p in enumerate((0.1, 0.5, 0.9, 1.0))]
    counts = {n.name: 0 for n in nodes}
    for seed in range(4000):
        for name in names(by_availability(), nodes, seed):
            counts[name] += 1
    assert counts["n1.0"] == 4000
    for p in (0.1, 0.5, 0.9):
        assert abs(counts[f"n{p}"] - 4000 * p) < 4.5 * (4000 * p * (1 - p)) ** 0.5


def test_no_more_are_drawn_than_the_share_of_all_nodes() -> None:
    sizes = {len(names(by_availability(fraction=0.25), federation(40, availability=0.9), s)) for s in range(50)}
    assert sizes == {10}


def test_when_nobody_is_reachable_nobody_is_asked() -> None:
    assert names(by_availability(min_nodes=3), federation(4, availability=1e-12)) == []


def test_the_catalogue_names_its_samplers() -> None:
    assert samplers.get("all", fraction=1.0, min_nodes=1) is everyone
    nodes = federation(30, availability=0.5)
    for name, made in (("uniform", uniform), ("availability", by_availability)):
        found = samplers.get(name, fraction=0.2, min_nodes=2)
        assert names(found, nodes) == names(made(fraction=0.2, min_nodes=2), nodes)
    with pytest.raises(ConfigError, match="all, uniform, availability"):
        samplers.get("oracle", fraction=1.0, min_nodes=1)
