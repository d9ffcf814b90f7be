"""Is a loader honest, and are its data ready?  The exam of a sector on the nodes of a configuration.

A federation's score means something only if no row that is tested on was trained on, at any node; if nothing was fitted
on rows of several owners; and if every node has rows of every class.  Each is tried here on the rows that the nodes
would load, not read off the code: units are left out and the rest must not move, other nodes' rows are replaced and a
node's own must not move, rows are hashed and must stand in one place only.

Every check gives findings.  A loader that fails one says what was found and what to do; it never ends the exam.
This sees all rows in one place, which no deployment may: it is for simulation, and for a node's own file at the node.
"""

from experiments.readiness.exam import CHECKS, examine
from experiments.readiness.findings import QUANTILES, ColumnSeen, Finding, NodeRows, Readiness

__all__ = ["CHECKS", "QUANTILES", "ColumnSeen", "Finding", "NodeRows", "Readiness", "examine"]
