"""Compares the model that was planned with the one that is fetched, by what decides bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config
from lowmem.schema import ModelCard, Quantization

FIGURES = ("model_type", "layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim",
           "vocab_size", "experts", "experts_per_token", "tied")  # fmt: skip
"""Fields of a model's card."""


def figures(card: ModelCard, quantization: Quantization) -> dict[str, Any]:
    """Return what a checkpoint must have to be the planned one, with the format of its weights."""
    return {name: getattr(card, name) for name in FIGURES} | {"weights": _format(quantization)}


def difference(planned: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Say how a checkpoint differs from the planned figures; empty if it does not.

    `found` holds `config` and perhaps `hf_quant_config`, the JSON files of the checkpoint.
    """
    try:
        card = card_from_config(
            found["config"], "model", "config.json", hf_quant_config=found.get("hf_quant_config")
        )
    except BadInput as error:
        return str(error)
    there = figures(card, card.quantization)
    differing = [name for name in there if name in planned and there[name] != planned[name]]
    said = (f"{name} {_word(there[name])} (planned: {_word(planned[name])})" for name in differing)
    return ", ".join(said)


def _format(quantization: Quantization) -> str:
    if quantization.method == "none":
        return "not quantized"
    group = "a scale a channel" if quantization.group_size == -1 else f"groups of {quantization.group_size}"
    return f"{quantization.method} {quantization.bits}-bit, {group}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
