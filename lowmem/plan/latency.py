"""Composes the latency of a load from the steps of its engine, in milliseconds, with pure functions."""

from __future__ import annotations

import math
from dataclasses import replace

from lowmem.plan.calibration import constant
from lowmem.plan.steps import StepModel
from lowmem.schema import Latency, Limits, Link


def latency(steps: StepModel) -> Latency:
    """Compute decode time per token at the load's concurrency, and prefill time per prompt, in milliseconds.

    With speculation a step gives a request several tokens; what its neighbours' prompts cost stays.
    The prefill time is the time to the first token of a lone request. With pipeline stages a token passes all
    of them in a row, and a request's next token waits for its last. So a pipeline adds room and no speed. The
    expectation has all decoding requests in one step. The floor takes the better of that and an even split
    between the steps in flight.
    """
    engine, load, together = steps.engine, steps.load, steps.together
    tokens = steps.decode_tokens
    steady, mixed = steps.slot(tokens), steps.slot(steps.mixed_tokens)
    # While a request decodes, each other client's prompt passes once: those steps take as long as a chunk.
    interference = (
        constant("latency", "interference_share")
        * (together - 1)
        * steps.chunks
        * max(0.0, mixed - steady)
        / load.output_tokens
    )
    first, last = steps.through(tokens), steps.through(steps.mixed_tokens)
    decode, prefill = first / steps.accepted + interference, (steps.chunks - 1) * mixed + last
    queue = math.ceil(load.clients / together) - 1  # rounds that the last client waits for others to end
    work = [steps.work(s, tokens, together) for s in steps.stages]
    terms = {
        **{key: sum(t[key] for t in work) for key in work[0]},
        "all_reduce": sum(steps.all_reduces(s, tokens) for s in steps.stages),
        "launches": sum(steps.launches(s) for s in steps.stages),
        "step": steps.fixed,
        "prefill_interference": interference,
        "steady_step": first,
        "chunk_step": mixed,
        "ttft_all_at_once": (
            (steps.chunks * together - 1) * mixed + last + queue * decode * load.output_tokens
        ),
    }
    if engine.speculation:
        terms["accepted_tokens"] = steps.accepted
    if engine.pp > 1:
        terms |= {"network": steps.hops(together).expected, "slot_step": steady}
    splits = range(1, min(engine.pp, together) + 1)
    return Latency(
        decode_floor=round(min(steps.decode_floor(n) for n in splits), 4),
        decode_expected=round(decode, 4),
        prefill_floor=round(max(steps.prefill_floor(s) for s in steps.stages) + steps.hops(1).floor, 4),
        prefill_expected=round(prefill, 4),
        terms={k: round(v, 4) for k, v in terms.items()},
    )


def needed_acceptance(steps: StepModel, limit_ms: float) -> tuple[float, float | None]:
    """Return the acceptance below which speculation loses, and the one that meets a limit of ms a token.

    Both are mean tokens a step. The second is None if even every draft accepted would not do.
    """
    speed = latency(steps).terms
    plain = replace(steps, engine=replace(steps.engine, speculation=None))
    even = speed["steady_step"] / latency(plain).terms["steady_step"]
    room = limit_ms - speed["prefill_interference"]
    needed = speed["steady_step"] / room if room > 0 else math.inf
    return even, max(1.0, needed) if needed <= steps.engine.rows else None


def idle_share(steps: StepModel) -> float:
    """Return the share of a decode step in which a card waits for the other stages and the network.

    All clients of the load are in one batch.
    """
    terms = latency(steps).terms
    busy = (terms["steady_step"] - terms["network"] - terms["step"]) / steps.engine.pp
    return 1 - busy / terms["steady_step"]


def link_needs(steps: StepModel, link: Link, limits: Limits) -> tuple[float | None, float | None]:
    """Return the link that meets both latency limits.

    The first figure is the least bandwidth in GB/s at this round trip. The second is the longest round trip
    in us at this bandwidth. None means that no value is enough. Both are rounded to three digits, to the side
    that meets the limits.
    """

    def meets(changed: Link) -> bool:
        changed_latency = latency(replace(steps, link=changed))
        return (
            changed_latency.decode_expected <= limits.tpot_p99_ms
            and changed_latency.terms["ttft_all_at_once"] <= limits.ttft_p99_ms
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
