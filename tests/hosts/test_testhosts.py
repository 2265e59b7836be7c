"""The test hosts themselves: real systemd, SSH, reboots, and nothing left on this machine, whatever way a run ended."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import ROOT

TESTHOSTS = ROOT / "molecule/hosts/testhosts"


def lacking():
    done = subprocess.run([TESTHOSTS, "check"], capture_output=True, text=True, check=False, timeout=30)
    return done.stderr.strip()


needs_hosts = pytest.mark.skipif(bool(lacking()), reason=lacking() or "-")


@pytest.fixture
def hosts(tmp_path):
    """The command, with a state of its own; what it made is gone afterwards."""
    environment = os.environ | {"TESTHOSTS_STATE": str(tmp_path / "state")}

    def call(*words):
        return subprocess.run([TESTHOSTS, *words], capture_output=True, text=True, check=False, timeout=300, env=environment)

    yield call
    call("sweep", "")


def ssh(record, command):
    words = [
        "ssh",
        "-i",
        record["identity_file"],
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
    ]
    done = subprocess.run(
        [*words, "-o", "ConnectTimeout=3", f"ops@{record['address']}", command], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip()


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(f"not true within {seconds} s")


def test_what_is_missing_is_one_line(tmp_path):
    """A PATH with nothing but Python on it: every package is named, once, in one command."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to("/usr/bin/python3")
    done = subprocess.run(
        ["/usr/bin/python3", TESTHOSTS, "check"], capture_output=True, text=True, check=False, env={"PATH": str(tools)}, timeout=30
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    if os.geteuid() == 0:
        wanted = "apt-utils gnupg iproute2 iptables mmdebstrap openssh-client systemd-container util-linux"
        assert line.endswith(f"apt-get install --no-install-recommends {wanted}")
    else:
        assert line.startswith("test hosts need root")


@needs_hosts
def test_a_host_boots_reboots_and_leaves_nothing(hosts, tmp_path):
    before = vm()
    record = json.loads(hosts("up", "probe-one", "trixie").stdout)
    assert record["instance"] == "probe-one"
    assert ssh(record, "cat /proc/1/comm") == "systemd"
    assert ssh(record, "sudo -n id -u") == "0"
    assert ssh(record, "hostname") == "probe-one"
    assert eventually(lambda: ssh(record, "systemctl is-system-running")) in ("running", "starting")
    first = ssh(record, "cat /proc/sys/kernel/random/boot_id")
    ssh(record, "sudo systemctl reboot")
    eventually(lambda: ssh(record, "cat /proc/sys/kernel/random/boot_id") not in ("", first))

    # a role set these, and a run broke off: nobody called down
    ssh(
        record,
        "sudo sysctl -w vm.swappiness=42; sudo sh -c 'umask 077; dd if=/dev/zero of=/s bs=1M count=4; mkswap /s; swapon /s'",
    )
    assert "/s " in Path("/proc/swaps").read_text()
    pid = int((tmp_path / "state/probe-one/pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)

    again = json.loads(hosts("up", "probe-one", "trixie").stdout)
    assert ssh(again, "test -e /s || echo new") == "new"
    assert hosts("sweep", "probe-").returncode == 0
    assert json.loads(hosts("list").stdout) == []
    assert "/s " not in Path("/proc/swaps").read_text()
    assert vm() == before
    assert not (tmp_path / "state/probe-one").exists()
    bridges = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert (
        record["address"].rsplit(".", 1)[0]
        not in subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    )
    assert f"lm{record['address'].split('.')[2]}-" not in bridges


def vm():
    return {name: Path("/proc/sys/vm", name).read_text() for name in ("swappiness", "overcommit_memory", "max_map_count", "nr_hugepages")}
