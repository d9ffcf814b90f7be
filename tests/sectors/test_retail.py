"""Next purchases: what is held out, what a code is, and what counts as a hit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sectors
from conf.load import load
from sectors import files, training
from sectors.base import TEST, TRAIN, VALIDATION, Batch, Place, Pooled, Rows, num_rows, take, to_batch
from sectors.params import initial_arrays
from sectors.retail import NUM_BUCKETS, UNIT, Retail, bucket_of, codes_of, customers, purchases
from trellis.errors import ConfigError, DataError, MissingData

CPU = torch.device("cpu")
A, B, C, D = "22423", "85123A", "85099B", "POST"


def table(*lines: tuple[Any, ...]) -> pd.DataFrame:
    """Lines of (invoice, code, date, customer, country)."""
    columns = ["InvoiceNo", "StockCode", "InvoiceDate", "CustomerID", "Country"]
    return pd.DataFrame(list(lines), columns=columns).astype({"CustomerID": float})


def day(number: int, clock: str = "10:00") -> str:
    return f"2011-01-{number:02d} {clock}"


UK = "United Kingdom"
THREE_INVOICES = (
    ("536365", A, day(1), 1.0, UK),
    ("536365", B, day(1), 1.0, UK),
    ("536400", B, day(4), 1.0, "France"),
    ("536400", C, day(4), 1.0, "France"),
    ("536400", B, day(4), 1.0, "France"),
    ("536500", A, day(9, "09:00"), 1.0, UK),
    ("536500", D, day(9, "09:00"), 1.0, UK),
)


def pooled(*lines: tuple[Any, ...], **options: Any) -> Pooled:
    return Retail(**options).pool(table(*lines))


def known(rows: Rows, i: int) -> list[list[int]]:
    """The history of a row, without its empty slots."""
    return [slot for slot in rows["x"][i].tolist() if slot[0]]


def basket(rows: Rows, i: int) -> list[int]:
    return [bucket for bucket in rows["y"][i].tolist() if bucket]


def buckets(*codes: str) -> list[int]:
    return [bucket_of(code) for code in codes]


def bitmap(*codes: str) -> str:
    kept = np.zeros(NUM_BUCKETS, bool)
    kept[np.array(buckets(*codes)) - 1] = True
    return np.packbits(kept).tobytes().hex()


# ---------------------------------------------------------------- rows


def test_rows_are_invoices_with_what_the_customer_bought_before() -> None:
    rows = pooled(*THREE_INVOICES).rows
    a, b, c, d = buckets(A, B, C, D)
    # bucket, invoices since, invoices that held it, days since; the last bought first
    assert known(rows, 0) == [[b, 1, 1, 3], [a, 1, 1, 3]]
    assert basket(rows, 0) == [b, c]
    assert known(rows, 1) == [[c, 1, 1, 4], [b, 1, 2, 4], [a, 2, 1, 7]]
    assert basket(rows, 1) == [a, d]
    assert num_rows(rows) == 2


def test_the_last_invoice_tests_and_the_one_before_may_validate() -> None:
    assert pooled(*THREE_INVOICES, validation_fraction=0.0).split.tolist() == [TRAIN, TEST]
    assert pooled(*THREE_INVOICES, validation_fraction=0.999).split.tolist() == [VALIDATION, TEST]
    # of two invoices the first is history and the last tests, whatever the fraction
    assert pooled(*THREE_INVOICES[:5], validation_fraction=0.999).split.tolist() == [TEST]


def test_cancellations_and_lines_without_a_customer_are_no_purchases() -> None:
    more = (
        ("C536501", C, day(10), 1.0, UK),
        ("c536502", C, day(11), 1.0, UK),
        ("536503", C, day(12), np.nan, UK),
        ("A536504", C, day(12), np.nan, UK),
    )
    found, expected = pooled(*THREE_INVOICES, *more), pooled(*THREE_INVOICES)
    assert all(np.array_equal(found.rows[k], expected.rows[k]) for k in ("x", "y"))


def test_invoices_go_by_their_first_line_and_then_by_number_not_by_the_order_of_lines() -> None:
    shuffled = (*THREE_INVOICES[5:], *THREE_INVOICES[:5])
    assert np.array_equal(pooled(*shuffled).rows["x"], pooled(*THREE_INVOICES).rows["x"])
    later_line = (*THREE_INVOICES[:5], ("536365", D, day(20), 1.0, UK), *THREE_INVOICES[5:])
    assert basket(pooled(*later_line).rows, 1) == buckets(A, D)
    tie = (("2", B, day(1), 1.0, UK), ("1", A, day(1), 1.0, UK))
    assert basket(pooled(*tie).rows, 0) == buckets(B)


def test_a_row_remembers_the_codes_bought_last() -> None:
    rows = pooled(*THREE_INVOICES, history=2).rows
    assert [slot[0] for slot in known(rows, 1)] == buckets(C, B)


def test_a_customer_of_two_countries_belongs_to_that_of_the_first_invoice() -> None:
    assert pooled(*THREE_INVOICES).keys["country"].tolist() == [UK, UK]


def test_who_bought_once_has_nothing_to_predict() -> None:
    once = ("536600", A, day(2), 2.0, UK)
    assert num_rows(pooled(*THREE_INVOICES, once).rows) == 2
    with pytest.raises(DataError, match="no customer with two invoices"):
        pooled(once)


def test_dates_with_the_month_first_are_the_same_dates() -> None:
    other = table(*THREE_INVOICES)
    other["InvoiceDate"] = pd.to_datetime(other["InvoiceDate"]).dt.strftime("%m/%d/%Y %H:%M").str.removeprefix("0")
    assert np.array_equal(Retail().pool(other).rows["x"], pooled(*THREE_INVOICES).rows["x"])
    mixed = pd.concat([table(*THREE_INVOICES[:5]), other[5:]], ignore_index=True)
    assert np.array_equal(Retail().pool(mixed).rows["x"], pooled(*THREE_INVOICES).rows["x"])


def test_a_date_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match=r"InvoiceDate .*'9 Jan' \(1 of 8 lines\).*needed are dates such as"):
        pooled(*THREE_INVOICES, ("536600", A, "9 Jan", 2.0, UK))


def test_a_file_without_customers_is_refused_with_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    table(*THREE_INVOICES).drop(columns="CustomerID").to_csv(path, index=False)
    with pytest.raises(DataError, match=r"own.csv has no column CustomerID; needed are InvoiceNo, StockCode"):
        Retail().read((path,))


def test_codes_that_are_all_digits_stay_text_in_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.csv.gz"
    lines = [("536365", "00123", day(1), 7.0, UK), ("536366", "00124", day(2), 7.0, UK)]
    table(*lines).astype({"CustomerID": int}).to_csv(path, index=False)
    assert basket(Retail().load(Place(3, 8, path=path)).test, 0) == buckets("00124")


def test_the_features_of_a_customer_are_those_of_a_purchase_thirty_days_after_the_last() -> None:
    following = ("536700", C, day(31, "09:00"), 1.0, UK)
    later = ("536600", A, "2011-02-08 09:00", 1.0, UK)
    x = Retail().features(table(*THREE_INVOICES, ("C9", A, day(10), 1.0, UK), ("1", A, day(2), 9.0, UK)))["x"]
    assert np.array_equal(x[0], pooled(*THREE_INVOICES, later).rows["x"][-1])
    assert x[1, 0].tolist() == [bucket_of(A), 1, 1, 30]
    assert not np.array_equal(x[0], pooled(*THREE_INVOICES, following).rows["x"][-1])


# ---------------------------------------------------------------- codes


def test_a_bucket_by_hand() -> None:
    assert bucket_of("22423") == 1 + 22423
    assert bucket_of("85123A") == 1 + (85123 + 30494) % 65423
    assert bucket_of("79323LP") == 1 + (79323 + 30494 * (12 * 27 + 16)) % 65423
    assert bucket_of(" 85123a ") == bucket_of("85123A")
    assert all(1 <= bucket_of(code) <= NUM_BUCKETS for code in ("POST", "BANK CHARGES", "M", "", "é"))


def test_no_two_published_codes_share_a_bucket() -> None:
    try:
        (path,) = Retail().files()
        products = files.find("retail/online_retail_products.csv", "UCI Online Retail", "UCI")
    except MissingData as error:
        pytest.skip(str(error))
    codes = {
        str(code).strip().upper()
        for name in (path, products)
        for code in pd.read_csv(name, usecols=["StockCode"], dtype=str)["StockCode"].unique()
    }
    assert len(codes) == 3958
    assert len({bucket_of(code) for code in codes}) == len(codes)


def test_statistics_count_training_rows_and_the_vocabulary_is_what_was_bought_often_enough() -> None:
    rows = pooled(*THREE_INVOICES).rows
    sector = Retail(min_count=2)
    bought = sector.statistics(rows)["bought"]
    assert {int(b) + 1: int(bought[b]) for b in np.flatnonzero(bought)} == dict.fromkeys(buckets(A, B, C, D), 1)
    twice = {"bought": bought + sector.statistics(take(rows, np.array([0])))["bought"]}
    assert sector.fit(twice) == {"vocabulary": bitmap(B, C)}
    assert sector.fit({"bought": bought}) == {"vocabulary": bitmap(A, B, C, D)}  # nobody has two: all there are
    assert sector.fit({"bought": bought * 0}) == {"vocabulary": ""}


def test_a_model_has_a_place_for_every_code_of_the_vocabulary() -> None:
    assert len(Retail(vocabulary=bitmap(A, C)).build_model().head.bias) == 2  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("vocabulary", ["00", bitmap(A)[:-2], "zz" + bitmap(A)[2:], "0" * len(bitmap(A))])
def test_a_vocabulary_that_is_no_bitmap_is_refused(vocabulary: str) -> None:
    with pytest.raises(ConfigError, match="vocabulary must be 16356 hexadecimal digits with a bit that is set"):
        Retail(vocabulary=vocabulary)


def test_predictions_are_codes_once_a_catalogue_names_them() -> None:
    sector = Retail(vocabulary=bitmap(A, B, C))
    order = np.argsort(buckets(A, B, C))
    scores = torch.tensor([[0.1, 0.3, 0.2]])[:, order]
    assert codes_of(sector.predict(scores), [A, B]).tolist() == [[B, "", A]]


# ---------------------------------------------------------------- hits, loss


def scored(sector: Retail, scores: dict[str, float], *bought: str) -> tuple[torch.Tensor, Batch]:
    """Outputs that score some codes (others -1), and the batch of an invoice that holds `bought`."""
    places = torch.from_numpy(np.array(buckets(*scores)))
    outputs = torch.full((1, 12), -1.0)
    outputs[0, sector._places(places) - 1] = torch.tensor(list(scores.values()))
    return outputs, {"y": torch.tensor([[*buckets(*bought), 0, 0]], dtype=torch.int32)}


TWELVE = [str(20000 + i) for i in range(12)]
FITTED = Retail(vocabulary=bitmap(*TWELVE))


def test_hit_rate_and_ndcg_by_hand() -> None:
    ranking = {code: 12.0 - i for i, code in enumerate(TWELVE)}
    # second and tenth are recommended, the twelfth is not, POST has no place: two of four
    counts = FITTED.counts(*scored(FITTED, ranking, TWELVE[1], TWELVE[9], TWELVE[11], "POST"))
    assert {k: int(v) for k, v in counts.items()} == {
        "hits": UNIT // 2,
        "gain": round(UNIT * (1 / np.log2(3) + 1 / np.log2(11)) / 4),
        "invoices": 1,
    }
    found = FITTED.metrics(counts)
    assert found["hr10"] == 0.5
    assert found["ndcg10"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(11)) / 4, abs=1e-6)


def test_the_loss_is_the_mean_cross_entropy_of_the_codes_that_have_a_place() -> None:
    ranking = {code: 0.1 * i for i, code in enumerate(TWELVE)}
    outputs, batch = scored(FITTED, ranking, TWELVE[3], TWELVE[5], "POST")
    logs = torch.log_softmax(torch.tensor(list(ranking.values())), 0)
    assert FITTED.losses(outputs, batch).item() == pytest.approx(-(logs[3] + logs[5]).item() / 2, rel=1e-5)
    assert FITTED.losses(*scored(FITTED, ranking, "POST")).item() == 0.0


def test_a_code_outside_the_vocabulary_is_a_miss_and_moves_nothing() -> None:
    model = FITTED.build_model()
    x = torch.zeros(2, 128, 4, dtype=torch.int32)
    x[1, 0] = torch.tensor([bucket_of("POST"), 1, 1, 3])
    with torch.no_grad():
        outputs = FITTED.forward(model, {"x": x})
    assert torch.equal(outputs[0], outputs[1])
    counts = FITTED.counts(outputs, {"y": torch.tensor([[bucket_of("POST")]] * 2)})
    assert int(counts["hits"]) == 0


def test_scores_that_are_no_numbers_are_misses() -> None:
    ranking = {code: float("nan") if code == TWELVE[0] else 1.0 for code in TWELVE}
    assert int(FITTED.counts(*scored(FITTED, ranking, TWELVE[0]))["hits"]) == 0


def test_what_was_bought_again_by_others_is_recommended_to_who_bought_it() -> None:
    model = FITTED.build_model()
    with torch.no_grad():
        model.again.times.weight[2] = 5.0  # type: ignore[union-attr,operator]
        x = torch.zeros(1, 128, 4, dtype=torch.int32)
        x[0, :2] = torch.tensor([[bucket_of(TWELVE[4]), 1, 1, 3], [bucket_of(TWELVE[7]), 2, 2, 9]])
        outputs = FITTED.forward(model, {"x": x})
    assert FITTED.predict(outputs)[0, 0] == bucket_of(TWELVE[7])


def test_a_step_runs_on_deterministic_kernels_only() -> None:
    sector = Retail()
    data = sector.load(Place(0, 3, synthetic=True))
    sector = sector.fitted_on(data.train)  # type: ignore[assignment]
    model, batch = sector.build_model(), to_batch(data.train, slice(64), CPU)
    torch.set_deterministic_debug_mode("error")
    try:
        sector.losses(sector.forward(model, batch), batch).mean().backward()
    finally:
        torch.set_deterministic_debug_mode("default")
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------- owners, options


def twice(customer: int, country: str) -> list[tuple[Any, ...]]:
    return [(f"{customer}{i}", A, day(1 + i), float(customer), country) for i in range(2)]


def customers_of(**num: int) -> list[tuple[Any, ...]]:
    named = [country for country, n in num.items() for _ in range(n)]
    return [line for i, country in enumerate(named) for line in twice(1000 + i, country)]


def test_countries_are_owners_most_customers_first_and_small_ones_are_the_last() -> None:
    sector = Retail(min_customers=3)
    found = sector.pool(table(*customers_of(Spain=2, Italy=3, Norway=1, France=5, Belgium=3)))
    owners = sector.owners(found, 4)
    names = [set(found.keys["country"][owners == owner].tolist()) for owner in range(4)]
    assert names == [{"France"}, {"Belgium"}, {"Italy"}, {"Norway", "Spain"}]
    # fewer nodes: the smallest owners are one
    assert np.bincount(sector.owners(found, 2)).tolist() == [5, 9]


def test_more_nodes_than_owners_are_refused_with_what_to_do() -> None:
    sector = Retail(min_customers=3)
    found = sector.pool(table(*customers_of(Italy=3, France=5)))
    with pytest.raises(DataError, match=r"8 rows cannot be divided into 4 parts: they have 2 owners .*uniform"):
        sector.owners(found, 4)


def test_a_customer_is_at_one_node_when_customers_are_dealt_at_random() -> None:
    sector = Retail(partition="uniform")
    found = sector.pool(sector.generate())
    owners = sector.owners(found, 20)
    homes = {(int(c), int(o)) for c, o in zip(found.keys["customer"], owners, strict=True)}
    assert len(homes) == len(np.unique(found.keys["customer"]))
    assert set(owners.tolist()) == set(range(20))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "city"}, "no partition 'city'; there are country, uniform"),
        ({"history": 0}, "must be above 0"),
        ({"min_count": 0}, "must be above 0"),
        ({"test_fraction": 0.2}, "the last invoice of every customer tests: set test_fraction=0"),
        ({"num_folds": 5}, "the last invoice of every customer tests"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sectors.get("retail", options)


# ---------------------------------------------------------------- the published file


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    try:
        return Retail().read(Retail().files())
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def found(published: pd.DataFrame) -> Pooled:
    return Retail().pool(published)


def test_2845_customers_have_their_last_invoice_held_out_whole(published: pd.DataFrame, found: Pooled) -> None:
    lines = purchases(published)
    assert lines["customer"].nunique() == 4339
    assert found.split is not None
    tests = found.split == TEST
    assert tests.sum() == len(np.unique(found.keys["customer"])) == 2845
    # every line of the last invoice is in the row that tests, and in no other
    last = lines.groupby("customer").tail(1).merge(lines, on=["customer", "invoice"], suffixes=("", "_all"))
    expected = last.groupby("customer")["code_all"].agg(lambda codes: set(map(bucket_of, codes)))
    baskets = take(found.rows, np.flatnonzero(tests))["y"]
    for customer, held_out in zip(found.keys["customer"][tests].tolist(), baskets, strict=True):
        assert set(held_out[held_out > 0].tolist()) == expected[customer]


def test_the_eight_owners_of_the_published_file_are_those_of_the_shipped_federation(found: Pooled) -> None:
    owners = Retail().owners(found, len(load(["sector=retail", "nodes=countries"]).nodes.expand()))
    test_rows = [int(((owners == owner) & (found.split == TEST)).sum()) for owner in range(8)]
    assert test_rows == [2570, 68, 59, 18, 18, 15, 12, 85]


# ---------------------------------------------------------------- generated rows


def test_generated_customers_fill_the_shipped_federation() -> None:
    for seed in range(2):
        sector = Retail(split_seed=seed)
        pooled_rows = sector.pool(sector.generate())
        assert (np.bincount(sector.owners(pooled_rows, 8), minlength=8) > 0).all()
    assert any(number.startswith("C") for number in sector.generate()["InvoiceNo"])
    assert sector.generate()["CustomerID"].isna().any()


def test_the_shipped_recipe_learns_from_generated_rows() -> None:
    config = load(["experiment=retail", "data=synthetic"])
    sector = sectors.get("retail", config.sector.options)
    data = sector.load(Place(0, 1, synthetic=True))
    fitted = sector.fitted_on(data.train)
    params = initial_arrays(fitted, 0)
    recipe = replace(config.sector.training, epochs=config.rounds)
    trained = training.train(fitted, recipe, params, data.train, seed=0).arrays
    before, after = (fitted.metrics(training.evaluate(fitted, p, data.test)) for p in (params, trained))
    assert before["hr10"] < 0.2
    assert after["hr10"] > 0.35


def test_a_customer_knows_their_invoices_only(published: pd.DataFrame) -> None:
    few = published[published["CustomerID"].isin([12347, 17850])]
    found = {customer.number: customer for customer in customers(few)}
    assert len(found[12347].invoices) == 7
    assert found[12347].country == "Iceland"
