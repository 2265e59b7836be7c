#!/usr/bin/python
"""What a host has and holds that a deploy depends on; reads only."""

# The module runs on the host, whose Python may be older than the controller's.
from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

DOCUMENTATION = r"""
module: host_report
short_description: Report memory, swap, kernel settings, disk space, listeners and libraries of a host
description:
  - Reads C(/proc), C(/sys) and the file systems; changes nothing, and runs in check mode as well.
  - One call in place of the slow hardware facts; sizes are bytes.
options:
  paths:
    description: Paths whose file systems' free space is wanted. A path need not exist; its nearest existing
      parent counts.
    type: list
    elements: path
    default: []
  ports:
    description: TCP ports whose listeners are wanted.
    type: list
    elements: int
    default: []
  libraries:
    description: Shared libraries by soname, tried with the dynamic loader.
    type: list
    elements: str
    default: []
  commands:
    description: Programs looked for on PATH and in the sbin folders.
    type: list
    elements: str
    default: []
  root:
    description: Processes whose working directory lies in this folder are reported as its own.
    type: path
author: vllm-lowmem
"""

RETURN = r"""
memory:
  description:
    - Of C(/proc/meminfo), lowered to the control group's limit where there is one.
    - V(total_bytes), V(available_bytes), V(swap_total_bytes).
  returned: always
  type: dict
swaps:
  description: Swap areas in use, each with V(path) and V(size_bytes).
  returned: always
  type: list
sysctl:
  description: Values of vm.swappiness, vm.max_map_count and vm.overcommit_memory.
  returned: always
  type: dict
numa:
  description: NUMA nodes that have memory, each with V(node) and V(total_bytes); empty where the kernel does
    not say.
  returned: always
  type: list
memlock_bytes:
  description: Hard limit of locked memory of this session; -1 is unlimited.
  returned: always
  type: int
disk:
  description: By path as given, whether it exists (V(exists)), V(free_bytes) for this user and
    V(total_bytes).
  returned: always
  type: dict
listeners:
  description:
    - By port, the processes that listen on it, each with V(pid), V(command) and V(own).
    - One entry with pid null where it cannot be told.
  returned: always
  type: dict
own_processes:
  description: Processes that belong to O(root), each with V(pid), V(command) and V(rss_bytes).
  returned: always
  type: list
missing_libraries:
  description: Those of O(libraries) that do not load.
  returned: always
  type: list
missing_commands:
  description: Those of O(commands) that were not found.
  returned: always
  type: list
"""

PROC = Path("/proc")
LISTEN = "0A"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def memory(proc: Path = PROC, cgroup: Path = Path("/sys/fs/cgroup")) -> dict:
    kib = {
        key: int(value.split()[0])
        for key, value in (line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    }
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no version 2 control group, or "max"
        pass
    else:
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return {"total_bytes": total, "available_bytes": available, "swap_total_bytes": kib["SwapTotal"] * 1024}


def swaps(proc: Path = PROC) -> list:
    lines = (line.split() for line in (proc / "swaps").read_text().splitlines()[1:])
    return [{"path": field[0], "size_bytes": int(field[2]) * 1024} for field in lines]


def sysctls(names: tuple, proc: Path = PROC) -> dict:
    return {name: int((proc / "sys" / name.replace(".", "/")).read_text()) for name in names}


def numa(nodes: Path = Path("/sys/devices/system/node")) -> list:
    found = []
    for entry in sorted(nodes.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        fields = dict(
            line.split(":", 1) for line in (entry / "meminfo").read_text().splitlines() if ":" in line
        )
        total = next(
            (int(value.split()[0]) * 1024 for key, value in fields.items() if key.endswith("MemTotal")), 0
        )
        if total:
            found.append({"node": int(entry.name[4:]), "total_bytes": total})
    return found


def disk(path: str) -> dict:
    place = Path(path)
    while not place.exists():
        place = place.parent
    usage = os.statvfs(place)
    return {
        "exists": Path(path).exists(),
        "free_bytes": usage.f_bavail * usage.f_frsize,
        "total_bytes": usage.f_blocks * usage.f_frsize,
    }


def processes(proc: Path = PROC) -> list:
    return [entry for entry in proc.iterdir() if entry.name.isdigit()]


def command_of(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def belongs(entry: Path, root: str | None) -> bool:
    if not root:
        return False
    try:
        return (entry / "cwd").resolve().is_relative_to(Path(root).resolve())
    except OSError:  # another user's, or gone
        return False


def own_processes(root: str | None, proc: Path = PROC) -> list:
    found = []
    for entry in processes(proc):
        if belongs(entry, root):
            try:
                resident_pages = int((entry / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            found.append(
                {
                    "pid": int(entry.name),
                    "command": command_of(entry),
                    "rss_bytes": resident_pages * PAGE_BYTES,
                }
            )
    return found


def listening_inodes(ports: list, proc: Path = PROC) -> dict:
    """Port -> inodes of its listening sockets, over IPv4 and IPv6."""
    inodes: dict = {port: set() for port in ports}
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for field in (line.split() for line in lines):
            port = int(field[1].rsplit(":", 1)[1], 16)
            if field[3] == LISTEN and port in inodes:
                inodes[port].add(field[9])
    return inodes


def open_files(entry: Path) -> set:
    """What the process's descriptors point to; nothing where it is another user's, or gone."""
    links = set()
    try:
        for descriptor in (entry / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                links.add(str(descriptor.readlink()))
    except OSError:
        pass
    return links


def listeners(ports: list, root: str | None, proc: Path = PROC) -> dict:
    inodes = listening_inodes(ports, proc)
    found: dict = {str(port): [] for port in ports}
    if not any(inodes.values()):
        return found
    for entry in processes(proc):
        links = open_files(entry)
        for port, sockets in inodes.items():
            if links & {f"socket:[{inode}]" for inode in sockets}:
                found[str(port)].append(
                    {"pid": int(entry.name), "command": command_of(entry), "own": belongs(entry, root)}
                )
    for port, sockets in inodes.items():
        if sockets and not found[str(port)]:
            found[str(port)] = [{"pid": None, "command": "a process of another user", "own": False}]
    return found


def missing_libraries(sonames: list) -> list:
    missing = []
    for soname in sonames:
        try:
            ctypes.CDLL(soname)
        except OSError:
            missing.append(soname)
    return missing


def missing_commands(names: list) -> list:
    search = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    return [name for name in names if shutil.which(name, path=search) is None]


def memlock_bytes() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]


SYSCTLS = ("vm.swappiness", "vm.max_map_count", "vm.overcommit_memory")


def report(root: str | None, paths: list) -> dict:
    """What `lowmem doctor` judges of a host."""
    return {
        "memory": memory(),
        "sysctl": sysctls(SYSCTLS),
        "disk": {path: disk(path) for path in paths},
        "own_processes": own_processes(root),
    }


def main() -> None:
    # Here and not above: `lowmem doctor` reads a host by these functions too, where there is no Ansible.
    from ansible.module_utils.basic import AnsibleModule

    strings = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "libraries": strings,
            "commands": strings,
            "root": {"type": "path"},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    module.exit_json(
        changed=False,
        **report(wanted["root"], wanted["paths"]),
        swaps=swaps(),
        numa=numa(),
        memlock_bytes=memlock_bytes(),
        listeners=listeners(wanted["ports"], wanted["root"]),
        missing_libraries=missing_libraries(wanted["libraries"]),
        missing_commands=missing_commands(wanted["commands"]),
    )


if __name__ == "__main__":
    main()
