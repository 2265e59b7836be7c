"""Ends an engine that hangs while /health still says 200, so that the service manager starts it again.

vLLM's /health reads a flag in the API server (`AsyncLLM.check_health`, vLLM 0.32). An engine that was stopped
or waits for ever answers 200 there. But the engine publishes scheduler statistics with each step
(`Scheduler.update_from_output`). It does so even for a step that computes a part of a long prompt.

So a busy engine is never asked anything, since its figures move. When they stand still, the watchdog asks for
a real completion of one token. When nothing comes for the limit's time, it ends the server's processes.

An engine may also work and give nobody a token. The engine's counter of tokens tells it, without a request of
the watchdog's own, which would wait behind the others. The limit is the time of the longest prompt.

Each host of a multi-host server watches that the hosts are still joined (`lowmem.service.members`). It ends
its own engine when they are not. The first host also watches as above.

The workers are killed first. The API server then answers every open request with an error and fails by
itself. Nothing here knows of systemd or supervisord. Both start again what was killed, and both give up by
their own limits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil

from lowmem.schema import Deploy, Plan
from lowmem.service.members import Bond
from lowmem.service.server import Server, VllmServer
from lowmem.text import visible

LONGEST_SILENCE_S = 180
"""A sound engine was seen silent for 126 s, while it made kernels at first use (docs/measurements); half as
much again.
"""

PROMPT_SLACK = 10
"""An engine under load may take so many times the planned time for a prompt before it counts as fruitless."""

Verdict = Literal["starting", "serving", "silent", "hung", "fruitless", "never ready"]


@dataclass
class Watch:
    """Judgement on a server, without a clock of its own.

    `look(now)` is called every few seconds, with `now` in seconds of a monotonic clock. `silence_s` is how
    long a ready engine may be silent. `start_s` is how long a server may take until its first completion.
    `fruitless_s` is how long an engine with open requests may work without giving a token.
    """

    server: Server
    silence_s: float
    start_s: float
    fruitless_s: float = float("inf")
    ready: bool = False
    began: float | None = None
    last_sign: float = 0.0
    known: tuple[str, ...] = ()
    tokens: float | None = None
    last_token: float = 0.0
    remark: str = ""

    def look(self, now: float) -> Verdict:
        """Judge the server at the time `now`."""
        if self.began is None:
            self._start_over(now)
        figures = self.server.figures(min(10.0, self.silence_s))
        if figures is None:
            if self.ready:  # it died, and the next one gets the time of a start
                self._start_over(now)
            return self._still_starting(now)
        if figures and figures != self.known:
            # the first figures prove nothing: they are there before the engine has done anything
            moved, self.known = bool(self.known), figures
            if moved and self.ready:
                self.last_sign = now
                return "fruitless" if self._fruitless(now) else "serving"
        if not self.ready:
            if self._asked(now):
                self.ready = True
                return "serving"
            return self._still_starting(now)
        # at a quarter of the limit, an idle engine is asked a few times before the limit
        if now - self.last_sign >= self.silence_s / 4 and not self.server.busy() and self._asked(now):
            return "serving"
        if now - self.last_sign >= self.silence_s:
            return "hung"
        return "silent" if now > self.last_sign else "serving"

    def ended(self, now: float) -> None:
        """Start over after the server was ended."""
        self._start_over(now)

    def _fruitless(self, now: float) -> bool:
        tokens = self.server.tokens()
        if tokens is None or tokens != self.tokens:
            self.tokens, self.last_token = tokens, now
        return now - self.last_token >= self.fruitless_s

    def _asked(self, now: float) -> bool:
        answer = self.server.complete(max(1.0, self.silence_s / 4))
        self.remark = (
            "the server refuses this key or model: its engine cannot be judged" if answer == "refused" else ""
        )
        if answer == "nothing":
            return False
        self.last_sign = self.last_token = now
        return True

    def _still_starting(self, now: float) -> Verdict:
        return "never ready" if self.began is not None and now - self.began >= self.start_s else "starting"

    def _start_over(self, now: float) -> None:
        self.began, self.last_sign, self.ready, self.known = now, now, False, ()
        self.tokens, self.last_token = None, now


def silence_limit_s(plan: Plan) -> float:
    """Return the longest silence allowed, in seconds.

    It is the plan's own limit for a first token under load. It is never less than a sound engine was seen to
    need.
    """
    return max(LONGEST_SILENCE_S, plan.limits.ttft_p99_ms / 1000)


def fruitless_limit_s(plan: Plan, silence_s: float) -> float:
    """Return how long an engine with open requests may work without giving a token, in seconds.

    It is a multiple of the planned time for the longest prompt, beyond the longest silence.
    """
    longest = max(plan.max_model_len, plan.load.input_tokens) / plan.load.input_tokens
    return silence_s + PROMPT_SLACK * longest * plan.latency_ms.prefill_expected / 1000


class Look(Protocol):
    """Subject that the watchdog looks at; it reports each change."""

    def trouble(self, now: float) -> str:
        """Return why the server has to be ended; empty if it need not be."""

    def ended(self, now: float) -> None:
        """Start over after the server was ended."""


@dataclass
class ServerLook:
    """Look at whether the server answers."""

    state: Watch
    said: tuple[str, str] = ("", "")

    def trouble(self, now: float) -> str:
        verdict = self.state.look(now)
        if verdict == "hung":
            return f"no sign of the engine for {self.state.silence_s:g} s"
        if verdict == "fruitless":
            return f"no token to anybody for {self.state.fruitless_s:g} s, though the engine works"
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
    """Look at whether the hosts of one server are still joined."""

    bond: Bond
    server: VllmServer
    deploy: Deploy
    joined: psutil.Process | None = None
    """The server as which this host joined. The one that its service manager has started since then is
    nobody's trouble.
    """

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
            say(f"joined: {place}, rendezvous at {self.deploy.nodes[0]} port {self.deploy.master_port}")
        return ""

    def ended(self, now: float) -> None:
        self.bond.known, self.joined = frozenset(), None

    def _running(self) -> psutil.Process | None:
        processes = self.server.processes()
        return processes[-1] if processes else None


def say(text: str) -> None:
    sys.stdout.write(f"watchdog: {visible(text)}\n")
    sys.stdout.flush()
