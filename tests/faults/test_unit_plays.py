"""The plays on a systemd host with the real engine: a network that is cut, upgrades, rollback, new keys,
reset. One after another; the last one leaves no service. They need the host of Molecule's scenario `service`
(LOWMEM_SERVICE_HOST), and Molecule's inventory of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .hold import Hold
from .ledger import Entry, streaming
from .node import ROOT, UNIT, WATCHDOG, Node, needs_host
from .plays import play, start

pytestmark = needs_host
SMALLER = {"lowmem_overrides": {"max_num_seqs": 4}}
ALICE = "sk-alice-0123456789abcdef"


@contextmanager
def cut(node: Node) -> Iterator[None]:
    """Nothing that the controller sends to the host's sshd arrives; the service's clients go on."""
    rule = ["INPUT", "--protocol", "tcp", "--dport", "22", "--jump", "DROP"]
    inside = ["ip", "netns", "exec", node.network_namespace(), "iptables", "--wait"]
    subprocess.run([*inside, "--insert", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "--delete", *rule], check=True)


@pytest.fixture(scope="module")
def first(systemd_host: Node) -> str:
    """The release that serves when the plays begin."""
    systemd_host.sh(f"systemctl reset-failed {UNIT}; systemctl start --no-block {UNIT} {WATCHDOG}")
    systemd_host.until_active()
    return systemd_host.current()


def serves(node: Node) -> str:
    """The release that is both the current one and the one that runs, and answers."""
    assert node.client.complete(4).end == "answer"
    running = node.running()
    assert node.current() == running
    return running


@pytest.mark.fault("unit-network-cut")
def test_a_network_that_is_cut_in_an_upgrade(node: Node, first: str, tmp_path: Path, fault: Any) -> None:
    """The play is held before the task, so nothing of it has reached the host when the network is cut."""
    pid = node.show("MainPID")
    hold = Hold("vllm_service : Write the key file", tmp_path)
    with streaming(node.client) as ledger:
        with start("upgrade", hold=hold, **SMALLER) as process, ThreadPoolExecutor(1) as pool:
            all_said = pool.submit(process.communicate)  # a full pipe would hold the play too
            hold.wait(process)
            began = time.monotonic()
            with cut(node):
                hold.release()
                said = all_said.result()[0]
            took_s = time.monotonic() - began
        assert (serves(node), node.show("MainPID")) == (first, pid)
    assert "UNREACHABLE!" in said, said
    assert process.returncode == 4
    # the connection's own limit is a minute; for ever is what it took without
    assert took_s < 400
    assert ledger.ends == {"answer": len(ledger.entries)}
    fault.saw(
        f"the play ended by itself {took_s:.0f} s after the cut, UNREACHABLE; streams one after another"
        f" meanwhile: {ledger}"
    )

    # the same play once more, with the network there
    with streaming(node.client) as ledger:
        said = play("upgrade", **SMALLER)
    assert said.endswith("rc=0"), said
    ledger.nothing_lost()
    new = serves(node)
    assert new != first
    assert node.argument("--max-num-seqs") == "4"
    assert json.loads(node.sh(f"cat {ROOT}/current/receipt.json"))["verdict"] == "passed"
    assert node.show("ActiveState") == "active"
    fault.saw(f"the next run upgraded it, streams meanwhile: {ledger}")
    fault.recovery_s = ledger.away_s()


@pytest.mark.fault("unit-bad-upgrade")
def test_a_bad_upgrade_returns_by_itself(node: Node, first: str, fault: Any) -> None:
    served = serves(node)
    bad = {"vllm_service_start_limit": 1, "vllm_service_extra_environment": {"VLLM_LOGGING_LEVEL": "NOSUCH"}}
    with streaming(node.client) as ledger:
        said = play("upgrade", **SMALLER, **bad)
    assert said.endswith("rc=2"), said
    assert re.search(
        rf"vllm-0\.32\.0-demo_cpu-\w+ does not serve: vLLM does not answer .* Back by itself: {served} serves"
        r" again\.",
        said,
    ), said
    ledger.nothing_lost()
    assert serves(node) == served
    assert (node.show("ActiveState"), node.show("ActiveState", WATCHDOG)) == ("active", "active")
    fault.saw(
        f"the play went back by itself and failed in one line; streams one after another meanwhile: {ledger}"
    )
    fault.recovery_s = ledger.away_s()


def test_rollback(node: Node, first: str) -> None:
    tried = serves(node)
    assert tried != first
    said = play("rollback", rollback_to="no-such")
    assert "rollback_to is no-such: service-one has no such release; it has " in said, said
    with streaming(node.client) as ledger:
        said = play("rollback")
    assert said.endswith("rc=0"), said
    assert f"{first} serves on service-one, in place of {tried}" in said
    ledger.nothing_lost()
    assert (serves(node), node.argument("--max-num-seqs")) == (first, "8")
    assert node.show("ActiveState") == "active"


def test_keys_come_and_go_under_streams(node: Node, first: str, tmp_path: Path) -> None:
    pid, old = node.show("MainPID"), node.client.key
    given = tmp_path / "keys.json"

    def rotate(keys: dict[str, str]) -> None:
        given.write_text(json.dumps({"vllm_service_api_keys": keys}))
        said = play("rotate_keys", "--diff", "-e", f"@{given}")
        assert said.endswith("rc=0"), said
        assert old not in said
        assert ALICE not in said

    def until_refused(_: int) -> list[Entry]:
        ends = []
        while not ends or ends[-1].end == "answer":
            ends.append(node.client.complete(40, stream=True))
        return ends

    alice = replace(node.client, key=ALICE)
    with ThreadPoolExecutor(3) as pool:
        streams = pool.map(until_refused, range(3))
        rotate({"default": old, "alice": ALICE})
        assert (node.client.complete(2).end, alice.complete(2).end) == ("answer", "answer")
        rotate({"alice": ALICE})
        ends = list(streams)
    # each was answered to its end until its key was taken away; the next request was refused
    assert [entries[-1].status for entries in ends] == [401, 401, 401]
    assert (node.client.complete(2).status, alice.complete(2).end) == (401, "answer")
    assert (node.show("MainPID"), node.show("NRestarts")) == (pid, "0")
    assert node.sh(f"stat --format='%a %U' {ROOT}/etc/vllm.env").strip() == "600 vllm"
    everywhere = (
        f"cat {ROOT}/log/*.log /proc/[0-9]*/cmdline {ROOT}/current/receipt.json; journalctl --no-pager"
    )
    # as a pattern that does not match itself: this command is a process and in the journal too
    patterns = " ".join(f"-e '{key[:-1]}[{key[-1]}]'" for key in (old, ALICE))
    assert node.sh(f"({everywhere}) 2>/dev/null | grep --count --text {patterns} || true").strip() == "0"


def test_reset(node: Node, first: str) -> None:
    said = play("reset")
    assert "give -e lowmem_reset=true if that is meant" in said
    assert (said.endswith("rc=2"), node.show("ActiveState")) == (True, "active")
    for changed in (True, False):
        said = play("reset", lowmem_reset=True)
        assert said.endswith("rc=0"), said
        assert ("changed=0" in said) is not changed, said
    assert node.sh(f"ls -d {ROOT} 2>/dev/null || true") == ""
    assert node.sh("cd /etc/systemd/system; ls -d vllm*") .split() == [
        "vllm-watchdog@second.service", "vllm@second.service", "vllm@second.service.wants",
    ]  # fmt: skip
    assert node.sh("ls /etc/logrotate.d | grep vllm") == "vllm-second\n"
    assert ":8000 " not in node.sh("ss --no-header --listening --tcp --numeric")
    # what the other instance of this host needs is all there
    assert node.sh("id --user --name vllm; ls /opt/vllm-store/roots") == "vllm\nservice-one:opt-vllm-second\n"
    node.sh(
        "runuser --user vllm -- /opt/vllm-second/current/env/bin/lowmem start-check --plan"
        " /opt/vllm-second/current/plan.json"
    )
