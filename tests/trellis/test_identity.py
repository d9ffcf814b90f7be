"""Identity keys: files that nobody else reads, signatures that say what they are of, members without a doubt."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis import identity
from trellis.errors import ConfigError
from trellis.identity import IdentityKey, Member

# ---------------------------------------------------------------- keys in files


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_key_is_in_a_file_that_its_owner_alone_can_read(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "bank-a.key"
    before = os.umask(umask)
    try:
        key = identity.generate(path)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert len(key.public_key) == identity.KEY_BYTES
    assert key.public_key.hex() not in path.read_text()
    assert list(tmp_path.iterdir()) == [path], "and in no other"


def test_a_key_that_is_read_again_is_the_same_key(tmp_path: Path) -> None:
    key = identity.generate(tmp_path / "key")
    again = identity.load(tmp_path / "key")
    assert again.public_key == key.public_key
    assert again.sign("a label", b"payload") == key.sign("a label", b"payload")


def test_every_new_key_is_another_one(tmp_path: Path) -> None:
    keys = [identity.generate(tmp_path / str(i)).public_key for i in range(20)]
    assert len(set(keys)) == 20


def test_a_key_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity.generate(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"cannot write an identity key to .*key: File exists"):
        identity.generate(path)
    assert path.read_bytes() == before


def test_nothing_is_written_over_whatever_else_stands_there(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("empty", "folder", "link"):
        with pytest.raises(ConfigError, match="File exists"):
            identity.generate(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_key_for_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        identity.generate(tmp_path / "nowhere" / "key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666, 0o777, 0o440, 0o660])
def test_a_key_that_others_can_read_or_change_is_not_used(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity.generate(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as refused:
        identity.load(path)
    assert str(refused.value) == f"{path} can be read by others (mode {mode:o}): chmod 600 {path}"
    path.chmod(0o600)
    identity.load(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_what_its_owner_alone_may_do_with_it_is_the_owners_business(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity.generate(path)
    path.chmod(mode)
    identity.load(path)


def test_a_link_to_a_key_is_as_private_as_the_key(tmp_path: Path) -> None:
    path, link = tmp_path / "key", tmp_path / "link"
    identity.generate(path)
    link.symlink_to(path)
    identity.load(link)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        identity.load(link)


OTHER_KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "X25519": (x25519.X25519PrivateKey.generate, "X25519PrivateKey"),
    "Ed448": (ed448.Ed448PrivateKey.generate, "Ed448PrivateKey"),
    "a curve": (lambda: ec.generate_private_key(ec.SECP256R1()), "(EC|EllipticCurve)PrivateKey"),
    "RSA": (lambda: rsa.generate_private_key(65537, 2048), "RSAPrivateKey"),
    "DSA": (lambda: dsa.generate_private_key(1024), "DSAPrivateKey"),
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def pem(key: Any, *, password: bytes = b"") -> bytes:
    locked = BestAvailableEncryption(password) if password else NoEncryption()
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))


@pytest.mark.parametrize(("generate", "kind"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_key_of_another_kind_is_refused_by_name(generate: Callable[[], Any], kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "key", pem(generate()))
    with pytest.raises(ConfigError, match=rf"holds a \w*{kind}, an Ed25519 key is needed: trellis identity new"):
        identity.load(path)


ED25519 = ed25519.Ed25519PrivateKey.generate()

NO_KEYS: dict[str, bytes] = {
    "empty": b"",
    "a text": b"the key is under the mat",
    "bytes": bytes(range(256)),
    "cut off": pem(ED25519)[:60],
    "a public key": ED25519.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "raw": ED25519.private_bytes_raw(),
    "behind a password": pem(ED25519, password=b"secret"),
}


@pytest.mark.parametrize("data", NO_KEYS.values(), ids=NO_KEYS)
def test_what_is_no_key_that_can_be_read_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read an identity key from .*key"):
        identity.load(written(tmp_path / "key", data))


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "key", tmp_path):
        with pytest.raises(ConfigError, match="cannot read an identity key"):
            identity.load(path)


# ---------------------------------------------------------------- signatures


def test_a_signature_is_of_one_label_payload_and_key() -> None:
    key, other = identity.simulated("a"), identity.simulated("b")
    signature = key.sign("secagg/keys", b"payload")
    assert len(signature) == identity.SIGNATURE_BYTES
    assert identity.verify(key.public_key, "secagg/keys", b"payload", signature)
    assert not identity.verify(other.public_key, "secagg/keys", b"payload", signature)
    for label in ("secagg/shares", "secagg/key", "secagg/keys ", "secagg/keys\0", "keys", "", "SECAGG/KEYS"):
        assert not identity.verify(key.public_key, label, b"payload", signature)
    for payload in (b"", b"payloae", b"payload ", b"payloadpayload", b"\0payload"):
        assert not identity.verify(key.public_key, "secagg/keys", payload, signature)


def test_a_label_ends_where_it_ends() -> None:
    key = identity.simulated("a")
    told = [("l", b"abc"), ("la", b"bc"), ("", b"labc"), ("lab", b"c")]
    signatures = [key.sign(label, payload) for label, payload in told]
    assert len(set(signatures)) == len(told)
    for at, (label, payload) in enumerate(told):
        found = [identity.verify(key.public_key, label, payload, signature) for signature in signatures]
        assert found == [i == at for i in range(len(told))]


def test_a_signature_over_the_payload_without_a_label_is_none() -> None:
    """What a key signs elsewhere, for whatever reason, is no statement of ours."""
    secret = ed25519.Ed25519PrivateKey.generate()
    key = IdentityKey(secret)
    for data in (b"payload", b"keys\0payload", b"trellis/v2/keys\0payload", b"trellis/v1/keyspayload"):
        assert not identity.verify(key.public_key, "keys", b"payload", secret.sign(data))
    assert identity.verify(key.public_key, "keys", b"payload", secret.sign(b"trellis/v1/keys\0payload"))


def test_any_bit_of_a_signature_that_is_another_makes_it_none() -> None:
    key = identity.simulated("a")
    signature = key.sign("keys", b"payload")
    for bit in range(8 * len(signature)):
        flipped = bytes(b ^ (1 << bit % 8) if i == bit // 8 else b for i, b in enumerate(signature))
        assert not identity.verify(key.public_key, "keys", b"payload", flipped)


@settings(derandomize=True, max_examples=50)
@given(st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_is_no_signature_and_no_error(public_key: bytes, signature: bytes) -> None:
    assert not identity.verify(identity.simulated("a").public_key, "keys", b"payload", signature)
    if len(public_key) != identity.KEY_BYTES:
        good = identity.simulated("a").sign("keys", b"payload")
        assert not identity.verify(public_key, "keys", b"payload", good)


def test_a_fingerprint_is_of_the_public_key() -> None:
    public = identity.simulated("a").public_key
    assert identity.fingerprint(public) == hashlib.sha256(public).hexdigest()
    assert identity.fingerprint(public) != identity.fingerprint(identity.simulated("b").public_key)


def test_a_simulated_key_follows_from_its_name_and_a_real_one_from_nothing(tmp_path: Path) -> None:
    assert identity.simulated("bank a").public_key == identity.simulated("bank a").public_key
    names = ["bank a", "bank b", "Bank a", "bank a ", "", "bänk a"]
    keys = {identity.simulated(name).public_key for name in names}
    assert len(keys) == len(names)
    assert identity.generate(tmp_path / "bank a").public_key not in keys


def test_a_private_key_is_in_no_text_of_it() -> None:
    secret = ed25519.Ed25519PrivateKey.generate()
    key = IdentityKey(secret)
    assert secret.private_bytes_raw().hex() not in repr(key)
    with pytest.raises(AttributeError):
        key.private_key = b""  # type: ignore[attr-defined]


# ---------------------------------------------------------------- members


def entry(name: str, /, **changes: Any) -> dict[str, Any]:
    """A member as its site's file has it; what is changed to None is left out."""
    key = identity.simulated(name).public_key.hex()
    told = {"name": name, "organisation": f"{name} Ltd", "public_key": key, "group": "g"}
    return {k: v for k, v in {**told, **changes}.items() if v is not None}


def listed(path: Path, *entries: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"members": [dict(e) for e in entries]}, allow_unicode=True))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "members.yaml"


def test_members_are_read_as_they_are_written(file: Path) -> None:
    found = identity.load_members(
        listed(file, entry("b"), entry("a", group=None), entry("wächter", role="validate", group="h"))
    )
    key = {n: identity.simulated(n).public_key for n in ("a", "b", "wächter")}
    assert found == (
        Member("b", "b Ltd", key["b"], "g", "train"),
        Member("a", "a Ltd", key["a"], "", "train"),
        Member("wächter", "wächter Ltd", key["wächter"], "h", "validate"),
    )


def test_the_example_of_the_docs_can_be_read(file: Path) -> None:
    keys = {n: identity.simulated(n).public_key.hex() for n in ("bank-a", "bank-b")}
    lines = [f"  - {{name: {n}, organisation: Bank {n}, public_key: {key}, group: g1}}" for n, key in keys.items()]
    file.write_text("\n".join(["members:", *lines]))
    assert [m.organisation for m in identity.load_members(file)] == ["Bank bank-a", "Bank bank-b"]


def test_a_site_that_has_pinned_nobody_accepts_nobody(file: Path) -> None:
    assert identity.load_members(listed(file)) == ()


def test_a_name_or_a_key_stands_in_a_file_once(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"members.yaml: the name a stands there twice: every member has its own"):
        identity.load_members(listed(file, entry("a"), entry("b"), entry("a", public_key="00" * 32)))
    key = identity.simulated("a").public_key.hex()
    for spelt in (key, key.upper(), " ".join(key[i : i + 2] for i in range(0, 64, 2))):
        with pytest.raises(ConfigError, match=f"the public key {key} stands there twice"):
            identity.load_members(listed(file, entry("a"), entry("b", public_key=spelt)))
    # two members of one owner may be there
    assert len(identity.load_members(listed(file, entry("a", organisation="A"), entry("b", organisation="A")))) == 2


WRONG_HEX = {
    "a word": ("not hex", "non-hexadecimal"),
    "odd": ("a" * 63, "hexadecimal"),
    "half": ("ab" * 16, "has 16 bytes, not 32"),
    "twice": ("ab" * 64, "has 64 bytes, not 32"),
    "empty": ("", "has 0 bytes, not 32"),
    "prefixed": ("0x" + "ab" * 32, "non-hexadecimal"),
    "PEM": ("-----BEGIN PUBLIC KEY-----", "non-hexadecimal"),
}


@pytest.mark.parametrize(("value", "reason"), WRONG_HEX.values(), ids=WRONG_HEX)
def test_a_public_key_is_32_bytes_in_hex(value: str, reason: str, file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read pinned members") as refused:
        identity.load_members(listed(file, entry("a"), entry("b", public_key=value)))
    assert reason in str(refused.value)


@pytest.mark.parametrize("field", ["name", "organisation", "public_key"])
def test_a_member_without_a_name_an_owner_or_a_key_is_refused(field: str, file: Path) -> None:
    with pytest.raises(ConfigError, match="a member needs name, organisation and public_key, found"):
        identity.load_members(listed(file, entry("a"), entry("b", **{field: None})))


TAKEN_FOR_SOMETHING_ELSE = {
    "no": False, "yes": True, "on": True, "off": False, "null": None, "~": None, "12": 12, "1e5": "1e5", "1.5": 1.5,
    "0x10": 16, "2024-01-01": "a date", "[a]": ["a"], "{a: b}": {"a": "b"}, "": None, "1_000": 1000, ".nan": "NaN",
}  # fmt: skip
"""What YAML takes a word for."""


@pytest.mark.parametrize("field", ["name", "organisation", "public_key", "group", "role"])
@pytest.mark.parametrize("text", [t for t, v in TAKEN_FOR_SOMETHING_ELSE.items() if t != v])
def test_a_word_that_yaml_takes_for_something_else_is_refused_and_not_guessed_at(
    text: str, field: str, file: Path
) -> None:
    told = {**entry("a"), "role": "train"}
    lines = [f"{k}: {text if k == field else repr(v)}" for k, v in told.items()]
    file.write_text("members:\n  - " + "\n    ".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"\['{field}'\] of .* are no texts: put them in quotes"):
        identity.load_members(file)
    if text and field in ("name", "organisation", "group"):
        lines = [f"{k}: {text if k == field else v!r}" for k, v in told.items()]
        quoted = [line.replace(f": {text}", f": '{text}'") if line.startswith(f"{field}:") else line for line in lines]
        file.write_text("members:\n  - " + "\n    ".join(quoted) + "\n")
        assert getattr(identity.load_members(file)[0], field) == text


def test_digits_that_are_a_public_key_are_no_number(file: Path) -> None:
    """One key in 2^42 is digits alone, and YAML reads it as a number, or as one with an exponent."""
    for digits in ("1" * 64, "0" * 63 + "1", "1" * 30 + "e" + "1" * 33):
        file.write_text(f"members:\n  - {{name: a, organisation: A, public_key: {digits}}}\n")
        try:
            (member,) = identity.load_members(file)
        except ConfigError as refused:
            assert "are no texts: put them in quotes" in str(refused)  # noqa: PT017
        else:
            assert member.public_key.hex() == digits
        file.write_text(f"members:\n  - {{name: a, organisation: A, public_key: '{digits}'}}\n")
        assert identity.load_members(file)[0].public_key.hex() == digits


NO_LISTS = {
    "empty": "",
    "a text": "members",
    "another key": "nodes: []",
    "nothing": "members:",
    "a word": "members: a",
    "a number": "members: 3",
    "a list": "- {name: a}",
    "a map of members": "members: {a: {name: a}}",
    "words": "members: [a, b]",
    "lists": "members: [[name, a]]",
    "broken": "members: [",
    "tabs": "members:\n\t- a",
    "a class": "members: !!python/object/apply:os.system ['true']",
    "an anchor that is not there": "members: *x",
    "two documents": "members: []\n---\nmembers: []\n",
}


@pytest.mark.parametrize("text", NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_no_list_of_members_is_refused(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"cannot read pinned members from .*members.yaml"):
        identity.load_members(file)


def test_a_list_that_is_not_there_or_no_text_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read pinned members"):
        identity.load_members(file)
    file.write_bytes(b"members: []\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read pinned members"):
        identity.load_members(file)
    with pytest.raises(ConfigError, match="cannot read pinned members"):
        identity.load_members(file.parent)


@pytest.mark.parametrize("field", ["grp", "Group", "organization", "rôle"])
def test_a_field_that_nobody_knows_is_refused(field: str, file: Path) -> None:
    """`grp: g1` puts a member among all who have no group: other people than its site had in mind."""
    with pytest.raises(ConfigError, match=rf"'a' has \['{field}'\], which nobody knows"):
        identity.load_members(listed(file, entry("a", **{field: "g1"})))
