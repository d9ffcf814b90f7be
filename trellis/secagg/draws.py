"""Groups that nobody chooses: every member commits itself to a number, then all are revealed.

The last to reveal could still withhold; under malicious_server that voids the draw, and a site counts how many come to
nothing (`consent.require_few_draws`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from trellis.errors import SecAggError
from trellis.identity import Member
from trellis.secagg import transcript
from trellis.secagg.transcript import Signed

NUMBER_BYTES = 32


@dataclass(slots=True)
class Draw:
    """A number this member has committed itself to, for groups to be drawn."""

    run: str
    epoch: str
    names: list[str]
    group_size: int
    number: bytes
    commits: bytes = b""
    """Digest of the commitments that it revealed its number to."""


def dumps(draw: Draw) -> str:
    """A draw as text.  `loads(dumps(d)) == d`."""
    fields = {"run": draw.run, "epoch": draw.epoch, "names": draw.names, "group_size": draw.group_size}
    return json.dumps({**fields, "number": draw.number.hex(), "commits": draw.commits.hex()})


def loads(text: str) -> Draw:
    """Inverse of `dumps`."""
    fields = json.loads(text)
    return Draw(**{**fields, "number": bytes.fromhex(fields["number"]), "commits": bytes.fromhex(fields["commits"])})


def commitment(run: str, draw: str, name: str, number: bytes) -> bytes:
    return transcript.digest("commit", run, draw, name, number)


def commits_digest(commits: Mapping[str, Signed]) -> bytes:
    """Of all commitments of a draw: what a number is revealed to."""
    parts = [part for name in sorted(commits) for part in (name, commits[name].digest)]
    return transcript.digest("commits", *parts)


def committed(pin: Member, draw: Draw, commit: Signed) -> dict[str, object]:
    """A member's commitment to this very draw."""
    about = {"run": draw.run, "epoch": draw.epoch, "group_size": draw.group_size, "node": pin.name}
    return transcript.read(commit, "commit", pin.public_key, **about)


def number_in(pin: Member, draw: Draw, reveal: Signed, commit: Signed) -> bytes:
    """A member's number, signed, and the one it was committed to."""
    said = committed(pin, draw, commit)
    fields = transcript.read(
        reveal, "reveal", pin.public_key, epoch=draw.epoch, node=pin.name, commits=draw.commits.hex()
    )
    number = transcript.hex_bytes(fields.get("number"), NUMBER_BYTES)
    if said.get("commitment") != commitment(draw.run, draw.epoch, pin.name, number).hex():
        raise SecAggError("bad_key", f"{pin.name} revealed another number than it was committed to")
    return number
