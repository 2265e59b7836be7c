"""Reads the description of a device on the command line: `custom:24GiB,936GB/s,71TFLOPS,sm_86,pcie4x16`.

The parts stand in any order; the unit of each says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lowmem.errors import BadInput
from lowmem.units import MIB

EXAMPLE = "--device custom:24GiB,936GB/s,71TFLOPS,sm_86"

_MOST = 300

_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"

_BYTES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_RATES = {"fp8": "fp8_tflops", "fp4": "fp4_tflops", "int8": "int8_tops", "bf16": "bf16_tflops"}


def _memory(found: re.Match[str]) -> dict[str, Any]:
    unit = next(u for u in _BYTES if u.lower() == found[2].lower())
    return {"nvml_total_mib": int(float(found[1]) * _BYTES[unit] // MIB)}


def _bandwidth(found: re.Match[str]) -> dict[str, Any]:
    field = "peer_gb_per_s" if found[1] else "hbm_gb_per_s"
    per_s = float(found[2]) * (1000 if found[3].lower() == "t" else 1)
    return {field: per_s} | ({"nvlink": True} if found[1] else {})


def _rate(found: re.Match[str]) -> dict[str, Any]:
    kind = (found[1] or "").lower()
    scale = 1000 if found[3].lower() == "p" else 1
    return {_RATES.get(kind, "fp16_tflops"): float(found[2]) * scale}


_PARTS: tuple[tuple[str, Callable[[re.Match[str]], dict[str, Any]]], ...] = (
    (rf"{_NUMBER}(MiB|GiB|TiB|MB|GB|TB)", _memory),
    (rf"(nvlink=?)?{_NUMBER}([GT])B/s", _bandwidth),
    (rf"(?:(fp16|bf16|fp8|fp4|int8)=?)?{_NUMBER}([TP])(?:FLOPS?(?:/s)?|OPS)", _rate),
    (r"(?:sm|cc)_?([1-9]|1[0-9])\.?([0-9])", lambda m: {"capability": f"{m[1]}.{m[2]}"}),
    (r"pcie_?([0-9]x[0-9]{1,2})", lambda m: {"pcie": m[1]}),
    (r"([0-9]{1,5})SMs?", lambda m: {"sm_count": int(m[1])}),
)
"""Pattern of each part, and the fields of a device that it gives."""

_NEEDED = {
    "nvml_total_mib": "its memory, such as 24GiB",
    "hbm_gb_per_s": "its memory bandwidth, such as 936GB/s",
    "fp16_tflops": "its dense FP16 rate, such as 71TFLOPS",
    "capability": "its compute capability, such as sm_86",
}


def described(text: str) -> dict[str, Any]:
    """Return the fields of a device that `custom:…` describes, as an entry of the table has them.

    Raises BadInput, one line, for the first part that is wrong or missing.
    """
    if len(text) > _MOST:
        raise BadInput(f"--device custom:… has {len(text)} characters; the limit is {_MOST}; see {EXAMPLE}")
    fields: dict[str, Any] = {}
    parts = [word.strip() for word in text.partition(":")[2].split(",") if word.strip()]
    for part in parts:
        found = _part(part)
        twice = sorted(set(found) & set(fields) - {"nvlink"})
        if twice:
            raise BadInput(f"--device custom: {part!r} gives {twice[0]} again; leave one of the two out")
        fields |= found
    missing = [what for field, what in _NEEDED.items() if field not in fields]
    if missing:
        raise BadInput(f"--device custom: give {missing[0]}; whole: {EXAMPLE}")
    given = {"datasheet": "given by the operator"}
    return {"title": f"custom card ({', '.join(parts)})", "source": given, **fields}


def _part(part: str) -> dict[str, Any]:
    for pattern, read in _PARTS:
        if found := re.fullmatch(pattern, part.replace(" ", ""), re.IGNORECASE):
            return read(found)
    raise BadInput(
        f"--device custom: {part[:40]!r} is no memory (24GiB), bandwidth (936GB/s), rate (71TFLOPS,"
        " fp8=142TFLOPS), capability (sm_86), slot (pcie4x16), number of SMs (82SM) or link"
        " (nvlink=300GB/s); correct it"
    )
