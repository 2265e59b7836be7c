"""A client that keeps a ledger: each request ended with a complete answer, or with an error that the client
saw, or it was lost.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

End = Literal["answer", "error", "lost"]
# longer than the watchdog and a restart together: what takes longer has no end
LOST_AFTER_S = 400


@dataclass(frozen=True)
class Entry:
    """How one request ended. `status`: HTTP's, 0 where there was none; `said`: the error as the client saw
    it.
    """

    end: End
    status: int = 0
    tokens: int = 0
    said: str = ""


@dataclass(frozen=True)
class Client:
    url: str
    # a failed test shows its fixtures in the log
    key: str = field(repr=False)
    model: str

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """A gateway's certificate was made on its host, for a name that this machine does not resolve: it is
        not looked at.
        """
        address = urlsplit(self.url)
        if address.scheme == "https":
            return http.client.HTTPSConnection(
                address.netloc, timeout=timeout_s, context=ssl._create_unverified_context()
            )
        return http.client.HTTPConnection(address.netloc, timeout=timeout_s)

    def raw(
        self,
        body: bytes,
        path: str = "/v1/completions",
        key: str | None = None,
        timeout_s: float = LOST_AFTER_S,
    ) -> Entry:
        """One POST of these bytes; `key` empty: no authorization header."""
        headers = {"Content-Type": "application/json"}
        key = self.key if key is None else key
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection = self.connection(timeout_s)
        status = 0
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            status = answer.status
            if status != 200:
                return Entry("error", status, said=answer.read().decode(errors="replace")[:500])
            if "event-stream" in answer.headers.get("Content-Type", ""):
                return stream_end(answer)
            return Entry("answer", 200, json.loads(answer.read())["usage"]["completion_tokens"])
        except TimeoutError:
            return Entry("lost", status, said=f"nothing for {timeout_s} s")
        except (OSError, http.client.HTTPException) as error:
            return Entry("error", status, said=f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError) as error:
            return Entry("lost", status, said=f"half an answer: {error}")
        finally:
            connection.close()

    def complete(
        self, tokens: int, prompt: str | list[int] = "Once upon a time", stream: bool = False, **more: Any
    ) -> Entry:
        """`tokens` tokens, no fewer: an answer with another number of them is lost."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        entry = self.raw(json.dumps(body).encode(), **more)
        if entry.end == "answer" and entry.tokens != tokens:
            return Entry("lost", entry.status, entry.tokens, f"{entry.tokens} of {tokens} tokens")
        return entry

    def get(self, path: str, timeout_s: float = 10) -> tuple[int, str]:
        connection = self.connection(timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def total(self, metric: str) -> int:
        """The sum of all series of one of the engine's metrics."""
        text = self.get("/metrics")[1]
        return sum(
            int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(f"{metric}{{")
        )

    def running(self) -> int:
        """Requests that the engine works on, as it says in its metrics."""
        return self.total("vllm:num_requests_running")

    def until_running(self, count: int, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running() != count:
            assert time.monotonic() < deadline, f"{self.running()} requests run, waited for {count}"
            time.sleep(0.2)

    def recovery_s(self, began: float, timeout_s: float = 900) -> float:
        """Seconds from `began` (monotonic) to the next complete answer."""
        while time.monotonic() - began < timeout_s:
            if self.complete(2, timeout_s=60).end == "answer":
                return time.monotonic() - began
            time.sleep(0.5)
        raise AssertionError(f"no answer {timeout_s:g} s after the fault")


def stream_end(answer: http.client.HTTPResponse) -> Entry:
    """Reads server-sent events to [DONE]; a stream that is cut or that ends without it is no answer."""
    tokens, rest = 0, b""
    while True:
        piece = answer.read1(65536)
        if not piece:
            return Entry("lost", 200, tokens, "the stream ended without [DONE]")
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return Entry("answer", 200, tokens)
            event = json.loads(line[6:])
            if "error" in event:
                return Entry("error", 200, tokens, json.dumps(event["error"])[:500])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)


class Ledger:
    """Requests under way while a fault is injected; `entries` after the `with` block holds how each of them
    ended.
    """

    def __init__(self) -> None:
        self.futures: list[Future[Entry]] = []
        self.entries: list[Entry] = []
        self.ended: list[float] = []

    @property
    def ends(self) -> dict[str, int]:
        return dict(Counter(entry.end for entry in self.entries))

    def nothing_lost(self) -> None:
        lost = [entry for entry in self.entries if entry.end == "lost"]
        assert lost == []

    def away_s(self) -> float | None:
        """Seconds from the first request that ended with an error to the next answer (`streaming` only); None
        where all were answered.
        """
        failed = next((n for n, entry in enumerate(self.entries) if entry.end == "error"), None)
        if failed is None:
            return None
        back = next(n for n, entry in enumerate(self.entries) if n > failed and entry.end == "answer")
        return self.ended[back] - self.ended[failed]

    def __str__(self) -> str:
        ends = self.ends
        answered, failed, lost = (ends.get(end, 0) for end in ("answer", "error", "lost"))
        return f"{len(self.entries)} requests: {answered} answered, {failed} ended with an error, {lost} lost"


@contextmanager
def under_load(client: Client, clients: int = 8, tokens: int = 400) -> Iterator[Ledger]:
    """Half of the clients stream, half wait for the whole answer; inside the block all of
    them are running.
    """
    ledger = Ledger()
    with ThreadPoolExecutor(clients) as pool:
        ledger.futures = [
            pool.submit(client.complete, tokens, f"Story {n}: ", n % 2 == 0) for n in range(clients)
        ]
        client.until_running(clients)
        yield ledger
        ledger.entries = [future.result() for future in ledger.futures]


@contextmanager
def streaming(client: Client, tokens: int = 60) -> Iterator[Ledger]:
    """One stream after another while the block runs, also while nobody answers, and until the first answer
    after it.
    """
    ledger = Ledger()
    over = threading.Event()

    def ask() -> None:
        answered = time.monotonic()
        while not over.is_set() or ledger.entries[-1].end != "answer":
            ledger.entries.append(client.complete(tokens, stream=True))
            ledger.ended.append(time.monotonic())
            if ledger.entries[-1].end == "answer":
                answered = ledger.ended[-1]
            else:
                assert ledger.ended[-1] - answered < 1800, "nobody answers any more"
                time.sleep(2)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield ledger
        finally:
            over.set()
        asking.result()


class SlowReader(threading.Thread):
    """Asks for a stream and reads it in small sips with pauses; `text` is what came, in `ended`
    how it went.
    """

    def __init__(self, client: Client, tokens: int, sip_bytes: int, pause_s: float) -> None:
        super().__init__(daemon=True)
        body = json.dumps(
            {
                "model": client.model,
                "prompt": "Slowly",
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        )
        address = urlsplit(client.url)
        self.socket = socket.socket()
        # a small window, so that the server's writes really wait for this client
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.settimeout(LOST_AFTER_S)
        self.socket.connect((address.hostname, address.port))
        self.socket.sendall(
            (
                f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer"
                f" {client.key}\r\nContent-Type: application/json\r\nContent-Length:"
                f" {len(body)}\r\nConnection: close\r\n\r\n{body}"
            ).encode()
        )
        self.sip_bytes, self.pause_s = sip_bytes, pause_s
        self.text = b""

    def run(self) -> None:
        while sip := self.socket.recv(self.sip_bytes):
            self.text += sip
            time.sleep(self.pause_s)
        self.socket.close()
