"""Defines the command `lowmem start-check`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read_deployed_plan
from lowmem.service.start_check import lasting_refusals, look_at_lasting, look_at_passing, passing_refusals
from lowmem.text import visible


def start_check(
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment")],
    wait_s: Annotated[
        float,
        typer.Option(min=0, help="seconds to wait for memory or a port that is being freed"),
    ] = 20,
) -> None:
    """Print each obstacle to a start on a line of its own."""
    planned = read_deployed_plan(plan)
    refused = list(lasting_refusals(planned, look_at_lasting(planned)))
    deadline = time.monotonic() + (0 if refused else wait_s)
    while (
        passing := list(passing_refusals(planned, look_at_passing(planned)))
    ) and time.monotonic() < deadline:
        time.sleep(1)
    for line in refused + passing:
        sys.stderr.write(f"start-check: {visible(line)}\n")
    if refused or passing:
        raise typer.Exit(1)
