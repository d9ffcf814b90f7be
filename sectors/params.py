"""A model's tensors as named arrays, and the ones every run starts from.  Used by server and nodes alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sectors.base import Sector
from trellis import canonical
from trellis.vectors import Arrays

# cuBLAS is deterministic only with a workspace that is set before its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def initial_arrays(sector: Sector, seed: int) -> dict[str, npt.NDArray[np.generic]]:
    """The params every run with this seed starts from, local layers included."""
    with reproducible(canonical.seed_for(seed, "init")):
        return arrays_of(sector.build_model())


def arrays_of(model: nn.Module) -> dict[str, npt.NDArray[np.generic]]:
    """Copies of all tensors, in the model's order."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def load_into(model: nn.Module, arrays: Arrays) -> nn.Module:
    """Put named arrays into a model; every tensor must be there."""
    model.load_state_dict({name: torch.tensor(np.asarray(a)) for name, a in arrays.items()})
    return model


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic kernels, torch seeded; all put back, since a simulation shares the user's process."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(1)
    # Not `use_deterministic_algorithms`, which does the same and imports torch's compiler first (seconds).
    torch.set_deterministic_debug_mode("error")
    try:
        with torch.random.fork_rng(devices=None if _has_accelerator() else []):
            # `manual_seed` of all devices notes a stack trace where there are none (0.2 ms).
            (torch.manual_seed if _has_accelerator() else torch.default_generator.manual_seed)(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
