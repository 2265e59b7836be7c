"""Holds the settings of the engine, and what vLLM derives from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowmem.errors import BadInput
from lowmem.plan.knobs import _capability
from lowmem.plan.speculation import Speculation
from lowmem.schema import Device, Load, ModelCard, Scalar

# Each KV type with the CUDA compute capability and the vLLM version that it needs. FlashAttention takes fp8
# on 9.0 and 10.0 only, and Triton's fp8 needs 8.9. The per-token-head integer types and TurboQuant's integer
# keys run in Triton on any card (0.32.0: v1/attention/backends/{flash_attn,triton_attn,turboquant_attn}.py).
# What the locked wheels have no code for, `lowmem.plan.capability` refuses whatever the KV type.
KV_DTYPES: dict[str, tuple[str, str]] = {
    "auto": ("6.0", "0.0"),
    "float16": ("6.0", "0.14.0"),
    "bfloat16": ("8.0", "0.0"),
    "fp8": ("8.9", "0.0"),
    "fp8_e4m3": ("8.9", "0.0"),
    "fp8_e5m2": ("8.9", "0.0"),
    "int8_per_token_head": ("6.0", "0.20.0"),
    "int4_per_token_head": ("6.0", "0.21.0"),
    "fp8_per_token_head": ("8.9", "0.20.0"),
    "turboquant_k8v4": ("8.9", "0.20.0"),
    "turboquant_4bit_nc": ("6.0", "0.20.0"),
    "turboquant_k3v4_nc": ("6.0", "0.20.0"),
    "turboquant_3bit_nc": ("6.0", "0.20.0"),
}

# vLLM has several names for one checkpoint format.
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
class EngineConfig:
    """Settings of the engine with every default filled in."""

    vllm: tuple[int, int, int]
    tp: int
    dtype: str
    max_model_len: int
    auto_len: bool  # the engine shortens max_model_len to what its pool holds
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool
    utilization: float
    kv_bytes: int | None  # --kv-cache-memory-bytes
    kv_auto: bool  # the plan decides the pool
    kv_blocks_override: int | None
    kv_dtype: str
    block_tokens: int | None  # --block-size; None: what the attention back end asks for
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
    speculation: Speculation | None = None

    @property
    def rows(self) -> int:
        """Count the tokens of one request in a decode step: its next one and its drafts."""
        return self.speculation.rows if self.speculation else 1

    def held_tokens(self, load: Load) -> int:
        """Count the tokens of a request of the load in the KV pool, with the drafts of its last step."""
        return min(load.input_tokens + load.output_tokens + self.rows - 1, self.max_model_len)

    @property
    def pp(self) -> int:
        return max(1, len(self.partition))

    @property
    def local_cards(self) -> int:
        """Count the cards of one host that the engine takes."""
        return self.tp * self.pp // self.hosts


def graph_sizes(
    max_num_seqs: int, batched: int, wanted: Scalar | None, largest: Scalar | None, rows: int = 1
) -> tuple[int, ...]:
    """Choose the batch sizes to capture, as vLLM 0.32.0 does (config/vllm.py, _set_cudagraph_sizes).

    `rows` is the number of tokens of one request in a decode step. With drafts the sizes that whole requests
    fill are captured too.
    """
    if wanted:
        return tuple(sorted({int(x) for x in str(wanted).split()}))
    top = int(largest) if largest is not None else min(max_num_seqs * rows * 2, 512)
    top = min(top, batched)
    grid = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    sizes = set(grid)
    if rows > 1 and largest is None:
        sizes |= {n * rows for n in (*grid, max_num_seqs) if n <= max_num_seqs}
    return tuple(sorted(s for s in sizes if s <= top))


def layer_partition(layers: int, stages: int, wanted: str = "") -> tuple[int, ...]:
    """Divide decoder layers among pipeline stages, as vLLM 0.32.0 does (distributed/utils.py,
    get_pp_indices).

    Each stage gets the same number. What is left over goes one each to the stages before the last, from the
    end. `wanted` is VLLM_PP_LAYER_PARTITION, which overrides this. Raises BadInput for a partition that the
    engine would refuse, or one with an empty stage.
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
    layers_of, left = [layers // stages] * stages, layers % stages
    for i in range(2, left + 2):
        layers_of[-i] += 1
    return tuple(layers_of)


def linear_kernel(
    card: ModelCard, device: Device, vllm: tuple[int, int, int], wanted: str, disabled: str
) -> str:
    """Choose the kernel of the linear layers as vLLM does.

    Source: 0.32.0, model_executor/kernels/linear and quantization/utils/humming/priority.py.
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
