"""Defines the command `lowmem doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import BadInput
from lowmem.files import read_json_object
from lowmem.status.doctor import lines, overall, triage
from lowmem.text import visible, visible_json


def doctor(
    report: Annotated[
        Path,
        typer.Argument(help="JSON with the keys gpu, memory and plan, as playbooks/doctor.yml writes it."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: verdict and findings.")] = False,
) -> None:
    """Say what is wrong with a host, one verdict a line. Exit 0: nothing is bad. 2: something is."""
    try:
        data = read_json_object(report)
        findings = triage(data["gpu"], data["memory"], data["plan"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadInput(
            f"{report} is not a report of playbooks/doctor.yml ({error!r}): run the playbook again"
        ) from error
    verdict = overall(findings)
    if as_json:
        told = {"verdict": verdict, "findings": [f.model_dump() for f in findings]}
        typer.echo(visible_json(json.dumps(told, indent=2)))
    else:
        typer.echo(visible("\n".join([*lines(findings), f"verdict: {verdict}"])))
    raise typer.Exit(2 if verdict == "bad" else 0)
