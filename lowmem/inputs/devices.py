"""Reads the device table (data/devices.yml) and finds the device of this machine."""

from __future__ import annotations

import os
import re
from functools import cache

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.schema import Device
from lowmem.text import did_you_mean
from lowmem.units import MIB


def names() -> list[str]:
    """List the devices of the table, without aliases."""
    return list(load_yaml("devices.yml"))


def this_machine() -> Device:
    """Return the first GPU as NVML names it, with its memory.

    Without a GPU this is the CPU with this machine's RAM. Raises BadInput for a GPU that is not in the table.
    """
    from lowmem.probes import cards  # it needs psutil, which a plan for a named device does not

    try:
        visible = cards()
    except Exception:  # without a working driver this machine serves on its CPU
        visible = []
    if not visible:
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
        source = {
            **load_device("cpu").source,
            "nvml_total_mib": "read from this machine",
            "torch_total_mib": "read from this machine",
        }
        return load_device("cpu").model_copy(
            update={"nvml_total_mib": ram, "torch_total_mib": ram, "source": source}
        )
    return by_nvml_name(visible[0].name, visible[0].total_bytes // MIB)


def by_nvml_name(nvml_name: str, total_mib: int) -> Device:
    """Return the table's device for an NVML name such as `NVIDIA A100-SXM4-40GB`.

    `total_mib` must agree with the table to 3 %. Raises BadInput if no device does.
    """
    words = set(re.split(r"[^a-z0-9]+", nvml_name.lower()))
    for name in names():
        device = load_device(name)
        if device.kind != "cuda" or (
            name.split("-")[0] not in words and name.replace("-", " ") not in nvml_name.lower()
        ):
            continue
        if abs(device.nvml_total_mib - total_mib) <= 0.03 * total_mib and ("pcie" in name) == (
            "pcie" in words
        ):
            usable = device.torch_total_mib - device.nvml_total_mib + total_mib
            source = {**device.source, "nvml_total_mib": "read by NVML on this machine"}
            return device.model_copy(
                update={"nvml_total_mib": total_mib, "torch_total_mib": usable, "source": source}
            )
    raise BadInput(
        f"this machine's {nvml_name} with {total_mib} MiB is not in the device table; name the nearest of"
        f" {', '.join(names())}"
    )


def load_device(name: str) -> Device:
    """Return a device by its name or alias in any case; `auto` means this machine's.

    Raises BadInput with the list of names.
    """
    return this_machine() if name == "auto" else _table_device(name)


@cache
def _table_device(name: str) -> Device:
    wanted = name.lower().replace("_", "-")
    for key, entry in load_yaml("devices.yml").items():
        if wanted in (key, *entry.get("aliases", ())):
            return Device(name=key, **{k: v for k, v in entry.items() if k != "aliases"})
    aliases = [a for entry in load_yaml("devices.yml").values() for a in entry.get("aliases", ())]
    near = did_you_mean(name, [*names(), *aliases])
    raise BadInput(f"device {name!r} is not in the table; use one of {', '.join(names())}{near}")
