"""Real driver packages: what the role asked for is there, the module was built from its source, and nothing
upgrades it.
"""

import re

import pytest

TRIXIE, NOBLE = "distribution-trixie", "distribution-noble"
BRANCH = {TRIXIE: "550", NOBLE: "580"}
PACKAGES = {
    TRIXIE: ["libcuda1", "nvidia-kernel-dkms", "nvidia-persistenced", "nvidia-smi"],
    NOBLE: [
        "libnvidia-compute-580-server",
        "nvidia-compute-utils-580-server",
        "nvidia-dkms-580-server",
        "nvidia-utils-580-server",
    ],
}


@pytest.fixture
def name(host):
    return host.backend.get_hostname()


@pytest.fixture
def kernel(host):
    return host.file("/opt/stub-gpu/newest").content_string.strip()


def test_the_packages_are_of_the_branch_and_held(host, name):
    held = host.check_output("apt-mark showhold").splitlines()
    for package in PACKAGES[name]:
        assert re.match(rf"{BRANCH[name]}\.\d+", host.package(package).version)
        assert package in held


def test_the_headers_of_the_kernel_in_boot_came_along(host, kernel):
    assert host.package(f"linux-headers-{kernel}").is_installed


def test_dkms_built_the_real_module(host, name, kernel):
    """For the newest kernel that the distribution has, and found as the running one's (prepare.yml)."""
    running = host.check_output("/usr/bin/uname -r")
    module = {TRIXIE: "nvidia-current", NOBLE: "nvidia"}[name]
    assert re.search(
        rf"nvidia.*({re.escape(kernel)}|{re.escape(running)}).*installed",
        host.check_output("/usr/sbin/dkms status"),
    )
    assert re.match(
        rf"{BRANCH[name]}\.\d+", host.check_output("/usr/sbin/modinfo -k %s -F version %s", running, module)
    )
    assert host.check_output("/usr/sbin/modinfo -k %s -F vermagic %s", running, module).split()[0] == kernel
    assert host.check_output("/usr/sbin/modinfo -k %s -F license %s", running, module) == "NVIDIA"
    host.check_output("/usr/sbin/modinfo -k %s %s-uvm", running, module)


def test_nvidia_smi_is_real_and_finds_no_card(host):
    done = host.run("nvidia-smi")
    assert (done.rc, "couldn't communicate with the NVIDIA driver" in done.stdout) == (9, True)


def test_the_drop_in_is_the_persistence_daemons(host):
    process = host.check_output("systemctl show nvidia-persistenced --property=ExecStart")
    assert "argv[]=/usr/bin/nvidia-persistenced --persistence-mode --verbose" in process
    assert host.file("/usr/bin/nvidia-persistenced").exists
    assert host.service("nvidia-persistenced").is_enabled


def test_unattended_upgrades_leave_it_alone(host):
    assert 'Package-Blacklist:: "nvidia-";' in host.check_output(
        "apt-config dump Unattended-Upgrade::Package-Blacklist"
    )


def test_uvm_and_nouveau(host):
    assert (
        host.file("/etc/modules-load.d/vllm-lowmem-nvidia.conf").content_string.splitlines()[-1]
        == "nvidia-uvm"
    )
    assert "blacklist nouveau" in host.file("/etc/modprobe.d/vllm-lowmem-nouveau.conf").content_string
