"""Other libraries' rules, to compare with: Flower's own functions, and ByzFL's classes.

ByzFL's package imports torchvision and seaborn for its benchmark; its rules need neither, so it is installed without
dependencies (`make setup`) and only its rules are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def byzfl() -> ModuleType | None:
    """ByzFL's `aggregators` module (rules and pre-aggregators), or None where it is not installed."""
    found = importlib.util.find_spec("byzfl") if "byzfl" not in sys.modules else sys.modules["byzfl"].__spec__
    if found is None or found.submodule_search_locations is None:
        return None
    if "byzfl" not in sys.modules:
        package = ModuleType("byzfl")  # the package without what its __init__ imports
        package.__spec__, package.__path__ = found, list(found.submodule_search_locations)
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")
