"""Asserts a requirement, and keeps a refusal for a list of all problems where a play collects them.

Takes what ansible.builtin.assert takes. A role that is run by itself fails at the first requirement that is
not met. Preflight sets `__preflight_collects`: each line of `fail_msg` then becomes a fact, the task
succeeds, and the play refuses the host at its end.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from ansible.errors import AnsibleError

from lowmem.values.problems import FACT

# `assert` is a keyword of Python
Assert: Any = importlib.import_module("ansible.plugins.action.assert").ActionModule

SUBJECT = re.compile(r"[a-z]+(?:_[a-z0-9]+)+(?:\.\w+)*")


def subject(line: str) -> str:
    """Return the variable that a line begins with; the whole line if it begins with none."""
    match = SUBJECT.match(line)
    return match[0] if match else line


def facts(message: Any) -> dict[str, str]:
    """Return a fact for each line of a message. One fact would lose what an earlier turn of a loop noted."""
    text = "\n".join(message) if isinstance(message, list) else str(message)
    lines = filter(None, (line.strip() for line in text.splitlines()))
    return {f"{FACT}{subject(line)}": line for line in lines}


class ActionModule(Assert):  # type: ignore[misc]
    @classmethod
    def finalize_task_arg(cls, name: str, value: Any, templar: Any, context: Any) -> Any:
        # resolved when it is needed: what it names may be what is missing
        return value if name == "fail_msg" else super().finalize_task_arg(name, value, templar, context)

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = task_vars or {}
        if not variables.get("__preflight_collects"):
            return self._assert(tmp, task_vars)
        # the first problem of a value explains those after it
        listed = {name for name in variables["ansible_facts"] if name.startswith(FACT)}
        try:
            result = self._assert(tmp, task_vars)
        except AnsibleError as error:
            # cannot be judged as long as a value that it reads is wrong
            if listed:
                return {"changed": False}
            result = {"failed": True, "msg": str(error)}
        if not result.get("failed"):
            return result
        new = {name: line for name, line in facts(result["msg"]).items() if name not in listed}
        return {"changed": False, "ansible_facts": new}

    def _assert(self, tmp: str | None, task_vars: dict[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        if result.get("failed"):
            result["msg"] = self._templar.template(result["msg"])
        return result
