"""One server over two hosts, with the real engine: who reaches what, either half killed or rebooted, a
network that is cut, and the plays. They need the hosts of Molecule's scenario `two_hosts`, which runs this
file (LOWMEM_TWO_HOSTS), and Molecule's inventory of them. One after another; the last one leaves no service.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from .ledger import Client, streaming, under_load
from .node import ROOT, UNIT, WATCHDOG, Node, run_there
from .plays import play

HOSTS = os.environ.get("LOWMEM_TWO_HOSTS", "")
pytestmark = pytest.mark.skipif(
    not HOSTS, reason="runs on three systemd hosts: make molecule SCENARIO=two_hosts"
)
KEY, MODEL = "sk-both-0123456789abcdefABCDEF", "SmolLM2-135M-Instruct"
NEW_KEY = "sk-next-0123456789abcdefABCDEF"
PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]

# the same checkpoint and settings in one process, without stages
ALONE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    engine = LLM(
        sys.argv[1], dtype="bfloat16", max_model_len=2048, max_num_seqs=4, kv_cache_memory_bytes=134217728,
        disable_log_stats=True,
    )
    settings = SamplingParams(temperature=0, max_tokens=24)
    prompts = json.loads(sys.argv[2])
    texts = [engine.generate([prompt], settings, use_tqdm=False)[0].outputs[0].text for prompt in prompts]
    print("TEXTS " + json.dumps(texts))
"""


@dataclass(frozen=True)
class Pair:
    one: Node
    two: Node
    stranger: Node

    @property
    def client(self) -> Client:
        return self.one.client

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.one, self.two

    def until_answering(self) -> None:
        for node in self.nodes:
            node.until_active()
        assert self.client.complete(4).end == "answer"

    def restarts(self) -> list[int]:
        return [int(node.show("NRestarts")) for node in self.nodes]

    def pids(self) -> list[str]:
        return [node.show("MainPID") for node in self.nodes]


def processes(node: Node) -> dict[str, int]:
    """By the names that vLLM gives them; the unit's own is `server`."""
    found = {"server": int(node.show("MainPID"))}
    for pid in node.sh(
        f"cat /sys/fs/cgroup$(systemctl show {UNIT} --property=ControlGroup --value)/cgroup.procs"
    ).split():
        name = node.sh(f"cat /proc/{pid}/comm", check=False).strip()
        if name.startswith(("VLLM::Engine", "VLLM::Worker")):
            found["engine" if name.startswith("VLLM::Engine") else "worker"] = int(pid)
    return found


@pytest.fixture(scope="module")
def hosts() -> Pair:
    records = {record["name"]: record for record in json.loads(HOSTS)}
    client = Client(f"http://{records['two-hosts-one']['address']}:8000", KEY, MODEL)
    return Pair(*(Node(records[f"two-hosts-{name}"], client) for name in ("one", "two", "stranger")))


@pytest.fixture
def pair(hosts: Pair) -> Pair:
    """Answering, and with all starts of both units before them."""
    for node in hosts.nodes:
        node.sh(f"systemctl reset-failed {UNIT}; systemctl start --no-block {UNIT} {WATCHDOG}")
    hosts.until_answering()
    return hosts


def text(client: Client, prompt: str) -> str:
    connection = client.connection(400)
    body = {"model": client.model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Content-Type": "application/json", "Authorization": f"Bearer {client.key}"},
    )
    return str(json.loads(connection.getresponse().read())["choices"][0]["text"])


def test_it_answers_as_one_host_does(pair: Pair) -> None:
    environment = (
        "HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TORCHDYNAMO_DISABLE=1 VLLM_USE_AOT_COMPILE=0"
        " VLLM_CPU_INT4_W4A8=0 VLLM_HOST_IP=127.0.0.1"
    )
    command = (
        f"{ROOT}/current/env/bin/python alone.py $(readlink -f {ROOT}/current/model) '{json.dumps(PROMPTS)}'"
    )
    script = f"cd /tmp; cat >alone.py <<'END'\n{ALONE}\nEND\n{environment} {command}"
    said = pair.one.sh(f"{script} 2>alone.log || {{ tail -n 30 alone.log >&2; false; }}")
    alone = json.loads(
        next(line for line in said.splitlines() if line.startswith("TEXTS ")).removeprefix("TEXTS ")
    )
    assert all(len(answer) > 20 for answer in alone)
    assert [text(pair.client, prompt) for prompt in PROMPTS] == alone


def test_each_host_runs_its_half(pair: Pair) -> None:
    assert [node.argument("--node-rank") for node in pair.nodes] == ["0", "1"]
    assert [node.argument("--master-addr") for node in pair.nodes] == [pair.one.record["address"]] * 2
    assert sorted(processes(pair.one)) == ["engine", "server", "worker"]
    assert sorted(processes(pair.two)) == ["server", "worker"]
    plans = [json.loads(node.sh(f"cat {ROOT}/current/plan.json")) for node in pair.nodes]
    assert [plan["deploy"]["rank"] for plan in plans] == [0, 1]
    assert plans[0]["nodes"] == plans[1]["nodes"]
    assert [plan["argv"] for plan in plans] == [node["argv"] for node in plans[0]["nodes"]]


def reached(node: Node, address: str, ports: list[int]) -> list[int]:
    """Those of the ports to which a TCP connection from that host is made within three seconds."""
    script = "".join(
        f"(timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>/dev/null && echo {port}) & "
        for port in ports
    )
    return sorted(int(line) for line in node.sh(f"{script} wait").split())


def listening(node: Node) -> list[int]:
    """Ports that the service's user listens on at more than loopback."""
    found = node.sh("ss --listening --tcp --numeric --no-header --processes")
    lines = [line.split() for line in found.splitlines() if re.search(r'"(vllm|VLLM)', line)]
    return sorted(
        {int(words[3].rsplit(":", 1)[1]) for words in lines if not words[3].startswith(("127.", "[::1]"))}
    )


def test_members_reach_what_the_engines_listen_on_and_nobody_else_does(pair: Pair) -> None:
    ports = [listening(node) for node in pair.nodes]
    assert {8000, 29501} <= set(ports[0])
    assert ports[1]
    assert {8000, 29501}.isdisjoint(ports[1])
    for node, other, seen in ((pair.one, pair.two, ports[0]), (pair.two, pair.one, ports[1])):
        assert reached(other, node.record["address"], seen) == seen
        # it is the rules, and not the network: the same host's sshd answers the stranger
        assert reached(pair.stranger, node.record["address"], [22, *seen]) == [22]
    pair.one.sh("systemctl stop vllm-peers@main.service")
    try:
        assert reached(pair.stranger, pair.one.record["address"], [29501]) == [29501]
    finally:
        pair.one.sh("systemctl start vllm-peers@main.service")
    assert reached(pair.stranger, pair.one.record["address"], [29501]) == []


@pytest.mark.fault("two-hosts-first-killed")
def test_the_first_hosts_engine_is_killed(pair: Pair, fault: Any) -> None:
    killed(pair, fault, lambda: pair.one.sh(f"kill -KILL {processes(pair.one)['engine']}"))


@pytest.mark.fault("two-hosts-other-killed")
def test_the_other_hosts_worker_is_killed(pair: Pair, fault: Any) -> None:
    killed(pair, fault, lambda: pair.two.sh(f"kill -KILL {processes(pair.two)['worker']}"))


@pytest.mark.fault("two-hosts-server-killed")
def test_the_first_hosts_server_is_killed(pair: Pair, fault: Any) -> None:
    killed(pair, fault, lambda: pair.one.sh(f"kill -KILL {processes(pair.one)['server']}"))


def restarted_once(pair: Pair, pids: list[str], restarts: list[int]) -> None:
    """Both halves answer and are new, each after exactly one restart."""
    pair.until_answering()
    assert [old == new for old, new in zip(pids, pair.pids(), strict=True)] == [False, False]
    assert pair.restarts() == [count + 1 for count in restarts]


def killed(pair: Pair, fault: Any, kill: Callable[[], object]) -> None:
    before, restarts = pair.pids(), pair.restarts()
    with under_load(pair.client, clients=4, tokens=200) as ledger:
        began = time.monotonic()
        kill()
    ledger.nothing_lost()
    assert "answer" not in ledger.ends
    fault.recovery_s = pair.client.recovery_s(began)
    restarted_once(pair, before, restarts)
    fault.saw(f"{ledger}; one restart of each unit")


@pytest.mark.fault("two-hosts-other-killed-idle")
def test_the_other_hosts_half_is_killed_while_nothing_runs(pair: Pair, fault: Any) -> None:
    """No request is there to fail: the first host sees it by itself."""
    before, restarts = pair.pids(), pair.restarts()
    began = time.monotonic()
    pair.two.sh(f"kill -KILL {processes(pair.two)['server']}")
    pair.one.until(lambda: pair.one.show("NRestarts") == str(restarts[0] + 1), 120)
    noticed_s = time.monotonic() - began
    fault.recovery_s = pair.client.recovery_s(began)
    restarted_once(pair, before, restarts)
    fault.saw(f"the first host's unit was started again {noticed_s:.0f} s after it; one restart of each")


@pytest.mark.fault("two-hosts-first-reboots")
def test_the_first_host_reboots(pair: Pair, fault: Any) -> None:
    rebooted(pair, pair.one, fault)


@pytest.mark.fault("two-hosts-other-reboots")
def test_the_other_host_reboots(pair: Pair, fault: Any) -> None:
    rebooted(pair, pair.two, fault)


def rebooted(pair: Pair, node: Node, fault: Any) -> None:
    booted = node.sh("systemctl show --property=UserspaceTimestampMonotonic")
    with under_load(pair.client, clients=4, tokens=100) as ledger:
        began = time.monotonic()
        node.sh("systemctl --no-block reboot", check=False)
    ledger.nothing_lost()
    node.until(lambda: run_there(node.record, "true").returncode == 0)
    fault.recovery_s = pair.client.recovery_s(began)
    pair.until_answering()
    assert node.sh("systemctl show --property=UserspaceTimestampMonotonic") != booted
    # the rules came back before the engine did
    assert reached(pair.stranger, pair.one.record["address"], [29501]) == []
    fault.saw(f"{ledger}; both units came back by themselves")


@pytest.mark.fault("two-hosts-cut")
def test_the_network_between_them_is_cut(pair: Pair, fault: Any) -> None:
    """Until the first host has seen it: what is left of the old connections must not keep
    the halves apart.
    """
    before = pair.pids()
    link = ["ip", "link", "set", pair.two.network_namespace()]
    pid = pair.pids()[0]
    subprocess.run([*link, "down"], check=True)
    try:
        began = time.monotonic()
        pair.one.until(lambda: pair.one.show("MainPID") != pid, 600)
        noticed_s = time.monotonic() - began
    finally:
        subprocess.run([*link, "up"], check=True)
    healed = time.monotonic()
    fault.recovery_s = pair.client.recovery_s(healed)
    pair.until_answering()
    assert [old == new for old, new in zip(before, pair.pids(), strict=True)] == [False, False]
    fault.saw(
        f"the first host ended its engine {noticed_s:.0f} s after the cut; recovery counts from the end of"
        " the cut"
    )


@pytest.mark.fault("two-hosts-upgrade")
def test_an_upgrade_of_both(pair: Pair, fault: Any) -> None:
    before = [node.running() for node in pair.nodes]
    with streaming(pair.client) as ledger:
        said = play("upgrade", lowmem_overrides={"max_num_seqs": 2})
    assert said.endswith("rc=0"), said
    ledger.nothing_lost()
    assert [node.argument("--max-num-seqs") for node in pair.nodes] == ["2", "2"]
    assert [node.current() == node.running() for node in pair.nodes] == [True, True]
    assert set(before).isdisjoint(node.running() for node in pair.nodes)
    fault.saw(f"streams one after another meanwhile: {ledger}")
    fault.recovery_s = ledger.away_s()


@pytest.mark.fault("two-hosts-bad-upgrade")
def test_an_upgrade_whose_other_half_does_not_start(pair: Pair, fault: Any) -> None:
    served = [node.running() for node in pair.nodes]
    bad = "{{ {'VLLM_LOGGING_LEVEL': 'NOSUCH'} if inventory_hostname == 'two-hosts-two' else {} }}"
    with streaming(pair.client) as ledger:
        said = play(
            "upgrade",
            lowmem_overrides={"max_num_seqs": 3},
            vllm_service_start_limit=1,
            vllm_service_extra_environment=bad,
        )
    assert said.endswith("rc=2"), said
    for release in served:
        assert re.search(
            rf"does not serve: two-hosts-two has not joined two-hosts-one; .* Back by itself: {release}"
            r" serves again\.",
            said,
        ), said
    ledger.nothing_lost()
    pair.until_answering()
    assert [node.running() for node in pair.nodes] == served
    fault.saw(
        "both went back by themselves, and the play failed in one line for each; streams one after another"
        f" meanwhile: {ledger}"
    )
    fault.recovery_s = ledger.away_s()


def test_rollback_takes_both(pair: Pair) -> None:
    tried = [node.running() for node in pair.nodes]
    said = play("rollback", "--limit", "two-hosts-two")
    assert "two-hosts-one takes no part in this play" in said, said
    assert "Nothing was switched." in said
    said = play("rollback")
    assert said.endswith("rc=0"), said
    pair.until_answering()
    assert [node.argument("--max-num-seqs") for node in pair.nodes] == ["4", "4"]
    assert set(tried).isdisjoint(node.running() for node in pair.nodes)


def test_new_keys_without_a_restart(pair: Pair) -> None:
    pids = pair.pids()
    said = play("rotate_keys", vllm_service_api_keys={"next": NEW_KEY})
    assert said.endswith("rc=0"), said
    assert pair.pids() == pids
    assert pair.client.complete(2).status == 401
    assert pair.client.complete(2, key=NEW_KEY).end == "answer"


def test_reset_takes_both(hosts: Pair) -> None:
    said = play("reset", lowmem_reset=True)
    assert said.endswith("rc=0"), said
    for node in hosts.nodes:
        assert node.sh("ls /etc/systemd/system | grep vllm || true") == ""
        assert node.sh("nft list tables") == ""
        assert node.sh("ps -e -o comm= | grep -i '^vllm' || true") == ""
