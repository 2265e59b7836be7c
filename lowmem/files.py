"""Writes files beside their place and then moves them into it, so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def tree_digest(root: Path, paths: Iterable[Path]) -> str:
    """Return a SHA-256 over the names below `root` and the contents of these files.

    Their times do not count.
    """
    total = hashlib.sha256()
    for path in sorted(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root)}\0{content}\n".encode())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole, with a newline at its end. A missing folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text.rstrip("\n") + "\n")
    beside.replace(path)
