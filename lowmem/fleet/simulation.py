"""Simulates continuous batching, host by host, to find how many hosts meet a load.

A host is as fast as its receipt measured, or as its plan expects. Two figures describe it. The first is the
time of a step by the number of requests decoded together. The second is the extra time of a step that takes a
chunk of a prompt.

The scheduler follows vLLM as far as it decides latency. Decodes come first, then prompts in the order of
their arrival. A step takes at most `max_num_batched_tokens` tokens and `max_num_seqs` requests. No request
starts if its keys and values do not fit the pool.

With async scheduling the engine decides the next step before this one has ended. A request that arrives in
between waits for one step more (0.32.0, v1/engine/core.py, step_with_batch_queue).

A router sends each request to the host with the fewest unfinished ones. Times are milliseconds, and simpy
runs the clock.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import simpy

from lowmem.fleet.speed import FULL_SHARE, WARM_SHARE, Speed


@dataclass
class Request:
    """Request of a simulated client.

    Times are milliseconds of the simulation. `first` and `done` are NaN until the first and the last token
    are there.
    """

    arrived: float
    input_tokens: int
    output_tokens: int
    prompt_left: int = field(init=False)
    made: int = 0
    first: float = math.nan
    done: float = math.nan

    def __post_init__(self) -> None:
        self.prompt_left = self.input_tokens

    @property
    def ttft(self) -> float:
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        return (self.done - self.first) / max(1, self.output_tokens - 1)


class Host:
    """Simulated engine with its queue."""

    def __init__(self, clock: simpy.Environment, speed: Speed) -> None:
        self.clock, self.speed = clock, speed
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._work = clock.event()
        self._ends: dict[int, simpy.Event] = {}
        clock.process(self._run())

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, request: Request) -> simpy.Event:
        """Queue a request, and return an event that fires with its last token."""
        end = self._ends[id(request)] = self.clock.event()
        self.waiting.append(request)
        if not self._work.triggered:
            self._work.succeed()
        return end

    def _admit(self) -> None:
        held = sum(r.input_tokens + r.output_tokens for r in self.running)
        while self.waiting and len(self.running) < self.speed.max_num_seqs:
            held += self.waiting[0].input_tokens + self.waiting[0].output_tokens
            if held > self.speed.kv_tokens:
                return
            self.running.append(self.waiting.popleft())

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            if not len(self):
                self._work = self.clock.event()
                yield self._work
            if not (self.running and self.speed.async_scheduling):
                self._admit()
            batch = list(self.running)
            if self.speed.async_scheduling:
                self._admit()  # admit to the step after this one
            decoding = [r for r in batch if not r.prompt_left]
            budget = self.speed.max_num_batched_tokens - len(decoding)
            chunks: list[tuple[Request, int]] = []
            for request in batch:
                if request.prompt_left and budget > 0:
                    chunks.append((request, min(budget, request.prompt_left)))
                    budget -= chunks[-1][1]
            took = self.speed.step_ms(len(decoding), sum(tokens for _, tokens in chunks))
            yield self.clock.timeout(took)
            for request, tokens in chunks:
                request.prompt_left -= tokens
            for request in (*decoding, *(r for r, _ in chunks if not r.prompt_left)):
                self._token(request)

    def _token(self, request: Request) -> None:
        request.made += 1
        if request.made == 1:
            request.first = self.clock.now
        if request.made == request.output_tokens:
            request.done = self.clock.now
            self.running.remove(request)
            self._ends.pop(id(request)).succeed()


@dataclass(frozen=True)
class Seen:
    """Latencies and throughput that the clients of a simulated fleet saw."""

    requests: int
    tokens_per_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    full_share: float = math.nan


def _seen(requests: list[Request], now_ms: float, left_out: float = 0.0) -> Seen:
    counted = requests[int(len(requests) * left_out) :]
    tpot, ttft = (
        statistics.quantiles(values, n=100, method="inclusive")
        for values in ([r.tpot for r in counted], [r.ttft for r in counted])
    )
    return Seen(
        requests=len(counted),
        tokens_per_s=sum(r.output_tokens for r in requests) / now_ms * 1e3,
        tpot_p50_ms=tpot[49],
        tpot_p99_ms=tpot[98],
        ttft_p50_ms=ttft[49],
        ttft_p99_ms=ttft[98],
    )


@dataclass(frozen=True)
class Arrivals:
    """Requests that come at random times (Poisson), `per_s` of them a second."""

    per_s: float
    requests: int = 1000
    seed: int = 7


def open_loop(
    speed: Speed,
    hosts: int,
    arrivals: Arrivals,
    input_tokens: int,
    output_tokens: int,
    left_out: float = WARM_SHARE,
) -> Seen:
    """Simulate requests that arrive by themselves; each goes to the host with the fewest unfinished ones.

    `left_out` is the share of first requests that is not counted. It is 0 for comparison with a measurement
    from an empty start.
    """
    clock = simpy.Environment()
    fleet = [Host(clock, speed) for _ in range(hosts)]
    rng = random.Random(arrivals.seed)  # noqa: S311 - a simulation
    sent: list[Request] = []

    def arrive() -> Generator[simpy.Event, Any, None]:
        ends = []
        for _ in range(arrivals.requests):
            yield clock.timeout(rng.expovariate(arrivals.per_s) * 1e3)
            sent.append(Request(clock.now, input_tokens, output_tokens))
            ends.append(min(fleet, key=len).submit(sent[-1]))
        yield clock.all_of(ends)

    clock.run(clock.process(arrive()))
    return _seen(sent, clock.now, left_out)


def closed_loop(
    speed: Speed, clients: int, input_tokens: int, output_tokens: int, requests: int, hosts: int = 1
) -> Seen:
    """Simulate clients that send their next request when the last one is answered.

    `lowmem measure` drives a server the same way, so the two can be compared.
    """
    clock = simpy.Environment()
    fleet = [Host(clock, speed) for _ in range(hosts)]
    left = itertools.repeat(None, requests)
    sent: list[Request] = []

    def client() -> Generator[simpy.Event, Any, None]:
        for _ in left:
            sent.append(Request(clock.now, input_tokens, output_tokens))
            yield min(fleet, key=len).submit(sent[-1])

    clock.run(clock.all_of([clock.process(client()) for _ in range(clients)]))
    return _seen(sent, clock.now)


def hosts_needed(
    speed: Speed,
    per_s: float,
    input_tokens: int,
    output_tokens: int,
    tpot_p99_ms: float,
    ttft_p99_ms: float,
    at_most: int = 64,
) -> tuple[int, Seen] | str:
    """Return the fewest hosts that meet both limits, with the latencies of their clients.

    Limits are in milliseconds. If no number of hosts meets them, a line says why.
    """
    if input_tokens + output_tokens > speed.kv_tokens:
        return (
            f"one request of {input_tokens + output_tokens} tokens does not fit its pool of {speed.kv_tokens}"
        )
    alone = closed_loop(speed, 1, input_tokens, output_tokens, 4)
    for what, value, limit in (
        ("a token", alone.tpot_p99_ms, tpot_p99_ms),
        ("to its first token", alone.ttft_p99_ms, ttft_p99_ms),
    ):
        if value > limit:
            return (
                f"a lone request takes {value:,.0f} ms {what}, the limit is {limit:,.0f}: more hosts do not"
                " help"
            )
    full = closed_loop(speed, speed.max_num_seqs, input_tokens, output_tokens, 4 * speed.max_num_seqs)
    share = per_s * output_tokens / full.tokens_per_s
    for hosts in range(math.ceil(share / FULL_SHARE), at_most + 1):
        seen = open_loop(speed, hosts, Arrivals(per_s, max(1000, 200 * hosts)), input_tokens, output_tokens)
        if seen.tpot_p99_ms <= tpot_p99_ms and seen.ttft_p99_ms <= ttft_p99_ms:
            return hosts, replace(seen, full_share=share / hosts)
    return f"more than {at_most} hosts"
