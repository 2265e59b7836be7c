"""Computes a plan from validated input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan import support
from lowmem.plan.admission import admission_of
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.kv_layout import group_rows
from lowmem.plan.latency import idle_share, latency, link_needs, needed_acceptance
from lowmem.plan.launch import arguments_of, environment_of, nodes_of, service_limits
from lowmem.plan.memory import (
    CardMemory,
    KvPool,
    host_ram,
    kv_layout_of,
    stage_memories,
    stage_ram,
    start_peak,
)
from lowmem.plan.reads import active_parameters, expert_share
from lowmem.plan.request import Inputs
from lowmem.plan.resolve import resolve
from lowmem.plan.speculation import acceptance_of
from lowmem.plan.stages import Part, hop_bytes_per_token
from lowmem.plan.steps import StepModel
from lowmem.plan.verdict import (
    ceiling,
    fit_notes,
    network_reasons,
    option_notes,
    pipeline_notes,
    replica_notes,
    slow_reasons,
    speculation_notes,
    stage_reasons,
    start_notes,
)
from lowmem.plan.weights import inventory_of_card, stored_bytes
from lowmem.schema import (
    VLLM_VERSION,
    AdmissionLimits,
    Argument,
    Checkpoint,
    DecodeStep,
    Device,
    EnvironmentVariable,
    KvCache,
    KvCacheGroup,
    Latency,
    Limits,
    Load,
    Node,
    Pipeline,
    Plan,
    ServiceLimits,
    SpeculationPlan,
    Stage,
    Verdict,
)
from lowmem.units import mib


def engine_of(inputs: Inputs) -> EngineConfig:
    """Return the engine settings that the knobs result in.

    Raises BadInput if a request of the load is longer than the engine takes.
    """
    load = inputs.load
    env = {name: str(k.value) for name, k in inputs.environment.items()}
    engine = resolve(
        inputs.knobs, inputs.card, inputs.device, inputs.count, inputs.vllm_version, env, inputs.hosts
    )
    if load.input_tokens + load.output_tokens > engine.max_model_len:
        raise BadInput(
            f"input_tokens={load.input_tokens} + output_tokens={load.output_tokens} is more than"
            f" max_model_len={engine.max_model_len}; shorten the request or raise max_model_len"
        )
    return engine


def blocking_reasons(inputs: Inputs, steps: StepModel, pipeline: Pipeline | None, requests: int) -> list[str]:
    """List why the plan is impossible; empty if it is not.

    `requests` is the number of the load's requests that the KV pool holds.
    """
    engine, load, limits = steps.engine, inputs.load, inputs.limits
    blocked = [
        *support.missing_flags(inputs.knobs, engine.vllm),
        *support.refusals(engine, inputs.card, inputs.device),
        *stage_reasons(engine, inputs.device, steps.stages, limits),
        *network_reasons(pipeline, load, limits),
    ]
    if not blocked and requests < 1:
        _, memory = fullest(steps.stages)
        blocks = memory.kv.layout.blocks_of(load.input_tokens + load.output_tokens)
        need = blocks * memory.kv.block_bytes
        blocked = [
            f"kv_cache: the pool of {mib(memory.terms['kv_cache'])} holds no request of the load; one needs"
            f" {mib(need)}"
        ]
    return blocked


def share_of(load: Load, engine: EngineConfig) -> Load:
    """Return the load of one replica of the engine."""
    if engine.dp == 1:
        return load
    return load.model_copy(update={"clients": math.ceil(load.clients / engine.dp)})


def load_blocks(inputs: Inputs, engine: EngineConfig) -> int:
    """Count the blocks that the load's requests hold, as many of them as run together."""
    together = min(share_of(inputs.load, engine).clients, engine.max_num_seqs)
    layout = kv_layout_of(inputs.card, engine)
    return together * layout.blocks_of(engine.held_tokens(inputs.load))


def _sizes(engine: EngineConfig) -> dict[str, Any]:
    """Return the engine's settings that are fields of the plan."""
    return {
        "tensor_parallel_size": engine.tp,
        "pipeline_parallel_size": engine.pp,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "async_scheduling": engine.async_scheduling,
        "dummy_weights": engine.dummy,
    }


def weights_said(inputs: Inputs, engine: EngineConfig) -> str:
    """Say in words how the weights come to what is served."""
    if engine.online:
        return f"quantized by the engine while it loads: {engine.online}"
    return "to be quantized by this deployment" if inputs.to_be_quantized else "as stored"


def checkpoint_of(inputs: Inputs, engine: EngineConfig) -> tuple[Checkpoint | None, list[str]]:
    """Return the served checkpoint's tensors on one GPU, or the engine's reason to refuse it."""
    try:
        found = inventory_of_card(inputs.card, engine)
    except BadInput as error:
        return None, [str(error)] if inputs.vllm_version == VLLM_VERSION else []
    if found is None:
        return None, []
    return Checkpoint(
        architecture=found.architecture,
        dtype=found.dtype,
        format=found.method,
        parameter_bytes=found.parameter_bytes,
        buffer_bytes=found.buffer_bytes,
        bytes_by_use=dict(found.bytes_by_use),
        active_bytes=found.active_bytes,
    ), []


def fullest(stages: Sequence[tuple[Part, CardMemory]]) -> tuple[Part, CardMemory]:
    """Return the stage whose card is the fullest; the limit is held against it."""
    return max(stages, key=lambda s: s[1].peak)


def paced(admission: AdmissionLimits, speed: Latency, load: Load) -> AdmissionLimits:
    """Add the seconds that a token of a prompt is expected to take.

    Two digits: a constant that moves by a percent is no new release.
    """
    token_s = float(f"{speed.prefill_expected / load.input_tokens / 1000:.2g}")
    return admission.model_copy(update={"prompt_token_s": token_s})


def other_notes(inputs: Inputs, engine: EngineConfig, memory: CardMemory) -> list[str]:
    """Say what a start needs, what replicas share, and which options are not counted."""
    start = start_notes(inputs.card, engine, inputs.device, memory, inputs.limits)
    return [*start, *replica_notes(engine, inputs.card), *option_notes(inputs.knobs)]


def compute(inputs: Inputs) -> Plan:
    """Compute the plan without a search for alternatives.

    Raises BadInput for input that cannot be planned.
    """
    p, card, device, load, limits = inputs.profile, inputs.card, inputs.device, inputs.load, inputs.limits
    engine = engine_of(inputs)
    share = share_of(load, engine)
    most = ceiling(device, limits)
    admission = admission_of(engine, load, most, inputs.deploy.media_domains if inputs.deploy else ())
    blocks = load_blocks(inputs, engine)
    stages = stage_memories(card, engine, device, most, blocks, admission.memory_bytes)
    part, memory = fullest(stages)
    steps = StepModel(card, engine, device, stages, share, inputs.link)
    speed = latency(steps)
    admission = paced(admission, speed, load)
    requests = memory.kv.requests_of(engine.held_tokens(load))
    pipeline, drafts = pipeline_of(steps, limits), speculation_of(steps, limits)
    checkpoint, refused = checkpoint_of(inputs, engine)
    blocked = blocking_reasons(inputs, steps, pipeline, requests) or refused
    slow = slow_reasons(engine, speed, share, limits, requests)
    notes = [*fit_notes(engine, card, memory, most, requests, share), *pipeline_notes(pipeline, speed)]
    beside = [*inputs.remarks, *speculation_notes(drafts, limits), *other_notes(inputs, engine, memory)]
    verdict: Verdict = "impossible" if blocked else "slow" if slow else "fits"
    host = host_ram(part.card, engine, device, memory, admission.memory_bytes)
    service = service_limits(engine, device, host, card, load, limits)
    arguments, environment, nodes = start_of(inputs, steps, admission, service)
    return Plan(
        vllm_version=inputs.vllm_version,
        profile=p.name,
        model=card.name,
        parameters=card.parameters,
        weight_bytes=stored_bytes(card),
        quantization=card.quantization,
        weights=weights_said(inputs, engine),
        checkpoint=checkpoint,
        device=device.name,
        device_kind=device.kind,
        device_count=inputs.count,
        hosts=inputs.hosts,
        **_sizes(engine),
        load=load,
        limits=limits,
        verdict=verdict,
        reasons=(*blocked, *inputs.remarks) if blocked else (*(slow or notes), *beside),
        limit_bytes=limits.memory_bytes,
        per_gpu={**memory.terms, "total": memory.total},
        weight_terms=weight_terms(memory),
        load_growth=memory.load,
        peak_bytes=memory.peak,
        before_start_bytes=memory.before_start,
        start_peak_bytes=max(start_peak(p.card, engine, device, m) for p, m in stages),
        host_ram=host,
        stage_ram=stage_ram(card),
        kv_available_bytes=memory.kv.available,
        kv_tokens=memory.kv.tokens,
        kv_cache=kv_cache_of(memory.kv),
        max_requests=requests * engine.dp,
        decode_step=decode_step_of(steps),
        latency_ms=speed,
        arguments=arguments,
        environment=environment,
        service=service,
        admission=admission,
        deploy=inputs.deploy,
        stages=stages_of(engine, device, stages),
        pipeline=pipeline,
        speculation=drafts,
        nodes=nodes,
    )


def kv_cache_of(pool: KvPool) -> KvCache:
    """Describe the layout of one card's KV cache."""
    return KvCache(
        bytes_per_request=pool.layout.bytes_per_request(pool.layers),
        blocks_per_request=pool.layout.blocks_per_request,
        bytes_per_block=pool.block_bytes,
        groups=tuple(KvCacheGroup.model_validate(row) for row in group_rows(pool.layout, pool.layers)),
    )


def decode_step_of(steps: StepModel) -> DecodeStep:
    """Say what a decode step of the load reads on the fullest card."""
    stage, engine = fullest(steps.stages), steps.engine
    reads = steps.weights(stage).read(expert_share(steps.card, steps.decode_tokens))
    return DecodeStep(
        active_parameters=active_parameters(steps.card),
        weight_bytes=reads,
        kv_bytes=steps.kv_bytes(stage, steps.together),
        linear_kernel=engine.kernel,
        expert_kernel=engine.expert_kernel if steps.card.experts else None,
    )


def start_of(
    inputs: Inputs, steps: StepModel, admission: AdmissionLimits, service: ServiceLimits
) -> tuple[tuple[Argument, ...], tuple[EnvironmentVariable, ...], tuple[Node, ...]]:
    """Return arguments and environment of this host's engine, and the start parameters of each host."""
    _, memory = fullest(steps.stages)
    pool_bytes = max(
        m.terms["kv_cache"] for _, m in steps.stages
    )  # the engine gives every stage the same setting and as many blocks
    arguments = arguments_of(inputs, steps.engine, memory, pool_bytes)
    environment = environment_of(inputs, admission)
    nodes = nodes_of(inputs, arguments, environment, service)
    if not nodes:
        return arguments, environment, ()
    own = nodes[inputs.deploy.rank if inputs.deploy else 0]
    return own.arguments, own.environment, nodes


def weight_terms(memory: CardMemory) -> dict[str, int]:
    """Return the weights of one card in parts, in bytes."""
    w = memory.weights
    return {
        "sharded": w.sharded,
        "replicated": w.replicated,
        "padding": w.padding,
        "repacking": w.repacking,
        "offloaded": w.offloaded,
        **({"lora": w.lora} if w.lora else {}),
    }


def stages_of(
    engine: EngineConfig, device: Device, stages: Sequence[tuple[Part, CardMemory]]
) -> tuple[Stage, ...]:
    """Describe one card of each pipeline stage.

    A single stage gives an empty tuple, since the plan itself describes it.
    """
    if engine.pp == 1:
        return ()
    return tuple(
        Stage(
            node=part.node,
            first_layer=part.first_layer,
            layers=part.card.layers,
            per_gpu={**memory.terms, "total": memory.total},
            load_growth=memory.load,
            weight_terms=weight_terms(memory),
            peak_bytes=memory.peak,
            start_peak_bytes=start_peak(part.card, engine, device, memory),
        )
        for part, memory in stages
    )


def pipeline_of(steps: StepModel, limits: Limits) -> Pipeline | None:
    """Compute the traffic between the stages at the load, and the link that it needs; None for one stage."""
    engine, load, link = steps.engine, steps.load, steps.link
    if engine.pp == 1:
        return None
    together = min(load.clients, engine.max_num_seqs)
    hop = steps.hops(together)
    token = hop_bytes_per_token(steps.card, engine)
    alone = replace(steps, load=load.model_copy(update={"clients": 1}))
    needs = link_needs(steps, link, limits) if link else (None, None)
    return Pipeline(
        network=link,
        bytes_per_token=token,
        bytes_per_decode_step=token * together,
        bytes_per_prefill_step=token * min(engine.max_num_batched_tokens, load.input_tokens),
        hop_floor_ms=round(hop.floor, 4),
        hop_ms=round(hop.expected, 4),
        idle_share_one_client=round(idle_share(alone), 4),
        idle_share=round(idle_share(steps), 4),
        least_gb_per_s=needs[0],
        most_round_trip_us=needs[1],
    )


def speculation_of(steps: StepModel, limits: Limits) -> SpeculationPlan | None:
    """Compute what speculative decoding needs to pay and to meet the limit of a token; None without it."""
    speculation = steps.engine.speculation
    if speculation is None:
        return None
    accepted, source = acceptance_of(steps.load, speculation)
    even, needed = needed_acceptance(steps, limits.tpot_p99_ms)
    return SpeculationPlan(
        method=speculation.method,
        drafts=speculation.drafts,
        accepted_tokens=accepted,
        accepted_source=source,
        break_even_tokens=round(even, 2),
        needed_tokens=None if needed is None else math.ceil(needed * 100) / 100,
    )
