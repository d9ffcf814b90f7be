"""What a member's own site allows, and what it remembers of what it answered.

The rules that keep a server from subtracting two sums: a key index masks one vector, and a base is unmasked for one
set of survivors.  What is remembered is no secret, and it is written down before an answer leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from trellis import canonical
from trellis.errors import SecAggError
from trellis.types import Masking, Request, Threat

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
    max_weight_ratio: float = 1.0
    """How much more one update may weigh than another.  Weights are the server's: one that changes them from round to
    round solves for single updates."""
    colluding: float = 0.1
    dropping: float = 0.1
    """In a sparse graph, shares of the members that may: they give the least number of neighbours."""
    fixed_survivors: bool = False
    """Whether a group gives sums over one set of survivors only, a member that is missing costing it the round."""
    code_is_pinned: bool = False
    """Whether this site runs only code that it has approved."""


PURPOSES = {"train": ("validation",), "evaluate": ("validation", "test", "test_tuned"), "statistics": ("train",)}
"""What a masked request may be for, and on which splits.  Test rows are scored once a base, in an evaluation."""

MAX_STEPS = 2**24
"""Steps within the clip norm where updates are weighed: more than a float32 has leave digits free, in which the update
of a smaller weight could be read."""


def base_of(request: Request) -> str:
    """What a set of survivors is answered for: a purpose and a base.

    Statistics are of the data, whatever params come with the question.  Raises SecAggError for anything else.
    """
    purpose, splits = str(request.purpose), [str(split) for split in request.splits]
    if not set(splits) <= set(PURPOSES.get(purpose, ())) or purpose not in PURPOSES:
        raise SecAggError(DENIED, f"nothing is masked for {purpose[:40]!r} on {splits[:4]}")
    if request.purpose == "statistics":
        return f"statistics:{request.config.get('sector', '')}"
    # a base is scored in a round, on halves of validation rows, and at the end, on test rows too
    final = request.purpose == "evaluate" and splits != ["validation"]
    return f"{request.purpose}{'-final' if final else ''}:{request.base}"


def require_weights(terms: Terms, masking: Masking) -> None:
    """Raises SecAggError where weights, which the server chooses, could make a sum tell single updates."""
    weights = [w for w in masking.weights if w]
    if min(masking.weights, default=0) < 0 or not weights:
        raise SecAggError(DENIED, "weights are whole numbers, none below 0, not all 0")
    if len(set(masking.weights)) == 1:
        return
    # in whole numbers: a server may name any
    most, allowed = Fraction(max(weights), min(weights)), terms.max_weight_ratio
    if allowed == 1 or (math.isfinite(allowed) and most > Fraction(allowed)):
        raise SecAggError(DENIED, f"updates do not weigh the same, and the site allows a ratio of {allowed:g}")
    if not math.isfinite(masking.clip_norm) or masking.scale * Fraction(masking.clip_norm) > MAX_STEPS:
        raise SecAggError(DENIED, "weighed updates in so many steps: the finest digits would tell single ones")


def require_shared_weight(terms: Terms, weights: Mapping[str, int], survivors: Sequence[str]) -> tuple[str, ...]:
    """Those of the survivors whose updates weigh something: no other hides anybody.

    Raises SecAggError where one of them weighs more than the site allows.
    """
    total = sum(weights[name] for name in survivors)
    most = max((weights[name] for name in survivors), default=0)
    if most > terms.max_share * total:
        raise SecAggError(
            DENIED, f"one member has {most} of {total} parts of the sum, the site allows a share of {terms.max_share:g}"
        )
    return tuple(name for name in survivors if weights[name])


DATA = ("sector", "options", "data", "num_parts", "holds_out")
"""Of a node config, what statistics depend on; how a model is trained is no matter of theirs."""


def settings_of(request: Request) -> list[Any]:
    """What must stay the same: with other clipping, limits, weights or training, the difference of two sums tells whose
    update was clipped, cut off, weighed, or trained on a row less."""
    masking = request.masking
    assert masking is not None
    weights = sorted(zip(masking.members, masking.weights, strict=True)) if len(set(masking.weights)) > 1 else []
    limits = [[c.name, list(c.shape), c.dtype, c.exponent, c.most] for c in masking.counts]
    how = [masking.clip_norm, masking.scale, masking.dtype, limits]
    return [canonical.digest([how, _config_of(request)]), [list(pair) for pair in weights]]


def _config_of(request: Request) -> dict[str, Any]:
    """What a node config says of the numbers that are summed."""
    config = {k: v for k, v in request.config.items() if k != "dp"}
    planned = request.config.get("dp")
    if isinstance(planned, dict):  # a run may be lengthened
        config["dp"] = {k: v for k, v in planned.items() if k != "rounds"}
    if request.purpose != "statistics":
        return config
    training = config.get("training")
    most = training.get("max_examples") if isinstance(training, dict) else None
    chosen = {} if most is None else {"max_examples": most, "seed": config.get("seed")}  # of more rows these are drawn
    return {**{k: config[k] for k in DATA if k in config}, **chosen}


def require_new(
    journal: Journal,
    terms: Terms,
    *,
    run: str,
    epoch: str,
    index: int,
    base: str,
    members: Sequence[str],
    settings: Sequence[Any],
) -> None:
    """Raises SecAggError where a vector may not be masked, for what was masked and answered before."""
    facts = journal.facts()
    masked = [f for f in facts if f["fact"] == "masked"]
    if any(f["epoch"] == epoch and f["index"] == index for f in masked):
        raise SecAggError(DENIED, f"key index {index} has masked a vector already: it is used once")
    if any(f["base"] == base and f["run"] == run for f in facts if f["fact"] == "answered"):
        raise SecAggError(DENIED, "this base was answered in this run: it is unmasked once")
    for fact in masked:
        repeats = fact["base"] == base and not (terms.allow_repeat and fact["run"] != run)
        if repeats and fact["members"] != list(members):
            raise SecAggError(
                DENIED,
                "this base was masked in another group, and two sums would tell them apart; another seed gives another "
                "base",
            )
        # a run is a word of the server's: who gives sums over one set only gives them in one way, too
        fixed = terms.fixed_survivors and fact["members"] == list(members)
        same = fact["purpose"] == base.partition(":")[0] and (fact["run"] == run or repeats or fixed)
        if same and not _agree(fact["settings"], settings):
            raise SecAggError(
                DENIED,
                "clipping, limits, weights or training are not those that this run began with, or that this base was "
                "answered with before; another seed gives another base",
            )


def _agree(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether settings are the same, weights for the members that both are about."""
    known, told = dict(before[1]), dict(now[1])
    both = set(known) & set(told)
    # where only one of two names weights, all are the same in the other
    return before[0] == now[0] and bool(known) == bool(told) and all(known[n] == told[n] for n in both)


def require_same_survivors(
    journal: Journal, terms: Terms, *, run: str, members: Sequence[str], base: str, survivors: Sequence[str]
) -> None:
    """Raises SecAggError where a base, or with fixed survivors a run, was answered for other survivors."""
    for fact in (f for f in journal.facts() if f["fact"] == "answered"):
        others = sorted(fact["survivors"]) != sorted(survivors)
        repeats = fact["base"] == base and not (terms.allow_repeat and fact["run"] != run)
        if repeats and others:
            raise SecAggError(
                DENIED,
                "this base was answered for other survivors: the two sums would tell them apart; another seed gives "
                "another base",
            )
        # whatever the run is called: that is a word of the server's
        fixed = terms.fixed_survivors and fact["members"] == list(members)
        if fixed and others:
            raise SecAggError(DENIED, "this group was answered for other survivors, and the site allows one set")


def require_few_draws(journal: Journal, terms: Terms, epoch: str) -> None:
    """Raises SecAggError where groups were drawn too often since a sum came of a draw, or for this epoch already."""
    in_a_row, drawn, facts = 0, set[str](), journal.facts()
    if any(fact["epoch"] == epoch for fact in facts):
        raise SecAggError(DENIED, "this epoch is known: groups are drawn once for an epoch")
    for fact in facts:
        if fact["fact"] == "drew":
            in_a_row, drawn = in_a_row + 1, drawn | {fact["epoch"]}
        elif fact["fact"] == "answered" and fact["drawn"] and fact["epoch"] in drawn:
            in_a_row, drawn = 0, set()
    if in_a_row >= terms.max_draws:
        raise SecAggError(DENIED, f"groups were drawn {in_a_row} times, and nothing came of it: no more draws")


def require_few_groups(journal: Journal, terms: Terms, members: Sequence[str]) -> None:
    """Raises SecAggError where this drawn group would be one too many."""
    known = {tuple(f["members"]) for f in journal.facts() if f["fact"] == "masked" and f["drawn"]}
    if tuple(members) not in known and len(known) >= terms.max_regroupings:
        raise SecAggError(
            DENIED, f"its updates were added up with {len(known)} drawn groups, the site allows {terms.max_regroupings}"
        )
