"""Counts the weights of a model on one GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

from lowmem.checkpoint.architectures import VOCAB_MULTIPLE
from lowmem.checkpoint.inventory import Inventory, inventory_of
from lowmem.checkpoint.quantization import online_recipe
from lowmem.errors import BadInput
from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.calibration import constant
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.lora import places_bytes
from lowmem.schema import ModelCard, Quantization, WeightGroup
from lowmem.units import MIB

SCALE_BYTES = 2  # scales are stored in 16 bits by every method planned here


def stored_bytes(card: ModelCard) -> int:
    """Return the bytes of all tensors on disk: the sum of the headers, or else counted from the card."""
    if card.header_bytes is not None:
        return card.header_bytes
    return sum(
        g.count
        * sum(
            _parts(
                g, card.quantization, g.out_features, g.in_features, DTYPE_BYTES[card.dtype], stored=True
            ).values()
        )
        for g in card.groups
    )


def _parts(
    g: WeightGroup, q: Quantization, out: int, inp: int, dtype_bytes: int, stored: bool = False
) -> dict[str, int]:
    """Return the bytes of one tensor of a group by part: weight, zeros, scales.

    With `stored` they are as on disk, else as the engine loads them.
    """
    if not g.quantized:
        return {"weight": out * inp * dtype_bytes}
    if q.method == "fp8":
        return {"weight": out * inp, "scales": 4}
    groups = 1 if q.group_size == -1 else math.ceil(inp / q.group_size)
    parts = {"weight": out * inp * q.bits // 8}
    gptq_like = q.method in ("gptq", "auto-round")
    if q.zero_point or (
        stored and gptq_like
    ):  # the GPTQ layout stores zero points even when they are all the same
        parts["zeros"] = groups * out * q.bits // 8
    parts["scales"] = groups * out * SCALE_BYTES
    if stored and q.method == "gptq":
        parts["g_idx"] = inp * 4
    return parts


_EXPERTS = re.compile(r"(?:^|\.)experts\.")  # of the routed ones, not of shared_experts


def is_expert(name: str) -> bool:
    """Tell whether a tensor belongs to routed experts."""
    return bool(_EXPERTS.search(name))


@dataclass(frozen=True)
class Parameter:
    """Parameter of one decoder layer as the engine registers it, on one card."""

    name: str
    loaded: int  # bytes as loaded
    grown: int  # bytes the kernel's own layout adds on the card


@dataclass(frozen=True)
class Weights:
    """Weights of one card in bytes.

    `sharded` is cut by TP, and `replicated` is on every card. `padding` fills the vocabulary and short
    allocations.
    """

    sharded: int
    replicated: int
    padding: int
    repacking: int
    offloaded: int
    layers: tuple[tuple[Parameter, ...], ...]
    lora: int = 0  # places for adapters, made while the model loads

    @cached_property
    def expert_bytes(self) -> int:
        """Return the bytes of the routed experts."""
        return sum(p.loaded for layer in self.layers for p in layer if is_expert(p.name))

    @cached_property
    def expert_layers(self) -> int:
        """Count the layers with routed experts."""
        return sum(any(is_expert(p.name) for p in layer) for layer in self.layers)

    @property
    def on_card(self) -> int:
        """Return the bytes that the engine logs as "Model loading took"."""
        return self.sharded + self.replicated + self.padding + self.repacking + self.lora - self.offloaded


def _cut(g: WeightGroup, card: ModelCard, tp: int) -> tuple[int, int]:
    """Return rows and columns of a tensor on one card."""
    if g.split == "column":
        return g.out_features // tp, g.in_features
    if g.split == "row":
        return g.out_features, g.in_features // tp
    if g.split == "kv":
        return max(1, card.kv_heads // tp) * card.head_dim, g.in_features
    if g.split == "vocab":
        return math.ceil(g.out_features / tp), g.in_features
    return g.out_features, g.in_features


# The loader merges these into one parameter each, in this order.
_MERGED = {
    "self_attn.q_proj": "qkv_proj", "self_attn.k_proj": "qkv_proj", "self_attn.v_proj": "qkv_proj",
    "mlp.gate_proj": "gate_up_proj", "mlp.up_proj": "gate_up_proj",
    "block_sparse_moe.experts.w1": "experts.w13", "block_sparse_moe.experts.w3": "experts.w13",
    "block_sparse_moe.experts.w2": "experts.w2",
}  # fmt: skip

_PART_ORDER = ("weight", "zeros", "scales")


def layer_parameters(card: ModelCard, engine: EngineConfig) -> tuple[Parameter, ...]:
    """List the parameters of one decoder layer on one card, merged and ordered as vLLM registers them.

    UVA offload takes them in this order.
    """
    q, dtype = card.quantization, DTYPE_BYTES[engine.dtype]
    merged: dict[tuple[str, str], list[int]] = {}
    for g in (g for g in card.groups if g.layered):
        out, inp = _cut(g, card, engine.tp)
        times = g.count // card.layers
        stem, _, bias = g.name.partition(".bias")
        name = _MERGED.get(stem, stem) + ("." + "bias" if bias or g.name.endswith(".bias") else "")
        parts = _parts(g, q, out, inp, dtype)
        for part in sorted(parts, key=_PART_ORDER.index):
            extra = 0
            if (
                part == "zeros" and engine.kernel == "machete" and q.bits == 4 and not is_expert(name)
            ):  # Machete keeps scale x zero point in 16 bits
                extra = parts[part] * 16 // q.bits - parts[part]
            entry = merged.setdefault((name, part), [0, 0])
            entry[0] += times * parts[part]
            entry[1] += times * extra
    return tuple(Parameter(f"{n}.{p}", a, b) for (n, p), (a, b) in merged.items())


def weights(card: ModelCard, engine: EngineConfig) -> Weights:
    """Compute one card's weights: sharded, replicated, padded, repacked, and less those offloaded."""
    own = _counted_weights(card, engine) if card.counted or engine.online else _named_weights(card, engine)
    return replace(own, lora=places_bytes(card, engine.lora, engine.tp))


def _named_weights(card: ModelCard, engine: EngineConfig) -> Weights:
    """Count one GPU's weights from the card's groups."""
    dtype = DTYPE_BYTES[engine.dtype]
    sharded = replicated = padding = 0
    for g in card.groups:
        out, inp = _cut(g, card, engine.tp)
        size = g.count * sum(_parts(g, card.quantization, out, inp, dtype).values())
        if g.split == "none":
            replicated += size
        else:
            sharded += size
        if g.split == "vocab":
            padded = math.ceil(g.out_features / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
            padding += (math.ceil(padded / engine.tp) - out) * inp * dtype * g.count
    layers = (layer_parameters(card, engine),) * card.layers
    taken = offloaded_parameters(engine, layers)
    offloaded = sum(
        p.loaded
        for layer, which in zip(layers, taken, strict=True)
        for i, p in enumerate(layer)
        if i in which
    )
    repacking = sum(
        p.grown
        for layer, which in zip(layers, taken, strict=True)
        for i, p in enumerate(layer)
        if i not in which
    )
    padding += allocator_padding(card, engine, layers, taken)
    return Weights(
        sharded, replicated + resident_buffers(card, engine), padding, repacking, offloaded, layers
    )


_LEAST_WHOLE = 20 * MIB
"""Larger blocks are not split while weights are loaded (0.32.0, gpu_worker.py, max_split_size_mb)."""

_LARGE_STEP = 2 * MIB
"""Size to which torch rounds large blocks up (CUDACachingAllocator)."""


def allocator_padding(
    card: ModelCard, engine: EngineConfig, layers: tuple[tuple[Parameter, ...], ...], taken: list[set[int]]
) -> int:
    """Return the bytes that the allocator holds beside the parameters that stay on the card.

    A large parameter takes whole steps of 2 MiB, and small ones leave remainders.
    """
    rounded = sum(
        -p.loaded % _LARGE_STEP
        for layer, which in zip(layers, taken, strict=True)
        for i, p in enumerate(layer)
        if i not in which and p.loaded > _LEAST_WHOLE
    )
    if engine.kernel == "cpu":
        return 0
    resident = sum(len(which) < len(layer) for layer, which in zip(layers, taken, strict=True))
    slack = float(constant("memory", "allocator_slack_mib_per_layer").get(engine.kernel, 0))
    quantized = any(g.quantized for g in card.groups)
    return rounded + (round(resident * slack * MIB) if quantized else 0)


def resident_buffers(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of rotary caches and other buffers on one card; 0 where they cannot be counted."""
    try:
        inventory = inventory_of_card(card, engine)
    except BadInput:  # the plan says why the engine refuses it
        return 0
    return inventory.buffer_bytes if inventory else 0


def inventory_of_card(card: ModelCard, engine: EngineConfig, online: str = "") -> Inventory | None:
    """Count the tensors that the engine registers on one GPU; None for a card without its config.json.

    `online` counts them after that quantization. Raises BadInput, with the engine's reason, where the engine
    refuses the checkpoint.
    """
    published = card.published
    if published is None:
        return None
    key = (engine.tp, engine.dtype, online)
    if key not in published.inventories:
        published.inventories[key] = inventory_of(
            published.config, engine.tp, engine.dtype, published.hf_quant_config, published.headers, online
        )
    found: Inventory = published.inventories[key]
    return found


def largest_online(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of the largest module at 16 bits that the engine quantizes while it loads.

    The engine loads one module whole, quantizes it and frees it (0.32.0, model_loader/reload/layerwise.py).
    """
    before = inventory_of_card(card, engine) if engine.online else None
    if before is None:
        return 0
    choose = online_recipe(engine.online).choose
    dtype = DTYPE_BYTES[before.dtype]
    return max(
        (
            max(1, m.experts) * m.inp * (sum(m.out) + (m.out[0] if m.kind == "experts" else 0)) * dtype
            for m in before.modules
            if m.is_linear and choose(m) is not None
        ),
        default=0,
    )


def _counted_weights(card: ModelCard, engine: EngineConfig) -> Weights:
    """Take one GPU's weights from the inventory; its buffers count as replicated."""
    inventory = inventory_of_card(card, engine, engine.online)
    if inventory is None or engine.pp > 1:
        raise BadInput(
            f"pipeline_parallel_size={engine.pp} is not planned for {card.name}: stages are known for"
            " uniform Llama, Mistral, Mixtral and Qwen models; use tensor_parallel_size"
        )
    replicated = sum(size for use, size in inventory.bytes_by_use.items() if use in ("norm", "router"))
    encoders = inventory.bytes_by_use.get("vision", 0) if engine.text_only else 0
    ratio = _expert_ratio(card, engine)
    layers = tuple(
        tuple(_counted_parameter(card, engine, name, size, ratio) for name, size in layer)
        for layer in inventory.layers
    )
    taken = offloaded_parameters(engine, layers)
    pairs = [(p, i in which) for layer, which in zip(layers, taken, strict=True) for i, p in enumerate(layer)]
    smaller = sum(size for layer in inventory.layers for _, size in layer) - sum(p.loaded for p, _ in pairs)
    return Weights(
        sharded=inventory.parameter_bytes - replicated - smaller - encoders,
        replicated=replicated + inventory.buffer_bytes,
        padding=allocator_padding(card, engine, layers, taken),
        repacking=sum(p.grown for p, away in pairs if not away),
        offloaded=sum(p.loaded for p, away in pairs if away),
        layers=layers,
    )


def _counted_parameter(
    card: ModelCard, engine: EngineConfig, name: str, size: int, expert_ratio: float
) -> Parameter:
    """Return a parameter of the inventory as the kernel lays it out.

    Machete keeps the product of scale and zero point of 4-bit weights in 16 bits.
    """
    q, expert = card.quantization, is_expert(name)
    zeros = name.endswith(("zero_point", "qzeros")) and q.zero_point and q.bits == 4
    grown = 3 * size if zeros and not expert and engine.kernel == "machete" else 0
    return Parameter(name, round(size * expert_ratio) if expert else size, grown)


def _expert_ratio(card: ModelCard, engine: EngineConfig) -> float:
    """Return the bytes of GPT-OSS's experts for Triton over those that the inventory has.

    The inventory has Marlin's multiples of hidden and inner size; Triton rounds only the inner size up
    (0.32.0, oracle/mxfp4.py, mxfp4_round_up_hidden_size_and_intermediate_size).
    """
    down = next((g for g in card.groups if g.name.endswith("experts.w2")), None)
    if engine.expert_kernel != "triton_mxfp4" or down is None:
        return 1.0
    hidden, inner = down.out_features, math.ceil(down.in_features / engine.tp)

    def up(size: int, multiple: int) -> int:
        return math.ceil(size / multiple) * multiple

    return hidden * up(inner, 64) / (up(hidden, 256) * up(inner, 128))


def offloaded_parameters(engine: EngineConfig, layers: tuple[tuple[Parameter, ...], ...]) -> list[set[int]]:
    """Return for each layer the indices of the parameters that live in host RAM.

    UVA takes them in order until the budget is met. Prefetch takes the last N of every G layers. vLLM 0.24 to
    0.27 accept `--cpu-offload-gb` and the prefetch options for Llama models and do nothing (seen with
    0.26.0).
    """
    taken: list[set[int]] = [set() for _ in layers]
    if engine.offload == "none" or ignores_offload(engine):
        return taken
    if engine.offload == "uva":
        total = 0
        for which, layer in zip(taken, layers, strict=True):
            for i, p in enumerate(layer):
                if total >= engine.uva_bytes:
                    return taken
                if _wanted(p.name, engine.offload_params):
                    which.add(i)
                    total += p.loaded
        return taken
    for n, (which, layer) in enumerate(zip(taken, layers, strict=True)):
        if n % engine.group_size >= engine.group_size - engine.num_in_group:
            which.update(i for i, p in enumerate(layer) if _wanted(p.name, engine.offload_params))
    return taken


def streamed_layers(engine: EngineConfig, card: ModelCard) -> int:
    """Count the decoder layers that the prefetch back end copies to the card for every step; 0 with another
    back end.
    """
    if engine.offload != "prefetch" or ignores_offload(engine):
        return 0
    return sum(n % engine.group_size >= engine.group_size - engine.num_in_group for n in range(card.layers))


def ignores_offload(engine: EngineConfig) -> bool:
    """Tell whether this version's default model runner silently drops weight offload."""
    return (0, 24, 0) <= engine.vllm < (0, 28, 0)


def _wanted(name: str, segments: tuple[str, ...]) -> bool:
    return not segments or any(f".{s}." in f".{name}." for s in segments)


def largest_linear(card: ModelCard, engine: EngineConfig) -> int:
    """Count the weights of the largest parameter that the loader repacks at once on one card.

    Gate and up projection are one.
    """
    found: dict[str, int] = {}
    for g in (g for g in card.groups if g.quantized):
        out, inp = _cut(g, card, engine.tp)
        name = _MERGED.get(g.name, g.name)
        found[name] = found.get(name, 0) + out * inp * (g.count // card.layers)
    return max(found.values(), default=0)
