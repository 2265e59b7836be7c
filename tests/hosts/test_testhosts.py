"""The test hosts themselves: real systemd, SSH, reboots, and nothing left on this machine, whatever way a run
ended.
"""

import fcntl
import ipaddress
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import ROOT, load

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
        return subprocess.run(
            [TESTHOSTS, *words], capture_output=True, text=True, check=False, timeout=300, env=environment
        )

    yield call
    call("sweep", "")


def module(monkeypatch, state):
    """The program as a module that takes `state` for its own."""
    monkeypatch.setenv("TESTHOSTS_STATE", str(state))
    return load("molecule/hosts/testhosts")


def test_two_checkouts_that_prefer_the_same_network_get_two(tmp_path, monkeypatch):
    testhosts = module(monkeypatch, tmp_path)
    first = int(testhosts.OWNER.rsplit("-", 1)[1], 16) % 200
    bridges, used = {}, []
    monkeypatch.setattr(testhosts, "owner", bridges.get)
    monkeypatch.setattr(testhosts, "networks_in_use", lambda: [ipaddress.IPv4Network(n) for n in used])
    assert testhosts.free_network() == first
    bridges[first] = "lowmem-testhosts-of-another"
    assert testhosts.free_network() == (first + 1) % 200
    # somebody's network that has nothing to do with test hosts, wider than one of ours
    used.append(f"10.213.{(first + 1) % 200}.128/25")
    assert testhosts.free_network() == (first + 2) % 200
    bridges.update(dict.fromkeys(range(200), "lowmem-testhosts-of-another"))
    with pytest.raises(
        SystemExit,
        match=r"none of the networks 10\.213\.0\.0/24 to 10\.213\.199\.0/24 is free: see `ip route`",
    ):
        testhosts.free_network()


def test_a_route_to_everything_private_leaves_the_networks_free(tmp_path, monkeypatch):
    testhosts = module(monkeypatch, tmp_path)
    answers = {
        "address": [{"addr_info": [{"local": "10.213.7.9", "prefixlen": 24}]}],
        "route": [{"dst": "default"}, {"dst": "10.0.0.0/8"}],
    }
    monkeypatch.setattr(
        testhosts,
        "run",
        lambda *words, **_: subprocess.CompletedProcess(words, 0, json.dumps(answers[words[-1]]), ""),
    )
    assert testhosts.networks_in_use() == [ipaddress.IPv4Network("10.213.7.0/24")]


def test_ubuntus_key_is_taken_only_by_its_fingerprint(tmp_path, monkeypatch):
    """A mirror that serves a package with another key gives an error, and no keyring."""
    testhosts = module(monkeypatch, tmp_path)
    mirror = tmp_path / "mirror"
    package = mirror / testhosts.UBUNTU_KEYRING
    package.parent.mkdir(parents=True)
    (tmp_path / "p/DEBIAN").mkdir(parents=True)
    (tmp_path / "p/DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@invalid>\nDescription: x\n"
    )
    (tmp_path / "p/usr/share/keyrings").mkdir(parents=True)
    own = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    (tmp_path / "p/usr/share/keyrings/ubuntu-archive-keyring.gpg").write_bytes(own.read_bytes())
    subprocess.run(["dpkg-deb", "-b", tmp_path / "p", package], check=True, capture_output=True)
    monkeypatch.setattr(testhosts, "UBUNTU_MIRROR", mirror.as_uri())
    monkeypatch.setattr(testhosts, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    with pytest.raises(
        SystemExit, match="does not hold the key F6ECB3762474EDA9D21B7022871920D1991BC93C: look at the mirror"
    ):
        testhosts.ubuntu_keyring()
    assert list((tmp_path / "cache").iterdir()) == []


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
        [*words, "-o", "ConnectTimeout=3", f"ops@{record['address']}", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
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
        ["/usr/bin/python3", TESTHOSTS, "check"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tools)},
        timeout=30,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    if os.geteuid() == 0:
        wanted = "apt-utils gnupg iproute2 iptables mmdebstrap openssh-client systemd-container util-linux"
        assert line.endswith(f"apt-get install --no-install-recommends {wanted}")
    else:
        assert line.startswith("test hosts need root")


@pytest.fixture
def strangers_bridge(tmp_path, monkeypatch):
    """The network that this state would like best is somebody else's."""
    first = module(monkeypatch, tmp_path / "state").free_network()
    commands = [
        f"link add stranger{first} type bridge",
        f"address add 10.213.{first}.1/24 dev stranger{first}",
        f"link set stranger{first} up",
    ]
    for words in commands:
        subprocess.run(["ip", *words.split()], check=True)
    yield first
    subprocess.run(
        ["ip", "link", "delete", f"stranger{first}"], check=True
    )  # fails if it went with the hosts


@pytest.fixture
def vm_settings():
    """This machine's, which scenarios of this and other checkouts set as well (molecule/run)."""
    with Path("/run/lowmem-molecule-vm-settings.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@needs_hosts
@pytest.mark.usefixtures("vm_settings")
def test_a_host_boots_reboots_and_leaves_nothing(hosts, strangers_bridge, tmp_path):
    before = vm()
    record = json.loads(hosts("up", "probe-one", "trixie").stdout)
    assert record["instance"] == "probe-one"
    network = json.loads((tmp_path / "state/network.json").read_text())
    assert network["number"] != strangers_bridge
    assert record["address"].rsplit(".", 1)[0] + ".0/24" == network["subnet"]
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
        "sudo sysctl -w vm.swappiness=42; sudo sh -c 'umask 077; dd if=/dev/zero of=/s bs=1M count=4; mkswap"
        " /s; swapon /s'",
    )
    assert "/s " in Path("/proc/swaps").read_text()
    pid = int((tmp_path / "state/probe-one/pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)

    again = json.loads(hosts("up", "probe-one", "trixie").stdout)
    assert ssh(again, "test -e /s || echo new") == "new"
    assert hosts("sweep", "probe-").returncode == 0
    assert json.loads(hosts("list").stdout) == []
    assert "/s " not in Path("/proc/swaps").read_text()
    if not [*Path("/sys/class/net").glob("lowmem*")]:  # another checkout's hosts keep what they found
        assert vm() == before
    assert not (tmp_path / "state/network.json").exists()
    assert not (tmp_path / "state/probe-one").exists()
    bridges = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert (
        record["address"].rsplit(".", 1)[0]
        not in subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    )
    assert f"lm{record['address'].split('.')[2]}-" not in bridges


def vm():
    return {
        name: Path("/proc/sys/vm", name).read_text()
        for name in ("swappiness", "overcommit_memory", "max_map_count", "nr_hugepages")
    }
