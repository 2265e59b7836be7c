"""What `lowmem start-check` refuses, line by line, with an NVML that says what the test wants; and what
`lowmem ready` waits for.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowmem.checkpoint import manifest
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Plan
from lowmem.service.ready import main_process_lives, wait
from lowmem.service.start_check import (
    Card,
    Lasting,
    Passing,
    cards,
    cores_of,
    lasting_refusals,
    look_at_passing,
    passing_refusals,
)

MIB = 2**20
DEPLOY = {"model_path": "/srv/models/llama", "served_model_name": "llama", "host": "127.0.0.1", "port": 8000}


@pytest.fixture(scope="module")
def two_cards() -> Plan:
    return make_plan(PlanRequest("low_mem", deploy=DEPLOY))


@pytest.fixture(scope="module")
def on_cpu() -> Plan:
    return make_plan(PlanRequest("demo_cpu", deploy=DEPLOY))


def a100(index: int, free_mib: int = 40_000, **other: Any) -> Card:
    facts = {"name": "NVIDIA A100-SXM4-40GB", "capability": "8.0", "total_bytes": 40_960 * MIB, **other}
    return Card(index=index, free_bytes=free_mib * MIB, **facts)


def passing(plan: Plan, *seen: Card, **other: Any) -> list[str]:
    facts = {"cards_trouble": "", "ram_available_bytes": 512 * 2**30, "port_taken": False, **other}
    return list(passing_refusals(plan, Passing(cards=seen, **facts)))


def lasting(plan: Plan, **other: Any) -> list[str]:
    facts = {
        "vllm_version": "0.32.0",
        "memlock_unlimited": True,
        "cores": frozenset({0, 1}),
        "checkpoint": (),
        **other,
    }
    return list(lasting_refusals(plan, Lasting(**facts)))


def test_a_host_as_planned_is_not_refused(two_cards: Plan, on_cpu: Plan) -> None:
    assert passing(two_cards, a100(0), a100(1)) == []
    assert lasting(two_cards) == []
    assert passing(on_cpu) == []
    assert lasting(on_cpu, memlock_unlimited=False, vllm_version="0.32.0+cpu") == []


def test_a_stale_process_on_a_card(two_cards: Plan) -> None:
    held = a100(1, 20_000, holders=("pid 4242 (VLLM::Worker)",))
    assert passing(two_cards, a100(0), held) == [
        "GPU 1 has 20,000 MiB free, held by pid 4242 (VLLM::Worker); the plan needs 20,453 MiB: stop what"
        " holds it, or wait for it to end"
    ]


def test_a_card_that_is_missing(two_cards: Plan) -> None:
    assert passing(two_cards, a100(0)) == [
        "1 GPU may be opened here, the plan is for 2: look at vllm_service_cards and at nvidia-smi"
    ]


def test_another_card_than_planned(two_cards: Plan) -> None:
    other = a100(1, name="NVIDIA A10", capability="8.6", total_bytes=23_028 * MIB)
    assert passing(two_cards, a100(0), other) == [
        "GPU 1 is NVIDIA A10 (23,028 MiB, compute capability 8.6), the plan is for NVIDIA A100 40 GB SXM4"
        " (40,960 MiB, 8.0): set lowmem_device and run site.yml again"
    ]


def test_an_older_driver_counts_a_little_less(two_cards: Plan) -> None:
    assert passing(two_cards, a100(0, total_bytes=40_536 * MIB), a100(1)) == []


def test_a_driver_that_does_not_answer(two_cards: Plan) -> None:
    assert passing(two_cards, cards_trouble="NVML does not start (Driver Not Loaded)") == [
        "NVML does not start (Driver Not Loaded): look at nvidia-smi, and run playbooks/doctor.yml"
    ]


def test_too_little_ram(on_cpu: Plan) -> None:
    [line] = passing(on_cpu, ram_available_bytes=2**30)
    assert line.startswith("1.00 GiB of RAM available, the plan needs 2.33 GiB: stop what holds it")


def test_a_taken_port(on_cpu: Plan) -> None:
    assert passing(on_cpu, port_taken=True) == [
        "port 8000 of 127.0.0.1 is taken: `ss -ltnp sport = :8000` says by whom; stop it, or choose another"
        " lowmem_port"
    ]


def test_what_does_not_pass_by_itself(two_cards: Plan, on_cpu: Plan) -> None:
    assert lasting(two_cards, vllm_version="0.31.0") == [
        "the environment has vLLM 0.31.0, the plan is for 0.32.0: run site.yml again"
    ]
    assert lasting(two_cards, memlock_unlimited=False) == [
        "the plan pins memory, and this service may lock too little: set LimitMEMLOCK=infinity (the unit"
        " has it)"
    ]
    assert lasting(on_cpu, cores=frozenset({0})) == [
        "VLLM_CPU_OMP_THREADS_BIND is 0-1, and this service may not run on core 1: "
        "set it in vllm_service_extra_environment to cores of this host"
    ]
    assert lasting(on_cpu, environment="/e is damaged, pkg/a.py: missing") == [
        "the environment /e is damaged, pkg/a.py: missing: run site.yml again, which makes the environment"
        " anew"
    ]
    assert lasting(on_cpu, checkpoint=("/m: model.safetensors: missing, /m does not have it",)) == [
        "/m: model.safetensors: missing, /m does not have it; it is not served: run site.yml again, which"
        " makes the checkpoint anew"
    ]


def test_cores() -> None:
    assert cores_of("0-2|5,7") == {0, 1, 2, 5, 7}
    assert cores_of("auto") == cores_of("nobind") == cores_of("") == set()


def test_a_port_is_tried_and_not_looked_up(on_cpu: Plan) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        deploy = {**DEPLOY, "port": other.getsockname()[1]}
        plan = make_plan(PlanRequest("demo_cpu", deploy=deploy))
        assert look_at_passing(plan).port_taken
    assert not look_at_passing(plan).port_taken


class NvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Two cards; the second may not be opened, as where DeviceAllow does not name it."""
    module: Any = ModuleType("pynvml")

    def handle(index: int) -> int:
        if index == 1:
            raise NvmlError("Insufficient Permissions")
        return index

    module.NVMLError = NvmlError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = handle
    module.nvmlDeviceGetMemoryInfo = lambda _handle, version: SimpleNamespace(
        total=40_960 * MIB, free=1_000 * MIB
    )
    module.nvmlDeviceGetName = lambda _handle: b"NVIDIA A100-SXM4-40GB"
    module.nvmlDeviceGetCudaComputeCapability = lambda _handle: (8, 0)
    module.nvmlDeviceGetComputeRunningProcesses = lambda _handle: [
        SimpleNamespace(pid=os.getpid()),
        SimpleNamespace(pid=2**22 + 1),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_cards_are_those_that_may_be_opened(nvml: ModuleType) -> None:
    [card] = cards()
    assert (card.index, card.name, card.capability, card.free_bytes) == (
        0,
        "NVIDIA A100-SXM4-40GB",
        "8.0",
        1_000 * MIB,
    )
    assert card.holders[0].startswith(f"pid {os.getpid()} (")
    assert card.holders[1] == f"pid {2**22 + 1}"


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowmem", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **variables}, timeout=120
    )


def test_the_command_says_one_line_each(on_cpu: Plan, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"abc")
    listed = {"schema": 1, "files": manifest.entries(manifest.scan(model))}
    (tmp_path / "model.manifest.json").write_text(json.dumps(listed))
    (model / "a.safetensors").write_bytes(b"ab")
    plan = tmp_path / "plan.json"
    plan.write_text(
        make_plan(PlanRequest("demo_cpu", deploy={**DEPLOY, "model_path": str(model)})).model_dump_json()
    )
    done = run("start-check", "--plan", str(plan), "--wait-s", "0")
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert all(line.startswith("start-check: ") for line in said)
    assert (
        f"start-check: {model}: a.safetensors: truncated, 2 bytes, the manifest has 3; it is not served: "
        "run site.yml again, which makes the checkpoint anew" in said
    )


def test_a_plan_without_a_deployment_is_bad_input(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(make_plan(PlanRequest("demo_cpu")).model_dump_json())
    for command in (["start-check"], ["ready", "--env-file", "/dev/null"]):
        done = run(*command, "--plan", str(plan))
        assert done.returncode == 1
        assert (
            done.stderr
            == f"lowmem: --plan {plan} names no port and model: give the plan.json of a deployment\n"
        )


class Answers:
    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def complete(self, timeout_s: float) -> Any:
        return self.answers.pop(0)


def test_ready_waits_for_tokens_and_no_longer_than_there_is_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.service.ready.PAUSE_S", 0)
    assert wait(Answers("nothing", "nothing", "tokens"), lambda: True, 60) == ""  # type: ignore[arg-type]
    assert wait(Answers("nothing"), lambda: False, 60) == "the server has ended"  # type: ignore[arg-type]
    assert wait(Answers("refused"), lambda: True, 60) == "the server refuses this deployment's key or model"  # type: ignore[arg-type]
    assert wait(Answers(), lambda: True, 0) == "no completion within 0 s"  # type: ignore[arg-type]


def test_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAINPID", raising=False)
    assert main_process_lives()
    monkeypatch.setenv("MAINPID", str(os.getpid()))
    assert main_process_lives()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    monkeypatch.setenv("MAINPID", str(gone.pid))
    assert not main_process_lives()


NVML = """
class NVMLError(Exception): pass
class Memory:
    total = 40960 * 2**20
    def __init__(self, index): self.free = (40000 if index == 0 else 20000) * 2**20
class Process:
    pid = 4242424
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMemoryInfo(index, version=None): return Memory(index)
def nvmlDeviceGetName(index): return "NVIDIA A100-SXM4-40GB"
def nvmlDeviceGetCudaComputeCapability(index): return 8, 0
def nvmlDeviceGetComputeRunningProcesses(index): return [Process] if index else []
"""


@pytest.mark.fault("stale-process")
def test_a_start_beside_a_stale_process_is_refused(two_cards: Plan, tmp_path: Path, fault: Any) -> None:
    """The whole command, with a stub in the place of nvidia-ml-py."""
    (tmp_path / "pynvml.py").write_text(NVML)
    plan = tmp_path / "plan.json"
    plan.write_text(two_cards.model_dump_json())
    done = run("start-check", "--plan", str(plan), "--wait-s", "0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "GPU" in line]
    assert (
        line
        == "start-check: GPU 1 has 20,000 MiB free, held by pid 4242424; the plan needs 20,453 MiB: stop what"
        " holds it, or wait for it to end"
    )
    fault.saw(f"refused: {line.removeprefix('start-check: ')}")


def test_one_of_several_hosts_is_asked_for_its_own() -> None:
    nodes = ("127.0.0.1", "127.0.0.2")  # the planner takes no loopback; the kernel does
    first, other = (
        make_plan(
            PlanRequest("two_hosts", deploy=DEPLOY | {"nodes": ["10.0.0.1", "10.0.0.2"], "rank": rank})
        ).model_copy(update={"device_kind": "cpu", "host_ram": {}})
        for rank in (0, 1)
    )
    assert first.deploy is not None
    assert other.deploy is not None
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("0.0.0.0", 0)) as meeting:
        ports = {"port": api.getsockname()[1], "master_port": meeting.getsockname()[1], "nodes": nodes}
        here, there = (
            plan.model_copy(update={"deploy": plan.deploy.model_copy(update=ports)})
            for plan in (first, other)
            if plan.deploy
        )
        seen = list(passing_refusals(here, look_at_passing(here)))
        # the other host listens at neither
        assert list(passing_refusals(there, look_at_passing(there))) == []
    assert [line.split(":")[0] for line in seen] == [
        f"port {ports['port']} of 127.0.0.1 is taken",
        f"rendezvous port {ports['master_port']} is taken",
    ]
    [line] = passing_refusals(other, look_at_passing(other))
    assert line.startswith("10.0.0.2 is not an address of this host, so the other hosts cannot reach it")
