"""Admits requests to the engine by the work that they ask for, so that no client ends or starves the others.

`--middleware lowmem.service.admission.Admission` stands before that of the API keys. The server adds each
middleware outside of the one before it, so a client without a key costs nothing here.

A request is read within the limits of LOWMEM_ADMISSION, the plan's `admission` as JSON. It is counted
(`request_work`), waits its turn between the keys (`fair_queue`) and goes to the engine whole. A request that
exceeds a limit gets a 4xx in OpenAI's shape, which names limit and value. One key's bodies and refusals are
spaced (`pace`). A stream that has begun is not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client import Counter as Counted
from pydantic import ValidationError

from lowmem.schema import AdmissionLimits
from lowmem.service.api_keys import CLIENT, App, Receive, Scope, Send
from lowmem.service.fair_queue import FairQueue, Ticket
from lowmem.service.pace import Pace
from lowmem.service.refusal import Refusal
from lowmem.service.request_work import Work, parse_body, work_of

VARIABLE = "LOWMEM_ADMISSION"

SERVED = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/score",
        "/rerank",
        "/score",
        "/classify",
        "/pooling",
        "/tokenize",
        "/detokenize",
    }
)
"""Paths that take work from clients. No other path takes a POST: some of vLLM's stop or change the engine."""

BODY_S = 60.0
"""Longest time for the arrival of a whole body, in seconds."""

COMPILE_S = 1.0
"""Time that a grammar of the greatest size compiles on, in seconds, after its client has left."""

LOOP_BYTES = 2**16
"""Size of a body from which on a thread parses it, in bytes, and the event loop goes on."""

UNCOMPILED = b"Internal server error"
"""What vLLM 0.32.0 says with status 500 of a grammar that its compiler refuses (entrypoints/generate/base).
It says something else of an engine that has died.
"""

READ_S = 2.0
"""Time after which a client that does not read its answer loses its place; the engine does not wait."""

log = logging.getLogger("vllm.lowmem.admission")


class Metrics:
    """Counts for the server's /metrics, beside the engine's own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.waiting = Gauge(
            "lowmem:requests_waiting", "Requests that wait for a place in the engine.", registry=registry
        )
        self.refused = Counted(
            "lowmem:requests_refused", "Requests that were not admitted.", ["status"], registry=registry
        )


def _too_many(said: str) -> Refusal:
    return Refusal(said, status=429, code="too_many_requests")


@contextlib.contextmanager
def _one_of(counted: Counter[str], key: str, most: int, said: str) -> Iterator[None]:
    """Count one more of a key inside the block. Raises Refusal, which says `said`, if it has `most`."""
    if counted[key] >= most:
        raise _too_many(said)
    counted[key] += 1
    try:
        yield
    finally:
        counted[key] -= 1


@dataclass
class Held:
    """Bodies that are held, in bytes, and open requests, both by key."""

    limits: AdmissionLimits
    bytes: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    arriving: Counter[str] = field(default_factory=Counter)

    def one_arriving(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Count a request while its body arrives: slow bodies leave half of a key's requests to others."""
        most = max(1, self.limits.open_requests // 2)
        said = f"the bodies of {most} requests of this key are arriving, the limit; send them faster"
        return _one_of(self.arriving, key, most, said)

    def one_more(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Count a request while it is open. Raises Refusal if its key has too many."""
        most = self.limits.open_requests
        said = f"this key has {self.requests[key]} open requests, the limit; wait for their answers"
        return _one_of(self.requests, key, most, said)

    def take(self, key: str, size: int) -> None:
        """Hold more bytes. Raises Refusal if that is too much for the key or the server."""
        ours, all_bytes = self.bytes[key] + size, self.bytes.total() + size
        if (
            ours > max(self.limits.held_bytes // 2, self.limits.body_bytes)
            or all_bytes > self.limits.held_bytes
        ):
            raise _too_many(
                f"open requests hold {all_bytes} bytes, {ours} of this key, more than the limit of"
                f" {self.limits.held_bytes} (half of it for one key); wait for their answers"
            )
        self.bytes[key] = ours

    def give_back(self, key: str, size: int) -> None:
        self.bytes[key] -= size


class Admission:
    """ASGI middleware that holds the plan's limits of work."""

    def __init__(
        self, app: App, limits: AdmissionLimits | None = None, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.app = app
        self.limits = limits or read_limits()
        self.queue = FairQueue(self.limits)
        self.pace = Pace()
        self.held = Held(self.limits)
        self.parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admission")
        self.metrics = Metrics(registry)
        self.metrics.waiting.set_function(lambda: self.queue.waiting)
        log.info("Admission: %s", self.limits.model_dump_json())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no model of a plan listens
            await send({"type": "websocket.close", "code": 1008, "reason": "not served here"})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] != "POST":
            if CLIENT in scope:
                await self.pace.body(scope[CLIENT], 0)
            await self.app(scope, receive, send)
        else:
            try:
                with self.held.one_more(scope.get(CLIENT, "")):
                    await self._admit(scope, receive, send)
            except Refusal as refusal:  # beyond its open requests, a key is not even kept waiting
                self.metrics.refused.labels(str(refusal.status)).inc()
                await _refuse(send, refusal)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, count and serve a request. Raises Refusal once its key may have the next one."""
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        answer = path.startswith("/v1/responses/") and path.endswith("/cancel")
        key: str = scope.get(CLIENT, "")
        try:
            if not answer and (path not in SERVED or path not in _routes(scope)):
                raise Refusal(f"POST {path[:80]} is not served here", status=404, code="not_found")
            async with self._read(scope, key, receive) as body:
                await self.pace.body(key, len(body))
                if answer:
                    await self.app(scope, _replay(body, receive), send)
                    return
                work = await self._count(body)
                await self._serve(scope, _Request(key, work, body, receive, send))
        except Refusal:
            await self.pace.refusal(key)
            raise

    async def _count(self, body: bytes) -> Work:
        """Count a body's work, beside the event loop if it is large. Raises Refusal."""
        if len(body) < LOOP_BYTES:
            return work_of(parse_body(body), self.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.parser, lambda: work_of(parse_body(body), self.limits))

    async def _serve(self, scope: Scope, request: _Request) -> None:
        """Let the request wait its turn and have its answer."""
        ticket = self.queue.enter(request.key, request.work)
        gone = asyncio.ensure_future(request.receive())
        try:
            waits: set[asyncio.Future[Any]] = {ticket.admitted, gone}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not ticket.admitted.done():
                return  # the client has left the queue
            await self._answer(scope, request, ticket, gone)
        finally:
            gone.cancel()
            self.queue.leave(ticket)

    async def _answer(
        self, scope: Scope, request: _Request, ticket: Ticket, gone: asyncio.Future[Any]
    ) -> None:
        compiling = bool(ticket.work.grammar)
        loop = asyncio.get_running_loop()
        computed = loop.call_later(
            ticket.work.prompt * self.limits.prompt_token_s, self.queue.computed, ticket
        )  # an answer that is no stream shows nothing of its prompt

        failed: MutableMapping[str, Any] | None = None

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal compiling, failed
            if message.get("status", 0) >= http.HTTPStatus.BAD_REQUEST:  # the engine refuses
                self.queue.leave(ticket)
                await self.pace.refusal(request.key)
            if message.get("body"):  # the first token follows prompt and compiling
                self.queue.computed(ticket)
                if compiling:
                    compiling = False
                    self.queue.compiled(ticket)
            if message.get("status") == http.HTTPStatus.INTERNAL_SERVER_ERROR and ticket.work.grammar:
                failed = message  # its body says whose fault it is
                return
            unread = loop.call_later(READ_S, self.queue.leave, ticket)
            try:
                if failed and UNCOMPILED in message.get("body", b""):
                    await _refuse(
                        request.send,
                        Refusal(
                            "the engine cannot compile what has to constrain the"
                            " answer: a grammar that never ends, or too great a pattern; simplify it"
                        ),
                    )
                    return
                if failed:
                    await request.send(failed)
                    failed = None
                await request.send(message)
            finally:
                unread.cancel()

        try:
            await self.app(scope, _replay(request.body, lambda: asyncio.shield(gone)), send)
        finally:
            computed.cancel()
            if compiling:
                loop.call_later(COMPILE_S, self.queue.compiled, ticket)

    @contextlib.asynccontextmanager
    async def _read(self, scope: Scope, key: str, receive: Receive) -> AsyncIterator[bytes]:
        """Read the body within the limits, and hold it until the answer has ended."""
        self._check_headers(dict(scope["headers"]))
        chunks: list[bytes] = []
        try:
            with self.held.one_arriving(key):
                await self._arrive(key, receive, chunks)
            chunks[:] = [b"".join(chunks)]
            yield chunks[0]
        finally:
            self.held.give_back(key, sum(map(len, chunks)))

    async def _arrive(self, key: str, receive: Receive, chunks: list[bytes]) -> None:
        """Add what the client sends to `chunks`. Raises Refusal if that is too much or takes too long."""
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal("the client left", status=499)
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self.limits.body_bytes:
                        raise _too_large(f"at least {size}", self.limits)
                    self.held.take(key, len(chunk))
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(f"the body did not arrive in {BODY_S:g} s", status=408, code="timeout") from None

    def _check_headers(self, headers: dict[bytes, bytes]) -> None:
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            raise Refusal(
                f"content-encoding {encoding[:40].decode('latin-1')!r} is not read here; send the body plain",
                status=415,
                code="unsupported_encoding",
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self.limits.body_bytes):
            raise _too_large(length[:40].decode(), self.limits)


@dataclass(frozen=True)
class _Request:
    """A request that was read and counted."""

    key: str
    work: Work
    body: bytes
    receive: Receive
    send: Send


def read_limits() -> AdmissionLimits:
    """Read the limits from the environment. Raises RuntimeError, one line, if it holds none."""
    text = os.environ.get(VARIABLE, "")
    try:
        return AdmissionLimits.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RuntimeError(
            f"{VARIABLE}: {where + ': ' if where else ''}{first['msg']}; start the server by the deployment's"
            " low_mem.sh, whose environment has the plan's limits"
        ) from None


def _replay(body: bytes, then: Receive) -> Receive:
    """Give the app the body that was read, then what the client says after it."""
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await then()

    return receive


def _routes(scope: Scope) -> Container[str]:
    """Return the paths of the app that the server gives in `scope`; without one, every path is its own."""
    app = scope.get("app")
    return {getattr(route, "path", "") for route in app.routes} if app is not None else SERVED


def _too_large(size: str, limits: AdmissionLimits) -> Refusal:
    return Refusal(
        f"the body has {size} bytes, more than the limit of {limits.body_bytes}; shorten the request",
        status=413,
        code="limit_exceeded",
    )


async def _refuse(send: Callable[[MutableMapping[str, Any]], Awaitable[None]], refusal: Refusal) -> None:
    body = refusal.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 429:
        headers.append((b"retry-after", b"1"))
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
