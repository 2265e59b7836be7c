"""Loads the service: one HTTP client and the load generator of vLLM."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from lowmem.errors import BadInput
from lowmem.files import parse_json, read_json_object
from lowmem.schema import Load, LoadResult, Percentiles
from lowmem.service.call import ANSWER_LIMIT_BYTES
from lowmem.service.process import vllm_command
from lowmem.text import visible

RESULT_LIMIT_BYTES = 512 * 2**20
"""`--save-detailed` writes a time for each token of each request."""


class Api:
    """HTTP side of the service. If `key` is None, no authorization header is sent."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.key = key

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 600) -> Any:
        """Send a request and return its JSON.

        Raises OSError if there is no good answer within `timeout_s`.
        """
        data = json.dumps(body).encode() if body is not None else None
        # the scheme is http or https: _refuse_url holds it, or local_url made it
        request = urllib.request.Request(self.url + path, data=data)  # noqa: S310
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            text = response.read(ANSWER_LIMIT_BYTES + 1)
        if len(text) > ANSWER_LIMIT_BYTES:
            raise OSError(f"the answer of {path} is larger than {ANSWER_LIMIT_BYTES} bytes")
        try:
            return parse_json(text, f"the answer of {path}")
        except BadInput as error:
            raise OSError(str(error)) from None

    def model(self) -> tuple[str, str]:
        """Return the served name, and the folder or name that it was loaded from.

        Raises OSError if the service names none.
        """
        answer = self.call("/v1/models", timeout_s=10)
        try:
            card = answer["data"][0]
            name, root = card["id"], card.get("root") or card["id"]
        except (LookupError, TypeError, AttributeError):
            raise OSError("/v1/models names no model") from None
        if not (isinstance(name, str) and isinstance(root, str)):
            raise OSError("/v1/models names no model")
        return name, root

    def complete(self, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float = 600) -> int:
        """Return the number of tokens generated.

        Raises OSError if the service does not answer with a completion.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        answer = self.call("/v1/completions", body, timeout_s)
        try:
            return int(answer["usage"]["completion_tokens"])
        except (LookupError, TypeError, ValueError):
            raise OSError("/v1/completions counts no tokens") from None


def warm_up(api: Api, model: str, load: Load) -> None:
    """Send one request per client with the load's prompt length.

    So no kernel is compiled and no cache is filled while measuring.
    """
    rng = random.Random(7)  # noqa: S311 - prompts, not secrets
    prompts = [[rng.randrange(10, 1000) for _ in range(load.input_tokens)] for _ in range(load.clients)]
    with ThreadPoolExecutor(load.clients) as pool:
        list(pool.map(lambda prompt: api.complete(model, prompt, min(8, load.output_tokens)), prompts))


def bench_command(
    url: str,
    model: str,
    tokenizer: str,
    load: Load,
    requests: int,
    seed: int,
    folder: Path,
    per_s: float | None = None,
) -> list[str]:
    """Build the command `vllm bench serve` of the engine's environment.

    Each load has a seed of its own. Otherwise its prompts would sit in the prefix cache of the load before.
    The load's clients each wait for their answer. With `per_s` requests arrive by themselves instead
    (Poisson), so many a second.
    """
    options = {
        "--backend": "openai",
        "--base-url": url,
        "--endpoint": "/v1/completions",
        "--model": model,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.input_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": requests,
        **({"--request-rate": per_s} if per_s else {"--max-concurrency": load.clients}),
        "--seed": seed,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,90,99",
        "--result-dir": folder,
        "--result-filename": "result.json",
    }
    return [
        *vllm_command(),
        "bench",
        "serve",
        *(str(w) for pair in options.items() for w in pair),
        "--ignore-eos",
        "--save-result",
        "--save-detailed",
    ]


def load_result(raw: dict[str, Any], load: Load, requests: int) -> LoadResult:
    """Convert the JSON that `vllm bench serve --save-result` writes."""

    def percentiles(metric: str) -> Percentiles:
        return Percentiles(
            mean=raw[f"mean_{metric}_ms"], **{p: raw[f"{p}_{metric}_ms"] for p in ("p50", "p90", "p99")}
        )

    return LoadResult(
        load=load,
        requests=requests,
        failed=requests - raw["completed"],
        duration_s=raw["duration"],
        request_throughput_per_s=raw["request_throughput"],
        output_tokens_per_s=raw["output_throughput"],
        ttft_ms=percentiles("ttft"),
        tpot_ms=percentiles("tpot"),
        itl_ms=percentiles("itl"),
        e2e_ms=percentiles("e2el"),
    )


def drive(
    api: Api,
    model: str,
    tokenizer: str,
    load: Load,
    requests: int,
    seed: int,
    variables: dict[str, str],
    per_s: float | None = None,
) -> LoadResult:
    """Run one load with `bench_command`.

    Raises RuntimeError with the generator's last lines if it gives no result.
    """
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder:
        command = bench_command(api.url, model, tokenizer, load, requests, seed, Path(folder), per_s)
        environment = {**os.environ, **variables, **({"OPENAI_API_KEY": api.key} if api.key else {})}
        output = Path(folder) / "output"
        with output.open("wb") as stream:
            errors = None if sys.stderr.isatty() else stream
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=errors, check=False
            )
        result = Path(folder) / "result.json"
        if done.returncode or not result.exists():
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"vllm bench serve gave no result (exit {done.returncode}):\n{tail}")
        try:
            raw = read_json_object(result, RESULT_LIMIT_BYTES, "the result of vllm bench serve")
        except BadInput as error:
            raise RuntimeError(str(error)) from None
    for text in {e for e in raw.get("errors", []) if e}:
        say(f"  a request failed: {text.strip().splitlines()[-1][:300]}")
    return load_result(raw, load, requests)


def say(text: str) -> None:
    typer.echo(visible(text), err=True)
