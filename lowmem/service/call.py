"""Asks a server of this host over HTTP, within a time and a size that the server cannot extend.

`timeout_s` of the standard library bounds each read, so a server that sends a byte now and then would hold
its caller for ever. Here it bounds the whole call.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

ANSWER_LIMIT_BYTES = 8 * 2**20


def call(
    url: str, timeout_s: float, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Return the status and the body of an answer. No proxy is asked, and no redirect is followed.

    Raises ConnectionRefusedError if nobody listens, and OSError if no whole answer of at most
    ANSWER_LIMIT_BYTES comes within `timeout_s` seconds.
    """
    place = urlsplit(url)
    deadline = time.monotonic() + timeout_s
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout_s)
    late = threading.Event()
    with contextlib.closing(connection):
        connection.connect()
        here = connection.sock

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):
                here.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
        timer.daemon = True
        timer.start()
        try:
            connection.request(
                "GET" if body is None else "POST", place.path or "/", body, dict(headers or {})
            )
            answer = connection.getresponse()
            text = answer.read(ANSWER_LIMIT_BYTES + 1)
            if len(text) > ANSWER_LIMIT_BYTES:
                raise OSError(f"the answer is larger than {ANSWER_LIMIT_BYTES} bytes")
            if answer.length:  # what is still missing
                raise OSError("the answer is cut")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set():
                raise TimeoutError("timed out") from None
            if isinstance(error, OSError):
                raise
            raise OSError(f"no answer of HTTP ({type(error).__name__})") from None
        finally:
            timer.cancel()
    return answer.status, text
