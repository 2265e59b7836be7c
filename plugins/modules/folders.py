#!/usr/bin/python
"""Several folders in one call, where a loop over ansible.builtin.file starts a Python on the
host for each.
"""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: folders
short_description: Have folders on the host, each with its mode and owner
description:
  - As ansible.builtin.file with C(state=directory) does it for one; folders above that are missing are made
    too.
options:
  folders:
    description: The folders, each after those above it.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: Where it is., type: path, required: true}
      mode: {description: "Its mode, as octal digits in quotes.", type: str, required: true}
      owner: {description: Its owner; left as it is where this is not given., type: str}
      group: {description: Its group; left as it is where this is not given., type: str}
      marked:
        description:
          - Pattern of the names that this project puts there. With it the folder gets the marker file
            C(lowmem_root), without which nothing removes it.
          - A folder without the marker in which another name lies is refused.
        type: str
author: vllm-lowmem
"""

RETURN = r"""
changed_folders: {description: Paths of those that were made or had another mode or owner.,
  returned: always, type: list}
"""


MARKER = "lowmem_root"
"""The file of each folder that this project made, as in module owned_root."""


def mark(module: AnsibleModule, path: Path, known: str) -> bool:
    """Mark the folder as this project's. Whether it was not marked yet."""
    marker = path / MARKER
    if marker.is_file() and not marker.is_symlink():
        return False
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if foreign := [name for name in names if not re.fullmatch(known, name)]:
        module.fail_json(
            msg=f"{path} holds what is not this project's ({', '.join(foreign[:5])}): choose another"
        )
    if not module.check_mode:
        with marker.open("x") as file:
            file.write("Made by vllm-lowmem. Without this file nothing is removed here.\n")
        marker.chmod(0o644)
    return True


def have(module: AnsibleModule, folder: dict) -> bool:
    """Whether it was not there as wanted; in check mode it stays so."""
    path = Path(folder["path"])
    if path.exists() and not path.is_dir():
        module.fail_json(msg=f"{path} is there and is no folder")
    made = not path.is_dir()
    if made and module.check_mode:
        return True
    # closed to others until it has its owner and mode; those above it as the host has folders made
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    marked = bool(folder["marked"]) and mark(module, path, folder["marked"])
    attributes = module.load_file_common_arguments({**folder, "follow": True}, path=str(path))
    return module.set_fs_attributes_if_different(attributes, made or marked)


def main() -> None:
    one = {
        "path": {"type": "path", "required": True},
        "mode": {"type": "str", "required": True},
        "owner": {"type": "str"},
        "group": {"type": "str"},
        "marked": {"type": "str"},
    }
    module = AnsibleModule(
        argument_spec={"folders": {"type": "list", "elements": "dict", "options": one, "required": True}},
        supports_check_mode=True,
    )
    try:
        changed = [folder["path"] for folder in module.params["folders"] if have(module, folder)]
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(changed),
        changed_folders=changed,
        diff={"before": "", "after": "".join(f"{path}\n" for path in changed)},
    )


if __name__ == "__main__":
    main()
