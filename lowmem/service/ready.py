"""Waits for a real completion, so that a unit counts as started only when it serves.

Only the first host of a multi-host server can be asked. Another host counts as started when it has joined the
first.

systemd runs this as ExecStartPost and names the server's process in MAINPID. Once that process is gone, there
is nothing to wait for.
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
    """Wait for a completion. Return an empty text after one, else why there will be none."""
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
    """Wait until this host's engine has joined the first host's.

    Return an empty text then, else why it will not join.
    """
    began = time.monotonic()
    before: frozenset[object] = frozenset()
    while time.monotonic() - began < timeout_s:
        seen = hosts.connections()
        if before & seen:  # twice in a row, since a watchdog's probe of the port is gone by then
            return ""
        if not alive():
            return "the engine has ended"
        before = seen
        time.sleep(PAUSE_S)
    return (
        f"not joined with {hosts.first} within {timeout_s:g} s: check that its unit runs and that"
        " lowmem_peers there lets this host in"
    )


def main_process_lives() -> bool:
    """Tell whether the main process of this ExecStartPost's unit lives; true outside a unit."""
    number = os.environ.get("MAINPID", "")
    if not number.isdigit():
        return True
    try:
        return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
