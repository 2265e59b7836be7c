"""Defines the command `lowmem ready`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read_deployed_plan
from lowmem.service.members import MemberHosts
from lowmem.service.ready import main_process_lives, wait, wait_joined
from lowmem.service.server import VllmServer
from lowmem.text import visible


def ready(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    env_file: Annotated[Path, typer.Option(help="vllm.env of the deployment, which holds the API key")],
    timeout_s: Annotated[
        float, typer.Option(min=0, help="seconds to wait; 0: the plan's limit for a start")
    ] = 0,
) -> None:
    """Wait until a deployed server answers or has joined."""
    planned = read_deployed_plan(plan)
    limit_s = timeout_s or planned.service.timeout_start_s
    if planned.deploy.rank:
        trouble = wait_joined(MemberHosts(planned.deploy), main_process_lives, limit_s)
    else:
        trouble = wait(VllmServer(planned, env_file), main_process_lives, limit_s)
    if trouble:
        sys.stderr.write(f"ready: {visible(trouble)}\n")
        raise typer.Exit(1)
