"""Reads profiles, the YAML files of `profiles/`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

import lowmem
from lowmem.errors import BadInput, first_problem
from lowmem.files import read_yaml
from lowmem.schema import Profile
from lowmem.text import did_you_mean


def folder() -> Path:
    """Find the folder of the profiles.

    It is `$LOWMEM_PROFILES`, the repository's `profiles/`, or the copy inside an installed package.
    """
    if named := os.environ.get("LOWMEM_PROFILES"):
        return Path(named)
    package = Path(lowmem.__file__).parent
    beside = package.parent / "profiles"
    return beside if beside.is_dir() else package / "profiles"


def names() -> list[str]:
    """List the profiles in alphabetical order."""
    return sorted(p.stem for p in folder().glob("*.yml"))


def path_of(name: str) -> Path:
    """Return the file of a profile by its name, or by the path of a YAML file. It need not exist."""
    return Path(name) if name.endswith((".yml", ".yaml")) else folder() / f"{name}.yml"


def load_profile(name: str) -> Profile:
    """Load a profile by its name or by the path of a YAML file.

    Raises BadInput with the field and the reason.
    """
    path = path_of(name)
    if not path.exists():
        raise BadInput(
            f"profile {name!r} does not exist; use one of {', '.join(names())}, or the path of a YAML file"
            f"{did_you_mean(name, names())}"
        )
    try:
        return Profile.model_validate(read_yaml(path))
    except ValidationError as e:
        raise BadInput(f"{path}: {first_problem(e, 'file')}") from None
