"""Compares a host with what the last whole run left there: the controller's part, which says what the run is
made of.

The run is made of this repository's code, of every variable of its roles, resolved for the host, and of the
files on the controller that such a variable names by an absolute path. Digests of these go to the module of
the same name, which adds the host's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

from lowmem.files import tree_digest
from lowmem.text import visible

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("playbooks", "roles", "plugins", "templates", "profiles", "locks", "lowmem", "vllm_plugins")
# The role that compares decides nothing of what is deployed.
ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir() if path.name != "skip_unchanged")
# Of the connection and the host, what decides how something is deployed.
OTHERS = ("ansible_host", "ansible_user", "group_names", "ansible_version")
FACTS = ("distribution", "distribution_version", "architecture", "python_version", "service_mgr", "user_id")
LARGEST_FILE_BYTES = 64 << 20


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def code() -> str:
    """A digest of the repository's own files, whatever their times are."""
    paths = [
        REPOSITORY / "site.yml",
        REPOSITORY / "pyproject.toml",
        *(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*")),
    ]
    files = (path for path in paths if path.is_file() and "__pycache__" not in path.parts)
    return tree_digest(REPOSITORY, files)[:24]


# Ansible reads this file once, in its main process; then it forks a process for each task of each host.
CODE_DIGEST = code()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)


def named_files(value: Any) -> Iterator[str]:
    """Digests of the files on the controller that the value names; a file of that name on the host alone is
    no file here.
    """
    for text in strings(value):
        if text.startswith(("/", "~")) and "\n" not in text:
            try:
                path = Path(text).expanduser()
                if path.is_file() and path.stat().st_size <= LARGEST_FILE_BYTES:
                    yield digest(path.read_bytes())
            except (OSError, RuntimeError):
                continue


class ActionModule(ActionBase):
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        given = dict(self._task.args)
        given.setdefault("intent", self._intent(task_vars or {}))
        answer: dict[str, Any] = self._execute_module(module_args=given, task_vars=task_vars)
        if not answer.get("failed"):
            answer["intent"] = given["intent"]
            if given["state"] == "compared":
                host = (task_vars or {}).get("inventory_hostname", "")
                self._display.display(visible(f"    {host} | {self._said(answer)}"))
        return answer

    def _said(self, answer: dict[str, Any]) -> str:
        if answer["unchanged"]:
            return f"as the run of {answer['recorded_utc']} left it: the rest of this run is left out"
        if not answer["recorded_utc"]:
            return "no whole run is on record: nothing is left out"
        more = answer["count"] - len(answer["differences"])
        named = ", ".join(answer["differences"]) + (f" and {more} more" if more else "")
        return f"not as the run of {answer['recorded_utc']} left it: {named}"

    def _intent(self, variables: dict[str, Any]) -> dict[str, str]:
        own = ("lowmem_", *(f"{role}_" for role in ROLES))
        found = {"the repository": CODE_DIGEST}
        for name, value in variables.items():
            if name.startswith(own) or name in OTHERS:
                resolved = self._resolved(value)
                text = json.dumps(resolved, sort_keys=True, default=str) + "".join(named_files(resolved))
                found[f"variable {name}"] = digest(text.encode())
        facts = variables.get("ansible_facts", {})
        return found | {f"fact {name}": digest(str(facts.get(name, "")).encode()) for name in FACTS}

    def _resolved(self, value: Any) -> Any:
        try:
            return self._templar.template(value)
        except AnsibleError:
            # of a role's own, where it is resolved with what the role finds out
            return str(value)
