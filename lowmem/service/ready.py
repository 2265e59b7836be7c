"""`lowmem ready`: waits for a real completion, so that a unit counts as started when it serves, and not when
its process runs.

Of a server that spans several hosts only the first can be asked; another one counts as started when it has
joined the first.

Run by systemd as ExecStartPost, which names the server's process in MAINPID: once that is gone there is
nothing to wait for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

from lowmem.service.members import Hosts
from lowmem.service.server import Server

PAUSE_S = 1.0


def wait(server: Server, alive: Callable[[], bool], timeout_s: float) -> str:
    """Empty after a completion, else why there will be none."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        answer = server.complete(min(60.0, timeout_s))
        if answer == "tokens":
            return ""
        if answer == "refused":
            return "the server refuses this deployment's key or model"
        if not alive():
            return "the server has ended"
        time.sleep(PAUSE_S)
    return f"no completion within {timeout_s:g} s"


def wait_joined(hosts: Hosts, alive: Callable[[], bool], timeout_s: float) -> str:
    """Empty once this host's engine is connected with the first host's, else why it will not be."""
    began = time.monotonic()
    before: frozenset[object] = frozenset()
    while time.monotonic() - began < timeout_s:
        seen = hosts.connections()
        if before & seen:  # twice in a row: a watchdog that asks whether the port is there is gone by then
            return ""
        if not alive():
            return "the engine has ended"
        before = seen
        time.sleep(PAUSE_S)
    return (
        f"not joined with {hosts.first} within {timeout_s:g} s: is its unit running, and does lowmem_peers"
        " there let this host in?"
    )


def main_process_lives() -> bool:
    """Of the unit whose ExecStartPost this is; true where there is none."""
    number = os.environ.get("MAINPID", "")
    if not number.isdigit():
        return True
    try:
        return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
