"""What meets a deployment before it serves: a play that is killed, a full disk, a damaged checkpoint, a port
that is taken.

All on a second deployment beside the demo's, with a copy of its checkpoint; `log` lies on a tmpfs of 4 MiB.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Service
from .ledger import Ledger, under_load

pytestmark = pytest.mark.engine
needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")


@pytest.mark.fault("playbook-killed")
def test_a_killed_play_is_run_again(second: Service, killed_play: dict[str, str], fault: Any) -> None:
    # plan.json and the others are links that the switch makes; the play may have come so far
    assert sorted(killed_play)[-1] == "vllm.env"
    assert f"VLLM_API_KEY={second.client.key}\n" in killed_play["vllm.env"]
    assert second.client.complete(4).end == "answer"
    assert [path.name for path in (second.root / "etc").iterdir() if "tmp" in path.name] == []
    fault.saw("the second play went on, kept the key and ended with an answer")


@needs_mount
@pytest.mark.fault("disk-full-log")
def test_a_full_log_disk_stops_no_request(second: Service, fault: Any) -> None:
    before = second.family()
    ballast = second.root / "log/ballast"
    full = subprocess.run(
        ["dd", "if=/dev/zero", f"of={ballast}", "bs=512"], capture_output=True, text=True, check=False
    )
    assert "No space left on device" in full.stderr
    assert shutil.disk_usage(second.root / "log").free == 0
    with under_load(second.client, tokens=40) as ledger:
        pass
    assert ledger.ends == {"answer": 8}
    fault.saw(str(ledger))
    ballast.unlink()
    size = len(second.log())
    assert second.client.complete(2).end == "answer"
    deadline = time.monotonic() + 20
    while len(second.log()) <= size:
        assert time.monotonic() < deadline, "the log does not go on"
        time.sleep(0.5)
    assert second.family() == before
    fault.saw("the log went on")


@pytest.fixture
def damaged(second: Service) -> Iterator[Callable[[str, Callable[[bytes], bytes]], str]]:
    """damaged(file, change): starts the server with a changed file of its checkpoint ("": its manifest) until
    it is given up; what the log said. The file comes back after.
    """
    kept: dict[Path, tuple[bytes, os.stat_result]] = {}

    def start(name: str, change: Callable[[bytes], bytes]) -> str:
        checkpoint = (second.root / "current/model").resolve()
        path = checkpoint / name if name else checkpoint.with_name(f"{checkpoint.name}.manifest.json")
        kept[path] = (path.read_bytes(), path.stat())
        second.control("stop", "vllm")
        before = len(second.log())
        path.write_bytes(change(path.read_bytes()))
        os.utime(path, ns=(kept[path][1].st_atime_ns, kept[path][1].st_mtime_ns))
        second.control("start", "vllm")
        deadline = time.monotonic() + 120
        while "FATAL" not in second.control("status", "vllm"):
            assert time.monotonic() < deadline, second.log()[-3000:]
            time.sleep(1)
        return second.log()[before:]

    yield start
    for path, (content, times) in kept.items():
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


SHARD = "model.safetensors"
MANIFEST = ""


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def refusals(log: str, begin: str) -> set[str]:
    """What the start check said of files of the checkpoint."""
    return set(re.findall(rf"^start-check: \S+: ({begin}.+?); it is not served: ", log, re.MULTILINE))


@pytest.mark.fault("shard-corrupted")
def test_a_corrupted_shard_is_not_served(damaged: Callable[..., str], fault: Any) -> None:
    said = damaged(SHARD, flipped)
    [line] = refusals(said, r"model\.safetensors: altered, SHA-256 ")
    fault.saw(f"given up; the log says: {line}")


@pytest.mark.fault("manifest-altered")
def test_an_altered_manifest_is_not_served(damaged: Callable[..., str], fault: Any) -> None:
    said = damaged(
        MANIFEST,
        lambda text: re.sub(rb'(?<="sha256": ")(.)', lambda m: b"0" if m[1] != b"0" else b"1", text, count=1),
    )
    [line] = refusals(said, r"\S+: altered, SHA-256 ")
    fault.saw(f"given up; the log says: {line}")


@pytest.mark.fault("shard-truncated")
def test_a_truncated_shard_is_not_served(damaged: Callable[..., str], second: Service, fault: Any) -> None:
    said = damaged(SHARD, lambda content: content[:-4096])
    [line] = refusals(said, r"model\.safetensors: truncated, ")
    fault.saw(f"given up; the log says: {line}")


def test_the_right_files_are_served_again(second: Service) -> None:
    second.control("start", "vllm")
    second.client.recovery_s(time.monotonic())


@pytest.mark.fault("port-taken")
def test_a_taken_port_is_refused(playbook: Any, clean_root: Path, fault: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        done = playbook("site.yml", variables={"lowmem_root": str(clean_root), "lowmem_port": port})
    assert done.rc == 2
    assert done.changed == 0
    said = re.search(
        rf"lowmem_port is {port}, and .* \(pid {os.getpid()}\) listens there already: stop it, or choose"
        r" another",
        done.flat,
    )
    assert said, done.text
    fault.saw("refused in preflight with the stranger's number; nothing changed")


def test_a_ledger_of_nothing_lost_is_one_without_requests() -> None:
    assert str(Ledger()) == "0 requests: 0 answered, 0 ended with an error, 0 lost"
