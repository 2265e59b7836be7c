"""Defines the command `lowmem top`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.live import Live

from lowmem.errors import BadInput
from lowmem.status.probe import DEFAULT_PLAN, deployed
from lowmem.status.status import Status
from lowmem.status.top import Watcher, line, screen
from lowmem.text import terminal, visible, visible_json


def top(
    plan: Annotated[Path, typer.Option(help="plan.json of a deployment on this host")] = DEFAULT_PLAN,
    every_s: Annotated[float, typer.Option(min=0.2, help="seconds between two looks")] = 2,
    window_s: Annotated[float, typer.Option(min=0.2, help="seconds that rates and percentiles cover")] = 30,
    once: Annotated[bool, typer.Option("--once", help="print once, after two looks --every-s apart")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object a line on stdout for each look")
    ] = False,
) -> None:
    """Watch a running server against its plan.

    Ctrl-C ends it. In a pipe it prints a line for each look.
    """
    watcher = Watcher(deployed(plan), window_s)
    first, _ = watcher.look()
    if first.running is None and first.state != "starting":
        raise BadInput(f"{first.trouble}: the server of {plan} does not serve; docs/runbooks/service-down.md")
    with _ended_quietly():
        time.sleep(every_s)
        if once:
            seen, since = watcher.look()
            if as_json:
                typer.echo(visible_json(seen.model_dump_json()))
            else:
                console = terminal()
                console.print(screen(watcher.host.plan, seen, since, watcher.rates, console.width))
        elif as_json or not sys.stdout.isatty():
            for seen, _ in _looks(watcher, every_s):
                typer.echo(visible_json(seen.model_dump_json()) if as_json else visible(line(seen)))
        else:
            _watch(watcher, every_s)


def _looks(watcher: Watcher, every_s: float) -> Iterator[tuple[Status, Status]]:
    while True:
        began = time.monotonic()
        yield watcher.look()
        time.sleep(max(0.0, every_s - (time.monotonic() - began)))


def _watch(watcher: Watcher, every_s: float) -> None:
    """Draw until it is interrupted; the last view stays in the terminal."""
    console = terminal()
    seen, since = watcher.look()

    def view() -> RenderableType:
        return screen(watcher.host.plan, seen, since, list(watcher.rates), console.width)

    try:
        with Live(get_renderable=view, console=console, screen=True, refresh_per_second=4):
            for seen, since in _looks(watcher, every_s):  # noqa: B007 - `view` reads them
                pass
    finally:
        console.print(view())


@contextlib.contextmanager
def _ended_quietly() -> Iterator[None]:
    """Treat Ctrl-C, and a reader that has read enough (`| head`), as an end and no error."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # the interpreter's own flush at its end would fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
