"""Models the memory of each card and of the host, in bytes, with pure functions. docs/planning.md has the
formulas in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.calibration import _mib, constant
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.kv_layout import KvLayout, kv_layout
from lowmem.plan.kv_specs import KvSettings
from lowmem.plan.lora import worker_bytes
from lowmem.plan.stages import Part, parts, pipeline_buffers
from lowmem.plan.vision import vision_memory
from lowmem.plan.weights import (
    Weights,
    _wanted,
    ignores_offload,
    largest_linear,
    largest_online,
    offloaded_parameters,
    stored_bytes,
    weights,
)
from lowmem.schema import Device, ModelCard
from lowmem.units import MIB


def kv_layout_of(card: ModelCard, engine: EngineConfig) -> KvLayout:
    """Lay out the KV cache of the whole model, of which a pipeline stage has some of the layers.

    Raises BadInput for a model whose cache is not known.
    """
    return kv_layout(
        card.config,
        KvSettings(
            max_model_len=engine.max_model_len,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            tp=engine.tp,
            dtype_bytes=DTYPE_BYTES[engine.dtype],
            kv_dtype=engine.kv_dtype,
            block_tokens=engine.block_tokens,
            batches_in_flight=engine.pp + engine.async_scheduling,
            prefix_caching=engine.prefix_caching,
        ),
    )


def peak_activations(card: ModelCard, engine: EngineConfig, samples: bool = True) -> int:
    """Return the bytes of temporary tensors at the largest step.

    They are residual and hidden states, the MLP's widest pair, and the logits of the sampled rows. `samples`
    says that this stage makes the logits, as the last one does.
    """
    e = DTYPE_BYTES[engine.dtype]
    tokens, tp = engine.max_num_batched_tokens, engine.tp
    # Products of routed experts lie in a workspace of their own.
    mlp = 0 if card.experts else 3 * card.intermediate_size // tp * e
    attention = (2 * card.heads + 2 * max(card.kv_heads, tp)) * card.head_dim // tp * e
    per_token = 2 * card.hidden_size * e + max(mlp, attention)
    copies = (
        8 if engine.vllm >= (0, 28, 0) else 20
    )  # 32-bit copies; the older sampler also sorts, with 64-bit indices
    logits = min(engine.max_num_seqs * engine.rows, tokens) * card.vocab_size * (e + copies) if samples else 0
    return max(tokens * per_token, logits + tokens * 2 * card.hidden_size * e)


def expert_workspace(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of the buffers that the layers of routed experts share and keep.

    One holds the gate and up products or the output of each token's experts, and the other what is between
    (0.32.0, fused_moe/modular_kernel.py and v1/worker/workspace.py).
    """
    inner = next((g.in_features for g in card.groups if g.name.endswith("experts.w2")), None)
    if not card.experts or inner is None:
        return 0
    inner = inner // engine.tp
    rows = engine.max_num_batched_tokens * card.experts_per_token
    widths = max(2 * inner, card.hidden_size) + max(inner, card.hidden_size)
    return rows * widths * DTYPE_BYTES[engine.dtype]


def expert_kernels(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of the code and tables that the experts' kernels bring to the card."""
    return (
        round(float(constant("memory", "expert_kernel_mib")[engine.expert_kernel]) * MIB)
        if card.experts
        else 0
    )


def compiling(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes that compiling adds to the peak of the profile run.

    Inductor tunes its kernels on inputs that it makes up (autotune_at_compile_time), and one of them is as
    large as the embedding. On several cards the look-up is an operator of vLLM's own, which Inductor does not
    see (0.32.0, vocab_parallel_embedding.py, use_fused_embedding). With weights read from the host no such
    peak was seen (uva20).
    """
    if engine.eager or engine.tp > 1 or engine.offload == "uva":
        return 0
    rows = card.vocab_size * card.hidden_size if any(g.kind == "embedding" for g in card.groups) else 0
    return rows * DTYPE_BYTES[engine.dtype]


def graphs(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of the CUDA graphs of the captured sizes.

    NCCL's all-reduces keep more in them than vLLM's own.
    """
    if not engine.graph_sizes:
        return 0
    each = float(constant("memory", "graph_mib_per_layer_and_size"))
    if engine.tp > 1 and not engine.custom_all_reduce:
        each += float(constant("memory", "graph_nccl_mib_per_layer_and_size"))
    cases = 2 if engine.lora else 1  # captured with and without adapters (0.32.0, gpu/lora_utils.py)
    return _mib("graph_base_mib") + round(cases * len(engine.graph_sizes) * card.layers * each * MIB)


def offload_buffers(engine: EngineConfig, w: Weights) -> int:
    """Return the bytes of the prefetch back end's buffers: `prefetch_step` slots of one layer's offloaded
    parameters.
    """
    if engine.offload != "prefetch" or ignores_offload(engine):
        return 0
    layer = sum(p.loaded for p in w.layers[0] if _wanted(p.name, engine.offload_params))
    return engine.prefetch_step * layer


def of_loading(which: str, card: ModelCard, engine: EngineConfig) -> float | None:
    """Return a constant of the checkpoint's format.

    With torch's expandable segments it is their own constant, if that was measured.
    """
    table, method = constant("memory", which), str(card.quantization.method)
    if "expandable_segments:True" in engine.environment.get("PYTORCH_CUDA_ALLOC_CONF", "").split(","):
        method = f"{method}+expandable" if f"{method}+expandable" in table else method
    return table.get(method)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class KvPool:
    """KV pool of one card: blocks of a layout, and their bytes on this card.

    `available` is what is left for it; negative: the engine does not start.
    """

    layout: KvLayout
    layers: range  # the decoder layers of this card's stage
    most_requests: int  # max_num_seqs
    available: int = 0
    blocks: int = 0

    @property
    def block_bytes(self) -> int:
        return self.layout.bytes_per_block(self.layers)

    @property
    def tokens(self) -> int:
        return self.layout.tokens_of_blocks(self.blocks)

    def requests_of(self, tokens: int) -> int:
        """Count the requests of `tokens` tokens that the pool holds; block 0 is the engine's own.

        A model without a cache needs no pool, and takes as many as run together.
        """
        if not self.layout.groups:
            return self.most_requests
        return max(0, self.blocks - 1) // self.layout.blocks_of(tokens)


@dataclass(frozen=True)
class CardMemory:
    """Memory of one card.

    `terms` add up to what NVML shows at idle; `load` is what a full load adds.
    """

    terms: dict[str, int]
    load: dict[str, int]
    weights: Weights
    kv: KvPool
    before_start: int  # of the terms, what is there when the engine reads free memory for the first time

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def peak(self) -> int:
        return self.total + sum(self.load.values())


def stage_memories(
    card: ModelCard,
    engine: EngineConfig,
    device: Device,
    limit_bytes: int,
    load_blocks: int = 0,
    admission_bytes: int = 0,
) -> tuple[tuple[Part, CardMemory], ...]:
    """Compute the memory of one card of each stage.

    The pool has as many blocks on each as the stage with the least room (0.32.0, kv_cache_utils.py).
    """
    one = partial(cpu_memory, admission_bytes=admission_bytes) if device.kind == "cpu" else card_memory
    found = [
        (part, one(part.card, engine, device, limit_bytes, load_blocks, part)) for part in parts(card, engine)
    ]
    blocks = min(memory.kv.blocks for _, memory in found)
    return tuple(
        (
            part,
            replace(
                m,
                kv=replace(m.kv, blocks=blocks),
                terms={**m.terms, "kv_cache": blocks * m.kv.block_bytes},
            ),
        )
        for part, m in found
    )


def card_memory(
    card: ModelCard,
    engine: EngineConfig,
    device: Device,
    limit_bytes: int,
    load_blocks: int = 0,
    part: Part | None = None,
) -> CardMemory:
    """Compute the memory of one GPU, or of one GPU of the pipeline stage `part`.

    The KV pool follows the utilization, the given size, or (auto) the limit and the blocks of the load.
    """
    w = weights(card, engine)
    act = peak_activations(card, engine, part is None or part.last)
    graph = graphs(card, engine)
    new = engine.vllm >= (0, 28, 0)
    alone = engine.tp * engine.pp == 1
    before = _mib("snapshot_mib") + (
        0 if alone else _mib("first_use_mib")
    )  # taken when the engine reads free memory first
    growth = _mib("growth_mib") + (_mib("first_use_mib") if alone else 0)
    kept = _mib("idle_cache_mib") if new else _mib("idle_cache_old_mib")
    if new:  # the runner's own buffers, as wide as the largest step
        kept += _mib("eager_cache_mib") if engine.eager else 0
        kept += round(float(of_loading("loading_cache_mib", card, engine) or 0) * MIB)
        kept += 4 * engine.max_num_batched_tokens * card.hidden_size * DTYPE_BYTES[engine.dtype]
        kept += expert_workspace(card, engine) + expert_kernels(card, engine)
    terms = {
        "weights": w.on_card,
        "kv_cache": 0,
        "activations": kept,
        "cuda_context": before + growth,
        "nccl": nccl(engine, device),
        "cuda_graphs": graph,
        "offload_buffers": offload_buffers(engine, w),
    }
    if part and engine.pp > 1:
        terms["pipeline_buffers"] = pipeline_buffers(part, engine)
    ratio = constant("memory", "load_activation_ratio")
    load = {"activations": round(act * float(ratio.get(engine.kernel, ratio["any"])))}
    if seen := images_of(card, engine, load["activations"]):
        load["images"] = seen
    pool = empty_pool(card, engine, part)
    if engine.kv_bytes is not None:
        available = engine.kv_bytes
    elif engine.kv_auto:
        room = limit_bytes - sum(terms.values()) - sum(load.values())
        available = chosen_pool(
            engine, pool, min(room, start_room(terms, engine, device)), limit_bytes, load_blocks
        )
    else:
        budget = math.ceil(device.torch_total_mib * MIB * engine.utilization)
        available = (
            budget
            - w.on_card
            - terms["offload_buffers"]
            - terms.get("pipeline_buffers", 0)
            - profiled(card, engine, act)
            - growth
            - graph
        )
    pool = filled(pool, available)
    if engine.kv_blocks_override is not None and pool.blocks:
        pool = replace(pool, blocks=engine.kv_blocks_override)
    terms["kv_cache"] = pool.blocks * pool.block_bytes
    return CardMemory(terms, load, w, pool, before + terms["nccl"])


def images_of(card: ModelCard, engine: EngineConfig, activations: int) -> int:
    """Return the bytes that a load with images adds: the cache of their encodings, and the tower's tensors.

    The tower runs between steps, so only what it needs beyond the other `activations` counts.
    """
    vision = vision_memory(card, engine)
    return vision.cache + max(0, vision.activations - activations)


def profiled(card: ModelCard, engine: EngineConfig, activations: int) -> int:
    """Return the bytes beside weights and context that the engine finds in its profile run.

    What stays is buffers and the experts' workspace; of the rest the peak counts. Older engines report the
    peak of activations alone.
    """
    if engine.vllm < (0, 28, 0):
        return max(compiling(card, engine), activations + expert_workspace(card, engine))
    stays = 4 * engine.max_num_batched_tokens * card.hidden_size * DTYPE_BYTES[engine.dtype]
    stays += _mib("idle_cache_mib") + expert_kernels(card, engine)
    peak = max(activations, vision_memory(card, engine).activations)
    return stays + max(compiling(card, engine), expert_workspace(card, engine) + peak)


def empty_pool(card: ModelCard, engine: EngineConfig, part: Part | None) -> KvPool:
    """Return the pool of one card of a stage before it has blocks."""
    first = part.first_layer if part else 0
    layers = range(first, first + card.layers)
    return KvPool(kv_layout_of(card, engine), layers, most_requests=engine.max_num_seqs)


def filled(pool: KvPool, available: int) -> KvPool:
    """Return the pool with the blocks that the available bytes hold."""
    blocks = max(0, available) // pool.block_bytes if pool.block_bytes else 0
    return replace(pool, available=available, blocks=blocks)


def start_room(terms: dict[str, int], engine: EngineConfig, device: Device) -> int:
    """Return the bytes that the card can give when the engine allocates its pool.

    Graphs are not there yet, but pieces left from loading and profiling are. With the pool given in bytes
    vLLM 0.32 skips the profiler, and so does not empty the allocator's cache.
    """
    left = 0 if engine.vllm < (0, 28, 0) else _mib("start_fragments_mib")
    there = (
        terms["weights"]
        + terms["cuda_context"]
        + terms["nccl"]
        + terms["offload_buffers"]
        + terms.get("pipeline_buffers", 0)
    )
    return device.torch_total_mib * MIB - there - left


def loading(card: ModelCard, engine: EngineConfig, memory: CardMemory, which: str) -> int:
    """Return the bytes on one card while weights are loaded and repacked, before there is a KV pool.

    `which` is loading_needs or loading_seen.
    """
    extra = float(of_loading(which, card, engine) or 0) * largest_linear(card, engine)
    extra += largest_online(card, engine)
    return memory.weights.on_card + memory.before_start + round(extra)


def start_peak(card: ModelCard, engine: EngineConfig, device: Device, memory: CardMemory) -> int:
    """Return the most that NVML may show while the engine starts, up to the size of the card.

    Freed blocks stay in the allocator's cache until the card is short.
    """
    if device.kind == "cpu":
        return memory.peak
    return max(memory.peak, min(loading(card, engine, memory, "loading_seen"), device.torch_total_mib * MIB))


def nccl(engine: EngineConfig, device: Device) -> int:
    """Return the bytes of NCCL's buffers and of the all-reduces beside it; 0 on a single card.

    NCCL takes a base and a share for each channel.
    """
    if engine.tp * engine.pp == 1:
        return 0
    channels = engine.environment.get("NCCL_MAX_NCHANNELS", "")
    wanted = (
        int(channels) if channels.isdigit() and int(channels) else int(constant("memory", "nccl_channels"))
    )
    communicators = (engine.tp > 1) + (
        int(constant("memory", "nccl_pipeline_communicators")) if engine.pp > 1 else 0
    )
    channels_mib = min(wanted, int(constant("memory", "nccl_channels"))) * _mib("nccl_mib_per_channel")
    total = _mib("nccl_base_mib") + communicators * channels_mib
    if engine.custom_all_reduce and engine.tp > 1:
        total += _mib("custom_all_reduce_mib")
        if device.capability == "9.0" and engine.environment.get("VLLM_ALLREDUCE_USE_SYMM_MEM", "1") != "0":
            total += _mib("symmetric_memory_mib")
    return total


def cpu_memory(
    card: ModelCard,
    engine: EngineConfig,
    device: Device,
    limit_bytes: int,
    load_blocks: int = 0,
    part: Part | None = None,
    admission_bytes: int = 0,
) -> CardMemory:
    """Compute the resident set of the service on a CPU, with what open requests cost (`admission_bytes`).

    `runtime` is Python, torch and the engine's three processes.
    """
    w = weights(card, engine)
    pool = empty_pool(card, engine, part)
    fixed = {"weights": w.on_card, "runtime": round(float(constant("cpu", "runtime_mib")) * MIB)}
    load = {
        "activations": peak_activations(card, engine, part is None or part.last)
        + expert_workspace(card, engine),
        "admission": admission_bytes,
    }
    if seen := images_of(card, engine, load["activations"]):
        load["images"] = seen
    if engine.kv_bytes is not None:
        available = engine.kv_bytes
    elif engine.kv_auto:
        available = chosen_pool(
            engine, pool, limit_bytes - sum(fixed.values()) - sum(load.values()), limit_bytes, load_blocks
        )
    else:  # utilization is a share of the machine's RAM
        available = (
            math.ceil(device.torch_total_mib * MIB * engine.utilization)
            - sum(fixed.values())
            - sum(load.values())
        )
    pool = filled(pool, available)
    terms = {
        "weights": fixed["weights"],
        "kv_cache": pool.blocks * pool.block_bytes,
        "runtime": fixed["runtime"],
    }
    return CardMemory(terms, load, w, pool, 0)


def chosen_pool(engine: EngineConfig, pool: KvPool, room: int, limit_bytes: int, load_blocks: int) -> int:
    """Return the bytes of the KV pool that the plan chooses in the given room.

    The pool is at most what `max_num_seqs` requests of `max_model_len` can use, and leaves the model's own
    error below the limit. The load's requests come before that error, down to the least margin. Block 0 is
    the engine's own.
    """
    useful = (engine.max_num_seqs * pool.layout.blocks_per_request + 1) * pool.block_bytes
    needed = (load_blocks + 1) * pool.block_bytes
    easy = min(useful, room - round(limit_bytes * float(constant("memory", "model_error"))))
    return easy if easy >= needed else min(needed, room - _mib("margin_mib"))


def next_power_of_two(n: int) -> int:
    """Return the size that PyTorch's pinned host allocator gives for `n` bytes."""
    return 1 if n <= 1 else 1 << (n - 1).bit_length()


def host_ram(
    card: ModelCard, engine: EngineConfig, device: Device, memory: CardMemory, admission_bytes: int
) -> dict[str, int]:
    """Return the host RAM of the running service by term, in bytes.

    `admission_bytes` is what open requests cost. With several hosts it is that of the first one. On a CPU
    the service itself is the use.
    """
    if device.kind == "cpu":
        return {"service": memory.peak}
    w = memory.weights
    taken = offloaded_parameters(engine, w.layers)
    pinned = sum(
        next_power_of_two(p.loaded)
        for layer, which in zip(w.layers, taken, strict=True)
        for i, p in enumerate(layer)
        if i in which
    )
    terms = {
        "api_server": engine.dp * round(float(constant("service", "api_host_mib")) * MIB),
        "workers": engine.local_cards * round(float(constant("service", "engine_host_mib_per_gpu")) * MIB),
        "pinned_offload": engine.local_cards * pinned,
        # the prefetch back end copies each offloaded layer into pinned memory and keeps the first copy until
        # loading has ended
        "offload_loading": engine.local_cards * w.offloaded if engine.offload == "prefetch" else 0,
        "kv_offload": engine.kv_offload_bytes,
        "lora_adapters": engine.local_cards * worker_bytes(card, engine.lora),
        "admission": admission_bytes,
    }
    return {k: v for k, v in terms.items() if v}


def stage_ram(card: ModelCard) -> dict[str, int]:
    """Return the RAM of the stages before the service, in bytes.

    Quantization holds the 16-bit model, most of which swap can back. Loading uses page cache.
    """
    sixteen = card.parameters * 2
    return {
        "quantize": sixteen if card.quantization.method != "none" else 0,
        "load_page_cache": stored_bytes(card),
    }
