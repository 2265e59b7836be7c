"""Holds a look at a running server against its plan: state, rates, percentiles and memory beside their
limits. Pure functions.

Both the page of `lowmem report --live` and the terminal of `lowmem top` show what is worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lowmem.schema import Plan, Strict
from lowmem.service.watchdog import LONGEST_SILENCE_S
from lowmem.status.metrics import Histogram, Sample, Window, idle_since, window
from lowmem.text import utc
from lowmem.units import MIB

FEWEST = 10
"""Requests that a percentile must stand on to be a finding: of fewer, the p99 is the slowest one. It is shown
all the same.
"""

State = Literal["serving", "starting", "silent", "failing", "down"]


class Look(Strict):
    """Findings of one look at a server and its host."""

    at: float = Field(description="seconds since 1970")
    state: State = Field(
        description=(
            "silent: it listens and does not answer in time; failing: it answers, with an error; down: nobody"
            " listens"
        )
    )
    trouble: str = Field("", description="one line; empty for a server that serves")
    started: float | None = Field(None, description="when its process started, in seconds since 1970")
    sample: Sample | None = None
    memory_bytes: tuple[int, ...] = Field(
        (), description="per GPU; on a CPU one figure, the server's processes. Empty: unknown"
    )
    memory_source: str = Field("", description="where that figure comes from, or why there is none")


class Quantiles(Strict):
    """Milliseconds, interpolated from a histogram; None when nothing was observed."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None


class Status(Strict):
    """Running server beside its plan.

    Figures that only an answering server gives are None or zero otherwise.
    """

    at_utc: str
    state: State
    trouble: str
    findings: tuple[str, ...] = Field(
        description="limits missed now, and what else an operator should look at; empty when all is well"
    )
    model: str
    profile: str
    up_since_utc: str | None
    up_s: float | None
    running: int | None
    waiting: int | None
    running_most: int = Field(description="--max-num-seqs: how many requests the engine computes at once")
    kv_usage: float | None = Field(description="0 to 1")
    kv_tokens: int
    window_s: float | None = Field(
        description="what rates and percentiles are over; None: nothing to compare with yet"
    )
    output_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    requests: float
    tokens_per_step: float | None = Field(
        None, description="with speculative decoding: mean tokens that a step gave a request"
    )
    preemptions: float
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    itl_ms: Quantiles
    ttft_p99_limit_ms: float
    tpot_p99_limit_ms: float
    memory_bytes: tuple[int, ...]
    memory_source: str
    memory_plan_bytes: int = Field(
        description="the plan's peak under load, per GPU or for the server's processes"
    )
    memory_limit_bytes: int

    @property
    def over_plan(self) -> tuple[str, ...]:
        """Say which memory is above the planned peak. Memory above the limit too is a finding instead."""
        several = len(self.memory_bytes) > 1
        return tuple(
            f"memory: {f'GPU {index} is ' if several else ''}{(used - self.memory_plan_bytes) / MIB:,.0f} MiB"
            f" over the planned peak of {self.memory_plan_bytes / MIB:,.0f} MiB, within the limit"
            for index, used in enumerate(self.memory_bytes)
            if self.memory_plan_bytes + MIB <= used <= self.memory_limit_bytes
        )


def quantiles(histogram: Histogram) -> Quantiles:
    def ms(q: float) -> float | None:
        value = histogram.quantile(q)
        return None if value is None else value * 1000

    return Quantiles(count=round(histogram.total), p50=ms(0.5), p90=ms(0.9), p99=ms(0.99))


def at_least(samples: Sequence[Sample], now: float, seconds: float) -> Sample | None:
    """Return the newest of these looks that is `seconds` old, or else the oldest; they come oldest first."""
    old = [sample for sample in samples if sample.at <= now - seconds]
    return old[-1] if old else next(iter(samples), None)


def status(plan: Plan, look: Look, earlier: Sequence[Sample] = (), window_s: float = 300) -> Status:
    """Judge a look. `earlier` holds the looks before it, oldest first.

    Rates and percentiles are over the last `window_s` seconds of them, or else since the server started.
    """
    now = look.sample
    recent = window(now, at_least(earlier, look.at, window_s)) if now else _nothing()
    memory, limit = look.memory_bytes, plan.limits.memory_bytes
    result = Status(
        at_utc=utc(look.at),
        state=look.state,
        trouble=look.trouble,
        findings=(),
        model=plan.deploy.served_model_name if plan.deploy else plan.model,
        profile=plan.profile,
        up_since_utc=utc(look.started) if look.started is not None else None,
        up_s=max(0.0, look.at - look.started) if look.started is not None else None,
        running=now.running if now else None,
        waiting=now.waiting if now else None,
        running_most=plan.max_num_seqs or plan.max_requests,
        kv_usage=now.kv_usage if now else None,
        kv_tokens=now.kv_tokens if now and now.kv_tokens else plan.kv_tokens,
        window_s=recent.seconds,
        output_tokens_per_s=recent.output_tokens_per_s,
        prompt_tokens_per_s=recent.prompt_tokens_per_s,
        requests=recent.requests,
        tokens_per_step=recent.tokens_per_step,
        preemptions=recent.preemptions,
        ttft_ms=quantiles(recent.ttft),
        tpot_ms=quantiles(recent.tpot),
        itl_ms=quantiles(recent.itl),
        ttft_p99_limit_ms=plan.limits.ttft_p99_ms,
        tpot_p99_limit_ms=plan.limits.tpot_p99_ms,
        memory_bytes=memory,
        memory_source=look.memory_source,
        memory_plan_bytes=plan.peak_bytes,
        memory_limit_bytes=limit,
    )
    stuck = idle_since([*earlier, now]) if now else None
    return result.model_copy(
        update={"findings": tuple(_findings(plan, result, look.at - stuck if stuck is not None else 0))}
    )


def _findings(plan: Plan, seen: Status, stuck_s: float) -> list[str]:
    found = []
    if seen.state in ("down", "failing", "silent"):
        found.append(
            f"what to do: docs/runbooks/{'service-hangs' if seen.state == 'silent' else 'service-down'}.md"
        )
    if stuck_s >= LONGEST_SILENCE_S:
        found.append(
            f"engine: {seen.running} requests run and no token has come for {stuck_s:,.0f} s; see"
            " docs/runbooks/service-hangs.md"
        )
    for index, used in enumerate(seen.memory_bytes):
        if used > seen.memory_limit_bytes:
            where = f"GPU {index}" if plan.device_kind == "cuda" else "the server's processes"
            found.append(
                f"memory: {where} {'uses' if plan.device_kind == 'cuda' else 'use'} {used / MIB:,.0f} MiB,"
                f" limit {seen.memory_limit_bytes / MIB:,.0f} MiB"
            )
    for name, quantile, limit in (
        ("TPOT p99", seen.tpot_ms, seen.tpot_p99_limit_ms),
        ("TTFT p99", seen.ttft_ms, seen.ttft_p99_limit_ms),
    ):
        if quantile.p99 is not None and quantile.count >= FEWEST and quantile.p99 > limit:
            found.append(
                f"latency: {name} {quantile.p99:,.1f} ms over {quantile.count:,} requests, limit"
                f" {limit:,.1f} ms"
            )
    even = plan.speculation.break_even_tokens if plan.speculation else 0
    if seen.tokens_per_step is not None and seen.requests >= FEWEST and seen.tokens_per_step < even:
        found.append(
            f"speculation: {seen.tokens_per_step:.2f} tokens a step, and below {even:.2f} it is slower than"
            " without; see docs/runbooks/low-acceptance.md"
        )
    if seen.preemptions > 0:
        found.append(
            f"KV cache: {seen.preemptions:,.0f} preemptions: it was full, and requests were computed again"
        )
    return found


def _nothing() -> Window:
    none = Histogram()
    return Window(
        seconds=None,
        output_tokens=0,
        prompt_tokens=0,
        requests=0,
        preemptions=0,
        ttft=none,
        tpot=none,
        itl=none,
    )
