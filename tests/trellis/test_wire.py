"""Messages: what is decoded is exactly what was meant, and a stranger's bytes are never trusted."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trellis import wire
from trellis.errors import WireError
from trellis.types import Request
from trellis.vectors import TensorSpec, digest

wire.identify(1, 1)
SPEC = TensorSpec("w", (2, 3), "float32")
VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)
STYPE = "numpy.ndarray"


def npy(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    body = text.encode().ljust(117) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(body))
    return b"\x93NUMPY" + bytes(version) + length + body


def sent(data: bytes, stype: str = STYPE) -> Array:
    return Array("float32", (2, 3), stype, data)


# ---------------------------------------------------------------- decoding


@given(
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_]),
        npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    )
)
def test_decode_undoes_numpys_save(value: np.ndarray[Any, Any]) -> None:
    spec = TensorSpec("x", value.shape, value.dtype.name)
    for found in (wire.decode(Array(value), spec), wire.decode(Array(value))):
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_arrays_in_fortran_order_are_read_rightly() -> None:
    fortran = np.asfortranarray(VALUE)
    assert b"'fortran_order': True" in npy(fortran)
    assert np.array_equal(wire.decode(sent(npy(fortran)), SPEC), VALUE)
    cube = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert np.array_equal(wire.decode(sent(npy(cube)), TensorSpec("c", (2, 3, 4), "float32")), cube)


def test_headers_of_npy_version_2_are_read() -> None:
    data = header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", (2, 0)) + VALUE.tobytes()
    assert np.array_equal(wire.decode(sent(data), SPEC), VALUE)


def test_what_is_decoded_cannot_be_written_to() -> None:
    assert not wire.decode(Array(VALUE), SPEC).flags.writeable


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a stranger's pickle was loaded",))


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, w=np.zeros(1_000_000, np.float32))
    return file.getvalue()


FLOAT = "'descr': '<f4', 'fortran_order': False"
HOSTILE = {
    "pickle": pickle.dumps(Bomb()),
    "pickled object array": npy(np.array([Bomb()], object), allow_pickle=True),
    "object dtype in the header": header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }") + b"\0" * 48,
    "structured dtype with objects": (
        header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }") + b"12345678"
    ),
    "10^15 elements claimed": header(f"{{{FLOAT}, 'shape': ({10**15},), }}") + b"\0" * 24,
    "a shape whose product wraps to 6": header(f"{{{FLOAT}, 'shape': ({2**62}, 4, 6), }}") + b"\0" * 24,
    "negative sizes": header(f"{{{FLOAT}, 'shape': (-2, -3), }}") + b"\0" * 24,
    "dtype of no bytes": header("{'descr': '|V0', 'fortran_order': False, 'shape': (5,), }"),
    "endless dtype": header("{'descr': '|V999999999999', 'fortran_order': False, 'shape': (5,), }"),
    "code in the header": header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,), }"),
    "a header of a megabyte": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 20) + b" " * (1 << 20),
    "a header that is not there": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000),
    "npz zip bomb": npz(),
    "truncated": npy(VALUE)[:-1],
    "too long": npy(VALUE) + b"\0",
    "magic only": npy(VALUE)[:6],
    "empty": b"",
    "noise": b"\x00\x01\x02" * 50,
    "unknown version": b"\x93NUMPY\x09\x00" + npy(VALUE)[8:],
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("spec", [SPEC, None], ids=["expected", "trusted"])
def test_hostile_bytes_are_refused(data: bytes, spec: TensorSpec | None) -> None:
    with pytest.raises(WireError) as found:
        wire.decode(sent(data), spec)
    assert found.value.code in ("undecodable", "wrong_shape", "wrong_dtype")
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("case", ["10^15 elements claimed", "endless dtype", "npz zip bomb", "a header of a megabyte"])
def test_a_lying_header_allocates_nothing(case: str) -> None:
    array = sent(HOSTILE[case])
    tracemalloc.start()
    try:
        for spec in (SPEC, None):
            with pytest.raises(WireError):
                wire.decode(array, spec)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_else(noise: bytes) -> None:
    for data in (noise, npy(VALUE)[:10] + noise, header(noise.decode("latin1")[:100])):
        with contextlib.suppress(WireError):
            wire.decode(sent(data))


@pytest.mark.parametrize("stype", ["", "pickle", "numpy.npz", "torch", "x" * 1000])
def test_another_serialisation_is_refused(stype: str) -> None:
    with pytest.raises(WireError, match="undecodable"):
        wire.decode(sent(npy(VALUE), stype), SPEC)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (VALUE.T.copy(), "wrong_shape"),
        (VALUE.reshape(6), "wrong_shape"),
        (VALUE[:1], "wrong_shape"),
        (VALUE[:1, :1], "wrong_shape"),
        (np.float32(1), "wrong_shape"),
        (VALUE.astype(np.float64), "wrong_dtype"),
        (VALUE.astype(np.int32), "wrong_dtype"),
        (VALUE.astype(">f4"), "wrong_dtype"),
    ],
)
def test_the_header_must_be_what_was_expected(value: Any, code: str) -> None:
    with pytest.raises(WireError) as found:
        wire.decode(sent(npy(value)), SPEC)
    assert found.value.code == code


# ---------------------------------------------------------------- requests


def a_request(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "run": "r1",
        "round": 4,
        "purpose": "train",
        "base": "ab" * 32,
        "config": {"lr": 0.1, "sector": "é", "nested": {"a": [1, None, True]}},
        "members": ("a", "b"),
        "splits": ("validation", "test"),
        "key_index": None,
    }
    return Request(**{**fields, **changes})


def as_message(content: RecordDict) -> Message:
    return Message(content, 7, "train")


def test_a_request_survives_the_wire_with_its_digest() -> None:
    request = a_request()
    found = wire.read_request(as_message(wire.request_content(wire.to_record({"w": VALUE}), request)))
    assert found == request
    assert found is not None
    assert found.digest == request.digest


def test_the_round_of_a_request_follows_flowers_convention_too() -> None:
    content = wire.request_content(wire.to_record({"w": VALUE}), a_request())
    assert content.config_records["config"]["server-round"] == 4
    assert np.array_equal(content.array_records["arrays"]["w"].numpy(), VALUE)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "r2"},
        {"round": 5},
        {"purpose": "evaluate"},
        {"base": "cd" * 32},
        {"config": {"lr": 0.2}},
        {"members": ("b", "a")},
        {"members": ("a",)},
        {"splits": ("validation",)},
        {"key_index": 0},
    ],
)
def test_the_digest_binds_every_field(change: dict[str, Any]) -> None:
    assert a_request(**change).digest != a_request().digest


def test_a_message_without_a_request_is_flowers_own() -> None:
    assert wire.read_request(as_message(RecordDict({"config": ConfigRecord({"server-round": 1})}))) is None
    assert wire.read_request(as_message(RecordDict())) is None


def broken(**changes: Any) -> str:
    fields = json.loads(a_request().encode())
    return json.dumps({k: v for k, v in {**fields, **changes}.items() if v != "absent"})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "1", "null", "{", broken(protocol=9), broken(protocol="absent"), broken(round="absent"),
     broken(round=[]), broken(members=None), broken(splits="absent")],
)  # fmt: skip
def test_a_request_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(WireError) as found:
        wire.read_request(as_message(RecordDict({"config": ConfigRecord({"request": text})})))
    assert found.value.code == "wrong_request"


def test_another_protocol_says_which_one_this_node_speaks() -> None:
    content = RecordDict({"config": ConfigRecord({"request": broken(protocol=9)})})
    with pytest.raises(WireError, match=r"protocol 9, this node speaks 2"):
        wire.read_request(as_message(content))


# ---------------------------------------------------------------- replies, at rest


def test_a_reply_to_a_request_names_it_and_holds_counts() -> None:
    request = a_request()
    counts = {"validation": {"rows": np.asarray(3, np.int64)}}
    content = wire.reply_content(
        request=request, arrays={"w": VALUE}, num_examples=3, metrics={"train/loss": 0.5}, counts=counts
    )
    assert content.config_records["reply"]["request"] == request.digest
    assert dict(content.metric_records["metrics"]) == {"num-examples": 3, "train/loss": 0.5}
    assert wire.from_record(content.array_records["counts"])["validation/rows"] == 3


def test_a_reply_to_flowers_convention_holds_what_flower_knows() -> None:
    content = wire.reply_content(request=None, arrays={"w": VALUE}, num_examples=3, metrics={}, counts={})
    assert sorted(content) == ["arrays", "metrics"]


def test_unpack_undoes_pack() -> None:
    arrays = {"w": VALUE, "n": np.asarray(3, np.int64), "e": np.zeros((0, 2), np.float32)}
    content = RecordDict(
        {
            "metrics": MetricRecord({"loss": 0.1, "n": 3, "many": [1.5, 2.5]}),
            "arrays": wire.to_record(arrays),
            "empty": ArrayRecord({}),
            "config": ConfigRecord({"name": "é", "on": True, "list": ["a", "b"], "x": 1.5}),
        }
    )
    back = wire.unpack(wire.pack(content))
    assert list(back) == list(content)
    assert back == content
    assert wire.pack(back) == wire.pack(content)
    assert digest(wire.from_record(back.array_records["arrays"])) == digest(arrays)


def test_the_size_of_a_content_counts_bytes_lists_and_texts() -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array("float32", (1,), STYPE, b"12345")}),
            "metrics": MetricRecord({"ab": 1.0, "list": [1, 2, 3]}),
            "config": ConfigRecord({"k": "texts"}),
        }
    )
    names = len("arrays") + len("metrics") + len("config")
    assert wire.size_bytes(content) == names + (1 + 5) + (2 + 8) + (4 + 24) + (1 + 5)
    texts = RecordDict({"c": ConfigRecord({"k": ["abc", "de"]})})
    assert wire.size_bytes(texts) == 1 + 1 + 5, "a list of texts is as long as its texts"
