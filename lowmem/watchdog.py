"""`lowmem watch`: notices an engine that hangs while /health still says 200, and ends it so that the service manager starts it again.

vLLM's /health looks at a flag in the API server (`AsyncLLM.check_health`, vLLM 0.32): an engine that was stopped or waits for ever
answers 200 there. What the engine does say is scheduler statistics, with each step (`Scheduler.update_from_output`), also with one that
only computes a part of a long prompt. So a busy engine is never asked anything: its figures move. Where they stand still a real
completion of one token is asked for, and where nothing comes for the limit's time the server's processes are ended.

Of a server that spans several hosts each watches that they are still joined (`lowmem.members`), and ends its own engine where they are
not; the first one also watches as above.

The workers first: the API server then answers every open request with an error, and ends with a failure of its own.
Nothing here knows of systemd or supervisord: both start again what was killed, and both give up by their own limits.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import psutil
import typer

from lowmem.errors import BadInput
from lowmem.measure import read_environment, read_plan
from lowmem.members import Bond, MemberHosts
from lowmem.schema import Deploy, Plan

LONGEST_SILENCE_S = 180
"""A sound engine was seen silent for 126 s, while it made kernels at first use (docs/measurements); half as much again."""

# set from the engine's scheduler statistics only; what the API server counts by itself proves nothing
_ENGINE_METRICS = re.compile(
    r"^vllm:(?:generation_tokens_total|prompt_tokens_total|iteration_tokens_total_count|kv_cache_usage_perc"
    r"|num_requests_running|num_requests_waiting)\{[^}]*\} (\S+)$",
    re.MULTILINE,
)
_RUNNING = re.compile(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", re.MULTILINE)

Answer = Literal["tokens", "nothing", "refused"]
Verdict = Literal["starting", "serving", "silent", "hung", "never ready"]


class Server(Protocol):
    """What the watchdog asks of a server; each call ends within `timeout_s`."""

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        """The engine's metrics; empty where the API server does not answer in time, None where nobody listens."""

    def busy(self) -> bool:
        """Whether the last figures had a running request."""

    def complete(self, timeout_s: float) -> Answer:
        """Asks for one token. "refused": the API server says no (key, model), which says nothing of the engine."""


@dataclass
class Watch:
    """The judgement, without a clock of its own: `look(now)` is called every few seconds, `now` in seconds of a monotonic clock.

    `silence_s`: how long a ready engine may say nothing. `start_s`: how long a server may take until its first completion.
    """

    server: Server
    silence_s: float
    start_s: float
    ready: bool = False
    began: float | None = None
    last_sign: float = 0.0
    known: tuple[str, ...] = ()
    remark: str = ""

    def look(self, now: float) -> Verdict:
        if self.began is None:
            self._start_over(now)
        figures = self.server.figures(min(10.0, self.silence_s))
        if figures is None:
            if self.ready:  # it died; whoever starts it again has the time that a start has
                self._start_over(now)
            return self._still_starting(now)
        if figures and figures != self.known:
            # the first figures of a server are no sign yet: they are there before the engine did anything
            moved, self.known = bool(self.known), figures
            if moved and self.ready:
                self.last_sign = now
                return "serving"
        if not self.ready:
            if self._asked(now):
                self.ready = True
                return "serving"
            return self._still_starting(now)
        # a quarter of the limit, so that an idle engine is asked a few times before the limit is reached
        if now - self.last_sign >= self.silence_s / 4 and not self.server.busy() and self._asked(now):
            return "serving"
        if now - self.last_sign >= self.silence_s:
            return "hung"
        return "silent" if now > self.last_sign else "serving"

    def ended(self, now: float) -> None:
        """The server was ended: the next one starts from nothing."""
        self._start_over(now)

    def _asked(self, now: float) -> bool:
        answer = self.server.complete(max(1.0, self.silence_s / 4))
        self.remark = "the server refuses this key or model: its engine cannot be judged" if answer == "refused" else ""
        if answer == "nothing":
            return False
        self.last_sign = now
        return True

    def _still_starting(self, now: float) -> Verdict:
        return "never ready" if self.began is not None and now - self.began >= self.start_s else "starting"

    def _start_over(self, now: float) -> None:
        self.began, self.last_sign, self.ready, self.known = now, now, False, ()


def silence_limit_s(plan: Plan) -> float:
    """Seconds: the plan's own limit for a first token under load, and never less than what a sound engine was seen to need."""
    return max(LONGEST_SILENCE_S, plan.limits.ttft_p99_ms / 1000)


class VllmServer:
    """A vLLM server on this host. The key is read again for each completion, so that a rotated one is no fault."""

    def __init__(self, plan: Plan, env_file: Path) -> None:
        if plan.deploy is None:
            raise ValueError("a plan without a deployment")
        host = "127.0.0.1" if plan.deploy.host in ("0.0.0.0", "::") else plan.deploy.host  # noqa: S104 - read, not bound
        self.url = f"http://{host}:{plan.deploy.port}"
        self.model = plan.deploy.served_model_name
        self.argv = plan.argv
        self.env_file = env_file
        self._running = 0.0
        # no proxy: the server is on this host
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        try:
            with self._opener.open(f"{self.url}/metrics", timeout=timeout_s) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError:
            return ()
        except urllib.error.URLError as error:
            return None if isinstance(error.reason, ConnectionRefusedError) else ()
        except (OSError, http.client.HTTPException):
            return ()
        self._running = sum(float(value) for value in _RUNNING.findall(text))
        return tuple(_ENGINE_METRICS.findall(text))

    def busy(self) -> bool:
        return self._running > 0

    def complete(self, timeout_s: float) -> Answer:
        body = json.dumps({"model": self.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        key = read_environment(self.env_file).get("VLLM_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/v1/completions", data=body, headers=headers)  # noqa: S310 - the plan's own address
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                return "tokens" if json.load(answer)["usage"]["completion_tokens"] else "nothing"
        except urllib.error.HTTPError as error:
            return "refused" if error.code < 500 else "nothing"
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return "nothing"

    def processes(self) -> list[psutil.Process]:
        """The API server of this plan, known by its arguments, and all below it, the server last; empty where there is none."""
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                if self.argv and command[-len(self.argv) :] == self.argv and "serve" in command[: -len(self.argv)]:
                    return [*process.children(recursive=True), process]
            except psutil.Error:
                continue
        return []

    def end(self, report_s: float) -> list[str]:
        """Kills the engine and its workers, and the API server too where it has not ended after `report_s`; who was ended."""
        processes = self.processes()
        if not processes:
            return []
        *workers, server = processes
        names = [f"{process.pid} ({_name(process)})" for process in processes]
        for process in workers:
            _kill(process)
        if not workers or psutil.wait_procs([server], timeout=report_s)[1]:
            _kill(server)
        return names


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "gone"


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:  # gone by itself
        return


def watch(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    env_file: Annotated[Path, typer.Option(help="vllm.env of the deployment, which holds the API key")],
    silence_s: Annotated[float, typer.Option(help="seconds that a ready engine may say nothing; 0: from the plan")] = 0,
    every_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 5,
    report_s: Annotated[float, typer.Option(min=0, help="seconds that a server has to answer open requests with an error")] = 15,
) -> None:
    """Watch a deployed server, and end it where its engine hangs; its service manager starts it again."""
    planned = read_plan(plan)
    if planned.deploy is None:
        raise BadInput(f"--plan {plan} names no port and model: give the plan.json of a deployment")
    if silence_s < 0:
        raise BadInput(f"--silence-s {silence_s:g} must be 0 (from the plan) or more")
    server = VllmServer(planned, env_file)
    looks: list[Look] = []
    if planned.hosts > 1:
        looks.append(MemberLook(Bond(MemberHosts(planned.deploy)), server, planned.deploy))
    if planned.deploy.rank == 0:
        state = Watch(server, silence_s or silence_limit_s(planned), planned.service.timeout_start_s)
        say(f"watching {server.url}; limits: {state.silence_s:g} s of silence, {state.start_s:g} s to the first completion")
        looks.append(ServerLook(state))
    while True:
        for look in looks:
            if why := look.trouble(time.monotonic()):
                ended = server.end(report_s)
                say(f"{why}: ended {', '.join(ended)}" if ended else f"{why}, and no server of this plan to end")
                for other in looks:
                    other.ended(time.monotonic())
                break
        time.sleep(every_s)


class Look(Protocol):
    """One thing that the watchdog looks at, and says when it changes."""

    def trouble(self, now: float) -> str:
        """Why the server has to be ended; empty where it has not."""

    def ended(self, now: float) -> None:
        """The server was ended."""


@dataclass
class ServerLook:
    """Whether the server answers."""

    state: Watch
    said: tuple[str, str] = ("", "")

    def trouble(self, now: float) -> str:
        verdict = self.state.look(now)
        if verdict == "hung":
            return f"no sign of the engine for {self.state.silence_s:g} s"
        if verdict == "never ready":
            return f"no completion {self.state.start_s:g} s after the start"
        if verdict != "silent" and (verdict, self.state.remark) != self.said:
            self.said = (verdict, self.state.remark)
            say(f"{verdict}{': ' + self.state.remark if self.state.remark else ''}")
        return ""

    def ended(self, now: float) -> None:
        self.state.ended(now)


@dataclass
class MemberLook:
    """Whether the hosts of one server are still joined."""

    bond: Bond
    server: VllmServer
    deploy: Deploy
    joined: psutil.Process | None = None
    """The server as which this host joined. The one that its service manager has started since then is nobody's trouble."""

    def trouble(self, now: float) -> str:
        was = bool(self.bond.known)
        why = self.bond.look(now)
        if why:
            before, self.joined = self.joined, None
            if before is not None and self._running() == before:
                return why
            say(f"{why}; the engine that was joined has ended already")
        elif not was and self.bond.known:
            self.joined = self._running()
            place = f"host {self.deploy.rank + 1} of {len(self.deploy.nodes)}"
            say(f"joined: {place}, meeting at {self.deploy.nodes[0]} port {self.deploy.master_port}")
        return ""

    def ended(self, now: float) -> None:
        self.bond.known, self.joined = frozenset(), None

    def _running(self) -> psutil.Process | None:
        processes = self.server.processes()
        return processes[-1] if processes else None


def say(text: str) -> None:
    sys.stdout.write(f"watchdog: {text}\n")
    sys.stdout.flush()
