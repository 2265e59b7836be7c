"""Latency floors (bytes over bandwidth, operations over rate) and the calibrated expectation, in milliseconds. Pure functions."""

from __future__ import annotations

import math

from lowmem.cards import DTYPE_BYTES
from lowmem.knobs import Engine
from lowmem.memory import CardMemory, constant, kv_bytes_per_token, streamed_layers
from lowmem.schema import Device, Latency, Load, ModelCard
from lowmem.units import GB


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


def _efficiency(which: str, kernel: str, device: Device) -> float:
    """Of this kernel on cards of this compute capability where that was measured, else of the kernel."""
    table = constant("latency", which)
    return float(table.get(f"{kernel}@{device.capability}", table[kernel]))


def latency(card: ModelCard, engine: Engine, device: Device, memory: CardMemory, load: Load) -> Latency:
    """Decode time of one token at the load's concurrency, prefill time of one prompt (time to the first token of a lone request)."""
    name = engine.kernel
    hbm, link = device.hbm_gb_per_s * GB / 1e3, device.link_gb_per_s * GB / 1e3  # bytes per ms
    flops = device.fp16_tflops * 1e12 / 1e3 * engine.tp
    held = memory.kv_tokens // (load.input_tokens + load.output_tokens)
    together = min(load.clients, engine.max_num_seqs, held or load.clients)
    context = load.input_tokens + load.output_tokens // 2

    expert_bytes = sum(p.loaded for layer in memory.weights.layers for p in layer if p.name.startswith("experts."))
    streamed = memory.weights.offloaded
    # What a step reads: weights as loaded, less the embedding, of which only the looked-up rows are read.
    read = memory.weights.sharded + memory.weights.replicated - streamed - _embedding_bytes(card, engine)
    active = _active_parameters(card)

    def work(tokens: int) -> dict[str, float]:
        """The floors of a step of so many tokens."""
        idle = int(expert_bytes * (1 - _expert_share(card, tokens)))
        return {
            "hbm_weights": max(0, read - idle) / hbm,
            "hbm_kv": kv_bytes_per_token(card, engine) * context * together / hbm,
            "link_offload": streamed / link,
            "flops": 2 * active * tokens / flops,
        }

    def all_reduces(tokens: int) -> float:
        if engine.tp == 1:
            return 0.0
        wire = tokens * card.hidden_size * DTYPE_BYTES[engine.dtype] / (device.peer_gb_per_s * GB / 1e3)
        over = "eager" if engine.eager else "graph" if device.peer_gb_per_s > device.link_gb_per_s else "graph_over_pcie"
        return 2 * card.layers * (float(constant("latency", "all_reduce_ms")[over]) + wire)

    cuda = device.kind == "cuda"
    launches = card.layers * float(constant("latency", "eager_ms_per_layer")) if engine.eager and cuda else 0.0
    fixed = float(constant("latency", "step_ms"))
    small = card.layers * float(constant("latency", "graph_ms_per_layer")) if cuda else 0.0  # what a layer takes beside its matrix products
    # Of the layers in a row that stay on the card, only the first finds a copy to run beside it.
    staying = 1 - streamed_layers(engine, card) / card.layers

    def expected(tokens: int) -> float:
        """A step of so many tokens with the efficiencies seen."""
        t = work(tokens)
        gpu = small + max(
            t["hbm_weights"] / _efficiency("hbm_efficiency", name, device) + t["hbm_kv"],
            t["flops"] / _efficiency("flop_efficiency", name, device),
        )
        if engine.offload == "prefetch":  # copies run beside the computing of the layers that are copied
            body = max(gpu, t["link_offload"] / constant("latency", "link_efficiency")["prefetch"] + gpu * staying)
        else:  # UVA reads happen inside the kernels, again for every tile of rows
            tiles = math.ceil(tokens / constant("latency", "uva_tile_tokens").get(name, 256))
            body = gpu + tiles * t["link_offload"] / constant("latency", "link_efficiency")["uva"]
        return float(max(body, launches) + all_reduces(tokens) + fixed)

    step = work(together)
    chunk = min(engine.max_num_batched_tokens, load.input_tokens)
    chunks = math.ceil(load.input_tokens / engine.max_num_batched_tokens)
    big = work(chunk)
    steady, mixed = expected(together), expected(min(chunk + together, engine.max_num_batched_tokens))
    # While a request decodes, each other client's prompt passes once: those steps take as long as a chunk.
    interference = constant("latency", "interference_share") * (together - 1) * chunks * max(0.0, mixed - steady) / load.output_tokens
    decode, prefill = steady + interference, chunks * mixed
    queue = math.ceil(load.clients / together) - 1  # rounds that the last client waits for others to end
    terms = {
        **step,
        "all_reduce": all_reduces(together),
        "launches": launches,
        "step": fixed,
        "prefill_interference": interference,
        "steady_step": steady,
        "chunk_step": mixed,
        "ttft_all_at_once": prefill * together + queue * decode * load.output_tokens,
    }
    return Latency(
        decode_floor=round(max(step["hbm_weights"] + step["hbm_kv"], step["link_offload"], step["flops"]), 4),
        decode_expected=round(decode, 4),
        prefill_floor=round(max(2 * active * load.input_tokens / flops, chunks * big["hbm_weights"], chunks * big["link_offload"]), 4),
        prefill_expected=round(prefill, 4),
        terms={k: round(v, 4) for k, v in terms.items()},
    )
