"""The device table (data/devices.yml)."""

from __future__ import annotations

from functools import cache

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.schema import Device


def names() -> list[str]:
    """Devices of the table, without aliases."""
    return list(load_yaml("devices.yml"))


@cache
def load_device(name: str) -> Device:
    """A device by name or alias, any case. BadInput with the list of names otherwise."""
    wanted = name.lower().replace("_", "-")
    for key, entry in load_yaml("devices.yml").items():
        if wanted in (key, *entry.get("aliases", ())):
            return Device(name=key, **{k: v for k, v in entry.items() if k != "aliases"})
    raise BadInput(f"device {name!r} is not in the table; use one of {', '.join(names())}")
