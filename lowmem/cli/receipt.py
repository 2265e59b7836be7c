"""Defines the command `lowmem receipt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read
from lowmem.files import write_text
from lowmem.measure.receipt import merge, read_checks, show


def receipt(
    measurement: Annotated[Path, typer.Argument(help="receipt that `lowmem measure` wrote")],
    checks: Annotated[
        Path | None, typer.Option(help="JUnit XML of `pytest checks/ --junitxml`, to join")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file for the joined receipt")] = None,
) -> None:
    """Print a plan against its measurement, and the verdict."""
    result = read(measurement)
    if checks is not None:
        result = merge(result, read_checks(checks))
    if out is not None:
        write_text(out, result.model_dump_json(indent=1))
    show(result)
    raise typer.Exit(0 if result.verdict == "passed" else 2)
