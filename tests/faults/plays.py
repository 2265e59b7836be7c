"""Plays against hosts of a Molecule scenario, as an operator runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .hold import Hold
from .node import INVENTORY

REPOSITORY = Path(__file__).resolve().parents[2]
# a few requests are enough here, and the engine is killed in test_units.py
SETTINGS = {"lowmem_verify_kill": False, "lowmem_verify_requests": 4}


def start(name: str, *arguments: str, hold: Hold | None = None, **variables: Any) -> subprocess.Popen[str]:
    """As an operator runs it, with the repository's settings and Molecule's inventory; stdout has stderr as
    well.
    """
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.Popen(
        [
            program,
            "-i",
            INVENTORY,
            f"playbooks/{name}.yml",
            "-e",
            json.dumps({**SETTINGS, **variables}),
            *arguments,
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_NOCOLOR": "1",
            **(hold.environment if hold else {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def play(name: str, *arguments: str, **variables: Any) -> str:
    """What it says, its line breaks taken out; its status is its last word."""
    with start(name, *arguments, **variables) as process:
        said, _ = process.communicate()
    return f"{' '.join(said.split())} rc={process.returncode}"
