"""A node's privacy budget: what its site allows to be spent on its data, and what was spent.

Before the first step of a private round is taken, its cost stands in the ledger, on disk.  A request that would exceed
the budget is refused before anything is trained, with the numbers.  A request that was charged and never answered (the
process died) is trained again under the same charge: nothing of the first attempt left the node.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from clients.identity import Identity
from conf.schema import DpTask
from trellis import canonical, wire
from trellis.errors import BudgetError, ConfigError, LedgerError, PolicyRefusal
from trellis.privacy import accountant
from trellis.privacy.ledger import Charge, Ledger
from trellis.types import Request

DENIED = "policy.budget"


@dataclass(frozen=True, slots=True)
class Spending:
    """What a round may cost at this node: charged, and yet to be settled."""

    noise_multiplier: float
    charge: Charge | None
    """None: there is nothing to train on, and nothing to pay."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of the data that a node trains on."""

    own: Identity
    ledger: Ledger

    @classmethod
    def of(cls, own: Identity) -> Budget:
        """Raises PolicyRefusal("policy.budget") where the site has named no data, set no budget, or has no folder."""
        policy, name = own.spec.policy.dp, own.spec.name
        unit = policy.privacy_unit or (name if own.simulated else None)
        if unit is None:
            raise PolicyRefusal(
                DENIED,
                f"{name} has not named the data that a budget is for: set policy.dp.privacy_unit in its own file",
            )
        if policy.max_epsilon is None and not own.simulated:
            raise PolicyRefusal(DENIED, f"{name} has set no budget: set policy.dp.max_epsilon in its own file")
        folder = folder_of(own)
        if not own.simulated and policy.ledger is not None and not folder.is_dir():
            raise PolicyRefusal(
                DENIED, f"{name}: {folder}, the folder of its ledger, is not there: is its disk mounted?"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return cls(own, Ledger(folder / f"{unit}.jsonl", durable=not own.simulated, unit=unit))

    @property
    def delta(self) -> float:
        return self.own.spec.policy.dp.delta

    def epsilon(self) -> float:
        """Everything spent so far, at the site's delta."""
        return accountant.epsilon(self.ledger.entries(), self.delta)

    def charge(
        self, task: DpTask, request: Request, about: str, *, sample_rate: float, steps: int, data: str
    ) -> Spending:
        """Charge a round's training, or refuse it.

        Raises PolicyRefusal("policy.budget") with what is spent, asked and left; where the ledger cannot be read, too.
        """
        try:
            with self.ledger.locked():
                settled = self.ledger.settled()
                # charged, and nothing left the node: but only for the same steps over the same rows
                known = [
                    c
                    for c in self.ledger.charges()
                    if c.about == about
                    and c.id not in settled
                    and (c.sample_rate, c.steps, c.data_digest) == (sample_rate, steps, data)
                ]
                if known:
                    return Spending(known[0].noise_multiplier, known[0])
                noise = self._noise(task, request.run, sample_rate=sample_rate, steps=steps)
                charge = self._charge(request, about, noise, sample_rate, steps, data)
                self._require(charge)
                if steps:
                    self.ledger.charge(charge)
                return Spending(noise, charge if steps else None)
        except (LedgerError, BudgetError) as error:
            raise PolicyRefusal(DENIED, f"{self.own.spec.name}: {error}") from error

    def settle(self, spending: Spending) -> None:
        """All steps of it were taken."""
        if spending.charge is not None:
            self.ledger.settle(spending.charge.id, spending.charge.steps)

    def _noise(self, task: DpTask, run: str, *, sample_rate: float, steps: int) -> float:
        """The noise of this run: what it asks for, or what its whole plan needs; solved once, then kept."""
        least = self.own.spec.policy.dp.min_noise_multiplier
        if task.noise_multiplier is not None:
            if task.noise_multiplier < least:
                raise PolicyRefusal(
                    DENIED,
                    f"{self.own.spec.name} asks for privacy.noise_multiplier={least:g} at least, the run has "
                    f"{task.noise_multiplier:g}",
                )
            return task.noise_multiplier
        earlier = [c for c in self.ledger.charges() if c.run == run and c.kind == "dp_sgd"]
        if earlier:
            return earlier[0].noise_multiplier
        if task.target_epsilon is None:
            raise PolicyRefusal(DENIED, f"{self.own.spec.name}: the run says neither its noise nor what it may spend")
        try:
            found = accountant.noise_multiplier_for(
                task.target_epsilon, self.delta, sample_rate=sample_rate, steps=steps * task.rounds
            )
        except ConfigError as error:
            raise PolicyRefusal(DENIED, f"{self.own.spec.name}: {error}") from error
        return max(found, least)

    def _charge(self, request: Request, about: str, noise: float, sample_rate: float, steps: int, data: str) -> Charge:
        tries = sum(c.about == about for c in self.ledger.charges())
        return Charge(
            id=canonical.digest([about, "dp_sgd", tries]),
            run=request.run,
            round=request.round,
            about=about,
            kind="dp_sgd",
            noise_multiplier=noise,
            sample_rate=sample_rate,
            steps=steps,
            data_digest=data,
            at=time.time(),
        )

    def _require(self, charge: Charge) -> None:
        """Raises PolicyRefusal where this charge would exceed the budget."""
        policy, name = self.own.spec.policy.dp, self.own.spec.name
        most, entries = policy.max_epsilon, self.ledger.entries()
        if most is None:
            return
        after = accountant.epsilon([*entries, charge.entry(charge.steps)], self.delta)
        if after <= most:
            return
        if policy.hide_epsilon:
            raise PolicyRefusal(DENIED, f"{name}: this round would exceed the budget of its data")
        spent = accountant.epsilon(entries, self.delta)
        raise PolicyRefusal(
            DENIED,
            f"{name}: epsilon {spent:.4g} of {most:g} is spent on {self.ledger.unit} at delta {self.delta:g}; this "
            f"round would make it {after:.4g}, {max(most - spent, 0):.4g} is left",
        )


def told(own: Identity, request: Request) -> dict[str, float]:
    """What the server is told of this node's budget: nothing without private training, or where the site hides it."""
    if not request.config.get("dp") or own.spec.policy.dp.hide_epsilon:
        return {}
    try:
        found = Budget.of(own)
        charges = [c for c in found.ledger.charges() if c.run == request.run]
        return {wire.EPSILON: found.epsilon(), **({wire.NOISE: charges[-1].noise_multiplier} if charges else {})}
    except (PolicyRefusal, LedgerError):
        return {}


def folder_of(own: Identity) -> Path:
    """Where the ledger is: in the folder that the site names, or in the node's store."""
    named = own.spec.policy.dp.ledger
    if named is not None and not own.simulated:
        return (own.file.parent if own.file is not None else Path()) / named
    if own.store is None:
        raise PolicyRefusal(DENIED, f"{own.spec.name} has no folder where what is spent could be written down")
    return own.store / "ledger"
