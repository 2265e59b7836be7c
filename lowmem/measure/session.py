"""Observes a service: starts it as rendered (or finds it running), loads it, and stops it.

Everything here is input and output. What the numbers mean is in `judge` and `engine_log`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
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
from urllib.parse import urlsplit

import psutil

from lowmem.errors import BadInput
from lowmem.files import check_writable, write_text
from lowmem.measure import engine_log, judge
from lowmem.measure.facts import host_facts, versions
from lowmem.measure.load import Api, drive, say, warm_up
from lowmem.measure.observation import Observation
from lowmem.measure.sampler import Sampler
from lowmem.probes import Gpus, ProcessTree
from lowmem.schema import Load, Plan, Receipt
from lowmem.service.process import (
    Engine,
    listener_pid,
    listening_url,
    start_engine,
    telling,
    vllm_command,
    wrapped_vllm,
)
from lowmem.units import MIB

FREED_WITHIN_MIB = 64

IDLE_S = 3.0

_LOADED = re.compile(r"(?:Model loading|Loading weights) took")


def wait_ready(engine: Engine, api: Api, sampler: Sampler, timeout_s: float) -> tuple[str, str] | None:
    """Wait for a real completion, and return served name and model folder.

    None means that the engine died or that the time is up.
    """
    began = time.monotonic()
    reported = began
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
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            say(f"  {sampler.phase}, {reported - began:.0f} s{memory_now(sampler)}")
        time.sleep(0.5)
    return None


def memory_now(sampler: Sampler) -> str:
    latest = sampler.latest.get("gpu") or sampler.latest.get("host") or ()
    return ", " + " + ".join(f"{m / MIB:,.0f}" for m in latest) + " MiB" if latest else ""


@dataclass(frozen=True)
class Options:
    """Validated input of one measurement.

    Without `url` the service is started, by `launcher` or else with the plan's own arguments.
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


class Session:
    """Observes one service: starts it or finds it running, waits for it, loads it, stops what it started."""

    def __init__(self, options: Options) -> None:
        """Raise BadInput when there is nothing to measure."""
        self.options = options
        plan = options.plan
        # Every user of the machine can read argument lists, so the key goes into environments only.
        key = options.variables.get("VLLM_API_KEY") or os.environ.get("VLLM_API_KEY")
        self.api = Api(options.url or listening_url(plan.deploy, options.extra), key)
        try:
            self.gpus = Gpus(plan.device_count) if plan.device_kind == "cuda" else None
        except RuntimeError as error:
            raise BadInput(str(error)) from None
        self.engine: Engine | None = None
        self.tree: ProcessTree | None = None
        self.available_before_bytes = psutil.virtual_memory().available
        probes: dict[str, Callable[[], tuple[int, ...]]] = {"host": self._host, "taken": self._taken}
        if self.gpus:
            probes["gpu"] = self.gpus.used_bytes
        self.sampler = Sampler(probes, options.interval_s)
        self.seen = Observation(
            source="gpu" if self.gpus else "host",
            memory_source="NVML version-2 `used`, all processes, per GPU" if self.gpus else "",
            interval_s=options.interval_s,
            hardware=host_facts() | (self.gpus.describe() if self.gpus else {}),
            versions=versions(),
            attached=options.url is not None,
            argv=(*plan.argv, *options.extra),
            environment=telling(options.variables),
        )

    def _host(self) -> tuple[int, ...]:
        return (self.tree.memory_bytes(),) if self.tree else (0,)

    def _taken(self) -> tuple[int, ...]:
        return (max(0, self.available_before_bytes - psutil.virtual_memory().available),)

    def observe(self) -> Observation:
        """Run every phase. A death of the engine, Ctrl-C or SIGTERM in any of them becomes a finding."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_terminable())
            stack.enter_context(self.sampler)
            try:
                began = self._start(stack)
                name, tokenizer = self._wait(self.engine, began) if self.engine else ("", "")
                if name:
                    self._idle(name)
                    self._load(name, tokenizer)
            except BadInput:
                raise
            except KeyboardInterrupt:
                self.seen.findings.append(f"interrupted in phase {self.sampler.phase}")
            except (RuntimeError, OSError, http.client.HTTPException, LookupError, ValueError) as error:
                self._failed(error)
            finally:
                self._stop()
        return self._finished()

    def _failed(self, error: Exception) -> None:
        phase = self.sampler.phase.split(":")[0]
        alive = self.engine is not None and self.engine.alive()
        died = f"the engine died ({error})" if self.engine else f"the engine was not started ({error})"
        self.seen.findings.append(f"{phase}: {error}" if alive else f"{phase}: {died}")

    def _start(self, stack: contextlib.ExitStack) -> float:
        """Start the engine, or find it; return the time of the monotonic clock."""
        options, seen = self.options, self.seen
        if options.url:
            self.engine = Engine(options.pid or listener_pid(options.url), options.log)
            if not psutil.pid_exists(self.engine.pid or 0):
                raise BadInput(f"--pid {self.engine.pid}: no such process")
        else:
            _refuse_port_in_use(self.api.url)
            command = (
                [str(options.launcher)]
                if options.launcher
                else [*vllm_command(), "serve", *options.plan.argv]
            )
            variables = dict(options.variables)
            if options.launcher:
                variables.setdefault("VLLM_BIN", stack.enter_context(wrapped_vllm()))
            time.sleep(1)  # a few samples of what is in use before
            self.sampler.phase = "loading"
            say(f"starting {shlex.join([*command, *options.extra])[:200]}")
            log = options.log or options.out.with_suffix(".log")
            self.engine = start_engine([*command, *options.extra], variables, log)
        began = time.monotonic()
        self.tree = ProcessTree(self.engine.pid or 0, pss=self.gpus is None)
        seen.before = self.sampler.peak("gpu", "before") if self.gpus else (0,)
        if options.url and self.gpus:
            self._take_off_own(self.gpus, self.tree)
        return began

    def _take_off_own(self, gpus: Gpus, tree: ProcessTree) -> None:
        """Take the memory of the running service off what was in use before."""
        own = gpus.used_by_bytes(tree.pids())
        self.seen.before = tuple(used - mine for used, mine in zip(self.seen.before, own, strict=True))
        if not any(own):
            self.seen.notes.append(
                "NVML does not say which process holds the memory: all memory in use is counted as the"
                " service's"
            )
            self.seen.before = (0,) * len(own)

    def _wait(self, engine: Engine, began: float) -> tuple[str, str]:
        """Wait for a completion; return the served name and the model's folder, empty where none came."""
        served = wait_ready(engine, self.api, self.sampler, self.options.start_timeout_s)
        if served is None:
            waited = f"no completion within {self.options.start_timeout_s:.0f} s"
            state = waited if engine.alive() else "the process ended"
            self.seen.findings.append(f"start: the service did not become ready: {state}")
            return "", ""
        self.seen.ready = True
        if not self.options.url:
            self.seen.ready_s = round(time.monotonic() - began, 1)
            say(f"ready in {self.seen.ready_s} s{memory_now(self.sampler)}")
        self.seen.argv = engine.argv() or self.seen.argv
        self.seen.environment = engine.environment() or self.seen.environment
        return served

    def _idle(self, name: str) -> None:
        first = self.options.loads[0]
        warm_up(self.api, name, Load(clients=1, input_tokens=min(16, first.input_tokens), output_tokens=2))
        self.sampler.phase = "idle"
        time.sleep(IDLE_S)
        self.seen.idle = self.sampler.latest.get(self.seen.source, ())

    def _load(self, name: str, tokenizer: str) -> None:
        options = self.options
        for number, load in enumerate(options.loads, 1):
            self.sampler.phase = f"load:{load.clients}"
            count = options.requests or 4 * load.clients
            say(
                f"load: {load.clients} clients, {count} requests of {load.input_tokens} in,"
                f" {load.output_tokens} out"
            )
            warm_up(self.api, name, load)
            tokens = options.tokenizer or tokenizer
            result = drive(self.api, name, tokens, load, count, number, options.variables)
            peak = self.sampler.peak(self.seen.source, self.sampler.phase)
            self.seen.loads.append(result.model_copy(update={"memory_peak_bytes": peak}))
            say(
                f"  {result.output_tokens_per_s:,.1f} tokens/s, TPOT p50 {result.tpot_ms.p50:,.1f},"
                f" p99 {result.tpot_ms.p99:,.1f} ms, TTFT p50 {result.ttft_ms.p50:,.0f}, p99"
                f" {result.ttft_ms.p99:,.0f} ms{memory_now(self.sampler)}"
            )

    def _stop(self) -> None:
        """End what was started here; an interrupt in it ends the patience, not the stop."""
        self.sampler.phase = "stopping"
        if self.options.url or self.engine is None:
            return
        timeout_s = float(self.options.plan.service.timeout_stop_s)
        try:
            killed = self.engine.stop(timeout_s)
            left = _left_behind(self.gpus, self.seen.before) if self.gpus else []
        except KeyboardInterrupt:
            self.seen.findings.append("interrupted in phase stopping")
            killed, left = self.engine.stop(0), []
        if killed:
            self.seen.findings.append(f"stop: still running after SIGTERM, killed: {', '.join(killed)}")
        self.seen.findings += left

    def _finished(self) -> Observation:
        seen = self.seen
        seen.created_utc = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        seen.before = seen.before or (0,) * len(self.sampler.latest.get(seen.source, ()))
        seen.peaks = self.sampler.peaks
        seen.longest_gap_s = self.sampler.longest_gap_s
        if self.gpus is None:
            seen.memory_source = self.tree.source if self.tree else "no process was started"
        seen.log = engine_log.read(self.engine.log_lines() if self.engine else [])
        return seen


def run(options: Options) -> Receipt:
    """Measure and write the receipt, also for a service that does not start.

    Raises BadInput when there is nothing to measure, and OSError when the receipt could not be written.
    """
    check_writable(options.out)
    session = Session(options)
    seen = session.observe()
    receipt = judge.receipt(options.plan, seen)
    write_text(options.out, receipt.model_dump_json(indent=1))
    if session.engine and (not seen.ready or len(seen.loads) < len(options.loads)):
        say("\n".join(["the engine's last lines:", *session.engine.log_lines()[-25:]]))
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
    place = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname, place.port), timeout=2):
        raise BadInput(
            f"{url}: another process listens there already: stop it, or measure it with --url {url}"
        )


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
