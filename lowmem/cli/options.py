"""Completes, defines and reads the options that several commands take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards, profiles
from lowmem.units import parse_bytes


def _begun(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word.lower())]


def complete_profile(incomplete: str) -> list[str]:
    """List the profiles that begin so."""
    return _begun(incomplete, profiles.names())


def complete_device(incomplete: str) -> list[str]:
    """List the devices that begin so."""
    return _begun(incomplete, ["auto", *devices.names()])


def complete_model(incomplete: str) -> list[str]:
    """List the built-in models that begin so."""
    return _begun(incomplete, model_cards.names())


SearchedProfile = Annotated[
    str | None,
    typer.Option(
        help="name in profiles/, or a YAML file; default: low_mem without --model, else the settings are"
        " searched",
        autocompletion=complete_profile,
    ),
]
"""Option --profile of the commands that search for the settings where it is left out."""

ModelName = Annotated[
    str | None,
    typer.Option(
        help="built-in name, checkpoint directory or Hugging Face id; default: the profile's",
        autocompletion=complete_model,
    ),
]
"""Option --model of these commands."""


def limit_bytes(memory_limit: str | None) -> int | None:
    """Convert the size of `--memory-limit`. Raises BadInput for text that is no size."""
    try:
        return None if memory_limit is None else parse_bytes(memory_limit)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"--memory-limit: {error}") from None


def check_picture(out: Path) -> None:
    """Raise BadInput, before a plan is made, for a picture that could not be written."""
    if out.suffix not in (".png", ".svg"):
        raise BadInput(f"--out {str(out)!r} does not end in .png or .svg")
    if not out.resolve().parent.is_dir():
        raise BadInput(f"--out {str(out)!r}: its folder does not exist; make it first")
