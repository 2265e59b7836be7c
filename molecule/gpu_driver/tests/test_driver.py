"""The state after a first install, and again after a reboot. The expectations are written out; nothing is
read from the role.
"""

import json
import re
from pathlib import Path

import pytest

TWO, EIGHT = "gpu-driver-two", "gpu-driver-eight"
VERSION = {TWO: "580.95.05", EIGHT: "580.159.04"}
HELD = {
    TWO: [
        "libcuda1",
        "nvidia-driver-cuda",
        "nvidia-kernel-open-dkms",
        "nvidia-modprobe",
        "nvidia-persistenced",
    ],
    EIGHT: [
        "libcuda1",
        "nvidia-driver-cuda",
        "nvidia-fabricmanager",
        "nvidia-kernel-dkms",
        "nvidia-modprobe",
        "nvidia-persistenced",
    ],
}


@pytest.fixture
def name(host):
    return host.backend.get_hostname()


def test_the_installed_driver_is_the_loaded_one(host, name):
    assert host.file("/sys/module/nvidia/version").content_string.strip() == VERSION[name]
    assert host.check_output("/usr/sbin/modinfo -F version nvidia") == VERSION[name]


def test_nouveau_is_gone(host):
    assert not host.file("/sys/module/nouveau").exists
    assert "blacklist nouveau" in host.file("/etc/modprobe.d/vllm-lowmem-nouveau.conf").content_string


def test_uvm_is_there_and_comes_back_at_boot(host):
    assert host.file("/sys/module/nvidia_uvm").is_directory
    assert (
        host.file("/etc/modules-load.d/vllm-lowmem-nvidia.conf").content_string.splitlines()[-1]
        == "nvidia-uvm"
    )


def test_the_module_is_built_for_every_installed_kernel(host, name):
    kernels = {
        TWO: ["6.1.0-99-amd64", host.check_output("uname -r")],
        EIGHT: [host.check_output("uname -r")],
    }[name]
    for kernel in kernels:
        assert host.package(f"linux-headers-{kernel}").is_installed
        assert host.check_output("/usr/sbin/modinfo -k %s -F version nvidia", kernel) == VERSION[name]


def test_the_kind_of_modules_is_the_one_asked_for(host, name):
    assert (
        host.check_output("/usr/sbin/modinfo -F license nvidia")
        == {TWO: "Dual MIT/GPL", EIGHT: "NVIDIA"}[name]
    )


def test_packages_are_held(host, name):
    assert host.check_output("apt-mark showhold").splitlines() == HELD[name]


def test_unattended_upgrades_leave_the_driver_alone(host):
    said = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    for prefix in ("nvidia-", "libnvidia-", "libcuda1", "cuda-drivers"):
        assert f'Unattended-Upgrade::Package-Blacklist:: "{prefix}";' in said


def test_a_newer_driver_in_the_repository_changes_nothing(host, name):
    upgrade = host.check_output("apt-get --simulate --quiet=2 dist-upgrade")
    assert "nvidia" not in upgrade


def test_persistence_daemon_runs_with_the_drop_in(host):
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
    process = host.check_output("systemctl show nvidia-persistenced --property=ExecStart")
    assert "argv[]=/usr/bin/nvidia-persistenced --persistence-mode --verbose" in process


def test_the_device_node_that_cuda_needs_is_made_at_boot(host):
    assert host.file("/dev/nvidia-uvm").exists


def test_fabric_manager_only_where_there_are_switches(host, name):
    package = host.package("nvidia-fabricmanager")
    assert package.is_installed == (name == EIGHT)
    if name == EIGHT:
        assert package.version == "580.159.04-1"
        assert host.service("nvidia-fabricmanager").is_running
        assert host.service("nvidia-fabricmanager").is_enabled


def test_every_card_answers(host, name):
    out = host.check_output("nvidia-smi -q -x")
    assert out.count("<product_name>NVIDIA A100-PCIE-40GB</product_name>") == {TWO: 2, EIGHT: 8}[name]


def test_the_repository_is_signed_by_the_key_that_was_asked_for(host, name):
    source = host.file("/etc/apt/sources.list.d/vllm-lowmem-nvidia.sources").content_string
    suite = {TWO: "debian12", EIGHT: "debian13"}[name]
    assert f"URIs: http://127.0.0.1:8090/compute/cuda/repos/{suite}/x86_64/\n" in source
    assert "Signed-By: /etc/apt/keyrings/vllm-lowmem-nvidia.asc\n" in source
    keys = host.check_output("gpg --batch --show-keys --with-colons /etc/apt/keyrings/vllm-lowmem-nvidia.asc")
    found = [line.split(":")[9] for line in keys.splitlines() if line.startswith("fpr:")]
    assert found == [host.file("/opt/stub-repo/fingerprint").content_string.strip()]
    assert not host.file("/etc/apt/keyrings/vllm-lowmem-nvidia.asc.unverified").exists


def test_nothing_was_ever_unloaded(host):
    assert not host.file("/run/stub-gpu/unload").exists


def test_the_state_is_the_one_of_the_scenario(host, name):
    state = json.loads(host.file("/opt/stub-gpu/state.json").content_string)
    assert state["cards"] == {TWO: 2, EIGHT: 8}[name]


RUNBOOKS = Path(__file__).parents[3] / "docs/runbooks"
HOST_BLOCK = re.compile(r"^ *```bash host\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
HOST_COMMANDS = [
    line.strip()
    for path in sorted(RUNBOOKS.glob("*.md"))
    for block in HOST_BLOCK.findall(path.read_text())
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", HOST_COMMANDS)
def test_commands_of_the_runbooks_run_on_a_host(host, command):
    assert host.run("sudo sh -c %s", command).rc == 0
