"""Reads the files that the deployment leaves behind: plan, receipt and environment file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from lowmem.errors import BadInput
from lowmem.schema import DeployedPlan, Plan, Receipt

Artefact = TypeVar("Artefact", Plan, Receipt)


def read_environment(path: Path) -> dict[str, str]:
    """Read KEY=VALUE lines as systemd's EnvironmentFile does; comments and blank lines are skipped.

    Raises BadInput for a line of another form.
    """
    variables = {}
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(("#", ";")):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"{path}:{number}: expected NAME=VALUE, found {name!r}")
        variables[name] = shlex.split(value)[0] if value[:1] in "\"'" and len(value) > 1 else value
    return variables


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises BadInput, one line, if the file holds none."""
    return _read(Plan, path, "--plan", " (write it with `lowmem plan --json`)")


def read_deployed_plan(path: Path) -> DeployedPlan:
    """Read the plan of a deployment. Raises BadInput, one line, if it names no port and model."""
    plan = read_plan(path)
    if plan.deploy is None:
        raise BadInput(f"--plan {path} names no port and model: give the plan.json of a deployment")
    return DeployedPlan.model_validate(plan.model_dump())


def read(path: Path) -> Receipt:
    """Read a receipt. Raises BadInput, one line, if the file holds none."""
    return _read(Receipt, path, "receipt")


def _read(kind: type[Artefact], path: Path, what: str, advice: str = "") -> Artefact:
    try:
        return kind.model_validate_json(path.read_text())
    except OSError as error:
        raise BadInput(f"{what} {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(f"{what} {path}: {place}: {first['msg']}{advice}") from None
