"""Resolves knobs to the settings of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan.knobs import _capability, version
from lowmem.schema import Device, Knob, ModelCard, Scalar
from lowmem.units import GIB

KV_BLOCK_TOKENS = 16

# CUDA compute capability a KV type needs: FlashAttention takes fp8 on 9.0 and 10.0 only, Triton's fp8 wants
# 8.9, the per-token-head integer types and TurboQuant's integer keys run in Triton on any (0.32.0:
# v1/attention/backends/{flash_attn,triton_attn,turboquant_attn}.py).
KV_DTYPES: dict[str, tuple[str, str]] = {
    "auto": ("8.0", "0.0"),
    "float16": ("8.0", "0.14.0"),
    "bfloat16": ("8.0", "0.0"),
    "fp8": ("8.9", "0.0"),
    "fp8_e4m3": ("8.9", "0.0"),
    "fp8_e5m2": ("8.9", "0.0"),
    "int8_per_token_head": ("8.0", "0.20.0"),
    "int4_per_token_head": ("8.0", "0.21.0"),
    "fp8_per_token_head": ("8.9", "0.20.0"),
    "turboquant_k8v4": ("8.9", "0.20.0"),
    "turboquant_4bit_nc": ("8.0", "0.20.0"),
    "turboquant_k3v4_nc": ("8.0", "0.20.0"),
    "turboquant_3bit_nc": ("8.0", "0.20.0"),
}

# vLLM's names of one checkpoint format each
FORMATS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "auto_awq": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "auto_gptq": "gptq",
    "compressed-tensors": "compressed-tensors",
    "auto-round": "auto-round",
    "inc": "auto-round",
}


@dataclass(frozen=True)
class Engine:
    """What vLLM makes of the knobs: every value decided, defaults filled in."""

    vllm: tuple[int, int, int]
    tp: int
    dtype: str
    max_model_len: int
    auto_len: bool  # the engine shortens max_model_len to what its pool holds
    max_num_seqs: int
    max_num_batched_tokens: int
    utilization: float
    kv_bytes: int | None  # --kv-cache-memory-bytes
    kv_auto: bool  # the plan decides the pool
    kv_blocks_override: int | None
    kv_dtype: str
    block_tokens: int
    eager: bool
    graph_sizes: tuple[int, ...]
    custom_all_reduce: bool
    offload: str  # none, uva, prefetch
    uva_bytes: int
    group_size: int
    num_in_group: int
    prefetch_step: int
    offload_params: tuple[str, ...]
    kv_offload_bytes: int
    dummy: bool
    prefix_caching: bool
    kernel: str  # of the quantized linear layers: marlin, machete, humming, native16 or cpu
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: int = 1
    partition: tuple[int, ...] = ()  # decoder layers of each pipeline stage; empty: one stage

    @property
    def pp(self) -> int:
        return max(1, len(self.partition))

    @property
    def local_cards(self) -> int:
        """Cards of one host that the engine takes."""
        return self.tp * self.pp // self.hosts


def graph_sizes(
    max_num_seqs: int, batched: int, wanted: Scalar | None, largest: Scalar | None
) -> tuple[int, ...]:
    """Batch sizes to capture, as vLLM 0.32.0 chooses them (config/vllm.py, _set_cudagraph_sizes)."""
    if wanted:
        return tuple(sorted({int(x) for x in str(wanted).split()}))
    top = int(largest) if largest is not None else min(max_num_seqs * 2, 512)
    top = min(top, batched)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return tuple(s for s in sizes if s <= top)


def layer_partition(layers: int, stages: int, wanted: str = "") -> tuple[int, ...]:
    """Decoder layers of each pipeline stage as vLLM 0.32.0 deals them (distributed/utils.py, get_pp_indices).

    Evenly; what is left over goes one each to the stages before the last, from the end. `wanted`:
    VLLM_PP_LAYER_PARTITION, which decides. BadInput for a partition that the engine would refuse, or one with
    an empty stage.
    """
    if wanted:
        parts = [int(x) if x.strip().isdigit() else -1 for x in wanted.split(",")]
        if len(parts) != stages or sum(parts) != layers or min(parts) < 1:
            raise BadInput(
                f"VLLM_PP_LAYER_PARTITION={wanted!r} is not {stages} numbers from 1 that add up to {layers}"
                " layers; write one a stage"
            )
        return tuple(parts)
    if stages > layers:
        raise BadInput(f"pipeline_parallel_size={stages} is more than the {layers} layers; lower it")
    found, left = [layers // stages] * stages, layers % stages
    for i in range(2, left + 2):
        found[-i] += 1
    return tuple(found)


def _parallel(v: Mapping[str, Any], count: int, hosts: int) -> tuple[int, int]:
    """Sizes of tensor and pipeline parallelism. BadInput where they do not fit the cards of a host, or would
    split a layer across hosts.
    """
    tp, pp = int(v.get("tensor_parallel_size", 1)), int(v.get("pipeline_parallel_size", 1))
    if tp > count and hosts > 1:
        raise BadInput(
            f"tensor_parallel_size={tp} is more than the {count} card(s) of a host: each layer would wait"
            f" twice a token for the network between hosts; use tensor_parallel_size={count} inside a host"
            f" and pipeline_parallel_size={hosts} across"
        )
    if tp > count:
        raise BadInput(
            f"tensor_parallel_size={tp} is more than the {count} card(s); lower it or raise --count"
        )
    if pp % hosts:
        raise BadInput(
            f"pipeline_parallel_size={pp} does not deal its stages evenly to {hosts} hosts; use a multiple of"
            f" {hosts}"
        )
    if tp * pp // hosts > count:
        raise BadInput(
            f"tensor_parallel_size={tp} and pipeline_parallel_size={pp} need {tp * pp // hosts} cards a host"
            f" and there are {count}; lower one of them or raise --count"
        )
    return tp, pp


def resolve(
    knobs: Mapping[str, Knob],
    card: ModelCard,
    device: Device,
    count: int,
    vllm_version: str,
    environment: Mapping[str, str],
    hosts: int = 1,
) -> Engine:
    """Knobs to engine settings; `count` cards on each host. BadInput where values contradict one another, the
    model or the cards.
    """
    vllm = version(vllm_version)
    v: dict[str, Any] = {n: k.value for n, k in knobs.items()}
    tp, pp = _parallel(v, count, hosts)
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
                f"tensor_parallel_size={tp} leaves {side // tp} inputs of {g.name} a card, no multiple of the"
                f" quantization group {group}; use a divisor or a smaller group"
            )
    dtype = str(v.get("dtype", "auto"))
    if dtype in ("auto", "half", "float"):
        dtype = {"half": "float16", "float": "float32"}.get(
            dtype, "float16" if card.dtype == "float32" else card.dtype
        )
    if dtype == "float32" and card.quantization.method in ("awq", "gptq"):
        raise BadInput(
            f"dtype=float32 is not supported for quantization method {card.quantization.method}; use float16"
            " or bfloat16"
        )
    if "quantization" in v and v["quantization"] not in (*FORMATS, "fp8"):
        raise BadInput(
            f"quantization={v['quantization']!r} is no method of this version; leave it out, it is read from"
            " the checkpoint"
        )
    named = FORMATS.get(str(v.get("quantization")))
    if named and card.quantization.method not in ("none", named):
        raise BadInput(
            f"quantization={v['quantization']} does not match the checkpoint's own method,"
            f" {card.quantization.method}; leave the knob out"
        )
    if v.get("quantization") and card.quantization.method == "none" and v["quantization"] != "fp8":
        raise BadInput(
            f"quantization={v['quantization']} asks for a quantized checkpoint and {card.name} is none;"
            " quantize it first or leave the knob out"
        )
    auto_len = v.get("max_model_len") in ("auto", -1)
    max_len = (
        card.max_position_embeddings
        if auto_len
        else int(v.get("max_model_len", card.max_position_embeddings))
    )
    if max_len > card.max_position_embeddings:
        raise BadInput(
            f"max_model_len={max_len} is more than the {card.max_position_embeddings} positions of"
            f" {card.name} (max_position_embeddings); lower it"
        )
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
    if batched < seqs:
        raise BadInput(
            f"max_num_batched_tokens={batched} is less than max_num_seqs={seqs}; each sequence needs one"
            " token of a step: raise it"
        )
    if v.get("enable_chunked_prefill") is False and batched < max_len:
        raise BadInput(
            f"max_num_batched_tokens={batched} is smaller than max_model_len={max_len} and"
            " enable_chunked_prefill is false; raise it or leave chunked prefill on"
        )
    kv_dtype = str(v.get("kv_cache_dtype", "auto"))
    if kv_dtype not in KV_DTYPES:
        raise BadInput(f"kv_cache_dtype={kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
    kv = v.get("kv_cache_memory_bytes")
    block = int(v.get("block_size", KV_BLOCK_TOKENS if device.kind == "cuda" else 128))
    if block % 16:
        raise BadInput(f"block_size={block} is not a multiple of 16; use 16, 32, 64 or 128")
    uva = float(v.get("cpu_offload_gb", 0))
    group, num, step = (
        int(v.get("offload_group_size", 0)),
        int(v.get("offload_num_in_group", 1)),
        int(v.get("offload_prefetch_step", 1)),
    )
    backend = str(v.get("offload_backend", "auto"))
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
        if num > group:
            raise BadInput(f"offload_num_in_group={num} is more than offload_group_size={group}; lower it")
        if step < 1:
            raise BadInput(
                f"offload_prefetch_step={step} must be 1 or more with offload_group_size={group}; raise it"
            )
        if group > card.layers:
            raise BadInput(
                f"offload_group_size={group} is more than the {card.layers} layers of {card.name}; lower it"
            )
    elif num > 1:
        raise BadInput(f"offload_num_in_group={num} does nothing without offload_group_size; set it")
    params = str(v.get("offload_params" if group else "cpu_offload_params", "")).split()
    eager = bool(v.get("enforce_eager", False)) or device.kind == "cpu" or v.get("optimization_level") == 0
    return Engine(
        vllm=vllm,
        tp=tp,
        dtype=dtype,
        max_model_len=max_len,
        auto_len=auto_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        utilization=float(v.get("gpu_memory_utilization", 0.92)),
        kv_bytes=int(kv) if kv is not None and kv != "auto" else None,
        kv_auto=kv == "auto",
        kv_blocks_override=int(v["num_gpu_blocks_override"]) if "num_gpu_blocks_override" in v else None,
        kv_dtype=kv_dtype,
        block_tokens=block,
        eager=eager,
        graph_sizes=(
            ()
            if eager
            else graph_sizes(
                seqs, batched, v.get("cudagraph_capture_sizes"), v.get("max_cudagraph_capture_size")
            )
        ),
        custom_all_reduce=not v.get("disable_custom_all_reduce", False),
        offload="prefetch" if group else "uva" if uva else "none",
        uva_bytes=int(uva * GIB),
        group_size=group,
        num_in_group=num,
        prefetch_step=step,
        offload_params=tuple(params),
        kv_offload_bytes=int(float(v.get("kv_offloading_size", 0)) * GIB),
        dummy=v.get("load_format") == "dummy",
        prefix_caching=bool(v.get("enable_prefix_caching", True)),
        kernel=linear_kernel(
            card,
            device,
            vllm,
            str(v.get("linear_backend", "auto")),
            environment.get("VLLM_DISABLED_KERNELS", ""),
        ),
        environment=dict(environment),
        hosts=hosts,
        partition=(
            layer_partition(card.layers, pp, environment.get("VLLM_PP_LAYER_PARTITION", "")) if pp > 1 else ()
        ),
    )


def linear_kernel(
    card: ModelCard, device: Device, vllm: tuple[int, int, int], wanted: str, disabled: str
) -> str:
    """The kernel that vLLM takes for the linear layers (0.32.0: model_executor/kernels/linear,
    quantization/utils/humming/priority.py).
    """
    if device.kind == "cpu":
        return "cpu"
    if card.quantization.method in ("none", "fp8"):
        return "native16"
    if card.quantization.bits in (2, 3):
        return "humming"
    if wanted in ("marlin", "machete", "humming"):
        return wanted
    if _capability(device.capability) != (9, 0):
        return "marlin"
    if "MacheteLinearKernel" not in disabled:
        return "machete"
    return "humming" if vllm >= (0, 30, 0) and "HummingLinearKernel" not in disabled else "marlin"
