"""Next purchases between countries: which codes are in a customer's next invoice.

UCI Online Retail (CC BY 4.0): 541,909 lines of a British wholesaler of gifts, December 2010 to December 2011.  Lines
without a customer are dropped, and so are cancellations (invoices that start with C).  Of the 4,339 customers left
2,845 have two invoices or more.  A row is an invoice with an earlier one of its customer: x is what the customer
bought before, y the codes of the invoice.  A first invoice has nothing to go by and is history only.

Protocol.  The last *invoice* of each of the 2,845 customers tests; holding out the last line would leak, since lines of
one invoice resemble each other.  Every code of the held-out invoice is a target in turn, all codes of the training rows
are ranked, those bought before included, and HR@10 and NDCG@10 are means over the invoice's different codes, then over
customers.  A code that no training row holds is a miss.  Popularity (lines of all earlier invoices) has HR@10 0.036,
item-kNN (cosine between invoices, 50 neighbours, an item is not its own) 0.083; what a customer bought most often, no
model at all, has 0.192: customers buy again.  `python -m experiments.studies.retail_baselines` prints all three.

Codes.  A server has no files, and need not learn whose codes are whose: sums can be masked.  So a code is one of 65,423
*buckets*, by arithmetic that gives the 3,958 published codes as many different ones; the statistics round counts in how
many training rows each bucket was bought, and the *vocabulary* is the buckets bought in `min_count` rows or more.  The
model has one *place* for each of them, and recommends nothing else.

Model.  A code's score is how often it is bought, plus the agreement of its factors with those of the history (FISM),
plus, where it was bought before, a term for how long ago, how often, and how much this code is bought again.
Chen et al., 2012, https://doi.org/10.1057/dbm.2012.17; FISM: Kabbur et al., KDD 2013,
https://doi.org/10.1145/2487575.2487589; buying again: Hu et al., SIGIR 2020, https://doi.org/10.1145/3397271.3401066
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from sectors import files, partition, schema
from sectors.base import TEST, TRAIN, VALIDATION, Batch, Pooled, Rows, Sector, num_rows
from sectors.schema import Column
from trellis.errors import ConfigError, DataError
from trellis.types import Counts, MetricSpec
from trellis.vectors import CountSpec

NUM_BUCKETS = 65_423
STRIDE = 30_494
SALT = 1
"""Found by search: with these no two of the 3,958 published codes share a bucket."""
NUM_FOLDED = 4096
"""Places of a model whose vocabulary is not fitted: buckets share them, so it is for trying things out only."""

BASKET = 600
"""Different codes of an invoice that count; the longest published one has 541."""
CHANNELS = 4
"""Of a code in the history: bucket (0: none), invoices since, invoices that held it, days since."""
TOP = 10
NEXT_DAYS = 30
"""Where the day of the next purchase is not known: so many days after the last (median 18 in training, 41 in test)."""

MOST_INVOICES = 16
DAYS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Borders of the bins that days fall in; invoices have a bin each, up to MOST_INVOICES."""

UNIT = 2**20
"""Shares are counted in such parts of one: integers add up to the same in any order."""

PARTITIONS = ("country", "uniform")
MINUTES_A_DAY = 24 * 60


@dataclass(frozen=True)
class Retail(Sector):
    """Ten codes for a customer's next invoice."""

    name: ClassVar[str] = "retail"
    title: ClassVar[str] = "Retail: which codes a customer buys next (UCI Online Retail)"
    primary: ClassVar[MetricSpec] = MetricSpec("hr10", "max")
    metric_specs: ClassVar[tuple[MetricSpec, ...]] = (MetricSpec("hr10", "max"), MetricSpec("ndcg10", "max"))
    data_files: ClassVar[tuple[str, ...]] = ("retail/online_retail.csv",)
    schema: ClassVar[tuple[Column, ...]] = (
        Column("InvoiceNo", kind="text"),
        Column("StockCode", kind="text"),
        Column("InvoiceDate", kind="text"),
        Column("CustomerID", low=1, high=2**53, integer=True, optional=True),
        Column("Country", kind="text"),
    )
    fitted_options: ClassVar[tuple[str, ...]] = ("vocabulary",)
    identifier: ClassVar[str | None] = "CustomerID"
    head: ClassVar[tuple[str, ...]] = ("head.*",)

    partition: str = "country"
    """country: every country with `min_customers` or more is a node, most customers first, the others are the last
    one; uniform: customers at random."""
    min_customers: int = 10
    """With two invoices or more."""
    history: int = 128
    """Codes that a row remembers, the last bought first."""
    factors: int = 16
    min_count: int = 2
    """Training rows that must hold a code for it to be recommended: one invoice alone names nobody."""
    max_codes: int = 8192
    """The most that are recommended, those bought most: no node's list makes the model larger."""
    validation_fraction: float = 0.2
    """Share of the customers of three invoices or more whose last but one validates."""
    test_fraction: float = 0.0
    """Always 0: the last invoice of every customer tests."""
    synthetic_rows: int = 12_000
    """About so many lines."""
    vocabulary: str = ""
    """Bitmap of the buckets that have a place, in hexadecimal; empty until it is fitted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise ConfigError(f"sector retail: no partition {self.partition!r}; there are {', '.join(PARTITIONS)}")
        sizes = (self.min_customers, self.history, self.factors, self.min_count, self.max_codes, self.synthetic_rows)
        if min(sizes) < 1:
            raise ConfigError(
                "sector retail: min_customers, history, factors, min_count, max_codes, synthetic_rows must be above 0"
            )
        if self.test_fraction or self.num_folds:
            raise ConfigError(
                "sector retail: the last invoice of every customer tests: set test_fraction=0 and num_folds=0"
            )
        if self.vocabulary and not _is_bitmap(self.vocabulary):
            raise ConfigError(
                f"sector retail: vocabulary must be {_BITMAP_CHARACTERS} hexadecimal digits with a bit that is set, or "
                f"empty; found {len(self.vocabulary)} characters"
            )

    def files(self) -> tuple[Path, ...]:
        return (files.find(self.data_files, "UCI Online Retail", "https://doi.org/10.24432/C5BW33"),)

    def read(self, paths: tuple[Path, ...]) -> pd.DataFrame:
        return files.read_csv(paths[0], self.schema)

    def units(self, table: pd.DataFrame) -> npt.NDArray[np.int64]:
        """The customer of each line; -1 where there is none."""
        return table["CustomerID"].fillna(-1).to_numpy(np.int64)

    def pool(self, table: pd.DataFrame) -> Pooled:
        """Invoices with an earlier one of their customer, by customer and time."""
        found = [self._rows_of(customer) for customer in customers(table)]
        x = np.concatenate([np.zeros((0, self.history, CHANNELS), np.int32), *(rows.x for rows in found)])
        y = np.concatenate([np.zeros((0, BASKET), np.int32), *(rows.y for rows in found)])
        if not len(x):
            raise DataError("the table of purchases has no customer with two invoices: nothing can be predicted")
        lengths = [len(rows.x) for rows in found]
        keys = {
            "customer": np.repeat([rows.customer for rows in found], lengths),
            "country": np.repeat([rows.country for rows in found], lengths),
        }
        return Pooled({"x": x, "y": y}, keys, np.concatenate([rows.split for rows in found]))

    def owners(self, pooled: Pooled, num_parts: int) -> npt.NDArray[np.int64]:
        customer, first, of_row = np.unique(pooled.keys["customer"], return_index=True, return_inverse=True)
        if self.partition == "uniform":
            return partition.uniform(len(customer), num_parts, self.rng("partition"))[of_row]
        owner = self._country_owner(pooled.keys["country"][first])[of_row]
        what = f"owners (countries of {self.min_customers} customers or more, and the rest): set partition=uniform"
        return partition.by_owner(owner, num_parts, what)

    def groups(self, pooled: Pooled) -> npt.NDArray[np.int64]:
        """Every invoice alone: two customers may have bought the same, and neither is a repeat of the other."""
        return np.arange(num_rows(pooled.rows))

    def labels(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Zeros: there is nothing to stratify by."""
        return np.zeros(num_rows(rows), np.int64)

    def features(self, table: pd.DataFrame) -> Rows:
        """x (n, history, 4) of the customers in ascending order, for the purchase after all of theirs in the table."""
        schema.check(table, self.schema, "the table of purchases")
        many = list(customers(table))
        x = np.zeros((len(many), self.history, CHANNELS), np.int32)
        for i, customer in enumerate(many):
            history = _History()
            for number, invoice in enumerate(customer.invoices):
                history.add(invoice, number)
            last = customer.invoices[-1]
            history.write(x[i], len(customer.invoices), last.minute + NEXT_DAYS * MINUTES_A_DAY)
        return {"x": x}

    def statistic_specs(self) -> tuple[CountSpec, ...]:
        return (CountSpec("bought", (NUM_BUCKETS,), "int64", per_row=BASKET),)

    def statistics(self, rows: Rows) -> Counts:
        """`bought` (65,423,): rows whose invoice holds a code of the bucket."""
        y = rows["y"]
        return {"bought": np.bincount(y[y > 0] - 1, minlength=NUM_BUCKETS).astype(np.int64)}

    def statistics_problem(self, counts: Counts) -> str | None:
        """No code is bought in more rows than there are."""
        most, rows = int(counts["bought"].max()), int(counts["rows"])  # type: ignore[arg-type]
        return f"a code bought in {most} of {rows} rows" if most > rows else None

    def fit(self, totals: Counts) -> dict[str, Any]:
        """The vocabulary: buckets bought in `min_count` rows, or once where that leaves none; at most `max_codes`."""
        bought = totals["bought"].astype(np.int64)
        kept = bought >= min(self.min_count, max(int(bought.max()), 1))
        kept[np.argsort(-bought, kind="stable")[self.max_codes :]] = False
        return {"vocabulary": np.packbits(kept).tobytes().hex() if kept.any() else ""}

    def build_model(self) -> nn.Module:
        num_places = len(_buckets(self.vocabulary)) if self.vocabulary else NUM_FOLDED
        return NextPurchase(num_places, self.factors)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of all places.  -> (B, P)"""
        x = batch["x"].long()
        outputs: Tensor = model(self._places(x[..., 0]), x[..., 1], x[..., 2], x[..., 3])
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the invoice's codes that have a place, the mean over them; 0 where none has.  -> (B,)"""
        held = self._held(outputs, batch)
        num_held = held.sum(dim=1)
        mean_score = (outputs * held).sum(dim=1) / num_held.clamp(min=1.0)
        return (outputs.logsumexp(dim=1) - mean_score) * (num_held > 0)

    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        """`hits` and `gain` in 2^-20: share of the invoice's codes in the first ten, and that by rank; `invoices`."""
        top = outputs.detach().nan_to_num(nan=-1e30).topk(min(TOP, outputs.shape[1]), dim=1).indices
        hit = self._held(outputs, batch).gather(1, top).double()
        num_codes = (batch["y"] > 0).sum(dim=1).clamp(min=1)
        discount = 1.0 / torch.arange(2, top.shape[1] + 2, device=hit.device, dtype=torch.float64).log2()
        shares = {"hits": hit.sum(dim=1) / num_codes, "gain": (hit * discount).sum(dim=1) / num_codes}
        summed = {k: (share * UNIT).round().long().sum().cpu().numpy() for k, share in shares.items()}
        return {**summed, "invoices": np.asarray(len(top), np.int64)}

    def count_specs(self) -> tuple[CountSpec, ...]:
        shares = (CountSpec("hits", (), "int64", per_row=UNIT), CountSpec("gain", (), "int64", per_row=UNIT))
        return (*shares, CountSpec("invoices", (), "int64"))

    def counts_problem(self, counts: Counts) -> str | None:
        invoices, rows = int(counts["invoices"]), int(counts["rows"])
        return f"{invoices} invoices in {rows} rows" if invoices != rows else None

    def metrics(self, counts: Counts) -> dict[str, float]:
        """HR@10 and NDCG@10, means over invoices."""
        total = int(counts["invoices"]) * UNIT if counts else 0
        return {"hr10": int(counts["hits"]) / total, "ndcg10": int(counts["gain"]) / total} if total else {}

    def predict(self, outputs: Tensor) -> npt.NDArray[np.int64]:
        """Buckets of the ten codes to recommend, best first, (B, 10); `codes_of` names them."""
        top = outputs.detach().topk(min(TOP, outputs.shape[1]), dim=1).indices.cpu().numpy()
        return _buckets(self.vocabulary)[top] if self.vocabulary else top + 1

    def generate(self) -> pd.DataFrame:
        """Customers who buy from a few ranges of goods, each again and again; codes of one range go together."""
        return _generated(self.rng("synthetic"), self.synthetic_rows)

    def _places(self, buckets: Tensor) -> Tensor:
        """Buckets (0: none) -> places 1..P, 0 for none."""
        return _place_of(self.vocabulary).to(buckets.device)[buckets]

    def _held(self, outputs: Tensor, batch: Batch) -> Tensor:
        """1 where the invoice holds the code of a place.  -> (B, P)"""
        held = outputs.new_zeros(len(outputs), outputs.shape[1] + 1)
        return held.scatter_(1, self._places(batch["y"].long()), 1.0)[:, 1:]

    def _rows_of(self, customer: Customer) -> _CustomerRows:
        n = len(customer.invoices) - 1
        x, y = np.zeros((n, self.history, CHANNELS), np.int32), np.zeros((n, BASKET), np.int32)
        history = _History()
        for number, invoice in enumerate(customer.invoices):
            if number:
                history.write(x[number - 1], number, invoice.minute)
                basket = invoice.buckets[:BASKET]
                y[number - 1, : len(basket)] = basket
            history.add(invoice, number)
        return _CustomerRows(customer.number, customer.country, x, y, self._split_of(customer.number, n))

    def _split_of(self, customer: int, n: int) -> npt.NDArray[np.int8]:
        """The last of a customer's n rows tests; of some customers the one before it validates."""
        split = np.full(n, TRAIN, np.int8)
        split[n - 1 :] = TEST
        if n > 1 and self.rng("validation", customer).random() < self.validation_fraction:
            split[n - 2] = VALIDATION
        return split

    def _country_owner(self, country: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Countries of customers -> owners: by customers, most first, then by name; small ones are the last owner."""
        names, of_customer, num = np.unique(country, return_inverse=True, return_counts=True)
        large = np.flatnonzero(num >= self.min_customers)
        owner = np.full(len(names), len(large), np.int64)
        owner[large[np.argsort(-num[large], kind="stable")]] = np.arange(len(large))
        return owner[of_customer]


class NextPurchase(nn.Module):
    """Scores of P places from a history of L of them.  Place 0 is empty and scores nothing."""

    def __init__(self, num_places: int, factors: int) -> None:
        super().__init__()
        self.bought = _table(num_places + 1, factors, std=0.1)
        self.attention = _Recency()
        self.again = _Recency()
        self.again_of = _table(num_places + 1, 1)
        self.head = nn.Linear(factors, num_places)
        nn.init.normal_(self.head.weight, std=0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, places: Tensor, invoices_ago: Tensor, times: Tensor, days_ago: Tensor) -> Tensor:
        """Four of (B, L) -> (B, P)"""
        known = (places > 0).float()
        weight = self.attention(invoices_ago, times, days_ago).clamp(-10.0, 10.0).exp() * known
        mean = (self.bought(places) * weight.unsqueeze(-1)).sum(dim=1) / (1.0 + weight.sum(dim=1, keepdim=True))
        again = (self.again(invoices_ago, times, days_ago) + self.again_of(places).squeeze(-1)) * known
        scores: Tensor = self.head(mean)
        return scores + scores.new_zeros(len(scores), scores.shape[1] + 1).scatter_add(1, places, again)[:, 1:]


class _Recency(nn.Module):
    """A number for how many invoices ago, in how many of them and how many days ago a code was bought."""

    def __init__(self) -> None:
        super().__init__()
        self.invoices_ago = _table(MOST_INVOICES + 1, 1)
        self.times = _table(MOST_INVOICES + 1, 1)
        self.days_ago = _table(len(DAYS) + 1, 1)

    def forward(self, invoices_ago: Tensor, times: Tensor, days_ago: Tensor) -> Tensor:
        """Three of (B, L) -> (B, L)"""
        bins = torch.bucketize(days_ago.contiguous(), torch.tensor(DAYS, device=days_ago.device), right=True)
        of_invoices = self.invoices_ago(invoices_ago.clamp(0, MOST_INVOICES))
        summed: Tensor = of_invoices + self.times(times.clamp(0, MOST_INVOICES)) + self.days_ago(bins)
        return summed.squeeze(-1)


def _table(rows: int, width: int, std: float = 0.0) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=std)
    return table


@dataclass(frozen=True, slots=True)
class Invoice:
    """Its different codes in the order of its lines, as buckets, and when it was written."""

    minute: int
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Customer:
    """A customer's invoices by time, and the country of the first."""

    number: int
    country: str
    invoices: tuple[Invoice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _CustomerRows:
    customer: int
    country: str
    x: npt.NDArray[np.int32]
    y: npt.NDArray[np.int32]
    split: npt.NDArray[np.int8]


class _History:
    """What a customer bought so far, by bucket: in which invoice last, in how many, when last."""

    def __init__(self) -> None:
        self._bought: dict[int, tuple[int, int, int]] = {}

    def add(self, invoice: Invoice, number: int) -> None:
        for bucket in invoice.buckets:
            _, times, _ = self._bought.pop(bucket, (0, 0, 0))
            # at the end again: the dict stays in the order of the last purchase
            self._bought[bucket] = (number, times + 1, invoice.minute)

    def write(self, slots: npt.NDArray[np.int32], number: int, minute: int) -> None:
        """The last bought codes into `slots` (L, 4), seen from invoice `number` at `minute`."""
        newest = islice(reversed(self._bought.items()), len(slots))
        known = [(b, number - last, times, (minute - at) // MINUTES_A_DAY) for b, (last, times, at) in newest]
        slots[: len(known)] = known


def purchases(table: pd.DataFrame) -> pd.DataFrame:
    """Lines with a customer that are no cancellation: customer, time, invoice, code, country.

    By customer, then time of the invoice (its first line's), then its number; lines of one invoice keep their order.
    Raises DataError where a date cannot be read.
    """
    numbers = table["InvoiceNo"].astype(str).str.strip().str.upper()
    kept = table["CustomerID"].notna() & ~numbers.str.startswith("C")
    lines = pd.DataFrame(
        {
            "customer": table.loc[kept, "CustomerID"].astype(np.int64),
            "time": _times(table.loc[kept, "InvoiceDate"]),
            "invoice": numbers[kept],
            "code": table.loc[kept, "StockCode"].astype(str).str.strip().str.upper(),
            "country": table.loc[kept, "Country"],
        }
    )
    lines["time"] = lines.groupby(["customer", "invoice"], sort=False)["time"].transform("min")
    return lines.sort_values(["customer", "time", "invoice"], kind="stable", ignore_index=True)


def customers(table: pd.DataFrame) -> Iterator[Customer]:
    """The customers of a raw table in ascending order, with all of their invoices that are no cancellations."""
    lines = purchases(table)
    buckets = lines["code"].map({code: bucket_of(code) for code in lines["code"].unique()})
    lines = lines.assign(bucket=buckets).drop_duplicates(["customer", "invoice", "bucket"])
    minutes = lines["time"].to_numpy("datetime64[m]").astype(np.int64)
    number, bucket, country = lines["customer"].to_numpy(), lines["bucket"].to_numpy(), lines["country"].to_numpy()
    new_customer = _changes(number)
    starts = np.flatnonzero(new_customer | _changes(lines["invoice"].to_numpy()))
    invoices = [Invoice(int(minutes[a]), tuple(bucket[a:b].tolist())) for a, b in pairwise([*starts, len(lines)])]
    for a, b in pairwise([*np.flatnonzero(new_customer[starts]), len(starts)]):
        line = starts[a]
        yield Customer(int(number[line]), str(country[line]), tuple(invoices[a:b]))


def _changes(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each value differs from the one before it; the first does."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _times(values: pd.Series) -> pd.Series:
    """2010-12-01 08:26 as here, or 12/1/2010 8:26 (month first) as other copies of the file have it."""
    try:
        times = pd.to_datetime(values, format="ISO8601", errors="coerce")
        odd = times.isna()
        if odd.any():
            times[odd] = pd.to_datetime(values[odd], format="%m/%d/%Y %H:%M", errors="coerce")
    except ValueError as error:
        raise DataError(f"column InvoiceDate of the purchases cannot be read as dates: {error}") from error
    if (bad := times.isna()).any():
        raise DataError(
            f"column InvoiceDate of the purchases holds {values[bad].iloc[0]!r} ({int(bad.sum())} of {len(values)} "
            "lines): needed are dates such as 2010-12-01 08:26 or 12/1/2010 8:26"
        )
    return times


_PUBLISHED = re.compile(r"(\d{5})([A-Z]*)")


@lru_cache(maxsize=1 << 16)
def bucket_of(code: str) -> int:
    """1..65423 for a stock code; 85123a and 85123A are one.  No two published codes share a bucket.

    Five digits and letters are arithmetic, which keeps the densely numbered codes apart; POST and the like are hashed.
    """
    normal = code.strip().upper()
    parts = _PUBLISHED.fullmatch(normal)
    if parts is None:
        return 1 + zlib.crc32(normal.encode(), SALT) % NUM_BUCKETS
    variant = 0
    for letter in parts[2]:
        variant = variant * 27 + ord(letter) - ord("A") + 1
    return 1 + (int(parts[1]) + STRIDE * variant) % NUM_BUCKETS


def codes_of(buckets: npt.NDArray[np.int64], catalogue: list[str]) -> npt.NDArray[np.str_]:
    """Buckets as codes of one's own catalogue; "" where it has none."""
    known = {bucket_of(code): code for code in catalogue}
    return np.array([known.get(int(b), "") for b in buckets.reshape(-1)], dtype=np.str_).reshape(buckets.shape)


_BITMAP_CHARACTERS = 2 * -(-NUM_BUCKETS // 8)


def _is_bitmap(vocabulary: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{_BITMAP_CHARACTERS}}}", vocabulary) is not None and len(_buckets(vocabulary)) > 0


@lru_cache(maxsize=64)
def _buckets(vocabulary: str) -> npt.NDArray[np.int64]:
    """The bucket of each place, ascending, (P,)."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(vocabulary), np.uint8), count=NUM_BUCKETS)
    return np.flatnonzero(bits) + 1


@lru_cache(maxsize=64)
def _place_of(vocabulary: str) -> Tensor:
    """The place 1..P of each bucket, 0 for none, (65424,)."""
    if not vocabulary:
        place = 1 + np.arange(-1, NUM_BUCKETS) % NUM_FOLDED
        place[0] = 0
        return torch.from_numpy(place)
    place = np.zeros(NUM_BUCKETS + 1, np.int64)
    buckets = _buckets(vocabulary)
    place[buckets] = np.arange(1, len(buckets) + 1)
    return torch.from_numpy(place)


_COUNTRIES = ("United Kingdom", "Germany", "France", "Belgium", "Spain", "Switzerland", "Portugal", "Norway", "Italy")
_SHARES = (0.51, 0.11, 0.09, 0.07, 0.06, 0.055, 0.05, 0.03, 0.025)
_RANGES, _RANGE_SIZE = 15, 12
"""Of generated goods: so many ranges of so many codes each."""
_LINES_A_CUSTOMER = 27


def _generated(rng: np.random.Generator, num_lines: int) -> pd.DataFrame:
    """About `num_lines` lines with the published columns, by time as in the file."""
    num_customers = max(2, num_lines // _LINES_A_CUSTOMER)
    # dealt in these shares, not drawn: every country has its customers whatever the seed
    country = np.searchsorted(np.cumsum(_SHARES)[:-1], (np.arange(num_customers) + 0.5) / num_customers)
    invoices = [one for c in range(num_customers) for one in _invoices(rng, 12_346 + c, _COUNTRIES[country[c]])]
    invoices.sort(key=lambda one: one[0])
    lines = [
        (f"{'C' if cancelled else ''}{536_365 + i}", code, -1 if cancelled else 6, minute, 2.55, customer, country)
        for i, (minute, customer, country, codes, cancelled) in enumerate(invoices)
        for code in codes
    ]
    names = ["InvoiceNo", "StockCode", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
    table = pd.DataFrame(lines, columns=names)
    start = pd.Timestamp("2010-12-01 08:26")
    table["InvoiceDate"] = (start + pd.to_timedelta(table["InvoiceDate"], unit="min")).dt.strftime("%Y-%m-%d %H:%M")
    return table.astype({"CustomerID": np.float64, "Quantity": np.int64})


def _invoices(
    rng: np.random.Generator, customer: int, country: str
) -> Iterator[tuple[int, float, str, list[str], bool]]:
    """Minute, customer (NaN: not known), country, codes, whether cancelled: of one customer's invoices.

    Goods come from three ranges, each invoice from one of them; codes early in a range are bought more.
    """
    ranges = rng.choice(_RANGES, 3, replace=False)
    liking = rng.gamma(0.3, 1.0, (3, _RANGE_SIZE)) / np.arange(1, _RANGE_SIZE + 1) + 1e-3
    minute = int(rng.integers(0, 90 * MINUTES_A_DAY))
    for _ in range(rng.integers(2, 8)):
        which = rng.integers(3)
        likely = liking[which] / liking[which].sum()
        goods = rng.choice(_RANGE_SIZE, int(rng.integers(3, 7)), replace=False, p=likely)
        codes = [f"{22_000 + 40 * ranges[which] + g // 2}{'' if g % 2 else 'A'}" for g in goods.tolist()]
        unknown, cancelled = rng.random(2) < (0.1, 0.03)
        yield minute, float("nan") if unknown else float(customer), country, codes, bool(cancelled)
        minute += int(rng.integers(MINUTES_A_DAY, 60 * MINUTES_A_DAY))
