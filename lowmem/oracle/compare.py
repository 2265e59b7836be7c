"""Compares what a plan counts with what vLLM's own classes say."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.oracle.question import Answer
from lowmem.schema import Plan

TOLERANCE = 0.01
"""Share by which a term may differ; beyond it the plan counted another model than the engine loads."""


@dataclass(frozen=True)
class Term:
    """Quantity of the plan beside the engine's, in bytes; a share of `whole` counts as the difference."""

    name: str
    planned: int
    engine: int
    whole: int

    @property
    def difference(self) -> float:
        """Return the difference as a share: 0.02 is two per cent."""
        return abs(self.planned - self.engine) / max(self.whole, 1)

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE


def terms(plan: Plan, answer: Answer) -> list[Term]:
    """List the terms that both know. Buffers count as a share of all that the model registers."""
    found = []
    if plan.checkpoint is not None:
        planned, whole = plan.checkpoint, answer.parameter_bytes + answer.buffer_bytes
        parameters = answer.parameter_bytes
        found += [
            Term("checkpoint.parameter_bytes", planned.parameter_bytes, parameters, parameters),
            Term("checkpoint.buffer_bytes", planned.buffer_bytes, answer.buffer_bytes, whole),
        ]
    # a stage of a pipeline has its own layers in its pool; the engine was asked for all of them
    if plan.kv_cache is not None and plan.pipeline_parallel_size == 1:
        cache, own = plan.kv_cache, answer.kv_cache
        block, request = (own.bytes_per_block, own.bytes_per_request) if own else (0, 0)
        found += [
            Term("kv_cache.bytes_per_block", cache.bytes_per_block, block, block),
            Term("kv_cache.bytes_per_request", cache.bytes_per_request, request, request),
        ]
    return found


def problem(term: Term) -> str:
    """Say a difference in one line, with both numbers."""
    return (
        f"{term.name} is {term.planned:,} in the plan and {term.engine:,} in vLLM's own classes,"
        f" {term.difference:.1%} apart (the limit is {TOLERANCE:.0%}): the plan counts another model than"
        " the engine would load; report it with the checkpoint's config.json"
    )
