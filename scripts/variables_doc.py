#!/usr/bin/env python3
"""Writes docs/variables.md from the roles' argument specs. `--print` shows it and writes nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs/variables.md"
HEAD = """# Variables

Made from each role's `meta/argument_specs.yml` by `make docs`; a test compares the two.

An inventory normally sets the `lowmem_*` variables and leaves the rest.
`playbooks/group_vars/all.yml` shows how they reach the roles.
"""


def plain(markup: str) -> str:
    """Ansible's markup as Markdown: C(x), V(x) and O(x) are code."""
    return re.sub(r"\b[CVO]\(([^)]*)\)", r"`\1`", markup)


def paragraphs(description: str | list[str]) -> str:
    return " ".join(plain(text) for text in ([description] if isinstance(description, str) else description))


def default_of(option: dict[str, Any]) -> str:
    if "default" not in option:
        return "required" if option.get("required") else "none"
    value = option["default"]
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def kind_of(option: dict[str, Any]) -> str:
    if "choices" in option:
        return " \\| ".join(f"`{choice}`" for choice in option["choices"])
    kind = str(option.get("type", "str"))
    return f"{kind} of {option['elements']}" if "elements" in option else kind


def section(role: str, spec: dict[str, Any]) -> str:
    rows = [
        f"## {role}",
        "",
        paragraphs(spec.get("description") or f"{spec['short_description']}."),
        "",
        "| variable | type | default | |",
        "|---|---|---|---|",
    ]
    for name, option in spec["options"].items():
        cells = [f"`{name}`", kind_of(option), default_of(option), paragraphs(option["description"])]
        rows.append("| " + " | ".join(cell.replace("\n", " ").strip() for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def document() -> str:
    sections = [HEAD]
    for path in sorted((REPOSITORY / "roles").glob("*/meta/argument_specs.yml")):
        sections.append(section(path.parts[-3], yaml.safe_load(path.read_text())["argument_specs"]["main"]))
    return "\n".join(sections)


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(document())
    else:
        TARGET.write_text(document())
