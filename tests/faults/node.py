"""A systemd host with the real engine as its unit: what Molecule's scenario `service` deploys, seen from the
controller.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from .ledger import Client, Ledger

# what `testhosts list` knows of the host, as JSON, and Molecule's inventory of it
HOST = os.environ.get("LOWMEM_SERVICE_HOST", "")
INVENTORY = os.environ.get("LOWMEM_SERVICE_INVENTORY", "")
needs_host = pytest.mark.skipif(not HOST, reason="runs on a systemd host: make molecule SCENARIO=service")

ROOT = "/opt/vllm-lowmem"
UNIT = "vllm@main.service"
WATCHDOG = "vllm-watchdog@main.service"


@dataclass(frozen=True)
class Node:
    """The host with instance `main`, and a client outside of it."""

    record: dict[str, Any]
    client: Client

    def sh(self, script: str, check: bool = True) -> str:
        """Standard output of a script that root runs there."""
        done = run_there(self.record, script)
        assert done.returncode == 0 or not check, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def show(self, name: str, unit: str = UNIT) -> str:
        return self.sh(f"systemctl show {unit} --property={name} --value").strip()

    def current(self) -> str:
        """The release that is served from the next start on."""
        return self.sh(f"readlink {ROOT}/current").strip().rsplit("/", 1)[-1]

    def running(self) -> str:
        """The release that the server runs from."""
        return self.sh(
            f"tr '\\0' '\\n' </proc/{self.show('MainPID')}/environ | sed -n s,^LOWMEM_RELEASE=.*/,,p"
        ).strip()

    def argument(self, flag: str) -> str:
        argv = self.sh(f"tr '\\0' '\\n' </proc/{self.show('MainPID')}/cmdline").splitlines()
        return argv[argv.index(flag) + 1]

    def network_namespace(self) -> str:
        """Its name on this machine (molecule/hosts/testhosts)."""
        return f"lm{self.record['network']}-{self.record['number']}"

    def family(self) -> dict[str, int]:
        """Pids of server, engine and worker."""
        pids = self.sh(
            f"cat /sys/fs/cgroup$(systemctl show {UNIT} --property=ControlGroup --value)/cgroup.procs"
        ).split()
        named = {self.sh(f"cat /proc/{pid}/comm", check=False).strip(): int(pid) for pid in pids}
        return {
            "server": int(self.show("MainPID")),
            "engine": named["VLLM::EngineCor"],
            "worker": named["VLLM::Worker"],
        }

    def alive(self, pids: dict[str, int]) -> list[str]:
        return [who for who, pid in pids.items() if run_there(self.record, f"kill -0 {pid}").returncode == 0]

    def until(self, what: Callable[[], bool], timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.sh(
                f"systemctl status {UNIT} --no-pager; tail -n 40 {ROOT}/log/vllm.log", check=False
            )
            time.sleep(0.5)

    def until_active(self) -> None:
        self.until(lambda: self.show("ActiveState") == "active")

    def log_size(self) -> int:
        return int(self.sh(f"stat --format=%s {ROOT}/log/vllm.log"))

    def log_since(self, size: int) -> str:
        return self.sh(f"tail --bytes=+{size + 1} {ROOT}/log/vllm.log")


def run_there(record: dict[str, Any], script: str) -> subprocess.CompletedProcess[str]:
    options = [
        "BatchMode=yes",
        "ConnectTimeout=5",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
    ]
    words = ["ssh", "-i", record["identity_file"], *(word for option in options for word in ("-o", option))]
    words += [f"{record['user']}@{record['address']}", f"sudo bash -c {shlex.quote(script)}"]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)


def connect() -> Node:
    record = json.loads(HOST)
    key = run_there(record, f"sed -n s/^VLLM_API_KEY=//p {ROOT}/etc/vllm.env").stdout.strip()
    return Node(record, Client(f"http://{record['address']}:8000", key, "SmolLM2-135M-Instruct"))


def said(ledger: Ledger) -> str:
    kinds = sorted(
        {f"{e.status} {e.said}" if e.status else e.said for e in ledger.entries if e.end == "error"}
    )
    return "said: " + "; ".join(kind[:110] for kind in kinds)
