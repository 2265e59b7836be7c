"""A disk that is full at each stage of a play, seen on a small mount.

The test runs what the roles run there: the build of an environment, module `release`, and Ansible's `copy`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "roles/python_env/files/build_env.py"
COPY = ("-m", "ansible.modules.copy")
RELEASE = (str(REPOSITORY / "plugins/modules/release.py"),)
FULL = "No space left on device"
OLD, NEW = "old\n", "new\n" * 2**18
"""What a file has before, and what the play would write: a MiB."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def fill(root: Path, leaving_bytes: int = 0) -> None:
    with (root / "filler").open("wb", 0) as filler, contextlib.suppress(OSError):
        while os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > leaving_bytes:
            filler.write(bytes(2**16))


def module(program: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    """Run a module as Ansible does; its answer, `failed` included."""
    given = json.dumps({"ANSIBLE_MODULE_ARGS": {"_ansible_remote_tmp": "/tmp", **arguments}})
    done = subprocess.run(
        [sys.executable, *program], input=given, capture_output=True, text=True, check=False
    )
    if not done.stdout:  # Ansible shows the exception of a module of its own, and what caused it
        return {"failed": True, "msg": next(line for line in done.stderr.splitlines() if "Errno" in line)}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def deploy(root: Path, text: str) -> list[str]:
    """Write the key file, a release and its receipt; what the stages that failed said."""
    given = root.parent / "given"

    def copy(place: str) -> dict[str, Any]:
        given.write_text(text)
        return module(COPY, src=str(given), dest=str(root / place), mode="0600", remote_src=False)

    keys = copy("etc/vllm.env")
    staged = module(RELEASE, root=str(root), state="staged", name="r", files={"plan.json": text})
    if not staged.get("failed"):
        staged = module(RELEASE, root=str(root), state="current", id=staged["id"])
    receipt = copy("current/receipt.json")
    return [answer["msg"] for answer in (keys, staged, receipt) if answer.get("failed")]


def served(root: Path) -> list[str]:
    return [
        (root / name).read_text() for name in ("etc/vllm.env", "current/plan.json", "current/receipt.json")
    ]


def build(root: Path) -> subprocess.CompletedProcess[str]:
    (root.parent / "lock.txt").touch()
    stamp = {"digest": "d", "python": sys.executable, "wheels": []}
    spec = {"stamp": stamp, "wheels": [], "lock": str(root.parent / "lock.txt"), "torch_lock": ""}
    return subprocess.run(
        [sys.executable, BUILD, root / "envs/tool", json.dumps(spec)], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "lowmem/checkpoint")},
    )  # fmt: skip


@pytest.mark.fault("disk-full-stages")
def test_a_full_disk_at_each_stage_of_a_play(disk: Path, fault: Any) -> None:
    (disk / "lowmem_root").touch()
    (disk / "etc").mkdir()
    assert deploy(disk, OLD) == []
    old = (disk / "current").readlink()

    fill(disk, leaving_bytes=2**21)
    done = build(disk)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith(f"cannot build {disk}/envs/tool: step '")
    # half of one is gone, so that who serves has the room
    assert [path.name for path in (disk / "envs").iterdir()] == [".tool.lock"]
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 2**20

    fill(disk)
    said = deploy(disk, NEW)
    assert [FULL in line and str(disk) in line for line in said] == [True, True, True], said
    assert (served(disk), (disk / "current").readlink()) == ([OLD, OLD, OLD], old)
    assert [path.name for path in (disk / "releases").iterdir()] == [old.name]

    (disk / "filler").unlink()
    assert build(disk).returncode == 0
    assert (disk / "envs/tool/.complete").is_file()
    assert deploy(disk, NEW) == []
    assert served(disk) == [NEW, NEW, NEW]
    fault.saw(
        "environment, keys, release and receipt each failed in one line, and what served was whole; with room"
        " the same ended well"
    )
