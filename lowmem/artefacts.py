"""Reads the files that the deployment leaves behind: plan, receipt and environment file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from lowmem.errors import BadInput, first_problem
from lowmem.files import JSON_LIMIT_BYTES, parse_json, read_text
from lowmem.schema import DeployedPlan, Plan, Receipt

_Model = TypeVar("_Model", bound=BaseModel)


def read_environment(path: Path) -> dict[str, str]:
    """Read KEY=VALUE lines as systemd's EnvironmentFile does; comments and blank lines are skipped.

    Raises BadInput for a line of another form.
    """
    variables = {}
    for number, raw in enumerate(read_text(path).splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(("#", ";")):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"{path}:{number}: expected NAME=VALUE, found {name!r}")
        try:
            words = shlex.split(value) if value[:1] in "\"'" and len(value) > 1 else [value]
        except ValueError as error:
            raise BadInput(f"{path}:{number}: the value of {name} cannot be read: {error}") from None
        variables[name] = words[0]
    return variables


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises BadInput, one line, if the file holds none."""
    return _read(Plan, path, f"--plan {path}", " (write it with `lowmem plan --json`)")


def read_deployed_plan(path: Path) -> DeployedPlan:
    """Read the plan of a deployment. Raises BadInput, one line, if it names no port and model."""
    plan = read_plan(path)
    if plan.deploy is None:
        raise BadInput(f"--plan {path} names no port and model: give the plan.json of a deployment")
    return DeployedPlan.model_validate(plan.model_dump())


def read(path: Path) -> Receipt:
    """Read a receipt. Raises BadInput, one line, if the file holds none."""
    return _read(Receipt, path, f"receipt {path}")


def _read(model: type[_Model], path: Path, called: str, advice: str = "") -> _Model:
    text = read_text(path, JSON_LIMIT_BYTES, called)
    try:
        value = model.model_validate_json(text)
    except ValidationError as error:
        raise BadInput(f"{called}: {first_problem(error, 'the file')}{advice}") from None
    parse_json(text, called)  # pydantic's own parser accepts NaN and has other bounds
    return value
