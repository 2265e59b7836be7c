"""Files are written beside their place and then moved into it: a reader never sees half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Makes the folder where it is missing; ends the text with a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text.rstrip("\n") + "\n")
    beside.replace(path)
