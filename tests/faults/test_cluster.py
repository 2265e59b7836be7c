"""Two replicas with the real engine behind the router and its gateway, under load from outside. They need the
hosts of Molecule's scenario `cluster`, which runs this file (LOWMEM_CLUSTER_HOSTS), and Molecule's inventory
of them. The last test leaves them upgraded.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from .ledger import Client, Entry
from .node import Node
from .plays import play

HOSTS = os.environ.get("LOWMEM_CLUSTER_HOSTS", "")
pytestmark = pytest.mark.skipif(
    not HOSTS, reason="runs on three systemd hosts: make molecule SCENARIO=cluster"
)
KEY, MODEL = "sk-fleet-0123456789abcdefABCDEF", "SmolLM2-135M-Instruct"


@dataclass
class Load:
    """What closed-loop clients saw: (when it began, how it ended) of each request, in the order of their
    ends.
    """

    seen: list[tuple[float, Entry]] = field(default_factory=list)

    def all_answered(self) -> None:
        assert [(began, entry) for began, entry in self.seen if entry.end != "answer"] == []

    def __str__(self) -> str:
        answered = sum(entry.end == "answer" for _, entry in self.seen)
        return f"{answered} of {len(self.seen)} requests answered whole"


@contextmanager
def constant_load(
    client: Client, clients: int = 4, streams: bool = False, tokens: int = 20
) -> Iterator[Load]:
    """Each client asks again as soon as it is answered, while the block runs; with `streams` every second one
    streams.
    """
    load, over = Load(), threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            began = time.monotonic()
            entry = client.complete(tokens, f"Story {number}: ", streams and number % 2 == 0)
            load.seen.append((began, entry))
            if entry.end != "answer":
                time.sleep(1)

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield load
        finally:
            over.set()
        for one in asking:
            one.result()


@dataclass(frozen=True)
class Cluster:
    one: Node
    two: Node
    router: Client
    """Through the gateway."""
    router_host: Node

    def workers(self) -> dict[str, bool]:
        """Whether the router holds each replica for healthy, by its address; it listens on its host's
        loopback.
        """
        found = json.loads(self.router_host.sh("curl --silent http://127.0.0.1:8080/workers"))["workers"]
        return {worker["url"]: worker["is_healthy"] for worker in found}


def answered(node: Node) -> int:
    """Requests that this replica's engine has finished since it started."""
    return node.client.total("vllm:request_success_total")


def until_it_answers_more(node: Node, by: int = 1) -> None:
    before = answered(node)
    node.until(lambda: answered(node) >= before + by, 600)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    records = {record["name"]: record for record in json.loads(HOSTS)}
    one, two = (
        Node(records[name], Client(f"http://{records[name]['address']}:8000", KEY, MODEL))
        for name in ("cluster-one", "cluster-two")
    )
    front = Client(f"https://{records['cluster-router']['address']}", KEY, MODEL)
    return Cluster(one, two, front, Node(records["cluster-router"], front))


def reaches(node: Node, address: str) -> bool:
    """Whether a connection from that host gets an answer within three seconds."""
    return (
        node.sh(f"curl --silent --output /dev/null --max-time 3 http://{address}/health; echo $?").strip()
        == "0"
    )


def test_who_reaches_what(cluster: Cluster) -> None:
    """The router reaches a replica, another replica does not; the router itself nobody, and the gateway lets
    the API's routes through.
    """
    one, router = cluster.one.record["address"], cluster.router_host.record["address"]
    assert reaches(cluster.router_host, f"{one}:8000")
    assert reaches(cluster.one, f"{one}:8000")
    assert not reaches(cluster.two, f"{one}:8000")
    assert not reaches(cluster.two, f"{router}:8080")
    assert cluster.router.get("/healthz")[0] == 200
    assert cluster.router.get("/workers")[0] == 404
    assert cluster.router.get("/v1/models")[0] == 401


def test_both_replicas_answer_behind_one_address(cluster: Cluster) -> None:
    assert cluster.workers() == {cluster.one.client.url: True, cluster.two.client.url: True}
    with constant_load(cluster.router, streams=True) as load:
        until_it_answers_more(cluster.one, by=2)
        until_it_answers_more(cluster.two, by=2)
    load.all_answered()


def test_a_key_that_no_replica_has(cluster: Cluster) -> None:
    assert cluster.router.complete(2, key="sk-somebody-elses").status == 401
    assert cluster.workers() == {cluster.one.client.url: True, cluster.two.client.url: True}


@pytest.mark.fault("cluster-replica-killed")
def test_a_replica_that_is_killed(cluster: Cluster, fault: Any) -> None:
    with constant_load(cluster.router) as load:
        until_it_answers_more(cluster.one)
        began = time.monotonic()
        cluster.one.sh(f"kill -KILL {cluster.one.show('MainPID')}")
        cluster.one.until(lambda: not cluster.workers()[cluster.one.client.url], 60)
        out_s = time.monotonic() - began
        until_it_answers_more(cluster.two)
        cluster.one.until_active()
        cluster.one.until(lambda: cluster.workers()[cluster.one.client.url], 60)
        until_it_answers_more(cluster.one)
        fault.recovery_s = time.monotonic() - began
    load.all_answered()
    fault.saw(f"{load}; out of the router's list after {out_s:.0f} s")


@pytest.mark.fault("cluster-replica-cut")
def test_a_replica_that_is_cut_off(cluster: Cluster, fault: Any) -> None:
    link = ["ip", "link", "set", cluster.one.network_namespace()]
    with constant_load(cluster.router) as load:
        until_it_answers_more(cluster.one)
        began = time.monotonic()
        subprocess.run([*link, "down"], check=True)
        try:
            cluster.one.until(lambda: not cluster.workers()[cluster.one.client.url], 60)
            out_s = time.monotonic() - began
            until_it_answers_more(cluster.two)
            while time.monotonic() - began < 40:
                time.sleep(0.5)
        finally:
            subprocess.run([*link, "up"], check=True)
        healed = time.monotonic()
        cluster.one.until(lambda: cluster.workers()[cluster.one.client.url], 60)
        until_it_answers_more(cluster.one)
        fault.recovery_s = time.monotonic() - healed
    load.all_answered()
    # those that the replica had when it was cut off wait for it; nothing new waits
    waited = [entry for start, entry in load.seen if began + out_s < start < healed - 1]
    assert waited
    fault.saw(f"{load}; out of the router's list after {out_s:.0f} s")


@contextmanager
def slowed(node: Node) -> Iterator[None]:
    """Engine and worker run half a second in five; the API server, which answers /health, always. These hosts
    enforce no CPUQuota=.
    """
    family = node.family()
    pids = f"{family['engine']} {family['worker']}"
    loop = f"while sleep 0.5; do kill -STOP {pids}; sleep 4.5; kill -CONT {pids}; done"
    node.sh(
        f"systemd-run --quiet --unit=slow --property=ExecStopPost='/bin/kill -CONT {pids}' bash -c"
        f" {shlex.quote(loop)}"
    )
    try:
        yield
    finally:
        node.sh("systemctl stop slow.service")


@pytest.mark.fault("cluster-replica-slow")
def test_a_replica_that_is_slow(cluster: Cluster, fault: Any) -> None:
    with slowed(cluster.one):
        before = answered(cluster.one), answered(cluster.two)
        with ThreadPoolExecutor(8) as pool:
            entries = list(pool.map(lambda n: cluster.router.complete(20, f"Story {n}: "), range(40)))
        slow, fast = answered(cluster.one) - before[0], answered(cluster.two) - before[1]
    assert [entry for entry in entries if entry.end != "answer"] == []
    # each replica's watchdog asks for a token of its own now and then
    assert slow < fast
    fault.saw(
        f"40 of 40 requests answered whole; {slow} ended on the slow replica meanwhile and {fast} on the"
        " other"
    )


def test_one_replica_less_and_one_more(cluster: Cluster) -> None:
    said = play("router", router_workers=[cluster.two.client.url])
    assert said.endswith("rc=0"), said
    assert cluster.workers() == {cluster.two.client.url: True}
    before = answered(cluster.one)
    assert [cluster.router.complete(2).end for _ in range(4)] == ["answer"] * 4
    assert answered(cluster.one) == before
    said = play("router")
    assert said.endswith("rc=0"), said
    assert cluster.workers() == {cluster.one.client.url: True, cluster.two.client.url: True}
    said = play("router")
    assert "changed=0" in said, said


def test_a_run_leaves_out_replicas_that_are_as_they_were(cluster: Cluster) -> None:
    def run() -> str:
        said = play("../site", "--skip-tags", "verify", lowmem_skip_unchanged=True)
        assert said.endswith("rc=0"), said
        return said

    run()
    said = run()
    assert said.count("left it: the rest of this run is left out") == 2, said
    assert said.count("changed=0") == 3, said
    cluster.one.sh("systemctl stop vllm-watchdog@main.service")
    said = run()
    assert said.count("left it: the rest of this run is left out") == 1, said
    assert "left it: unit vllm-watchdog@main.service" in said
    assert cluster.one.sh("systemctl is-active vllm-watchdog@main.service").strip() == "active"


@pytest.mark.fault("cluster-upgrade")
def test_an_upgrade_of_both(cluster: Cluster, fault: Any) -> None:
    before = [node.running() for node in (cluster.one, cluster.two)]
    with constant_load(cluster.router, streams=True) as load:
        said = play("upgrade", lowmem_overrides={"max_num_seqs": 4})
    assert said.endswith("rc=0"), said
    load.all_answered()
    after = [node.running() for node in (cluster.one, cluster.two)]
    assert after[0] == after[1]
    assert after[0] not in before
    assert [node.argument("--max-num-seqs") for node in (cluster.one, cluster.two)] == ["4", "4"]
    fault.saw(f"{load}")
