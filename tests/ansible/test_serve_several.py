"""Several hosts in one play: each that has something to go back to does so, whatever becomes of the others.

The real playbooks/serve.yml and the role's own block; a stub in place of what switches and goes back, which
needs an engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = {
    "first": "does not answer, has nothing to go back to",
    "older": "does not answer, goes back",
    "good": "answers",
}
STUBS = {
    "activate": [
        {"name": "Switch", "ansible.builtin.fail": {"msg": "no answer"}, "when": "'does not answer' in stub"}
    ],
    "verify": [{"name": "Ask", "ansible.builtin.debug": {"msg": "answers"}}],
    "roll_back": [
        {
            "name": "Stop",
            "ansible.builtin.fail": {"msg": "nothing to go back to"},
            "when": "'goes back' not in stub",
        },
        {"name": "Go back", "ansible.builtin.debug": {"msg": "{{ inventory_hostname }} serves again"}},
        {"name": "Say so", "ansible.builtin.fail": {"msg": "went back"}},
    ],
    "proven": [{"name": "Note it", "ansible.builtin.debug": {"msg": "{{ inventory_hostname }} is proven"}}],
}


def test_a_host_goes_back_though_another_fails_for_good(tmp_path: Path) -> None:
    tasks = tmp_path / "roles/vllm_service/tasks"
    tasks.mkdir(parents=True)
    [block] = [
        task
        for task in yaml.safe_load((REPOSITORY / "roles/vllm_service/tasks/main.yml").read_text())
        if "rescue" in task
    ]
    (tasks / "main.yml").write_text(json.dumps([block]))
    for name, stub in STUBS.items():
        (tasks / f"{name}.yml").write_text(json.dumps(stub))
    release = {"lowmem_become": False, "lowmem_environment": {}, "vllm_service_release": {"id": "r"}}
    hosts = {
        name: {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "stub": stub}
        for name, stub in HOSTS.items()
    }
    groups = {"vllm": {"hosts": hosts, "vars": release}, "to_deploy": {"children": {"vllm": {}}}}
    (tmp_path / "hosts.json").write_text(json.dumps(groups))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path / "hosts.json",
        "playbooks/serve.yml"],
        cwd=REPOSITORY,
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(tmp_path / "roles"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "older serves again" in done.stdout
    assert "good is proven" in done.stdout
    assert "first serves again" not in done.stdout
    assert "older is proven" not in done.stdout
