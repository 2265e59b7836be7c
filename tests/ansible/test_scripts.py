"""The scripts behind make: what is missing is named with its package, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def stand_in(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_nothing_is_missing_here() -> None:
    done = run("scripts/preconditions", "engine")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_missing_package_is_a_line(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "ldconfig", "echo libc.so.6")
    # bash alone, so that lscpu is nowhere
    (tmp_path / "bin/bash").symlink_to("/bin/bash")
    done = run("/bin/bash", "scripts/preconditions", "engine", path=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "missing: libnuma1 (vLLM's CPU engine loads libnuma.so.1); install it with: apt-get install libnuma1",
        "missing: libgomp1 (PyTorch loads libgomp.so.1); install it with: apt-get install libgomp1",
        (
            "missing: util-linux (vLLM's CPU engine runs lscpu to place its threads); install it with:"
            " apt-get install util-linux"
        ),
    ]


def test_a_machine_without_a_python_is_told_which_package() -> None:
    done = run("make", "setup", "PYTHON=", "RUNTIME=nothing", path=os.environ["PATH"])
    assert done.returncode == 2
    assert "missing: python3-venv (no Python 3.11, 3.12 or 3.13 with the venv module was found" in done.stderr
    assert not (REPOSITORY / "nothing").exists()


def test_a_python_is_found_that_is_new_enough() -> None:
    found = run("scripts/find-python").stdout.strip()
    version = run(found, "-c", "import sys, venv; print(sys.version_info[:2])").stdout.strip()
    assert version in ("(3, 11)", "(3, 12)", "(3, 13)")


@pytest.mark.parametrize("arguments", [[], ["everything"]])
def test_a_wrong_call_changes_nothing(arguments: list[str]) -> None:
    assert run("scripts/preconditions", *arguments).returncode != 0


def test_help_names_what_the_readme_promises() -> None:
    shown = run("make", "help").stdout
    for target in ("make demo", "make test", "make lint", "make clean"):
        assert target in shown
