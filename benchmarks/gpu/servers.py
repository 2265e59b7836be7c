"""Ends the servers that the scripts of this folder start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any


def end_on_sigterm() -> None:
    """So that servers end with a run that ran out of time: SIGTERM unwinds the script, by its `finally`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def stop(*processes: subprocess.Popen[Any], wait_s: float = 20) -> None:
    """Ends servers, each started in a session of its own, and what they leave behind: a worker that outlives
    its server holds the card.
    """
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
