"""The server's own update, for a rule that trusts it (`reference_d`).

In every round the server trains on clean rows of its own from the params that the nodes get.
Cao et al., FLTrust, NDSS 2021, Section V-A.  https://arxiv.org/abs/2012.13995

FLTrust rescales every update to the length of g_0, so g_0 must come from as many local steps as the nodes take.  Here
the server trains with the nodes' own recipe, equal in epochs and batch size: with fewer rows than a node has it takes
fewer steps, and the federation moves by as much less a round.
"""

from __future__ import annotations

from collections.abc import Callable

from conf.schema import DataSource, RunConfig
from sectors import training
from sectors.base import Sector
from sectors.params import initial_arrays
from trellis import canonical
from trellis.types import ServerState
from trellis.vectors import Layout, Vector

Reference = Callable[[ServerState], Vector]
"""The update that the server makes from a state's params.  -> (d,)"""


def reference(config: RunConfig, sector: Sector) -> Reference:
    """Shared layers only; local layers, which no server has, start from their initial values in every round.

    Raises ConfigError where the server has no rows; DataError, MissingData.
    """
    rows = sector.server_rows(config.data is DataSource.synthetic)
    initial = initial_arrays(sector, config.seed)

    def update(state: ServerState) -> Vector:
        base = {name: state.params.get(name, array) for name, array in initial.items()}
        seed = canonical.seed_for(config.seed, "reference", state.round + 1)
        trained = training.train(sector, config.sector.training, base, rows, seed=seed, device=config.device)
        return Layout.of(state.params).subtract(trained.arrays, state.params)

    return update
