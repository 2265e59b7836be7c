"""Spaces the requests of one key, so that other keys find the server's event loop free.

The API server reads, counts and refuses requests in one loop. A client that repeats a refused request at once
would keep that loop busy, and every token of the others passes through it.

A key's bodies take at most half of the loop's time. Its refusals come at most once in REFUSAL_S, whether this
server or the engine refuses. What comes sooner waits; nothing is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

REQUEST_S = 0.001
"""Time of the loop that a request takes before its body is parsed, in seconds. A core of an EPYC needed
0.6 ms for one that is refused.
"""

BYTE_S = 60e-9
"""Time that a byte of a body takes, in seconds. The same core needed 4.1 ms for a schema of 73 kB."""

REFUSAL_S = 0.025
"""Time between two refusals of one key, in seconds. The costliest refusal took 5.7 ms: the server reads the
rest of 9 MiB after it has refused them by their length.
"""

LONGEST_S = 4.0
"""Longest wait, in seconds, so that clients that leave do not shut their key out."""


class Pace:
    """Next free moment of each key. It belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.free_at: dict[str, float] = {}

    async def body(self, key: str, size: int) -> None:
        """Wait until the key may have a body of `size` bytes parsed."""
        await self._wait(key, 2 * (REQUEST_S + BYTE_S * size))

    async def refusal(self, key: str) -> None:
        """Wait until the key may get its next refusal."""
        await self._wait(key, REFUSAL_S)

    async def _wait(self, key: str, cost_s: float) -> None:
        now = self.clock()
        start = min(max(now, self.free_at.get(key, now)), now + LONGEST_S)
        self.free_at[key] = start + cost_s
        if start > now:
            await asyncio.sleep(start - now)
