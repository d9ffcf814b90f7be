"""`trellis identity`: a key that never leaves its site, and what its site tells the others."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from trellis import identity
from trellis.cli import COMMANDS, main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bank-a.key"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The one object that a command prints."""
    assert main(["identity", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, "one object on stdout and nothing else"
    assert captured.err == ""
    return json.loads(captured.out)


def test_a_new_key_is_its_owners_alone_and_what_is_printed_is_its_public_half(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    before = os.umask(0)
    try:
        assert main(["identity", "new", str(path)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    captured = capsys.readouterr()
    assert captured.err == ""
    key = identity.load(path)
    lines = captured.out.splitlines()
    assert lines[0] == f"private key  {path}"
    assert lines[1] == f"public key   {key.public_key.hex()}"
    mark = identity.fingerprint(key.public_key)
    assert lines[2] == f"fingerprint  {mark[:8]} {mark[8:16]} {mark[16:24]} {mark[24:32]} ..."
    assert "compare fingerprints" in captured.out
    assert "docs/secure-aggregation.md" in captured.out


def test_what_is_shown_later_is_what_was_shown_first(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    assert main(["identity", "new", str(path)]) == 0
    first = capsys.readouterr().out
    written = path.read_bytes()
    assert main(["identity", "show", str(path)]) == 0
    again = capsys.readouterr().out
    assert first.startswith(again)
    assert len(again.splitlines()) == 3, "nobody is told again what to do with it"
    assert path.read_bytes() == written


def test_machines_get_one_object(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    made = told(capsys, "new", str(path))
    key = identity.load(path).public_key
    assert made == {"file": str(path), "public_key": key.hex(), "fingerprint": identity.fingerprint(key)}
    assert told(capsys, "show", str(path)) == made


def test_no_part_of_the_private_key_is_printed(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    for arguments in (["new", str(path)], ["show", str(path)], ["show", str(path), "--json"]):
        assert main(["identity", *arguments]) == 0
    captured = capsys.readouterr()
    secret = identity.load(path)._key.private_bytes_raw()
    body = "".join(path.read_text().splitlines()[1:-1])
    for said in (captured.out, captured.err):
        assert secret.hex() not in said
        assert body not in said
        assert "BEGIN" not in said


def test_a_key_is_not_replaced(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    made = told(capsys, "new", str(path))
    written = path.read_bytes()
    assert main(["identity", "new", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"trellis: cannot write an identity key to {path}: File exists\n"
    assert path.read_bytes() == written
    assert told(capsys, "show", str(path)) == made


def test_a_key_that_others_can_read_is_not_shown_and_the_message_says_what_to_do(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    identity.generate(path)
    path.chmod(0o640)
    assert main(["identity", "show", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"trellis: {path} can be read by others (mode 640): chmod 600 {path}\n"


@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["for people", "for machines"])
def test_what_is_no_key_is_refused_in_words(
    json_too: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("the key is under the mat")
    (tmp_path / "text").chmod(0o600)
    for name in ("nowhere", "text", "."):
        assert main(["identity", "show", str(tmp_path / name), *json_too]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"trellis: cannot read an identity key from {tmp_path / name}")
    assert main(["identity", "new", str(tmp_path / "nowhere" / "key"), *json_too]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "No such file or directory" in captured.err


MISUSE = [[], ["new"], ["show"], ["make", "key"], ["new", "a", "b"], ["show", "key", "--yaml"]]


@pytest.mark.parametrize("arguments", MISUSE, ids=lambda a: " ".join(a) or "nothing")
def test_misuse_is_2_and_makes_no_key(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["identity", *arguments])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: trellis identity" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_listed_and_its_help_says_that_the_key_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS["identity"] == "make or show a node's identity key"
    with pytest.raises(SystemExit) as left:
        main(["identity", "--help"])
    assert left.value.code == 0
    assert "it never leaves the site" in capsys.readouterr().out


def test_what_it_prints_goes_into_a_list_of_members_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = ["members:"]
    for name in ("bank-a", "bank-b"):
        public = told(capsys, "new", str(tmp_path / f"{name}.key"))["public_key"]
        lines.append(f"  - {{name: {name}, organisation: {name}, public_key: '{public}', group: g1}}")
    (tmp_path / "members.yaml").write_text("\n".join(lines))
    members = identity.load_members(tmp_path / "members.yaml")
    keys = {member.name: identity.load(tmp_path / f"{member.name}.key") for member in members}
    for member in members:
        found = {
            n: identity.verify(member.public_key, "hello", b"x", key.sign("hello", b"x")) for n, key in keys.items()
        }
        assert found == {n: n == member.name for n in ("bank-a", "bank-b")}
