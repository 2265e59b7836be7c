"""The commands in the runbooks that need no GPU host run, as they stand (blocks marked `bash run`). Those marked `bash host` run in the
gpu_driver scenario, those marked `bash demo` on the demo's deployment. Every file and variable that a runbook names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNBOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))


def commands(kind):
    block = re.compile(rf"^( *)```bash {kind}\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(line.strip(), id=f"{path.stem}: {line.strip()[:50]}")
        for path in RUNBOOKS
        for _, text in block.findall(path.read_text())
        for line in text.splitlines()
        if line.strip()
    ]


@pytest.mark.engine
@pytest.mark.parametrize("command", commands("demo"))
def test_command_runs_on_the_demo(command, deployed):
    test_command_runs(command)


@pytest.mark.parametrize("command", commands("run"))
def test_command_runs(command):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_files_that_are_named_exist(path):
    text = path.read_text()
    named = re.findall(r"\b((?:roles|playbooks|docs)/[\w./-]+\.(?:yml|md))", text) + [
        f"docs/runbooks/{n}" for n in re.findall(r"\]\(([\w-]+\.md)\)", text)
    ]
    assert [n for n in named if not (ROOT / n).exists()] == []


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_variables_that_are_named_exist(path):
    known = (
        "".join(f.read_text() for f in (ROOT / "roles").glob("*/defaults/main.yml")) + (ROOT / "playbooks/group_vars/all.yml").read_text()
    )
    named = set(re.findall(r"\b((?:gpu_driver|nvidia_repository|cuda_toolkit|host_memory|vllm_service)_\w+)\b", path.read_text()))
    assert sorted(n for n in named if f"{n}:" not in known) == []
