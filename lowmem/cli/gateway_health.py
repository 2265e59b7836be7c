"""Defines the command `lowmem gateway-health`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read_deployed_plan
from lowmem.service.gateway_health import Health, serve
from lowmem.service.server import VllmServer
from lowmem.text import visible


def gateway_health(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    env_file: Annotated[Path, typer.Option(help="vllm.env of the deployment, which holds the API key")],
    socket: Annotated[Path, typer.Option(help="socket to answer on")],
    stale_s: Annotated[
        float, typer.Option(min=4, help="seconds of silence of the engine after which the answer is no")
    ] = 60,
    figures: Annotated[
        Path | None, typer.Option(help="file in Prometheus's text format to append to /metrics")
    ] = None,
    every_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2,
) -> None:
    """Answer the gateway whether a deployed server is healthy.

    A server is healthy that can complete a request. The gateway asks on a socket.
    """
    planned = read_deployed_plan(plan)
    health = Health(VllmServer(planned, env_file), stale_s)
    server = serve(health, socket, figures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    printed = None
    while True:
        health.look(time.monotonic())
        if health.reason != printed:
            printed = health.reason
            sys.stdout.write(f"gateway-health: {visible(printed or 'can complete')}\n")
            sys.stdout.flush()
        time.sleep(every_s)
