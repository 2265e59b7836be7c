"""Searches the settings that meet the limits, and how memory trades against latency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards, profiles
from lowmem.plan.compute import compute
from lowmem.plan.goals import Choice, Goal, families
from lowmem.plan.knobs import flag_of
from lowmem.plan.request import Inputs, PlanRequest, gather
from lowmem.schema import Limits, Load, ModelCard, Plan, Profile, Quantization, Scalar
from lowmem.units import GIB, MIB, mib


def alternatives(inputs: Inputs) -> list[Plan]:
    """Plan the other profiles for the same model, device and load; best first.

    A profile that cannot take the load is left out.
    """
    plans = []
    for name in profiles.names():
        if name == inputs.profile.name:
            continue
        try:
            p = profiles.load_profile(name)
            if p.hosts > inputs.hosts or is_for_another(p, inputs.base):
                continue  # a recipe for more hosts does not help
            if devices.load_device(p.device).kind != inputs.device.kind:
                continue
            for count in sorted({inputs.count, p.device_count}):
                try:
                    request = PlanRequest(
                        p,
                        inputs.base,
                        inputs.device,
                        count,
                        clients=inputs.load.clients,
                        input_tokens=inputs.load.input_tokens,
                        output_tokens=inputs.load.output_tokens,
                        vllm_version=inputs.vllm_version,
                        weights=inputs.weights,
                    )
                    plan = compute(gather(request))
                except BadInput:
                    continue
                plans.append(plan)
        except BadInput:
            continue
    return sorted(plans, key=lambda q: _rank(q, inputs))


def is_for_another(profile: Profile, card: ModelCard) -> bool:
    """Tell whether a profile was written for a published checkpoint that is not this one."""
    entry = model_cards.builtin().get(profile.model.lower())
    published = entry is not None and "quantization_config" in entry["config"]
    return published and entry is not None and entry["name"] != card.name


def _rank(plan: Plan, inputs: Inputs) -> tuple[object, ...]:
    order = {"fits": 0, "slow": 1, "impossible": 2}
    return (
        order[plan.verdict],
        plan.peak_bytes > inputs.limits.memory_bytes,
        plan.device_count != inputs.count,
        plan.latency_ms.decode_expected,
    )


def nearest(inputs: Inputs, plan: Plan) -> tuple[str, str] | None:
    """Return the profile to use instead, and a sentence about it; None if no profile does better."""
    better = {"impossible": ("fits", "slow"), "slow": ("fits",), "fits": ()}[plan.verdict]
    for other in alternatives(inputs):
        if other.verdict in better:
            cards_ = f"{other.device_count} card{'s' if other.device_count > 1 else ''}"
            cards_ += " of one host" if inputs.hosts > other.hosts == 1 else ""
            return (
                other.profile,
                (
                    f"nearest: profile {other.profile}"
                    f" {'fits' if other.verdict == 'fits' else 'starts but is slow'} on {cards_} at"
                    f" {mib(other.peak_bytes)} a card, {other.latency_ms.decode_expected:.0f} ms a token"
                    f" expected; it changes {', '.join(changes(plan, other))}"
                ),
            )
    return None


_OF_THE_POOL = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
"""Arguments that follow from the others: the plan works them out."""


def changes(plan: Plan, other: Plan) -> list[str]:
    """Name everything that an operator would get otherwise: cards, weights, limits and arguments."""
    pairs = [
        ("cards", str(plan.device_count * plan.hosts), str(other.device_count * other.hosts)),
        ("weights", _weights(plan), _weights(other)),
        ("memory limit", mib(plan.limits.memory_bytes), mib(other.limits.memory_bytes)),
        ("ms a token allowed", f"{plan.limits.tpot_p99_ms:g}", f"{other.limits.tpot_p99_ms:g}"),
        ("ms to the first token allowed", f"{plan.limits.ttft_p99_ms:g}", f"{other.limits.ttft_p99_ms:g}"),
    ]
    old, new = ({a.flag: a.value or "on" for a in p.arguments if a.flag} for p in (plan, other))
    knobs = {flag_of(name) for name in load_yaml("knobs.yml")} - {*_OF_THE_POOL}
    flags = [f for f in (*old, *(f for f in new if f not in old)) if f.replace("--no-", "--") in knobs]
    pairs += [(flag, old.get(flag, "not set"), new.get(flag, "not set")) for flag in flags]
    return [f"{name} {before} -> {after}" for name, before, after in pairs if before != after] or ["nothing"]


def _weights(plan: Plan) -> str:
    q = plan.quantization
    stored = "16-bit" if q.method == "none" else f"{q.method} {q.bits}-bit"
    return f"{stored} ({plan.weights})"


# Bits, group size and method a checkpoint can have, best quality first. docs/planning.md states their
# perplexities; the search does not compute with them.
WEIGHTS: tuple[tuple[str, Quantization], ...] = (
    ("16-bit", Quantization()),
    ("8-bit", Quantization(method="gptq", bits=8, group_size=128, zero_point=False)),
    ("4-bit", Quantization(method="awq", bits=4, group_size=128, zero_point=True)),
    ("3-bit", Quantization(method="auto-round", bits=3, group_size=128, zero_point=False)),
    ("2-bit", Quantization(method="auto-round", bits=2, group_size=128, zero_point=False)),
)

KV = ("auto", "int8_per_token_head", "int4_per_token_head")


@dataclass(frozen=True)
class Point:
    """Point of the frontier: its knobs and their plan."""

    weights: str
    knobs: dict[str, Scalar]
    plan: Plan

    @property
    def label(self) -> str:
        parts = [self.weights]
        parts += [f"{k}={v}" for k, v in self.knobs.items()]
        return ", ".join(parts)


def _profile(
    quantization: Quantization, limits: Limits, load: Load, count: int, device: str, model: str
) -> Profile:
    return Profile(
        name="suggested",
        summary="",
        device=device,
        device_count=count,
        model=model,
        quantization=quantization,
        limits=limits,
        load=load,
        knobs={},
    )


def _points(
    model: str | ModelCard, device: str, count: int, limits: Limits, load: Load, vllm_version: str
) -> Iterator[Point]:
    """Yield every combination of weight width, cards, KV type and offload share that can be planned."""
    card = model_cards.load_card(model) if isinstance(model, str) else model
    widths = WEIGHTS if card.quantization.method == "none" else (("as stored", card.quantization),)
    request = load.input_tokens + load.output_tokens
    length = min(card.max_position_embeddings, max(2048, 1 << (request - 1).bit_length()))
    for label, quantization in widths:
        group = quantization.group_size
        if group == 128 and any(g.kind == "linear" and g.in_features % 128 for g in card.groups):
            quantization = quantization.model_copy(update={"group_size": 64})
        for tp in (n for n in (1, 2, 4, 8) if n <= count):
            for kv in KV:
                for share in (0.0, 0.25, 0.5, 0.75):
                    knobs: dict[str, Scalar] = {
                        "tensor_parallel_size": tp,
                        "max_model_len": length,
                        "max_num_seqs": min(load.clients, 1024),
                        "max_num_batched_tokens": max(512 if not share else 1024, min(load.clients, 1024)),
                        "kv_cache_memory_bytes": "auto",
                    }
                    if kv != "auto":
                        knobs["kv_cache_dtype"] = kv
                    try:
                        p = _profile(quantization, limits, load, count, device, card.name)
                        asked = PlanRequest(p, card, device, count, knobs, vllm_version=vllm_version)
                        plan = compute(gather(asked))
                        if share:
                            layered = sum(plan.weight_terms[k] for k in ("sharded", "replicated"))
                            knobs = {**knobs, "cpu_offload_gb": round(layered * share / GIB, 1)}
                            plan = compute(gather(replace(asked, overrides=knobs)))
                    except BadInput:
                        continue
                    shown = {
                        k: v
                        for k, v in knobs.items()
                        if k in ("tensor_parallel_size", "kv_cache_dtype", "cpu_offload_gb")
                    }
                    yield Point(label, shown, plan)


def suggestions(goal: Goal) -> list[Choice]:
    """List the settings and the recipes that meet every limit of a goal, best first.

    More bits come before fewer, then a better KV type, fewer cards, and less time a token.
    """
    fitting = [choices[-1] for _, _, choices in families(goal) if choices[-1].fits]
    return sorted([*fitting, *recipes(goal)], key=lambda c: c.rank)


def recipes(goal: Goal) -> list[Choice]:
    """Plan each profile of one host for a goal's model, device, load and limits; return those that fit."""
    found = []
    for name in profiles.names():
        profile = profiles.load_profile(name)
        if profile.hosts > 1 or is_for_another(profile, goal.card):
            continue
        if devices.load_device(profile.device).kind != goal.device.kind:
            continue
        for count in sorted({goal.count, min(profile.device_count, goal.count)}):
            if (choice := _recipe(goal, profile, count)) and choice.fits:
                found.append(choice)
    return found


def _recipe(goal: Goal, profile: Profile, count: int) -> Choice | None:
    stored = goal.weights == "stored" or not goal.quantizes
    weights = "stored" if stored else goal.weights or "profile"
    request = PlanRequest(
        profile,
        goal.card,
        goal.device,
        count,
        goal.overrides,
        clients=goal.load.clients,
        input_tokens=goal.load.input_tokens,
        output_tokens=goal.load.output_tokens,
        memory_limit_bytes=goal.limits.memory_bytes,
        tpot_p99_ms=goal.limits.tpot_p99_ms,
        ttft_p99_ms=goal.limits.ttft_p99_ms,
        vllm_version=goal.vllm_version,
        weights=weights,
    )
    try:
        inputs = gather(request)
        plan = compute(inputs)
    except BadInput:
        return None
    knobs = {name: knob.value for name, knob in profile.knobs.items()}
    environment = {name: str(knob.value) for name, knob in profile.environment.items()}
    return Choice(weights, {**knobs, **goal.overrides}, environment, plan, inputs, profile.name)


def frontier(model: str | ModelCard, device: str, count: int, load: Load, vllm_version: str) -> list[Point]:
    """List every distinct point that starts on the device, with the smallest pool that holds the load."""
    from lowmem.inputs.devices import load_device

    total = load_device(device).torch_total_mib * MIB
    limits = Limits(memory_bytes=total, tpot_p99_ms=1e9, ttft_p99_ms=1e9)
    every = _points(model, device, count, limits, load, vllm_version)
    return list({p.label: p for p in every if p.plan.verdict != "impossible"}.values())


def needed_bytes(plan: Plan) -> int:
    """Return the bytes under load with a KV pool of exactly the load's requests.

    This is the point's place on the memory axis.
    """
    if plan.kv_tokens == 0:
        return plan.peak_bytes
    per_token = plan.per_gpu["kv_cache"] / plan.kv_tokens
    request = -(-(plan.load.input_tokens + plan.load.output_tokens) // 16) * 16
    return round(plan.peak_bytes - plan.per_gpu["kv_cache"] + plan.load.clients * request * per_token)


def pareto(points: list[Point], weights: str | None = None) -> list[Point]:
    """Return the points that no other point beats in both memory and time a token, by memory.

    `weights` limits them to one weight width.
    """
    points = [p for p in points if weights in (None, p.weights)]
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (needed_bytes(p.plan), p.plan.latency_ms.decode_expected)):
        if not best or p.plan.latency_ms.decode_expected < best[-1].plan.latency_ms.decode_expected:
            best.append(p)
    return best
