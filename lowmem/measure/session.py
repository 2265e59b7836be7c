"""`lowmem measure`: starts a service as rendered (or finds it running), loads it, and writes down what it
took.

Everything here is input and output; what the numbers mean is in `lowmem.judge` and `lowmem.enginelog`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from lowmem.errors import BadInput
from lowmem.files import write_text
from lowmem.measure import engine_log, judge
from lowmem.measure.facts import host_facts, same_device, versions
from lowmem.measure.load import Api, drive, say, warm_up
from lowmem.measure.sampler import Sampler
from lowmem.probes import Gpus, ProcessTree
from lowmem.schema import Load, LoadResult, Plan, Receipt
from lowmem.service.process import (
    _SECRET,
    _TELLING,
    Engine,
    base_url,
    listener_pid,
    start_engine,
    vllm_command,
    wrapped_vllm,
)
from lowmem.units import MIB

FREED_WITHIN_MIB = 64

IDLE_S = 3.0

_LOADED = re.compile(r"(?:Model loading|Loading weights) took")


def wait_ready(engine: Engine, api: Api, sampler: Sampler, timeout_s: float) -> tuple[str, str] | None:
    """Waits for a real completion; returns (served name, model folder), or None when the engine died or the
    time is up.
    """
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


@dataclass(frozen=True)
class Options:
    """Validated input of one measurement. Without `url` the service is started, by `launcher` or else with
    the plan's own arguments.
    """

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
    """Measures and writes the receipt, also for a service that does not start; raises BadInput when there is
    nothing to measure.
    """
    plan = options.plan
    # The key goes into environments only, never into an argument list, where every user of the machine reads
    # it.
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
            engine = start_engine(
                [*command, *options.extra], variables, options.log or options.out.with_suffix(".log")
            )
        began = time.monotonic()
        tree = ProcessTree(engine.pid or 0, pss=gpus is None)
        before = sampler.peak("gpu", "before") if gpus else (0,)
        if options.url and gpus:
            own = gpus.used_by_bytes(tree.pids())
            before = tuple(all_ - mine for all_, mine in zip(before, own, strict=True))
            if not any(own):
                notes.append(
                    "NVML does not say which process holds the memory: all memory in use is counted as the"
                    " service's"
                )
                before = (0,) * len(own)
        try:
            served = wait_ready(engine, api, sampler, options.start_timeout_s)
            if served is None:
                state = (
                    f"no completion within {options.start_timeout_s:.0f} s"
                    if engine.alive()
                    else "the process ended"
                )
                findings.append(f"start: the service did not become ready: {state}")
            else:
                if not options.url:
                    ready_s = round(time.monotonic() - began, 1)
                    say(f"ready in {ready_s} s{memory_now(sampler)}")
                argv, environment = engine.argv(), engine.environment()
                warm_up(
                    api,
                    served[0],
                    Load(clients=1, input_tokens=min(16, options.loads[0].input_tokens), output_tokens=2),
                )
                sampler.phase = "idle"
                time.sleep(IDLE_S)
                idle = sampler.latest["gpu" if gpus else "host"]
                for number, load in enumerate(options.loads):
                    sampler.phase = f"load:{load.clients}"
                    count = options.requests or 4 * load.clients
                    say(
                        f"load: {load.clients} clients, {count} requests of {load.input_tokens} in,"
                        f" {load.output_tokens} out"
                    )
                    warm_up(api, served[0], load)
                    result = drive(
                        api,
                        served[0],
                        options.tokenizer or served[1],
                        load,
                        count,
                        number + 1,
                        options.variables,
                    )
                    peak = sampler.peak("gpu" if gpus else "host", sampler.phase)
                    results.append(result.model_copy(update={"memory_peak_bytes": peak}))
                    say(
                        f"  {result.output_tokens_per_s:,.1f} tokens/s, TPOT p50 {result.tpot_ms.p50:,.1f},"
                        f" p99 {result.tpot_ms.p99:,.1f} ms, TTFT p50 {result.ttft_ms.p50:,.0f}, p99"
                        f" {result.ttft_ms.p99:,.0f} ms{memory_now(sampler)}"
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
    log = engine_log.read(engine.log_lines())
    peak = sampler.peak(source, *measured) or before
    idle = idle if served else ()
    # The limit is for the service that answers; what passes it for seconds while loading is a term of its
    # own, and a note.
    ready = (
        sampler.peak(source, *(phase for phase in measured if phase not in ("loading", "start"))) or before
    )
    on_top = [p - b for p, b in zip(ready, before, strict=True)]
    loaded = [phase for phase in measured if phase.startswith("load:")] or ["none"]
    starting = sampler.peak(source, "loading", "start")

    def above(reading: Sequence[int]) -> int | None:
        """The GPU with the most above what was in use before."""
        return max((r - b for r, b in zip(reading, before, strict=True)), default=None) if reading else None

    alike = same_device(plan, hardware)
    if not alike:
        notes.append(
            f"planned for {plan.device}, measured on {hardware.get('gpu')}: the plan's floors are not this"
            " card's and were not compared"
        )
    if results and not any(r.load == plan.load for r in results):
        notes.append("none of the loads is the plan's: latency limits were not compared")
    if served and (highest := above(starting)) is not None and highest > plan.limits.memory_bytes:
        notes.append(
            f"memory: up to {highest / MIB:,.0f} MiB while starting, over the limit of"
            f" {plan.limits.memory_bytes / MIB:,.0f} MiB"
        )
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
        environment=environment
        or {
            k: v for k, v in sorted(options.variables.items()) if _TELLING.match(k) and not _SECRET.search(k)
        },
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
        f"stop: GPU {index} still holds {mib} MiB more than before the start"
        for index, mib in enumerate(left)
        if mib > FREED_WITHIN_MIB
    ]
