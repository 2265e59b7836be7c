"""Upgrades of the second deployment, with the real engine: a good one over a killed play, bad ones that
return, rollback, reset.

LOWMEM_SLOW=1 runs them: about four minutes on two free cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowmem.checkpoint import manifest

from .conftest import PORT, REPOSITORY, Service, kill_before, playbook_command
from .ledger import streaming

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("LOWMEM_SLOW") != "1", reason="LOWMEM_SLOW=1 runs it"),
]
SETTINGS = {"lowmem_verify_kill": False, "lowmem_verify_requests": 4}


def command(service: Service, name: str, variables: dict[str, Any]) -> list[str]:
    # beside the deployment, not in the repository: the demo's receipt stays
    receipts = {"lowmem_receipts": str(service.root.parent / "receipts")}
    return [*playbook_command(service.root, name), "-e", json.dumps({**SETTINGS, **receipts, **variables})]


def play(service: Service, name: str, **variables: Any) -> str:
    """What a playbook says, with colour and line breaks taken out; its status is its last word."""
    done = subprocess.run(
        command(service, name, variables),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{' '.join(done.stdout.split())} rc={done.returncode}"


def current(service: Service) -> str:
    return (service.root / "current").readlink().name


def running(service: Service) -> str:
    [found] = [line for line in service.family()["server"].environ().items() if line[0] == "LOWMEM_RELEASE"]
    return Path(found[1]).name


def argument(service: Service, flag: str) -> str:
    argv = service.family()["server"].cmdline()
    return argv[argv.index(flag) + 1]


@pytest.fixture(scope="module")
def first(second: Service) -> str:
    """The release that serves when the upgrades begin."""
    second.control("start", "vllm")
    second.client.recovery_s(time.monotonic())
    return current(second)


def test_a_good_upgrade_over_a_play_killed_in_the_switch(second: Service, first: str, tmp_path: Path) -> None:
    change = {"lowmem_overrides": {"max_num_seqs": 4}}
    before = second.family()
    # the link is switched, nothing is restarted yet
    kill_before(
        "vllm_service : Hand the launcher to the service manager",
        command(second, "playbooks/upgrade.yml", change),
        tmp_path,
    )
    new = current(second)
    assert new != first
    assert (running(second), second.family()) == (first, before)
    assert second.client.complete(4).end == "answer"

    with ThreadPoolExecutor(1) as pool:
        # long enough to be under way when the server is told to stop
        stream = pool.submit(streams_until_it_stops, second)
        said = play(second, "playbooks/upgrade.yml", **change)
        ledger = stream.result()
    assert said.endswith("rc=0"), said
    assert (current(second), running(second)) == (new, new)
    assert argument(second, "--max-num-seqs") == "4"
    # the last one met the stop: it was waited for, or refused
    drains = (
        "--shutdown-timeout" in json.loads((second.root / f"releases/{first}/plan.json").read_text())["argv"]
    )
    assert [entry for entry in ledger[: None if drains else -1] if entry.end == "lost"] == []
    assert json.loads((second.root / "current/receipt.json").read_text())["verdict"] == "passed"
    assert (second.root / "releases" / first / "low_mem.sh").is_file()


def streams_until_it_stops(service: Service) -> list[Any]:
    """Streams one after another until the server is gone; how each of them ended."""
    ends = []
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        ends.append(service.client.complete(60, stream=True, timeout_s=120))
        if ends[-1].end != "answer":
            break
    return ends


@pytest.mark.fault("bad-upgrade")
def test_an_upgrade_that_does_not_start_returns_by_itself(second: Service, first: str, fault: Any) -> None:
    served = current(second)
    with streaming(second.client) as ledger:
        said = play(
            second,
            "playbooks/upgrade.yml",
            lowmem_overrides={"max_num_seqs": 4},
            vllm_service_start_limit=1,
            vllm_service_extra_environment={"VLLM_LOGGING_LEVEL": "NOSUCH"},
        )
    ledger.nothing_lost()
    assert said.endswith("rc=2"), said
    assert re.search(
        rf"vllm-0\.32\.0-demo_cpu-\w+ does not serve: vLLM does not answer .* Back by itself: {served} serves"
        r" again\.",
        said,
    )
    assert (current(second), running(second)) == (served, served)
    assert second.client.complete(4).end == "answer"
    fault.saw(f"the play went back by itself and failed in one line; streams one after another: {ledger}")
    fault.recovery_s = ledger.away_s()


@pytest.mark.fault("bad-upgrade-noise")
def test_an_upgrade_that_answers_noise_returns_by_itself(second: Service, first: str, fault: Any) -> None:
    served = current(second)
    noise = second.root / "models/noise"
    shutil.copytree(second.root / "models/SmolLM2-135M-Instruct-awq", noise)
    shard = noise / "model.safetensors"
    content = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    # its tensors are of the right sizes, and what stands in their second half is no model
    middle = start + (len(content) - start) // 2
    content[middle:] = random.Random(1).randbytes(len(content) - middle)
    shard.write_bytes(content)
    entries = manifest.entries(manifest.scan(noise))
    noise.with_name("noise.manifest.json").write_text(
        json.dumps({"schema": 1, "name": "noise", "files": entries})
    )
    with streaming(second.client) as ledger:
        said = play(
            second,
            "playbooks/upgrade.yml",
            lowmem_model_path=str(noise),
            lowmem_overrides={"max_num_seqs": 4},
        )
    ledger.nothing_lost()
    assert said.endswith("rc=2"), said
    assert re.search(
        rf"does not serve: .*the model knows english.* Back by itself: {served} serves again\.", said
    ), said
    assert (current(second), running(second)) == (served, served)
    fault.saw(f"its checks failed, and the play went back by itself; streams one after another: {ledger}")
    fault.recovery_s = ledger.away_s()


def test_rollback_serves_the_release_before_and_names_those_it_has(second: Service, first: str) -> None:
    tried = current(second)
    assert tried != first
    said = play(second, "playbooks/rollback.yml", rollback_to="no-such")
    assert "rollback_to is no-such: demo has no such release; it has " in said
    assert (running(second), said.endswith("rc=2")) == (tried, True)
    said = play(second, "playbooks/rollback.yml")
    assert said.endswith("rc=0"), said
    assert f"{first} serves on demo, in place of {tried}" in said
    assert (current(second), running(second), argument(second, "--max-num-seqs")) == (first, first, "8")
    assert second.client.complete(4).end == "answer"
    # the one that was left is not gone back to by itself
    assert "there is no proven release but" in play(second, "playbooks/rollback.yml")


def test_reset_removes_the_service_and_keeps_the_models(second: Service, first: str) -> None:
    models = {
        path.name: hashlib.sha256(path.name.encode()).hexdigest()
        for path in (second.root / "models").iterdir()
    }
    server = second.family()["server"]
    said = play(second, "playbooks/reset.yml")
    assert "give -e lowmem_reset=true if that is meant" in said
    assert (said.endswith("rc=2"), server.is_running()) == (True, True)
    if os.geteuid() == 0:
        subprocess.run(["umount", "--lazy", second.root / "log"], check=False)
    for changed in (True, False):
        said = play(second, "playbooks/reset.yml", lowmem_reset=True)
        assert said.endswith("rc=0"), said
        assert ("changed=0" in said) is not changed, said
    assert not server.is_running()
    assert sorted(path.name for path in second.root.iterdir()) == ["lowmem_root", "models"]
    assert {path.name for path in (second.root / "models").iterdir()} == set(models)
    assert PORT not in {
        connection.laddr.port for connection in psutil.net_connections("tcp") if connection.status == "LISTEN"
    }
