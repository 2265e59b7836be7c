"""Faults under systemd, with the real engine in the unit's sandbox. They need the host of Molecule's scenario `service`, which runs this
file and names its host in LOWMEM_SERVICE_HOST (what `testhosts list` knows of it, as JSON)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from .ledger import Client, Ledger, under_load

HOST = os.environ.get("LOWMEM_SERVICE_HOST", "")
pytestmark = pytest.mark.skipif(not HOST, reason="runs on a systemd host: make molecule SCENARIO=service")

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

    def family(self) -> dict[str, int]:
        """Pids of server, engine and worker."""
        pids = self.sh(f"cat /sys/fs/cgroup$(systemctl show {UNIT} --property=ControlGroup --value)/cgroup.procs").split()
        named = {self.sh(f"cat /proc/{pid}/comm", check=False).strip(): int(pid) for pid in pids}
        return {"server": int(self.show("MainPID")), "engine": named["VLLM::EngineCor"], "worker": named["VLLM::Worker"]}

    def alive(self, pids: dict[str, int]) -> list[str]:
        return [who for who, pid in pids.items() if run_there(self.record, f"kill -0 {pid}").returncode == 0]

    def until(self, what: Callable[[], bool], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.sh(f"systemctl status {UNIT} --no-pager; tail -n 40 {ROOT}/log/vllm.log", check=False)
            time.sleep(0.5)

    def until_active(self) -> None:
        self.until(lambda: self.show("ActiveState") == "active")

    def log_size(self) -> int:
        return int(self.sh(f"stat --format=%s {ROOT}/log/vllm.log"))

    def log_since(self, size: int) -> str:
        return self.sh(f"tail --bytes=+{size + 1} {ROOT}/log/vllm.log")


def run_there(record: dict[str, Any], script: str) -> subprocess.CompletedProcess[str]:
    options = ["BatchMode=yes", "ConnectTimeout=5", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    words = ["ssh", "-i", record["identity_file"], *(word for option in options for word in ("-o", option))]
    words += [f"{record['user']}@{record['address']}", f"sudo bash -c {shlex.quote(script)}"]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def found() -> Node:
    record = json.loads(HOST)
    key = run_there(record, f"sed -n s/^VLLM_API_KEY=//p {ROOT}/etc/vllm.env").stdout.strip()
    # the other instance would only take the machine's time
    run_there(record, "systemctl stop vllm@second.service vllm-watchdog@second.service")
    return Node(record, Client(f"http://{record['address']}:8000", key, "SmolLM2-135M-Instruct"))


@pytest.fixture
def node(found: Node) -> Node:
    """Answering, and with all its starts before it."""
    found.sh(f"systemctl reset-failed {UNIT}; systemctl start --no-block {UNIT} {WATCHDOG}")
    found.until_active()
    return found


@pytest.fixture
def dropin(node: Node) -> Iterator[Callable[[str, str], None]]:
    """dropin(unit, text): settings of a unit for one test; the unit is restarted with them, and without them afterwards."""
    units: list[str] = []

    def put(unit: str, text: str) -> None:
        units.append(unit)
        folder = f"/run/systemd/system/{unit}.d"
        node.sh(f"mkdir -p {folder}; printf %s {shlex.quote(text)} >{folder}/test.conf; systemctl daemon-reload; systemctl restart {unit}")

    yield put
    for unit in units:
        node.sh(f"rm -r /run/systemd/system/{unit}.d; systemctl daemon-reload; systemctl restart --no-block {unit}")


def said(ledger: Ledger) -> str:
    kinds = sorted({f"{e.status} {e.said}" if e.status else e.said for e in ledger.entries if e.end == "error"})
    return "said: " + "; ".join(kind[:110] for kind in kinds)


@pytest.mark.parametrize("who", [pytest.param(who, marks=pytest.mark.fault(f"unit-{who}-killed")) for who in ("engine", "server")])
def test_a_killed_process(who: str, node: Node, fault: Any) -> None:
    before = node.family()
    starts = int(node.show("NRestarts"))
    with under_load(node.client) as ledger:
        began = time.monotonic()
        node.sh(f"kill -KILL {before[who]}")
    ledger.nothing_lost()
    assert ledger.ends == {"error": 8}
    fault.recovery_s = node.client.recovery_s(began)
    node.until_active()
    assert node.alive(before) == []
    assert int(node.show("NRestarts")) == starts + 1
    fault.saw(str(ledger))
    fault.saw(said(ledger))


@pytest.mark.fault("unit-engine-stopped")
def test_a_hung_engine(node: Node, dropin: Callable[[str, str], None], fault: Any) -> None:
    """The watchdog's own unit, in its sandbox, with a limit short enough for a test."""
    started = node.show("ExecStart", WATCHDOG).split("argv[]=")[1].split(" ;")[0]
    quick = f"[Service]\nExecStart=\nExecStart={started.rsplit(' ', 1)[0]} 20 --every-s 1\n"
    before = node.family()
    dropin(WATCHDOG, quick)
    node.until(lambda: "serving" in node.sh(f"journalctl --unit={WATCHDOG} --invocation=0 --output=cat --no-pager 2>/dev/null || "
                                            f"journalctl --unit={WATCHDOG} --lines=3 --output=cat --no-pager"))  # fmt: skip
    with under_load(node.client) as ledger:
        began = time.monotonic()
        node.sh(f"kill -STOP {before['engine']}")
        time.sleep(3)
        # why a watchdog is needed at all
        assert node.client.get("/health")[0] == 200
    ledger.nothing_lost()
    assert ledger.ends == {"error": 8}
    fault.recovery_s = node.client.recovery_s(began)
    node.until_active()
    assert "no sign of the engine for 20 s: ended " in node.sh(f"journalctl --unit={WATCHDOG} --lines=20 --output=cat --no-pager")
    assert node.alive(before) == []
    fault.saw(f"/health said 200; {ledger}")
    fault.saw(said(ledger))


@pytest.mark.fault("unit-stopped")
def test_a_stop_drains(node: Node, fault: Any) -> None:
    before = node.family()
    size = node.log_size()
    with under_load(node.client, tokens=100) as ledger:
        began = time.monotonic()
        node.sh(f"systemctl stop --no-block {UNIT}")
        node.until(lambda: "start mode=drain" in node.log_since(size))
        late = node.client.complete(4, timeout_s=60)
    stopped_s = time.monotonic() - began
    assert ledger.ends == {"answer": 8}
    assert late.end == "error"
    node.until(lambda: node.show("ActiveState") == "inactive")
    assert node.alive(before) == []
    assert (node.show("Result"), node.show("NRestarts")) == ("success", "0")
    fault.saw(f"{ledger}, within {stopped_s:.0f} s; one that came after the stop: {late.status or ''} {late.said[:80]}".replace("  ", " "))


@pytest.mark.fault("unit-port-taken")
def test_a_stranger_on_the_port(node: Node, fault: Any) -> None:
    """It is refused in one line, and comes up by itself once the port is free."""
    size = node.log_size()
    node.sh(f"systemctl stop {UNIT}")
    listener = "import socket,time; s=socket.create_server(('0.0.0.0', 8000)); time.sleep(600)"
    node.sh(f"systemd-run --unit=stranger python3 -c {shlex.quote(listener)}")
    try:
        node.sh(f"systemctl start --no-block {UNIT}")
        node.until(lambda: "is taken" in node.log_since(size))
        [line] = [line for line in node.log_since(size).splitlines() if line.startswith("start-check: ")]
        assert line == (
            "start-check: port 8000 of 0.0.0.0 is taken: `ss -ltnp sport = :8000` says by whom; stop it, or choose another lowmem_port"
        )
    finally:
        node.sh("systemctl stop stranger")
    began = time.monotonic()
    node.until_active()
    fault.recovery_s = time.monotonic() - began
    fault.saw(f"the log says: {line.removeprefix('start-check: ')}")
    fault.saw("with the port free it started by itself")


@pytest.mark.fault("unit-start-limit")
def test_a_service_that_cannot_start_ends_in_failed(node: Node, fault: Any) -> None:
    shard = node.sh(f"readlink -f {ROOT}/current/model").strip() + "/model.safetensors"
    size = node.log_size()
    node.sh(f"systemctl stop {UNIT}; cp {shard} /root/whole; truncate --size=-4096 {shard}; systemctl reset-failed {UNIT}")
    try:
        node.sh(f"systemctl start {UNIT}", check=False)
        node.until(lambda: node.show("ActiveState") == "failed")
        refusals = [line for line in node.log_since(size).splitlines() if line.startswith("start-check: ")]
        assert len(refusals) == 3
        assert "model.safetensors: truncated" in refusals[0]
        time.sleep(15)
        assert node.show("ActiveState") == "failed"
        fault.saw(f"failed after {len(refusals)} starts, and stayed so; the log says: {refusals[0].split('/')[-1]}")
    finally:
        node.sh(f"cp /root/whole {shard}; systemctl reset-failed {UNIT}")
    began = time.monotonic()
    node.sh(f"systemctl start --no-block {UNIT}")
    node.until_active()
    fault.recovery_s = time.monotonic() - began
