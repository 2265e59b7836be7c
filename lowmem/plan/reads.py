"""Says what one step reads of the weights and multiplies with, on one card."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.weights import Weights, inventory_of_card, is_expert, resident_buffers
from lowmem.schema import ModelCard, WeightGroup


def expert_share(card: ModelCard, tokens: float) -> float:
    """Return the share of the routed experts that a step of `tokens` tokens reads.

    The tokens are routed evenly and independently, so that a step reads the distinct experts that they hit.
    """
    if not card.experts:
        return 1.0
    return float(1 - (1 - min(1.0, card.experts_per_token / card.experts)) ** tokens)


def active_parameters(card: ModelCard) -> int:
    """Count the parameters that one token of text multiplies with.

    They are those of its experts and of all else, without a look-up in the embedding and without a vision
    tower.
    """
    return sum(map(sum, _multiplied(card)))


def _multiplied(card: ModelCard) -> list[tuple[int, int]]:
    """Return for each group the parameters of one token: those outside of routed experts, and inside."""
    found = []
    for g in card.groups:
        if g.kind == "vision" or (g.kind == "embedding" and not _is_head(g, card)):
            continue
        if is_expert(g.name) and card.experts:
            found.append((0, g.parameters * card.experts_per_token // card.experts))
        else:
            found.append((g.parameters, 0))
    return found


@dataclass(frozen=True)
class StepWeights:
    """Weights of one card by the kernel that reads them, in bytes, and parameters that a token uses.

    `plain` is read by the kernels of 16-bit layers, `quantized` by those of quantized ones, and `experts` are
    all routed experts, of which a step reads a share.
    """

    plain: int
    quantized: int
    experts: int
    offloaded: int  # of these, in host RAM
    dense_parameters: int  # of the whole model, not of one card
    expert_parameters: int

    def read(self, share: float) -> int:
        """Return the bytes that a step reads from the card with this share of the experts."""
        return max(0, self.plain + self.quantized + math.ceil(self.experts * share) - self.offloaded)


def step_weights(card: ModelCard, engine: EngineConfig, weights: Weights) -> StepWeights:
    """Sort the weights of one card by the kernel that reads them.

    The embedding is looked up by rows, and a vision tower runs only for the prompts that have images.
    """
    experts = weights.expert_bytes
    read = weights.sharded + weights.replicated - resident_buffers(card, engine)
    looked_up = (g for g in card.groups if g.kind == "embedding" and not _is_head(g, card))
    read -= _vision_bytes(card, engine) + sum(_bytes(g, engine) for g in looked_up)
    plain = sum(_bytes(g, engine) for g in card.groups if _is_plain(g, card))
    plain = min(plain, max(0, read - experts))
    parameters = _multiplied(card)
    return StepWeights(
        plain=plain,
        quantized=max(0, read - experts - plain),
        experts=experts,
        offloaded=weights.offloaded,
        dense_parameters=sum(dense for dense, _ in parameters),
        expert_parameters=sum(routed for _, routed in parameters),
    )


def _is_plain(g: WeightGroup, card: ModelCard) -> bool:
    """Tell whether a group is read by the kernels of 16-bit layers."""
    if g.quantized or is_expert(g.name) or g.kind == "vision":
        return False
    return g.kind != "embedding" or _is_head(g, card)


def _is_head(g: WeightGroup, card: ModelCard) -> bool:
    """Tell whether an embedding also makes the logits; one by layers is of another width."""
    return card.tied and g.in_features == card.hidden_size


def _bytes(g: WeightGroup, engine: EngineConfig) -> int:
    """Return the bytes of an unquantized group on one card."""
    return g.parameters * DTYPE_BYTES[engine.dtype] // (1 if g.split == "none" else engine.tp)


def _vision_bytes(card: ModelCard, engine: EngineConfig) -> int:
    if not card.counted:
        return 0
    inventory = inventory_of_card(card, engine)
    return inventory.bytes_by_use.get("vision", 0) if inventory else 0
