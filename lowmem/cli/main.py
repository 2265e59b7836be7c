"""Defines the `lowmem` command.

Each subcommand has a module of its own, which is imported when the subcommand runs. So `lowmem plan` stays
under a second.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import traceback
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

import lowmem
from lowmem.errors import BadInput, first_problem
from lowmem.schema import VLLM_VERSION
from lowmem.text import did_you_mean, visible

COMMANDS = {
    "plan": "lowmem.cli.plan:plan",
    "explain": "lowmem.cli.explain:explain",
    "capacity": "lowmem.cli.capacity:capacity",
    "frontier": "lowmem.cli.frontier:frontier_command",
    "fleet": "lowmem.cli.fleet:fleet",
    "oracle": "lowmem.cli.oracle:oracle",
    "check-article": "lowmem.cli.check_article:check_article",
    "measure": "lowmem.cli.measure:measure",
    "calibrate": "lowmem.cli.calibrate:calibrate",
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

_DONE = "0 done, 1 bad input"

EXIT_CODES = {
    "plan": "0 fits, 1 bad input, 2 impossible, 3 slow",
    "explain": _DONE,
    "capacity": "0 a request fits, 1 bad input, 2 none fits",
    "frontier": _DONE,
    "fleet": "0 some number of hosts is enough, 1 bad input, 2 none is",
    "calibrate": _DONE,
    "oracle": "0 the engine agrees to 1 %, 1 bad input or refused by vLLM, 2 it does not agree",
    "check-article": _DONE,
    "measure": "0 within the limits, 1 bad input, 2 outside them or not started",
    "receipt": "0 passed, 1 bad input, 2 failed",
    "report": _DONE,
    "top": "0 ended, 1 the server cannot be reached at the start",
    "doctor": "0 nothing is bad, 1 bad input, 2 something is bad",
    "start-check": "0 nothing hinders a start, 1 something does",
    "ready": "0 the server answers, 1 it will not",
    "watch": "0 ended, 1 bad input",
    "gateway-health": "0 ended, 1 bad input",
}
"""Subcommand -> what its exit status means; the last line of its help."""

HELP = {"help_option_names": ["-h", "--help"]}

USAGE_ERRORS: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""The root of typer's own usage errors, which it does not export."""


DEBUG = "LOWMEM_DEBUG"
"""Environment variable; where it is set, an error keeps its traceback."""

MOST = 10**9
"""Beyond the largest number that any option can mean; a sleep of so many seconds is still a sleep."""


class LazyGroup(TyperGroup):
    """Group of commands that imports the module of a command when the command is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command with the nearest one; a shell that completes words is left alone."""
        if not ctx.resilient_parsing and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = did_you_mean(args[0], COMMANDS) or f": use one of {', '.join(COMMANDS)}"
            raise BadInput(f"there is no command {args[0]!r}{near}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(":")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        told = single.command(cmd_name, context_settings=HELP, epilog=f"Exit status: {EXIT_CODES[cmd_name]}.")
        told(getattr(importlib.import_module(module), function))
        command = typer.main.get_command(single)
        run = command.invoke

        def invoke(inner: Any) -> Any:
            refuse_odd_numbers(inner.params)
            return run(inner)

        command.invoke = invoke  # type: ignore[method-assign, assignment]
        return command

    def invoke(self, ctx: Any) -> Any:
        """Print any error as one line on stderr and exit with 1.

        typer's own usage errors would exit with 2, which here means impossible.
        """
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except USAGE_ERRORS as error:
            message = error.format_message()
        except Exception as error:
            if os.environ.get(DEBUG) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            message = message_of(error)
        typer.echo("lowmem: " + visible(" ".join(message.split())), err=True)
        raise typer.Exit(1)


def message_of(error: Exception) -> str:
    """Return what is wrong with the input, or where a fault of this program is and how to report it."""
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, ValidationError):
        return first_problem(error, error.title)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return (
        f"a fault in lowmem itself, {type(error).__name__}{place}: {str(error)[:200]};"
        f" please report it with the traceback that {DEBUG}=1 shows"
    )


def refuse_odd_numbers(options: dict[str, Any]) -> None:
    """Refuse a number that no option can mean: NaN passes each comparison with a least value."""
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            number = isinstance(one, int | float) and not isinstance(one, bool)
            if number and not (math.isfinite(one) and abs(one) <= MOST):
                option = name.rstrip("_").replace("_", "-")
                raise BadInput(f"--{option} {one:g} is not a number from {-MOST:g} to {MOST:g}")


app = typer.Typer(
    cls=LazyGroup,
    add_completion=True,
    context_settings=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowmem {lowmem.__version__}, for vLLM {VLLM_VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_tell_version, help="print the version and exit"),
    ] = False,
) -> None:
    """Plan, measure and prove a vLLM service within a memory and latency limit."""
