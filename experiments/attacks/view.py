"""What an attacker knows when it lies, and what the catalogue says of a lie.

Attackers collude: each sees every honest update of the round, and they draw from one generator, so that they send the
same vector wherever the formula says so.  Shapes are suffixes: h honest rows, d coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from strategies import rows
from trellis.errors import ConfigError
from trellis.types import Aggregated
from trellis.vectors import Vector

Matrix = npt.NDArray[np.float32]
State = Mapping[str, npt.NDArray[np.generic]]
Aggregate = Callable[[Matrix], npt.NDArray[np.floating] | Aggregated]
"""(n, d) -> (d,), or an `Aggregated` that also says who counted."""

BLOCK = 8192
"""Columns looked at in float64 at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What one attacker sees of a round.  Its arrays are only read."""

    own_d: Vector
    """What this node would have sent, were it honest."""
    honest_hd: Matrix = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Updates of the honest nodes of the cohort, sorted by name; no rows where the attack needs no one else's."""
    num_attackers: int = 1
    """Attackers in the cohort."""
    num_nodes: int | None = None
    """The cohort; None: the honest rows and the attackers."""
    round: int = 1
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    """Every attacker of the round has this generator, in the same state."""
    private_rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))
    """This attacker's own."""
    previous_step_d: Vector | None = None
    """base - the base this node was sent before; None the first time."""
    aggregate: Aggregate | None = None
    """The run's own pipeline."""
    state: State = field(default_factory=dict)
    """What the attack's `remember` gave: in a run it has seen this round too."""

    @property
    def n(self) -> int:
        return len(self.honest_hd) + self.num_attackers if self.num_nodes is None else self.num_nodes

    def mean(self) -> Vector:
        """mu, the mean of the honest updates.  -> (d,)"""
        h = self._num_honest()
        return rows.combine(self.honest_hd, np.full(h, 1 / h))

    def deviation(self) -> Vector:
        """sigma, their standard deviation with divisor h - 1, coordinate by coordinate; 0 for one row.  -> (d,)"""
        h = self._num_honest()
        sigma_d = np.zeros(self.honest_hd.shape[1], np.float32)
        for at in range(0, len(sigma_d) if h > 1 else 0, BLOCK):
            columns = slice(at, at + BLOCK)
            sigma_d[columns] = self.honest_hd[:, columns].astype(np.float64).std(axis=0, ddof=1)
        return sigma_d

    def _num_honest(self) -> int:
        if not len(self.honest_hd):
            raise ConfigError("this attack needs the honest nodes' updates, and the view has none")
        return len(self.honest_hd)


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What a protocol attack changes: the honest reply of this round, and what it remembers of earlier ones."""

    content: RecordDict
    round: int = 1
    state: State = field(default_factory=dict)


Kind = Literal["model", "data", "protocol"]


@dataclass(frozen=True, slots=True)
class AttackSpec:
    """An attack and what it needs.

    model:    `fn(view, **options)` -> (d,) float32, the update that is sent.
    data:     `fn(rows, *, num_classes, rng, **options)` -> the rows trained on; `boost(update_d, **options)` -> what is
              sent of the update they gave.
    protocol: `fn(reply, **options)` -> another content.

    `remember(view or reply, **options)` -> the state after this round, for the next; it is called before `fn`, which
    finds it in its argument.
    """

    name: str
    fn: Callable[..., Any]
    kind: Kind = "model"
    needs_others: bool = False
    """The honest nodes' updates must be known before the attackers reply."""
    others_if: Mapping[str, object] = field(default_factory=dict)
    """Options whose value makes an attack need the others' updates."""
    needs_previous: bool = False
    """The step of the global model since this node was asked last."""
    remember: Callable[..., State] | None = None
    boost: Callable[..., Vector] | None = None

    def sees_others(self, options: Mapping[str, object]) -> bool:
        """Whether, with these options, it needs the honest nodes' updates."""
        return self.needs_others or any(options.get(key) == value for key, value in self.others_if.items())
