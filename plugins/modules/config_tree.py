#!/usr/bin/python
"""A folder of configuration that lands whole, and only after the program that reads it has accepted it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: config_tree
short_description: Put a folder of configuration files in place as a whole, after a check of the whole
description:
  - Writes all files into a scratch folder beside O(path), runs O(validate) on that folder, and only then
    makes O(path) name it.
  - O(path) is a link that is replaced by a rename, so that it always names a whole folder that was accepted.
    What a refused one would have replaced stays as it is.
  - Folders of before are removed only where this module made them.
options:
  path:
    description: The link; the folders that it names lie beside it, as C(<path>.<digest>).
    type: path
    required: true
  files:
    description: File name to content. Names that end in C(.sh) are programs.
    type: dict
    default: {}
  private:
    description: The same for files with mode 0600, whose content is never shown.
    type: dict
    default: {}
  keep_others:
    description: Whether files that are there and are not given here stay, rather than go.
    type: bool
    default: false
  validate:
    description: Commands that must all end well, each a list in which C(%s) is the scratch folder. Not run in
      check mode.
    type: list
    elements: list
    default: []
author: vllm-lowmem
"""

RETURN = r"""
changed_files: {description: Names of the files that are new or differ or go, returned: always, type: list}
folder: {description: The folder that is in place, returned: always, type: str}
"""


def read(folder: Path) -> dict:
    """File name to content and whether it is private."""
    if not folder.is_dir():
        return {}
    return {
        entry.name: (entry.read_text(), entry.stat().st_mode & 0o077 == 0)
        for entry in sorted(folder.iterdir())
    }


def mode(name: str, private: bool) -> int:
    return 0o600 if private else 0o755 if name.endswith(".sh") else 0o644


def lay_out(folder: Path, tree: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name, (content, private) in tree.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(content)
        path.chmod(mode(name, private))


def point(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    beside.symlink_to(target)
    beside.replace(link)


def content_digest(tree: dict) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def made_here(folder: Path) -> bool:
    """Whether this module made the folder: its name has the digest of its content, or it is a flat scratch
    folder that a killed run left. What is reached by a link is not.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not all(entry.is_file() and not entry.is_symlink() for entry in folder.iterdir()):
        return False
    scratch = folder.name.startswith(".")
    try:
        return scratch or folder.name.endswith(f".{content_digest(read(folder))}")
    except (OSError, ValueError):  # not text
        return False


def remove_older(link: Path, place: Path, replaced: Path) -> None:
    """Remove the folders that `link` named before `place`, and what killed runs left."""
    for old in link.parent.iterdir():
        named = re.fullmatch(rf"\.?{re.escape(link.name)}\.[0-9a-f]{{8}}(\.\d+)?", old.name)
        if named and old != place and (made_here(old) or (old == replaced and not old.is_symlink())):
            shutil.rmtree(old)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "files": {"type": "dict", "default": {}},
            "private": {"type": "dict", "default": {}, "no_log": True},
            "keep_others": {"type": "bool", "default": False},
            "validate": {"type": "list", "elements": "list", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    link = Path(wanted["path"])
    before = read(link)
    tree = dict(before) if wanted["keep_others"] else {}
    tree.update({name: (text, False) for name, text in wanted["files"].items()})
    tree.update({name: (text, True) for name, text in wanted["private"].items()})
    differing = sorted(name for name in {*before, *tree} if before.get(name) != tree.get(name))
    digest = content_digest(tree)
    place = link.with_name(f"{link.name}.{digest}")
    result = {
        "changed": bool(differing),
        "changed_files": differing,
        "folder": str(place if differing else link.resolve()),
    }
    result["diff"] = [
        {
            "before": before.get(name, ("",))[0],
            "after": tree.get(name, ("",))[0],
            "before_header": str(link / name),
            "after_header": str(link / name),
        }
        for name in differing
        if not any(side.get(name, ("", False))[1] for side in (before, tree))
    ]
    if not differing or module.check_mode:
        module.exit_json(**result)
    try:
        scratch = link.with_name(f".{link.name}.{digest}.{os.getpid()}")
        lay_out(scratch, tree)
        for command in wanted["validate"]:
            done = module.run_command([word.replace("%s", str(scratch)) for word in command])
            if done[0]:
                shutil.rmtree(scratch)
                said = " ".join((done[2] or done[1]).replace(str(scratch), str(link)).split())
                module.fail_json(
                    msg=f"{link} was not changed, since {command[0]} refuses what was to land there: {said}",
                    rc=done[0],
                )
        replaced = link.with_name(str(link.readlink())) if link.is_symlink() else link
        if replaced == place or made_here(place):
            shutil.rmtree(place, ignore_errors=True)
        scratch.rename(place)
        point(link, place.name)
        remove_older(link, place, replaced)
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
