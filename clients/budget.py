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
from conf.schema import DpTask, NodeTask, Released
from trellis import canonical, wire
from trellis.errors import BudgetError, LedgerError, PolicyRefusal
from trellis.privacy import accountant
from trellis.privacy.accountant import Entry
from trellis.privacy.ledger import Charge, Kind, Ledger
from trellis.types import Request

DENIED = "policy.budget"


@dataclass(frozen=True, slots=True)
class Spending:
    """What a round may cost at this node: charged, and yet to be settled."""

    noise_multiplier: float
    charges: tuple[Charge, ...]


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
        self, task: DpTask, request: Request, about: str, *, sample_rate: float, steps: int, releases: int, data: str
    ) -> Spending:
        """Charge a round's training, and `releases` of noised counts, or refuse it.

        Raises PolicyRefusal("policy.budget") with what is spent, asked and left; where the ledger cannot be read, too.
        """
        try:
            with self.ledger.locked():
                known = [c for c in self.ledger.charges() if c.about == about and c.id not in self.ledger.settled()]
                if known:
                    return Spending(_noise_of(known), tuple(known))
                noise = self._noise(task, request.run, sample_rate=sample_rate, steps=steps, releases=releases)
                charges = self._charges(task, request, about, noise, sample_rate, steps, releases, data)
                self._require(charges)
                for charge in charges:
                    self.ledger.charge(charge)
                return Spending(noise, tuple(charges))
        except (LedgerError, BudgetError) as error:
            raise PolicyRefusal(DENIED, f"{self.own.spec.name}: {error}") from error

    def settle(self, spending: Spending) -> None:
        """All steps of it were taken."""
        for charge in spending.charges:
            self.ledger.settle(charge.id, charge.steps)

    def _noise(self, task: DpTask, run: str, *, sample_rate: float, steps: int, releases: int) -> float:
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
        assert task.target_epsilon is not None
        # a node scores in every round, and at the end
        published = [Entry(task.metrics_noise_multiplier, 1.0, releases * (task.rounds + 1))] if releases else []
        found = accountant.noise_multiplier_for(
            task.target_epsilon, self.delta, sample_rate=sample_rate, steps=steps * task.rounds, spent=published
        )
        return max(found, least)

    def _charges(
        self,
        task: DpTask,
        request: Request,
        about: str,
        noise: float,
        sample_rate: float,
        steps: int,
        releases: int,
        data: str,
    ) -> list[Charge]:
        parts: list[tuple[Kind, float, float, int]] = []
        if steps:
            parts.append(("dp_sgd", noise, sample_rate, steps))
        if releases:
            parts.append(("counts", task.metrics_noise_multiplier, 1.0, releases))
        tries = sum(c.about == about for c in self.ledger.charges())
        return [
            Charge(
                id=canonical.digest([about, kind, tries]),
                run=request.run,
                round=request.round,
                about=about,
                kind=kind,
                noise_multiplier=sigma,
                sample_rate=q,
                steps=taken,
                data_digest=data,
                at=time.time(),
            )
            for kind, sigma, q, taken in parts
        ]

    def _require(self, charges: list[Charge]) -> None:
        """Raises PolicyRefusal where these charges would exceed the budget."""
        most = self.own.spec.policy.dp.max_epsilon
        if most is None:
            return
        entries = self.ledger.entries()
        spent = accountant.epsilon(entries, self.delta)
        after = accountant.epsilon([*entries, *(c.entry(c.steps) for c in charges)], self.delta)
        if after > most:
            raise PolicyRefusal(
                DENIED,
                f"{self.own.spec.name}: epsilon {spent:.4g} of {most:g} is spent on {self.ledger.unit} at delta "
                f"{self.delta:g}; this round would make it {after:.4g}, {max(most - spent, 0):.4g} is left",
            )


def told(own: Identity, request: Request) -> dict[str, float]:
    """What the server is told of this node's budget: nothing without private training, or where the site hides it."""
    if not request.config.get("dp") or own.spec.policy.dp.hide_epsilon:
        return {}
    try:
        found = Budget.of(own)
        charges = [c for c in found.ledger.charges() if c.kind == "dp_sgd"]
        return {wire.EPSILON: found.epsilon(), **({wire.NOISE: charges[-1].noise_multiplier} if charges else {})}
    except (PolicyRefusal, LedgerError):
        return {}


def releases_of(task: NodeTask, num_splits: int) -> int:
    """Noised vectors of counts that a request asks for."""
    noisy = task.dp is not None and task.dp.metrics is Released.noisy
    return num_splits if noisy else 0


def _noise_of(charges: list[Charge]) -> float:
    return next((c.noise_multiplier for c in charges if c.kind == "dp_sgd"), 0.0)


def folder_of(own: Identity) -> Path:
    """Where the ledger is: in the folder that the site names, or in the node's store."""
    named = own.spec.policy.dp.ledger
    if named is not None and not own.simulated:
        return (own.file.parent if own.file is not None else Path()) / named
    if own.store is None:
        raise PolicyRefusal(DENIED, f"{own.spec.name} has no folder where what is spent could be written down")
    return own.store / "ledger"
