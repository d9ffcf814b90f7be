"""Messages: how a request and a reply look as Flower records, and nothing else about Flower.

    request   {"arrays": params, "config": {"server-round": r, "request": canonical JSON}}
    reply     {"arrays": delta, "metrics": {...}, "counts": additive counts, "reply": {"request": digest}}
    masked    {"arrays": {"update", "counts"}, "reply": {"request": digest, "payload", "signature"}}

A reply to a message without "request" follows Flower's own convention: `arrays` holds params, `metrics` has
`num-examples`; so Flower's FedAvg aggregates our ClientApp.  The records of a reply are data from a stranger: sizes are
read from headers before anything is decoded, and nothing is unpickled.

Flower's private symbols (`TaskIdentity`, `InMemoryGrid`) are touched here only.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.lib import format as npy

from trellis.errors import WireError
from trellis.types import PROTOCOL, CountField, Counts, Masking, Purpose, Request
from trellis.vectors import Arrays, TensorSpec

ARRAYS, METRICS, CONFIG, COUNTS, REPLY = "arrays", "metrics", "config", "counts", "reply"
SECAGG = "secagg"
"""What secure aggregation says besides requests: a stage of its own, or what goes with a request."""
UPDATE = "update"
"""The masked update among the arrays of a masked reply."""
ROUND, REQUEST, NODE_CONFIG = "server-round", "request", "node-config"
NUM_EXAMPLES, NUM_ROWS = "num-examples", "num-rows"
EPSILON, NOISE = "privacy/epsilon", "privacy/noise_multiplier"
TOLD = frozenset({EPSILON, NOISE})
"""What a node tells of its budget, among its metrics: all that was spent on its data, and the noise of the round."""
SCHEMA = "schema"
"""Digest of the columns that the sector declares, in an enrolment."""
HEADER_BYTES = 1024
"""More than any .npy header of ours."""


def identify(run_id: int, node_id: int) -> None:
    """Make this process a server that may create messages.  Flower does so itself inside a running ServerApp."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 1


# ---------------------------------------------------------------- arrays


def to_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(a, order="C")) for name, a in arrays.items()})


def from_record(record: ArrayRecord) -> dict[str, npt.NDArray[np.generic]]:
    """For records we trust (the server's, at a node).  Raises WireError("undecodable")."""
    return {name: decode(array) for name, array in record.items()}


def decode(array: Array, spec: TensorSpec | None = None) -> npt.NDArray[np.generic]:
    """One array, read only, without unpickling and without trusting its header.  Raises WireError.

    With `spec`, shape and dtype must be the spec's; nothing is allocated before they are known to be.
    """
    if array.stype != "numpy.ndarray":
        raise WireError("undecodable", f"serialised as {str(array.stype)[:40]!r}, not as numpy.ndarray")
    data = array.data
    if spec is not None:
        header = _npy_header(spec)
        if len(data) == len(header) + spec.num_bytes and data.startswith(header):
            return np.frombuffer(data, spec.dtype, offset=len(header)).reshape(spec.shape)
    shape, dtype, fortran, offset = _read_header(data)
    if spec is not None and shape != spec.shape:
        raise WireError("wrong_shape", f"{spec.name} has shape {shape}, expected {spec.shape}")
    if spec is not None and dtype != np.dtype(spec.dtype):
        raise WireError("wrong_dtype", f"{spec.name} has dtype {dtype}, expected {spec.dtype}")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    odd = dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0
    if odd or len(data) - offset != size:
        raise WireError("undecodable", f"{len(data) - offset} bytes of {dtype} do not make shape {shape}")
    value = np.frombuffer(data, dtype, offset=offset)
    return value.reshape(shape[::-1]).T if fortran else value.reshape(shape)


@lru_cache(maxsize=4096)
def _npy_header(spec: TensorSpec) -> bytes:
    """The first bytes of a .npy file with the spec's shape and dtype, as numpy writes them."""
    file = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype(spec.dtype))
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": spec.shape})
    return file.getvalue()


def _read_header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    try:
        file = io.BytesIO(data[: 2 * HEADER_BYTES])
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=HEADER_BYTES)
    except Exception as error:
        raise WireError("undecodable", f"an array is not a .npy file: {str(error)[:100]}") from error
    return tuple(int(s) for s in shape), dtype, bool(fortran), file.tell()


def size_bytes(content: RecordDict) -> int:
    """Payload of a message: all names, the arrays' serialised bytes, texts by their length, numbers as 8 bytes."""
    total = 0
    for name, record in content.items():
        total += len(name)
        for key, value in record.items():
            total += len(key) + (len(value.data) if isinstance(value, Array) else _value_bytes(value))
    return total


def _value_bytes(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return sum(_value_bytes(item) for item in value) if isinstance(value, list) else 8


# ---------------------------------------------------------------- requests


def request_content(arrays: ArrayRecord, request: Request) -> RecordDict:
    """The content every member of `request` receives."""
    config = ConfigRecord({ROUND: request.round, REQUEST: request.encode().decode()})
    return RecordDict({ARRAYS: arrays, CONFIG: config})


def read_request(message: Message) -> Request | None:
    """The request of a message, or None where it follows Flower's convention only.

    Raises WireError("wrong_request").
    """
    config = message.content.config_records.get(CONFIG)
    if config is None or REQUEST not in config:
        return None
    try:
        return _parsed(cast(str, config[REQUEST]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError("wrong_request", f"cannot read the request: {error!r}") from error


@lru_cache(maxsize=8)  # every mod of every simulated node reads the one request of the round, with all its members
def _parsed(text: str) -> Request:
    fields = json.loads(text)
    if fields["protocol"] != PROTOCOL:
        raise WireError("wrong_request", f"protocol {fields['protocol']}, this node speaks {PROTOCOL}: update it")
    return Request(
        run=str(fields["run"]),
        round=int(fields["round"]),
        purpose=cast(Purpose, fields["purpose"]),
        base=str(fields["base"]),
        config=fields["config"],
        members=tuple(fields["members"]),
        splits=tuple(fields["splits"]),
        key_index=None if fields["key_index"] is None else int(fields["key_index"]),
        masking=None if fields["masking"] is None else masking_from(fields["masking"]),
    )


def masking_from(fields: Mapping[str, Any]) -> Masking:
    """From JSON values, each of the type it has, or KeyError, TypeError, ValueError."""
    return Masking(
        epoch=str(fields["epoch"]),
        group=str(fields["group"]),
        roster=str(fields["roster"]),
        confirmed=str(fields["confirmed"]),
        members=tuple(str(name) for name in fields["members"]),
        quorum=int(fields["quorum"]),
        clip_norm=float(fields["clip_norm"]),
        scale=int(fields["scale"]),
        dtype=str(fields["dtype"]),
        dim=int(fields["dim"]),
        counts=tuple(
            CountField(
                str(c["name"]), tuple(int(n) for n in c["shape"]), str(c["dtype"]), int(c["exponent"]), float(c["most"])
            )
            for c in fields["counts"]
        ),
        weights=tuple(int(w) for w in fields["weights"]),
    )


# ---------------------------------------------------------------- replies


def reply_content(
    *,
    request: Request | None,
    arrays: Arrays | None,
    num_examples: int,
    metrics: Mapping[str, float],
    counts: Mapping[str, Counts],
) -> RecordDict:
    """A node's reply.  Without a request it holds what Flower's convention knows: `arrays` and `metrics`."""
    content = RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: num_examples, **metrics})})
    if arrays is not None:
        content[ARRAYS] = to_record(arrays)
    if request is not None:
        content[REPLY] = ConfigRecord({REQUEST: request.digest})
        content[COUNTS] = to_record({f"{split}/{k}": v for split, group in counts.items() for k, v in group.items()})
    return content


# ---------------------------------------------------------------- at rest


def pack(content: RecordDict) -> bytes:
    """A content as bytes, for a node's own disk.

    `unpack(pack(c)) == c` for contents of arrays, metrics and configs.
    """
    blobs: list[bytes] = []
    arrays = {name: [_array_meta(k, a, blobs) for k, a in r.items()] for name, r in content.array_records.items()}
    metrics = {name: dict(r) for name, r in content.metric_records.items()}
    configs = {name: {k: _plain(v) for k, v in r.items()} for name, r in content.config_records.items()}
    header = json.dumps({"order": list(content), "arrays": arrays, "metrics": metrics, "configs": configs}).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(blobs)


def unpack(data: bytes) -> RecordDict:
    """Inverse of `pack`."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    at = 8 + size
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for name, metas in header["arrays"].items():
        arrays = {}
        for key, dtype, shape, stype, length in metas:
            arrays[key] = Array(dtype, tuple(shape), stype, data[at : at + length])
            at += length
        records[name] = ArrayRecord(arrays)
    records.update({name: MetricRecord(values) for name, values in header["metrics"].items()})
    for name, values in header["configs"].items():
        records[name] = ConfigRecord({key: _value(value) for key, value in values.items()})
    return RecordDict({name: records[name] for name in header["order"]})


def _plain(value: Any) -> Any:
    """A config value as JSON: bytes as hex, so marked."""
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _value(value: Any) -> Any:
    """Inverse of `_plain`."""
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


def _array_meta(key: str, array: Array, blobs: list[bytes]) -> list[Any]:
    blobs.append(array.data)
    return [key, array.dtype, list(array.shape), array.stype, len(array.data)]


def runs_on_ray(grid: Grid) -> bool:
    """Whether this Grid belongs to Flower's simulation engine."""
    from flwr.superlink.grid import InMemoryGrid  # late: it brings SQLAlchemy, which no node needs

    return isinstance(grid, InMemoryGrid)
