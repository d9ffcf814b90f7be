"""`sectors.get`: names and options in, a sector or a readable refusal out."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sectors
from sectors.banks import Banks
from trellis.errors import ConfigError


def test_importing_the_catalogue_imports_no_torch() -> None:
    code = "import sectors, sys; print(sectors.names()); sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_build_the_sector_and_lists_become_tuples() -> None:
    assert sectors.get("banks", {"hidden": [8, 4], "alpha": 1}) == Banks(hidden=(8, 4), alpha=1.0)
    assert hash(sectors.get("banks", {"hidden": [8]})) == hash(Banks(hidden=(8,)))


def test_an_unknown_sector_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown sector 'bank'.*banks, healthcare_heart"):
        sectors.get("bank")


def test_an_unknown_option_is_refused_with_the_options() -> None:
    with pytest.raises(ConfigError, match=r"no option 'hiden' \(found 3\).*partition: str = 'amount_band'"):
        sectors.get("banks", {"hiden": 3})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alpha", "0.5"),
        ("split_seed", True),
        ("split_seed", 1.5),
        ("hidden", 8),
        ("hidden", ["8"]),
        ("partition", None),
    ],
)
def test_an_option_of_another_type_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"option {option} must be .*found"):
        sectors.get("banks", {option: value})


@pytest.mark.parametrize("name", sectors.names())
@pytest.mark.parametrize(
    "options",
    [
        {"partition": "bands"},
        {"alpha": 0.0},
        {"min_rows": 0},
        {"hidden": [0]},
        {"validation_fraction": 0.5, "test_fraction": 0.5},
        {"test_fraction": -0.1},
    ],
)
def test_values_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"sector {name}"):
        sectors.get(name, options)
