"""Defines the command `lowmem calibrate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

from lowmem.artefacts import read_plan
from lowmem.errors import BadInput
from lowmem.files import check_writable, write_text
from lowmem.measure.calibrate import calibrate as fit
from lowmem.schema import Calibration, Load, Plan
from lowmem.text import utc

_ROUNDS = 2
"""Requests of each client in a run: with 8 clients and 256 tokens it takes about two minutes."""


def calibrate(
    receipt: Annotated[
        list[Path] | None, typer.Argument(help="receipts that `lowmem measure` wrote on such hosts")
    ] = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("calibration.yml"),
    model: Annotated[
        str | None, typer.Option(help="model of the receipts, if its name is no built-in card or folder")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="without receipts: plan.json of a service to measure now")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="with --plan: the running service; default: start it as planned")
    ] = None,
) -> None:
    """Write the constants of your hosts, for a plan to use.

    `lowmem plan --calibration` and the inventory take them. They are fitted to receipts, or to a run of about
    two minutes on this host.
    """
    check_writable(out)
    paths = list(receipt or [])
    if plan is not None:
        paths.append(_measured(read_plan(plan), url, out))
    elif url is not None:
        raise BadInput("--url needs --plan, the plan.json of the service that runs there")
    if not paths:
        raise BadInput("give receipts of `lowmem measure`, or --plan PLAN.json to measure this host now")
    found = fit(paths, utc(time.time()), model)
    write_text(out, text_of(found))
    typer.echo(f"{out}: {len(found.constants)} constants of {found.device}")
    for name, one in found.constants.items():
        typer.echo(f"  {name}: {one.value:g} instead of {one.before:g}; {one.source}")


def text_of(calibration: Calibration) -> str:
    """Return the file of a calibration."""
    head = "# Constants of this site by `lowmem calibrate`; lowmem/data/calibration.yml has the others.\n"
    body = yaml.safe_dump(calibration.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)
    return head + body


def _measured(plan: Plan, url: str | None, out: Path) -> Path:
    """Measure one client and the plan's clients, and return the receipt, which lies beside the file."""
    from lowmem.measure.session import Options, run  # a fit of receipts needs no engine

    path = out.with_suffix(".receipt.json")
    loads = [Load(clients=c, input_tokens=plan.load.input_tokens, output_tokens=plan.load.output_tokens)
             for c in sorted({1, plan.load.clients})]  # fmt: skip
    found = run(
        Options(
            plan=plan,
            out=path,
            launcher=None,
            url=url,
            pid=None,
            log=None,
            variables={} if url else {v.name: v.value for v in plan.environment},
            extra=(),
            loads=tuple(loads),
            requests=_ROUNDS * plan.load.clients,
            tokenizer=None,
            interval_s=0.1,
            start_timeout_s=plan.service.timeout_start_s,
        )
    )
    if found.error:
        raise BadInput(f"the service did not answer: {found.error}; receipt {path}")
    return path
