"""Bad input ends in one clear line, and the host is as it was."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

FILES = Path(__file__).parent / "files"

# what an inventory says, and the words that the operator must find in the answer
BAD = {
    "a port that is a word": ({"lowmem_port": "http"}, "lowmem_port", "http"),
    "a port that cannot be": ({"lowmem_port": 70000}, "port", "70000", "65535"),
    "an unknown profile": ({"lowmem_profile": "fast"}, "profile 'fast' does not exist", "demo_cpu"),
    "the article's own flags": (
        {"lowmem_profile": "article"},
        "impossible",
        "--max-batch-size",
        "Nothing on the host was changed",
    ),
    "an unknown device": ({"lowmem_device": "a100_40"}, "a100_40"),
    "an unknown model": ({"lowmem_model": "llama-9"}, "llama-9"),
    "a negative number of devices": ({"lowmem_device_count": -2}, "-2"),
    "an unknown knob": ({"lowmem_overrides": {"max_batch": 8}}, "max_batch"),
    "a negative size in a knob": ({"lowmem_overrides": {"max_num_seqs": -1}}, "max_num_seqs", "-1"),
    "an unknown service manager": (
        {"vllm_service_manager": "runit"},
        "vllm_service_manager",
        "runit",
        "systemd, supervisor",
    ),
    "a negative log size": (
        {"vllm_service_log_max_mib": -5},
        "vllm_service_log_max_mib must be 1 or more, and is -5.0",
    ),
    "a list for a number": ({"vllm_service_start_limit": [3]}, "vllm_service_start_limit"),
    "a page too often": (
        {"status_page_every_s": 5},
        "status_page_every_s is 5: it must be 10 to 3600 seconds",
    ),
    "a negative swap file": ({"host_memory_swap_gib": -1}, "host_memory_swap_gib is -1 (0 or more)"),
    "a missing library": (
        {"vllm_service_libraries": ["libnothere9.so.1"]},
        "libnothere9.so.1 cannot be loaded",
        "apt-get install libnothere91",
    ),
    "a missing program": (
        {"vllm_service_commands": ["nothere9"]},
        "nothere9 not found",
        "apt-get install nothere9",
    ),
    "a disk that is too small": ({"vllm_service_environment_disk_gib": 10_000_000}, "GiB free", "make room"),
    "a missing lock": (
        {"vllm_service_environment_lock": "/nothere.txt"},
        "vllm_service_environment_lock is /nothere.txt",
        "no such file",
    ),
    "two things at once": (
        {"vllm_service_log_max_mib": -5, "vllm_service_environment_lock": "/nothere.txt"},
        "vllm_service_log_max_mib must be 1 or more",
        "vllm_service_environment_lock is /nothere.txt",
    ),
    "a root with a blank": (
        {"lowmem_root": "/tmp/vllm lowmem"},
        "lowmem_root is /tmp/vllm lowmem",
        "letters, digits",
    ),
    "a root that is too long": ({"lowmem_root": "/tmp/" + "x" * 90}, "at most 76 characters"),
}


@pytest.mark.parametrize("case", BAD, ids=[name.replace(" ", "-") for name in BAD])
def test_bad_input_is_one_clear_line(case: str, playbook: Any, clean_root: Path) -> None:
    variables, *words = BAD[case]
    done = playbook(
        "playbooks/preflight.yml",
        variables={"lowmem_root": str(clean_root), "lowmem_port": 18999, **variables},
    )
    assert done.rc != 0
    assert "failed=1" in done.text
    assert done.changed == 0
    for word in words:
        assert word in done.flat, done.text[-3000:]
    assert "Traceback" not in done.text


def test_a_good_preflight_says_what_will_be_and_changes_nothing(playbook: Any, clean_root: Path) -> None:
    done = playbook(
        "playbooks/preflight.yml", variables={"lowmem_root": str(clean_root), "lowmem_port": 18999}
    )
    assert done.rc == 0, done.text
    assert done.changed == 0
    assert "demo_cpu: smollm2-135m (awq 4-bit" in done.text
    assert "\nfits\n" in done.text


def test_a_port_that_somebody_else_has(playbook: Any, clean_root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        done = playbook(
            "playbooks/preflight.yml", variables={"lowmem_root": str(clean_root), "lowmem_port": port}
        )
    assert done.rc != 0
    assert f"lowmem_port is {port}, and " in done.flat
    assert "listens there already: stop it, or choose another lowmem_port." in done.flat


def test_an_api_key_that_is_refused_is_not_shown(playbook: Any, clean_root: Path) -> None:
    secret = "open sesame, please"
    variables = {"lowmem_root": str(clean_root), "lowmem_port": 18999, "vllm_service_api_key": secret}
    done = playbook("playbooks/preflight.yml", "--diff", "-v", variables=variables)
    assert done.rc != 0
    assert "vllm_service_api_key must be 16 to 256 letters" in done.flat
    assert secret not in done.text


@pytest.mark.parametrize(
    ("manage", "memory", "words"),
    [
        (
            False,
            {"host_ram": {"pinned_offload": 2**50}, "host_ram_bytes": 2**50},
            "the plan needs 1048576.00 GiB (pinned_offload 1048576.00 GiB)",
        ),
        (True, {}, "host_memory_swap_gib is 9000000 and the disk of /swapfile has"),
    ],
)
def test_too_little_memory(
    playbook: Any, clean_root: Path, manage: bool, memory: dict[str, Any], words: str
) -> None:
    plan = {**json.loads((FILES / "plan.json").read_text()), **memory}
    done = playbook(
        str(FILES / "role.yml"),
        variables={
            "role": "host_memory",
            "entry": "preflight",
            "lowmem_plan": plan,
            "host_memory_root": str(clean_root),
            "host_memory_manage": manage,
            "host_memory_swap_gib": 9_000_000 if manage else 0,
            "lowmem_environment": {},
        },
    )
    assert done.rc != 0
    assert words in done.flat


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (
            {"memlock_bytes": 8 * 2**20},
            (
                "the plan pins 20.00 GiB and this session may lock 8.0 MiB: an engine started by hand fails"
                " to offload"
            ),
        ),
        (
            {"numa": [{"total_bytes": 16 * 2**30}, {"total_bytes": 48 * 2**30}, {"total_bytes": 16 * 2**30}]},
            None,
        ),
        (
            {"numa": [{"total_bytes": 16 * 2**30}, {"total_bytes": 16 * 2**30}]},
            (
                "the plan pins 20.00 GiB and no NUMA node has more than 16.00 GiB: a part is read across"
                " sockets, slower than PCIe"
            ),
        ),
        (
            {"memory": {"total_bytes": 25 * 2**30, "swap_total_bytes": 0}},
            "25.00 GiB of RAM, which leaves 1.00 GiB for everything else",
        ),
    ],
    ids=["locked memory", "a node that holds it", "no node that holds it", "little left"],
)
def test_pinned_memory_that_could_not_be_backed_is_warned_of(
    playbook: Any, clean_root: Path, host: dict[str, Any], words: str | None
) -> None:
    plan = {
        **json.loads((FILES / "plan.json").read_text()),
        "host_ram": {"pinned_offload": 20 * 2**30},
        "host_ram_bytes": 24 * 2**30,
    }
    seen = {
        "memory": {"total_bytes": 256 * 2**30, "swap_total_bytes": 0},
        "sysctl": {"vm.swappiness": 10, "vm.max_map_count": 262144},
        "memlock_bytes": -1,
        "numa": [{"total_bytes": 256 * 2**30}],
    }
    done = playbook(
        str(FILES / "role.yml"),
        variables={
            "role": "host_memory",
            "entry": "main",
            "lowmem_plan": plan,
            "host_memory_root": str(clean_root),
            "host_memory_manage": False,
            "__host_memory_host": seen | host,
            "lowmem_environment": {},
        },
    )
    assert done.rc == 0, done.text
    assert done.changed == 0
    assert done.flat.count("WARNING: ") == (0 if words is None else 1)
    if words:
        assert words in done.flat
