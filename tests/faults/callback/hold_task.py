"""Holds a play before a task until a test lets it go, so that a fault comes at a certain moment.

Ansible calls this in its own process before it hands the task to any host. A line of a play's output proves
no such thing: the task that it announces may be over when a test reads it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: hold_task
type: aggregate
short_description: Hold a play before a task
description: Holds at the task that LOWMEM_HOLD_TASK names, from when it makes LOWMEM_HOLD/held until
  LOWMEM_HOLD/go exists.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "hold_task"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        if task.get_name() == os.environ["LOWMEM_HOLD_TASK"]:
            folder = Path(os.environ["LOWMEM_HOLD"])
            (folder / "held").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
