"""Runs the command `lowmem` as an operator does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lowmem(*words, timeout_s=60, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lowmem", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=timeout_s,
        env=os.environ | environment,
    )
