"""Loads the tables that the plan is computed from; every figure in them has its source beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any


def parse_yaml(text: str) -> Any:
    """Parse YAML with the C loader if this Python has it."""
    import yaml  # a table that is kept parsed does not need it

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe loaders


@cache
def load_yaml(name: str) -> Any:
    """Load one file of this folder; it is read once in a process.

    YAML takes a third of the time of a plan. So a parsed table is kept where Python keeps the bytecode of
    this folder, for one size and time of the source. Where Python may write no bytecode, none is kept.
    """
    source = Path(__file__).parent / name
    status = source.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    kept = Path(importlib.util.cache_from_source(str(source.with_suffix(".py"))))
    kept = kept.with_name(f"{kept.stem}.table")
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
        seen, table = marshal.loads(kept.read_bytes())  # noqa: S302 - as trusted as the bytecode beside it
        if seen == stamp:
            return table
    table = parse_yaml(source.read_text(encoding="utf-8"))
    if not sys.dont_write_bytecode:
        _keep(kept, (stamp, table))
    return table


def _keep(path: Path, value: Any) -> None:
    """Write a parsed table whole, or leave it where that cannot be."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(marshal.dumps(value))
        beside.replace(path)
