"""Builds a wheel of a source folder on the controller, once per content."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from lowmem.checkpoint import lock
from lowmem.files import tree_digest

DOCUMENTATION = r"""
module: controller_wheel
short_description: Build a wheel of a source folder on the controller
description:
  - The wheel lies in a folder named after the sources' SHA-256, so its path changes exactly when its content
    does.
  - Touches nothing on the host; runs in check mode as well.
options:
  source:
    description: Folder with a pyproject.toml that hatchling builds.
    type: path
    required: true
  destination:
    description: Folder under which wheels are kept.
    type: path
    required: true
"""

IGNORED = {"__pycache__", ".git", ".lowmem", ".carry", ".ansible"}
# The wheel is made of these; a change of anything else in a repository is no reason to build again.
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")


def sources(source: Path) -> list[Path]:
    """The files that a wheel of `source` can depend on: project files, and every package, data folder and
    module beside them.
    """
    packages = {init.parent for init in source.glob("*/__init__.py")} | {
        init.parent for init in source.glob("src/*/__init__.py")
    }
    packages |= {source / name for name in ("profiles", "plugins/modules") if (source / name).is_dir()}
    files = [source / name for name in PROJECT_FILES if (source / name).is_file()] + list(source.glob("*.py"))
    for package in packages:
        files += [path for path in package.rglob("*") if path.is_file() and not IGNORED & set(path.parts)]
    return sorted(set(files))


def build(source: Path, destination: Path) -> tuple[Path, bool]:
    """The wheel of `source` and whether it was built now. Raises RuntimeError with the
    builder's last line.
    """
    folder = destination / tree_digest(source, sources(source))[:12]
    for wheel in folder.glob("*.whl"):
        return wheel, False
    destination.mkdir(parents=True, exist_ok=True)
    # Ansible asks for every host at the same time: one builds, the others find it.
    with lock.held(destination):
        for wheel in folder.glob("*.whl"):
            return wheel, False
        return make(source, folder), True


def make(source: Path, folder: Path) -> Path:
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        command = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(scratch),
        ]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["hatchling said nothing"])[-1])
        folder.mkdir(exist_ok=True)
        [made] = scratch.glob("*.whl")
        return Path(shutil.move(made, folder / made.name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, wanted = self.validate_argument_spec(
            {"source": {"type": "path", "required": True}, "destination": {"type": "path", "required": True}}
        )
        try:
            wheel, _ = build(Path(wanted["source"]), Path(wanted["destination"]))
        except (OSError, RuntimeError) as error:
            raise AnsibleActionFail(f"the wheel of {wanted['source']} could not be built: {error}") from error
        return {"changed": False, "wheel": str(wheel), "sha256": wheel.parent.name}
