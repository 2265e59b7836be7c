"""Watches whether the hosts of a multi-host server are still joined, as each host sees it.

A fresh engine on the first host needs fresh engines on the others. None of them notices by itself that
another one is gone. In vLLM 0.32 the second host's workers outlive the first host's, and wait.

The workers of the other hosts join by a TCP connection to the rendezvous port, torch's TCPStore. The first
host's worker holds that port for as long as it lives. Each connection is made once, at the start, and the
kernel closes it when either process dies. So the connection, with its two ports, identifies this run of the
engines. Once it is gone, these engines can never join again, whichever host restarts first.

A host that loses power or its network closes nothing, so the connection stays. Therefore the hosts also ask
each other's kernels at that port. The first host has an engine there, the others refuse, and either answer is
a sign of life.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import Literal, Protocol

import psutil

from lowmem.schema import Deploy

Connection = tuple[str, int, str, int]
"""Address and port of this end, and of the other."""

Meeting = Literal["there", "refused", "nothing"]

MEETING_TIMEOUT_S = 3.0

HOST_SILENCE_S = 30.0
"""Decided, not measured. A kernel answers at once, whatever its engine does, and a migrated machine is back
sooner.
"""


class Hosts(Protocol):
    """Questions about the hosts of a server."""

    first: str

    def connections(self) -> frozenset[Connection]:
        """Return the connections to the rendezvous port: on the first host those of the others, elsewhere
        this host's own.
        """

    def answers(self) -> dict[str, Meeting]:
        """Return the answers of other kernels at the rendezvous port.

        The first host asks all others; the others ask the first.
        """


class MemberHosts:
    """Answers from this host's kernel."""

    def __init__(self, deploy: Deploy) -> None:
        self.first, *self.others = deploy.nodes
        self.port, self.rank = deploy.master_port, deploy.rank

    def connections(self) -> frozenset[Connection]:
        joined = set()
        for c in psutil.net_connections("tcp"):
            if c.status != psutil.CONN_ESTABLISHED or len(c.laddr) != 2 or len(c.raddr) != 2:
                continue
            (here, port), (there, their_port) = c.laddr, c.raddr
            here, there = plain(here), plain(there)
            if (
                (there, their_port) == (self.first, self.port)
                if self.rank
                else port == self.port and there in self.others
            ):
                joined.add((here, port, there, their_port))
        return frozenset(joined)

    def answers(self) -> dict[str, Meeting]:
        return {host: self._answer(host) for host in ([self.first] if self.rank else self.others)}

    def _answer(self, host: str) -> Meeting:
        try:
            socket.create_connection((host, self.port), timeout=MEETING_TIMEOUT_S).close()
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "nothing"
        return "there"


def plain(address: str) -> str:
    """Return 10.0.0.2 for ::ffff:10.0.0.2, which a socket of both families shows."""
    try:
        mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
    except ValueError:  # with a zone
        return address
    return str(mapped or address)


@dataclass
class Bond:
    """Connection of this host's engine with the others'.

    It has no clock of its own: `look(now)` is called every few seconds. `silence_s` is how long another host
    may not answer at all. A host that has never answered may be behind a firewall, so its silence does not
    count.
    """

    hosts: Hosts
    silence_s: float = HOST_SILENCE_S
    known: frozenset[Connection] = frozenset()
    heard: dict[str, float] = field(default_factory=dict)
    _before: frozenset[Connection] = field(default=frozenset(), repr=False)

    def look(self, now: float) -> str:
        """Return once why this host's engine can no longer serve.

        It is empty while the engine is joined, or was not yet.
        """
        seen = self.hosts.connections()
        if not self.known:
            # twice in a row, since a mere probe of the port is gone by the next look
            self.known, self._before, self.heard = self._before & seen, seen, {}
            return ""
        why = self._broken(seen, now)
        if why:
            self.known, self._before = frozenset(), frozenset()
        return why

    def _broken(self, seen: frozenset[Connection], now: float) -> str:
        if gone := sorted(self.known - seen):
            return f"the connection with {gone[0][2]} has ended, and a new engine there cannot join this one"
        for host, answer in self.hosts.answers().items():
            if answer == "refused" and host == self.hosts.first:
                return f"{host} no longer has an engine at the rendezvous port"
            if answer != "nothing":
                self.heard[host] = now
            elif now - self.heard.get(host, now) >= self.silence_s:
                return f"{host} has not answered for {self.silence_s:g} s"
        return ""
