"""Kernel parameters, swap file and limit, after the role and again after a reboot.

systemd in a container ignores swap in fstab, so that swap comes back at boot is not tested here."""


def test_kernel_parameters(host):
    assert host.sysctl("vm.swappiness") == 10
    assert host.sysctl("vm.overcommit_memory") == 0
    assert host.sysctl("vm.max_map_count") == 262144


def test_they_are_in_the_folder_that_is_applied_at_boot(host):
    written = host.file("/etc/sysctl.d/60-vllm-lowmem.conf").content_string.splitlines()
    assert sorted(written) == ["vm.max_map_count=262144", "vm.overcommit_memory=0", "vm.swappiness=10"]


def test_swap_file_has_the_size_that_the_plan_gives(host):
    swap = host.file("/swap-host-memory-one")
    assert (swap.size, swap.mode, swap.user) == (1073741824, 0o600, "root")
    assert host.check_output("stat -c %b /swap-host-memory-one") >= "2097152"  # blocks of 512 bytes: no holes
    assert not host.file("/swap-host-memory-one.new").exists


def test_fstab_names_it_once(host):
    lines = [line.split() for line in host.file("/etc/fstab").content_string.splitlines() if "swap" in line]
    assert lines == [["/swap-host-memory-one", "none", "swap", "sw", "0", "0"]]


def test_the_user_may_lock_memory(host):
    assert (
        host.file("/etc/security/limits.d/60-vllm-lowmem.conf").content_string == "vllm - memlock unlimited\n"
    )
