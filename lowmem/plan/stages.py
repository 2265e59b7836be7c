"""Cuts a model into pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.calibration import _mib
from lowmem.plan.engine_config import EngineConfig
from lowmem.schema import ModelCard


@dataclass(frozen=True)
class Part:
    """Share of the model that one pipeline stage holds, as a model card of its own."""

    card: ModelCard
    first_layer: int
    node: int
    first: bool
    last: bool


def parts(card: ModelCard, engine: EngineConfig) -> tuple[Part, ...]:
    """Cut the model into its stages, in order; a single stage is the model itself.

    The embedding is on the first stage, and also on the last if lm_head is the same tensor. Norm and lm_head
    are on the last (0.32.0, models/llama.py). Ranks count through a stage's cards first (parallel_state.py),
    and each host takes the same number in a row.
    """
    if engine.pp == 1:
        return (Part(card, 0, 0, first=True, last=True),)
    cut, start = [], 0
    for n, layers in enumerate(engine.partition):
        first, last = n == 0, n == engine.pp - 1
        groups = tuple(
            g.model_copy(update={"count": g.count * layers // card.layers}) if g.layered else g
            for g in card.groups
            if g.layered or (first if g.kind == "embedding" and not (card.tied and last) else last)
        )
        # On the first stage of several a tied embedding is a look-up like any other.
        mine = card.model_copy(
            update={"layers": layers, "groups": groups, "header_bytes": None, "tied": card.tied and last}
        )
        cut.append(Part(mine, start, n * engine.hosts // engine.pp, first, last))
        start += layers
    return tuple(cut)


def hop_bytes_per_token(card: ModelCard, engine: EngineConfig) -> int:
    """Return the bytes of one token that each stage hands to the next.

    They are hidden states and residual (0.32.0, models/llama.py).
    """
    return 2 * card.hidden_size * DTYPE_BYTES[engine.dtype]


def pipeline_buffers(part: Part, engine: EngineConfig) -> int:
    """Return the bytes of a card's pipeline buffers.

    A stage holds its input twice: once for the captured graphs and once as it arrives. Its output stays until
    it is sent. The last stage also computes logits and samples.
    """
    if engine.pp == 1:
        return 0
    largest = engine.max_num_batched_tokens * hop_bytes_per_token(part.card, engine)
    return (0 if part.first else 2 * largest) + (_mib("last_stage_mib") if part.last else largest)
