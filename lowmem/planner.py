"""Profile + model card + device -> Plan. Pure: everything it needs is passed in or is a table of this package."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem import cards, devices, knobs, links, profiles
from lowmem.errors import BadInput
from lowmem.knobs import Engine
from lowmem.latency import hops, idle_share, latency, link_needs
from lowmem.memory import (
    CardMemory,
    Part,
    hop_bytes_per_token,
    host_ram,
    ignores_offload,
    kv_bytes_per_token,
    loading,
    stage_memories,
    stage_ram,
    start_peak,
    start_room,
    stored_bytes,
    usable_kv_tokens,
)
from lowmem.schema import (
    VLLM_VERSION,
    Argument,
    Deploy,
    Device,
    EnvironmentVariable,
    Knob,
    Latency,
    Limits,
    Link,
    Load,
    ModelCard,
    Node,
    Pipeline,
    Plan,
    Profile,
    Quantization,
    Scalar,
    ServiceLimits,
    Stage,
    Verdict,
)
from lowmem.units import MIB, gib, mib

# The pool's size is set one way only: an override of one way takes the profile's other way out.
_POOL_KNOBS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")


@dataclass(frozen=True)
class Inputs:
    """Everything a plan is a function of."""

    profile: Profile
    base: ModelCard  # the model as named, before the profile's quantization
    card: ModelCard
    device: Device
    count: int
    knobs: Mapping[str, Knob]
    environment: Mapping[str, Knob]
    load: Load
    limits: Limits
    vllm_version: str
    deploy: Deploy | None = None
    hosts: int = 1
    link: Link | None = None  # between the hosts; None: there is one host


def gather(
    profile: str | Profile,
    model: str | ModelCard | None = None,
    device: str | Device | None = None,
    count: int | None = None,
    overrides: Mapping[str, Scalar] | None = None,
    deploy: Deploy | Mapping[str, object] | None = None,
    *,
    clients: int | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    vllm_version: str = VLLM_VERSION,
    hosts: int | None = None,
    network: str | Link | None = None,
) -> Inputs:
    """Names to data, overrides checked. BadInput for anything that cannot be planned."""
    p = profiles.load_profile(profile) if isinstance(profile, str) else profile
    d = devices.load_device(device or p.device) if not isinstance(device, Device) else device
    c = cards.load_card(model or p.model) if not isinstance(model, ModelCard) else model
    n = p.device_count if count is None else count
    if not 1 <= n <= 64:
        raise BadInput(f"count={n} is not from 1 to 64; give the number of cards of one host")
    if d.kind == "cpu" and n != 1:
        raise BadInput(f"count={n} with device {d.name}: a CPU is one device; use --count 1")
    merged = {name: Knob(value=knobs.checked(name, k.value), why=k.why) for name, k in p.knobs.items()}
    given = {name: knobs.checked(name, value) for name, value in (overrides or {}).items()}
    if any(name in given for name in _POOL_KNOBS):
        merged = {name: k for name, k in merged.items() if name not in _POOL_KNOBS}
    merged.update({name: Knob(value=v, why=f"set by the operator (profile {p.name}: {_before(p, name)})") for name, v in given.items()})
    env = dict(p.environment)
    env.update({name: Knob(value=v, why="set by the operator") for name, v in (environment or {}).items()})
    asked = {"clients": clients, "input_tokens": input_tokens, "output_tokens": output_tokens}
    for name, value in asked.items():
        if value is not None and not 1 <= value <= 10_000_000:
            raise BadInput(f"{name}={value} is not from 1 to 10,000,000; correct it")
    if clients is not None and clients > 100_000:
        raise BadInput(f"clients={clients} is more than 100,000; correct it")
    load = p.load.model_copy(update={k: v for k, v in asked.items() if v is not None})
    limits = p.limits
    if memory_limit_bytes is not None:
        if memory_limit_bytes < MIB:
            raise BadInput(f"memory limit {memory_limit_bytes} bytes is less than 1 MiB; give it with its unit, e.g. 20GiB")
        limits = limits.model_copy(update={"memory_bytes": memory_limit_bytes})
    quantized = cards.quantized(c, fitting_group(c, wanted_quantization(p, merged), merged))
    place = Deploy.model_validate(deploy) if deploy is not None and not isinstance(deploy, Deploy) else deploy
    h = p.hosts if hosts is None else hosts
    if not 1 <= h <= 64:
        raise BadInput(f"hosts={h} is not from 1 to 64; give the number of hosts that one server spans")
    link = (links.load_link(joined) if isinstance(joined := network or p.network, str) else joined) if h > 1 else None
    if h > 1 and link is None:
        raise BadInput(f"hosts={h} needs the network between them: name one of {', '.join(links.names())}")
    if place:
        refuse_place(place, h)
    return Inputs(p, c, quantized, d, n, merged, env, load, limits, vllm_version, place, h, link)


class BadPlace(BadInput):
    """Of the hosts of a server; what it says begins with the name of the field of `Deploy`."""


def refuse_place(place: Deploy, hosts: int) -> None:
    """BadPlace where the hosts of one server could not meet."""
    if place.nodes and len(place.nodes) != hosts:
        raise BadPlace(
            f"nodes has {len(place.nodes)} addresses and the server spans {hosts} host(s); give one for each, the one that serves first"
        )
    if place.rank >= hosts:
        raise BadPlace(f"rank={place.rank} is no place among the {hosts} host(s) of the server; count from 0, the one that serves")
    for node in place.nodes:
        try:
            address = ipaddress.ip_address(node)
        except ValueError:
            raise BadPlace(f"nodes has {node!r}, which is no IP address; the engine and its firewall rules take addresses") from None
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            raise BadPlace(f"nodes has {node}, by which no other host reaches it; give its address in the network that joins the hosts")
    twice = sorted({node for node in place.nodes if place.nodes.count(node) > 1})
    if twice:
        raise BadPlace(f"nodes has {twice[0]} more than once; give each host its own address")
    if place.nodes and place.port == place.master_port:
        raise BadPlace(f"port={place.port} is the server's and master_port too; choose another for one of them")


def wanted_quantization(profile: Profile, given: Mapping[str, Knob]) -> Quantization:
    """What the checkpoint to come is made as: the profile's quantization, in the format that a `quantization` knob names."""
    method = knobs.FORMATS.get(str(given["quantization"].value)) if "quantization" in given else None
    if method is None or profile.quantization.method == "none":
        return profile.quantization
    return Quantization.model_validate({**profile.quantization.model_dump(), "method": method})


def fitting_group(card: ModelCard, quantization: Quantization, given: Mapping[str, Knob]) -> Quantization:
    """The largest group size, from the profile's down to 32, that divides every layer's inputs on each card; the profile's if none does.

    A checkpoint to come can be made to fit the model; one that exists is what it is.
    """
    cards_per_layer = given["tensor_parallel_size"].value if "tensor_parallel_size" in given else 1
    if card.quantization.method != "none" or quantization.group_size <= 0 or not isinstance(cards_per_layer, int):
        return quantization
    linears = [g for g in card.groups if g.kind == "linear"]
    for size in (quantization.group_size, 64, 32):
        if size <= quantization.group_size and not any(
            g.in_features % (size * (cards_per_layer if g.split == "row" else 1)) for g in linears
        ):
            return quantization.model_copy(update={"group_size": size})
    return quantization


def _before(profile: Profile, name: str) -> str:
    return f"{profile.knobs[name].value}" if name in profile.knobs else "not set"


def make_plan(
    profile: str | Profile,
    model: str | ModelCard | None = None,
    device: str | Device | None = None,
    count: int | None = None,
    overrides: Mapping[str, Scalar] | None = None,
    deploy: Deploy | Mapping[str, object] | None = None,
    *,
    clients: int | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    vllm_version: str = VLLM_VERSION,
    hosts: int | None = None,
    network: str | Link | None = None,
    search: bool = True,
) -> Plan:
    """The plan of a profile for a model on `count` devices a host; None takes the profile's own. `overrides`: knob -> value, as `--set`.

    Never raises for a plan that does not fit (the verdict says so); BadInput, one line, for input that cannot be planned.
    `search=False` leaves `nearest` out.
    """
    inputs = gather(
        profile, model, device, count, overrides, deploy, clients=clients, input_tokens=input_tokens, output_tokens=output_tokens,
        memory_limit_bytes=memory_limit_bytes, environment=environment, vllm_version=vllm_version, hosts=hosts, network=network,
    )  # fmt: skip
    plan = compute(inputs)
    if not search or plan.verdict == "fits":
        return plan
    found = nearest(inputs, plan)
    if found is None:
        return plan
    return plan.model_copy(update={"nearest": found[0], "reasons": (*plan.reasons, found[1])})


def compute(inputs: Inputs) -> Plan:
    """The plan without a search for alternatives."""
    p, card, device, load, limits = inputs.profile, inputs.card, inputs.device, inputs.load, inputs.limits
    env = {name: str(k.value) for name, k in inputs.environment.items()}
    engine = knobs.resolve(inputs.knobs, card, device, inputs.count, inputs.vllm_version, env, inputs.hosts)
    if load.input_tokens + load.output_tokens > engine.max_model_len:
        raise BadInput(
            f"input_tokens={load.input_tokens} + output_tokens={load.output_tokens} is more than max_model_len={engine.max_model_len}; "
            "shorten the request or raise max_model_len"
        )
    request = math.ceil((load.input_tokens + load.output_tokens) / engine.block_tokens) * engine.block_tokens
    held = min(load.clients, engine.max_num_seqs) * request
    stages = stage_memories(card, engine, device, ceiling(device, limits), held)
    part, memory = max(stages, key=lambda s: s[1].peak)  # the card that the limit is held against
    speed = latency(card, engine, device, stages, load, inputs.link)
    requests = usable_kv_tokens(memory.kv_tokens, engine) // request
    pipeline = pipeline_of(inputs, engine, stages, speed)
    blocked = [
        *knobs.missing_flags(inputs.knobs, engine.vllm),
        *knobs.refusals(engine, card, device),
        *stage_reasons(engine, device, stages, limits),
        *network_reasons(pipeline, load, limits),
    ]
    if not blocked and requests < 1:
        need = kv_bytes_per_token(part.card, engine) * (load.input_tokens + load.output_tokens)
        blocked = [f"kv_cache: the pool of {mib(memory.terms['kv_cache'])} holds no request of the load; one needs {mib(need)}"]
    slow = slow_reasons(engine, speed, load, limits, requests)
    notes = [*fit_notes(engine, card, memory, limits, requests, load), *pipeline_notes(pipeline, speed)]
    verdict: Verdict = "impossible" if blocked else "slow" if slow else "fits"
    pool_bytes = max(m.terms["kv_cache"] for _, m in stages)  # every stage is told the same, and has as many blocks
    arguments = arguments_of(inputs, engine, memory, pool_bytes)
    host = host_ram(part.card, engine, device, memory)
    service = service_limits(engine, device, host, card, load, limits)
    nodes = nodes_of(inputs, arguments, service)
    own = nodes[inputs.deploy.rank if inputs.deploy else 0] if nodes else None
    return Plan(
        vllm_version=inputs.vllm_version,
        profile=p.name,
        model=card.name,
        parameters=card.parameters,
        weight_bytes=stored_bytes(card),
        quantization=card.quantization,
        device=device.name,
        device_kind=device.kind,
        device_count=inputs.count,
        hosts=inputs.hosts,
        tensor_parallel_size=engine.tp,
        pipeline_parallel_size=engine.pp,
        load=load,
        limits=limits,
        verdict=verdict,
        reasons=tuple(blocked or [*(slow or notes), *start_notes(card, engine, device, memory, limits)]),
        limit_bytes=limits.memory_bytes,
        per_gpu={**memory.terms, "total": memory.total},
        weight_terms=weight_terms(memory),
        load_growth=memory.load,
        peak_bytes=memory.peak,
        before_start_bytes=memory.before_start,
        start_peak_bytes=max(start_peak(p.card, engine, device, m) for p, m in stages),
        host_ram=host,
        stage_ram=stage_ram(card),
        kv_available_bytes=memory.kv_available,
        kv_tokens=memory.kv_tokens,
        max_requests=requests,
        latency_ms=speed,
        arguments=own.arguments if own else arguments,
        environment=own.environment if own else environment_of(inputs, device),
        service=service,
        deploy=inputs.deploy,
        stages=stages_of(engine, device, stages),
        pipeline=pipeline,
        nodes=nodes,
    )


def weight_terms(memory: CardMemory) -> dict[str, int]:
    """The weights of one card in parts."""
    w = memory.weights
    return {
        "sharded": w.sharded,
        "replicated": w.replicated,
        "padding": w.padding,
        "repacking": w.repacking,
        "offloaded": w.offloaded,
    }


def ceiling(device: Device, limits: Limits) -> int:
    """Bytes the plan may use: the limit, or what the driver hands out where that is less (it keeps some of memory.total for itself)."""
    return min(limits.memory_bytes, device.torch_total_mib * MIB)


# ---------------------------------------------------------------- verdict


def stage_reasons(engine: Engine, device: Device, stages: Sequence[tuple[Part, CardMemory]], limits: Limits) -> list[str]:
    """As `memory_reasons` of each stage, with its number where there are several; the same one on several stages is said once."""
    found: dict[str, str] = {}
    least = min(range(len(stages)), key=lambda n: stages[n][1].kv_available / stages[n][1].kv_block_bytes)
    for n in sorted(range(len(stages)), key=lambda n: n != least):
        part, memory = stages[n]
        for reason in memory_reasons(engine, part.card, device, memory, limits):
            if n == least or not reason.startswith("kv_cache: to serve one request"):  # elsewhere the pool is that stage's
                found.setdefault(reason, f"stage {n}: {reason}" if len(stages) > 1 else reason)
    return list(found.values())


def memory_reasons(engine: Engine, card: ModelCard, device: Device, memory: CardMemory, limits: Limits) -> list[str]:
    """Why the engine would not start, or would pass the limit: the term and by how many bytes."""
    reasons = []
    if engine.offload != "none" and ignores_offload(engine):
        reasons.append(f"weight offload is silently ignored by vLLM 0.24 to 0.27 (asked for {engine.offload}); use 0.28 or later")
    total = device.torch_total_mib * MIB
    fixed = sum(v for k, v in memory.terms.items() if k != "kv_cache")
    if device.kind == "cuda" and fixed > total:
        over = fixed - total
        reasons.append(
            f"weights: CUDA out of memory: {gib(memory.terms['weights'])} of weights and the engine itself are {mib(over)} ({over} bytes) "
            f"more than {device.title} has"
        )
    elif device.kind == "cuda" and (need := loading(card, engine, memory, "loading_needs")) > total:
        reasons.append(
            f"weights: CUDA out of memory while loading: repacking {card.quantization.method} weights takes the card to {mib(need)}, "
            f"{mib(need - total)} ({need - total} bytes) more than {device.title} has; compressed-tensors weights need less"
        )
    elif memory.kv_available <= 0:
        reasons.append(
            f"kv_cache: No available memory for the cache blocks: Available KV cache memory: {gib(memory.kv_available)}; "
            f"short by {-memory.kv_available} bytes ({_pool_advice(engine)})"
        )
    elif device.kind == "cuda" and engine.kv_bytes is not None and memory.terms["kv_cache"] > start_room(memory.terms, engine, device):
        short = memory.terms["kv_cache"] - start_room(memory.terms, engine, device)
        reasons.append(
            f"kv_cache: CUDA out of memory: a pool of {mib(memory.terms['kv_cache'])} is {mib(short)} ({short} bytes) more than "
            f"{device.title} has left when the engine allocates it; lower kv_cache_memory_bytes"
        )
    elif memory.kv_tokens < engine.max_model_len and not engine.auto_len:
        need = math.ceil(engine.max_model_len / engine.block_tokens) * memory.kv_block_bytes
        short = need - memory.terms["kv_cache"]
        reasons.append(
            f"kv_cache: to serve one request of max_model_len {engine.max_model_len}, {gib(need)} KV cache is needed, larger than the "
            "available "
            f"{gib(memory.terms['kv_cache'])}; short by {short} bytes ({_pool_advice(engine)}, or lower max_model_len)"
        )
    if device.kind == "cuda" and engine.kv_bytes is None and not engine.kv_auto:
        before = memory.before_start
        if engine.utilization * total > total - before:
            most = math.floor((total - before) / total * 100) / 100
            reasons.append(
                f"gpu_memory_utilization={engine.utilization:g}: free memory at start ({gib(total - before)} of {gib(total)}) is less "
                "than the budget "
                f"({gib(engine.utilization * total)}); use at most {most:.2f}"
            )
    over = memory.peak - ceiling(device, limits)
    if over > 0 and not any(r.startswith(("kv_cache: No", "kv_cache: CUDA", "weights:")) for r in reasons):
        term = max(memory.terms, key=lambda k: memory.terms[k])
        what = "the limit" if limits.memory_bytes <= total else f"what {device.title} can give"
        reasons.append(
            f"total: {mib(memory.peak)} under load is {mib(over)} ({over} bytes) over {what} of {mib(memory.peak - over)}; "
            f"largest term {term}: {mib(memory.terms[term])}"
        )
    return reasons


def network_reasons(pipeline: Pipeline | None, load: Load, limits: Limits) -> list[str]:
    """Why the link between the hosts is too slow, and which one would do; empty where it is not the link that misses a limit."""
    if pipeline is None or pipeline.network is None:
        return []
    link, least, most = pipeline.network, pipeline.least_gb_per_s, pipeline.most_round_trip_us
    if (least is not None and link.gb_per_s >= least) or (least is None and most is None):
        return []
    wanted = f"{limits.tpot_p99_ms:g} ms a token and {limits.ttft_p99_ms:g} ms to the first at {load.clients} clients"
    enough = [f"at least {least:g} GB/s"] if least is not None else []
    enough += [f"a round trip of at most {most:g} us"] if most is not None else []
    return [
        f"network: {link.title} with {link.gb_per_s:g} GB/s and a round trip of {link.round_trip_us:g} us is too slow for {wanted}: "
        f"use a link with {' or '.join(enough)}"
    ]


def pipeline_notes(pipeline: Pipeline | None, speed: Latency) -> list[str]:
    """What a plan whose stages lie on several hosts has to say of the link between them."""
    if pipeline is None or pipeline.network is None:
        return []
    link = pipeline.network
    return [
        f"network: {pipeline.hop_ms:.1f} of {speed.decode_expected:.0f} ms a token on {link.title} ({link.gb_per_s:g} GB/s, round trip "
        f"{link.round_trip_us:g} us); {pipeline.bytes_per_token:,} bytes a token and hop. The limits hold down to "
        f"{pipeline.least_gb_per_s or 0:g} GB/s, or to a round trip of {pipeline.most_round_trip_us or 0:,.0f} us. Expected, not measured"
    ]


def _pool_advice(engine: Engine) -> str:
    return (
        "raise the memory limit"
        if engine.kv_auto
        else "raise kv_cache_memory_bytes"
        if engine.kv_bytes is not None
        else "raise gpu_memory_utilization"
    )


def slow_reasons(engine: Engine, speed: Latency, load: Load, limits: Limits, requests: int) -> list[str]:
    """Which latency limit is missed, by how much, and which term it is."""
    reasons = []
    terms = speed.terms
    if speed.decode_expected > limits.tpot_p99_ms:
        names = ("hbm_weights", "hbm_kv", "link_offload", "flops", "all_reduce", "launches", "prefill_interference", "network")
        parts = {k: terms[k] for k in names if k in terms}
        worst = max(parts, key=lambda k: parts[k])
        reasons.append(
            f"tpot: {speed.decode_expected:.0f} ms a token expected (floor {speed.decode_floor:.0f}) at {load.clients} clients, "
            f"{speed.decode_expected - limits.tpot_p99_ms:.0f} ms over the limit of {limits.tpot_p99_ms:g}; largest term {worst}: "
            f"{parts[worst]:.0f} ms"
        )
    ttft = terms["ttft_all_at_once"]
    if ttft > limits.ttft_p99_ms:
        reasons.append(
            f"ttft: {ttft:.0f} ms expected for the last of {load.clients} prompts of {load.input_tokens} tokens, "
            f"{ttft - limits.ttft_p99_ms:.0f} ms over the limit of {limits.ttft_p99_ms:g}; term prefill: {terms['chunk_step']:.0f} ms "
            f"a step of {min(engine.max_num_batched_tokens, load.input_tokens)} tokens"
        )
    wanted = min(load.clients, engine.max_num_seqs)
    if requests < wanted:
        reasons.append(
            f"kv_cache: the pool holds {requests} requests of {load.input_tokens + load.output_tokens} tokens and the load has "
            f"{load.clients}: {load.clients - requests} wait; "
            "a larger pool, shorter requests or a smaller kv_cache_dtype would hold them"
        )
    if engine.max_num_seqs < load.clients:
        reasons.append(
            f"max_num_seqs={engine.max_num_seqs} is less than the load's {load.clients} clients: {load.clients - engine.max_num_seqs} "
            "wait; raise it"
        )
    return reasons


def fit_notes(engine: Engine, card: ModelCard, memory: CardMemory, limits: Limits, requests: int, load: Load) -> list[str]:
    """What a plan that fits has to say for itself."""
    room = limits.memory_bytes - memory.peak
    return [
        f"{mib(memory.peak)} under load, {mib(room)} below the limit of {mib(limits.memory_bytes)}; "
        f"the KV pool holds {requests} requests of {load.input_tokens + load.output_tokens} tokens"
    ]


def start_notes(card: ModelCard, engine: Engine, device: Device, memory: CardMemory, limits: Limits) -> list[str]:
    """A note when the engine passes the limit for some seconds while it starts, which matters on a card that others share."""
    highest = start_peak(card, engine, device, memory)
    if highest <= limits.memory_bytes:
        return []
    return [
        f"start: while loading, up to {mib(highest)} for some seconds ({mib(highest - limits.memory_bytes)} over the limit): "
        f"{card.quantization.method} weights are unpacked on the card; the limit holds once the service is ready"
    ]


# ---------------------------------------------------------------- arguments


def arguments_of(inputs: Inputs, engine: Engine, memory: CardMemory, pool_bytes: int) -> tuple[Argument, ...]:
    """The arguments of `vllm serve`, each with its reason, in the profile's order."""
    place, card = inputs.deploy, inputs.card
    made = "" if card.quantization.method == "none" or card.source.endswith(card.quantization.method) else f"-{card.quantization.method}"
    model = place.model_path if place else (card.source if "/" in card.source and not made else f"{card.name}{made}")
    found = [Argument(flag="", value=model, why="the checkpoint")]
    if place:
        found += [
            Argument(flag="--served-model-name", value=place.served_model_name, why="the name clients ask for"),
            Argument(flag="--host", value=place.host, why="the address the server listens on"),
            Argument(flag="--port", value=str(place.port), why="the port the server listens on"),
            Argument(flag="--middleware", value=API_KEYS, why="asks for an API key of a file; a key comes and goes without a restart"),
        ]
        if knobs.version(inputs.vllm_version) >= knobs.version(DRAINS_SINCE):
            found.append(
                Argument(
                    flag="--shutdown-timeout",
                    value=str(drain_s(inputs.load, inputs.limits)),
                    why="seconds that a stop waits for open requests, which end whole; by default they are aborted at once",
                )
            )
    for name, knob in inputs.knobs.items():
        value = knob.value
        if name == "kv_cache_memory_bytes" and value == "auto":
            value = pool_bytes
            if value <= 0:
                continue
        pair = knobs.tokens_of(name, value)
        if pair is None:
            continue
        flag, text = pair
        words = text.split() if text and name in _LISTS else [text]
        found.append(Argument(flag=flag, value=words[0], why=knob.why))
        if name == "kv_cache_memory_bytes" and "gpu_memory_utilization" not in inputs.knobs and inputs.device.kind == "cuda":
            found.append(startup_check(inputs.device, memory))
        found += [Argument(flag="", value=w, why="") for w in words[1:]]
    return tuple(found)


_SERVER_ONLY = ("--served-model-name", "--host", "--port", "--middleware", "--shutdown-timeout")
"""Of the API server, which runs on the first host alone."""


def nodes_of(inputs: Inputs, arguments: tuple[Argument, ...], service: ServiceLimits) -> tuple[Node, ...]:
    """How each host of a server that spans several is started, by vLLM's own multi-node mode; empty for one host.

    0.32.0, cli/serve.py and multiproc_executor.py: the first host has the API server, the scheduler and its own workers; the others run
    `--headless`, with every setting of the engine alike. They meet at the first one's address and port.
    """
    if inputs.hosts == 1:
        return ()
    place = inputs.deploy
    addresses = place.nodes if place and place.nodes else tuple(f"node-{n}" for n in range(inputs.hosts))
    port = place.master_port if place else Deploy.model_fields["master_port"].default
    found = []
    for rank, address in enumerate(addresses):
        own = [
            Argument(flag="--distributed-executor-backend", value="mp", why="vLLM's own processes on each host, without Ray"),
            Argument(flag="--nnodes", value=str(inputs.hosts), why="hosts of this server"),
            Argument(flag="--node-rank", value=str(rank), why="this host's place among them; stages are dealt in this order"),
            Argument(flag="--master-addr", value=addresses[0], why="the first host, where the others meet it"),
            Argument(flag="--master-port", value=str(port), why="its port; it listens for as long as the server runs"),
        ]
        if rank:
            own.append(Argument(flag="--headless", why="workers only: the first host has the API server and the scheduler"))
        names = (
            {"VLLM_HOST_IP": Knob(value=address, why="the address by which the other hosts reach this one")}
            if place and place.nodes
            else {}
        )
        if not rank:
            why = "how long the API server waits for the engine, the other hosts' start in it (default 600): as long as the unit may take"
            names["VLLM_ENGINE_READY_TIMEOUT_S"] = Knob(value=str(service.timeout_start_s), why=why)
        if place and place.interface:
            names["NCCL_SOCKET_IFNAME"] = Knob(value=place.interface, why="stages hand over through this network")
            names["GLOO_SOCKET_IFNAME"] = Knob(value=place.interface, why="the same for what goes beside it")
        kept = arguments if not rank else tuple(a for a in arguments if a.flag not in _SERVER_ONLY)
        more = tuple(EnvironmentVariable(name=n, value=str(k.value), why=k.why) for n, k in names.items())
        found.append(Node(rank=rank, address=address, arguments=(*kept, *own), environment=(*environment_of(inputs, inputs.device), *more)))
    return tuple(found)


def stages_of(engine: Engine, device: Device, stages: Sequence[tuple[Part, CardMemory]]) -> tuple[Stage, ...]:
    """One card of each pipeline stage; empty where there is one stage, which the plan itself describes."""
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


def pipeline_of(inputs: Inputs, engine: Engine, stages: Sequence[tuple[Part, CardMemory]], speed: Latency) -> Pipeline | None:
    """What passes between the stages at the load, and what the link must be; None for one stage."""
    if engine.pp == 1:
        return None
    card, device, load, link = inputs.card, inputs.device, inputs.load, inputs.link
    together = min(load.clients, engine.max_num_seqs)
    hop = hops(card, engine, device, link, together)
    token = hop_bytes_per_token(card, engine)
    one = load.model_copy(update={"clients": 1})
    needs = link_needs(card, engine, device, stages, load, inputs.limits, link) if link else (None, None)
    return Pipeline(
        network=link,
        bytes_per_token=token,
        bytes_per_decode_step=token * together,
        bytes_per_prefill_step=token * min(engine.max_num_batched_tokens, load.input_tokens),
        hop_floor_ms=round(hop.floor, 4),
        hop_ms=round(hop.expected, 4),
        idle_share_one_client=round(idle_share(card, engine, device, stages, one, link), 4),
        idle_share=round(idle_share(card, engine, device, stages, load, link), 4),
        least_gb_per_s=needs[0],
        most_round_trip_us=needs[1],
    )


def startup_check(device: Device, memory: CardMemory) -> Argument:
    """vLLM refuses to start unless utilization x total is free, even with the pool set in bytes (v1/worker/utils.py, request_memory)."""
    need = math.ceil(10_000 * (memory.peak - memory.before_start) / (device.torch_total_mib * MIB)) / 10_000
    return Argument(
        flag="--gpu-memory-utilization",
        value=f"{min(1.0, max(0.0001, need)):.4f}",
        why="only the start-up check: this share of the card must be free; the pool is set in bytes",
    )


API_KEYS = "lowmem.api_keys.ApiKeys"

_LISTS = ("cudagraph_capture_sizes", "cpu_offload_params", "offload_params")


def environment_of(inputs: Inputs, device: Device) -> tuple[EnvironmentVariable, ...]:
    """The service's environment: what every deployment needs, then the profile's."""
    always = {
        "HF_HUB_OFFLINE": Knob(value="1", why="serve the local checkpoint only; never download while starting"),
        "VLLM_NO_USAGE_STATS": Knob(value="1", why="no usage report leaves the host"),
        "DO_NOT_TRACK": Knob(value="1", why="the same for libraries that heed it"),
    }
    return tuple(EnvironmentVariable(name=n, value=str(k.value), why=k.why) for n, k in {**always, **inputs.environment}.items())


DRAINS_SINCE = "0.32.0"
"""The version whose source was read: API server and engine finish what they have and refuse what is new (v1/engine/core.py)."""

RELEASE_S = 30
"""After the last request, for workers to end and give their memory back; 3 to 4 s were seen."""


def drain_s(load: Load, limits: Limits) -> int:
    """Seconds in which a request of the plan's load ends, by the plan's own limits."""
    return math.ceil((limits.ttft_p99_ms + load.output_tokens * limits.tpot_p99_ms) / 1000)


def service_limits(engine: Engine, device: Device, host: Mapping[str, int], card: ModelCard, load: Load, limits: Limits) -> ServiceLimits:
    """What the service manager is told: time to start by checkpoint size, RAM with a quarter of headroom (half for pinned buffers)."""
    read_s = stored_bytes(card) / 200e6  # a slow disk
    return ServiceLimits(
        timeout_start_s=int(300 + read_s + (0 if engine.eager else 300)),  # seen: 50 s of compiling, 126 s of kernels made at first use
        timeout_stop_s=drain_s(load, limits) + RELEASE_S,
        drain_s=drain_s(load, limits),
        memory_max_bytes=math.ceil((sum(host.values()) * 1.25 + host.get("pinned_offload", 0) * 0.25) / MIB) * MIB,
        memlock="infinity" if engine.offload != "none" or engine.kv_offload_bytes or device.kind == "cuda" else "default",
    )


# ---------------------------------------------------------------- alternatives


def alternatives(inputs: Inputs, names: Sequence[str] | None = None) -> list[Plan]:
    """Plans of the other profiles for the same model and device, with the same load where it fits the profile, best first."""
    found = []
    for name in names or profiles.names():
        if name == inputs.profile.name:
            continue
        try:
            p = profiles.load_profile(name)
            if p.hosts > inputs.hosts:
                continue  # who has one host is not helped by a recipe for two
            if devices.load_device(p.device).kind != inputs.device.kind:
                continue
            for count in sorted({inputs.count, p.device_count}):
                try:
                    plan = compute(
                        gather(
                            p, inputs.base, inputs.device, count, None, clients=inputs.load.clients, input_tokens=inputs.load.input_tokens,
                            output_tokens=inputs.load.output_tokens, vllm_version=inputs.vllm_version,
                        )
                    )  # fmt: skip
                except BadInput:
                    continue
                found.append(plan)
        except BadInput:
            continue
    return sorted(found, key=lambda q: _rank(q, inputs))


def _rank(plan: Plan, inputs: Inputs) -> tuple[object, ...]:
    order = {"fits": 0, "slow": 1, "impossible": 2}
    return (
        order[plan.verdict],
        plan.peak_bytes > inputs.limits.memory_bytes,
        plan.device_count != inputs.count,
        plan.latency_ms.decode_expected,
    )


def nearest(inputs: Inputs, plan: Plan) -> tuple[str, str] | None:
    """The profile to use instead, and a sentence about it; None when no profile does better."""
    better = {"impossible": ("fits", "slow"), "slow": ("fits",), "fits": ()}[plan.verdict]
    for other in alternatives(inputs):
        if other.verdict in better:
            cards_ = f"{other.device_count} card{'s' if other.device_count > 1 else ''}"
            cards_ += " of one host" if inputs.hosts > other.hosts == 1 else ""
            return other.profile, (
                f"nearest: profile {other.profile} {'fits' if other.verdict == 'fits' else 'starts but is slow'} on {cards_} at "
                f"{mib(other.peak_bytes)} a card, "
                f"{other.latency_ms.decode_expected:.0f} ms a token expected"
            )
    return None
