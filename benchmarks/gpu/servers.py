"""What the scripts beside this file share: the end of servers that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def stop(*processes: subprocess.Popen[Any], wait_s: float = 20) -> None:
    """Ends servers, each started in a session of its own, and what they leave behind: a worker that outlives its server holds the card."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
