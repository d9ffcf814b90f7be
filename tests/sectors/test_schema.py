"""What a file must look like, and what is said of one that does not: file, column, row, value."""

from __future__ import annotations

import gzip
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sectors
from sectors import files, schema
from sectors.schema import Column
from trellis.errors import DataError, MissingData

PATIENTS = (
    Column("age", "years", low=0, high=120),
    Column("sex", categories=(0, 1)),
    Column("chol", "mg/dl", low=50, high=700, missing=(0,), optional=True),
    Column("ward", categories=("north", "south"), kind="text"),
    Column("note", kind="text", optional=True),
    Column("visits", low=0, integer=True),
)
GOOD = {"age": 63.5, "sex": 1, "chol": 233, "ward": "north", "note": "seen", "visits": 4}


def patients(*changes: dict[str, Any]) -> pd.DataFrame:
    """Good rows, one a change, with the change in it."""
    return pd.DataFrame([{**GOOD, **change} for change in changes])


def said(table: schema.Table, columns: tuple[Column, ...] = PATIENTS) -> str:
    with pytest.raises(DataError) as caught:
        schema.check(table, columns, "clinic.csv")
    return str(caught.value)


# ---------------------------------------------------------------- one problem at a time


def test_good_rows_pass_with_missing_values_where_they_may_be() -> None:
    schema.check(patients({}, {"chol": np.nan, "note": None}, {"chol": 0, "note": " "}), PATIENTS, "clinic.csv")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "old", "non-numeric values in column age (first row 2: 'old')"),
        ("age", np.inf, "infinite values in column age (1 of 3 rows, first row 2: inf)"),
        ("age", np.nan, "empty values in column age (1 of 3 rows, first row 2: nan)"),
        ("age", 336.7, "values outside 0 to 120 years in column age (1 of 3 rows, first row 2: 336.7): check the unit"),
        ("age", -1, "values outside 0 to 120 years in column age (1 of 3 rows, first row 2: -1): check the unit"),
        ("sex", 2, "values outside one of 0, 1 in column sex (1 of 3 rows, first row 2: 2)"),
        ("chol", 6.2, "values outside 50 to 700 mg/dl in column chol (1 of 3 rows, first row 2: 6.2): check the unit"),
        ("visits", 2.5, "values that are no whole numbers in column visits (1 of 3 rows, first row 2: 2.5)"),
        ("visits", -2, "values outside at least 0 in column visits (1 of 3 rows, first row 2: -2)"),
        ("ward", "west", "'west' in column ward (row 2), which must be one of north, south"),
        ("ward", "", "empty values in column ward (1 of 3 rows, first row 2)"),
        ("ward", None, "empty values in column ward (1 of 3 rows, first row 2)"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_said_with_file_column_row_and_value(
    column: str, value: Any, message: str
) -> None:
    assert said(patients({}, {column: value}, {})) == f"clinic.csv holds {message}"


def test_a_column_that_is_not_there_is_said_with_all_that_are_needed() -> None:
    message = said(patients({}).drop(columns=["chol", "visits"]))
    assert message == "clinic.csv has no column chol, visits; needed are age, sex, chol, ward, note, visits"


def test_a_column_without_a_unit_gets_no_hint_about_units() -> None:
    assert "unit" not in said(patients({"sex": 3}))
    assert "unit" not in said(patients({"visits": -1}))


def test_more_columns_than_the_declared_are_no_trouble() -> None:
    schema.check(patients({}).assign(remarks="any", extra=np.nan), PATIENTS, "clinic.csv")


def test_several_columns_are_mended_in_one_go() -> None:
    message = said(patients({}, {"age": 400, "sex": 7}, {"sex": 8, "ward": "west", "visits": 0.5}))
    assert message.startswith("clinic.csv holds ")
    for part in (
        "column age (1 of 3 rows, first row 2: 400)",
        "column sex (2 of 3 rows, first row 2: 7)",
        "'west' in column ward (row 3)",
        "whole numbers in column visits (1 of 3 rows, first row 3: 0.5)",
    ):
        assert part in message


def test_of_very_many_bad_columns_five_are_shown_and_the_rest_counted() -> None:
    columns = tuple(Column(f"V{i}", high=1) for i in range(9))
    message = said({c.name: np.array([2.0]) for c in columns}, columns)
    assert message.count("in column") == 5
    assert message.endswith("; and 4 columns more")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (Column("c", "K", low=0), "at least 0 K"),
        (Column("c", high=2.5), "at most 2.5"),
        (Column("c", "mm", low=-5, high=10), "-5 to 10 mm"),
        (Column("c", categories=(3, 6, 7)), "one of 3, 6, 7"),
        (Column("c", "K"), ""),
    ],
)
def test_a_range_in_words(column: Column, words: str) -> None:
    assert column.range == words


# ---------------------------------------------------------------- values that are missing


def test_an_optional_number_may_be_empty_and_never_out_of_range() -> None:
    column = (Column("bp", "mm Hg", low=50, high=300, optional=True),)
    schema.check({"bp": np.array([np.nan, 120.0])}, column, "o")
    assert "first row 2: 1200" in said({"bp": np.array([np.nan, 1200.0])}, column)


def test_a_code_for_not_measured_is_no_value_and_zero_is_refused_without_one() -> None:
    coded = (Column("bp", "mm Hg", low=50, high=300, missing=(0, -9), optional=True),)
    for table in ({"bp": np.array([0, -9, 120])}, {"bp": np.array([0.0, -9.0, 120.0, np.nan])}):
        schema.check(table, coded, "o")
    assert "first row 3: -8" in said({"bp": np.array([0, -9, -8])}, coded)
    plain = (replace(coded[0], missing=()),)
    assert "(2 of 3 rows, first row 1: 0)" in said({"bp": np.array([0, -9, 120])}, plain)


def test_codes_become_nan_in_their_own_column_only_and_the_table_is_not_changed() -> None:
    table = pd.DataFrame({"bp": [0, 120, -9], "ca": [0, 1, -9]})
    clean = schema.without_codes(table, (Column("bp", missing=(0, -9)), Column("ca")))
    assert clean["bp"].isna().tolist() == [True, False, True]
    assert clean["ca"].tolist() == [0, 1, -9]
    assert table["bp"].tolist() == [0, 120, -9]


def test_a_category_may_have_a_code_for_not_measured() -> None:
    column = (Column("thal", categories=(3, 6, 7), missing=(0,), optional=True),)
    schema.check({"thal": np.array([0.0, 3.0, np.nan])}, column, "o")
    assert "first row 2: 5" in said({"thal": np.array([0, 5])}, column)


@pytest.mark.parametrize("values", [[np.nan, np.nan], [None, None]])
def test_an_optional_column_may_be_empty_from_top_to_bottom(values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "clinic.csv"
    table = patients({}, {}).assign(chol=values, note=values)
    table.to_csv(path, index=False)
    assert files.read_csv(path, PATIENTS)["chol"].isna().all()


# ---------------------------------------------------------------- arrays


IMAGE = (Column("image", "grey levels", low=0, high=255, shape=(4, 3)), Column("label", categories=(0, 1)))


def images(*shape: int, dtype: Any = np.uint8) -> dict[str, Any]:
    return {"image": np.zeros(shape, dtype), "label": np.zeros(shape[0], np.uint8)}


def test_an_image_of_another_shape_is_refused_with_both_shapes() -> None:
    schema.check(images(2, 4, 3), IMAGE, "scans.npz")
    for shape in ((2, 3, 4), (2, 4, 3, 1), (2, 4), (2,)):
        message = said(images(*shape), IMAGE)
        assert message == f"clinic.csv holds values of shape {shape[1:]} in column image, needed is (4, 3)"


def test_one_bad_pixel_is_said_with_its_image_and_value() -> None:
    table = images(3, 4, 3, dtype=np.float32)
    table["image"][1, 2, 2] = 256
    assert "0 to 255 grey levels in column image (1 of 3 rows, first row 2: 256)" in said(table, IMAGE)
    table["image"][2, 0, 0] = np.nan
    assert "empty values in column image (1 of 3 rows, first row 3: nan)" in said(table, IMAGE)


def test_an_array_where_a_number_is_declared_is_refused() -> None:
    said({"age": np.ones((3, 2))}, (Column("age", low=0),))


@pytest.mark.parametrize("column", [Column("image", shape=(4, 3)), Column("image", low=1)])
def test_a_scalar_is_no_column(column: Column) -> None:
    said({"image": np.array(0.5)}, (column,))


def test_columns_of_unequal_length_are_refused() -> None:
    said({"image": np.zeros((3, 4, 3)), "label": np.zeros(2)}, IMAGE)


# ---------------------------------------------------------------- laws


@given(
    rows=st.lists(st.floats(0, 120) | st.just(float("nan")), min_size=1, max_size=20),
    bad=st.lists(st.floats(121, 1e9) | st.just(float("inf")) | st.floats(-1e9, -1), max_size=4),
    seed=st.integers(0, 100),
)
def test_the_first_bad_row_is_named_wherever_it_is_and_good_rows_pass(
    rows: list[float], bad: list[float], seed: int
) -> None:
    column = (Column("age", "years", low=0, high=120, optional=True),)
    values = np.random.default_rng(seed).permutation([*rows, *bad])
    if not bad:
        schema.check({"age": values}, column, "o")
        return
    infinite = np.isinf(values)
    wrong = infinite if infinite.any() else (values < 0) | (values > 120)
    first = int(wrong.argmax())
    assert f"({wrong.sum()} of {len(values)} rows, first row {first + 1}: {values[first]:g})" in said(
        {"age": values}, column
    )


@given(seed=st.integers(0, 1000))
def test_a_table_and_a_dict_of_arrays_are_judged_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = patients(*({} for _ in range(5)))
    column = rng.choice(["age", "sex", "chol", "visits"])
    table[column] = table[column].astype(float).where(rng.random(5) < 0.7, rng.choice([1e6, np.nan, np.inf, 0.25]))

    def judged(given: schema.Table) -> str:
        try:
            schema.check(given, PATIENTS, "o")
        except DataError as error:
            return str(error)
        return ""

    assert judged(table) == judged({k: table[k].to_numpy() for k in table})


# ---------------------------------------------------------------- the digest

CHANGED: dict[str, Any] = {
    "name": "years",
    "unit": "months",
    "low": 1,
    "high": 130,
    "categories": (0, 1),
    "missing": (-9,),
    "optional": True,
    "integer": True,
    "kind": "text",
    "shape": (2,),
}


def test_the_digest_changes_with_every_field() -> None:
    plain = Column("age", "years", low=0, high=120)
    assert set(CHANGED) == {f.name for f in fields(Column)}, "a new field needs a row here"
    changed = [replace(plain, **{name: value}) for name, value in CHANGED.items()]
    assert len({schema.digest([c]) for c in (plain, *changed)}) == len(CHANGED) + 1


def test_the_digest_is_of_all_columns_in_their_order_and_of_nothing_else() -> None:
    a, b = Column("a", low=0), Column("b", high=1)
    assert schema.digest([a, b]) == schema.digest((Column("a", low=0), Column("b", high=1)))
    assert len({schema.digest(s) for s in ([], [a], [b], [a, b], [b, a])}) == 5


def test_no_two_sectors_declare_the_same_columns() -> None:
    digests = [schema.digest(sectors.get(name).schema) for name in sectors.names()]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 64 for d in digests)


# ---------------------------------------------------------------- CSV


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    return str(caught.value)


AGE_SEX = (Column("age", low=0, high=120), Column("sex", categories=(0, 1)))


def test_text_columns_of_a_csv_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "id,age,sex\n007,63,1\n7,64,0\n1e3,65,0\n")
    table = files.read_csv(path, (Column("id", kind="text"), *AGE_SEX))
    assert table["id"].tolist() == ["007", "7", "1e3"]
    assert table["age"].dtype.kind == "i"


def test_a_text_that_reads_na_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "country,age\nNA,63\nDE,64\n")
    table = files.read_csv(path, (Column("country", categories=("DE", "NA"), kind="text"), Column("age")))
    assert table["country"].tolist() == ["NA", "DE"]


def test_a_bare_name_is_a_column_of_finite_numbers(tmp_path: Path) -> None:
    for cell, problem in (("", "empty"), ("inf", "infinite"), ("x", "non-numeric")):
        path = write(tmp_path / f"{problem}.csv", f"a,b\n1,2\n3,{cell}\n")
        message = refused(lambda path=path: files.read_csv(path, ["a", "b"]))
        assert message.startswith(f"{path} holds {problem} values in column b (")
        assert "first row 2" in message


@pytest.mark.parametrize("content", ["", "\n\n", "age,sex", '"age,sex\n1,0', "age,sex\n1,0\n1,0,0\n", b"\xff\xfea\x00"])
def test_a_csv_that_cannot_be_read_is_a_data_error_that_names_it(content: str | bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "clinic.csv", content)
    assert refused(lambda: files.read_csv(path, AGE_SEX)).startswith(str(path))


@pytest.mark.parametrize("rows", ["63,1,0\n64,0,1\n", "63,5,1,0\n64,0,0,1\n"])
def test_rows_longer_than_the_header_are_refused_not_shifted(rows: str, tmp_path: Path) -> None:
    path = write(tmp_path / "clinic.csv", f"age,sex\n{rows}")
    refused(lambda: files.read_csv(path, AGE_SEX))


def test_the_first_bad_row_of_a_csv_is_counted_from_the_first_row_of_data(tmp_path: Path) -> None:
    path = write(tmp_path / "clinic.csv", "age,sex\n63,1\n64,0\n650,1\n")
    assert refused(lambda: files.read_csv(path, AGE_SEX)).startswith(
        f"{path} holds values outside 0 to 120 in column age (1 of 3 rows, first row 3: 650)"
    )


# ---------------------------------------------------------------- tables of numbers


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_a_text_is_unpacked_by_what_it_holds_not_by_its_name(packed: bool, name: str, tmp_path: Path) -> None:
    content = b"1 2.5 -3  \n 4\t5 6\n"
    path = write(tmp_path / name, gzip.compress(content) if packed else content)
    assert files.read_text(path, ["a", "b", "c"]).to_numpy().tolist() == [[1, 2.5, -3], [4, 5, 6]]


@pytest.mark.parametrize("num", [2, 4, 9])
def test_another_number_of_columns_is_refused_with_both_numbers_and_the_first_names(num: int, tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "1 2 3\n4 5 6\n")
    names = [f"c{i}" for i in range(num)]
    message = refused(lambda: files.read_text(path, names))
    assert message.startswith(f"{path} has 3 numbers a line, needed are {num}: {', '.join(names[:6])}")
    assert message.endswith(", ...") is (num > 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 3\n4 5\n", "empty values in column c (1 of 2 rows, first row 2"),
        ("1 2 3\n4 5 6 7\n", "cannot be read as a table of numbers"),
        ("1 2 3\n4 x 6\n", "non-numeric values in column b (first row 2: 'x')"),
        ("a b c\n1 2 3\n", "non-numeric values in column a (first row 1: 'a')"),
        ("1 2 inf\n", "infinite values in column c (1 of 1 rows, first row 1: inf)"),
        ("1 2 NaN\n", "empty values in column c"),
        ("", "cannot be read as a table of numbers"),
        (" \n\n", "cannot be read as a table of numbers"),
        (b"\x00\xff\x01", "cannot be read as a table of numbers"),
    ],
)
def test_a_text_that_is_no_table_of_finite_numbers_is_refused(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.txt", content)
    found = refused(lambda: files.read_text(path, ["a", "b", "c"]))
    assert found.startswith(str(path))
    assert message in found


def test_a_gzip_that_was_cut_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d 2 3\n" % i for i in range(500)))
    path = tmp_path / "train.txt.gz"
    for length in (3, 12, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        write(path, whole[:length])
        assert refused(lambda: files.read_text(path, ["a", "b", "c"])).startswith(
            f"{path} cannot be read as a gzipped table of numbers"
        )


def test_a_gzip_with_a_changed_byte_is_refused_never_half_read(tmp_path: Path) -> None:
    whole, rng = gzip.compress(b"".join(b"%d 2 3\n" % i for i in range(500)), mtime=0), random.Random(0)
    for _ in range(60):
        at = rng.randrange(10, len(whole))
        path = write(tmp_path / "t.txt.gz", whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
        refused(lambda path=path: files.read_text(path, ["a", "b", "c"]))


# ---------------------------------------------------------------- arrays in a file


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


TWO = npz(images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(3))


def test_arrays_are_read_by_key_and_others_are_left(tmp_path: Path) -> None:
    path = write(tmp_path / "scans.npz", TWO)
    found = files.read_npz(path, ["labels"])
    assert {k: v.tolist() for k, v in found.items()} == {"labels": [0, 1, 2]}


def test_a_key_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "scans.npz", TWO)
    message = refused(lambda: files.read_npz(path, ["images", "masks", "ages"]))
    assert message == (f"{path} has no array masks, ages; needed are images, masks, ages, found images, labels")


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path) -> None:
    trap = np.empty(1, object)
    trap[0] = Trap(tmp_path / "sprung")
    path = write(tmp_path / "scans.npz", npz(labels=trap))
    assert refused(lambda: files.read_npz(path, ["labels"])).startswith(f"{path} cannot be read as .npz: ")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", TWO[:40], TWO[: len(TWO) // 2], TWO[:-1]], ids=len)
def test_a_damaged_archive_is_a_data_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "scans.npz", content)
    assert refused(lambda: files.read_npz(path, ["images", "labels"])).startswith(f"{path} cannot be read as .npz: ")


def test_one_array_alone_is_no_archive(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    path = write(tmp_path / "scans.npz", file.getvalue())
    assert refused(lambda: files.read_npz(path, ["images"])).startswith(f"{path} cannot be read as .npz")


def test_a_changed_pixel_is_noticed(tmp_path: Path) -> None:
    at = TWO.index(b"\x00" * 48) + 7
    path = write(tmp_path / "scans.npz", TWO[:at] + b"\x01" + TWO[at + 1 :])
    assert "cannot be read as .npz" in refused(lambda: files.read_npz(path, ["images"]))


def zipped(**changes: int) -> bytes:
    """The archive with other numbers in both headers, local and central, of its first member."""
    data = bytearray(TWO)
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    for name, value in changes.items():
        at = {"flags": (6, 8), "method": (8, 10)}[name]
        data[local + at[0]] = data[central + at[1]] = value
    return bytes(data)


@pytest.mark.parametrize("changes", [{"flags": 1}, {"method": 99}], ids=["encrypted", "unknown compression"])
def test_an_archive_that_python_cannot_unpack_is_a_data_error_too(changes: dict[str, int], tmp_path: Path) -> None:
    path = write(tmp_path / "scans.npz", zipped(**changes))
    assert zipfile.is_zipfile(path)
    assert str(path) in refused(lambda: files.read_npz(path, ["images", "labels"]))


@pytest.mark.parametrize(
    "read",
    [
        lambda path: files.read_csv(path, ["a"]),
        lambda path: files.read_text(path, ["a"]),
        lambda path: files.read_npz(path, ["a"]),
    ],
    ids=["csv", "text", "npz"],
)
def test_a_file_that_is_not_there_is_missing_and_a_folder_is_unreadable(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.raises(MissingData, match=r"gone\.any"):
        read(tmp_path / "gone.any")
    assert str(tmp_path) in refused(lambda: read(tmp_path))


@pytest.mark.parametrize("name", ["table.txt", "table.txt.gz", "table.csv", "table.csv.gz"])
@pytest.mark.parametrize("present", ["plain", "gzipped"])
def test_tables_are_found_plain_and_gzipped(
    name: str, present: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    plain = name.removesuffix(".gz")
    path = tmp_path / (plain if present == "plain" else f"{plain}.gz")
    path.touch()
    assert files.find(name, "a set", "somewhere") == path
