"""Checks that the inventory has hosts to deploy, and that no file of variables is left unread.

Ansible reads `group_vars/NAME.yml` if there is a group NAME and says nothing of a file without one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from lowmem.text import visible

DOCUMENTATION = r"""
module: check_groups
short_description: Refuse an inventory without hosts, and files of variables that nothing reads
description:
  - Looks at the groups and at C(group_vars) and C(host_vars) beside the inventory. Touches no host.
  - A file of C(host_vars) without a host is told as a warning, since a host may have been taken out.
"""

READ = ("", ".yml", ".yaml", ".json")


def unread(folder: Path, names: Iterable[str], kind: str) -> Iterator[str]:
    """Yield a line for each entry of a folder that Ansible reads for no group or host of these names."""
    known = sorted(names)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.name.endswith("~"):
            continue
        # the name of a host has dots of its own
        name = path.name if path.is_dir() or path.suffix not in READ else path.name.removesuffix(path.suffix)
        if path.is_file() and path.name in known:
            name = path.name
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1) or [o for o in known if o.startswith(f"{name}.")]
        hint = f"did you mean {near[0]}? Rename it" if near else f"there is no such {kind}; correct it"
        yield f"{visible(str(path))} is read for no {kind}: {hint}, or take it out."


def missing_hosts(groups: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield a line if there is no host to deploy to."""
    if groups.get("vllm") or groups.get("router"):
        return
    others = sorted(name for name, hosts in groups.items() if hosts and name not in ("all", "ungrouped"))
    near = difflib.get_close_matches("vllm", others, n=1)
    hint = f"did you mean it by {near[0]}? Rename that group" if near else "put your hosts into it"
    yield f"group vllm of the inventory has no host: {hint}, or choose another inventory with -i."


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        self.validate_argument_spec({})
        variables = task_vars or {}
        groups = variables["groups"]
        problems, warnings = [*missing_hosts(groups)], []
        for source in variables.get("ansible_inventory_sources") or []:
            place = Path(source)
            folder = place if place.is_dir() else place.parent
            if place.exists():
                problems += unread(folder / "group_vars", groups, "group")
                warnings += unread(folder / "host_vars", groups["all"], "host")
        result: dict[str, Any] = {"changed": False, "warnings": warnings}
        return result | ({"failed": True, "msg": "\n".join(problems)} if problems else {})
