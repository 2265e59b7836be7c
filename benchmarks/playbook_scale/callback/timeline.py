"""Writes what each task of a play cost to the file that PLAYBOOK_SCALE_TIMELINE names."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: timeline
type: aggregate
short_description: What each task of a play cost
description: Wall seconds of each task over all hosts, and on how many of them it ran or was skipped, as JSON.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "timeline"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.play = ""
        self.tasks: list[dict[str, Any]] = []
        self.hosts: dict[str, dict[str, int]] = {}

    def _now(self) -> float:
        return time.monotonic() - self.began

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self.play = play.get_name()

    def _begin(self, task: Any) -> None:
        role = task._role.get_name() if task._role else ""
        self.tasks.append({"play": self.play, "role": role, "name": task.name or task.action,
            "action": task.resolved_action or task.action,
                           "at_s": self._now(), "ran": 0, "skipped": 0})  # fmt: skip

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self._begin(task)

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        self._begin(task)

    def _count(self, result: Any, what: str) -> None:
        self.tasks[-1][what] += 1
        host = self.hosts.setdefault(result._host.get_name(), {"ran": 0, "skipped": 0})
        host[what] += 1

    def v2_runner_on_ok(self, result: Any) -> None:
        self._count(result, "ran")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._count(result, "ran")

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._count(result, "skipped")

    def v2_playbook_on_stats(self, stats: Any) -> None:
        own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        ends = [task["at_s"] for task in self.tasks[1:]] + [self._now()]
        for task, end in zip(self.tasks, ends, strict=True):
            task["wall_s"] = round(end - task.pop("at_s"), 4)
        total = {
            name: sum(stats.summarize(host)[name] for host in stats.processed)
            for name in ("changed", "failures", "unreachable")
        }
        written = {
            "tasks": self.tasks, "hosts": self.hosts, "totals": total,
            "main_cpu_s": own.ru_utime + own.ru_stime, "children_cpu_s": workers.ru_utime + workers.ru_stime,
        }  # fmt: skip
        Path(os.environ["PLAYBOOK_SCALE_TIMELINE"]).write_text(json.dumps(written))
