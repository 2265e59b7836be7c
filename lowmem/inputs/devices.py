"""Reads the device table (data/devices.yml), and finds the device of this machine or of a name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lowmem.data import load_yaml
from lowmem.errors import BadInput, first_problem
from lowmem.files import read_yaml
from lowmem.inputs.custom_device import EXAMPLE, described
from lowmem.schema import Device
from lowmem.units import MIB

if TYPE_CHECKING:
    from lowmem.probes import Card

FIGURES = (
    "nvml_total_mib", "torch_total_mib", "hbm_gb_per_s", "link_gb_per_s", "fp16_tflops", "bf16_tflops",
    "fp8_tflops", "fp4_tflops", "int8_tops", "peer_gb_per_s", "sm_count",
)  # fmt: skip
"""Fields of a device that are measured or printed, each of which has a source."""

MEMORY_TOLERANCE = 0.03
"""Share by which drivers differ in the memory that they show of one card."""

NEAREST = 3
"""Names that are offered for one that is not in the table."""


def names() -> list[str]:
    """List the devices of the table, without aliases and slices."""
    return list(load_yaml("devices.yml"))


def slices(name: str) -> list[str]:
    """List the MIG slices of a device of the table, by their names."""
    return [f"{name}-mig-{profile}" for profile in load_yaml("devices.yml")[name].get("slices", ())]


def load_device(name: str) -> Device:
    """Return a device by its name or alias; `auto` means this machine's.

    `custom:…` describes one (lowmem.inputs.custom_device), and a path that ends in .yml names a file of it.
    Raises BadInput with the list of names.
    """
    if name == "auto":
        return this_machine()
    if name.lower().startswith("custom:"):
        return _custom(name)
    if name.lower().endswith((".yml", ".yaml")):
        return device_file(Path(name))
    return _table_device(name)


def _custom(text: str) -> Device:
    """Return the device that `custom:…` describes, under a name that tells it from another one."""
    entry = described(text)
    own = f"custom-{entry['nvml_total_mib'] / 1024:.0f}g-sm{entry['capability'].replace('.', '')}"
    return completed(entry, own, "--device custom")


def this_machine() -> Device:
    """Return the first GPU or MIG slice as NVML names it, with its memory.

    Without a GPU this is the CPU with this machine's RAM. Raises BadInput for a GPU of which too little is
    known.
    """
    from lowmem.probes import cards  # it needs psutil, which a plan for a named device does not

    try:
        visible = cards()
    except Exception:  # without a working driver this machine serves on its CPU
        visible = []
    if visible:
        return of_card(visible[0])
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    cpu = load_device("cpu")
    read = dict.fromkeys(("nvml_total_mib", "torch_total_mib"), "read from this machine")
    return cpu.model_copy(
        update={"nvml_total_mib": ram, "torch_total_mib": ram, "source": {**cpu.source, **read}}
    )


def of_card(card: Card) -> Device:
    """Return the device of a card: the table's, or one made of NVML's own figures.

    Raises BadInput if NVML does not say enough.
    """
    total_mib = card.total_bytes // MIB
    return _by_name(card.name, total_mib) or _of_nvml(card, total_mib)


def by_nvml_name(nvml_name: str, total_mib: int) -> Device:
    """Return the table's device for an NVML name such as `NVIDIA A100-SXM4-40GB`.

    `total_mib` must agree with the table to 3 %. Raises BadInput if no device does.
    """
    found = _by_name(nvml_name, total_mib)
    if found is None:
        raise BadInput(
            f"this machine's {nvml_name} with {total_mib} MiB is not in the device table; name the nearest of"
            f" {', '.join(names())}, or describe it: {EXAMPLE}"
        )
    return found


def _by_name(nvml_name: str, total_mib: int) -> Device | None:
    key = _found(nvml_name)
    device = _entry(*key) if key else None
    if device is None or device.kind != "cuda":
        return None
    if abs(device.nvml_total_mib - total_mib) > MEMORY_TOLERANCE * total_mib:
        return None
    usable = device.torch_total_mib - device.nvml_total_mib + total_mib
    source = {**device.source, "nvml_total_mib": "read by NVML on this machine"}
    return device.model_copy(
        update={"nvml_total_mib": total_mib, "torch_total_mib": usable, "source": source}
    )


_DDR = 2
"""Transfers in a period of the memory clock that NVML names."""


def _of_nvml(card: Card, total_mib: int) -> Device:
    """Estimate a card that is not in the table.

    Its bandwidth is bus width x clock x 2, and its rate that of its generation's SM x clock.
    """
    fill = load_yaml("capabilities.yml")["fill_in"]
    per_sm = fill["tensor_flops_per_sm_and_clock"]["value"].get(card.capability)
    cores = fill["cores_per_sm"]["value"].get(card.capability)
    if not (per_sm and cores and card.bus_bits and card.memory_mhz and card.sm_mhz and card.cores):
        raise BadInput(
            f"this machine's {card.name} with {total_mib} MiB and compute capability {card.capability} is not"
            f" in the device table, and NVML does not tell its bandwidth and rate; describe it: {EXAMPLE}"
        )
    geforce = "geforce" in card.name.lower()
    per_sm *= fill["geforce_share"]["value"].get(card.capability, 1) if geforce else 1
    sms = card.cores // cores
    read, derived = "read by NVML on this machine", "estimated from what NVML tells on this machine"
    entry = {
        "title": card.name,
        "capability": card.capability,
        "nvml_total_mib": total_mib,
        "hbm_gb_per_s": round(card.bus_bits / 8 * card.memory_mhz * _DDR / 1e3, 1),
        "fp16_tflops": round(sms * per_sm * card.sm_mhz / 1e6, 1),
        "sm_count": sms,
        "peer_access": not geforce,
        "estimate": f"{card.name} is not in the table, estimated from NVML's bus width, clocks and cores",
        "source": {
            "nvml_total_mib": read,
            "hbm_gb_per_s": f"{derived}: {card.bus_bits} bits x {card.memory_mhz} MHz x {_DDR}",
            "fp16_tflops": f"{derived}: {sms} SMs x {per_sm:g} x {card.sm_mhz} MHz",
            "sm_count": f"{derived}: {card.cores} cores / {cores}",
        },
    }
    if card.pcie_generation and card.pcie_lanes:
        entry["pcie"] = f"{card.pcie_generation}x{card.pcie_lanes}"
    return completed(entry, _canonical(card.name) or "gpu", read)


def device_file(path: Path) -> Device:
    """Read a device from a YAML file that has the fields of an entry of the table.

    Raises BadInput, one line, for anything else.
    """
    found = read_yaml(path)
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(next(iter(found.values())), Mapping):
        name, found = next(iter(found.items()))  # an entry under its name, as the table has it
        found = {"name": str(name), **found}
    if not isinstance(found, Mapping):
        raise BadInput(f"{path} holds no device: write the fields of an entry of lowmem/data/devices.yml")
    entry = {str(k): v for k, v in found.items()}
    return completed(entry, str(entry.pop("name", path.stem)), str(path))


_CAPABILITY = re.compile(r"1?[0-9]\.[0-9]")

_PCIE = re.compile(r"([1-8])x(1|2|4|8|16|32)")


def completed(entry: Mapping[str, Any], name: str, origin: str) -> Device:
    """Make a device of an entry, with what the entry leaves out by the rules of capabilities.yml.

    `origin` says where its figures come from if the entry does not. Raises BadInput, one line, that begins
    with `origin`.
    """
    fields = {k: v for k, v in entry.items() if k not in ("aliases", "nvml", "slices")}
    source = fields.pop("source", {})
    if not isinstance(source, Mapping):
        raise BadInput(f"{origin}: source is not a mapping of figure to text; correct it")
    given = {str(k): str(v) for k, v in source.items()}
    fields = {"name": name, "title": name, **fields}
    _refuse_gaps(fields, origin)
    whole = given.pop("datasheet", origin)
    filled = _fill_in(fields, origin)
    derived = {k: text for k, (_, text) in filled.items()}
    fields |= {k: value for k, (value, _) in filled.items()}
    fields.setdefault("sm_count", 0)
    known = [k for k in FIGURES if fields.get(k)]
    fields["source"] = {"sm_count": "not given"} | {k: given.get(k) or derived.get(k, whole) for k in known}
    try:
        device = Device.model_validate(fields)
    except ValidationError as error:
        raise BadInput(f"{origin}: {first_problem(error, 'the device')}") from None
    if device.torch_total_mib > device.nvml_total_mib:
        raise BadInput(
            f"{origin}: torch_total_mib is {device.torch_total_mib}, more than"
            f" nvml_total_mib={device.nvml_total_mib}; correct one of them"
        )
    return device


def _refuse_gaps(fields: dict[str, Any], origin: str) -> None:
    """Raise BadInput for a figure that is missing or no number. A capability that YAML read is a text."""
    kind, capability = fields.get("kind", "cuda"), fields.get("capability", "")
    if kind not in ("cuda", "cpu"):
        raise BadInput(f"{origin}: kind is {str(kind)[:40]!r}; it must be cuda or cpu")
    if isinstance(capability, float):
        fields["capability"] = capability = str(capability)
    if capability not in ("", None) and not _CAPABILITY.fullmatch(str(capability)):
        raise BadInput(
            f"{origin}: capability is {str(capability)[:40]!r}; write it with its minor number, such as 8.6"
        )
    cuda = fields.get("kind", "cuda") == "cuda"
    needed = ("nvml_total_mib", "hbm_gb_per_s", "fp16_tflops", *(("capability",) if cuda else ()))
    missing = [k for k in needed if fields.get(k) in (None, "")]
    if missing:
        raise BadInput(
            f"{origin}: {missing[0]} is missing; a device needs {', '.join(needed)}, as in"
            " lowmem/data/devices.yml"
        )
    for figure in FIGURES:
        value = fields.get(figure)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadInput(f"{origin}: {figure} is {str(value)[:40]!r}; it must be a number in digits")


def _fill_in(fields: dict[str, Any], origin: str) -> dict[str, tuple[Any, str]]:
    """Return what an entry leaves out, each with its source; moves `pcie` into its two fields."""
    rules = load_yaml("capabilities.yml")["fill_in"]
    found: dict[str, tuple[Any, str]] = {}
    if fields.get("kind", "cuda") == "cpu":
        return found
    major = re.match(r"\d+", str(fields["capability"]))
    slot = fields.pop("pcie", None)
    assumed = slot is None and "link_gb_per_s" not in fields
    if assumed and major:
        generations = rules["pcie"]["value"]
        slot = generations[max((g for g in generations if g <= int(major[0])), default=min(generations))]
    lanes = _PCIE.fullmatch(str(slot)) if slot else None
    if slot and not lanes:
        raise BadInput(f"{origin}: pcie is {slot!r}; write generation x lanes, such as 4x16")
    if lanes:
        generation, width = int(lanes[1]), int(lanes[2])
        fields |= {"pcie_generation": generation, "pcie_lanes": width}
        each = rules["pcie_gb_per_s_per_lane"]["value"].get(generation)
        if each and fields.get("link_gb_per_s") is None:
            text = f"PCIe {generation} x{width}" + (", assumed" if assumed else "")
            found["link_gb_per_s"] = (round(each * width, 2), text)
    link = fields.get("link_gb_per_s", found.get("link_gb_per_s", (None, ""))[0])
    if fields.get("peer_gb_per_s") is None and link is not None:
        found["peer_gb_per_s"] = (link, "as the host link")
    if fields.get("torch_total_mib") is None:
        share = rules["torch_share"]["value"]
        usable = max(1, int(fields["nvml_total_mib"] * share))
        found["torch_total_mib"] = (usable, f"estimated: {share:.0%} of what NVML shows")
    if fields.get("bf16_tflops") is None and major and int(major[0]) >= 8:
        found["bf16_tflops"] = (fields["fp16_tflops"], "as fp16_tflops")
    return found


_NOISE = frozenset({
    "nvidia", "geforce", "tesla", "graphics", "gpu", "edition", "generation", "mig",
    "hbm2", "hbm2e", "hbm3", "hbm3e",
})  # fmt: skip
"""Words of an NVML name that tell no card from another."""


def _words(name: str) -> list[str]:
    """Return the words of a name that tell cards apart: `40GB` is `40g`, and each SXM socket is `sxm`."""
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w and w not in _NOISE]
    words = [re.sub(r"(?<=\d)gi?b$", "g", w) for w in words]
    return [re.sub(r"^sxm\d$", "sxm", w) for w in words]


def _canonical(name: str) -> str:
    """Return a name as the index has it: NVML, the table and people write the same card differently."""
    return "".join(_words(name))


def _unordered(name: str) -> str:
    """Return the words of a name in one order: A100-PCIE-80GB is the A100 80GB PCIe."""
    return " ".join(sorted(_words(name)))


def _found(name: str) -> tuple[str, str | None] | None:
    """Return name and MIG profile of a device of the table, however it is written; None: it has none."""
    index = _index()
    return index.get(_canonical(name)) or index.get(_unordered(name))


@cache
def _index() -> dict[str, tuple[str, str | None]]:
    """Return name and MIG profile of each way to write a device; of one family the SXM card comes first."""
    table, found = load_yaml("devices.yml"), dict[str, tuple[str, str | None]]()

    def enter(written: str, key: str, profile: str | None = None) -> None:
        found.setdefault(_canonical(written), (key, profile))
        found.setdefault(_unordered(written), (key, profile))

    for key, entry in table.items():
        for written in (key, *entry.get("nvml", ()), *entry.get("aliases", ())):
            enter(written, key)
            for profile in entry.get("slices", ()):
                enter(f"{written}-{profile}", key, profile)
    for key in sorted(table, key=lambda k: k.endswith(("-pcie", "-nvl"))):
        for profile in table[key].get("slices", ()):
            enter(f"{key.split('-')[0]}-{profile}", key, profile)
    return found


def _table_device(name: str) -> Device:
    key = _found(name)
    if key:
        return _entry(*key)
    every = names()
    wanted = _canonical(name)
    near = difflib.get_close_matches(wanted, [_canonical(n) for n in every], n=NEAREST)
    nearest = [n for n in every if _canonical(n) in near]
    first = f"{', '.join(nearest)} (the nearest), " if nearest else ""
    rest = [n for n in every if n not in nearest]
    raise BadInput(
        f"device {name[:80]!r} is not in the table; use one of {first}{', '.join(rest)}, or describe it:"
        f" {EXAMPLE}"
    )


@cache
def _entry(name: str, profile: str | None) -> Device:
    """Return a device of the table, or one of its slices: SMs and bandwidth are its share of the card's."""
    entry = load_yaml("devices.yml")[name]
    whole = completed(entry, name, "devices.yml")
    if profile is None:
        return whole
    total_mib, sms, eighths = entry["slices"][profile]
    seen = entry["source"]["slices"]
    share, sm_share = eighths / 8, sms / whole.sm_count
    part = f"{eighths}/8 of the card's"
    rates = ("fp16_tflops", "bf16_tflops", "fp8_tflops", "fp4_tflops", "int8_tops")
    scaled = {r: round(v * sm_share, 1) for r in rates if (v := getattr(whole, r)) is not None}
    source = {
        **{k: f"{sms} of {whole.sm_count} SMs; card: {whole.source[k]}" for k in scaled},
        "nvml_total_mib": seen,
        "torch_total_mib": "as NVML shows it: torch's out-of-memory text on slices has the same figure",
        "hbm_gb_per_s": f"{part}: {whole.source['hbm_gb_per_s']}",
        "link_gb_per_s": "as the card, which its slices share",
        "peer_gb_per_s": "none: slices do not reach one another; as the host link",
        "sm_count": seen,
    }
    return whole.model_copy(
        update={
            **scaled,
            "name": f"{name}-mig-{profile}",
            "title": f"{whole.title}, MIG slice {profile}",
            "nvml_total_mib": total_mib,
            "torch_total_mib": total_mib,
            "hbm_gb_per_s": round(whole.hbm_gb_per_s * share, 1),
            "peer_gb_per_s": whole.link_gb_per_s,
            "sm_count": sms,
            "nvlink": False,
            "peer_access": False,
            "slice_of": name,
            "source": source,
        }
    )
