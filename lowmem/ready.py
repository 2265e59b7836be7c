"""`lowmem ready`: waits for a real completion, so that a unit counts as started when it serves, and not when its process runs.

Of a server that spans several hosts only the first can be asked; another one counts as started when it has joined the first.

Run by systemd as ExecStartPost, which names the server's process in MAINPID: once that is gone there is nothing to wait for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import psutil
import typer

from lowmem.errors import BadInput
from lowmem.measure import read_plan
from lowmem.members import Hosts, MemberHosts
from lowmem.watchdog import Server, VllmServer

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
    return f"not joined with {hosts.first} within {timeout_s:g} s: is its unit running, and does lowmem_peers there let this host in?"


def main_process_lives() -> bool:
    """Of the unit whose ExecStartPost this is; true where there is none."""
    number = os.environ.get("MAINPID", "")
    if not number.isdigit():
        return True
    try:
        return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ready(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    env_file: Annotated[Path, typer.Option(help="vllm.env of the deployment, which holds the API key")],
    timeout_s: Annotated[float, typer.Option(min=0, help="0: the plan's limit for a start")] = 0,
) -> None:
    """Wait until a deployed server answers a completion, or has joined the host that does; exit status 1 where it will not."""
    planned = read_plan(plan)
    if planned.deploy is None:
        raise BadInput(f"--plan {plan} names no port and model: give the plan.json of a deployment")
    limit_s = timeout_s or planned.service.timeout_start_s
    if planned.deploy.rank:
        trouble = wait_joined(MemberHosts(planned.deploy), main_process_lives, limit_s)
    else:
        trouble = wait(VllmServer(planned, env_file), main_process_lives, limit_s)
    if trouble:
        sys.stderr.write(f"ready: {trouble}\n")
        raise typer.Exit(1)
