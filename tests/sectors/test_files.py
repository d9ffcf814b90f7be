"""Where files are looked for, and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sectors import files
from sectors.banks import COLUMNS, Banks
from sectors.base import Place
from trellis.errors import DataError, MissingData


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    (tmp_path / "banks").mkdir()
    return tmp_path


def test_the_environment_names_the_data_folder(root: Path) -> None:
    assert files.data_root() == root


def test_a_missing_file_is_reported_with_what_to_do(root: Path) -> None:
    with pytest.raises(MissingData) as caught:
        Banks().load(Place(0, 3))
    message = str(caught.value)
    for part in ("banks/creditcard_sample.csv.gz", "banks/creditcard.csv", str(root), "ULB credit card fraud"):
        assert part in message
    for part in ("Kaggle mlg-ulb/creditcardfraud", "TRELLIS_DATA", "data=synthetic"):
        assert part in message


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["creditcard.csv"], "creditcard.csv"),
        (["creditcard.csv.gz"], "creditcard.csv.gz"),
        (["creditcard_sample.csv"], "creditcard_sample.csv"),
        (["creditcard.csv", "creditcard_sample.csv.gz"], "creditcard.csv"),
        (["creditcard.csv.gz", "creditcard_sample.csv"], "creditcard.csv.gz"),
    ],
)
def test_plain_and_gzipped_files_are_found_and_the_full_file_first(root: Path, present: list[str], chosen: str) -> None:
    for name in present:
        (root / "banks" / name).touch()
    assert Banks().files() == (root / "banks" / chosen,)


def test_the_fingerprint_follows_names_and_bytes_of_the_files_never_their_place(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "banks" / "creditcard_sample.csv"
    path.write_bytes(b"some bytes")
    first = Banks().fingerprint(synthetic=False)
    assert len(first) == 64
    assert Banks(partition="uniform").fingerprint(synthetic=False) == first

    elsewhere = tmp_path / "elsewhere" / "banks"
    elsewhere.mkdir(parents=True)
    (elsewhere / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("TRELLIS_DATA", str(elsewhere.parent))
    assert Banks().fingerprint(synthetic=False) == first

    monkeypatch.setenv("TRELLIS_DATA", str(root))
    path.write_bytes(b"other, longer bytes")
    other = Banks().fingerprint(synthetic=False)
    path.rename(path.with_name("creditcard.csv"))
    assert len({first, other, Banks().fingerprint(synthetic=False)}) == 3


def test_a_file_is_digested_once_while_it_stays_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "banks" / "creditcard.csv").write_bytes(b"bytes of this test alone")
    first = Banks().fingerprint(synthetic=False)
    monkeypatch.setattr(files.hashlib, "file_digest", None)
    assert Banks().fingerprint(synthetic=False) == first


def test_a_place_without_the_files_has_no_fingerprint_of_them(root: Path) -> None:
    assert Banks().fingerprint(synthetic=False) == ""


def test_a_damaged_gzip_is_a_data_error_that_names_the_file(root: Path) -> None:
    path = root / "banks" / "creditcard_sample.csv.gz"
    whole = gzip.compress(b"Time,V1\n" + b"1,2\n" * 500)
    for content in (b"no gzip at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"creditcard_sample\.csv\.gz cannot be read as gzipped CSV"):
            Banks().load(Place(0, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as CSV"),
        (",".join(COLUMNS) + "\n", "has no rows"),
        ("Time,V1,Amount\n0,0,0\n", r"own\.csv has no column V2, V3.*Class; needed are"),
        (",".join(COLUMNS) + "\n" + ",".join(["0"] * 29 + ["much", "0"]), "non-numeric values in column Amount"),
        (",".join(COLUMNS) + "\n" + ",".join(["0"] * 29 + ["", "0"]), "empty.* values in column Amount"),
        (
            ",".join(COLUMNS) + "\n" + ",".join(["0"] * 30 + ["2"]),
            "outside one of 0, 1 in column Class .1 of 1 rows, first row 1: 2",
        ),
    ],
)
def test_a_table_of_another_schema_is_a_data_error(tmp_path: Path, content: str, message: str) -> None:
    own = tmp_path / "own.csv"
    own.write_text(content)
    with pytest.raises(DataError, match=message):
        Banks().load(Place(0, 1, path=own))


def test_an_own_file_that_does_not_exist_is_missing_even_with_synthetic_data(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"none\.csv"):
        Banks().load(Place(0, 1, path=tmp_path / "none.csv", synthetic=True))


def test_a_file_in_latin_1_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_bytes("code,price,label\na,1,£5\n".encode("latin-1"))
    assert files.read_csv(path, ("price",))["label"].tolist() == ["£5"]
