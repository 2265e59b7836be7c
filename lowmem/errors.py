"""Defines the one exception for input that cannot be planned, and what a model's own says in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class BadInput(ValueError):
    """Raised for input that cannot be planned.

    The message is one line: the variable, its value, its limit and what to do. The CLI prints it on stderr
    and exits 1.
    """


class EngineRefuses(BadInput):
    """Raised for a checkpoint that the engine refuses, with its reason: a plan of it is impossible."""


def first_problem(error: ValidationError, whole: str) -> str:
    """Say the first problem as `field: reason`, with the value of a number.

    `whole` stands for a problem of no single field.
    """
    first = error.errors()[0]
    value = first["input"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    said = f", and is {value:g}" if number and first["type"] != "extra_forbidden" else ""
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}{said}"
