"""Tables that the plan is computed from; every figure has its source beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """YAML to Python; the C loader where there is one."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe loaders


@cache
def load_yaml(name: str) -> Any:
    """One file of this folder."""
    return parse_yaml((Path(__file__).parent / name).read_text(encoding="utf-8"))
