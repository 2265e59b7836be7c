"""Finds the largest load that a plan takes: context, clients, throughput, and the least memory limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lowmem.errors import BadInput
from lowmem.plan.compute import compute
from lowmem.plan.goals import Choice, Goal, Search, find, fulfilled, kv_types_of
from lowmem.plan.request import NO_LIMIT_MS, Inputs
from lowmem.plan.verdict import ceiling
from lowmem.schema import Knob, Limits, Load, Plan, Scalar
from lowmem.units import MIB

CONTEXT_GRAIN = 16
"""Tokens: the block of most KV caches."""

LIMIT_GRAIN = 64 * MIB

MOST_SEATS = 1024
"""Requests decoded together; the engine's default on large cards."""

AIMS = ("requests", "context", "throughput")


def largest(does: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest number from `low` to `high` that does, where each smaller one does too.

    None means that not even `low` does.
    """
    if high < low or not does(low):
        return None
    if does(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does(middle) else (low, middle)
    return low


def _fits(inputs: Inputs) -> bool:
    try:
        return compute(inputs).verdict == "fits"
    except BadInput:
        return False


def _with(inputs: Inputs, knobs: dict[str, int], **changes: object) -> Inputs:
    """Return the inputs with other numbers for knobs that are set, each no larger than before."""
    changed = dict(inputs.knobs)
    for name, value in knobs.items():
        old = changed[name].value if name in changed else None
        if isinstance(old, int) and value < old:
            changed[name] = Knob(value=value, why=changed[name].why)
    return replace(inputs, knobs=changed, **changes)  # type: ignore[arg-type]


def shorter(inputs: Inputs, tokens: int) -> Inputs:
    """Return the inputs for requests of so many tokens, prompt and answer."""
    load = inputs.load.model_copy(update={"input_tokens": tokens - inputs.load.output_tokens})
    return _with(inputs, {"max_model_len": tokens}, load=load)


def fewer(inputs: Inputs, clients: int) -> Inputs:
    """Return the inputs for so many clients."""
    load = inputs.load.model_copy(update={"clients": clients})
    return _with(inputs, {"max_num_seqs": clients}, load=load)


def further(known: int | None, does: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest number from `low` to `high` that does, where `known` is the largest of fewer means.

    Where the next number does not, that one question is enough.
    """
    good = low - 1 if known is None else known
    if good >= high or not does(good + 1):
        return known
    return largest(lambda n: n == good + 1 or does(n), good + 1, high)


def would_do(inputs: Inputs, goal: Goal | None = None) -> str:
    """Name the longest request, the most clients and the least limit that a refused plan would fit with.

    Each is alone, with all else as asked; a `goal` is searched again for each, so that other settings count.
    The sentence is empty if none of them is enough.
    """
    load, found = inputs.load, list[str]()
    whole = load.input_tokens + load.output_tokens
    first, last = -(-(load.output_tokens + 1) // CONTEXT_GRAIN), (whole - 1) // CONTEXT_GRAIN
    blocks = largest(lambda n: _fits(shorter(inputs, n * CONTEXT_GRAIN)), first, last)
    clients = largest(lambda n: _fits(fewer(inputs, n)), 1, load.clients - 1)
    if goal is not None:
        asked = goal

        def at(amount: int, aim: str) -> bool:
            return fulfilled(asked.with_load(loaded(asked.load, amount, aim)))

        blocks = further(blocks, lambda n: at(n * CONTEXT_GRAIN, "context"), first, last)
        clients = further(clients, lambda n: at(n, "requests"), 1, load.clients - 1)
    if blocks is not None:
        tokens = blocks * CONTEXT_GRAIN
        found.append(
            f"requests of {tokens:,} tokens ({tokens - load.output_tokens:,} + {load.output_tokens:,})"
        )
    if clients is not None:
        found.append(f"{clients:,} client{'s' if clients > 1 else ''}")
    limit = least_limit(inputs, goal)
    if limit is not None:
        found.append(f"a limit of {limit // MIB:,} MiB a card")
    return f"would do, each alone: {'; '.join(found)}" if found else ""


def least_limit(inputs: Inputs, goal: Goal | None = None) -> int | None:
    """Return the least memory limit that the plan fits with, in bytes, above the one that was asked for.

    A `goal` is searched again for it, so that other settings count.
    """
    now = ceiling(inputs.device, inputs.limits)
    most = ceiling(inputs.device, Limits(memory_bytes=2**60, tpot_p99_ms=1, ttft_p99_ms=1))
    if now >= most:
        return None

    def within(steps: int) -> Limits:
        bytes_ = min(most, now + (top - steps) * LIMIT_GRAIN)
        return inputs.limits.model_copy(update={"memory_bytes": bytes_})

    top = -(-(most - now) // LIMIT_GRAIN)
    spared = largest(lambda n: _fits(replace(inputs, limits=within(n))), 0, top - 1)
    if goal is not None:
        asked = goal
        spared = further(spared, lambda n: fulfilled(replace(asked, limits=within(n))), 0, top - 1)
    return None if spared is None else min(most, now + (top - spared) * LIMIT_GRAIN)


@dataclass(frozen=True)
class Extreme:
    """Largest load of one family of settings, by the aim that was asked for."""

    choice: Choice
    amount: float  # requests, tokens of a request, or tokens a second


def throughput(plan: Plan) -> float:
    """Return the tokens a second that a plan expects of all its clients together."""
    together = min(plan.load.clients, plan.max_num_seqs, max(1, plan.max_requests))
    return together / plan.latency_ms.decode_expected * 1e3


def maximized(goal: Goal, aim: str) -> list[Extreme]:
    """Find the most requests, the longest context or the most tokens a second within the limits.

    Each format of 4 bits or more and each KV type is tried on all cards, the best first. Raises BadInput for
    another aim.
    """
    if aim not in AIMS:
        raise BadInput(f"--maximize {aim!r} is not one of {', '.join(AIMS)}")
    search, found = Search(goal), list[Extreme]()
    for weights in goal.formats:
        for cards in goal.splits[-1:]:
            for kv_type in goal.kv_types:
                extreme = _extreme(search, weights, cards, kv_type, aim)
                if extreme is not None and (extreme.choice.bits >= 4 or len(goal.formats) == 1):
                    found.append(extreme)
    return sorted(found or _in_ram(search, aim), key=lambda e: (-e.amount, e.choice.rank))


def _in_ram(search: Search, aim: str) -> list[Extreme]:
    """Return the largest load of the settings that keep a part of the weights in RAM, if a goal needs one."""
    choice = find(search.goal).choice
    if not choice.fits or not choice.offloaded:
        return []
    share = {"cpu_offload_gb": choice.knobs["cpu_offload_gb"]} if "cpu_offload_gb" in choice.knobs else {}
    cards = choice.plan.tensor_parallel_size
    extreme = _extreme(search, choice.weights, cards, choice.kv_type, aim, share)
    return [] if extreme is None else [extreme]


def _extreme(
    search: Search, weights: str, cards: int, kv_type: str, aim: str, more: Mapping[str, Scalar] | None = None
) -> Extreme | None:
    goal, made = search.goal, dict[int, Choice]()

    def at(amount: int) -> bool:
        load = loaded(goal.load, amount, aim)
        knobs = {**search.knobs(cards, kv_type, goal.steps[0], load), **(more or {})}
        choice = search.tried(weights, knobs, None, load)
        if choice is not None and choice.fits:
            made[amount] = choice
        return amount in made

    if aim == "context":
        grains = goal.card.max_position_embeddings // CONTEXT_GRAIN
        first = -(-(goal.load.output_tokens + 1) // CONTEXT_GRAIN)
        most = largest(lambda n: at(n * CONTEXT_GRAIN), first, grains)
        return None if most is None else Extreme(made[most * CONTEXT_GRAIN], most * CONTEXT_GRAIN)
    most = largest(at, 1, MOST_SEATS)
    if most is None:
        return None
    if aim == "requests":
        return Extreme(made[most], most)
    for clients in (2**n for n in range(most.bit_length())):
        at(clients)
    best = max(made.values(), key=lambda c: throughput(c.plan))
    return Extreme(best, throughput(best.plan))


def loaded(load: Load, amount: int, aim: str) -> Load:
    """Return the load with so many clients, or with requests of so many tokens."""
    if aim == "context":
        return load.model_copy(update={"input_tokens": amount - load.output_tokens})
    return load.model_copy(update={"clients": amount})


@dataclass(frozen=True)
class Capacity:
    """Requests that fit at once, by KV type and by tokens of a request. 0: not one."""

    contexts: tuple[int, ...]
    requests: dict[str, tuple[int, ...]]
    limit_bytes: int


def contexts_of(positions: int) -> tuple[int, ...]:
    """List the contexts of a table: powers of two from 1,024, and the model's longest."""
    powers = [1 << n for n in range(10, 24) if 1 << n < positions]
    return (*powers, positions)


def capacity_of(inputs: Inputs, kv_type: str | None = None) -> Capacity:
    """Count the requests that the memory limit holds at each context, for each KV type or the one given.

    Each count is a plan of its own, with seats for as many requests. Latency is no part of it.
    """
    limits = inputs.limits.model_copy(update={"tpot_p99_ms": NO_LIMIT_MS, "ttft_p99_ms": NO_LIMIT_MS})
    free = replace(inputs, limits=limits)
    contexts = contexts_of(inputs.card.max_position_embeddings)
    kv_types = (kv_type,) if kv_type is not None else kv_types_of(inputs.device)
    rows = {kv: tuple(_requests(free, kv, n) for n in contexts) for kv in kv_types}
    rows = {kv: row for kv, row in rows.items() if any(row)}
    return Capacity(contexts, rows, ceiling(inputs.device, inputs.limits))


def _requests(inputs: Inputs, kv_type: str, tokens: int) -> int:
    """Count the requests of so many tokens that fit; the seats of the engine follow their number."""
    seats = MOST_SEATS
    for _ in range(12):
        plan = _seated(inputs, kv_type, tokens, seats)
        if plan is None or plan.verdict == "impossible":
            fitting = 0
        elif plan.max_requests >= seats:
            return seats
        else:
            fitting = plan.max_requests
        # too many seats take the pool's own room: with fewer of them more requests may fit
        seats = min(seats - 1, fitting) if fitting > seats // 2 else seats // 2
        if seats < 1:
            return 0
    return seats


def _seated(inputs: Inputs, kv_type: str, tokens: int, seats: int) -> Plan | None:
    answer = min(inputs.load.output_tokens, tokens // 2)
    load = inputs.load.model_copy(
        update={"clients": seats, "input_tokens": tokens - answer, "output_tokens": answer}
    )
    step = inputs.knobs["max_num_batched_tokens"].value if "max_num_batched_tokens" in inputs.knobs else 2048
    wanted = {
        "max_model_len": tokens,
        "max_num_seqs": seats,
        "max_num_batched_tokens": max(int(step), seats),
        "kv_cache_dtype": kv_type,
    }
    knobs = {**inputs.knobs, **{k: Knob(value=v, why="capacity") for k, v in wanted.items()}}
    try:
        return compute(replace(inputs, load=load, knobs=knobs))
    except BadInput:
        return None
