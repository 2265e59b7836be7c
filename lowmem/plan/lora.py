"""Counts the memory of LoRA adapters.

vLLM keeps `max_loras` places for adapters of `max_lora_rank` on each GPU, whether they are filled or not.
It keeps `max_cpu_loras` adapters in the RAM of each worker.
Source: vLLM 0.32.0, lora/layers/*.py (create_lora_weights) and lora/model_manager.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.errors import BadInput
from lowmem.schema import ModelCard, WeightGroup

_DTYPE_BYTES = 2  # lora_dtype is a 16-bit type; auto is the model's

MOST_VOCABULARY = 258_048
"""Largest vocabulary with adapters (lora/layers/logits_processor.py)."""

EMBEDDING_ADAPTERS = frozenset(
    {"apertus", "exaone", "exaone4", "exaone_moe", "falcon_h1", "granite", "granitemoe", "granitemoehybrid",
     "granitemoeshared", "jamba", "lfm2", "lfm2_moe", "llama", "minicpm", "mixtral", "nemotron", "nemotron_h",
     "nemotron-nas", "phimoe", "qwen3", "qwen3_5", "qwen3_moe", "solar"}
)  # fmt: skip
"""Model types whose embedding and head take adapters too (`embedding_modules` in model_executor/models)."""

_MERGED = {"qkv_proj": 3, "gate_up_proj": 2, "w13": 2}
"""Tensors that stand for several, each of which has a matrix A of its own."""


@dataclass(frozen=True)
class Lora:
    """Places for adapters: on each GPU, and in the RAM of each worker."""

    places: int
    cpu_places: int
    rank: int
    fully_sharded: bool


def lora_of(knobs: Mapping[str, Any]) -> Lora | None:
    """Read the knobs of LoRA; None without enable_lora. Raises BadInput for places that contradict."""
    if not knobs.get("enable_lora"):
        return None
    places = int(knobs.get("max_loras", 1))
    cpu = int(knobs.get("max_cpu_loras", places))
    if places < 1:
        raise BadInput(f"max_loras={places} is below its least value 1; raise it")
    if cpu < places:
        raise BadInput(f"max_cpu_loras={cpu} is less than max_loras={places}; raise it")
    rank = int(knobs.get("max_lora_rank", 16))
    return Lora(places, cpu, rank, bool(knobs.get("fully_sharded_loras")))


def refuse_lora(lora: Lora | None, card: ModelCard, tp: int) -> None:
    """Raise BadInput for adapters that vLLM cannot load for this model."""
    if lora is None:
        return
    if lora.fully_sharded and lora.rank % tp:
        raise BadInput(
            f"max_lora_rank={lora.rank} is not divided by tensor_parallel_size={tp}, and fully_sharded_loras"
            " splits it; use a multiple"
        )
    if card.model_type in EMBEDDING_ADAPTERS and card.vocab_size > MOST_VOCABULARY:
        raise BadInput(
            f"enable_lora: the vocabulary of {card.name} has {card.vocab_size:,} tokens, and vLLM's adapters"
            f" take at most {MOST_VOCABULARY:,}; leave enable_lora out"
        )


def _adapter(card: ModelCard, lora: Lora, tp: int) -> int:
    """Count the numbers of one adapter on one of `tp` GPUs."""
    numbers = 0
    for g in card.groups:
        if g.kind in ("linear", "router") and g.layered:  # encoders of pictures take no adapters
            numbers += g.count * _pair(g, card, lora, tp)
        elif g.kind == "embedding" and card.model_type in EMBEDDING_ADAPTERS:
            # of the input and of the logits, neither of which is split
            numbers += 2 * lora.rank * (card.vocab_size + card.hidden_size)
    return numbers


def _pair(g: WeightGroup, card: ModelCard, lora: Lora, tp: int) -> int:
    """Count the numbers of the matrices A and B beside one tensor."""
    shared = tp if lora.fully_sharded else 1
    if g.split == "row":  # A is split with the inputs
        return lora.rank * (g.in_features // tp + g.out_features // shared)
    if g.split == "none":
        return lora.rank * (g.in_features + g.out_features)
    outputs = g.out_features // tp if g.split == "column" else _kv_outputs(g.out_features, card, tp)
    return (
        lora.rank // shared * g.in_features * _MERGED.get(g.name.rsplit(".", 1)[-1], 1) + outputs * lora.rank
    )


def _kv_outputs(outputs: int, card: ModelCard, tp: int) -> int:
    """Return a GPU's outputs of a key or value projection, whose heads repeat beyond their number."""
    heads = max(1, card.kv_heads // tp)
    return heads * outputs // card.kv_heads


def places_bytes(card: ModelCard, lora: Lora | None, tp: int) -> int:
    """Return the bytes of the places for adapters on one GPU."""
    return 0 if lora is None else lora.places * _adapter(card, lora, tp) * _DTYPE_BYTES


def worker_bytes(card: ModelCard, lora: Lora | None) -> int:
    """Return the most bytes of adapters in the RAM of one worker, which keeps each of them whole."""
    return 0 if lora is None else lora.cpu_places * _adapter(card, lora, 1) * _DTYPE_BYTES
