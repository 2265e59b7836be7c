#!/usr/bin/python
"""What a whole run left on the host, kept as digests, and whether it is still so."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: deployed_state
short_description: Keep what a whole run left on the host, and compare the host with it
description:
  - Everything is compared by the same names as it was kept under, so that what differs can be said. One that
    is there now and was not then differs too.
  - Besides what the options name, these count on every host. The boot, the package database, swap areas, the
    live values of what /etc/sysctl.d sets, and NVIDIA's driver and cards.
  - The controller's part (plugins/action/deployed_state.py) adds the variables and the code that the run was
    made of.
options:
  state:
    description: Whether the host is compared with the record, or the record is written.
    type: str
    choices: [compared, recorded]
    required: true
  record:
    description: File of the record.
    type: path
    required: true
  intent:
    description: What the run was made of, as digests by name.
    type: dict
    default: {}
  contents:
    description: Files and whole folders, as glob patterns, of which mode, owner and every byte count.
    type: list
    elements: str
    default: []
  outlines:
    description: The same, but of files only size and modification time count, and of folders nothing below
      them.
    type: list
    elements: str
    default: []
  sealed:
    description: Seals of environments (lowmem/checkpoint/seal.py), as glob patterns; the outlines of all
      files that one names count together.
    type: list
    elements: str
    default: []
  ignored:
    description: Names, as patterns, of files that a run or the service itself writes anew.
    type: list
    elements: str
    default: []
  units:
    description: Units of systemd, as patterns, whose state counts.
    type: list
    elements: str
    default: []
  tables:
    description: Begin of the names of the nftables that count.
    type: str
    default: ""
  answers:
    description: URLs whose HTTP status counts.
    type: list
    elements: str
    default: []
author: vllm-lowmem
"""

RETURN = r"""
unchanged: {description: Whether all is as it was recorded., returned: always, type: bool}
differences: {description: The first names that differ., returned: always, type: list}
count: {description: How many differ., returned: always, type: int}
recorded_utc: {description: When the record was written; empty where there is none.,
  returned: always, type: str}
"""

SHOWN = 5
ANSWER_TIMEOUT_S = 10
COMMAND_TIMEOUT_S = 30
MACHINE = (
    "/proc/sys/kernel/random/boot_id",
    "/proc/driver/nvidia/version",
    "/proc/driver/nvidia/gpus/*/information",
)
PACKAGES = ("/var/lib/dpkg/status", "/var/lib/dpkg/extended_states")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def owner(seen: os.stat_result) -> str:
    return f"{stat.S_IMODE(seen.st_mode):o} {seen.st_uid}:{seen.st_gid}"


def whole(path: Path) -> str:
    """Mode, owner and content; a link is where it points to."""
    try:
        seen = path.lstat()
        if stat.S_ISLNK(seen.st_mode):
            return f"link {path.readlink()}"
        return f"{owner(seen)} {digest(path.read_bytes())}" if stat.S_ISREG(seen.st_mode) else owner(seen)
    except FileNotFoundError:
        return "gone"
    except PermissionError:
        return outline(path)


def outline(path: Path) -> str:
    try:
        seen = path.stat()
    except FileNotFoundError:
        return "gone"
    return f"{owner(seen)} {seen.st_size} {seen.st_mtime_ns}" if stat.S_ISREG(seen.st_mode) else owner(seen)


def sealed(path: Path) -> str:
    """The outlines of the files that a seal names, as one digest."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "unreadable"
    return digest("\n".join(outline(path.parent / name) for name in names).encode())


def matches(pattern: str) -> list[Path]:
    """What is there by that name, in which parts may be patterns."""
    # Path.glob leaves out a link to nothing
    return [Path(path) for path in sorted(glob.glob(pattern))]  # noqa: PTH207


def counts(name: str, ignored: list[str]) -> bool:
    return not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)


def below(pattern: str, ignored: list[str]) -> list[Path]:
    """What the pattern names, and for a folder everything under it; links are not followed."""
    found = []
    for path in matches(pattern):
        found.append(path)
        if path.is_dir() and not path.is_symlink():
            for folder, folders, files in os.walk(path):
                folders[:] = [name for name in folders if counts(name, ignored)]
                found += [Path(folder, name) for name in folders + files if counts(name, ignored)]
    return found


def sysctls() -> dict[str, str]:
    """Live values of what /etc/sysctl.d sets."""
    found = {}
    for path in matches("/etc/sysctl.d/*.conf"):
        for name in re.findall(
            r"^\s*-?([\w./-]+)\s*=", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        ):
            live = Path("/proc/sys", name.replace(".", "/") if "/" not in name else name)
            try:
                found[f"live {name}"] = live.read_text(encoding="utf-8").strip()
            except OSError:
                found[f"live {name}"] = "unreadable"
    return found


def swaps() -> str:
    """Areas and their sizes; how much of them is used does not count."""
    lines = [line.split() for line in Path("/proc/swaps").read_text(encoding="utf-8").splitlines()[1:]]
    return "; ".join(sorted(f"{line[0]} {line[2]}" for line in lines))


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return f"{done.returncode} {done.stdout.strip()}"


def units(patterns: list[str]) -> dict[str, str]:
    """Of those that are enabled or run: enabled as what, and running or not. What a timer runs is up at
    times, and that does not count.
    """
    if not patterns or not shutil.which("systemctl"):
        return {}
    wanted = "--property=Id,Type,RemainAfterExit,ActiveState,UnitFileState,NeedDaemonReload"
    found = {}
    for block in run(["systemctl", "show", wanted, "--", *patterns]).split("\n\n"):
        unit = dict(re.findall(r"(\w+)=(.*)", block))
        if unit.get("Type") == "oneshot" and unit.get("RemainAfterExit") == "no":
            unit["ActiveState"] = "-"
        if unit.get("ActiveState") not in (None, "-", "inactive") or unit.get("UnitFileState") == "enabled":
            found[f"unit {unit['Id']}"] = " ".join(
                unit.get(name, "") for name in ("ActiveState", "UnitFileState", "NeedDaemonReload")
            )
    return found


def tables(start: str) -> dict[str, str]:
    if not start or not shutil.which("nft"):
        return {}
    named = re.findall(
        rf"^table (\w+) ({re.escape(start)}\S*)", run(["nft", "list", "tables"])[2:], re.MULTILINE
    )
    return {
        f"rules {name}": digest(run(["nft", "--stateless", "list", "table", family, name]).encode())
        for family, name in named
    }


def status(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:  # noqa: S310 - the role's own, http
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return f"none: {getattr(error, 'reason', error)}"


def observed(given: dict) -> dict[str, str]:
    ignored = given["ignored"]
    seen = [
        path
        for pattern in (*given["outlines"], *PACKAGES)
        for path in matches(pattern)
        if counts(path.name, ignored)
    ]
    state = {str(path): outline(path) for path in seen}
    state |= {str(path): whole(path) for pattern in given["contents"] for path in below(pattern, ignored)}
    state |= {str(path): sealed(path) for pattern in given["sealed"] for path in matches(pattern)}
    state |= {str(path): digest(path.read_bytes()) for pattern in MACHINE for path in matches(pattern)}
    state |= sysctls() | units(given["units"]) | tables(given["tables"]) | {"swap": swaps()}
    return state | {url: status(url) for url in given["answers"]}


def recorded(path: Path) -> dict:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if isinstance(kept.get("state"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def main() -> None:
    texts = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["compared", "recorded"], "required": True},
            "record": {"type": "path", "required": True},
            "intent": {"type": "dict", "default": {}},
            "contents": texts,
            "outlines": texts,
            "sealed": texts,
            "ignored": texts,
            "units": texts,
            "tables": {"type": "str", "default": ""},
            "answers": texts,
        },
        supports_check_mode=True,
    )
    given = module.params
    path = Path(given["record"])
    kept = recorded(path)
    try:
        now = {**{name: str(value) for name, value in given["intent"].items()}, **observed(given)}
    except OSError as error:
        module.fail_json(msg=str(error))
    then = kept.get("state", {})
    differ = (
        sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)) if then else []
    )
    said = {
        "unchanged": bool(then) and not differ,
        "differences": differ[:SHOWN],
        "count": len(differ),
        "recorded_utc": kept.get("recorded_utc", ""),
    }
    if given["state"] == "compared" or said["unchanged"]:
        module.exit_json(changed=False, **said)
    if not module.check_mode:
        new = {"recorded_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "state": now}
        # digests of secrets too: for the owner alone
        descriptor, beside = tempfile.mkstemp(dir=module.tmpdir)
        with os.fdopen(descriptor, "w") as file:
            json.dump(new, file, indent=0, sort_keys=True)
        module.atomic_move(beside, str(path))
        path.chmod(0o600)
        said |= {"unchanged": True, "differences": [], "count": 0, "recorded_utc": new["recorded_utc"]}
    module.exit_json(changed=False, **said)


if __name__ == "__main__":
    main()
