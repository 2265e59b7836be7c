"""Latency floors (bytes over bandwidth, operations over rate) and the calibrated expectation, in milliseconds. Pure functions."""

from __future__ import annotations

import math

from lowmem.knobs import Engine
from lowmem.memory import CardMemory, constant, kv_bytes_per_token
from lowmem.schema import Device, Latency, Load, ModelCard
from lowmem.units import GB


def kernel(card: ModelCard, engine: Engine, device: Device) -> str:
    """Name of the linear kernel that the efficiencies are kept under."""
    if device.kind == "cpu":
        return "cpu"
    q = card.quantization
    if q.method == "none" or q.method == "fp8":
        return "native16"
    if q.bits in (2, 3):
        return "humming"
    return "marlin" if engine.marlin else "machete"


def _active_parameters(card: ModelCard) -> int:
    """Parameters that one token multiplies with: a mixture of experts uses only some of them; the embedding is a look-up."""
    total = 0
    for g in card.groups:
        if g.kind == "embedding" and not card.tied:
            continue
        share = card.experts_per_token / card.experts if card.experts and ".experts." in g.name else 1.0
        total += int(g.parameters * share)
    return total


def _expert_share(card: ModelCard, tokens: int) -> float:
    """Part of the experts' weights that a step of `tokens` tokens reads, routed evenly and independently."""
    if not card.experts:
        return 1.0
    return float(1 - (1 - card.experts_per_token / card.experts) ** tokens)


def _embedding_bytes(card: ModelCard, engine: Engine) -> int:
    return sum(g.parameters * 2 // engine.tp for g in card.groups if g.kind == "embedding" and not card.tied)


def latency(card: ModelCard, engine: Engine, device: Device, memory: CardMemory, load: Load) -> Latency:
    """Decode time of one token at the load's concurrency, prefill time of one prompt (time to the first token of a lone request)."""
    name = kernel(card, engine, device)
    hbm, link = device.hbm_gb_per_s * GB / 1e3, device.link_gb_per_s * GB / 1e3  # bytes per ms
    flops = device.fp16_tflops * 1e12 / 1e3 * engine.tp
    together = min(load.clients, engine.max_num_seqs)
    context = min(engine.max_model_len, load.input_tokens + load.output_tokens // 2)

    expert_bytes = sum(p.loaded for layer in memory.weights.layers for p in layer if p.name.startswith("experts."))
    streamed = memory.weights.offloaded
    # What a step reads: weights as loaded (kernel form), less the embedding, of which only the looked-up rows are read.
    read = memory.weights.sharded + memory.weights.replicated - streamed - _embedding_bytes(card, engine)
    kv = kv_bytes_per_token(card, engine) * context * together
    active = _active_parameters(card)

    def work(tokens: int) -> dict[str, float]:
        unused = int(expert_bytes * (1 - _expert_share(card, tokens)))
        return {
            "hbm_weights": max(0, read - unused) / hbm,
            "hbm_kv": kv / hbm,
            "link_offload": streamed / link,
            "flops": 2 * active * tokens / flops,
        }

    step = work(together)
    decode_floor = max(step["hbm_weights"] + step["hbm_kv"], step["link_offload"], step["flops"])

    chunk = min(engine.max_num_batched_tokens, load.input_tokens)
    chunks = math.ceil(load.input_tokens / engine.max_num_batched_tokens)
    big = work(chunk)
    prefill_floor = max(2 * active * load.input_tokens / flops, chunks * (big["hbm_weights"]), chunks * big["link_offload"])

    hbm_eff = float(constant("latency", "hbm_efficiency")[name])
    flop_eff = float(constant("latency", "flop_efficiency")[name])
    link_eff = float(constant("latency", "link_efficiency")["prefetch" if engine.offload == "prefetch" else "uva"])
    mode = "eager" if engine.eager else "graph"
    reduces = 2 * card.layers * float(constant("latency", "all_reduce_ms")[mode]) if engine.tp > 1 else 0.0
    reduces += 2 * card.layers * together * card.hidden_size * 2 / (device.peer_gb_per_s * GB / 1e3) if engine.tp > 1 else 0.0
    launches = card.layers * float(constant("latency", "eager_ms_per_layer")) if engine.eager and device.kind == "cuda" else 0.0
    fixed = float(constant("latency", "step_ms"))

    def expected(t: dict[str, float], tokens: int) -> float:
        wire = 2 * card.layers * tokens * card.hidden_size * 2 / (device.peer_gb_per_s * GB / 1e3) if engine.tp > 1 else 0.0
        gpu = max(t["hbm_weights"] / hbm_eff + t["hbm_kv"], t["flops"] / flop_eff)
        # Offloaded layers wait for the link; UVA reads do not overlap with other layers' work, prefetch hides the shorter of the two.
        streams = t["link_offload"] / link_eff
        body = max(gpu, streams) if engine.offload == "prefetch" else gpu + streams
        comm = 2 * card.layers * float(constant("latency", "all_reduce_ms")[mode]) + wire if engine.tp > 1 else 0.0
        if engine.eager and device.kind == "cuda":
            return max(body, launches) + comm + fixed
        return body + comm + fixed

    steady = expected(step, together)
    mixed = expected(big, chunk + together)
    # While a request decodes, each other client's prompt passes once: those steps take as long as a chunk.
    extra = (together - 1) * chunks * max(0.0, mixed - steady) / load.output_tokens
    waiting = max(0, load.clients - engine.max_num_seqs)
    prefill = chunks * mixed
    terms = {**{k: round(v, 4) for k, v in step.items()}, "all_reduce": round(reduces, 4), "launches": round(launches, 4), "step": fixed,
             "prefill_interference": round(extra, 4), "steady_step": round(steady, 4), "chunk_step": round(mixed, 4),
             "ttft_all_at_once": round(prefill * together + (waiting and (steady + extra) * load.output_tokens), 4)}  # fmt: skip
    return Latency(
        decode_floor=round(decode_floor, 4),
        decode_expected=round(steady + extra, 4),
        prefill_floor=round(prefill_floor, 4),
        prefill_expected=round(prefill, 4),
        terms=terms,
    )
