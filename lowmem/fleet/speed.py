"""Reads the speed of one host from a plan or a receipt."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import BadInput
from lowmem.schema import Plan, Receipt

WARM_SHARE = 0.2
"""Share of the first requests that is not counted, since users do not meet the queue of an empty fleet."""

FULL_SHARE = 0.9
"""Share of a full batch's throughput that a fleet is planned for. Decided, not measured: above it a queue
grows for longer than a simulation runs.
"""


@dataclass(frozen=True)
class Speed:
    """Speed of one host.

    `steps_ms` holds the milliseconds of a step by the number of requests decoded together. `chunk_extra_ms`
    is how much longer a step takes with a whole chunk of a prompt.
    """

    steps_ms: dict[int, float]
    chunk_extra_ms: float
    chunk_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    kv_tokens: int
    async_scheduling: bool

    def step_ms(self, decoding: int, prompt_tokens: int) -> float:
        """Return the milliseconds of one step.

        Between two known batch sizes the time is interpolated linearly; outside them the nearest one counts.
        A shorter chunk costs its share.
        """
        known = sorted(self.steps_ms)
        size = min(max(decoding, known[0]), known[-1])
        above = next(n for n in known if n >= size)
        below = max((n for n in known if n <= size), default=above)
        share = (size - below) / (above - below) if above > below else 0.0
        steady = self.steps_ms[below] + share * (self.steps_ms[above] - self.steps_ms[below])
        return steady + self.chunk_extra_ms * prompt_tokens / self.chunk_tokens


def planned(plan: Plan) -> Speed:
    """Derive the speed that a plan expects.

    A smaller batch saves the reading of its keys and values.
    """
    terms, load = plan.latency_ms.terms, plan.load
    batched = plan.max_num_batched_tokens
    together = min(load.clients, plan.max_num_seqs, plan.max_requests or 1)
    alone = terms["steady_step"] - terms["hbm_kv"] * (1 - 1 / together)
    return Speed(
        steps_ms={1: alone, together: terms["steady_step"]},
        chunk_extra_ms=terms["chunk_step"] - terms.get("slot_step", terms["steady_step"]),
        chunk_tokens=min(batched, load.input_tokens),
        max_num_batched_tokens=batched,
        max_num_seqs=plan.max_num_seqs,
        kv_tokens=plan.kv_tokens,
        async_scheduling=plan.async_scheduling,
    )


def measured(receipt: Receipt) -> Speed:
    """Derive the speed that a receipt measured.

    The median gap between two tokens is a step without a prompt. The first token of a lone request takes its
    prompt's steps. Raises BadInput if no load of one client was measured.
    """
    plan = receipt.plan
    alone = next((r for r in receipt.loads if r.load.clients == 1), None)
    if alone is None:
        raise BadInput(
            "the receipt has no load of one client, which gives the cost of a prompt: measure with"
            " --clients 8,1"
        )
    seats, batched = plan.max_num_seqs, plan.max_num_batched_tokens
    chunk = min(batched, alone.load.input_tokens)
    chunks = alone.load.input_tokens / chunk
    steps = {
        min(r.load.clients, seats): r.itl_ms.p50 for r in sorted(receipt.loads, key=lambda r: -r.load.clients)
    }
    return Speed(
        steps_ms=dict(sorted(steps.items())),
        chunk_extra_ms=alone.ttft_ms.p50 / chunks - steps[1],
        chunk_tokens=chunk,
        max_num_batched_tokens=batched,
        max_num_seqs=seats,
        kv_tokens=plan.kv_tokens,
        async_scheduling=plan.async_scheduling,
    )
