"""Reads the files that the deployment leaves behind: plan, receipt and environment file."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import ValidationError

from lowmem.errors import BadInput
from lowmem.schema import Plan, Receipt


def read_environment(path: Path) -> dict[str, str]:
    """KEY=VALUE lines as systemd's EnvironmentFile reads them; comments and blank lines are skipped."""
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
    try:
        return Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise BadInput(f"--plan {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"--plan {path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']} (write it with"
            " `lowmem plan --json`)"
        ) from None


def read(path: Path) -> Receipt:
    """Raises BadInput with one line when there is no receipt at the path."""
    try:
        return Receipt.model_validate_json(path.read_text())
    except OSError as error:
        raise BadInput(f"receipt {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"receipt {path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        ) from None
