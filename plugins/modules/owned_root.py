#!/usr/bin/python
"""Tells a root that this project made from any other folder, before something is written or removed in it."""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: owned_root
short_description: Refuse a root that is not this project's
description:
  - A root that this project made holds the file C(lowmem_root).
  - A deployment of before that file is recognised by its plan and its releases.
  - A shared store of before it is recognised by its list of roots and its environments.
  - Folders of the system are refused in every state.
options:
  root:
    description: The folder.
    type: path
    required: true
  state:
    description:
      - V(free) refuses a folder in which something else lies. It writes nothing.
      - V(made) does the same, makes the folder and writes the marker file.
      - V(owned) refuses a folder that holds something and was not made by this project; a task that is about
        to remove something asks for it.
    type: str
    choices: [free, made, owned]
    required: true
  variable:
    description: What the operator sets the folder with, as a refusal names it.
    type: str
    default: lowmem_root
author: vllm-lowmem
"""

RETURN = r"""
marker: {description: The marker file, returned: always, type: str}
"""

MARKER = "lowmem_root"

OURS = {
    "as-deployed.json", "cache", "current", "envs", "etc", "lib", "log", "models", "receipts", "releases",
    "roots", "run", "status",
}  # fmt: skip
"""What a deployment puts into its root, and a reset removes."""

SYSTEM = (
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/media", "/mnt",
    "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/usr", "/usr/local", "/var",
    "/tmp",  # noqa: S108 - refused, not written
)  # fmt: skip

SYSTEM_TREES = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/sbin",
    "/sys",
)
"""Nothing below them is a place for a root, either."""

SYSTEM_PARENTS = ("/usr", "/usr/local", "/var")
"""Each folder directly below them is the system's."""


def system_folder(root: Path) -> bool:
    """Whether the system owns the folder, by its name or by where its links lead."""
    for path in (Path(os.path.normpath(root)), Path(os.path.realpath(root))):
        text = str(path)
        if text in SYSTEM or any(text.startswith(f"{tree}/") for tree in SYSTEM_TREES):
            return True
        # an earlier release took such a place, and what it deployed there has to be upgraded and removed
        if str(path.parent) in SYSTEM_PARENTS and not (marked(path) or older_deployment(path)):
            return True
    return False


def entries(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir()} - {"lost+found"} if root.is_dir() else set()


def marked(root: Path) -> bool:
    marker = root / MARKER
    return marker.is_file() and not marker.is_symlink()


def older_deployment(root: Path) -> bool:
    """Whether it is a root or a shared store of a release that wrote no marker."""
    deployed = (root / "etc" / "plan.json").is_file() and (root / "releases").is_dir()
    roots = root / "roots"
    stored = (
        roots.is_dir() and not roots.is_symlink() and any(entry.is_symlink() for entry in roots.iterdir())
    )
    return deployed or (stored and (root / "envs").is_dir())


def refusal(root: Path, state: str, variable: str = "lowmem_root") -> str:
    """Why nothing may be done in this root; empty where it may."""
    if not root.is_absolute() or ".." in root.parts:
        return f"{variable} {root} is not an absolute path without '..': choose another"
    if system_folder(root):
        return f"{variable} {root} is a folder of the system: choose one of its own, such as /opt/vllm-lowmem"
    if root.exists() and not root.is_dir():
        return f"{variable} {root} is not a folder: choose another"
    held = entries(root)
    if not held or marked(root) or older_deployment(root):
        return ""
    if state == "owned":
        # nothing that a reset removes: there is nothing to refuse
        return (
            f"{root} holds no {MARKER} and no plan of this project, so nothing is removed"
            if held & OURS
            else ""
        )
    # a first deployment that ended before its plan was written
    begun = held & {"envs", "models", "releases"} or (root / "run" / "async").is_dir()
    if held <= OURS and begun:
        return ""
    foreign = ", ".join(sorted(held - OURS)[:5] or sorted(held)[:5])
    what = f"{variable} {root} holds what is not this project's ({foreign})"
    return f"{what}: choose an empty folder or a new one"


def main() -> None:
    module = AnsibleModule(
        {
            "root": {"type": "path", "required": True},
            "state": {"choices": ["free", "made", "owned"], "required": True},
            "variable": {"type": "str", "default": "lowmem_root"},
        },
        supports_check_mode=True,
    )
    root, state = Path(module.params["root"]), module.params["state"]
    if why := refusal(root, state, module.params["variable"]):
        module.fail_json(msg=why)
    marker = root / MARKER
    write = not marked(root) and (state == "made" or (state == "owned" and older_deployment(root)))
    if write and not module.check_mode:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)  # a link that somebody left there
        with os.fdopen(
            os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w"
        ) as file:
            file.write("Made by vllm-lowmem. Without this file nothing is removed here.\n")
    module.exit_json(changed=write, marker=str(marker))


if __name__ == "__main__":
    main()
