"""What a member's own site allows, and what it remembers of what it answered.

The rules that keep a server from subtracting two sums: a key index masks one vector, and a base is unmasked for one
set of survivors.  What is remembered is no secret, and it is written down before an answer leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trellis.errors import SecAggError
from trellis.types import Request, Threat

DENIED = "policy.secagg"

Fact = dict[str, Any]


class Journal(Protocol):
    """A member's facts, durable: `add` returns when the fact cannot be lost any more."""

    def facts(self) -> Sequence[Fact]: ...

    def add(self, fact: Fact) -> None: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What a site asks of every secure aggregation that its node takes part in."""

    least_threat: Threat = Threat.malicious_server
    min_group: int = 3
    """Organisations that a sum must span."""
    max_per_organisation: int = 1
    """Members of one owner in a group."""
    max_keys: int = 1024
    max_draws: int = 4
    """Draws of groups that come to nothing, in a row: so often a server may try its luck."""
    max_regroupings: int = 4
    """Different drawn groups that it ever adds its updates up with: T of them tell what lasts of a node."""
    allow_repeat: bool = False
    """Whether a base that it answered in another run may be answered for other survivors."""
    max_share: float = 0.5
    """Of all weight in a sum, the most that one member's update may have: with weights 100, 1, 1 it is one update."""
    fixed_survivors: bool = False
    """Whether a run gets sums over one set of survivors only, a member that is missing costing the group the round."""
    code_is_pinned: bool = False
    """Whether this site runs only code that it has approved."""


def base_of(request: Request) -> str:
    """What a set of survivors is answered for: a base and a purpose.  Statistics have no base but their data."""
    about = str(request.config.get("sector", "")) if request.purpose == "statistics" else ""
    return f"{request.purpose}:{about}:{request.base}"


def require_shared_weight(terms: Terms, weights: Mapping[str, int], survivors: Sequence[str]) -> tuple[str, ...]:
    """Those of the survivors whose updates weigh something: no other hides anybody.

    Raises SecAggError where one of them weighs more than the site allows: the weights are the server's.
    """
    total = sum(weights[name] for name in survivors)
    most = max((weights[name] for name in survivors), default=0)
    if min(weights.values(), default=0) < 0 or most > terms.max_share * total:
        raise SecAggError(
            DENIED, f"one member has {most} of {total} parts of the sum, the site allows a share of {terms.max_share:g}"
        )
    return tuple(name for name in survivors if weights[name])


def require_unused(journal: Journal, epoch: str, index: int) -> None:
    """Raises SecAggError where this key index has masked a vector already."""
    if any(f["fact"] == "masked" and f["epoch"] == epoch and f["index"] == index for f in journal.facts()):
        raise SecAggError(DENIED, f"key index {index} has masked a vector already: it is used once")


def require_same_survivors(
    journal: Journal, terms: Terms, *, run: str, group: str, base: str, survivors: Sequence[str]
) -> None:
    """Raises SecAggError where a base, or with fixed survivors a run, was answered for other survivors."""
    for fact in (f for f in journal.facts() if f["fact"] == "answered"):
        others = sorted(fact["survivors"]) != sorted(survivors)
        repeats = fact["base"] == base and not (terms.allow_repeat and fact["run"] != run)
        if repeats and others:
            raise SecAggError(DENIED, "this base was answered for other survivors: the two sums would tell them apart")
        fixed = terms.fixed_survivors and fact["run"] == run and fact["group"] == group
        if fixed and others:
            raise SecAggError(DENIED, "this run was answered for other survivors, and the site allows one set a run")


def require_few_draws(journal: Journal, terms: Terms) -> None:
    """Raises SecAggError where groups were drawn too often since a round came of it."""
    in_a_row = 0
    for fact in journal.facts():
        came_of_it = fact["fact"] == "answered" and fact["drawn"]
        in_a_row = in_a_row + 1 if fact["fact"] == "drew" else 0 if came_of_it else in_a_row
    if in_a_row >= terms.max_draws:
        raise SecAggError(DENIED, f"groups were drawn {in_a_row} times, and nothing came of it: no more draws")


def require_few_groups(journal: Journal, terms: Terms, members: Sequence[str]) -> None:
    """Raises SecAggError where this drawn group would be one too many."""
    known = {tuple(sorted(f["members"])) for f in journal.facts() if f["fact"] == "answered" and f["drawn"]}
    if tuple(sorted(members)) not in known and len(known) >= terms.max_regroupings:
        raise SecAggError(
            DENIED, f"its updates were added up with {len(known)} drawn groups, the site allows {terms.max_regroupings}"
        )
