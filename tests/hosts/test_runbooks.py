"""The commands in the runbooks that need no GPU host run, as they stand (blocks marked `bash run`). Those
marked `bash host` run in the gpu_driver scenario, those marked `bash service` in scenario service, those
marked `bash edge` in scenario edge, those marked `bash demo` on the demo's deployment. Every file and
variable that a runbook names exists.
"""

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
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


NINE = (
    "new-host", "driver-upgrade", "gpu-fell-off-the-bus", "oom-at-start", "latency-too-high", "model-update",
    "rollback", "key-rotation",
    "host-replacement", "certificate", "blocked-requests",
)  # fmt: skip


@pytest.mark.parametrize("name", NINE)
def test_a_runbook_says_when_what_to_run_what_it_prints_and_what_to_do(name):
    text = (ROOT / f"docs/runbooks/{name}.md").read_text()
    labels = " ".join(re.findall(r"\*\*([^*]+)\*\*", text)).lower()
    assert "when" in labels or "symptom" in labels
    for part in ("what to run", "what it prints", "what to do"):
        assert part in labels or part.removeprefix("what ") in labels, part
    assert "```bash" in text


PLAYS = sorted(
    {
        line.split("#")[0]
        .strip()
        .removeprefix(".lowmem/venv/bin/")
        .replace("inventory/mine", "inventory/NAME")
        for path in [*RUNBOOKS, ROOT / "inventory/README.md", ROOT / "README.md"]
        for line in re.findall(
            r"^ *((?:\.lowmem/venv/bin/)?ansible-playbook .*)$", path.read_text(), re.MULTILINE
        )
    }
)


@pytest.mark.parametrize("command", PLAYS)
def test_a_play_that_needs_hosts_is_at_least_understood(command):
    """Playbook, inventory, tags, limit and variables, with the examples' names where the operator puts his
    own.
    """
    words = command.replace("NAME", "a100-2x40g").replace("HOST", "gpu-1.example.org").split()
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), *words[1:], "--list-tasks", "--list-hosts"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"hosts \([1-9]", done.stdout), "inventory or limit name no host"
    if "--tags" in words:
        assert words[words.index("--tags") + 1] in done.stdout.split("TAGS:", 1)[1]


def test_doctor_runs_on_this_machine_and_changes_nothing(playbook, tmp_path):
    done = playbook(
        "playbooks/doctor.yml", variables={"doctor_strict": False, "doctor_folder": str(tmp_path)}
    )
    assert done.rc == 0, done.text
    assert done.changed == 0
    assert "verdict: " in done.text
    findings = (tmp_path / "demo.json").read_text()
    assert '"subject": "RAM"' in findings


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
        "".join(f.read_text() for f in (ROOT / "roles").glob("*/defaults/main.yml"))
        + (ROOT / "playbooks/group_vars/all.yml").read_text()
    )
    roles = (
        "gpu_driver|nvidia_repository|cuda_toolkit|host_memory|vllm_service"
        "|gateway|monitoring|status_page|router"
    )
    named = set(re.findall(rf"\b((?:{roles})_\w+)\b", path.read_text()))
    assert sorted(n for n in named if f"{n}:" not in known) == []
