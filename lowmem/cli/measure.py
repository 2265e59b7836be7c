"""Defines the command `lowmem measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from lowmem.artefacts import read_environment, read_plan
from lowmem.errors import BadInput
from lowmem.files import read_text
from lowmem.measure.load import say
from lowmem.measure.session import Options, run
from lowmem.schema import Load

MOST_CLIENTS = 100_000


def parse_clients(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > MOST_CLIENTS:
        raise BadInput(
            f"--clients {text}: give a comma-separated list of whole numbers from 1 to {MOST_CLIENTS}, such"
            " as 8,1,4"
        )
    return counts


def measure(
    plan: Annotated[Path, typer.Option(help="plan.json, as `lowmem plan --json` writes it")],
    out: Annotated[Path, typer.Option(help="receipt to write")],
    start: Annotated[
        Path | None, typer.Option(help="launcher to start and stop, as rendered (low_mem.sh)")
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            help="start `vllm serve` with the plan's own arguments and environment; no launcher is needed"
        ),
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="running service to measure instead, such as http://127.0.0.1:8000")
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(help="with --url: the service's main process; default: the one that listens there"),
    ] = None,
    pid_file: Annotated[
        Path | None, typer.Option(help="with --url: file with the number of that process")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="the engine's log: written with --start, read with --url; default: beside the receipt"
        ),
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option(help="environment file; default: vllm.env beside the launcher")
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="one more argument for `vllm serve`, as often as needed: --arg=--load-format --arg=dummy"
        ),
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(help="closed-loop clients; a list runs one load after the other; default: the plan's"),
    ] = None,
    input_tokens: Annotated[int | None, typer.Option(min=1, help="per request; default: the plan's")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="per request; default: the plan's")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="per load; default: four per client")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer of the prompts; default: the served model's folder")
    ] = None,
    interval_ms: Annotated[
        int | None,
        typer.Option(min=10, help="time between memory samples; default: 100 on a GPU, 250 on a CPU"),
    ] = None,
    start_timeout_s: Annotated[
        int | None, typer.Option(min=1, help="time for the first completion; default: the plan's")
    ] = None,
    debug: Annotated[
        bool, typer.Option(help="VLLM_LOGGING_LEVEL=DEBUG: the engine prints its memory profile (slower)")
    ] = False,
) -> None:
    """Load a service and write a receipt of what it took.

    It is started as planned, or found running. The receipt has memory, latency and the verdict.
    """
    plan_ = read_plan(plan)
    env_file = _check_words(start, serve, url, env_file)
    variables = {v.name: v.value for v in plan_.environment} if serve else {}
    variables |= read_environment(env_file) if env_file else {}
    variables |= {"VLLM_LOGGING_LEVEL": "DEBUG"} if debug else {}
    options = Options(
        plan=plan_,
        out=out,
        launcher=start,
        url=url,
        pid=pid if pid or not pid_file else _pid_of(pid_file),
        log=log,
        variables=variables,
        extra=tuple(arg or ()),
        loads=tuple(
            Load(
                clients=c,
                input_tokens=input_tokens or plan_.load.input_tokens,
                output_tokens=output_tokens or plan_.load.output_tokens,
            )
            for c in parse_clients(clients or str(plan_.load.clients))
        ),
        requests=requests,
        tokenizer=tokenizer,
        interval_s=(interval_ms or (100 if plan_.device_kind == "cuda" else 250)) / 1000,
        start_timeout_s=start_timeout_s or plan_.service.timeout_start_s,
    )
    receipt = run(options)
    say(f"{receipt.verdict}: {out}")
    for finding in receipt.findings:
        say(f"  {finding}")
    raise typer.Exit(0 if receipt.verdict == "passed" else 2)


def _refuse_url(url: str) -> None:
    """Refuse what is not the address of a server: a scheme, a host and a port, and nothing after them."""
    try:
        place = urlsplit(url)
        whole = place.scheme in ("http", "https") and place.hostname and place.port
    except ValueError:  # a port of 99999, a bracket too many
        whole = None
    if not whole or "@" in url or place.path not in ("", "/") or place.query or place.fragment:
        raise BadInput(f"--url {url}: give http://HOST:PORT, such as http://127.0.0.1:8000")


LARGEST_PID = 2**22
"""Of Linux on 64 bits."""


def _pid_of(file: Path) -> int:
    """Read the number of a process."""
    text = read_text(file, 64).strip()
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= LARGEST_PID):
        raise BadInput(f"--pid-file {file}: a process number is wanted")
    return int(text)


def _check_words(start: Path | None, serve: bool, url: str | None, env_file: Path | None) -> Path | None:
    """Refuse options that do not go together, and return the environment file to read."""
    modes = [name for name, given in (("--start", start), ("--serve", serve), ("--url", url)) if given]
    if len(modes) != 1:
        raise BadInput(
            f"give one of --start LAUNCHER, --serve and --url URL; {' and '.join(modes) or 'none'} was given"
        )
    if url is not None:
        _refuse_url(url)
    if start is not None and not start.is_file():
        raise BadInput(f"--start {start}: no such file")
    if env_file is None and start is not None and (start.parent / "vllm.env").is_file():
        return start.parent / "vllm.env"
    if env_file is not None and not env_file.is_file():
        raise BadInput(f"--env-file {env_file}: no such file")
    return env_file
