"""Reads the figures that a vLLM server gives under /metrics.

These are pure functions over the text that the server sends. They read one sample, take the difference of
two, and compute quantiles of histograms.

Quantiles are those of Prometheus' `histogram_quantile` (promql/quantile.go, BucketQuantile). They are linear
within a bucket, and the first bucket begins at 0. In the last bucket, which is open, the answer is the
highest bound.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from itertools import pairwise

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field, model_validator

from lowmem.schema import Strict

LARGEST = 1e15
"""Beyond any count, time or size that a server can mean; sums of such numbers are exact."""


class Histogram(Strict):
    """Cumulative histogram.

    `counts[i]` is the number of observations up to `bounds[i]`. The last count is that of all observations,
    so there is one count more than bounds.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = (0.0,)

    @model_validator(mode="after")
    def _one_more(self) -> Histogram:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.counts)} counts for {len(self.bounds)} bounds; one more is wanted")
        return self

    @property
    def total(self) -> float:
        return self.counts[-1]

    def since(self, earlier: Histogram) -> Histogram:
        """Return the observations after `earlier`.

        If the two cannot come from one server, all observations are returned.
        """
        if self.bounds != earlier.bounds or any(
            now < then for now, then in zip(self.counts, earlier.counts, strict=True)
        ):
            return self
        return Histogram(
            bounds=self.bounds,
            counts=tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True)),
        )

    def less_lowest(self, number: float) -> Histogram:
        """Return the histogram without `number` observations of the lowest bucket."""
        return Histogram(bounds=self.bounds, counts=tuple(max(0.0, count - number) for count in self.counts))

    def quantile(self, q: float) -> float | None:
        """Return the quantile `q`, from 0 to 1, or None if nothing was observed."""
        if not self.bounds or self.total <= 0:
            return None
        rank = q * self.total
        index = bisect.bisect_left(self.counts, rank)
        if index >= len(self.bounds):
            return self.bounds[-1]
        below = self.counts[index - 1] if index else 0.0
        low, high = self.bounds[index - 1] if index else min(0.0, self.bounds[0]), self.bounds[index]
        inside = self.counts[index] - below
        return low + (high - low) * (rank - below) / inside if inside else high


class Sample(Strict):
    """Figures of a server at one moment.

    Tokens, requests and preemptions are counted since the server started. Histograms are in seconds.
    """

    at: float = Field(description="seconds since 1970")
    started: float | None = Field(
        None, description="when the server's process started, in seconds since 1970; None: it does not say"
    )
    running: int = 0
    waiting: int = 0
    kv_usage: float = Field(0, description="share of the KV cache in use, 0 to 1")
    kv_tokens: int | None = Field(None, description="what the KV cache holds; None: the server does not say")
    prompt_tokens: float = 0
    generation_tokens: float = 0
    accepted_tokens: float | None = Field(
        None, description="draft tokens of speculative decoding that became output; None: there are no drafts"
    )
    preemptions: float = 0
    finished: dict[str, float] = Field(
        default_factory=dict, description="finished requests by reason: stop, length, abort, error, ..."
    )
    ttft: Histogram = Histogram()
    tpot: Histogram = Field(Histogram(), description="per request of two tokens or more")
    itl: Histogram = Field(Histogram(), description="gaps between tokens, of all requests")
    memory_bytes: tuple[int, ...] = Field(
        (), description="per GPU; on a CPU one figure, the server's processes. Empty: unknown"
    )

    def same_server(self, earlier: Sample) -> bool:
        """Tell whether the counters go on from the earlier sample's."""
        return self.started == earlier.started and self.generation_tokens >= earlier.generation_tokens


class Window(Strict):
    """Figures of the time between two samples of one server.

    With a single sample it is the time since the server started.
    """

    seconds: float | None = Field(description="None: since the server started, which nobody saw")
    output_tokens: float
    prompt_tokens: float
    requests: float
    accepted_tokens: float | None = None
    preemptions: float
    ttft: Histogram
    tpot: Histogram
    itl: Histogram

    @property
    def output_tokens_per_s(self) -> float | None:
        return self.output_tokens / self.seconds if self.seconds else None

    @property
    def tokens_per_step(self) -> float | None:
        """Return the mean tokens that a step gave a request; None without drafts or without output.

        Each step gives a request one token of its own, and the drafts that were accepted.
        """
        if self.accepted_tokens is None or self.output_tokens <= self.accepted_tokens:
            return None
        return self.output_tokens / (self.output_tokens - self.accepted_tokens)

    @property
    def prompt_tokens_per_s(self) -> float | None:
        return self.prompt_tokens / self.seconds if self.seconds else None


def window(now: Sample, earlier: Sample | None) -> Window:
    """Return the figures from `earlier` to `now`.

    They begin at the server's start if there is no earlier sample, or if it came from another server.
    """
    if earlier is None or not now.same_server(earlier):
        earlier = Sample(at=now.started if now.started is not None else now.at)
    seconds = now.at - earlier.at
    accepted = now.accepted_tokens
    return Window(
        seconds=seconds if seconds > 0 else None,
        output_tokens=now.generation_tokens - earlier.generation_tokens,
        prompt_tokens=now.prompt_tokens - earlier.prompt_tokens,
        requests=sum(now.finished.values()) - sum(earlier.finished.values()),
        accepted_tokens=None if accepted is None else accepted - (earlier.accepted_tokens or 0),
        preemptions=now.preemptions - earlier.preemptions,
        ttft=now.ttft.since(earlier.ttft),
        tpot=now.tpot.since(earlier.tpot),
        itl=now.itl.since(earlier.itl),
    )


def idle_since(samples: Iterable[Sample]) -> float | None:
    """Return since when the server has had running requests and made no token, in seconds since 1970.

    `samples` come oldest first. None means that the last one does not show this. The engine's counters move
    with each step, so a busy engine never shows it for long.
    """
    since = None
    for before, now in pairwise(samples):
        moved = not now.same_server(before) or (now.generation_tokens, now.prompt_tokens) != (
            before.generation_tokens,
            before.prompt_tokens,
        )
        if moved or not now.running or not before.running:
            since = None
        elif since is None:
            since = before.at
    return since


def parse(text: str, at: float) -> Sample:
    """Parse the text of /metrics.

    Several engines of one server are taken together: counters, requests and histograms are summed, and KV use
    is their mean. Raises ValueError for text that is not a vLLM server's.
    """
    families = _families(text)
    if "vllm:num_requests_running" not in families:
        raise ValueError(
            "no vllm:num_requests_running among the metrics: not a vLLM server, or one with"
            " --disable-log-stats"
        )

    def values(name: str, suffix: str = "") -> list[float]:
        family = families.get(name)
        return [sample.value for sample in family.samples if sample.name == name + suffix] if family else []

    usage = values("vllm:kv_cache_usage_perc")
    accepted = values("vllm:spec_decode_num_accepted_tokens", "_total")
    started = values("process_start_time_seconds")
    short = _buckets(families.get("vllm:request_generation_tokens"))
    single = short.counts[short.bounds.index(1.0)] if 1.0 in short.bounds else 0.0
    return Sample(
        at=at,
        started=started[0] if started else None,
        running=round(sum(values("vllm:num_requests_running"))),
        # in the engine, and before it (lowmem.service.admission)
        waiting=round(sum(values("vllm:num_requests_waiting") + values("lowmem:requests_waiting"))),
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        kv_tokens=_kv_tokens(families.get("vllm:cache_config_info")),
        prompt_tokens=sum(values("vllm:prompt_tokens", "_total")),
        generation_tokens=sum(values("vllm:generation_tokens", "_total")),
        accepted_tokens=sum(accepted) if accepted else None,
        preemptions=sum(values("vllm:num_preemptions", "_total")),
        finished=_by_label(families.get("vllm:request_success"), "finished_reason"),
        ttft=_buckets(families.get("vllm:time_to_first_token_seconds")),
        # An answer of one token has no time per output token. vLLM 0.32 counts it as 0 (v1/metrics/stats.py).
        # Health checks are such answers.
        tpot=_buckets(families.get("vllm:request_time_per_output_token_seconds")).less_lowest(single),
        itl=_buckets(families.get("vllm:inter_token_latency_seconds")),
    )


def _families(text: str) -> dict[str, Metric]:
    """Return the families by name, those of vLLM with figures that can be counted with."""
    try:
        families = {family.name: family for family in text_string_to_metric_families(text)}
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not the text format of Prometheus ({type(error).__name__})") from None
    for family in families.values():
        for sample in family.samples if family.name.startswith(("vllm:", "process_start_time")) else ():
            if not abs(sample.value) <= LARGEST and not sample.name.endswith("_sum"):
                raise ValueError(f"{sample.name} is {sample.value}, not a number up to {LARGEST:g}")
    return families


def _buckets(family: Metric | None) -> Histogram:
    counts: dict[float, float] = {}
    for sample in family.samples if family else ():
        if sample.name.endswith("_bucket"):
            bound = float(sample.labels.get("le", "nan"))
            if math.isnan(bound):
                raise ValueError(f"a bucket of {sample.name} has no bound")
            counts[bound] = counts.get(bound, 0.0) + sample.value
    ordered = sorted(counts)
    return (
        Histogram(bounds=tuple(ordered[:-1]), counts=tuple(counts[bound] for bound in ordered))
        if ordered
        else Histogram()
    )


def _by_label(family: Metric | None, label: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for sample in family.samples if family else ():
        if sample.name.endswith("_total"):
            reason = sample.labels.get(label, "")
            sums[reason] = sums.get(reason, 0.0) + sample.value
    return sums


def _kv_tokens(family: Metric | None) -> int | None:
    try:
        tokens = (
            sum(int(s.labels["num_gpu_blocks"]) * int(s.labels["block_size"]) for s in family.samples)
            if family
            else None
        )
    except (KeyError, ValueError):
        return None
    return tokens if tokens is not None and 0 <= tokens <= LARGEST else None
