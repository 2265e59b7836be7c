"""Defines the command `lowmem watch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read_deployed_plan
from lowmem.errors import BadInput
from lowmem.service.members import Bond, MemberHosts
from lowmem.service.server import VllmServer
from lowmem.service.watchdog import (
    Look,
    MemberLook,
    ServerLook,
    Watch,
    fruitless_limit_s,
    say,
    silence_limit_s,
)


def watch(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    env_file: Annotated[Path, typer.Option(help="vllm.env of the deployment, which holds the API key")],
    silence_s: Annotated[
        float, typer.Option(help="seconds that a ready engine may be silent; 0: from the plan")
    ] = 0,
    every_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 5,
    report_s: Annotated[
        float, typer.Option(min=0, help="seconds that a server gets to answer open requests with an error")
    ] = 15,
) -> None:
    """End a deployed server when its engine hangs.

    Its service manager starts it again.
    """
    planned = read_deployed_plan(plan)
    if silence_s < 0:
        raise BadInput(f"--silence-s {silence_s:g} must be 0 (from the plan) or more")
    server = VllmServer(planned, env_file)
    looks: list[Look] = []
    if planned.hosts > 1:
        looks.append(MemberLook(Bond(MemberHosts(planned.deploy)), server, planned.deploy))
    if planned.deploy.rank == 0:
        silence = silence_s or silence_limit_s(planned)
        state = Watch(server, silence, planned.service.timeout_start_s, fruitless_limit_s(planned, silence))
        say(
            f"watching {server.url}; limits: {state.silence_s:g} s of silence, {state.fruitless_s:.0f} s of"
            f" work without a token, {state.start_s:g} s to the first completion"
        )
        looks.append(ServerLook(state))
    while True:
        for look in looks:
            if why := look.trouble(time.monotonic()):
                ended = server.end(report_s)
                say(
                    f"{why}: ended {', '.join(ended)}" if ended else f"{why}, and no server of this plan runs"
                )
                for other in looks:
                    other.ended(time.monotonic())
                break
        time.sleep(every_s)
