"""Checks API keys against a file that is read again when it changes.

So a key comes and goes without a restart of the server. vLLM reads its keys only at its start (`--api-key`,
VLLM_API_KEY). It guards /v1, /v2, /inference and /cohere with them (vllm 0.32,
entrypoints/serve/middleware/authenticate.py).

`--middleware lowmem.api_keys.ApiKeys` takes the place of vLLM's check. The header, the answer and the
comparison of hashes in constant time are the same. But it guards every path that OPEN does not name.

LOWMEM_API_KEYS names the file, which has mode 0600. Its lines are VLLM_API_KEY=KEY or
VLLM_API_KEY_<name>=KEY. The keys themselves are in no environment.

This module runs in the server, so it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import shlex
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

OPEN = frozenset({"/health", "/metrics"})
"""Paths that need no key, for load balancers and scrapers. They tell nothing about a request. Every other
path needs a key, even an unknown one.
"""

VARIABLE = "VLLM_API_KEY"

FILE = "LOWMEM_API_KEYS"

LIMIT_BYTES = 2**20
CLIENT = "lowmem.client"
"""Entry of a request's scope that says whose it is, without the key itself."""

# A child of vLLM's own logger writes to the server's log.
log = logging.getLogger("vllm.lowmem.api_keys")

Scope = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

App = Callable[[Scope, Receive, Send], Awaitable[None]]


def read_keys(text: str) -> dict[str, str]:
    """Return key by name from the lines of a key file; the name of VLLM_API_KEY itself is empty.

    Other lines are skipped.
    """
    keys = {}
    for line in text.splitlines():
        variable, _, value = line.strip().partition("=")
        key = "".join(shlex.split(value)) if variable.startswith(VARIABLE) else ""
        if key and variable[len(VARIABLE) :][:1] in ("", "_"):
            keys[variable[len(VARIABLE) + 1 :]] = key
    return keys


class KeyFile:
    """Hashes of the keys in a file.

    A file that cannot be read or holds no key changes nothing: the keys known before stay valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: tuple[bytes, ...] = ()
        self._seen: object = None
        self._failed: object = None

    def current(self) -> tuple[bytes, ...]:
        """Return the SHA-256 of each key, after reading the file again if it changed."""
        try:
            now = self.path.stat()
            mark: object = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        except OSError as error:
            mark = type(error).__name__
        if mark != self._seen:
            self._read(mark)
        return self.hashes

    def _read(self, mark: object) -> None:
        try:
            keys = read_keys(_regular_text(self.path))
        except (OSError, ValueError) as error:
            # What passes, as a want of descriptors, is tried again: a revoked key does not stay.
            self._seen = mark if isinstance(error, ValueError) else None
            if self._failed != mark:
                self._failed = mark
                log.error(
                    "API keys: %s cannot be read (%s); those known before stay",
                    self.path,
                    type(error).__name__,
                )
            return
        self._seen, self._failed = mark, None
        if not keys:
            log.error("API keys: %s holds none; those known before stay", self.path)
            return
        self.hashes = tuple({hashlib.sha256(key.encode()).digest() for key in keys.values()})
        log.info("API keys: %s", ", ".join(sorted(name for name in keys if name)) or "one without a name")


def _regular_text(path: Path) -> str:
    """Return the text of a key file. OSError for what would block this server, or never end."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT_BYTES:
            raise OSError(f"{path} is no file of at most {LIMIT_BYTES} bytes")
        return file.read()


class ApiKeys:
    """ASGI middleware that lets requests with a known key pass. It does not touch a stream that has begun."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.keys = KeyFile(Path(os.environ.get(FILE, "")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # a browser asks OPTIONS before it may send a key
        if (
            scope["type"] not in ("http", "websocket")
            or scope.get("method") == "OPTIONS"
            or self._open(scope)
            or self._known(scope)
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send, "http.response")
        elif "websocket.http.response" in (scope.get("extensions") or {}):
            await _refuse(send, "websocket.http.response")
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "Unauthorized"})

    def _open(self, scope: Scope) -> bool:
        path: str = scope["path"]
        return scope["type"] == "http" and path.removeprefix(scope.get("root_path", "")) in OPEN

    def _known(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, key = sent.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key).digest()
        known = False
        for one in self.keys.current():  # compare with all of them, so that the time tells nothing
            known |= hmac.compare_digest(digest, one)
        if known:
            scope[CLIENT] = digest.hex()[:16]
        return known


async def _refuse(send: Send, kind: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": f"{kind}.start", "status": 401, "headers": headers})
    await send({"type": f"{kind}.body", "body": b'{"error":"Unauthorized"}'})
