"""Lets one run work on a folder while others wait.

Standard library only: this file is also copied to hosts by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def beside(folder: Path) -> Path:
    """Return the path of the lock file of a folder that a run makes."""
    return folder.with_name(f".{folder.name}.lock")


def refusal_to_replace(folder: Path, *proofs: Path) -> str:
    """Tell why a run may not replace this folder; empty if it may.

    A run made the folder itself if its lock file or one of the proofs exists. Ask before you take the lock.
    """
    if not os.path.lexists(folder):
        return ""
    if folder.is_symlink():
        return f"{folder} is a link, so it is not replaced: remove the link, or choose another name"
    if any(proof.is_file() for proof in (beside(folder), *proofs)):
        return ""
    return (
        f"{folder} was not made by this project, so it is not replaced: move it away, or choose another name"
    )


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file, which is made when it is missing, or of a folder that exists.

    Call `waiting` once when another run holds the lock. OSError for a file that is a link. A folder may be
    one, as the models of a store are on some hosts.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    guard = os.open(path, flags, 0o644)
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)
