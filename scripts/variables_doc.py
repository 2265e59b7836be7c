#!/usr/bin/env python3
"""Writes docs/variables.md from the roles' argument specs and the playbooks' own variables.

`--print` shows the page and writes nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs/variables.md"
OWN = REPOSITORY / "playbooks/vars/variables.yml"
DEFAULTS = REPOSITORY / "playbooks/group_vars/all.yml"
TABLE = ["| variable | type | default | |", "|---|---|---|---|"]
HEAD = """# Variables

`make docs` writes this page from each role's `meta/argument_specs.yml` and `playbooks/vars/variables.yml`.
A test compares the page with them.

Set these in your inventory: in `group_vars/vllm.yml`, in `host_vars/`, or for one run with `-e`.
A list or a dictionary takes JSON after `-e`, as in `-e '{"lowmem_peers": ["10.0.0.2"]}'`.
Preflight refuses every other name that begins with `lowmem_` or with the name of a role.

The first part has the variables that you will want, by what you want to do.
The second part has all the others, by role.
"""
ROLES = """# Other variables, by role

Each role has a default for all of them.
`playbooks/group_vars/all.yml` shows which take their value from the variables above.
"""


def plain(markup: str) -> str:
    """Ansible's markup as Markdown: C(x), V(x) and O(x) are code."""
    return re.sub(r"\b[CVO]\(([^)]*)\)", r"`\1`", markup)


def paragraphs(description: str | list[str]) -> str:
    return " ".join(plain(text) for text in ([description] if isinstance(description, str) else description))


def default_of(option: dict[str, Any]) -> str:
    if option.get("default") is None:
        return "required" if option.get("required") else "none"
    value = option["default"]
    text = str(value).lower() if isinstance(value, bool) else str(value)
    # a bar ends a cell, even in code
    return "`{}`".format(text.replace("|", "\\|")) if text else "empty"


def kind_of(option: dict[str, Any]) -> str:
    if "choices" in option:
        return " \\| ".join(f"`{choice}`" for choice in option["choices"])
    kind = str(option.get("type", "str"))
    return f"{kind} of {option['elements']}" if "elements" in option else kind


def row(name: str, option: dict[str, Any]) -> str:
    cells = [f"`{name}`", kind_of(option), default_of(option), paragraphs(option["description"])]
    return "| " + " | ".join(cell.replace("\n", " ").strip() for cell in cells) + " |"


def section(role: str, spec: dict[str, Any], above: dict[str, str]) -> str:
    """Describe a role and the variables that no goal has; `above`: variable -> title of its goal."""
    rows = [f"## {role}", "", paragraphs(spec.get("description") or f"{spec['short_description']}.")]
    rest = {name: option for name, option in spec["options"].items() if name not in above}
    moved = [f"[`{name}`](#{anchor(above[name])})" for name in spec["options"] if name in above]
    if rest:
        rows += ["", *TABLE, *(row(name, option) for name, option in rest.items())]
    if moved:
        rows += ["", f"Above: {', '.join(moved)}."]
    return "\n".join(rows) + "\n"


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def document() -> str:
    own, defaults = yaml.safe_load(OWN.read_text()), yaml.safe_load(DEFAULTS.read_text())
    specs = {
        path.parts[-3]: yaml.safe_load(path.read_text())["argument_specs"]["main"]
        for path in sorted((REPOSITORY / "roles").glob("*/meta/argument_specs.yml"))
    }
    options = dict(own["options"])
    for spec in specs.values():
        options |= spec["options"]
    # what the playbooks give counts for whoever sets nothing
    options = {
        name: option | ({"default": defaults[name]} if name in defaults else {})
        for name, option in options.items()
    }
    above = {name: goal["title"] for goal in own["goals"] for name in goal["variables"]}
    sections = [HEAD]
    for goal in own["goals"]:
        rows = (row(name, options[name]) for name in goal["variables"])
        sections.append("\n".join([f"## {goal['title']}", "", *TABLE, *rows]) + "\n")
    sections.append(ROLES)
    sections += [section(role, spec, above) for role, spec in specs.items()]
    return "\n".join(sections)


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(document())
    else:
        TARGET.write_text(document())
