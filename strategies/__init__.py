"""Ready-made strategies: `from strategies import robust, trimmed_mean, multi_krum, ...` (`strategies.ready`).

They are made when asked for, so that the maths below this package can be imported without Flower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.ready import Ready

    bulyan: Ready
    centered_clipping: Ready
    cge: Ready
    dnc: Ready
    flame: Ready
    fltrust: Ready
    foolsgold: Ready
    geometric_median: Ready
    krum: Ready
    meamed: Ready
    mean: Ready
    median: Ready
    multi_krum: Ready
    robust: Ready
    trimmed_mean: Ready


__all__ = [
    "bulyan", "centered_clipping", "cge", "dnc", "flame", "fltrust", "foolsgold", "geometric_median", "krum", "meamed",
    "mean", "median", "multi_krum", "robust", "trimmed_mean",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}")
    from strategies.ready import READY

    return READY[name]
