"""Baselines of next purchases, by hand: three codes, two customers with a held-out invoice and one without."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.studies.retail_baselines import HeldOut, hold_out, item_knn, own_purchases, popularity, rank


@pytest.fixture
def data() -> HeldOut:
    invoices = [
        ("1", 1.0, "2011-01-01 10:00", "AB"),
        ("2", 1.0, "2011-01-03 10:00", "AC"),
        ("3", 2.0, "2011-01-01 11:00", "AB"),
        ("4", 2.0, "2011-01-02 10:00", "BB"),
        ("5", 3.0, "2011-01-05 10:00", "BC"),
        ("C6", 3.0, "2011-01-06 10:00", "BC"),
        ("7", float("nan"), "2011-01-07 10:00", "CC"),
    ]
    columns = ["InvoiceNo", "StockCode", "InvoiceDate", "CustomerID", "Country"]
    lines = [(number, code, date, who, "Spain") for number, who, date, codes in invoices for code in codes]
    return hold_out(pd.DataFrame(lines, columns=columns))


def test_the_last_invoice_of_who_has_two_is_held_out_whole(data: HeldOut) -> None:
    assert [targets.tolist() for targets in data.targets] == [[0, 2], [1]]  # A, B, C in the order of the lines
    assert sorted(data.train["code"].tolist()) == [0, 0, 1, 1, 1, 2]
    assert data.bought.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_popularity_counts_lines(data: HeldOut) -> None:
    assert popularity(data).tolist() == [[2, 3, 1], [2, 3, 1]]


def test_own_purchases_come_first_and_popularity_decides_ties(data: HeldOut) -> None:
    assert np.argsort(-own_purchases(data), axis=1).tolist() == [[1, 0, 2], [1, 0, 2]]


def test_item_knn_sums_the_cosines_of_what_was_bought(data: HeldOut) -> None:
    ab, bc = 2 / np.sqrt(2 * 3), 1 / np.sqrt(3 * 1)
    np.testing.assert_allclose(item_knn(data, 2), [[ab, ab, bc]] * 2)
    # with one neighbour B keeps A only, so that nothing points to C
    np.testing.assert_allclose(item_knn(data, 1), [[ab, ab, 0.0]] * 2)


def test_every_target_counts_alike_then_every_customer(data: HeldOut) -> None:
    scores = np.zeros((2, 12))
    scores[0, [0, 3]] = 2, 1  # A first; C is third: the others follow in the order of their numbers
    scores[1, 2:12] = 1  # B is not among the first ten
    hr, ndcg = rank(scores, data.targets)
    assert hr == pytest.approx((2 / 2 + 0) / 2)
    assert ndcg == pytest.approx((1 + 1 / np.log2(5)) / 2 / 2)
