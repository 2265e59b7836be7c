"""Reads the settings of a unit file: a service of systemd, or a container of podman's Quadlet."""

from __future__ import annotations

import re

_UNIT = re.compile(r"(?m)^[ \t]*(\[(Service|Container)\][ \t]*$|ExecStart[ \t]*=)")


def is_unit(text: str) -> bool:
    """Tell whether a text is a unit file, or the line of one that starts the service."""
    return bool(_UNIT.search(text))


def settings(text: str) -> dict[str, list[str]]:
    """Return the values of each setting, in order. Their names are in lower case, sections do not count.

    A backslash joins lines, a comment between them is passed over, and an empty value clears those before it.
    """
    found: dict[str, list[str]] = {}
    pending = ""
    for raw in text.replace("\r\n", "\n").split("\n"):
        line = raw.strip()
        if line.startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        name, sign, value = (pending + line).partition("=")
        pending = ""
        if not sign or not re.fullmatch(r"[A-Za-z]+", name.strip()):
            continue
        values = found.setdefault(name.strip().lower(), [])
        if value.strip():
            values.append(value.strip())
        else:
            values.clear()
    return found
