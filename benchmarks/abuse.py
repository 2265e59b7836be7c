"""Measures what one key's abuse costs another key's client: kinds of abuse beside one polite client.

    benchmarks/abuse.py --url http://127.0.0.1:8000 --model m --abuser KEY --polite KEY

The polite client asks as one client of the plan's load does, one request after another. For each kind it asks
in turns, without and with the abuse, so that a busy machine weighs on both. A line says what the abuser was
told, the polite client's time to the first token (median and p99, both ways) and the ratio of the p99. The
exit status is 1 if a ratio is above `--most` or a polite request failed. The abusers are processes of their
own with the least priority, as those of another machine would take nothing from the server. Standard library
only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]

ROUNDS = 3

PATIENCE_S = 20.0


def schema(properties: int) -> Body:
    return {"type": "object", "properties": {f"property_{n}": {"type": "string"} for n in range(properties)}}


def formatted(spec: Body) -> Body:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": spec}}}


KINDS: dict[str, Callable[[int], Body]] = {
    "truncated prompt of 9 MiB": lambda n: {"prompt": "a 1 " * 2_400_000, "truncate_prompt_tokens": 5},
    "16,384 sequences": lambda n: {"prompt": "x", "n": 16384, "max_tokens": 2000, "stream": True},
    "1,024 prompts x 64": lambda n: {"prompt": ["x"] * 1024, "n": 64},
    "schema of 2,000 properties": lambda n: {"prompt": "x", **formatted(schema(2000))},
    "choice of 100,000": lambda n: {
        "prompt": "x",
        "structured_outputs": {"choice": [f"{n} {m}" for m in range(100_000)]},
    },
    "schema without end": lambda n: {
        "prompt": "x", "structured_outputs": {"json": {"type": "array", "minItems": 2**62}},
    },
    "pattern of 64 optional parts": lambda n: {"prompt": "x", "structured_outputs": {"regex": ".?" * 64}},
    "numbers out of range": lambda n: {"prompt": "x", "top_k": 2**70, "vllm_xargs": {"a": "b"}},
    "widest within the limits": lambda n: {
        "prompt": f"{n} x", "n": 4, "max_tokens": 2000, "ignore_eos": True, "temperature": 1, "stream": True,
    },
    "longest prompts": lambda n: {"prompt": [10 + (n * 31 + m) % 900 for m in range(2000)], "max_tokens": 1},
    "greatest schemas within the limits": lambda n: {
        "prompt": "x", "max_tokens": 4, **formatted(schema(400 + n % 60)),
    },
    "flood of small requests": lambda n: {"prompt": "x", "max_tokens": 1},
}  # fmt: skip


@dataclass
class Target:
    """Server under test."""

    url: str
    model: str

    def encoded(self, body: Body) -> bytes:
        return json.dumps({"model": self.model, **body}).encode()

    def post(self, data: bytes, key: str, timeout_s: float) -> Iterator[tuple[int, bytes]]:
        """Yield status and each line of the answer; status 0 if the connection broke."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        try:
            connection.request("POST", "/v1/completions", data, headers)
            answer = connection.getresponse()
            yield answer.status, b""
            for line in answer:
                yield answer.status, line
        except (OSError, http.client.HTTPException):
            yield 0, b""
        finally:
            connection.close()


class Abuse:
    """Process whose clients send one kind of request until it is stopped; each leaves after PATIENCE_S."""

    def __init__(self, target: Target, key: str, kind: str, clients: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.results, self.ending = context.SimpleQueue(), context.Event()
        self.process = context.Process(
            target=_abuse, args=(target, key, kind, clients, self.ending, self.results), daemon=True
        )

    def __enter__(self) -> Abuse:
        self.process.start()
        self.results.get()  # it has sent its first request
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.statuses = self.results.get()
        self.process.join()


def _abuse(target: Target, key: str, kind: str, clients: int, ending: Event, results: Any) -> None:
    os.nice(19)
    statuses: Counter[int] = Counter()

    def run(number: int) -> None:
        data = target.encoded(KINDS[kind](number))
        results.put(None) if not number else None
        while not ending.is_set():
            began, status = time.monotonic(), 0
            for seen, _ in target.post(data, key, PATIENCE_S):
                status = seen
                if ending.is_set() or time.monotonic() - began > PATIENCE_S:
                    break
            statuses[status] += 1

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    ending.wait()
    for thread in threads:
        thread.join(timeout=2)
    results.put(statuses)


def polite(target: Target, key: str, requests: int, tokens: int) -> tuple[list[float], int]:
    """Return times to the first token in seconds, and how many failed; a prompt has `tokens` tokens."""
    times, failed = [], 0
    for number in range(requests):
        prompt = [10 + (time.time_ns() // 1000 * 31 + number + m * m) % 900 for m in range(tokens)]
        body = {"prompt": prompt, "max_tokens": 2, "stream": True}
        began, first = time.monotonic(), None
        for status, line in target.post(target.encoded(body), key, 300):
            if status == 200 and line.startswith(b"data: {") and first is None:
                first = time.monotonic() - began
        if first is None:
            failed += 1
        else:
            times.append(first)
    return times, failed


def at(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--abuser", required=True, help="API key of the abusing clients")
    parser.add_argument("--polite", required=True, help="API key of the polite client")
    parser.add_argument("--clients", type=int, default=16, help="abusing clients at once")
    parser.add_argument("--requests", type=int, default=30, help="polite requests beside each kind")
    parser.add_argument("--most", type=float, default=3.0, help="greatest ratio of p99 to the quiet p99")
    parser.add_argument(
        "--tokens", type=int, default=128, help="of a polite prompt: those of the plan's load"
    )
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="KIND")
    chosen = parser.parse_args()
    target = Target(chosen.url, chosen.model)
    polite(target, chosen.polite, 2, chosen.tokens)
    worst, lost = 0.0, 0
    for kind in chosen.kinds:
        quiet: list[float] = []
        beside: list[float] = []
        told: Counter[int] = Counter()
        for _ in range(ROUNDS):
            times, failed = polite(target, chosen.polite, chosen.requests // ROUNDS, chosen.tokens)
            quiet += times
            with Abuse(target, chosen.abuser, kind, chosen.clients) as abuse:
                times, missed = polite(target, chosen.polite, chosen.requests // ROUNDS, chosen.tokens)
            beside += times
            told += abuse.statuses
            lost += failed + missed
        ratio = at(beside, 0.99) / at(quiet, 0.99)
        worst = max(worst, ratio)
        said = ", ".join(f"{count} x {status}" for status, count in sorted(told.items()))
        print(
            f"{kind}: ratio {ratio:.1f}; median {at(quiet, 0.5):.3f} -> {at(beside, 0.5):.3f} s,"
            f" p99 {at(quiet, 0.99):.3f} -> {at(beside, 0.99):.3f} s; abuser {said}",
            flush=True,
        )
    print(f"worst ratio {worst:.1f} of {chosen.most:g}, {lost} polite requests failed")
    return int(worst > chosen.most or lost > 0)


if __name__ == "__main__":
    sys.exit(main())
