#!/usr/bin/python
"""Removes what a role made, and no folder that it did not make."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: remove_owned
short_description: Remove files, links and marked folders
description:
  - A file, a socket or a link is removed itself; nothing is removed through a link.
  - A folder goes with its content if it holds the marker file C(lowmem_root), if it is empty, or if one of
    O(paths) is the link of module C(config_tree) that names it.
  - Any other folder stays, with a warning. So does one on which a file system is mounted.
options:
  paths:
    description: What is removed; a path that is not there is none.
    type: list
    elements: path
    required: true
author: vllm-lowmem
"""

RETURN = r"""
removed: {description: What was removed, returned: always, type: list}
left: {description: Folders that stay, returned: always, type: list}
"""

MARKER = "lowmem_root"
"""The file of each folder that this project made, as in module owned_root."""


def named(link: Path) -> Path | None:
    """The folder beside it that a link of config_tree names."""
    target = str(link.readlink()) if link.is_symlink() else ""
    return link.with_name(target) if re.fullmatch(rf"{re.escape(link.name)}\.[0-9a-f]{{8}}", target) else None


def ours(folder: Path, shown: set[Path]) -> bool:
    marker = folder / MARKER
    marked = marker.is_file() and not marker.is_symlink()
    return not folder.is_mount() and (marked or folder in shown or not any(folder.iterdir()))


def main() -> None:
    module = AnsibleModule(
        {"paths": {"type": "list", "elements": "path", "required": True}}, supports_check_mode=True
    )
    paths = [Path(path) for path in module.params["paths"]]
    there = [path for path in paths if os.path.lexists(path)]
    shown = {folder for path in there if (folder := named(path)) and not folder.is_symlink()}
    removed, left = [], []
    try:
        for path in there:
            folder = path.is_dir() and not path.is_symlink()
            if folder and not ours(path, shown):
                left.append(str(path))
                module.warn(f"{path} holds no {MARKER}, so it may not be this project's and stays")
                continue
            removed.append(str(path))
            if not module.check_mode:
                shutil.rmtree(path) if folder else path.unlink()
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(removed), removed=removed, left=left)


if __name__ == "__main__":
    main()
