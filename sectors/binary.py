"""Two classes, one logit: the loss, the counts and the network that such tasks share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sectors import metrics
from sectors.base import Batch, Sector
from trellis.types import Counts
from trellis.vectors import CountSpec


class Squeeze(nn.Module):
    """(B, 1) -> (B,)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def mlp(num_features: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with tanh between them, ending in one logit.  (B, num_features) -> (B,)

    tanh, not ReLU: an outlier moves a bounded activation little, so one row cannot throw a small node's update.
    """
    layers: list[nn.Module] = []
    width = num_features
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), nn.Tanh()]
        width = next_width
    named = {"body": nn.Sequential(*layers), "head": nn.Linear(width, 1), "squeeze": Squeeze()}
    return nn.Sequential(OrderedDict(named))


@dataclass(frozen=True)
class Binary(Sector):
    """A sector whose outputs are (B,) logits of the positive class and whose rows have `y`, 0 or 1."""

    num_classes: ClassVar[int | None] = 2
    head: ClassVar[tuple[str, ...]] = ("head.*",)
    num_strata: ClassVar[int] = 1
    """Strata of the negatives that `counts` keeps apart; above 1, rows have `stratum`."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of each row.  -> (B,)"""
        target = batch["y"].to(outputs.dtype)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, target, reduction="none")

    def counts(self, outputs: Tensor, batch: Batch) -> Counts:
        """Histograms of the logits: positives, and negatives by stratum."""
        strata = batch["stratum"].cpu().numpy() if self.num_strata > 1 else None
        logits, labels = outputs.detach().cpu().numpy(), batch["y"].cpu().numpy()
        return metrics.score_counts(logits, labels, strata, self.num_strata)

    def count_specs(self) -> tuple[CountSpec, ...]:
        """One histogram of the positives, one of the negatives a stratum."""
        return (
            CountSpec("positives", (metrics.NUM_BINS,), "int64"),
            CountSpec("negatives", (self.num_strata, metrics.NUM_BINS), "int64"),
        )

    def counts_problem(self, counts: Counts) -> str | None:
        scored = int(counts["positives"].sum() + counts["negatives"].sum())
        return f"{scored} scores of {int(counts['rows'])} rows" if scored != int(counts["rows"]) else None

    def metrics(self, counts: Counts) -> dict[str, float]:
        """AUC, average precision and accuracy, as far as the counts give them."""
        if not counts:
            return {}
        pos, neg = counts["positives"], counts["negatives"].sum(axis=0)
        found = {
            "auc": metrics.auc_from_counts(pos, neg),
            "ap": metrics.average_precision_from_counts(pos, neg),
            "accuracy": metrics.accuracy_from_counts(pos, neg),
        }
        return {k: v for k, v in found.items() if v is not None}
