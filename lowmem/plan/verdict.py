"""Says whether a plan fits, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lowmem.inputs import options
from lowmem.plan.calibration import constant
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.memory import CardMemory, loading, start_peak, start_room
from lowmem.plan.stages import Part
from lowmem.plan.weights import ignores_offload
from lowmem.schema import Device, Latency, Limits, Load, ModelCard, Pipeline, SpeculationPlan
from lowmem.units import MIB, gib, mib


def ceiling(device: Device, limits: Limits) -> int:
    """Return the bytes that the plan may use.

    They are the limit, or what the driver hands out if that is less. The driver keeps some of memory.total
    for itself.
    """
    return min(limits.memory_bytes, device.torch_total_mib * MIB)


def replica_notes(engine: EngineConfig, card: ModelCard) -> list[str]:
    """Say what data_parallel_size means for the figures of the plan."""
    if engine.dp == 1:
        return []
    notes = [
        f"data_parallel_size={engine.dp}: the memory is that of a card of each replica, and a replica serves"
        f" its share of the load"
    ]
    if card.experts:
        notes.append(
            "data_parallel_size with experts: vLLM spreads them over the cards of all replicas, so memory is"
            " at most as planned, and the exchange between replicas is not in the latency; measure it"
        )
    return notes


def option_notes(knobs: Iterable[str]) -> list[str]:
    """Name the options that the plan does not count, and what of the plan they may make wrong."""
    found: dict[str, list[str]] = {}
    for name in knobs:
        if name in options.options() and (of := options.standing(name)).kind == "unmodelled":
            found.setdefault(of.text, []).append(name)
    error = float(constant("memory", "model_error"))
    held = f"the plan's error of {error:.0%} no longer holds"
    widened = {
        "time": f"memory is as planned; for latency {held}",
        "memory": f"latency is as planned; for memory {held}",
        "memory and time": f"for memory and latency {held}",
    }
    return [
        f"not counted, passed on as given: {', '.join(names)}; {widened[what]}: measure it"
        for what, names in found.items()
    ]


def stage_reasons(
    engine: EngineConfig, device: Device, stages: Sequence[tuple[Part, CardMemory]], limits: Limits
) -> list[str]:
    """List the `memory_reasons` of every stage, with its number if there are several.

    A reason that holds on several stages is given once.
    """
    reasons: dict[str, str] = {}
    least = min(range(len(stages)), key=lambda n: _blocks_available(stages[n][1]))
    for n in sorted(range(len(stages)), key=lambda n: n != least):
        part, memory = stages[n]
        for reason in memory_reasons(engine, part.card, device, memory, limits):
            if n == least or not reason.startswith(
                "kv_cache: to serve one request"
            ):  # the other stages get the pool of the least one
                reasons.setdefault(reason, f"stage {n}: {reason}" if len(stages) > 1 else reason)
    return list(reasons.values())


def _reserved_blocks(engine: EngineConfig, memory: CardMemory) -> int:
    """Count the blocks that the start check holds back: block 0, as of the version that was read
    (0.32.0, kv_cache_utils.py, get_kv_cache_configs).
    """
    return 1 if engine.vllm >= (0, 32, 0) and memory.kv.layout.groups else 0


def _blocks_available(memory: CardMemory) -> float:
    """Return the blocks that a stage has room for; a model without a cache has no least stage."""
    return memory.kv.available / memory.kv.block_bytes if memory.kv.block_bytes else math.inf


def memory_reasons(
    engine: EngineConfig, card: ModelCard, device: Device, memory: CardMemory, limits: Limits
) -> list[str]:
    """List why the engine would not start or would exceed the limit: the term and by how many bytes."""
    reasons = []
    if engine.offload != "none" and ignores_offload(engine):
        reasons.append(
            f"weight offload is silently ignored by vLLM 0.24 to 0.27 (asked for {engine.offload}); use 0.28"
            " or later"
        )
    total = device.torch_total_mib * MIB
    fixed = sum(v for k, v in memory.terms.items() if k != "kv_cache")
    if device.kind == "cuda" and fixed > total:
        over = fixed - total
        reasons.append(
            f"weights: CUDA out of memory: {gib(memory.terms['weights'])} of weights and the engine itself"
            f" are {mib(over)} ({over} bytes) more than {device.title} has"
        )
    elif device.kind == "cuda" and (need := loading(card, engine, memory, "loading_needs")) > total:
        reasons.append(
            f"weights: CUDA out of memory while loading: {_made(card, engine)} weights takes"
            f" the card to {mib(need)}, {mib(need - total)} ({need - total} bytes) more than {device.title}"
            f" has; {_smaller(engine)}"
        )
    elif memory.kv.available <= 0 and memory.kv.layout.groups:
        reasons.append(
            "kv_cache: No available memory for the cache blocks: Available KV cache memory:"
            f" {gib(memory.kv.available)}; short by {-memory.kv.available} bytes ({_pool_advice(engine)})"
        )
    elif (
        device.kind == "cuda"
        and engine.kv_bytes is not None
        and memory.terms["kv_cache"] > start_room(memory.terms, engine, device)
    ):
        short = memory.terms["kv_cache"] - start_room(memory.terms, engine, device)
        reasons.append(
            f"kv_cache: CUDA out of memory: a pool of {mib(memory.terms['kv_cache'])} is {mib(short)}"
            f" ({short} bytes) more than {device.title} has left when the engine allocates it; lower"
            " kv_cache_memory_bytes"
        )
    elif (
        memory.kv.blocks < memory.kv.layout.blocks_per_request + _reserved_blocks(engine, memory)
        and not engine.auto_len
    ):
        need = memory.kv.layout.bytes_per_request(memory.kv.layers)
        need += _reserved_blocks(engine, memory) * memory.kv.block_bytes
        short = need - memory.terms["kv_cache"]
        reasons.append(
            f"kv_cache: to serve one request of max_model_len {engine.max_model_len}, {gib(need)} KV cache is"
            f" needed, larger than the available {gib(memory.terms['kv_cache'])}; short by {short} bytes"
            f" ({_pool_advice(engine)}, or lower max_model_len)"
        )
    if device.kind == "cuda" and engine.kv_bytes is None and not engine.kv_auto:
        before = memory.before_start
        if engine.utilization * total > total - before:
            most = math.floor((total - before) / total * 100) / 100
            reasons.append(
                f"gpu_memory_utilization={engine.utilization:g}: free memory at start ({gib(total - before)}"
                f" of {gib(total)}) is less than the budget ({gib(engine.utilization * total)}); use at most"
                f" {most:.2f}"
            )
    over = memory.peak - ceiling(device, limits)
    if over > 0 and not any(r.startswith(("kv_cache: No", "kv_cache: CUDA", "weights:")) for r in reasons):
        term = max(memory.terms, key=lambda k: memory.terms[k])
        bound = "the limit" if limits.memory_bytes <= total else f"what {device.title} can give"
        reasons.append(
            f"total: {mib(memory.peak)} under load is {mib(over)} ({over} bytes) over {bound} of"
            f" {mib(memory.peak - over)}; largest term {term}: {mib(memory.terms[term])}"
        )
    return reasons


def network_reasons(pipeline: Pipeline | None, load: Load, limits: Limits) -> list[str]:
    """Say why the link between the hosts is too slow, and which link would do.

    The list is empty if another cause misses the limit.
    """
    if pipeline is None or pipeline.network is None:
        return []
    link, least, most = pipeline.network, pipeline.least_gb_per_s, pipeline.most_round_trip_us
    if (least is not None and link.gb_per_s >= least) or (least is None and most is None):
        return []
    wanted = (
        f"{limits.tpot_p99_ms:g} ms a token and {limits.ttft_p99_ms:g} ms to the first at {load.clients}"
        " clients"
    )
    enough = [f"at least {least:g} GB/s"] if least is not None else []
    enough += [f"a round trip of at most {most:g} us"] if most is not None else []
    return [
        f"network: {link.title} with {link.gb_per_s:g} GB/s and a round trip of {link.round_trip_us:g} us is"
        f" too slow for {wanted}: use a link with {' or '.join(enough)}"
    ]


def pipeline_notes(pipeline: Pipeline | None, speed: Latency) -> list[str]:
    """Describe the cost of the link between the hosts of a plan; empty for one host."""
    if pipeline is None or pipeline.network is None:
        return []
    link = pipeline.network
    return [
        f"network: {pipeline.hop_ms:.1f} of {speed.decode_expected:.0f} ms a token on {link.title}"
        f" ({link.gb_per_s:g} GB/s, round trip {link.round_trip_us:g} us); {pipeline.bytes_per_token:,} bytes"
        f" a token and hop. The limits hold down to {pipeline.least_gb_per_s or 0:g} GB/s, or to a round trip"
        f" of {pipeline.most_round_trip_us or 0:,.0f} us. Expected, not measured"
    ]


def speculation_notes(plan: SpeculationPlan | None, limits: Limits) -> list[str]:
    """Say which acceptance was taken, from where, and which one the limit needs."""
    if plan is None:
        return []
    limit = f"{limits.tpot_p99_ms:g} ms a token"
    needs = (
        f"{limit} needs {plan.needed_tokens:.2f}"
        if plan.needed_tokens is not None
        else f"{limit} is out of reach even if each draft is accepted"
    )
    return [
        f"speculation: {plan.accepted_tokens:.2f} tokens a step taken ({plan.accepted_source}); {needs};"
        f" below {plan.break_even_tokens:.2f} it is slower than without. Text decides it: measure your own"
    ]


def _pool_advice(engine: EngineConfig) -> str:
    return (
        "raise the memory limit"
        if engine.kv_auto
        else "raise kv_cache_memory_bytes"
        if engine.kv_bytes is not None
        else "raise gpu_memory_utilization"
    )


def slow_reasons(
    engine: EngineConfig, speed: Latency, load: Load, limits: Limits, requests: int
) -> list[str]:
    """List the latency limits that are missed, by how much, and the term that causes it."""
    reasons = []
    terms = speed.terms
    if speed.decode_expected > limits.tpot_p99_ms:
        names = (
            "hbm_weights",
            "hbm_kv",
            "link_offload",
            "flops",
            "all_reduce",
            "launches",
            "prefill_interference",
            "network",
        )
        parts = {k: terms[k] for k in names if k in terms}
        worst = max(parts, key=lambda k: parts[k])
        reasons.append(
            f"tpot: {speed.decode_expected:.0f} ms a token expected (floor {speed.decode_floor:.0f}) at"
            f" {load.clients} clients, {speed.decode_expected - limits.tpot_p99_ms:.0f} ms over the limit of"
            f" {limits.tpot_p99_ms:g}; largest term {worst}: {parts[worst]:.0f} ms"
        )
    ttft = terms["ttft_all_at_once"]
    if ttft > limits.ttft_p99_ms:
        reasons.append(
            f"ttft: {ttft:.0f} ms expected for the last of {load.clients} prompts of {load.input_tokens}"
            f" tokens, {ttft - limits.ttft_p99_ms:.0f} ms over the limit of {limits.ttft_p99_ms:g}; term"
            f" prefill: {terms['chunk_step']:.0f} ms a step of"
            f" {min(engine.max_num_batched_tokens, load.input_tokens)} tokens"
        )
    wanted = min(load.clients, engine.max_num_seqs)
    if requests < wanted:
        reasons.append(
            f"kv_cache: the pool holds {requests} requests of {load.input_tokens + load.output_tokens} tokens"
            f" and the load has {load.clients}: {load.clients - requests} wait; a larger pool, shorter"
            " requests or a smaller kv_cache_dtype would hold them"
        )
    if engine.max_num_seqs < load.clients:
        reasons.append(
            f"max_num_seqs={engine.max_num_seqs} is less than the load's {load.clients} clients:"
            f" {load.clients - engine.max_num_seqs} wait; raise it"
        )
    return reasons


def fit_notes(
    engine: EngineConfig, card: ModelCard, memory: CardMemory, limit_bytes: int, requests: int, load: Load
) -> list[str]:
    """Describe a plan that fits: its room below the limit, and its KV pool."""
    room = limit_bytes - memory.peak
    notes = [
        f"{mib(memory.peak)} under load, {mib(room)} below the limit of {mib(limit_bytes)}; "
        f"the KV pool holds {requests} requests of {load.input_tokens + load.output_tokens} tokens"
    ]
    useful = engine.max_num_seqs * memory.kv.layout.blocks_per_request + 1
    if engine.kv_auto and memory.kv.blocks == useful and room > memory.kv.block_bytes:
        notes.append(
            f"the pool ends at max_num_seqs={engine.max_num_seqs} requests of"
            f" max_model_len={engine.max_model_len} tokens, more than which the engine does not take; raise"
            " one of them to use the rest"
        )
    return notes


def _made(card: ModelCard, engine: EngineConfig) -> str:
    """Say what the engine does with weights while it loads them."""
    return f"making {engine.online}" if engine.online else f"repacking {card.quantization.method}"


def _smaller(engine: EngineConfig) -> str:
    if engine.online:
        return "use a checkpoint that is quantized already, or more cards"
    return "compressed-tensors weights need less"


def start_notes(
    card: ModelCard, engine: EngineConfig, device: Device, memory: CardMemory, limits: Limits
) -> list[str]:
    """Warn if the engine exceeds the limit for some seconds while it starts.

    This matters on a card that others share.
    """
    highest = start_peak(card, engine, device, memory)
    if highest <= limits.memory_bytes:
        return []
    return [
        f"start: while loading, up to {mib(highest)} for some seconds ({mib(highest - limits.memory_bytes)}"
        f" over the limit): {_made(card, engine)} weights on the card; the limit holds once the service is"
        " ready"
    ]
