"""Takes the command that a person pasted after `lowmem plan --`, and says what of it is no longer so."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import typer
import yaml

from lowmem.errors import BadInput
from lowmem.files import check_writable, read_text, write_text
from lowmem.inputs import options, pasted
from lowmem.inputs.command import Command
from lowmem.inputs.devices import load_device
from lowmem.inputs.model_cards import load_card
from lowmem.inputs.profiles import load_profile
from lowmem.inputs.shell import MOST_CHARACTERS
from lowmem.plan.knobs import checked
from lowmem.plan.pasted import profile_of
from lowmem.schema import Profile
from lowmem.text import visible

SHOWN = 40
"""Lines that are shown of one kind."""


def read_command(words: list[str] | None, file: str | None) -> Command | None:
    """Return the command of the words after `--`, or of a file; `-` is stdin. None if neither is given."""
    if words and file is not None:
        raise BadInput("--command and a command after -- are both given; give one of them")
    if file is None and not words:
        return None
    if file == "-" or words == ["-"]:
        text = sys.stdin.read(MOST_CHARACTERS + 1)
        return pasted.read_text(text)
    return pasted.read_text(read_text(Path(file))) if file is not None else pasted.read_words(words or [])


def profile_of_command(
    command: Command,
    profile: str,
    device: str | None,
    model: str | None,
    as_profile: str | None,
    hosts: int | None = None,
    network: str | None = None,
) -> Profile:
    """Print what the command's flags are worth, and return the profile that it is planned by.

    `hosts` share the cards that its parallel sizes need; `network` joins them.
    Raises typer.Exit(1) for faults, after all of them are printed. With `as_profile` the profile is written.
    """
    report(command)
    if command.faults:
        raise typer.Exit(1)
    if as_profile is not None and not as_profile.endswith((".yml", ".yaml")):
        raise BadInput(f"--as-profile {as_profile} is no YAML file; name one that ends in .yml")
    spanned = hosts if hosts is not None and 1 <= hosts <= 64 else 1  # another number is refused later
    base = load_profile(profile).model_copy(update={"hosts": spanned, "network": network})
    name = Path(as_profile).stem if as_profile else "command"
    wanted = device or base.device
    made = profile_of(command, base, load_device(wanted), model, name)
    made = made.model_copy(update={"device": wanted})  # a card that is described has no name in the table
    if as_profile is not None:
        check_writable(Path(as_profile))
        write_text(Path(as_profile), text_of(made))
    try:
        load_card(made.model)
    except BadInput as error:
        raise BadInput(f"{error}; give the folder of its config.json with --model DIR") from None
    return made


def report(command: Command) -> None:
    """Print faults, removed flags and notes on stderr, one line each."""
    for kind, lines in (("fault", command.faults), ("removed", command.removed), ("note", command.notes)):
        for line in lines[:SHOWN]:
            typer.echo(f"lowmem: {kind}: {visible(' '.join(line.split()))}", err=True)
        if len(lines) > SHOWN:
            typer.echo(f"lowmem: {kind}: and {len(lines) - SHOWN} more", err=True)


def check_flags(command: Command) -> None:
    """Print what this vLLM makes of the command's flags, without a model. Exit 1 if it would refuse one."""
    for name, value in command.options.items():
        with contextlib.suppress(BadInput):  # of its type, and named already
            value = options.checked(name, value)
            try:
                checked(name, value)
            except BadInput as error:
                command.faults.append(str(error))
    report(command)
    for name, value in command.options.items():
        typer.echo(visible(f"{name}: {value}"))
    raise typer.Exit(1 if command.faults or command.removed else 0)


def text_of(profile: Profile) -> str:
    """Return a profile as YAML."""
    data = profile.model_dump(mode="json", exclude_defaults=True)
    data["quantization"] = {"method": profile.quantization.method}
    return yaml.safe_dump(data, sort_keys=False, width=140, allow_unicode=True)
