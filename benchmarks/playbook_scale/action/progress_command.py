"""Stands in for the product's progress_command: makes an environment of a few files where build_env.py would
build one, refuses all else.

PLAYBOOK_SCALE_ENVIRONMENT names the environment of `make demo`, whose packages the stub reaches by a .pth
file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

BIN = Path(__file__).resolve().parents[1] / "bin"
REPOSITORY = Path(__file__).resolve().parents[3]
CONSOLE = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"
CONSOLES = {
    "pip": ("pip._internal.cli.main", "main"),
    "supervisord": ("supervisor.supervisord", "main"),
    "supervisorctl": ("supervisor.supervisorctl", "main"),
    "lowmem.real": ("lowmem.cli.main", "app"),
}


def make(env: Path, stamp: dict[str, Any], python: str, packages: Path) -> None:
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", str(env)], check=True)
    [site] = env.glob("lib/python*/site-packages")
    (site / "demo.pth").write_text(f"{REPOSITORY}\n{packages}\n")
    scripts = {
        name: CONSOLE.format(python=env / "bin/python", module=module, name=entry)
        for name, (module, entry) in CONSOLES.items()
    }
    scripts |= {
        stub.name: stub.read_text().replace("#!python", f"#!{env}/bin/python") for stub in BIN.iterdir()
    }
    for name, text in scripts.items():
        (env / "bin" / name).write_text(text)
        (env / "bin" / name).chmod(0o755)
    (env / ".complete").write_text(json.dumps(stamp))


class ActionModule(ActionBase):
    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        argv = self._task.args["argv"]
        if not str(argv[1]).endswith("/build_env.py"):
            raise AnsibleActionFail(f"this benchmark has no stub for {argv[1]}")
        env, spec = Path(argv[2]), json.loads(argv[3]) if isinstance(argv[3], str) else argv[3]
        env.parent.mkdir(parents=True, exist_ok=True)
        # the hosts share the store, and one of them makes it
        with env.with_name(f".{env.name}.lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not (env / ".complete").exists():
                make(env, spec["stamp"], argv[0], Path(os.environ["PLAYBOOK_SCALE_ENVIRONMENT"]))
        return {"changed": True, "rc": 0, "stdout_lines": []}
