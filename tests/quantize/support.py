"""The repository's own ansible-playbook run on a few tasks, and where the demo's host folder lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STATE = REPOSITORY / ".lowmem"
HOST = STATE / "host"
# the environments' Python, as `make` chooses it; one that another user can run
PYTHON = os.environ.get("LOWMEM_TEST_PYTHON") or str(Path(sys.executable).resolve())


def start(
    tasks: list[dict[str, Any]], folder: Path, variables: dict[str, Any] | None = None, *arguments: str
) -> subprocess.Popen[str]:
    """Run tasks on this machine with the repository's own ansible.cfg; `folder` gets the playbook; stdout has
    stderr as well.
    """
    settings = {"ansible_python_interpreter": sys.executable, **(variables or {})}
    (folder / "play.yml").write_text(
        json.dumps(
            [
                {
                    "hosts": "localhost",
                    "connection": "local",
                    "gather_facts": False,
                    "tasks": tasks,
                    "vars": settings,
                }
            ]
        ),
        encoding="utf-8",
    )
    return subprocess.Popen(
        [
            str(Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            "localhost,",
            str(folder / "play.yml"),
            *arguments,
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass(frozen=True)
class Played:
    returncode: int
    stdout: str


def play(
    tasks: list[dict[str, Any]], folder: Path, variables: dict[str, Any] | None = None, *arguments: str
) -> Played:
    """As `start`, to its end."""
    with start(tasks, folder, variables, *arguments) as process:
        said, _ = process.communicate()
    return Played(process.returncode, said)


def include(role: str, variables: dict[str, Any] | None = None, tasks_from: str = "main") -> dict[str, Any]:
    return {
        "ansible.builtin.include_role": {"name": role, "tasks_from": tasks_from},
        "vars": {"ansible_python_interpreter": sys.executable, **(variables or {})},
    }
