"""Asks a running vLLM server how it is and ends the processes that hang."""

from __future__ import annotations

import http
import json
import math
import re
import signal
from pathlib import Path
from typing import Literal, Protocol

import psutil

from lowmem.errors import BadInput
from lowmem.files import parse_json, read_text
from lowmem.schema import DeployedPlan
from lowmem.service.api_keys import read_keys
from lowmem.service.call import call

# The engine's scheduler statistics set these. What the API server counts by itself proves nothing.
_ENGINE_METRICS = re.compile(
    r"^vllm:(?:generation_tokens_total|prompt_tokens_total|iteration_tokens_total_count|kv_cache_usage_perc"
    r"|num_requests_running|num_requests_waiting)\{[^}]*\} (\S+)$",
    re.MULTILINE,
)

_RUNNING = re.compile(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", re.MULTILINE)

_OPEN = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)

_GIVEN = re.compile(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)

Answer = Literal["tokens", "nothing", "refused"]


class Server(Protocol):
    """Questions that the watchdog asks a server; each call ends within `timeout_s`."""

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        """Read the engine's metrics.

        They are empty if the API server does not answer in time, and None if nobody listens.
        """

    def busy(self) -> bool:
        """Tell whether the last figures had a running request."""

    def tokens(self) -> float | None:
        """Return the tokens that all clients had so far, by the last figures; None: the engine owes none."""

    def complete(self, timeout_s: float) -> Answer:
        """Ask for one token.

        "refused" means that the API server rejects the key or the model, which proves nothing about the
        engine. "nothing" is also what a key with too many open requests gets.
        """


class VllmServer:
    """Server of vLLM on this host.

    The key is read again for each completion, so a rotated key causes no error.
    """

    def __init__(self, plan: DeployedPlan, env_file: Path) -> None:
        self.url = plan.deploy.local_url
        self.model = plan.deploy.served_model_name
        self.argv = plan.argv
        self.env_file = env_file
        self._running = False
        self._tokens: float | None = None

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        try:
            status, body = call(f"{self.url}/metrics", timeout_s)
        except ConnectionRefusedError:
            return None
        except OSError:
            return ()
        text = body.decode(errors="replace") if status == http.HTTPStatus.OK else ""
        self._running = any(_figure(value) > 0 for value in _RUNNING.findall(text))
        is_open = any(_figure(value) > 0 for value in _OPEN.findall(text))
        self._tokens = sum(map(_figure, _GIVEN.findall(text))) if is_open else None
        return tuple(_ENGINE_METRICS.findall(text))

    def busy(self) -> bool:
        return self._running

    def tokens(self) -> float | None:
        return self._tokens

    def complete(self, timeout_s: float) -> Answer:
        body = {"model": self.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        try:
            key = read_keys(read_text(self.env_file)).get("")
        except ValueError:  # no such file, or no key file: the server says what it thinks of no key
            key = None
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            status, said = call(f"{self.url}/v1/completions", timeout_s, json.dumps(body).encode(), headers)
        except OSError:
            return "nothing"
        if status == http.HTTPStatus.TOO_MANY_REQUESTS:  # this key has its share
            return "nothing"
        if status != http.HTTPStatus.OK:
            return "refused" if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else "nothing"
        try:
            return "tokens" if parse_json(said, "the answer")["usage"]["completion_tokens"] else "nothing"
        except (BadInput, LookupError, TypeError):
            return "nothing"

    def processes(self) -> list[psutil.Process]:
        """Find the API server of this plan by its arguments, and its descendants.

        The server comes last; the list is empty if there is none.
        """
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                if (
                    self.argv
                    and command[-len(self.argv) :] == self.argv
                    and "serve" in command[: -len(self.argv)]
                ):
                    return [*process.children(recursive=True), process]
            except psutil.Error:
                continue
        return []

    def end(self, report_s: float) -> list[str]:
        """Kill the engine and its workers, and return what was ended.

        The API server is killed too if it has not ended after `report_s` seconds.
        """
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


def _figure(value: str) -> float:
    """Return a figure of the server's metrics; 0 for one that is no number."""
    try:
        figure = float(value)
    except ValueError:
        return 0.0
    return figure if math.isfinite(figure) else 0.0


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "gone"


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:  # it has ended by itself
        return
