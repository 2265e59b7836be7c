"""The state of an Ubuntu host after a first install, and again after a reboot; written out, nothing is read
from the roles.
"""

import pytest

JAMMY, NOBLE = "ubuntu-jammy", "ubuntu-noble"
VERSION = {JAMMY: "580.95.05", NOBLE: "580.159.04"}
HELD = {
    JAMMY: ["libnvidia-compute-580", "nvidia-dkms-580", "nvidia-modprobe", "nvidia-persistenced",
    "nvidia-utils-580"],
    NOBLE: [
        "libnvidia-compute-580", "nvidia-dkms-580-open", "nvidia-fabricmanager", "nvidia-modprobe",
        "nvidia-persistenced",
        "nvidia-utils-580",
    ],
}  # fmt: skip


@pytest.fixture
def name(host):
    return host.backend.get_hostname()


def test_it_is_the_ubuntu_of_the_scenario(host, name):
    assert (
        f'VERSION_ID="{ {JAMMY: "22.04", NOBLE: "24.04"}[name] }"'
        in host.file("/etc/os-release").content_string
    )


def test_the_installed_driver_is_the_loaded_one(host, name):
    assert host.file("/sys/module/nvidia/version").content_string.strip() == VERSION[name]
    assert host.check_output("/usr/sbin/modinfo -F version nvidia") == VERSION[name]
    assert host.file("/sys/module/nvidia_uvm").is_directory
    assert not host.file("/sys/module/nouveau").exists


def test_packages_have_ubuntus_names_and_are_held(host, name):
    assert host.check_output("apt-mark showhold").splitlines() == HELD[name]


def test_the_packages_are_the_repositorys_and_not_ubuntus_own(host, name):
    """Ubuntu has packages of the same names and of branch 580; those of NVIDIA's repository
    end in -1ubuntu1.
    """
    package = {JAMMY: "nvidia-dkms-580", NOBLE: "nvidia-dkms-580-open"}[name]
    table = host.check_output("apt-cache policy %s", package)
    assert "restricted" in table, "Ubuntu has no such package any more: this test proves nothing"
    for package in HELD[name]:
        assert host.package(package).version in (f"{VERSION[name]}-1ubuntu1", f"{VERSION[name]}-1")


def test_the_module_is_built_for_every_installed_kernel(host, name):
    kernels = {
        JAMMY: ["6.8.0-99-generic", host.check_output("uname -r")],
        NOBLE: [host.check_output("uname -r")],
    }[name]
    for kernel in kernels:
        assert host.package(f"linux-headers-{kernel}").is_installed
        assert host.check_output("/usr/sbin/modinfo -k %s -F version nvidia", kernel) == VERSION[name]


def test_unattended_upgrades_leave_the_driver_alone(host):
    said = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    for prefix in ("nvidia-", "libnvidia-", "libcuda1", "cuda-drivers"):
        assert f'Unattended-Upgrade::Package-Blacklist:: "{prefix}";' in said


def test_a_newer_driver_in_the_repository_changes_nothing(host):
    assert "nvidia" not in host.check_output("apt-get --simulate --quiet=2 dist-upgrade")


def test_the_repository_is_ubuntus(host, name):
    source = host.file("/etc/apt/sources.list.d/vllm-lowmem-nvidia.sources").content_string
    suite = {JAMMY: "ubuntu2204", NOBLE: "ubuntu2404"}[name]
    assert f"URIs: http://127.0.0.1:8090/compute/cuda/repos/{suite}/x86_64/\n" in source


def test_daemons(host, name):
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
    assert host.service("nvidia-fabricmanager").is_running == (name == NOBLE)
    if name == NOBLE:
        assert host.package("nvidia-fabricmanager").version == "580.159.04-1"


def test_every_card_answers(host, name):
    assert host.check_output("nvidia-smi -q -x").count("<product_name>") == {JAMMY: 2, NOBLE: 8}[name]


def test_the_compilers(host):
    assert host.package("cuda-nvcc-13-0").version == "13.0.88-1"
    assert not host.package("cuda-nvcc-13-1").is_installed
    host.check_output("echo 'int main(void) { return 0; }' | gcc -x c -o /dev/null -")


def test_memory(host, name):
    if name == NOBLE:
        assert host.sysctl("vm.swappiness") == 10
        swap = host.file("/swap-ubuntu-noble")
        assert (swap.size, swap.mode) == (1073741824, 0o600)
        assert (
            host.file("/etc/security/limits.d/60-vllm-lowmem.conf").content_string
            == "vllm - memlock unlimited\n"
        )


def test_nothing_was_ever_unloaded(host):
    assert not host.file("/run/stub-gpu/unload").exists
