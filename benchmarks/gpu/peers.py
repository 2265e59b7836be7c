r"""Puts the same load on any server with an OpenAI completions route.

One client measures memory by NVML, TTFT, TPOT and tokens per second.

    python benchmarks/gpu/peers.py OUT.json --name llama.cpp --clients 8,1 -- \
        llama-server -m model.gguf --port 8090 …

It starts the command, waits for a completion and warms up. It drives closed-loop clients with prompts of
random token ids, then stops the command. `lowmem measure` is for our own service. This is for the comparison,
so vLLM is measured with it as well.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from servers import end_on_sigterm, stop

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP))
from lowmem.measure.sampler import Sampler  # noqa: E402 - run from a checkout that is not installed
from lowmem.probes import Gpus  # noqa: E402
from lowmem.units import MIB  # noqa: E402


def stream(port: int, model: str, prompt: list[int], tokens: int) -> list[float]:
    """Seconds from the request's start at which a token came; raises RuntimeError when fewer came than were
    asked for.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, times, count = time.monotonic(), [], 0
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read(300)!r}")
    while line := answer.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        count = (event.get("usage") or {}).get("completion_tokens", count)
        if any(choice.get("text") for choice in event.get("choices", [])):
            times.append(time.monotonic() - began)
    connection.close()
    if count < tokens or len(times) < 2:
        raise RuntimeError(f"{count} tokens in {len(times)} pieces came, {tokens} were asked for")
    return times


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"mean": statistics.fmean(values), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def prompt_of(rng: random.Random, inputs: int, pattern: int | None) -> list[int]:
    """Make random token ids; with `pattern`, repeat that many, so that n-gram lookup always finds a draft."""
    ids = [rng.randrange(300, 31000) for _ in range(pattern or inputs)]
    return (ids * -(-inputs // len(ids)))[:inputs]


def drive(port: int, model: str, clients: int, prompts: list[list[int]], outputs: int) -> dict[str, Any]:
    """Drive a closed loop: each client sends its next request when the last is answered. Milliseconds."""
    requests, inputs = len(prompts), len(prompts[0])
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: stream(port, model, prompt, outputs), prompts))
    took = time.monotonic() - began
    steps = [(b - a) * 1e3 for times in answers for a, b in pairwise(times)]
    return {
        "clients": clients, "requests": requests, "input_tokens": inputs, "output_tokens": outputs,
        "duration_s": took,
        "output_tokens_per_s": requests * outputs / took,
        "ttft_ms": percentiles([t[0] * 1e3 for t in answers]),
        # by the tokens asked for: a server may send two of them in one piece
        "tpot_ms": percentiles([(t[-1] - t[0]) * 1e3 / (outputs - 1) for t in answers]),
        "itl_ms": percentiles(steps),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--model", default="m")
    parser.add_argument("--clients", default="8")
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument(
        "--pattern", type=int, help="tokens that each prompt repeats (default: all are random)"
    )
    parser.add_argument("--start-timeout-s", type=float, default=240)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    end_on_sigterm()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            sys.exit(
                f"peers: --port {options.port}: a server is there already and would be measured; end it, or"
                " take another port"
            )
    gpus = Gpus(1)
    log = options.out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "name": options.name,
        "command": options.command,
        "gpu": gpus.describe(),
        "loads": [],
    }
    with Sampler({"gpu": gpus.used_bytes}, 0.1) as sampler:
        time.sleep(1)
        before = sampler.peak("gpu", "before")[0]
        sampler.phase, began = "start", time.monotonic()
        process = subprocess.Popen(
            options.command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while True:
                try:
                    stream(options.port, options.model, [500, 501, 502], 4)
                    break
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    if process.poll() is not None or time.monotonic() - began > options.start_timeout_s:
                        result["error"] = f"{error}; exit {process.poll()}"
                        result["log_tail"] = log.read_text(errors="replace").splitlines()[-15:]
                        return
                    time.sleep(0.5)
            result["ready_s"] = round(time.monotonic() - began, 1)
            sampler.phase = "idle"
            time.sleep(3)
            for number, clients in enumerate(int(c) for c in options.clients.split(",")):
                sampler.phase = f"load:{clients}"
                make = functools.partial(prompt_of, inputs=options.input_tokens, pattern=options.pattern)
                first, then = random.Random(99), random.Random(number)
                drive(options.port, options.model, clients, [make(first) for _ in range(clients)], 8)
                prompts = [make(then) for _ in range(clients * options.requests_per_client)]
                load = drive(options.port, options.model, clients, prompts, options.output_tokens)
                result["loads"].append(load)
                print(options.name, json.dumps({k: v for k, v in load.items() if k != "itl_ms"}), flush=True)
        except RuntimeError as error:
            result["error"] = str(error)
        finally:
            sampler.phase = "stopping"
            stop(process, wait_s=30)
            result["memory_mib"] = {
                phase: (sampler.peak("gpu", phase)[0] - before) // MIB
                for phase in sampler.peaks
                if phase not in ("before", "stopping")
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(options.name, result.get("error", "done"), result["memory_mib"], flush=True)


if __name__ == "__main__":
    main()
