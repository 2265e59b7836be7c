"""Derives the server's admission limits from the engine's settings and the memory limit."""

from __future__ import annotations

import math

from lowmem.plan.calibration import constant
from lowmem.plan.engine_config import EngineConfig
from lowmem.schema import AdmissionLimits, Load
from lowmem.units import MIB

LOGPROB_BYTES = 192
"""Bytes of one log probability in the server: an object, a rank and a share of a dictionary."""


VALUES_BESIDE = 2**16
"""JSON values of a body beside its token ids."""


TOKEN_BYTES = 8
"""Bytes of one token of the load in a body, as an id with its comma or as text."""


def admission_of(
    engine: EngineConfig, load: Load, limit_bytes: int, media_domains: tuple[str, ...] = ()
) -> AdmissionLimits:
    """Return the limits of work for an engine, whose open requests may take a share of the memory limit.

    A quarter of the engine's places is kept for other keys, so a request may take three quarters. One key can
    always send the whole load.
    """
    budget = math.floor(limit_bytes * _of("share_of_limit"))
    kept = max(1, engine.max_num_seqs // 4) if engine.max_num_seqs > 1 else 0
    together = engine.max_num_seqs - kept
    request_tokens = min(together, round(_of("request_prompts"))) * engine.max_model_len
    prompt_bytes = round(_of("prompt_bytes_per_token")) * engine.max_model_len
    parsed, held = round(_of("parsed_bytes_per_byte")), round(_of("held_bytes_per_byte"))
    # a quarter of the budget each: one body while it is parsed, open bodies, log probabilities, grammars
    share = budget // 4
    body = min(
        round(_of("envelope_bytes")) + request_tokens * prompt_bytes // engine.max_model_len, share // parsed
    )
    body = max(1, body)
    whole_load = load.clients * (load.input_tokens * TOKEN_BYTES + 1024)
    open_bytes = max(body, 2 * whole_load, min(64 * body, share // held))
    values = max(1, min(20 * request_tokens, share // (LOGPROB_BYTES * engine.max_num_seqs)))
    cache = max(1, min(64, share // MIB)) * MIB
    repeats = round(_of("grammar_repeats"))
    items, grammar_bytes = round(_of("grammar_items")), round(_of("grammar_bytes"))
    return AdmissionLimits(
        places=engine.max_num_seqs,
        kept_places=kept,
        prompt_at_once=engine.max_num_batched_tokens,
        json_values=request_tokens + VALUES_BESIDE,
        max_model_len=engine.max_model_len,
        body_bytes=body,
        held_bytes=open_bytes,
        open_requests=max(64, 16 * engine.max_num_seqs, 2 * load.clients),
        sequences=together,
        request_tokens=request_tokens,
        prompt_bytes=prompt_bytes,
        grammar_items=items,
        grammar_bytes=grammar_bytes,
        grammar_repeats=repeats,
        grammar_at_once=2 * (items + grammar_bytes // 64 + 2 * repeats),  # two of the greatest
        grammar_cache_bytes=cache,
        logprob_values=values,
        media_domains=media_domains,
        memory_bytes=body * parsed + open_bytes * held + values * LOGPROB_BYTES * engine.max_num_seqs + cache,
    )


def _of(name: str) -> float:
    return float(constant("admission", name))
