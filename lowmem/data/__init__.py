"""Loads the tables that the plan is computed from; every figure in them has its source beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Parse YAML with the C loader if this Python has it."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe loaders


@cache
def load_yaml(name: str) -> Any:
    """Load one file of this folder; it is read once in a process."""
    return parse_yaml((Path(__file__).parent / name).read_text(encoding="utf-8"))
