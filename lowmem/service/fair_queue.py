"""Lets requests into the engine in a fair order between API keys.

The engine serves first come, first served. So the queue is kept here, and the engine gets as many sequences
as it serves together. Four rules decide who is next.

The key goes first that has had the fewest tokens so far: prompts and longest answers, not requests.

A key that has sequences in the engine leaves places free for other keys, if they were here lately.

The engine computes one long prompt of such a key at a time, so that its steps have room for others.

The grammars of requests whose answer has not begun have a bounded size together.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lowmem.schema import AdmissionLimits
from lowmem.service.request_work import Work

REMEMBERED_S = 3600.0
"""How long a place is kept free for a key after its last request."""


@dataclass(eq=False)
class Ticket:
    """Stay of one request in the queue and in the engine."""

    key: str
    work: Work
    admitted: asyncio.Future[None]
    left: bool = False
    computing: bool = False  # its prompt, in the engine
    passed: bool = False  # a wider request, in a place that is kept free


@dataclass
class _Client:
    """State of one key."""

    waiting: deque[Ticket] = field(default_factory=deque)
    places: int = 0  # in the engine
    prompt: int = 0  # tokens of the prompts that the engine computes
    tokens: float = 0.0  # virtual time: what it was given, counted from where the others were when it came
    seen: float = 0.0


class FairQueue:
    """Queue before the engine. It belongs to one event loop; no call blocks."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        self.clients: dict[str, _Client] = {}
        self.free = limits.places
        self.passing = 0  # sequences that passed a wider request
        self.grammar = 0

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return sum(len(client.waiting) for client in self.clients.values())

    def enter(self, key: str, work: Work) -> Ticket:
        """Queue a request. Its ticket's `admitted` is done as soon as the engine may have it."""
        client = self.clients.setdefault(key, _Client())
        if not client.waiting and not client.places:
            busy = [c.tokens for c in self.clients.values() if c.waiting or c.places]
            client.tokens = max(client.tokens, min(busy, default=client.tokens))
        client.seen = self.clock()
        ticket = Ticket(key, work, asyncio.get_running_loop().create_future())
        client.waiting.append(ticket)
        self._admit()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a request's places back, or take it out of the queue. The second call does nothing."""
        if ticket.left:
            return
        ticket.left = True
        client = self.clients[ticket.key]
        if ticket.admitted.done():
            client.places -= ticket.work.sequences
            self.free += ticket.work.sequences
            self.passing -= ticket.work.sequences if ticket.passed else 0
            self._computed(ticket)
        else:
            client.waiting.remove(ticket)
        client.seen = self.clock()
        self._admit()

    def computed(self, ticket: Ticket) -> None:
        """Note that the engine has computed a request's prompt. The second call does nothing."""
        self._computed(ticket)
        self._admit()

    def _computed(self, ticket: Ticket) -> None:
        if ticket.computing:
            ticket.computing = False
            self.clients[ticket.key].prompt -= ticket.work.prompt

    def compiled(self, ticket: Ticket) -> None:
        """Give a request's share of the grammar compiler back."""
        self.grammar -= ticket.work.grammar
        self._admit()

    def _admit(self) -> None:
        while (ticket := self._next()) is not None:
            client = self.clients[ticket.key]
            client.waiting.popleft()
            client.places += ticket.work.sequences
            client.prompt += ticket.work.prompt
            client.tokens += ticket.work.tokens
            self.free -= ticket.work.sequences
            self.passing += ticket.work.sequences if ticket.passed else 0
            self.grammar += ticket.work.grammar
            ticket.computing = True
            ticket.admitted.set_result(None)

    def _next(self) -> Ticket | None:
        """Return the next request that fits, or None.

        A request that is too wide for the free places is waited for: narrower ones would pass it for ever.
        Only a key without a place may pass it, into the places that are kept free for such keys.
        """
        waiting = [client for client in self.clients.values() if client.waiting]
        passes = False
        for client in sorted(waiting, key=lambda c: (c.tokens, c.places)):
            ticket = client.waiting[0]
            width = ticket.work.sequences
            if passes and (client.places or self.passing + width > self.limits.kept_places):
                continue
            if width > self.free:
                passes = True
                continue
            others = self._others(client)
            without = sum(not other.places for other in others) if client.places else 0
            room = self.free - min(without, self.limits.kept_places)
            if width <= room and self._has_room(client, bool(others)):
                ticket.passed = passes
                return ticket
        return None

    def _has_room(self, client: _Client, others: bool) -> bool:
        """Tell whether the engine may have the prompt and the grammar of a key's next request."""
        work = client.waiting[0].work
        computes = not (client.prompt and others) or (
            client.prompt + work.prompt <= self.limits.prompt_at_once
        )
        compiles = not work.grammar or self.grammar + work.grammar <= self.limits.grammar_at_once
        return computes and compiles

    def _others(self, client: _Client) -> list[_Client]:
        """Return the other keys that were here lately."""
        since = self.clock() - REMEMBERED_S
        return [c for c in self.clients.values() if c is not client and (c.places or c.seen >= since)]
