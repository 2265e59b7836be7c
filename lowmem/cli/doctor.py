"""Defines the command `lowmem doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import BadInput
from lowmem.files import read_json_object
from lowmem.status.doctor import lines, overall, triage
from lowmem.status.probe import DEFAULT_PLAN
from lowmem.status.reading import this_host
from lowmem.text import terminal_columns, visible, visible_json


def doctor(
    report: Annotated[
        Path | None,
        typer.Argument(
            help="report of another host, as playbooks/doctor.yml writes it; default: this host is read"
        ),
    ] = None,
    plan: Annotated[Path, typer.Option(help="plan.json of the deployment on this host")] = DEFAULT_PLAN,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Say what is wrong with a host, one verdict a line.

    Without a report it reads the host that it runs on, which changes nothing. Some readings need root.
    """
    source = f"{report}" if report else f"this host, plan {plan}{'' if plan.exists() else ' (there is none)'}"
    try:
        data = read_json_object(report) if report else this_host(plan)
        findings = triage(data["gpu"], data["memory"], data["plan"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if report is None and isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{source} is not a report of playbooks/doctor.yml ({error!r}): run the playbook again"
        ) from error
    verdict = overall(findings)
    if as_json:
        told = {"verdict": verdict, "findings": [f.model_dump() for f in findings]}
        typer.echo(visible_json(json.dumps(told, indent=2)))
    else:
        said = [*lines(findings, terminal_columns()), f"verdict: {verdict}"]
        typer.echo(visible("\n".join([f"read from {source}", *said] if report is None else said)))
    raise typer.Exit(2 if verdict == "bad" else 0)
