"""The repository's own ansible-playbook run on a few tasks, and where the demo's host folder lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STATE = REPOSITORY / ".lowmem"
HOST = STATE / "host"
# the environments' Python, as `make` chooses it; one that another user can run
PYTHON = os.environ.get("LOWMEM_TEST_PYTHON") or str(Path(sys.executable).resolve())


def play(
    tasks: list[dict[str, Any]], tmp_path: Path, variables: dict[str, Any] | None = None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run tasks on this machine with the repository's own ansible.cfg; stdout has stderr as well."""
    (tmp_path / "play.yml").write_text(
        json.dumps(
            [
                {
                    "hosts": "localhost",
                    "connection": "local",
                    "gather_facts": False,
                    "tasks": tasks,
                    "vars": {"ansible_python_interpreter": sys.executable, **(variables or {})},
                }
            ]
        ),
        encoding="utf-8",
    )
    return subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(tmp_path / "play.yml"), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def include(role: str, variables: dict[str, Any] | None = None, tasks_from: str = "main") -> dict[str, Any]:
    return {
        "ansible.builtin.include_role": {"name": role, "tasks_from": tasks_from},
        "vars": {"ansible_python_interpreter": sys.executable, **(variables or {})},
    }
