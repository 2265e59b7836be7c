"""Explains each flag of a profile: its reason, and what it costs or saves for this model and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.files import read_yaml
from lowmem.plan.compute import compute
from lowmem.plan.request import Inputs
from lowmem.schema import Knob, Plan
from lowmem.units import MIB

# A knob is compared with vLLM's own default, or with its opposite.
_WITHOUT: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "enforce_eager": False,
    "kv_cache_dtype": "auto",
    "cpu_offload_gb": 0.0,
    "offload_group_size": 0,
    "disable_custom_all_reduce": False,
}


@dataclass(frozen=True)
class Effect:
    """Effect of one knob on the plan.

    Each difference is the plan with the knob minus the plan without it. None means that the plan without it
    cannot be made.
    """

    name: str
    value: str
    why: str
    peak_mib: float | None
    kv_tokens: int | None
    decode_ms: float | None
    prefill_ms: float | None
    measured: str = ""
    remark: str = ""


def without(inputs: Inputs, name: str) -> Plan:
    """Compute the plan with one knob at the engine's default.

    A pool that the plan chose keeps its number of tokens.
    """
    knobs = dict(inputs.knobs)
    if name in _WITHOUT:
        knobs[name] = Knob(value=_WITHOUT[name], why="default")
    else:
        knobs.pop(name)
    changed = Inputs(**{**inputs.__dict__, "knobs": knobs})
    return compute(changed)


def effects(inputs: Inputs, receipts: Mapping[str, str] | None = None) -> list[Effect]:
    """Compute the effect of every knob of the profile.

    `receipts` holds the sentence of a measured ablation by knob.
    """
    base = compute(inputs)
    rows = []
    for name, knob in inputs.knobs.items():
        measured = (receipts or {}).get(name, "")
        shown = (
            str(base.per_gpu["kv_cache"])
            if knob.value == "auto" and name == "kv_cache_memory_bytes"
            else str(knob.value)
        )
        if load_yaml("knobs.yml").get(name, {}).get("never") or name in (
            "swap_space",
            "quantization",
            "disable_log_stats",
        ):
            rows.append(
                Effect(
                    name,
                    shown,
                    knob.why,
                    None,
                    None,
                    None,
                    None,
                    measured,
                    "refused" if name != "disable_log_stats" else "",
                )
            )
            continue
        try:
            other = without(inputs, name)
        except BadInput as e:
            rows.append(Effect(name, shown, knob.why, None, None, None, None, measured, f"without it: {e}"))
            continue
        rows.append(
            Effect(
                name,
                shown,
                knob.why,
                (base.peak_bytes - other.peak_bytes) / MIB,
                base.kv_tokens - other.kv_tokens,
                base.latency_ms.decode_expected - other.latency_ms.decode_expected,
                base.latency_ms.prefill_expected - other.latency_ms.prefill_expected,
                measured,
                "" if other.verdict != "impossible" else f"without it: {other.reasons[0]}",
            )
        )
    return rows


def measured_effects(folder: Path, profile: str) -> dict[str, str]:
    """Read the measured ablations of a profile, a sentence by knob.

    They are in `ablations.yml` of the folder. The result is empty if there is no such file.
    """
    file = folder / "ablations.yml"
    if not file.is_file():
        return {}
    table = read_yaml(file) or {}
    effects_of = table.get(profile) or {} if isinstance(table, dict) else None
    if not isinstance(effects_of, dict):
        raise BadInput(f"{file}: profile -> knob -> sentence is wanted")
    return {str(k): str(v) for k, v in effects_of.items()}
