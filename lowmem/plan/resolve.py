"""Resolves knobs to the settings of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan import capability, support
from lowmem.plan.engine_config import (
    EngineConfig,
    graph_sizes,
    layer_partition,
    linear_kernel,
)
from lowmem.plan.knobs import version
from lowmem.plan.kv_types import stored_kv_dtype
from lowmem.plan.speculation import Speculation, speculation_of
from lowmem.schema import Device, Knob, ModelCard
from lowmem.units import GIB


def resolve(
    knobs: Mapping[str, Knob],
    card: ModelCard,
    device: Device,
    count: int,
    vllm_version: str,
    environment: Mapping[str, str],
    hosts: int = 1,
) -> EngineConfig:
    """Resolve knobs to engine settings, with `count` cards on each host.

    Raises BadInput if values contradict one another, the model or the cards.
    """
    vllm = version(vllm_version)
    v: dict[str, Any] = {n: k.value for n, k in knobs.items()}
    tp, pp = int(v.get("tensor_parallel_size", 1)), int(v.get("pipeline_parallel_size", 1))
    support.refuse_parallel(tp, pp, count, hosts)
    support.refuse_split(card, tp)
    dtype = _dtype(v, card, device)
    support.refuse_dtype(card, dtype)
    support.refuse_quantization(card, v)
    max_len = _max_model_len(v, card)
    seqs, batched = _batch(v, device, max_len)
    support.refuse_batch(v, seqs, batched, max_len)
    speculation = speculation_of(v)
    support.refuse_drafts(v, speculation, seqs, batched)
    kv_dtype, kv = _kv_dtype(v, card), v.get("kv_cache_memory_bytes")
    block = v.get("block_size", None if device.kind == "cuda" else 128)
    support.refuse_kv(kv_dtype, block)
    support.refuse_offload(v, card)
    backend, disabled = str(v.get("linear_backend", "auto")), environment.get("VLLM_DISABLED_KERNELS", "")
    wanted_partition = environment.get("VLLM_PP_LAYER_PARTITION", "")
    return EngineConfig(
        vllm=vllm,
        tp=tp,
        dtype=dtype,
        max_model_len=max_len,
        auto_len=_auto_len(v),
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        # vLLM 0.32.0 turns it on by default, and off on a CPU (platforms/cpu.py) and with n-gram drafts
        async_scheduling=device.kind == "cuda"
        and speculation is None
        and bool(v.get("async_scheduling", True)),
        utilization=float(v.get("gpu_memory_utilization", 0.92)),
        kv_bytes=int(kv) if kv is not None and kv != "auto" else None,
        kv_auto=kv == "auto",
        kv_blocks_override=int(v["num_gpu_blocks_override"]) if "num_gpu_blocks_override" in v else None,
        kv_dtype=kv_dtype,
        block_tokens=None if block is None else int(block),
        **_graphs(v, device, seqs, batched, speculation),
        custom_all_reduce=not v.get("disable_custom_all_reduce", False)
        and capability.custom_all_reduce(device, tp),
        **_offload(v),
        kv_offload_bytes=int(float(v.get("kv_offloading_size", 0)) * GIB),
        dummy=v.get("load_format") == "dummy",
        prefix_caching=bool(v.get("enable_prefix_caching", True)),
        kernel=linear_kernel(card, device, vllm, backend, disabled),
        environment=dict(environment),
        hosts=hosts,
        partition=layer_partition(card.layers, pp, wanted_partition) if pp > 1 else (),
        speculation=speculation,
    )


def _dtype(v: Mapping[str, Any], card: ModelCard, device: Device) -> str:
    """Return the type that the engine computes in; "auto" is the checkpoint's, if the card has it."""
    dtype = str(v.get("dtype", "auto"))
    if dtype == "auto":
        return capability.usable_dtype("float16" if card.dtype == "float32" else card.dtype, device)
    return {"half": "float16", "float": "float32"}.get(dtype, dtype)


def _kv_dtype(v: Mapping[str, Any], card: ModelCard) -> str:
    """Return the type of the KV cache; "auto" is what the checkpoint asks for."""
    given = str(v.get("kv_cache_dtype", "auto"))
    return stored_kv_dtype(card.config) if given == "auto" else given


def _auto_len(v: Mapping[str, Any]) -> bool:
    return v.get("max_model_len") in ("auto", -1)


def _max_model_len(v: Mapping[str, Any], card: ModelCard) -> int:
    """Return the longest sequence in tokens. Raises BadInput if the model has fewer positions."""
    most = card.max_position_embeddings
    max_len = most if _auto_len(v) else int(v.get("max_model_len", most))
    if max_len > most:
        raise BadInput(
            f"max_model_len={max_len} is more than the {most} positions of"
            f" {card.name} (max_position_embeddings); lower it"
        )
    return max_len


def _batch(v: Mapping[str, Any], device: Device, max_len: int) -> tuple[int, int]:
    """Return sequences and tokens of a step, with vLLM's defaults filled in."""
    roomy = device.kind == "cuda" and device.torch_total_mib >= 70 * 1024 and "a100" not in device.name
    seqs_given, batched_given = "max_num_seqs" in v, "max_num_batched_tokens" in v
    seqs = int(v.get("max_num_seqs", 1024 if roomy else 256))
    batched = int(v.get("max_num_batched_tokens", 8192 if roomy else 2048))
    if not batched_given:
        batched = max(batched, seqs) if seqs_given else batched
        if v.get("enable_chunked_prefill") is False:
            batched = max(batched, max_len)
    elif not seqs_given:
        seqs = min(seqs, batched)
    return seqs, batched


def _graphs(
    v: Mapping[str, Any], device: Device, seqs: int, batched: int, speculation: Speculation | None
) -> dict[str, Any]:
    """Return whether steps run without captured graphs, and the batch sizes to capture."""
    eager = bool(v.get("enforce_eager", False)) or device.kind == "cpu" or v.get("optimization_level") == 0
    wanted, largest = v.get("cudagraph_capture_sizes"), v.get("max_cudagraph_capture_size")
    rows = speculation.rows if speculation else 1
    sizes = () if eager else graph_sizes(seqs, batched, wanted, largest, rows)
    return {"eager": eager, "graph_sizes": sizes}


def _offload(v: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of weight offload: the back end and its share of the weights."""
    uva = float(v.get("cpu_offload_gb", 0))
    group, num, step = support.offload_groups(v)
    params = str(v.get("offload_params" if group else "cpu_offload_params", "")).split()
    return {
        "offload": "prefetch" if group else "uva" if uva else "none",
        "uva_bytes": int(uva * GIB),
        "group_size": group,
        "num_in_group": num,
        "prefetch_step": step,
        "offload_params": tuple(params),
    }
