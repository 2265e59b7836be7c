"""Whether an environment can be built here: `preflight.py ENV NEED_BYTES LOCKED_TAGS`, run by the Python it
is to have.

Says what is wrong in one line on stderr, with status 1. Changes nothing. Standard library only.
"""

import json
import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)


def trouble(env: Path, need_bytes: int, tags: list[str]) -> str | None:
    """LOCKED_TAGS: the Pythons and machines that the torch lock has hashes for, as
    cp311-x86_64; empty: all.
    """
    version = ".".join(map(str, sys.version_info[:2]))
    tag = f"cp{version.replace('.', '')}-{platform.machine()}"
    if sys.version_info[:2] < OLDEST:
        return f"python_env_python {sys.executable} is Python {version}; 3.11 or later is needed"
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        return (
            f"python_env_python {sys.executable} cannot make environments: install the package"
            f" python{version}-venv"
        )
    if tags and tag not in tags:
        return (
            f"python_env_python {sys.executable} is {tag}; the torch lock has hashes for {', '.join(tags)}: "
            "set it to such a Python, or add the hash (locks/README.md)"
        )
    folder = next(parent for parent in (env, *env.parents) if parent.exists())
    if folder == env and (env / ".complete").exists():
        return None
    if not os.access(folder, os.W_OK):
        return f"python_env_base {env.parent}: {folder} is not writable"
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        return (
            f"{env}: {folder} has {free / 2**30:.1f} GiB free, {need_bytes / 2**30:.1f} GiB are needed; "
            f"free {(need_bytes - free) / 2**30:.1f} GiB or set python_env_base"
        )
    return None


if problem := trouble(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])):
    sys.exit(problem)
