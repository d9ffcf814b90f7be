"""Ready-made strategies for anyone's Flower app: one line where `FedAvg()` stood.

    from strategies import robust

    strategy = robust(num_byzantine=2)
    result = strategy.start(grid, initial_arrays, num_rounds=10)

Each is a `RoundStrategy` that holds the rule of its name; the app on the nodes stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strategies import preaggregators, rules, samplers, server_optimizers
from strategies.exchange import PlainExchange
from strategies.flower import RoundStrategy
from strategies.observers.suspicion import Suspicion
from trellis.types import Observer, ServerState
from trellis.vectors import Vector


@dataclass(frozen=True, slots=True)
class Ready:
    """A rule, waiting for what it is to survive.  Calling it makes a strategy."""

    name: str

    def __call__(
        self,
        *,
        num_byzantine: int = 0,
        preaggregators: Sequence[str] = (),
        fraction: float = 1.0,
        min_replies: int = 1,
        max_update_norm: float = 1000.0,
        server_optimizer: server_optimizers.ServerOptimizer | None = None,
        suspicion: Suspicion | None = None,
        observers: Mapping[str, Observer] | None = None,
        reference: Callable[[ServerState], Vector] | None = None,
        device: str = "cpu",
        seed: int = 0,
        **rule_options: Any,
    ) -> RoundStrategy:
        """A strategy with this rule.

        `num_byzantine` lying nodes are survived in every round; fewer good replies than that takes, or than
        `min_replies`, close a round and the model stays.  `preaggregators` are names ("arc", "nnm", ...) in their
        order; `fraction` of the nodes is asked; an update longer than `max_update_norm` is refused; `suspicion` stops
        asking nodes that lie again and again.  `reference` is the server's own update, for fltrust.  Further keywords
        are options of the rule.  Raises ConfigError for options or names that do not exist, and for a `num_byzantine`
        that the rule cannot survive at all.
        """
        return RoundStrategy(
            rule=rules.get(self.name),
            rule_options=rule_options,
            num_byzantine=num_byzantine,
            preaggregators=[_preaggregator(name) for name in preaggregators],
            sampler=samplers.everyone if fraction == 1.0 else samplers.uniform(fraction=fraction),
            exchange=PlainExchange(native=False, max_update_norm=max_update_norm),
            server_optimizer=server_optimizer or server_optimizers.plain(),
            suspicion=suspicion,
            observers=observers or {},
            reference=reference,
            min_replies=min_replies,
            device=device,
            seed=seed,
        )


_preaggregator = preaggregators.get

READY = {name: Ready(name) for name in rules.RULES}
"""One for each rule of the catalogue: `strategies.multi_krum`, `strategies.robust`, ..."""
