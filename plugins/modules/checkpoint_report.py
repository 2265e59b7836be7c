#!/usr/bin/python
"""What a folder with a checkpoint says of itself: config.json and the headers of its weights; reads only."""

# The module runs on the host, whose Python may be older than the controller's.
from __future__ import annotations

import base64
import os
import stat
import struct
import zlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: checkpoint_report
short_description: Report what the plan needs of a checkpoint in a folder of the host, without its weights
description:
  - Reads the small JSON files and the header of each safetensors file; changes nothing, also in check mode.
  - What a file holds is judged on the controller.
options:
  path:
    description: Folder on the host.
    type: str
    required: true
author: vllm-lowmem
"""

RETURN = r"""
present:
  description: Whether the folder has a config.json.
  returned: always
  type: bool
files:
  description: Name of a file -> its size in bytes, and its beginning, compressed by zlib, in Base64.
  returned: always
  type: dict
"""

SMALL = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")
SMALL_LIMIT = 64 * 2**20
HEADER_LIMIT = 100 * 2**20
FILES_LIMIT = 10_000
TOTAL_LIMIT = 256 * 2**20


def beginning(path):
    """Return the size of a regular file, and the part of it that describes it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file; name a folder with a checkpoint")
        if path.suffix == ".json":
            content = stream.read(SMALL_LIMIT + 1)
            if len(content) > SMALL_LIMIT:
                raise ValueError(f"{path} is larger than {SMALL_LIMIT} bytes; it is no file of a checkpoint")
            return status.st_size, content
        content = stream.read(8)
        length = struct.unpack("<Q", content)[0] if len(content) == 8 else 0
        # one that is longer than the format's own limit is refused on the controller
        return status.st_size, content + stream.read(min(length, HEADER_LIMIT))


def report(folder):
    """Return the beginnings of a checkpoint's files by name. ValueError or OSError names what is wrong."""
    if not (folder / "config.json").exists():
        return {}
    names = [name for name in SMALL if (folder / name).exists()]
    names += sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) > FILES_LIMIT:
        raise ValueError(f"{folder} has {len(names)} files of weights; the limit is {FILES_LIMIT}")
    files, total = {}, 0
    for name in names:
        size, content = beginning(folder / name)
        total += len(content)
        if total > TOTAL_LIMIT:
            raise ValueError(f"{folder} describes itself in more than {TOTAL_LIMIT} bytes; it is damaged")
        files[name] = {"size": size, "head": base64.b64encode(zlib.compress(content, 6)).decode()}
    return files


def main():
    module = AnsibleModule({"path": {"type": "str", "required": True}}, supports_check_mode=True)
    try:
        files = report(Path(module.params["path"]))
    except PermissionError as error:
        module.fail_json(msg=f"{error.filename} cannot be read by this user: set lowmem_become, or its mode.")
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{module.params['path']} cannot be read: {error}")
    module.exit_json(changed=False, present=bool(files), files=files)


if __name__ == "__main__":
    main()
