"""Refuses values of a wrong kind, before a task connects to a host with them.

It looks at every variable that the inventory or the command line sets for the host, and for which
`lowmem/data/variables.yml` names a kind. A value that is worked out later is not looked at. In a role it
looks at the role's own variables, with their defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase

from lowmem import data
from lowmem.files import read_yaml
from lowmem.values.kinds import refusal
from lowmem.values.problems import FACT

DOCUMENTATION = r"""
module: check_values
short_description: Refuse values of a wrong kind
description:
  - Each variable of a wrong kind is one line that names it, its value, and what it must be.
  - A secret is not shown.
  - In a play that collects problems (V(__preflight_collects)) the task succeeds, and each line becomes a fact
    as those of C(require) do.
  - Runs on the controller, touches nothing on the host, and does the same in check mode.
options: {}
"""

# Ansible reads this file once, in its main process; then it forks a process for each task of each host.
KINDS: dict[str, str] = read_yaml(Path(data.__file__).with_name("variables.yml"))


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        self.validate_argument_spec({})
        variables = task_vars or {}
        collects = variables.get("__preflight_collects")
        listed = variables.get("ansible_facts", {}) if collects else {}
        own = f"{self._task._role.get_name()}_" if self._task._role else ""
        problems: dict[str, str] = {}
        # what takes its value from a variable that is listed is told by that one's name
        told = [str(self._resolved(variables.get(name))) for name in KINDS if f"{FACT}{name}" in listed]
        # The few `lowmem_*` come first, since others are made of them: a fault is told by the name that
        # is set.
        names = [name for name in KINDS if name.startswith(own)]
        for name in sorted(names, key=lambda name: not name.startswith("lowmem_")):
            if f"{FACT}{name}" in listed:  # its type is wrong already
                continue
            value = self._resolved(variables.get(name))
            line = refusal(name, KINDS[name], value) if value is not None else ""
            if line and not any(known in str(value) for known in told):
                problems[f"{FACT}{name}"] = line
                told += [str(value)] if name.startswith("lowmem_") and value else []
        if collects:
            return {"changed": False, "ansible_facts": problems} if problems else {"changed": False}
        if problems:
            raise AnsibleActionFail("\n".join(problems.values()))
        return {"changed": False}

    def _resolved(self, value: Any) -> Any:
        try:
            return self._templar.template(value)
        except (AnsibleError, RecursionError):  # of what a role finds out later
            return None
