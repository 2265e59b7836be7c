"""Refuses what a vLLM version, a device, a model or the knobs together cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.checkpoint.quantization import ONLINE, ONLINE_ALIASES
from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.plan import capability as rules
from lowmem.plan.engine_config import FORMATS, KV_DTYPES, EngineConfig
from lowmem.plan.knobs import flag_of, version_tuple
from lowmem.plan.speculation import Speculation
from lowmem.schema import Device, Knob, ModelCard
from lowmem.units import capability_tuple


def missing_flags(knobs: Mapping[str, Knob], vllm: tuple[int, int, int]) -> list[str]:
    """Return one reason per knob that this version's parser does not know."""
    reasons = []
    for name in knobs:
        spec, flag = load_yaml("knobs.yml").get(name, {}), flag_of(name)
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


def refusals(engine: EngineConfig, card: ModelCard, device: Device) -> list[str]:
    """List what this version or this capability cannot run, each with what it needs."""
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
    reasons += online_refusals(engine, card, device)
    if device.kind == "cpu":
        if engine.kv_dtype not in ("auto", "float16", "bfloat16"):
            reasons.append(
                f"kv_cache_dtype={engine.kv_dtype}: the CPU back end needs AVX-512 for it; use auto"
            )
        if engine.kv_offload_bytes or engine.offload == "prefetch":
            reasons.append("KV offload and prefetch offload do not exist on a CPU; leave them out")
        return reasons
    reasons += rules.refusals(engine, card, device)
    needs, since = KV_DTYPES[engine.kv_dtype]
    capability = capability_tuple(device.capability)
    if capability < capability_tuple(needs):
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
    if engine.kernel == "machete" and capability != (9, 0):
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
    if engine.dtype == "bfloat16" and capability < (8, 0):
        reasons.append(
            f"dtype=bfloat16 needs compute capability 8.0 and {device.title} has {device.capability}; use"
            " float16"
        )
    return reasons


def online_refusals(engine: EngineConfig, card: ModelCard, device: Device) -> list[str]:
    """List why the engine cannot quantize the weights while it loads them, or why that is not planned."""
    name = engine.online
    if not name:
        return []
    if engine.vllm < PIPELINE_SINCE:
        return [f"quantization={name} is planned as vLLM 0.32 does it; use 0.32.0 or later"]
    if device.kind == "cpu":
        return [f"quantization={name} is not planned on a CPU; use a checkpoint that is quantized already"]
    capability, has = capability_tuple(device.capability), f"{device.title} has {device.capability}"
    if capability < (7, 5):
        return [f"quantization={name} needs compute capability 7.5 and {has}; leave it out"]
    if not card.experts:
        return []
    if name == "nvfp4_per_token" and capability[0] != 10:
        return [
            f"quantization=nvfp4_per_token requires a Blackwell (SM100) GPU and {has}; use fp8_per_tensor"
        ]
    if name == "fp8_per_channel" and capability < (8, 9):
        return [
            f"quantization=fp8_per_channel: FP8 PTPC online MoE quant is not supported with the Marlin"
            f" backend, which is the one below compute capability 8.9, and {has}; use fp8_per_tensor"
        ]
    if name == "mxfp4":
        return [
            "quantization=mxfp4 of experts is not counted: each kernel rounds their sizes up by its own"
            " rule; use mxfp8 or fp8_per_tensor"
        ]
    return []


def refuse_parallel(tp: int, pp: int, count: int, hosts: int, dp: int = 1) -> None:
    """Raise BadInput if a host has too few cards, or if a layer would be split across hosts."""
    if tp > count and hosts > 1:
        raise BadInput(
            f"tensor_parallel_size={tp} is more than the {count} card(s) of a host: each layer would wait"
            f" for the network between hosts twice a token; use tensor_parallel_size={count} inside a host"
            f" and pipeline_parallel_size={hosts} across"
        )
    if tp > count:
        raise BadInput(
            f"tensor_parallel_size={tp} is more than the {count} card(s); lower it or raise --count"
        )
    if dp > 1 and hosts > 1:
        raise BadInput(
            f"data_parallel_size={dp} over {hosts} hosts is not planned; use one server a host behind group"
            " router"
        )
    if tp * pp * dp > count and dp > 1:
        raise BadInput(
            f"data_parallel_size={dp} replicas of {tp * pp} card(s) need {tp * pp * dp}, and the host has"
            f" {count}; lower data_parallel_size or raise --count"
        )
    if pp % hosts:
        raise BadInput(
            f"pipeline_parallel_size={pp} does not divide its stages evenly among {hosts} hosts; use a"
            f" multiple of {hosts}"
        )
    if tp * pp // hosts > count:
        raise BadInput(
            f"tensor_parallel_size={tp} and pipeline_parallel_size={pp} need {tp * pp // hosts} cards a host,"
            f" which has {count}; lower one of them or raise --count"
        )


def refuse_split(card: ModelCard, tp: int) -> None:
    """Raise BadInput if `tp` cards cannot share the model's layers. Inventories of counted cards say it."""
    if card.counted:
        return
    if card.heads % tp:
        raise BadInput(
            f"tensor_parallel_size={tp} does not divide the {card.heads} attention heads of {card.name}; use"
            " a divisor"
        )
    if card.kv_heads % tp and tp % card.kv_heads:
        raise BadInput(
            f"tensor_parallel_size={tp} and the {card.kv_heads} key/value heads of {card.name} do not divide"
            " one another; use a divisor"
        )
    for g in card.groups:
        side = g.out_features if g.split in ("column", "kv") else g.in_features
        if g.split in ("column", "row") and side % tp:
            raise BadInput(
                f"tensor_parallel_size={tp} does not divide the {side} features of {g.name} in {card.name};"
                " use a divisor"
            )
        group = card.quantization.group_size
        if g.quantized and g.split == "row" and group > 0 and (side // tp) % group:
            raise BadInput(
                f"tensor_parallel_size={tp} leaves {side // tp} inputs of {g.name} a card, which is not a"
                f" multiple of the quantization group {group}; use a divisor or a smaller group"
            )


def refuse_dtype(card: ModelCard, dtype: str, online: str = "") -> None:
    """Raise BadInput if the checkpoint's format, or the one made online, has no kernels of this type."""
    method = online or card.quantization.method
    if dtype == "float32" and (online or method in ("awq", "gptq")):
        raise BadInput(
            f"dtype=float32 is not supported for quantization method {method}; use float16 or bfloat16"
        )


def refuse_quantization(card: ModelCard, v: Mapping[str, Any]) -> None:
    """Raise BadInput if the `quantization` knob contradicts the checkpoint."""
    wanted = str(v.get("quantization", ""))
    online = wanted in ONLINE or wanted in ONLINE_ALIASES
    if "quantization" in v and not online and wanted not in FORMATS:
        raise BadInput(
            f"quantization={wanted!r} is not a method that vLLM 0.32.0 can take here; leave it out to serve"
            f" the checkpoint as stored, or quantize 16-bit weights while loading: {', '.join(ONLINE)}"
        )
    own = card.quantization.method
    if online and own != "none" and own != wanted:
        raise BadInput(
            f"quantization={wanted} does not match the checkpoint's own method, {own}; leave the knob out, or"
            " use the 16-bit checkpoint"
        )
    named = FORMATS.get(wanted)
    if named and card.quantization.method not in ("none", named):
        raise BadInput(
            f"quantization={v['quantization']} does not match the checkpoint's own method,"
            f" {card.quantization.method}; leave the knob out"
        )
    if wanted and own == "none" and not online:
        raise BadInput(
            f"quantization={v['quantization']} asks for a quantized checkpoint, and {card.name} is not"
            " quantized; quantize it first or leave the knob out"
        )


def refuse_batch(v: Mapping[str, Any], seqs: int, batched: int, max_len: int) -> None:
    """Raise BadInput if a step has no room for its sequences, or for the whole prompt that it must take."""
    if batched < seqs:
        raise BadInput(
            f"max_num_batched_tokens={batched} is less than max_num_seqs={seqs}; each sequence needs one"
            " token of a step; raise it"
        )
    if v.get("enable_chunked_prefill") is False and batched < max_len:
        raise BadInput(
            f"max_num_batched_tokens={batched} is smaller than max_model_len={max_len} and"
            " enable_chunked_prefill is false; raise it or leave chunked prefill on"
        )


def refuse_drafts(v: Mapping[str, Any], speculation: Speculation | None, seqs: int, batched: int) -> None:
    """Raise BadInput if draft tokens contradict other knobs or have no room in a step."""
    if speculation is None:
        return
    if v.get("async_scheduling"):
        raise BadInput(
            "async_scheduling=true with n-gram drafts: vLLM makes these between two steps, and refuses both"
            " together; leave async_scheduling out"
        )
    if int(v.get("pipeline_parallel_size", 1)) > 1:
        raise BadInput("speculative_config is not modelled with pipeline stages; leave one of them out")
    if seqs * speculation.rows > batched:
        raise BadInput(
            f"max_num_batched_tokens={batched} is less than the {seqs * speculation.rows} tokens of a step of"
            f" max_num_seqs={seqs} requests with {speculation.drafts} drafts each; raise it or lower"
            " num_speculative_tokens"
        )


def refuse_kv(kv_dtype: str, block: int | None) -> None:
    """Raise BadInput for a KV type or a block size that no version has."""
    if kv_dtype not in KV_DTYPES:
        raise BadInput(f"kv_cache_dtype={kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
    if block is not None and (block < 16 or block % 16):
        raise BadInput(f"block_size={block} is not a multiple of 16; use 16, 32, 64 or 128")


def offload_groups(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the layers of a group, how many of them are prefetched, and how many layers ahead."""
    return (
        int(v.get("offload_group_size", 0)),
        int(v.get("offload_num_in_group", 1)),
        int(v.get("offload_prefetch_step", 1)),
    )


def refuse_offload(v: Mapping[str, Any], card: ModelCard) -> None:
    """Raise BadInput if the knobs of weight offload contradict one another or the model."""
    uva, backend = float(v.get("cpu_offload_gb", 0)), str(v.get("offload_backend", "auto"))
    group, in_group, step = offload_groups(v)
    if uva > 0 and group > 0:
        raise BadInput(
            f"cpu_offload_gb={uva:g} and offload_group_size={group} ask for two offload back ends; set one of"
            " them to 0"
        )
    if (backend == "uva" and group > 0) or (backend == "prefetch" and uva > 0):
        raise BadInput(
            f"offload_backend={backend} contradicts {'offload_group_size' if group else 'cpu_offload_gb'},"
            " which would be ignored; set it to 0"
        )
    if backend == "prefetch" and group == 0:
        raise BadInput("offload_backend=prefetch needs offload_group_size of 1 or more; set it")
    if group:
        if in_group > group:
            raise BadInput(
                f"offload_num_in_group={in_group} is more than offload_group_size={group}; lower it"
            )
        if step < 1:
            raise BadInput(
                f"offload_prefetch_step={step} must be 1 or more with offload_group_size={group}; raise it"
            )
        if group > card.layers:
            raise BadInput(
                f"offload_group_size={group} is more than the {card.layers} layers of {card.name}; lower it"
            )
    elif in_group > 1:
        raise BadInput(f"offload_num_in_group={in_group} does nothing without offload_group_size; set it")
