"""Defines the command `lowmem check-article`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from lowmem.plan.claims import claims, goal, markdown


def check_article(
    json_: Annotated[bool, typer.Option("--json", help="a JSON list on stdout")] = False,
    markdown_: Annotated[bool, typer.Option("--markdown", help="the page docs/claims.md on stdout")] = False,
) -> None:
    """Check the claims of the source article by computing them."""
    if markdown_:
        sys.stdout.write(markdown())
        return
    results = [*claims(), goal()]
    if json_:
        sys.stdout.write(json.dumps([asdict(c) for c in results], indent=2) + "\n")
        return
    from rich.markup import escape

    from lowmem.text import say, terminal

    out = terminal()
    for c in results:
        colour = {"by plan": "yellow", "barely": "yellow"}.get(c.holds, "red")
        say(out, f"[bold]{escape(c.claim)}[/]  [{colour}]{c.holds}[/]")
        say(out, f"{escape(c.truth)}", 4)
        say(out, f"[cyan]recipe:[/] {escape(c.recipe)}", 4)
