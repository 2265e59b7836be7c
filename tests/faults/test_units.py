"""Faults under systemd, with the real engine in the unit's sandbox. They need the host of Molecule's scenario
`service`, which runs this file (LOWMEM_SERVICE_HOST).
"""

from __future__ import annotations

import json
import shlex
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from .ledger import Client, Ledger, under_load
from .node import ROOT, UNIT, WATCHDOG, Node, needs_host, run_there, said

pytestmark = needs_host


@pytest.fixture
def dropin(node: Node) -> Iterator[Callable[[str, str], None]]:
    """dropin(unit, text): settings of a unit for one test; the unit is restarted with them, and without them
    afterwards.
    """
    units: list[str] = []

    def put(unit: str, text: str) -> None:
        units.append(unit)
        folder = f"/run/systemd/system/{unit}.d"
        node.sh(
            f"mkdir -p {folder}; printf %s {shlex.quote(text)} >{folder}/test.conf; systemctl daemon-reload;"
            f" systemctl restart {unit}"
        )

    yield put
    for unit in units:
        node.sh(
            f"rm -r /run/systemd/system/{unit}.d; systemctl daemon-reload; systemctl restart --no-block"
            f" {unit}"
        )


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(who, marks=pytest.mark.fault(f"unit-{who}-killed"))
        for who in ("engine", "server", "worker")
    ],
)
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
    journal = f"journalctl --unit={WATCHDOG} --output=cat --no-pager"
    node.until(lambda: "serving" in node.sh(f"{journal} --invocation=0 2>/dev/null || {journal} --lines=3"))
    with under_load(node.client) as ledger:
        began = time.monotonic()
        node.sh(f"kill -STOP {before['engine']}")
        node.until(lambda: node.sh(f"ps -o state= -p {before['engine']}").strip() == "T")
        # why a watchdog is needed at all
        assert node.client.get("/health")[0] == 200
    ledger.nothing_lost()
    assert ledger.ends == {"error": 8}
    fault.recovery_s = node.client.recovery_s(began)
    node.until_active()
    assert "no sign of the engine for 20 s: ended " in node.sh(
        f"journalctl --unit={WATCHDOG} --lines=20 --output=cat --no-pager"
    )
    assert node.alive(before) == []
    fault.saw(f"/health said 200; {ledger}")
    fault.saw(said(ledger))


@pytest.mark.fault("unit-out-of-memory")
def test_a_worker_without_memory(node: Node, fault: Any) -> None:
    """RLIMIT_AS makes the allocation fail in the process itself; what the kernel's killer does is
    unit-worker-killed, and MemoryMax is scenario `vm`'s.
    """
    before = node.family()
    began = time.monotonic()
    size_bytes = int(node.sh(f"grep VmSize: /proc/{before['worker']}/status").split()[1]) * 1024
    # as its own user: a container's root may not
    node.sh(f"runuser --user vllm -- prlimit --pid {before['worker']} --as={size_bytes}:")
    ledger = Ledger()
    with ThreadPoolExecutor(8) as pool:
        prompts = [[11 + n] * 1900 for n in range(8)]
        ledger.entries = list(pool.map(lambda n: node.client.complete(32, prompts[n], n % 2 == 0), range(8)))
    ledger.nothing_lost()
    fault.saw(str(ledger))
    run_there(node.record, f"runuser --user vllm -- prlimit --pid {before['worker']} --as=unlimited:")
    fault.recovery_s = node.client.recovery_s(began)
    node.until_active()
    same = node.family() == before
    assert same or node.alive(before) == []
    fault.saw("the same worker goes on" if same else "the unit was started again")
    if "error" in ledger.ends:
        fault.saw(said(ledger))


def created(client: Client) -> float:
    """The time that the server itself gives to an answer, in seconds since 1970."""
    body = json.dumps({"model": client.model, "prompt": "Once", "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {client.key}"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{client.url}/v1/completions", body, headers), timeout=300
    ) as answer:
        return float(json.load(answer)["created"])


DAY_S = 86_400
CLOCK = f"{ROOT}/cache/clock"
# molecule/service/stub/clock.c: the time of day that the service's programs see, and nobody else
STUB_CLOCK = f"[Service]\nEnvironment=LD_PRELOAD=/opt/stub-clock/clock.so STUB_CLOCK={CLOCK}\n"


@pytest.mark.fault("unit-clock-jump")
def test_the_clock_jumps(node: Node, dropin: Callable[[str, str], None], fault: Any) -> None:
    """A day forward, then two back, with requests under way."""

    def shift(seconds: int) -> None:
        write = f"import struct; f = open('{CLOCK}', 'rb+'); f.write(struct.pack('q', {seconds}))"
        node.sh(f"python3 -c {shlex.quote(write)}")

    node.sh(f"head --bytes=8 /dev/zero >{CLOCK}; chmod 644 {CLOCK}")
    dropin(UNIT, STUB_CLOCK)
    dropin(WATCHDOG, STUB_CLOCK)
    node.until_active()
    before, starts = node.family(), node.show("NRestarts")
    assert abs(created(node.client) - time.time()) < 600
    with under_load(node.client, clients=7, tokens=300) as ledger:
        for seconds in (DAY_S, -DAY_S):
            shift(seconds)
            # it answers, and the time that it gives to the answer is the wrong one
            assert abs(created(node.client) - time.time() - seconds) < 600
        assert not all(future.done() for future in ledger.futures)
    assert ledger.ends == {"answer": 7}
    assert (node.family(), node.show("NRestarts")) == (before, starts)
    assert "ended" not in node.sh(f"journalctl --unit={WATCHDOG} --lines=20 --output=cat --no-pager")
    fault.saw(f"{ledger}; the same processes go on, and the watchdog ended nothing")


@pytest.mark.fault("unit-reboot")
def test_the_host_reboots(node: Node, fault: Any) -> None:
    booted = node.sh(
        "cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestampMonotonic"
    )
    with under_load(node.client, tokens=100) as ledger:
        began = time.monotonic()
        node.sh("systemctl --no-block reboot", check=False)
    ledger.nothing_lost()
    node.until(lambda: run_there(node.record, "true").returncode == 0)
    run_there(node.record, "systemctl stop vllm@second.service")
    fault.recovery_s = node.client.recovery_s(began)
    assert (
        node.sh("cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestampMonotonic")
        != booted
    )
    node.until_active()
    fault.saw(str(ledger))
    if "error" in ledger.ends:
        fault.saw(said(ledger))
    fault.saw("the unit came back by itself")


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
    fault.saw(
        f"{ledger}, within {stopped_s:.0f} s; one that came after the stop: {late.status or ''}"
        f" {late.said[:80]}".replace("  ", " ")
    )


@pytest.mark.fault("unit-start-limit")
def test_a_service_that_cannot_start_ends_in_failed(systemd_host: Node, fault: Any) -> None:
    node = systemd_host
    shard = node.sh(f"readlink -f {ROOT}/current/model").strip() + "/model.safetensors"
    size = node.log_size()
    node.sh(
        f"systemctl stop {UNIT}; cp {shard} /root/whole; truncate --size=-4096 {shard}; systemctl"
        f" reset-failed {UNIT}"
    )
    try:
        node.sh(f"systemctl start {UNIT}", check=False)
        node.until(lambda: node.show("ActiveState") == "failed")
        refusals = [line for line in node.log_since(size).splitlines() if line.startswith("start-check: ")]
        assert len(refusals) == 3
        assert "model.safetensors: truncated" in refusals[0]
        time.sleep(15)
        assert node.show("ActiveState") == "failed"
        fault.saw(
            f"failed after {len(refusals)} starts, and stayed so; the log says: {refusals[0].split('/')[-1]}"
        )
    finally:
        node.sh(f"cp /root/whole {shard}; systemctl reset-failed {UNIT}")
    began = time.monotonic()
    node.sh(f"systemctl start --no-block {UNIT}")
    node.until_active()
    fault.recovery_s = time.monotonic() - began


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
        assert (
            line
            == "start-check: port 8000 of 0.0.0.0 is taken: `ss -ltnp sport = :8000` says by whom; stop it,"
            " or choose another lowmem_port"
        )
    finally:
        node.sh("systemctl stop stranger")
    began = time.monotonic()
    node.until_active()
    fault.recovery_s = time.monotonic() - began
    fault.saw(f"the log says: {line.removeprefix('start-check: ')}")
    fault.saw("with the port free it started by itself")
