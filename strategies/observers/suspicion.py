"""Evidence against nodes over the rounds: a node that is caught lying again and again is asked no more.

In every round that a node is judged it is flagged or not: its reply was refused for what no honest node sends, or its
update lies far from all others, or is nothing at all.  `Suspicion` adds the flags up.

Under secure aggregation only refusals name a node; what a group's mean says of its members is in `regrouping.py`.

Page, Continuous inspection schemes, Biometrika 1954.  Wald, Sequential tests of statistical hypotheses, 1945.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strategies.rows import Updates, rows_of, squared_distances, squared_norms
from trellis.types import RoundView

Float64 = npt.NDArray[np.float64]

NAME = "suspicion"
"""Of its state and its findings among all observers'."""

LIES = frozenset(
    {
        "wrong_request", "wrong_records", "wrong_keys", "wrong_shape", "wrong_dtype", "not_finite", "norm",
        "num_examples", "metrics", "counts", "oversize", "undecodable", "bad_signature", "bad_share", "bad_key",
        "bad_complaint",
    }
)  # fmt: skip
"""Refusals that an honest node does not earn.  Being late, failing or declining is no lie, a stranger or a second
reply says nothing of the node in whose name it came, and a group is lost to whoever of its members was missing."""

LEAST_DISTANCE = 1.5
"""A far row is at least this many norms away from the others: where colluders lend their numbers to one honest node by
copying it, the others must not look far for being a norm or so apart from it.  A sign that is flipped among updates
that agree is two norms away."""

IDLE = 1e-6
"""An update shorter than this share of the median norm cost no training.  Honest nodes with few rows of one class were
measured at 3e-3 (docs/detection.md)."""


@dataclass(frozen=True, slots=True)
class Flag:
    """Why a node is flagged in a round."""

    evidence: str
    lie: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """What speaks against a node: sums of log-likelihood ratios, and what they are made of since they last were 0."""

    llr: float = 0.0
    llr_of_lies: float = 0.0
    """The same sum with refusals alone as flags."""
    num_flags: int = 0
    num_rounds: int = 0
    last: str = ""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """In which round it was decided that a node is asked no more, and why."""

    round: int
    evidence: str
    by_lies: bool


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The observer: (state, view) -> (state, findings).  Its state is JSON.

    A node that is judged in a round gets LLR <- max(0, LLR + x), with x = log(q_b / q_h) where it is flagged and
    log((1 - q_b) / (1 - q_h)) where not; at LLR >= h = log(num_nodes * horizon / alpha) it is quarantined.  The floor
    at 0 leaves a sleeper no credit, and what speaks against a node is forgotten while it behaves.

    While an honest node is flagged with probability at most q_h given its past, exp of the sum of x since any one round
    is a supermartingale that starts at 1, and by Ville's inequality it ever reaches e^h with probability at most e^-h.
    The LLR is the largest of the sums since each of at most `horizon` rounds, so that any of num_nodes honest nodes is
    quarantined within them with probability at most num_nodes * horizon * e^-h = alpha.

    `view.evidence` takes the place of a node's flag: exp of what an honest node gets must have a mean of at most 1.

    A node that replied in a group is hidden in it: without a lie or evidence of its own it is not judged, and nothing
    is forgiven it.  The bound then holds for nodes that are never refused for a lie.

    Lies always quarantine.  Other evidence quarantines max(num_byzantine, 1) nodes in all, the most suspect first, and
    none that the round could not do without (`view.fits`): what is far may be honest, and then costs its data, and all
    liars may still be among the others.
    """

    num_nodes: int
    num_byzantine: int = 0
    alpha: float = 0.01
    horizon: int = 100
    honest_flag_rate: float = 0.05
    """q_h"""
    liar_flag_rate: float = 0.9
    """q_b"""
    outlier_factor: float = 15.0
    released: frozenset[str] = frozenset()
    """Nodes let in again: no evidence is kept of them."""

    @property
    def threshold(self) -> float:
        """h"""
        return math.log(self.num_nodes * self.horizon / self.alpha)

    @property
    def increments(self) -> tuple[float, float]:
        """x of a node that is not flagged, and of one that is."""
        q_h, q_b = self.honest_flag_rate, self.liar_flag_rate
        return math.log((1 - q_b) / (1 - q_h)), math.log(q_b / q_h)

    def __call__(self, state: Any, view: RoundView) -> tuple[dict[str, Any], dict[str, float]]:
        """One round more."""
        cases = {node: Case(**c) for node, c in (state or {}).get("cases", {}).items() if node not in self.released}
        out = self._out(state)
        flags = {node: flag for node, flag in self._flags(view).items() if node not in self.released}
        judged = {*(set(view.answered) - hidden(view)), *flags, *view.evidence} - self.released - set(out)
        for node in sorted(judged):
            cases[node] = self._judged(cases.get(node, Case()), flags.get(node), view.evidence.get(node))
        out |= self._caught(cases, out, view)
        after = {
            "cases": {node: asdict(case) for node, case in cases.items()},
            "quarantined": {node: asdict(quarantine) for node, quarantine in out.items()},
        }
        return after, {
            "num_flagged": float(len(flags)),
            "num_quarantined": float(len(out)),
            "max": max((case.llr for node, case in cases.items() if node not in out), default=0.0),
        }

    def llr(self, state: Any) -> dict[str, float]:
        """Evidence against each node so far."""
        return {node: case["llr"] for node, case in (state or {}).get("cases", {}).items()}

    def quarantined(self, state: Any) -> dict[str, str]:
        """Nodes that are asked no more, each with the evidence."""
        return {node: quarantine.evidence for node, quarantine in self._out(state).items()}

    def caught_lying(self, state: Any) -> frozenset[str]:
        """Those of the quarantined whose replies were lies: no honest node is among them by looking unusual."""
        return frozenset(node for node, quarantine in self._out(state).items() if quarantine.by_lies)

    def _out(self, state: Any) -> dict[str, Quarantine]:
        kept = (state or {}).get("quarantined", {})
        return {node: Quarantine(**q) for node, q in kept.items() if node not in self.released}

    def _flags(self, view: RoundView) -> dict[str, Flag]:
        """Who is flagged in the round; a refusal outweighs what a row looks like."""
        far = outliers(view, factor=self.outlier_factor, most=max(self.num_byzantine, 1))
        return {**far, **lies(view)}

    def _judged(self, case: Case, flag: Flag | None, found: float | None) -> Case:
        """The case after one round more: a flag, what another test found, or nothing."""
        unflagged, flagged = self.increments
        lied = flag is not None and flag.lie
        x = found if found is not None and not lied else flagged if flag else unflagged
        llr = max(0.0, case.llr + x)
        if llr == 0.0:
            return Case()
        return Case(
            llr=llr,
            llr_of_lies=max(0.0, case.llr_of_lies + (flagged if lied else unflagged)),
            num_flags=case.num_flags + (x > 0),
            num_rounds=case.num_rounds + 1,
            last=flag.evidence if flag else case.last,
        )

    def _caught(
        self, cases: Mapping[str, Case], out: Mapping[str, Quarantine], view: RoundView
    ) -> dict[str, Quarantine]:
        """Who is quarantined now: for lies, then the most suspect first."""
        h = self.threshold
        room = max(self.num_byzantine, 1) - sum(not quarantine.by_lies for quarantine in out.values())
        due = [node for node, case in cases.items() if case.llr >= h and node not in out]
        caught: dict[str, Quarantine] = {}
        for node in sorted(due, key=lambda node: (cases[node].llr_of_lies < h, -cases[node].llr, node)):
            by_lies = cases[node].llr_of_lies >= h
            if by_lies or (room > 0 and view.fits(len(caught) + 1)):
                caught[node] = Quarantine(view.round, self._evidence(cases[node]), by_lies)
                room -= not by_lies
        return caught

    def _evidence(self, case: Case) -> str:
        last = f"; last: {case.last}" if case.last else ""
        return (
            f"flagged in {case.num_flags} of {case.num_rounds} rounds "
            f"(log-likelihood ratio {case.llr:.1f}, limit {self.threshold:.1f}){last}"
        )


# ---------------------------------------------------------------- flags of one round


def hidden(view: RoundView) -> set[str]:
    """Nodes whose replies nobody saw: members of groups, and of groups that were lost."""
    members = {node for row in view.rows if len(row.members) > 1 for node in row.members}
    return members | {refusal.node for refusal in view.refusals if refusal.reason == "group_lost"}


def lies(view: RoundView) -> dict[str, Flag]:
    """Nodes whose replies were refused for a lie.

    Nobody's, where that is more than half of all who replied: liars are fewer, so the base or a limit is at fault (a
    model that was driven to where training diverges makes honest nodes reply NaN).
    """
    found = {r.node: Flag(f"{r.reason}, {r.evidence}", lie=True) for r in view.refusals if r.reason in LIES}
    return found if 2 * len(found) <= len({*view.answered, *found}) else {}


def outliers(view: RoundView, *, factor: float, most: int) -> dict[str, Flag]:
    """Nodes whose update lies far from the others, `most` at most, or is nothing.

    A group's mean accuses no one: its members cannot be told apart.
    """
    single = [i for i, row in enumerate(view.rows) if len(row.members) == 1]
    found = unusual(view, single, factor=factor, most=most)
    return {view.rows[i].members[0]: flag for i, flag in found.items()}


def unusual(view: RoundView, among: Sequence[int], *, factor: float, most: int) -> dict[int, Flag]:
    """Of the rows with these indices, which are compared with each other: those far off, `most` at most, or nothing."""
    if len(among) < 3:
        return {}
    rows = rows_of(view.updates_nd)
    rows = rows if len(among) == rows.num_rows else rows.taken(np.array(among))
    norms_n = np.sqrt(squared_norms(rows))
    found = {**_far(distances(rows), norms_n, factor=factor, most=most), **_idle(norms_n)}
    return {among[i]: flag for i, flag in found.items()}


def distances(updates: Updates) -> Float64:
    """How far each row is from the others: its median distance to them.  (n, d) -> (n,)

    The lower of the two middle ones where their number is even: of n - 1 >= 2 f others, n - 1 - f >= f are honest, so f
    rows that lie together, wherever, are far from the honest ones and not the reverse.
    """
    squared_nn = squared_distances(updates)
    # its distance 0 to itself is the first of each sorted row
    return np.asarray(np.sqrt(np.sort(squared_nn, axis=1)[:, len(squared_nn) // 2]))


def _far(distances_n: Float64, norms_n: Float64, *, factor: float, most: int) -> dict[int, Flag]:
    """Rows among the `most` furthest that are beyond `factor` times the scale and `LEAST_DISTANCE` norms.

    The scale is the (n - g)-th smallest value, of distances and of norms, for g liars (f, or a third where f is less):
    who lies far away cannot raise it above what an honest row has, and who copies one honest row, so that it and its
    copies look near, cannot lower it below what another honest row has.  That takes 2 g + 2 rows; with fewer nobody is
    far.
    """
    n = len(distances_n)
    g = max(most, (n - 1) // 3)
    if n < 2 * g + 2:
        return {}
    scale, length = (float(np.sort(values)[n - g - 1]) for values in (distances_n, norms_n))
    limit = max(factor * scale, LEAST_DISTANCE * length)
    return {
        int(i): Flag(
            f"median distance {distances_n[i]:.3g} to the other updates, {n - g} of all are within {scale:.3g}"
        )
        for i in np.argsort(-distances_n, kind="stable")[:most]
        if distances_n[i] > limit
    }


def _idle(norms_n: Float64) -> dict[int, Flag]:
    """Rows that are nothing beside the others."""
    middle = float(np.median(norms_n))
    idle = np.flatnonzero(norms_n < IDLE * middle)
    return {int(i): Flag(f"norm {norms_n[i]:.3g}, that of the median update is {middle:.3g}") for i in idle}
