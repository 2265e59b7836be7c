"""Run a long command on the host and show what it says while it runs.

The command runs through Ansible's own async machinery, so neither a silent quarter of an hour nor a lost
connection ends it. Its stdout is its progress, in lines meant for the operator, and is shown as it comes; its
stderr is kept in a log on the host, whose last lines are shown when the command fails. Both files stay, as
`<log>.progress` and `<log>.log`.

Arguments: argv (list), log (path on the host, without suffix; its folder exists), timeout_s (int, default
3600), chdir (path), stdin (text, never shown). Returns rc and stdout_lines. In check mode nothing is run and
the task counts as changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from lowmem.text import visible

display = Display()

POLL_S = 1.5
LAST_LINES = 20
# shell: the two files are made by the command's own user; "$0" is the log
# New files: where another user has the folder, a link could wait; with -C the shell follows none.
WRAPPER = 'rm -f -- "$0.progress" "$0.log" && set -C && exec "$@" >"$0.progress" 2>"$0.log"'


class ActionModule(ActionBase):
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        self._supports_check_mode = True
        super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "argv": {"type": "list", "elements": "str", "required": True},
                "log": {"type": "path", "required": True},
                "timeout_s": {"type": "int", "default": 3600},
                "chdir": {"type": "path"},
                "stdin": {"type": "str", "default": "", "no_log": True},
            }
        )
        if self._task.check_mode:
            return {
                "changed": True,
                "rc": 0,
                "stdout_lines": [],
                "skipped": False,
                "msg": "not run in check mode",
            }

        def module(name: str, arguments: dict[str, Any], limit_s: int = 0) -> dict[str, Any]:
            # async_val is what the async wrapper takes its own time limit from
            kept, self._task.async_val = self._task.async_val, limit_s
            try:
                result: dict[str, Any] = self._execute_module(
                    module_name=name, module_args=arguments, task_vars=task_vars, wrap_async=bool(limit_s)
                )
            finally:
                self._task.async_val = kept
            return result

        log, timeout_s = arguments["log"], arguments["timeout_s"]
        command = {
            "argv": ["/bin/sh", "-c", WRAPPER, log, *arguments["argv"]],
            "chdir": arguments["chdir"],
            "stdin": arguments["stdin"],
        }
        job = module("ansible.legacy.command", command, timeout_s)
        if "ansible_job_id" not in job:
            return job
        asked = {
            "jid": job["ansible_job_id"],
            "_async_dir": self.get_shell_option("async_dir", default="~/.ansible_async"),
        }
        show = self._shower()
        lines: list[str] = []
        deadline = time.monotonic() + timeout_s + 30  # the wrapper on the host ends it first
        while True:
            time.sleep(POLL_S)
            status = module("ansible.legacy.async_status", asked)
            lines += self._new_lines(module, f"{log}.progress", len(lines), show)
            if status.get("finished"):
                break
            if "started" not in status and not status.get("unreachable"):
                return status  # the job's own file is gone or unreadable
            if time.monotonic() > deadline:
                raise AnsibleActionFail(f"{arguments['argv'][0]}: no end after {timeout_s} s")
        module("ansible.legacy.async_status", {**asked, "mode": "cleanup"})

        rc = status.get("rc")
        result = {"changed": True, "rc": rc, "stdout_lines": lines}
        if rc == 0:
            return result
        last = module("ansible.legacy.command", {"argv": ["tail", "-n", str(LAST_LINES), f"{log}.log"]})
        tail = last.get("stdout_lines", [])
        for line in tail:
            show(line)
        reason = tail[-1] if tail else status.get("msg", "it said nothing")
        if rc is None:
            reason = f"no end after {timeout_s} s, or the process was killed; {reason}"
        return {
            **result,
            "failed": True,
            # Ansible shows what a failed task returns
            "stdout_lines": [visible(line) for line in lines],
            "stderr_lines": [visible(line) for line in tail],
            "msg": visible(f"{reason} (full log on the host: {log}.log)"),
        }

    def _shower(self) -> Callable[[str], None]:
        host = self._task_fields_host()
        # what the host says may come from a server or a file that somebody made
        return lambda line: display.display(visible(f"    {host} | {line}"))

    def _task_fields_host(self) -> str:
        return str(self._templar.available_variables.get("inventory_hostname", ""))

    def _new_lines(
        self, module: Callable[..., dict[str, Any]], path: str, known: int, show: Callable[[str], None]
    ) -> list[str]:
        """Complete lines of `path` after the first `known`, shown."""
        said = module("ansible.legacy.command", {"argv": ["tail", "-n", f"+{known + 1}", path]})
        new: list[str] = said.get("stdout_lines", [])
        for line in new:
            show(line)
        return new
