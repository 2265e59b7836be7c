"""Keeps a checkpoint under its content's name.

So a release goes on with its own bytes when the model is made anew under the old name.

`python -m lowmem.checkpoint.keep MODELS/NAME` makes `MODELS/NAME-<12 digits of its manifest's SHA-256>`. The
copy is of hard links, which take no room, and has a manifest of its own. The command checks every byte
against that manifest and prints a line of JSON {path, changed}. A folder that exists already is checked too.
It is made again if it differs from its manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from lowmem.checkpoint import lock, manifest


def place_of(source: Path) -> Path:
    """Return the path at which a checkpoint is kept. Raises ManifestError if it has no usable manifest."""
    file = _manifest(source)
    manifest.read(file)
    return source.with_name(f"{source.name}-{manifest.sha256_of(file)[:12]}")


def keep(source: Path) -> tuple[Path, bool]:
    """Return the kept copy, and whether it was made now.

    Raises ManifestError if the source differs from its own manifest.
    """
    place = place_of(source)
    # Instances of a host that are deployed at the same time share the store: one makes it, the others find
    # it.
    with lock.held(source.parent):
        return _keep(source, place)


def _keep(source: Path, place: Path) -> tuple[Path, bool]:
    if place.is_dir() and _manifest(place).is_file() and not manifest.check(_manifest(place), place):
        return place, False
    if problems := manifest.check(_manifest(source), source):
        raise manifest.ManifestError(
            f"{source} is not as its manifest has it: {'; '.join(str(problem) for problem in problems)}"
        )
    if foreign := lock.refusal_to_replace(place, _manifest(place)):
        raise manifest.ManifestError(foreign)
    beside = source.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside, copy_function=_link)
    shutil.copy2(_manifest(source), _manifest(place))
    shutil.rmtree(place, ignore_errors=True)
    beside.rename(place)
    for folder in (
        place,
        source,
    ):  # a new link is a new change time: each file is read once more, and that is remembered
        manifest.check(_manifest(folder), folder)
    return place, True


def _manifest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.manifest.json")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or another user's file
        shutil.copy2(source, target)


def main() -> int:
    """Keep the checkpoint. Exit 1, with one line on stderr, if that fails."""
    parser = argparse.ArgumentParser(description="Keep a checkpoint under its content's name.")
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    try:
        place, changed = keep(arguments.source)
    except (manifest.ManifestError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{json.dumps({'path': str(place), 'changed': changed})}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
