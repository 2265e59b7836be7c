"""The `lowmem` command: each subcommand lives in its own module, imported when it is asked for (`lowmem plan` stays under a second)."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "measure": "lowmem.measure:measure",
    "receipt": "lowmem.receipt:receipt",
    "report": "lowmem.report:report",
}
"""Subcommand -> `module:function`; the function is an ordinary typer command."""


class LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(":")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Plan, measure and prove a vLLM service within a memory and latency limit."""
