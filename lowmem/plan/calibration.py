"""Reads the constants of the model: the package's, or those of a site where it has measured them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem.data import load_yaml
from lowmem.errors import BadInput, first_problem
from lowmem.files import read_yaml
from lowmem.schema import Calibration
from lowmem.units import MIB

# A plan is made of one set of constants, which its innermost functions ask for. They belong to the plan that
# is being made, and to no other one.
_site: ContextVar[tuple[Calibration | None, str]] = ContextVar("site", default=(None, ""))


@contextmanager
def calibrated(calibration: Calibration | None, device: str) -> Iterator[None]:
    """Let the constants of a site count in this block, for plans of the named device."""
    token = _site.set((calibration, device))
    try:
        yield
    finally:
        _site.reset(token)


def constant(section: str, name: str) -> Any:
    """Return one value of data/calibration.yml, or the site's.

    Of a table, such as efficiency by kernel, a site's entry is the device's own, which is the most specific.
    """
    value = load_yaml("calibration.yml")[section][name]["value"]
    calibration, device = _site.get()
    if calibration is None:
        return value
    if not isinstance(value, dict):
        own = calibration.constants.get(f"{section}.{name}")
        return value if own is None else own.value
    prefix = f"{section}.{name}."
    own_entries = {
        key.removeprefix(prefix): one.value
        for key, one in calibration.constants.items()
        if key.startswith(prefix)
    }
    return value | own_entries | {f"{key}@{device}": v for key, v in own_entries.items()}


def _mib(name: str) -> int:
    return round(float(constant("memory", name)) * MIB)


def known(name: str) -> bool:
    """Tell whether a site may give this constant, such as `memory.snapshot_mib`."""
    section, _, rest = name.partition(".")
    field, _, entry = rest.partition(".")
    table = load_yaml("calibration.yml").get(section)
    value = table.get(field, {}).get("value") if isinstance(table, dict) else None
    if isinstance(value, dict):
        return entry in value
    return isinstance(value, int | float) and not entry


def read_calibration(path: Path) -> Calibration:
    """Read the file that `lowmem calibrate` writes. Raises BadInput, one line, for anything else."""
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise BadInput(f"calibration {path} holds no mapping; write it with `lowmem calibrate`")
    try:
        calibration = Calibration.model_validate(found)
    except ValidationError as error:
        raise BadInput(
            f"calibration {path}: {first_problem(error, 'the file')}; write it with `lowmem calibrate`"
        ) from None
    for name, one in calibration.constants.items():
        if not known(name):
            raise BadInput(f"calibration {path}: {name[:80]!r} is no constant of this version; leave it out")
        if one.value == 0:
            raise BadInput(f"calibration {path}: {name} is 0; a constant is more than 0; measure it again")
    return calibration
