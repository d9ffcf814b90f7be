"""Every error Trellis raises on purpose.

    TrellisError
    ├── ConfigError         the run cannot be composed (exit code 2)
    ├── DataError           a file, a column or a split is not as it must be
    │   └── MissingData     a data file is not where it was looked for
    ├── WireError           a message does not follow the protocol
    ├── SecAggError         a step of secure aggregation does not check: a key, a share, a signature, a set
    ├── BaseSpent           a masked round was asked for again, and its sum is gone: the run stops
    ├── CohortTooSmall      too few rows for the rule: the round closes, the model stays
    ├── NotFinite           rows cannot be combined in float32: the round closes, the model stays
    ├── PolicyRefusal       this node does not consent to a request
    ├── BudgetError         a privacy budget would be exceeded
    ├── LedgerError         a privacy ledger is damaged
    ├── ResumeError         a run folder cannot be continued
    ├── VersionError        a stored model version is damaged, or is not what its card says
    └── TrackingError       the tracking server refused or could not be reached

A message says what was found, what was needed and what to do.
"""

from __future__ import annotations


class TrellisError(Exception):
    """Base of all errors above."""


class ConfigError(TrellisError):
    """The run cannot be composed from this configuration."""


class DataError(TrellisError):
    """Data are unreadable or do not fit the sector's schema."""


class MissingData(DataError):
    """A data file does not exist."""


class WireError(TrellisError):
    """A message does not follow the protocol.  `code` is one of `types.REFUSALS`."""

    def __init__(self, code: str, evidence: str) -> None:
        super().__init__(f"{code}: {evidence}")
        self.code = code
        self.evidence = evidence


class SecAggError(TrellisError):
    """A step of secure aggregation does not check.  `code` is one of `types.REFUSALS`, or of `types.POLICY_CODES` where
    a node refuses what a server asks."""

    def __init__(self, code: str, evidence: str) -> None:
        super().__init__(f"{code}: {evidence}")
        self.code = code
        self.evidence = evidence


class BaseSpent(TrellisError):
    """Nodes answer for a base once, and what they answered for this one does not make a round."""


class CohortTooSmall(TrellisError):
    """Fewer rows arrived than the rule, or the quorum, needs."""


class NotFinite(TrellisError):
    """Rows hold NaN, infinities, or numbers whose combination leaves float32."""


class PolicyRefusal(TrellisError):
    """The node's own policy forbids the request.  `code` is one of `types.POLICY_CODES`."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class BudgetError(TrellisError):
    """A privacy budget would be exceeded, or is already."""


class LedgerError(TrellisError):
    """A privacy ledger is damaged, is another's, or is asked for what it must not hold."""


class ResumeError(TrellisError):
    """A run folder is missing, damaged, or of another configuration."""


class VersionError(TrellisError):
    """A stored model version is damaged, or is not what its card says."""


class TrackingError(TrellisError):
    """A record could not be delivered to the tracking server."""
