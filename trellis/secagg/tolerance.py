"""What a group of n members with threshold t survives, and what it keeps secret.

semi_honest       t > n / 2:   the server follows the protocol, and fewer than t members tell it what they know.
malicious_server  t > 2 n / 3: two different sets of t members have more than 2 t - n in common, so with at most
                  2 t - n - 1 colluders no two survivor sets are both confirmed (Bonawitz et al., section 6.2).

In both at most t - 2 colluders: every sum then holds two honest members at least.
"""

from __future__ import annotations

from dataclasses import dataclass

from trellis.types import Threat


def least_threshold(threat: Threat, num_members: int) -> int:
    """The smallest threshold that is safe under an assumption; 2 at least, since a share must not be the secret."""
    t = num_members // 2 + 1 if threat is Threat.semi_honest else 2 * num_members // 3 + 1
    return max(t, 2)


def colluders(threat: Threat, num_members: int, threshold: int) -> int:
    """Members that may tell the server all they know, and the others' updates stay hidden in a sum."""
    most = threshold - 1 if threat is Threat.semi_honest else 2 * threshold - num_members - 1
    return max(min(most, threshold - 2), 0)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What one group gives and survives."""

    threat: Threat
    num_members: int
    threshold: int
    num_organisations: int
    min_group: int
    """Organisations that a sum must span."""

    @property
    def colluders(self) -> int:
        return colluders(self.threat, self.num_members, self.threshold)

    @property
    def privacy_set(self) -> int:
        """Nodes behind every sum, at least."""
        return max(self.threshold, self.min_group)

    @property
    def dropouts(self) -> int:
        """Members that may be missing, whichever they are, and the group still has its sum."""
        # each missing member may be the last of its organisation
        return max(min(self.num_members - self.threshold, self.num_organisations - self.min_group), 0)
