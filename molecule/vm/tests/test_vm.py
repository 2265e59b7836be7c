"""What only a kernel of its own shows; run after the roles, and again after a reboot into other values."""

import time

LIMIT = 268435456
UNIT = "vllm@main.service"


def test_kernel_parameters(host):
    assert host.sysctl("vm.swappiness") == 10
    assert host.sysctl("vm.overcommit_memory") == 0
    assert host.sysctl("vm.max_map_count") == 262144
    assert host.sysctl("vm.nr_hugepages") == 8


def test_swap_of_fstab_is_in_use(host):
    assert (
        host.check_output("/usr/sbin/swapon --show=NAME,SIZE --bytes --noheadings --raw")
        == "/swapfile 1073737728"
    )
    assert host.file("/etc/fstab").content_string.split() == ["/swapfile", "none", "swap", "sw", "0", "0"]


def test_the_driver_is_loaded_by_the_kernel(host):
    assert host.file("/sys/module/nvidia/version").content_string.strip() == "580.159.04"
    assert host.file("/sys/module/nvidia_uvm/version").content_string.strip() == "580.159.04"
    assert host.check_output("/usr/sbin/modinfo -F version nvidia") == "580.159.04"
    assert host.check_output("systemctl show systemd-modules-load --property=Result") == "Result=success"


def engine(host, what):
    """The unit, started anew with an engine that takes this; its properties when it holds it or was ended."""
    host.check_output(
        "sudo sh -c %s", f"echo {what} >/opt/vllm-lowmem/etc/engine.txt; : >/opt/vllm-lowmem/log/vllm.log"
    )
    host.check_output(
        "sudo sh -c %s",
        f"systemctl daemon-reload; systemctl stop {UNIT}; systemctl reset-failed {UNIT} || true; systemctl"
        f" start --no-block {UNIT}",
    )
    for _ in range(120):
        said = host.check_output(
            f"systemctl show {UNIT}"
            " --property=ActiveState,MemoryMax,MemoryCurrent,MemorySwapCurrent,ControlGroup"
        )
        now = dict(line.split("=", 1) for line in said.splitlines())
        if (
            now["ActiveState"] == "failed"
            or "holds" in host.file("/opt/vllm-lowmem/log/vllm.log").content_string
        ):
            return now
        time.sleep(1)
    raise AssertionError(now)


def test_ordinary_memory_over_the_limit_goes_to_swap(host):
    now = engine(host, "ordinary 400")
    assert now["MemoryMax"] == str(LIMIT)
    assert now["ActiveState"] == "active"
    assert int(now["MemoryCurrent"]) <= LIMIT
    assert int(now["MemorySwapCurrent"]) >= 100 << 20  # 144 MiB less what was read back meanwhile


def test_locked_memory_within_the_limit_is_had(host):
    now = engine(host, "locked 128")
    assert now["ActiveState"] == "active"
    assert int(now["MemoryCurrent"]) >= 128 << 20


def test_locked_memory_over_the_limit_ends_the_engine_and_it_stays_ended(host):
    now = engine(host, "locked 400")
    assert now["ActiveState"] == "failed"
    log = host.check_output(f"sudo journalctl --unit={UNIT} --boot --no-pager")
    assert f"{UNIT}: Failed with result 'oom-kill'." in log
    host.check_output(f"sudo systemctl reset-failed {UNIT}")
