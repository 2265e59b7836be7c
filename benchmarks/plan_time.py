#!/usr/bin/env python3
"""Prints the time of `lowmem plan` as a ratio to that of starting Python with pydantic and typer.

    benchmarks/plan_time.py [DIRECTORY ...]

A ratio holds on any machine, and also on one that is busy: both are CPU time of a process, the least of
several runs. DIRECTORY is a checkpoint; without one a built-in model is planned.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

RUNS = 7
START = [sys.executable, "-c", "import pydantic.main, typer, yaml"]


def cpu_s(command: list[str]) -> float:
    """Return the least CPU time of a command over several runs, in seconds."""
    least = float("inf")
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return least


def main() -> None:
    """Print one line a model."""
    start = cpu_s(START)
    kept = "not kept: PYTHONDONTWRITEBYTECODE" if os.environ.get("PYTHONDONTWRITEBYTECODE") else "kept"
    print(f"bytecode and tables {kept}; Python with pydantic and typer takes {start:.2f} s of CPU")
    for model in sys.argv[1:] or ["llama-2-70b"]:
        command = [sys.executable, "-m", "lowmem", "plan", "--model", model, "--json"]
        took = cpu_s(command)
        print(f"{model}: {took / start:.1f} times that, {took:.2f} s")


if __name__ == "__main__":
    main()
