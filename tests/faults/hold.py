"""A moment in a play that is certain: held before a task until the test lets it go."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1800


@dataclass(frozen=True)
class Hold:
    """Holds a play before the task of this name; `folder` is empty at the beginning."""

    task: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the play's process."""
        return {
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).with_name("callback")),
            "ANSIBLE_CALLBACKS_ENABLED": "hold_task",
            "LOWMEM_HOLD_TASK": self.task,
            "LOWMEM_HOLD": str(self.folder),
        }

    def wait(self, play: subprocess.Popen[str]) -> None:
        """Wait until the play is held. Fails if it ends before, as it does when no task has this name."""
        deadline = time.monotonic() + LIMIT_S
        while not (self.folder / "held").exists():
            assert play.poll() is None, f"the play ended before {self.task!r}"
            assert time.monotonic() < deadline, f"the play did not come to {self.task!r}"
            time.sleep(0.05)

    def release(self) -> None:
        (self.folder / "go").touch()
