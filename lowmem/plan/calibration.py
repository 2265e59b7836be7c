"""Reads the calibrated constants of the model."""

from __future__ import annotations

from typing import Any

from lowmem.data import load_yaml
from lowmem.units import MIB


def constant(section: str, name: str) -> Any:
    """Return one value of data/calibration.yml."""
    return load_yaml("calibration.yml")[section][name]["value"]


def _mib(name: str) -> int:
    return round(float(constant("memory", name)) * MIB)
