"""Remembers the files that an environment was made of, so that a damaged one is noticed.

Size and modification time of each file count. To hash gigabytes of libraries at every start would take
longer than the start. What Python or a service adds later does not count.

Standard library only: this file is also copied to hosts by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

NAME = ".files.json"
PASSING = ("__pycache__",)


def write(folder: Path) -> None:
    """Seal a folder as it is now."""
    seen = {path.relative_to(folder).as_posix(): _state(path) for path in _files(folder)}
    beside = folder / f"{NAME}.new"
    beside.write_text(json.dumps(seen), encoding="utf-8")
    beside.replace(folder / NAME)


def troubles(folder: Path) -> Iterator[str]:
    """Yield each file that is missing or was altered since the folder was sealed; none if it never was."""
    try:
        sealed = json.loads((folder / NAME).read_text(encoding="utf-8")).items()
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        yield f"{NAME}: unreadable ({type(error).__name__})"
        return
    for name, state in sealed:
        try:
            now = _state(folder / name)
        except OSError:
            yield f"{name}: missing"
        else:
            if now != state:
                yield f"{name}: altered"


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in PASSING]
        links = [name for name in folders if Path(place, name).is_symlink()]
        own = (NAME, ".complete") if Path(place) == folder else ()
        yield from (Path(place, name) for name in [*files, *links] if name not in own)


def _state(path: Path) -> list[int]:
    seen = path.lstat()
    return [seen.st_size, seen.st_mtime_ns]
