"""Latency floors (bytes over bandwidth, operations over rate) and the calibrated expectation, in
milliseconds. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.calibration import constant
from lowmem.plan.engine_config import Engine
from lowmem.plan.memory import CardMemory, kv_bytes_per_token, usable_kv_tokens
from lowmem.plan.stages import Part, hop_bytes_per_token
from lowmem.plan.weights import streamed_layers
from lowmem.schema import Device, Latency, Limits, Link, Load, ModelCard
from lowmem.units import GB


def _active_parameters(card: ModelCard) -> int:
    """Parameters that one token multiplies with: a mixture of experts uses only some of them; the embedding
    is a look-up.
    """
    total = 0
    for g in card.groups:
        if g.kind == "embedding" and not card.tied:
            continue
        share = card.experts_per_token / card.experts if card.experts and ".experts." in g.name else 1.0
        total += int(g.parameters * share)
    return total


def _expert_share(card: ModelCard, tokens: float) -> float:
    """Part of the experts' weights that a step of `tokens` tokens reads, routed evenly and independently."""
    if not card.experts:
        return 1.0
    return float(1 - (1 - card.experts_per_token / card.experts) ** tokens)


def _embedding_bytes(card: ModelCard, engine: Engine) -> int:
    return sum(g.parameters * 2 // engine.tp for g in card.groups if g.kind == "embedding" and not card.tied)


def _efficiency(which: str, kernel: str, device: Device) -> float:
    """Of this kernel on this card or on cards of this compute capability where that was measured, else of the
    kernel.
    """
    table = constant("latency", which)
    return float(
        next(
            table[key]
            for key in (f"{kernel}@{device.name}", f"{kernel}@{device.capability}", kernel)
            if key in table
        )
    )


@dataclass(frozen=True)
class Hops:
    """A step's way from stage to stage, in ms: physics, and what is expected.

    `out`: what a stage waits for before its next step may begin.
    """

    floor: float
    expected: float
    out: float


def hops(card: ModelCard, engine: Engine, device: Device, link: Link | None, tokens: float) -> Hops:
    """Hand-overs of a step of so many tokens, and the way of the sampled tokens back to the first stage.

    A boundary inside a host is a copy from card to card. 0.32.0, gpu_worker.py: a stage's next step waits
    until the one before is sent.
    """
    if engine.pp == 1:
        return Hops(0.0, 0.0, 0.0)
    size = tokens * hop_bytes_per_token(card, engine)
    inside = (engine.pp - engine.hosts) * size / (device.peer_gb_per_s * GB / 1e3)
    beside: dict[str, float] = constant("latency", "hop_ms")
    if link is None:
        return Hops(inside, inside + engine.pp * beside["host"], inside / (engine.pp - 1))
    kind = "rdma" if link.rdma else "tcp"
    wire, one_way = size / (link.gb_per_s * GB / 1e3), link.round_trip_us / 2e3
    own, seen = beside[kind], wire / float(constant("latency", "network_efficiency")[kind])
    between = engine.hosts - 1
    return Hops(
        floor=inside + between * (wire + one_way) + one_way,
        expected=inside
        + (engine.pp - engine.hosts) * beside["host"]
        + between * (seen + one_way + own)
        + one_way
        + own,
        out=seen,
    )


def latency(
    card: ModelCard,
    engine: Engine,
    device: Device,
    stages: Sequence[tuple[Part, CardMemory]],
    load: Load,
    link: Link | None = None,
) -> Latency:
    """Decode time of one token at the load's concurrency, prefill time of one prompt (time to the first token
    of a lone request).

    With pipeline stages a token passes all of them, one after the other, and a request's next token waits for
    its last: a pipeline makes room, not speed. The engine takes a request again only every `pp` steps, and
    does not split those that decode evenly between the steps in flight (0.32.0, async_scheduler.py); the
    expectation has all of them in one, the floor the better of that and an even split.
    """
    name = engine.kernel
    hbm, host_link = device.hbm_gb_per_s * GB / 1e3, device.link_gb_per_s * GB / 1e3  # bytes per ms
    flops = device.fp16_tflops * 1e12 / 1e3 * engine.tp
    held = usable_kv_tokens(stages[0][1].kv_tokens, engine) // (load.input_tokens + load.output_tokens)
    together = min(load.clients, engine.max_num_seqs, held or load.clients)
    context = load.input_tokens + load.output_tokens // 2
    cuda, new = device.kind == "cuda", engine.vllm >= (0, 28, 0)
    fixed = float(constant("latency", "step_ms"))

    def work(stage: tuple[Part, CardMemory], tokens: float, sequences: float) -> dict[str, float]:
        """The floors of a step of so many tokens on one stage."""
        mine, weights = stage[0].card, stage[1].weights
        expert_bytes = sum(
            p.loaded for layer in weights.layers for p in layer if p.name.startswith("experts.")
        )
        idle = int(expert_bytes * (1 - _expert_share(card, tokens)))
        # What a step reads: weights as loaded, less the embedding, of which only the looked-up rows are read.
        read = weights.sharded + weights.replicated - weights.offloaded - _embedding_bytes(mine, engine)
        return {
            "hbm_weights": max(0, read - idle) / hbm,
            "hbm_kv": kv_bytes_per_token(mine, engine) * context * sequences / hbm,
            "link_offload": weights.offloaded / host_link,
            "flops": 2 * _active_parameters(mine) * tokens / flops,
        }

    def floor(stage: tuple[Part, CardMemory], tokens: float, sequences: float) -> float:
        t = work(stage, tokens, sequences)
        return max(t["hbm_weights"] + t["hbm_kv"], t["link_offload"], t["flops"])

    def all_reduces(stage: tuple[Part, CardMemory], tokens: int) -> float:
        if engine.tp == 1:
            return 0.0
        wire = tokens * card.hidden_size * DTYPE_BYTES[engine.dtype] / (device.peer_gb_per_s * GB / 1e3)
        own = "graph" if engine.custom_all_reduce else "graph_by_nccl"
        over = (
            "eager"
            if engine.eager and not new
            else own
            if device.peer_gb_per_s > device.link_gb_per_s
            else "graph_over_pcie"
        )
        return 2 * stage[0].card.layers * (float(constant("latency", "all_reduce_ms")[over]) + wire)

    def launches(stage: tuple[Part, CardMemory]) -> float:
        each = float(constant("latency", "eager_ms_per_layer" if new else "eager_old_ms_per_layer"))
        return stage[0].card.layers * each if engine.eager and cuda else 0.0

    def beside(layers: int, tokens: int) -> float:
        """What layers take beside their matrix products: keys and values of few bits are packed and unpacked
        by kernels of their own.
        """
        if not cuda:
            return 0.0
        few_bits = float(constant("latency", "kv_ms_per_layer").get(engine.kv_dtype, 0.0))
        few_bits += (
            tokens * float(constant("latency", "kv_us_per_layer_token").get(engine.kv_dtype, 0.0)) / 1e3
        )
        return layers * (float(constant("latency", "graph_ms_per_layer")) + few_bits)

    def attention(stage: tuple[Part, CardMemory], tokens: int) -> float:
        """Products of a prompt's tokens with keys and values, each token's with half of the prompt on
        average; no weights are in them.
        """
        if not cuda:
            return 0.0
        operations = 4 * card.heads * card.head_dim * tokens * (load.input_tokens / 2) * stage[0].card.layers
        return operations / flops / _efficiency("attention_efficiency", "any", device)

    def expected(stage: tuple[Part, CardMemory], tokens: int) -> float:
        """One stage's share of a step of so many tokens with the efficiencies seen; more than decode together
        are tokens of a prompt.
        """
        layers = stage[0].card.layers
        t = work(stage, tokens, together)
        prompt = max(0, tokens - together)
        rows = max(tokens, int(constant("latency", "least_prompt_rows").get(name, 0))) if prompt else tokens
        gpu = (
            beside(layers, tokens)
            + attention(stage, prompt)
            + max(
                t["hbm_weights"] / _efficiency("hbm_efficiency", name, device) + t["hbm_kv"],
                t["flops"] * rows / tokens / _efficiency("flop_efficiency", name, device),
            )
        )
        if engine.offload == "prefetch":  # copies run beside the computing of the layers that are copied
            # Of the layers in a row that stay on the card, only the first finds a copy to run beside it.
            staying = 1 - streamed_layers(engine, stage[0].card) / layers
            body = max(
                gpu, t["link_offload"] / constant("latency", "link_efficiency")["prefetch"] + gpu * staying
            )
        else:  # UVA reads happen inside the kernels, again for every tile of rows
            tiles = math.ceil(tokens / constant("latency", "uva_tile_tokens").get(name, 256))
            body = gpu + tiles * t["link_offload"] / constant("latency", "link_efficiency")["uva"]
        return float(max(body, launches(stage)) + all_reduces(stage, tokens))

    def through(tokens: int) -> float:
        """From the start of a step to its sampled tokens being back."""
        return (
            sum(expected(s, tokens) for s in stages)
            + hops(card, engine, device, link, tokens).expected
            + fixed
        )

    def slot(tokens: int) -> float:
        """From one step to the next where the pipeline is full; of a single stage the step itself."""
        return max(expected(s, tokens) for s in stages) + hops(card, engine, device, link, tokens).out + fixed

    chunk = min(engine.max_num_batched_tokens, load.input_tokens)
    chunks = math.ceil(load.input_tokens / engine.max_num_batched_tokens)
    mixed_tokens = min(chunk + together, engine.max_num_batched_tokens)
    steady, mixed = slot(together), slot(mixed_tokens)
    # While a request decodes, each other client's prompt passes once: those steps take as long as a chunk.
    interference = (
        constant("latency", "interference_share")
        * (together - 1)
        * chunks
        * max(0.0, mixed - steady)
        / load.output_tokens
    )
    decode, prefill = through(together) + interference, (chunks - 1) * mixed + through(mixed_tokens)
    queue = math.ceil(load.clients / together) - 1  # rounds that the last client waits for others to end
    step = [work(s, together, together) for s in stages]
    terms = {
        **{key: sum(t[key] for t in step) for key in step[0]},
        "all_reduce": sum(all_reduces(s, together) for s in stages),
        "launches": sum(launches(s) for s in stages),
        "step": fixed,
        "prefill_interference": interference,
        "steady_step": through(together),
        "chunk_step": mixed,
        "ttft_all_at_once": (
            (chunks * together - 1) * mixed + through(mixed_tokens) + queue * decode * load.output_tokens
        ),
    }
    if engine.pp > 1:
        terms |= {"network": hops(card, engine, device, link, together).expected, "slot_step": steady}

    def decode_floor(batches: int) -> float:
        """With those that decode dealt evenly to so many steps in flight."""
        share = together / batches
        each = [floor(s, share, share) for s in stages]
        return max(sum(each) + hops(card, engine, device, link, share).floor, batches * max(each))

    def prefill_floor(stage: tuple[Part, CardMemory]) -> float:
        t = work(stage, chunk, together)
        return max(
            2 * _active_parameters(stage[0].card) * load.input_tokens / flops,
            chunks * t["hbm_weights"],
            chunks * t["link_offload"],
        )

    return Latency(
        decode_floor=round(min(decode_floor(n) for n in range(1, min(engine.pp, together) + 1)), 4),
        decode_expected=round(decode, 4),
        prefill_floor=round(
            max(prefill_floor(s) for s in stages) + hops(card, engine, device, link, 1).floor, 4
        ),
        prefill_expected=round(prefill, 4),
        terms={k: round(v, 4) for k, v in terms.items()},
    )


def idle_share(
    card: ModelCard,
    engine: Engine,
    device: Device,
    stages: Sequence[tuple[Part, CardMemory]],
    load: Load,
    link: Link | None,
) -> float:
    """Part of a decode step's time in which a card waits for the other stages and the network, all clients of
    the load in one batch.
    """
    terms = latency(card, engine, device, stages, load, link).terms
    return 1 - (terms["steady_step"] - terms["network"] - terms["step"]) / engine.pp / terms["steady_step"]


def link_needs(
    card: ModelCard,
    engine: Engine,
    device: Device,
    stages: Sequence[tuple[Part, CardMemory]],
    load: Load,
    limits: Limits,
    link: Link,
) -> tuple[float | None, float | None]:
    """The least bandwidth in GB/s at this round trip, and the longest round trip in us at this bandwidth,
    that meet both latency limits.

    None where no value does. To three digits, on the side that meets them.
    """

    def meets(changed: Link) -> bool:
        found = latency(card, engine, device, stages, load, changed)
        return (
            found.decode_expected <= limits.tpot_p99_ms
            and found.terms["ttft_all_at_once"] <= limits.ttft_p99_ms
        )

    def edge(field: str, good: float, bad: float) -> float | None:
        if not meets(link.model_copy(update={field: good})):
            return None
        upwards = good > bad
        while abs(good / bad - 1) > 5e-4:  # by ratio: either may span six orders of magnitude
            middle = math.sqrt(good * bad)
            good, bad = (middle, bad) if meets(link.model_copy(update={field: middle})) else (good, middle)
        digit = 10.0 ** (math.floor(math.log10(good)) - 2)
        return float(f"{(math.ceil if upwards else math.floor)(good / digit) * digit:.3g}")

    return edge("gb_per_s", 1e4, 1e-5), edge("round_trip_us", 1e-3, 1e9)
