"""Who shares masks with whom: circles by hand, the published table, then that graphs hold together."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from trellis.secagg.graph import degree, neighbours, order

Graph = dict[str, tuple[str, ...]]


def names(n: int) -> list[str]:
    return [f"node{i:03d}" for i in range(n)]


def is_connected(graph: Graph, *, without: frozenset[str] = frozenset()) -> bool:
    left = graph.keys() - without
    reached, frontier = set[str](), {min(left)}
    while frontier:
        reached |= frontier
        frontier = {v for u in frontier for v in graph[u]} - reached - without
    return reached == left


# ---------------------------------------------------------------- Harary's graph


def test_a_circle_by_hand() -> None:
    assert neighbours("abcde", 2) == {
        "a": ("b", "e"),
        "b": ("a", "c"),
        "c": ("b", "d"),
        "d": ("c", "e"),
        "e": ("a", "d"),
    }


def test_an_odd_degree_joins_across_the_circle() -> None:
    assert neighbours("abcdef", 3)["a"] == ("b", "d", "f")
    assert neighbours("abcdef", 3)["e"] == ("b", "d", "f")


def test_an_odd_degree_on_an_odd_circle_gives_one_node_one_more() -> None:
    graph = neighbours("abcde", 3)
    assert graph["a"] == ("b", "c", "e")
    assert graph["c"] == ("a", "b", "d", "e")
    assert sorted(map(len, graph.values())) == [3, 3, 3, 3, 4]


def test_neighbours_are_sorted_whatever_the_order() -> None:
    assert neighbours("dacb", 2) == {"d": ("a", "b"), "a": ("c", "d"), "c": ("a", "b"), "b": ("c", "d")}


def test_small_groups() -> None:
    assert neighbours([], 4) == {}
    assert neighbours("a", 4) == {"a": ()}
    assert neighbours("ab", 1) == {"a": ("b",), "b": ("a",)}
    assert neighbours("abc", 2) == {"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b")}


@given(st.integers(3, 60), st.data())
def test_degrees_are_as_asked_and_edges_go_both_ways(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, n + 2))
    graph = neighbours(order(names(n), b""), k)
    assert sorted(graph) == names(n)
    assert all(u in graph[v] and u != v for u in graph for v in graph[u])
    assert all(list(others) == sorted(set(others)) for others in graph.values())
    degrees = sorted(map(len, graph.values()))
    if k >= n - 1:
        assert degrees == [n - 1] * n
    else:
        extra = k % 2 * n % 2
        assert degrees == [k] * (n - extra) + [k + 1] * extra


@pytest.mark.parametrize("n", range(3, 10))
def test_no_fewer_than_k_nodes_take_a_graph_apart(n: int) -> None:
    for k in range(2, n):
        graph = neighbours(names(n), k)
        for num_lost in range(min(k, n - 1)):
            for lost in combinations(graph, num_lost):
                assert is_connected(graph, without=frozenset(lost))


def test_a_graph_of_a_thousand_survives_who_drops_and_who_colludes() -> None:
    """A third collude, a tenth drop out: 60 draws of who, which by the bounds fail once in 10^7."""
    k, threshold = degree(1000, colluding=1 / 3, dropping=0.1) or (0, 0)
    graph = neighbours(order(names(1000), b"seed"), k)
    rng = np.random.default_rng(1)
    for _ in range(60):
        drawn = rng.permutation(names(1000)).tolist()
        colluding, dropped = frozenset(drawn[:333]), frozenset(drawn[333:433])
        assert is_connected(graph, without=colluding | dropped)
        assert max(len(colluding.intersection(others)) for others in graph.values()) < threshold
        assert min(len(others) - len(dropped.intersection(others)) for others in graph.values()) >= threshold


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 1), (10, 0), (10, -2), (2, 0)])
def test_a_graph_that_would_fall_apart_is_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} neighbours among {n} nodes"):
        neighbours(names(n), k)


def test_a_name_has_one_place() -> None:
    with pytest.raises(ValueError, match="3 names, 2 different"):
        neighbours("aba", 2)


# ---------------------------------------------------------------- its degree

TABLE: dict[tuple[float, float], dict[int, int | None]] = {
    (0.1, 0.1): {50: 40, 100: 41, 300: 42, 1000: 52, 10000: 60},
    (0.2, 0.1): {50: None, 100: 54, 300: 58, 1000: 74, 10000: 87},
    (1 / 3, 0.1): {50: None, 100: 78, 300: 82, 1000: 113, 10000: 140},
}


@pytest.mark.parametrize(("fractions", "n"), [(fractions, n) for fractions, row in TABLE.items() for n in row])
def test_the_degree_is_that_of_the_table(fractions: tuple[float, float], n: int) -> None:
    found = degree(n, colluding=fractions[0], dropping=fractions[1])
    assert (found and found[0]) == TABLE[fractions][n]


def conditions(n: int, k: int, t: int, colluding: float, dropping: float) -> tuple[bool, bool, bool]:
    """Connected, private, correct: by scipy's distribution and logarithms."""
    num_colluding, num_dropping = int(colluding * n + 1e-9), int(dropping * n + 1e-9)
    return (
        math.log2(n) + k / 2 * math.log2(colluding + dropping) <= -40,
        n * float(stats.hypergeom.sf(t - 1, n - 1, num_colluding, k)) <= 2.0**-40,
        n * float(stats.hypergeom.sf(k - t, n - 1, num_dropping, k)) <= 2.0**-30,
    )


@pytest.mark.parametrize("fractions", TABLE)
@pytest.mark.parametrize("n", [120, 300, 1000])
def test_degree_and_threshold_meet_the_conditions_and_no_smaller_degree_does(
    n: int, fractions: tuple[float, float]
) -> None:
    k, t = degree(n, colluding=fractions[0], dropping=fractions[1]) or (0, 0)
    assert conditions(n, k, t, *fractions) == (True, True, True)
    assert not conditions(n, k, t + 1, *fractions)[2]  # the largest threshold that is correct
    for smaller in range(2, k):
        assert not any(all(conditions(n, smaller, other, *fractions)) for other in range(2, smaller + 1))


def test_more_bits_more_liars_and_more_dropouts_need_more_neighbours() -> None:
    def k(**given: float) -> int:
        asked = {"colluding": 0.1, "dropping": 0.1, "privacy_bits": 40, "correctness_bits": 30} | given
        found = degree(1000, **asked)  # type: ignore[arg-type]
        assert found is not None
        return found[0]

    assert k() < k(privacy_bits=60)
    assert k() < k(correctness_bits=50)
    assert k() < k(colluding=0.2)
    assert k() < k(dropping=0.2)


def test_nobody_to_fear_needs_two_neighbours_and_shares_that_are_not_the_secret() -> None:
    assert degree(100, colluding=0.0, dropping=0.0) == (2, 2)


def test_a_threshold_of_one_is_no_threshold() -> None:
    """One of 12 stays with all but 10^-12: enough for a threshold of 1, which would hand out the secret itself."""
    k, threshold = degree(1000, colluding=0.0, dropping=0.1, privacy_bits=1) or (0, 0)
    assert k > 12
    assert threshold == 2


@pytest.mark.parametrize("n", [1, 2, 3, 10, 41])
def test_small_groups_are_complete(n: int) -> None:
    assert degree(n, colluding=0.1, dropping=0.1) is None


def test_no_degree_helps_when_nobody_honest_stays() -> None:
    assert degree(300, colluding=0.6, dropping=0.4) is None


@pytest.mark.parametrize(("n", "colluding", "dropping"), [(0, 0.1, 0.1), (9, -0.1, 0.1), (9, 0.1, 1.1)])
def test_fractions_are_fractions(n: int, colluding: float, dropping: float) -> None:
    with pytest.raises(ValueError, match="fractions are 0 to 1"):
        degree(n, colluding=colluding, dropping=dropping)


# ---------------------------------------------------------------- an order nobody chose


def test_an_order_follows_from_the_seed_alone() -> None:
    given_order = order(names(50), b"seed")
    assert sorted(given_order) == names(50)
    assert order(names(50)[::-1], b"seed") == given_order
    assert order(names(50), b"other") != given_order


def test_an_order_is_the_same_on_every_machine() -> None:
    assert order("abcde", b"trellis") == ["b", "d", "a", "e", "c"]


def test_a_name_keeps_its_place_among_fewer() -> None:
    fewer = [name for name in order(names(50), b"seed") if name != "node007"]
    assert order([name for name in names(50) if name != "node007"], b"seed") == fewer


def test_letters_do_not_move_from_the_seed_to_a_name() -> None:
    plain = order(["xa", "xb", "xc", "xd", "xe", "xf"], b"")
    assert [name[1:] for name in plain] != order(list("abcdef"), b"x")


def test_every_place_is_as_likely() -> None:
    """Chi-square of the place of one of 8 nodes over 4000 seeds; a uniform order fails once in 10^6."""
    places = [order("abcdefgh", i.to_bytes(4, "big")).index("c") for i in range(4000)]
    statistic = stats.chisquare(np.bincount(places, minlength=8)).statistic
    assert statistic < stats.chi2.isf(1e-6, 7)
