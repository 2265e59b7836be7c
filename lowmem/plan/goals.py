"""Finds the settings of a model on a device that meet a goal: limits and a load, and no profile.

Each candidate is an ordinary plan. The search leaves out what cannot fit by its weights alone, and looks for
the best quality first: weights before KV cache before number of cards before speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards
from lowmem.inputs.profiles import load_profile
from lowmem.plan.compute import compute
from lowmem.plan.engine_config import KV_DTYPES
from lowmem.plan.knobs import checked_all
from lowmem.plan.request import (
    NO_LIMIT_MS,
    WEIGHT_FORMATS,
    Inputs,
    PlanRequest,
    count_of,
    fitting_group,
    gather,
    hosts_of,
    limits_of,
    load_of,
    refuse_requantizing,
    wanted_weights,
)
from lowmem.plan.verdict import ceiling
from lowmem.plan.weights import stored_bytes
from lowmem.schema import Deploy, Device, Knob, Limits, Load, ModelCard, Plan, Profile, Quantization, Scalar
from lowmem.units import GB, GIB, MIB, capability_tuple

DEFAULT_PROFILE = "low_mem"
"""Profile that is planned where neither profile nor model is named."""

STEPS = (512, 2048, 8192)
"""Tokens of a step that are tried: small ones save memory, large ones pass prompts sooner."""

LEAN_STEP = 480
"""Tokens of a step that the custom all-reduce serves in 8 MiB at 8,192 hidden states (profile low_mem)."""

LEAN = {"NCCL_MAX_NCHANNELS": "2"}
"""Variables that save NCCL's buffers on several cards; the custom all-reduce does the work."""

KV_TYPES = ("auto", "fp8", "int8_per_token_head", "int4_per_token_head")
"""KV types, best quality first."""

DRAFTS = '{"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'

FORMATS = ("stored", "gptq-8bit", "compressed-tensors-4bit", "auto-round-3bit", "auto-round-2bit")
"""Weights that are tried for a 16-bit checkpoint, best quality first."""

WHY = {
    "tensor_parallel_size": "cards that share each layer",
    "dtype": "the card has no bfloat16",
    "max_model_len": "the longest request, prompt and answer",
    "max_num_seqs": "requests decoded together: the load's clients",
    "max_num_batched_tokens": "tokens of a step: of those tried, the one that meets the limits fastest",
    "kv_cache_memory_bytes": "the pool the plan computed",
    "kv_cache_dtype": "the best KV type whose pool holds the load",
    "cpu_offload_gb": "the least part of the weights that must stay in RAM",
    "speculative_config": "drafts from the request's own text, at the acceptance that was given",
}


@dataclass(frozen=True)
class Goal:
    """Goal of a search: what the service must do, and what the operator has fixed."""

    card: ModelCard
    device: Device
    count: int
    limits: Limits
    load: Load
    vllm_version: str
    model: str = ""  # as the operator named it; empty: the card's name
    place: str = ""  # the device as the operator named it, such as auto; empty: its name in the table
    weights: str | None = None  # a name of WEIGHTS; None: the search chooses
    quantizes: bool = True  # the search may choose weights that this deployment makes
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    deploy: Deploy | Mapping[str, object] | None = None

    @property
    def formats(self) -> tuple[str, ...]:
        """List the weights to try, best first: as stored, published quantized ones, those to be made."""
        if self.weights is not None:
            return (self.weights,)
        published = model_cards.published_formats(self.model)
        may_quantize = self.card.quantization.method == "none" and self.device.kind == "cuda"
        if not (self.quantizes and may_quantize):
            return ("stored", *published)
        return (*FORMATS[:2], *published, *FORMATS[2:])

    @property
    def splits(self) -> tuple[int, ...]:
        """List the numbers of cards to try."""
        fixed = self.overrides.get("tensor_parallel_size")
        return (int(fixed),) if fixed is not None else tuple(n for n in (1, 2, 4, 8) if n <= self.count)

    @property
    def kv_types(self) -> tuple[str, ...]:
        """List the KV types to try, those that the card has kernels for."""
        fixed = self.overrides.get("kv_cache_dtype")
        return (str(fixed),) if fixed is not None else kv_types_of(self.device)

    @property
    def steps(self) -> tuple[int, ...]:
        """List the sizes of a step to try, each with room for every client's token."""
        fixed = self.overrides.get("max_num_batched_tokens")
        most = max(512, self.load.input_tokens)
        sizes = [n for n in STEPS if n < 2 * most and n >= min(self.load.clients, 1024)]
        return (int(fixed),) if fixed is not None else tuple(sizes) or (1024,)

    def with_load(self, load: Load) -> Goal:
        """Return the same goal for another load."""
        return replace(self, load=load)


def kv_types_of(device: Device) -> tuple[str, ...]:
    """List the KV types of a search that a device has kernels for, best quality first."""
    if device.kind == "cpu":
        return ("auto",)
    capability = capability_tuple(device.capability)
    return tuple(kv for kv in KV_TYPES if kv == "auto" or capability >= capability_tuple(KV_DTYPES[kv][0]))


@dataclass(frozen=True)
class Choice:
    """Candidate of a search: the weights, what was set, and the plan of it."""

    weights: str
    knobs: Mapping[str, Scalar]
    environment: Mapping[str, str]
    plan: Plan
    inputs: Inputs
    profile: str = ""  # the recipe that it is; empty: found by the search

    @property
    def bits(self) -> int:
        """Return the bits of a weight."""
        return self.plan.quantization.bits if self.plan.quantization.method != "none" else 16

    @property
    def kv_type(self) -> str:
        """Return the type of the KV cache, "auto" for that of the activations."""
        return str(self.knobs.get("kv_cache_dtype", "auto"))

    @property
    def offloaded(self) -> bool:
        """Tell whether a part of the weights stays in RAM."""
        return bool(self.plan.weight_terms.get("offloaded"))

    @property
    def fits(self) -> bool:
        """Tell whether every limit is met."""
        return self.plan.verdict == "fits"

    @property
    def rank(self) -> tuple[float, ...]:
        """Return the place in a list: quality first, then fewer cards, then less time a token."""
        return (
            -self.bits,
            kv_rank(self.kv_type),
            self.plan.tensor_parallel_size * self.plan.pipeline_parallel_size,
            self.plan.latency_ms.decode_expected,
        )

    @property
    def preference(self) -> tuple[float, ...]:
        """Return the place in the search.

        Weights in RAM come after 4-bit weights on the card, and before 3 and 2 bits.
        """
        return (self.bits < 4, self.offloaded, *self.rank)


def kv_rank(kv_type: str) -> int:
    """Return the quality of a KV type, 0 for 16 bits."""
    return 2 if "4" in kv_type.split("_")[0] or "turboquant" in kv_type else 1 if "8" in kv_type else 0


@dataclass(frozen=True)
class Found:
    """Result of a search: the choice, what else would do, and why better ones do not."""

    choice: Choice
    others: tuple[Choice, ...]
    why: tuple[str, ...]


DEFAULT_LIMITS = Limits(memory_bytes=1, tpot_p99_ms=200, ttft_p99_ms=NO_LIMIT_MS)
"""Latency limits of a goal that names none: a token each 200 ms is as fast as people read."""


def usual_load(longest: int) -> Load:
    """Return the load of a goal that names none, within the positions of the model."""
    usual = Load()
    if usual.input_tokens + usual.output_tokens <= longest or longest < 2:
        return usual
    answer = max(1, longest // 4)
    return Load(input_tokens=longest - answer, output_tokens=answer)


def goal_of(request: PlanRequest, searched: bool) -> Goal:
    """Turn a request into a goal.

    If it is `searched` without a profile, limits are those of the card and DEFAULT_LIMITS. Raises BadInput
    for what a search cannot take.
    """
    profile = request.profile if isinstance(request.profile, Profile) else load_profile(request.profile)
    device = request.device or profile.device
    found = devices.load_device(device) if isinstance(device, str) else device
    model = request.model or profile.model
    card = model_cards.load_card(model) if isinstance(model, str) else model
    how = wanted_weights(request, card)
    refuse_requantizing(card, how)
    if (request.hosts is not None and hosts_of(request, profile) > 1) or (searched and request.network):
        raise BadInput("a search plans one host: give --profile two_hosts, or leave --hosts out")
    if searched and request.weights == "profile":
        raise BadInput("--weights profile needs --profile, which says the format; name a format or `stored`")
    longest = card.max_position_embeddings
    if searched:
        memory = found.torch_total_mib * MIB
        limits = DEFAULT_LIMITS.model_copy(update={"memory_bytes": memory})
        count = 1 if request.device else profile.device_count
        profile = profile.model_copy(
            update={"limits": limits, "load": usual_load(longest), "device_count": count}
        )
    load = load_of(request, profile)
    if load.input_tokens + load.output_tokens > longest:
        raise BadInput(
            f"input_tokens={load.input_tokens} and output_tokens={load.output_tokens} are together more than"
            f" the {longest} positions of {card.name} (max_position_embeddings); lower one of them"
        )
    return Goal(
        card=card,
        device=found,
        count=count_of(request, profile, found),
        limits=limits_of(request, profile),
        load=load,
        vllm_version=request.vllm_version,
        model=model if isinstance(model, str) else card.name,
        place=device if isinstance(device, str) else "",
        weights=request.weights,
        quantizes=how != "stored",
        overrides=checked_all(request.overrides),
        environment=request.environment,
        deploy=request.deploy,
    )


def profile_of(goal: Goal, knobs: Mapping[str, Scalar]) -> Profile:
    """Write the settings of a candidate as a profile, with the reason of each."""
    return Profile(
        name="goal",
        summary="",
        device=goal.device.name,
        device_count=goal.count,
        model=goal.card.name,
        quantization=Quantization(),
        limits=goal.limits,
        load=goal.load,
        knobs={name: Knob(value=value, why=WHY[name]) for name, value in knobs.items()},
    )


class Search:
    """Plans the candidates of a goal; each format of the weights is counted once."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.card_of = cache(self._card_of)

    def _card_of(self, weights: str, cards: int) -> ModelCard:
        """Return the card of the checkpoint in this format. Raises BadInput if it cannot be made."""
        if weights not in WEIGHT_FORMATS:
            return self.goal.card if weights == "stored" else model_cards.load_card(weights)
        split = {"tensor_parallel_size": Knob(value=cards, why="")}
        wanted = fitting_group(self.goal.card, WEIGHT_FORMATS[weights], split)
        return model_cards.quantized(self.goal.card, wanted)

    def knobs(self, cards: int, kv_type: str, step: int, load: Load) -> dict[str, Scalar]:
        """Return the settings of a candidate."""
        request = load.input_tokens + load.output_tokens
        length = min(self.goal.card.max_position_embeddings, -(-request // 256) * 256)
        seats = min(load.clients, 1024)
        knobs: dict[str, Scalar] = {
            "tensor_parallel_size": cards,
            "max_model_len": max(length, request),
            "max_num_seqs": seats,
            "max_num_batched_tokens": max(step, seats),
            "kv_cache_memory_bytes": "auto",
        }
        if kv_type != "auto":
            knobs["kv_cache_dtype"] = kv_type
        if self.goal.device.kind == "cuda" and capability_tuple(self.goal.device.capability) < (8, 0):
            knobs["dtype"] = "float16"
        return knobs

    def plan(
        self,
        weights: str,
        knobs: Mapping[str, Scalar],
        environment: Mapping[str, str] | None = None,
        load: Load | None = None,
    ) -> Choice | None:
        """Plan a candidate; None if it cannot be planned."""
        goal = self.goal if load is None else replace(self.goal, load=load)
        variables = {**(environment or {}), **goal.environment}
        drafts = "speculative_config" in {**knobs, **goal.overrides}
        if not drafts:
            goal = replace(goal, load=goal.load.model_copy(update={"accepted_tokens": None}))
        asked = PlanRequest(
            profile_of(goal, knobs),
            self.card_of(weights, int(knobs["tensor_parallel_size"])),
            goal.device,
            goal.count,
            goal.overrides,
            goal.deploy,
            environment=variables,
            vllm_version=goal.vllm_version,
            weights="stored",
        )
        inputs = gather(asked)
        return Choice(weights, {**knobs, **goal.overrides}, variables, compute(inputs), inputs)

    def tried(self, *words: object, **more: object) -> Choice | None:
        """Plan a candidate; None if the model or the engine refuses it."""
        try:
            return self.plan(*words, **more)  # type: ignore[arg-type]
        except BadInput:
            return None

    def family(self, weights: str, cards: int) -> list[Choice]:
        """Try the KV types and steps of one format on so many cards; the best is the last.

        It ends at the first KV type that fits. Offload is tried only if none does.
        """
        goal, seen = self.goal, list[Choice]()
        try:
            least = stored_bytes(self.card_of(weights, cards)) / cards
        except BadInput:
            return []
        offload_given = any(name in goal.overrides for name in ("cpu_offload_gb", "offload_group_size"))
        for kv_type in goal.kv_types:
            found = self._best_step(weights, self.knobs(cards, kv_type, goal.steps[0], goal.load))
            if found is None:
                continue
            seen.append(found)
            if found.fits:
                return seen
            if least > ceiling(goal.device, goal.limits) and not offload_given:
                break  # no KV type helps weights that are larger than the limit
        if goal.device.kind == "cuda" and not offload_given and seen:
            seen += self._offloaded(seen[0])
        return sorted(seen, key=_shortfall, reverse=True)

    def _best_step(self, weights: str, knobs: dict[str, Scalar]) -> Choice | None:
        """Return the fastest step that fits; the smallest if none does."""
        best = self.tried(weights, knobs)
        if best is None:
            return None
        short = best.plan.verdict == "impossible" or best.plan.max_requests < int(knobs["max_num_seqs"])
        if short and (lean := self._leaner(weights, knobs)):
            best = lean if _shortfall(lean) < _shortfall(best) else best
        if best.plan.verdict == "impossible":
            return best
        for step in self.goal.steps[1:]:
            other = self.tried(weights, {**knobs, "max_num_batched_tokens": step}, best.environment)
            if other is None or other.plan.verdict == "impossible":
                break
            if (not other.fits, _time(other)) < (not best.fits, _time(best)):
                best = other
        if self.goal.load.accepted_tokens is not None:
            with_drafts = {**best.knobs, "speculative_config": DRAFTS, **self._draft_room(best)}
            drafts = self.tried(weights, with_drafts, best.environment)
            if drafts and (not drafts.fits, _time(drafts)) < (not best.fits, _time(best)):
                best = drafts
        return best

    @staticmethod
    def _draft_room(choice: Choice) -> dict[str, Scalar]:
        """Return a step with room for the drafts of each request."""
        rows = 8 * int(choice.knobs["max_num_seqs"])
        return {"max_num_batched_tokens": max(rows, int(choice.knobs["max_num_batched_tokens"]))}

    def _leaner(self, weights: str, knobs: dict[str, Scalar]) -> Choice | None:
        """Plan the same with NCCL's buffers and steps as small as they pay; None on a single card."""
        step = max(LEAN_STEP, int(knobs["max_num_seqs"]))
        if int(knobs["tensor_parallel_size"]) == 1 or "max_num_batched_tokens" in self.goal.overrides:
            return None
        return self.tried(weights, {**knobs, "max_num_batched_tokens": step}, LEAN)

    def _offloaded(self, whole: Choice) -> list[Choice]:
        """Try to keep the part of the weights in RAM that is too much for the card."""
        goal, found = self.goal, list[Choice]()
        per_gib_ms = GIB / (goal.device.link_gb_per_s * GB) * 1e3
        most = goal.limits.tpot_p99_ms * (goal.load.accepted_tokens or 1)
        for kv_type in goal.kv_types[:2]:
            knobs = self.knobs(int(whole.knobs["tensor_parallel_size"]), kv_type, goal.steps[0], goal.load)
            share = 0.0
            for _ in range(2):
                missing = short_bytes(found[-1] if share and found else whole, goal)
                share += math.ceil(max(missing, 0) / GIB * 10 + 1) / 10
                if share * per_gib_ms > most:  # each step copies it over the link
                    break
                choice = self.tried(whole.weights, {**knobs, "cpu_offload_gb": round(share, 1)})
                if choice is None:
                    break
                found.append(choice)
                if choice.fits:
                    return found
        return found


def _time(choice: Choice) -> float:
    return choice.plan.latency_ms.decode_expected


def _shortfall(choice: Choice) -> tuple[float, ...]:
    """Return how far a candidate is from fitting."""
    order = {"fits": 0, "slow": 1, "impossible": 2}
    return (order[choice.plan.verdict], len(choice.plan.reasons), choice.plan.peak_bytes)


_OF_MEMORY = ("weights:", "kv_cache:", "total:")


def _distance(choice: Choice) -> tuple[float, ...]:
    """Return how far the best of a family is from fitting; quality decides where memory is not the cause."""
    verdict, reasons, peak = _shortfall(choice)
    short = any(reason.startswith(_OF_MEMORY) for reason in choice.plan.reasons)
    return (verdict, reasons if short else 0, peak if short else 0, *choice.rank)


def short_bytes(choice: Choice, goal: Goal) -> int:
    """Return the bytes by which one card is over its ceiling with a pool for the load; negative: room."""
    plan, load = choice.plan, goal.load
    pool = 0
    if plan.kv_cache and plan.max_model_len:
        held = min(load.input_tokens + load.output_tokens, plan.max_model_len)
        together = min(load.clients, plan.max_num_seqs)
        pool = math.ceil(together * plan.kv_cache.bytes_per_request * held / plan.max_model_len)
        pool += plan.kv_cache.bytes_per_block
    return plan.peak_bytes - plan.per_gpu["kv_cache"] + pool - ceiling(goal.device, goal.limits)


def families(goal: Goal) -> Iterator[tuple[str, int, list[Choice]]]:
    """Yield what was tried for each format of the weights and each number of cards, best quality first."""
    search = Search(goal)
    for weights in goal.formats:
        for cards in goal.splits:
            if tried := search.family(weights, cards):
                yield weights, cards, tried


def fulfilled(goal: Goal) -> bool:
    """Tell whether some settings meet a goal."""
    return any(choices[-1].fits for _, _, choices in families(goal))


def find(goal: Goal) -> Found:
    """Find the settings that meet a goal, or those that come nearest.

    Raises BadInput if the model cannot run on the device at all.
    """
    tried = list(families(goal))
    if not tried:
        Search(goal).plan(  # says why
            goal.formats[0], Search(goal).knobs(goal.splits[0], goal.kv_types[0], goal.steps[0], goal.load)
        )
        raise BadInput(f"no setting of {goal.card.name} runs on {goal.count} x {goal.device.name}")
    best = [choices[-1] for _, _, choices in tried]
    fitting = sorted((c for c in best if c.fits), key=lambda c: c.preference)
    if not fitting:
        nearest = min(best, key=_distance)
        return Found(nearest, (), _missed(nearest, tried))
    return Found(fitting[0], tuple(fitting[1:]), _missed(fitting[0], tried))


def _missed(chosen: Choice, tried: list[tuple[str, int, list[Choice]]]) -> tuple[str, ...]:
    """Say why each better candidate was not chosen, a sentence each."""
    said = [f"{'chosen' if chosen.fits else 'closest'}: {described(chosen)}"]
    for weights in dict.fromkeys(w for w, _, _ in tried):
        mine = [choices[-1] for w, _, choices in tried if w == weights]
        if weights != chosen.weights and mine[-1].bits > chosen.bits and not any(c.fits for c in mine):
            said.append(f"not {mine[-1].bits}-bit weights: {mine[-1].plan.reasons[0]}")
    for weights, cards, choices in tried:
        if weights == chosen.weights and cards < chosen.plan.tensor_parallel_size and not choices[-1].fits:
            said.append(f"not {cards} card{'s' if cards > 1 else ''}: {choices[-1].plan.reasons[0]}")
        if weights == chosen.weights and cards == chosen.plan.tensor_parallel_size and len(choices) > 1:
            first = next(c for c in choices if c is not chosen)
            said.append(f"not {described(first)}: {first.plan.reasons[0]}")
    return tuple(dict.fromkeys(said))


def described(choice: Choice) -> str:
    """Describe a candidate in words: weights, cards, KV cache, step and what else it takes."""
    plan = choice.plan
    made = (
        ""
        if choice.weights == "stored"
        else f" as published ({choice.inputs.card.source})"
        if choice.weights not in (*WEIGHT_FORMATS, "profile")
        else ", quantized first by this deployment"
    )
    cards = f"{plan.tensor_parallel_size} card{'s' if plan.tensor_parallel_size > 1 else ''}"
    kv = "16-bit" if choice.kv_type == "auto" else choice.kv_type
    parts = [f"{choice.bits}-bit weights{made}", cards, f"{kv} KV cache"]
    parts.append(f"steps of {plan.max_num_batched_tokens} tokens")
    if "cpu_offload_gb" in choice.knobs and choice.offloaded:
        parts.append(f"{choice.knobs['cpu_offload_gb']} GiB of weights in RAM")
    if plan.speculation:
        parts.append(f"{plan.speculation.drafts} drafts")
    return ", ".join(parts)
