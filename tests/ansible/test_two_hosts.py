"""A profile of two hosts: what its preflight refuses, on two hosts that are both this machine, and what each
host is given.
"""

from __future__ import annotations

import configparser
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest

from .test_templates import render

FILES = Path(__file__).parent / "files"
REPOSITORY = Path(__file__).resolve().parents[2]
PROFILE = REPOSITORY / "molecule/two_hosts/files/demo_two_hosts.yml"
NODES = ["10.0.0.1", "10.0.0.2"]
HOST = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
ONE_SERVER = "and profile demo_two_hosts is one server"
# what an inventory says wrongly, and the words that the operator must find
BAD = {
    "too few hosts": (
        {"lowmem_nodes": NODES[:1]},
        "is one server on 2 hosts, and lowmem_nodes has 1 (10.0.0.1): give group vllm that many hosts",
    ),
    "too many hosts": (
        {"lowmem_nodes": [*NODES, "10.0.0.3"]},
        "lowmem_nodes has 3 (10.0.0.1, 10.0.0.2, 10.0.0.3)",
    ),
    "one address for both": (
        {"lowmem_nodes": ["10.0.0.1", "10.0.0.1"]},
        "lowmem_nodes has 10.0.0.1 more than once; give each host its own",
    ),
    "a name for an address": (
        {"lowmem_nodes": ["10.0.0.1", "gpu-2"]},
        "lowmem_nodes has 'gpu-2', which is not an IP address",
    ),
    "an address of nobody else": (
        {"lowmem_nodes": ["10.0.0.1", "127.0.0.1"]},
        "lowmem_nodes has 127.0.0.1, which no other host can reach",
    ),
    "one port for two things": (
        {"lowmem_port": 29501},
        "lowmem_port=29501 and master_port are the same; choose another",
    ),
    "no systemd": (
        {},
        (
            f"vllm_service_manager is supervisor on one, {ONE_SERVER} over 2 hosts, whose parts start and end"
            " as units"
        ),
    ),
    "no such interface": (
        {},
        (
            "lowmem_interface is empty, and one has no such interface with 10.0.0.1 (lowmem_nodes) as its"
            " first address (it has"
        ),
    ),
    "another host's address": (
        {"lowmem_interface": "lo"},
        "lowmem_interface is lo, and two has no such interface with 10.0.0.2",
    ),
    "plans that differ": (
        {"lowmem_host": "{{ '10.0.0.1' if inventory_hostname == 'one' else '10.0.0.2' }}"},
        (
            f"the plans of one, two differ, {ONE_SERVER} on them: have the same lowmem_* for all of them (in"
            " group_vars)"
        ),
    ),
    "a router over it": (
        {"group": {"router": ["one"]}},
        "in group router, and profile demo_two_hosts",
        "a router sends to replicas",
    ),
    "a gateway before it": (
        {"group": {"gateway": ["one"]}},
        "one or another host is in group gateway",
        "hide each host's engine from the other",
    ),
    "a half that is watched": (
        {"group": {"monitoring": ["two"]}},
        "two or another host is in group monitoring",
        "only the first host can be watched",
    ),
}


def inventory(folder: Path, groups: dict[str, list[str]]) -> str:
    hosts = {
        "vllm": {"hosts": {"one": HOST, "two": HOST}},
        **{name: {"hosts": dict.fromkeys(members)} for name, members in groups.items()},
    }
    (folder / "hosts.json").write_text(json.dumps({"all": {"children": hosts}}))
    return str(folder / "hosts.json")


def preflight(playbook: Any, folder: Path, root: Path, *more: str, **variables: Any) -> Any:
    given = {
        "lowmem_root": str(root),
        "lowmem_become": False,
        "lowmem_profile": str(PROFILE),
        "lowmem_nodes": NODES,
        "host_memory_manage": False,
    }
    return playbook(
        "playbooks/preflight.yml", "-i", inventory(folder, variables.pop("group", {})), *more,
        variables={**given, "vllm_service_manager": "supervisor", "lowmem_port": 18999, **variables},
    )  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[name.replace(" ", "-") for name in BAD])
def test_bad_input_is_one_clear_line(case: str, playbook: Any, clean_root: Path, tmp_path: Path) -> None:
    variables, *words = BAD[case]
    done = preflight(playbook, tmp_path, clean_root, **variables)
    assert done.rc != 0
    assert done.changed == 0
    for word in words:
        assert word in done.flat, done.text[-4000:]
    assert "Traceback" not in done.text


def test_one_host_of_two_is_no_server(playbook: Any, clean_root: Path, tmp_path: Path) -> None:
    done = preflight(playbook, tmp_path, clean_root, "--limit", "two")
    assert (
        f"this play leaves out one, {ONE_SERVER} on one, two: run it for all of them, without --limit."
        in done.flat
    ), done.text[-4000:]


def test_another_profile_does_not_look_at_nodes(playbook: Any, clean_root: Path, tmp_path: Path) -> None:
    done = preflight(playbook, tmp_path, clean_root, lowmem_profile="demo_cpu", lowmem_nodes=["gpu-2"])
    assert done.rc == 0, done.text


def test_rules_that_would_cut_it_in_two(playbook: Any) -> None:
    given = {"role": "peer_firewall", "entry": "preflight", "lowmem_plan": plan(0), "lowmem_environment": {}}
    done = playbook(str(FILES / "role.yml"), variables={**given, "peer_firewall_addresses": ["10.0.0.9"]})
    assert done.rc != 0
    assert (
        "peer_firewall_addresses is 10.0.0.9, without 10.0.0.2, another host of this server: leave"
        " peer_firewall_addresses out" in done.flat
    )
    # a network may have it; what is refused then is this machine, which has no systemd
    done = playbook(str(FILES / "role.yml"), variables={**given, "peer_firewall_addresses": ["10.0.0.0/24"]})
    assert "peer_firewall_addresses is" not in done.flat


def plan(rank: int) -> dict[str, Any]:
    deploy = {
        "model_path": "/srv/m",
        "served_model_name": "m",
        "host": "10.0.0.1",
        "nodes": NODES,
        "interface": "eth1",
        "rank": rank,
    }
    return json.loads(make_plan(PlanRequest(str(PROFILE), deploy=deploy)).model_dump_json())


@pytest.fixture(scope="module")
def rendered(playbook: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [render(playbook, tmp_path_factory.mktemp("two") / str(rank), plan(rank)) for rank in (0, 1)]


def test_each_host_is_given_its_own_arguments(rendered: list[Path]) -> None:
    for rank, folder in enumerate(rendered):
        node = plan(0)["nodes"][rank]
        lines = (folder / "low_mem.sh").read_text().split("arguments=(\n")[1].split("\n)\n")[0].splitlines()
        assert (
            shlex.split(" ".join(line.strip() for line in lines if not line.strip().startswith("#")))
            == node["argv"]
        )
        settings = (folder / "engine.env").read_text().splitlines()
        for variable in node["environment"]:
            assert f"{variable['name']}={shlex.quote(variable['value'])}" in settings


def test_their_units_may_talk_to_each_other(rendered: list[Path]) -> None:
    for folder in rendered:
        unit = configparser.RawConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read(folder / "vllm@.service")
        assert unit["Unit"]["After"] == "network-online.target"
        assert unit["Unit"]["Wants"] == "network-online.target"
        assert "IPAddressDeny" not in unit["Service"]
        # it would keep the stages' own traffic on loopback
        assert "GLOO_SOCKET_IFNAME=lo" not in (folder / "vllm@.service").read_text()
