"""`ServerState` on disk: one safetensors file, written whole or not at all, verified when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from server.folder import write_atomically
from trellis.canonical import digest_of
from trellis.errors import ResumeError
from trellis.types import Best, ServerState
from trellis.vectors import digest

FORMAT = 1
SLOTS = ("params", "optimizer", "rule")


def save(path: Path, state: ServerState) -> None:
    """Write `state`, atomically and durably."""
    tensors = {f"{slot}/{k}": np.asarray(v, order="C") for slot in SLOTS for k, v in getattr(state, slot).items()}
    meta = {
        "format": FORMAT,
        "run": state.run,
        "round": state.round,
        "seed": state.seed,
        "secret": state.secret,
        "best": asdict(state.best) if state.best else None,
        "observers": state.observers,
        "accountants": state.accountants,
        "order": {slot: list(getattr(state, slot)) for slot in SLOTS},
        "digest": digest(tensors),
    }
    text = json.dumps(meta)
    write_atomically(path, save_tensors(tensors, metadata={"state": text, "sha256": digest_of(text.encode())}))


def load(path: Path) -> ServerState:
    """Read a state back.  Raises ResumeError when there is none, or when it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ResumeError(f"{path} does not exist: the run committed no round; start it anew") from error
    try:
        meta, tensors = _metadata(data), load_tensors(data)
        slots = {slot: {k: tensors[f"{slot}/{k}"] for k in meta["order"][slot]} for slot in SLOTS}
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ResumeError(f"{path} is damaged: {error}") from error
    if meta["format"] != FORMAT:
        raise ResumeError(f"{path} has format {meta['format']}, this Trellis reads format {FORMAT}")
    if digest(tensors) != meta["digest"]:
        raise ResumeError(f"{path} is damaged: its digest does not match its tensors")
    return ServerState(
        run=meta["run"],
        round=meta["round"],
        seed=meta["seed"],
        secret=meta.get("secret", ""),
        best=Best(**meta["best"]) if meta["best"] else None,
        observers=meta["observers"],
        accountants=meta["accountants"],
        **cast(dict[str, Any], slots),
    )


def _metadata(data: bytes) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    written = header["__metadata__"]
    if digest_of(written["state"].encode()) != written["sha256"]:
        raise ValueError("its digest does not match its description")
    return cast(Mapping[str, Any], json.loads(written["state"]))
