"""Defines the `lowmem` command.

Each subcommand has a module of its own, which is imported when the subcommand runs. So `lowmem plan` stays
under a second.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from lowmem.errors import BadInput

COMMANDS = {
    "plan": "lowmem.cli.plan:plan",
    "explain": "lowmem.cli.explain:explain",
    "frontier": "lowmem.cli.frontier:frontier_command",
    "fleet": "lowmem.cli.fleet:fleet",
    "check-article": "lowmem.cli.check_article:check_article",
    "measure": "lowmem.cli.measure:measure",
    "receipt": "lowmem.cli.receipt:receipt",
    "report": "lowmem.cli.report:report",
    "top": "lowmem.cli.top:top",
    "doctor": "lowmem.cli.doctor:doctor",
    "start-check": "lowmem.cli.start_check:start_check",
    "ready": "lowmem.cli.ready:ready",
    "watch": "lowmem.cli.watch:watch",
    "gateway-health": "lowmem.cli.gateway_health:gateway_health",
}
"""Subcommand -> `module:function`; the function is an ordinary typer command."""

USAGE_ERRORS: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""The root of typer's own usage errors, which it does not export."""


class LazyGroup(TyperGroup):
    """Group of commands that imports the module of a command when the command is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(":")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        """Print bad input of any kind as one line on stderr and exit with 1.

        typer's own usage errors would exit with 2, which here means impossible.
        """
        try:
            return super().invoke(ctx)
        except BadInput as e:
            message = str(e)
        except USAGE_ERRORS as e:
            message = e.format_message()
        typer.echo("lowmem: " + " ".join(message.split()), err=True)
        raise typer.Exit(1)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Plan, measure and prove a vLLM service within a memory and latency limit."""
