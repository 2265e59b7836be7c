"""Says what a vLLM version or a device refuses."""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.data import load_yaml
from lowmem.plan.engine_config import KV_DTYPES, Engine
from lowmem.plan.knobs import _capability, flag_of, version_tuple
from lowmem.schema import Device, Knob, ModelCard


def missing_flags(knobs: Mapping[str, Knob], vllm: tuple[int, int, int]) -> list[str]:
    """One reason per knob that this version's parser does not know."""
    reasons = []
    for name in knobs:
        spec, flag = load_yaml("knobs.yml")[name], flag_of(name)
        if spec.get("never"):
            reasons.append(f"unrecognized arguments: {flag}: no vLLM version has it; use {spec['instead']}")
        elif "removed" in spec and vllm >= version_tuple(spec["removed"]):
            reasons.append(
                f"unrecognized arguments: {flag}: removed in vLLM {spec['removed'].removesuffix('.0')}; use"
                f" {spec['instead']}"
            )
        elif "since" in spec and vllm < version_tuple(spec["since"]):
            reasons.append(f"unrecognized arguments: {flag}: needs vLLM {spec['since']} or later")
    return reasons


PIPELINE_SINCE = (0, 32, 0)
"""The version whose pipeline stages and multi-node mode were read."""


def refusals(engine: Engine, card: ModelCard, device: Device) -> list[str]:
    """What this version or this capability cannot run, each with what it needs."""
    reasons = []
    if engine.pp > 1 and engine.vllm < PIPELINE_SINCE:
        reasons.append(
            "pipeline_parallel_size of 2 or more is planned as vLLM 0.32 does it; use 0.32.0 or later"
        )
    if engine.pp > 1 and engine.kv_dtype.startswith("turboquant"):
        reasons.append(
            f"kv_cache_dtype={engine.kv_dtype} is not modelled with pipeline stages; use int8_per_token_head"
            " or int4_per_token_head"
        )
    if device.kind == "cpu":
        if engine.kv_dtype not in ("auto", "float16", "bfloat16"):
            reasons.append(
                f"kv_cache_dtype={engine.kv_dtype}: the CPU back end needs AVX-512 for it; use auto"
            )
        if engine.kv_offload_bytes or engine.offload == "prefetch":
            reasons.append("KV offload and prefetch offload do not exist on a CPU; leave them out")
        return reasons
    needs, since = KV_DTYPES[engine.kv_dtype]
    have = _capability(device.capability)
    if have < _capability(needs):
        instead = "int8_per_token_head or int4_per_token_head"
        reasons.append(
            f"kv_cache_dtype={engine.kv_dtype} needs compute capability {needs} and {device.title} has"
            f" {device.capability}; use {instead}"
        )
    if engine.vllm < version_tuple(since):
        reasons.append(f"kv_cache_dtype={engine.kv_dtype} needs vLLM {since} or later")
    q = card.quantization
    if q.method == "auto-round" and q.bits in (2, 3) and engine.vllm < (0, 30, 0):
        reasons.append(f"{q.bits}-bit auto-round weights need vLLM 0.30 or later (Humming kernels)")
    if q.method == "awq" and q.bits != 4:
        reasons.append(f"{q.bits}-bit AWQ has no loader (4 bits only); use auto-round for 2 and 3 bits")
    if q.method == "gptq" and q.bits in (2, 3):
        reasons.append(
            f"{q.bits}-bit GPTQ has no loader (4 and 8 bits only); use auto-round for {q.bits} bits"
        )
    if q.method == "fp8" and have < (8, 9) and engine.vllm < (0, 17, 0):
        reasons.append("fp8 weights need compute capability 8.9 or weight-only Marlin")
    if engine.kernel == "machete" and have != (9, 0):
        reasons.append(
            f"linear_backend=machete needs compute capability 9.0 and {device.title} has {device.capability};"
            " use marlin"
        )
    if engine.kernel == "humming" and engine.offload == "uva":
        reasons.append(
            "cpu_offload_gb: the Humming kernel loads every weight back on the card (seen: 19.04 GiB"
            " offloaded, then 34.15 GiB loaded); "
            + ("use 4-bit weights" if q.bits in (2, 3) else "use linear_backend=marlin")
        )
    if engine.dtype == "bfloat16" and have < (8, 0):
        reasons.append(
            f"dtype=bfloat16 needs compute capability 8.0 and {device.title} has {device.capability}; use"
            " float16"
        )
    return reasons
