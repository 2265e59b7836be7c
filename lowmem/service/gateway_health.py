"""Says on a local socket whether the server can complete a request, for the gateway's /healthz and /metrics.

vLLM's own /health answers 200 while its engine hangs. So the answer here is the watchdog's judgement
(`lowmem.service.watchdog.Watch`) with a shorter limit. New tokens prove that the engine works. An idle engine
is asked for one token; a busy one is never asked.

The last judgement is kept, so a load balancer that asks every second costs the engine nothing. A judgement
that is too old counts as a no.
"""

from __future__ import annotations

import json
import math
import socketserver
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.files import read_text
from lowmem.service.server import Server
from lowmem.service.watchdog import Watch


@dataclass
class Health:
    """Last judgement on the server.

    Times are seconds of a monotonic clock. `stale_s` is how long the engine, or this program, may be silent.
    """

    server: Server
    stale_s: float
    reason: str = "not asked yet"
    looked: float = field(default=-math.inf)

    def __post_init__(self) -> None:
        self.watch = Watch(self.server, self.stale_s, math.inf)

    def look(self, now: float) -> None:
        """Judge the server now and keep the judgement."""
        verdict = self.watch.look(now)
        self.reason = self.watch.remark or ("" if verdict in ("serving", "silent") else verdict)
        self.looked = now

    def trouble(self, now: float) -> str:
        """Return why no request can be completed; empty if one can."""
        if now - self.looked > self.stale_s and self.looked > -math.inf:
            return f"last looked {now - self.looked:.0f} s ago"
        return self.reason

    def sign_age_s(self, now: float) -> float:
        """Return the seconds since the engine last showed that it works; infinite before its first
        completion.
        """
        return now - self.watch.last_sign if self.watch.ready else math.inf


def metrics(health: Health, now: float, more: str) -> str:
    """Format the judgement as Prometheus text; `more` is text of that format to append."""
    age = health.sign_age_s(now)
    return (
        "# HELP lowmem_gateway_can_complete Whether a request can be completed now, as /healthz says.\n#"
        " TYPE lowmem_gateway_can_complete gauge\nlowmem_gateway_can_complete"
        f" {0 if health.trouble(now) else 1}\n# HELP lowmem_gateway_engine_sign_age_seconds Since the engine"
        " last showed that it works; +Inf before its first completion.\n# TYPE"
        " lowmem_gateway_engine_sign_age_seconds gauge\nlowmem_gateway_engine_sign_age_seconds"
        f" {'+Inf' if math.isinf(age) else f'{age:.1f}'}\n{more}"
    )


def text_of(path: Path | None) -> str:
    """Read a file; empty if there is none yet, or another thing than a text in its place."""
    try:
        return read_text(path) if path else ""
    except BadInput:
        return ""


def serve(health: Health, path: Path, figures: Path | None = None) -> socketserver.ThreadingUnixStreamServer:
    """Open a server on the socket `path`.

    Every user of this host may ask it, since it tells no secret.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10
        """Seconds that a client may be silent. Any user of this host may connect, and each takes a thread."""

        def do_GET(self) -> None:
            now = time.monotonic()
            if self.path == "/healthz":
                trouble = health.trouble(now)
                words = {"status": "unavailable", "reason": trouble} if trouble else {"status": "ok"}
                self._say(503 if trouble else 200, "application/json", json.dumps(words) + "\n")
            elif self.path == "/metrics":
                self._say(200, "text/plain; version=0.0.4", metrics(health, now, text_of(figures)))
            else:
                self._say(404, "application/json", "{}\n")

        def _say(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "gateway"

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
            """Log nothing, since a load balancer asks every few seconds."""

    if path.is_socket():  # of a process that was killed
        path.unlink()
    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    server.daemon_threads = True
    path.chmod(0o666)
    return server
