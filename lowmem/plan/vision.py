"""Counts the memory of a vision tower's largest batch, and of the cache of what it made, in bytes.

Source: vLLM 0.32.0, multimodal/encoder_budget.py and v1/core/encoder_cache_manager.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.data import load_yaml
from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.kv_specs import checked
from lowmem.schema import ModelCard

_CHANNELS = 3
_GEMMA_TOKENS = 256
"""Tokens of an image of Gemma 3, if config.json does not say it (its config class)."""


@dataclass(frozen=True)
class VisionMemory:
    """Bytes of the tower's temporary tensors at its largest batch, and of the full cache of its outputs."""

    activations: int = 0
    cache: int = 0


def vision_memory(card: ModelCard, engine: EngineConfig) -> VisionMemory:
    """Count what images may take on one card; nothing for a model without a known tower.

    The engine encodes as many of the largest items at once as its budget of tokens holds, at least one, and
    keeps the outputs of as many tokens. Raises BadInput for a damaged vision_config.
    """
    item = load_yaml("vision.yml").get(card.model_type)
    tower = card.config.get("vision_config")
    if item is None or not isinstance(tower, Mapping):
        return VisionMemory()
    tokens, patches = _largest(item, card.config, tower)
    budget = max(engine.max_num_batched_tokens, tokens)
    most = engine.max_num_seqs * max(1, engine.max_model_len // tokens)
    items = max(1, min(budget // tokens, most))
    size = DTYPE_BYTES[engine.dtype]
    deep = tower.get("deepstack_visual_indexes")
    output = card.hidden_size * (1 + (len(deep) if isinstance(deep, list) else 0)) * size
    return VisionMemory(
        activations=items * (patches * _numbers(item, tower, engine.tp) * size + tokens * output),
        cache=budget * output,
    )


def _largest(item: Mapping[str, Any], config: Mapping[str, Any], tower: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens and the patches of the largest item."""
    if not item.get("fixed"):
        return int(item["tokens"]), int(item["tokens"]) * int(item["patches"])
    side = _whole(tower, "image_size") // _whole(tower, "patch_size")
    patches = max(1, side * side)
    said = config.get("mm_tokens_per_image", _GEMMA_TOKENS if config.get("model_type") == "gemma3" else None)
    return patches if said is None else checked("mm_tokens_per_image", said), patches


def _numbers(item: Mapping[str, Any], tower: Mapping[str, Any], tp: int) -> int:
    """Return the numbers that one patch has in temporary tensors at once.

    They are its pixels, the hidden and the residual state, and the wider of attention and MLP.
    """
    hidden = _whole(tower, "embed_dim" if "embed_dim" in tower else "hidden_size")
    if "intermediate_size" in tower:
        inner = _whole(tower, "intermediate_size")
    else:
        inner = hidden * _whole(tower, "mlp_ratio", 4)
    pixels = _CHANNELS * _whole(tower, "temporal_patch_size", 1) * _whole(tower, "patch_size", 14) ** 2
    wide = max(4 * hidden, (3 if item.get("gated") else 2) * inner)
    return pixels + 2 * hidden + wide // tp


def _whole(tower: Mapping[str, Any], name: str, default: int | None = None) -> int:
    return checked(f"vision_config.{name}", tower.get(name, default), 1, 10**6)
