"""Two instances of the real engine under systemd: after the play, and again after a reboot of the host."""

import json
import re
from pathlib import Path

import pytest

RUNBOOKS = Path(__file__).parents[3] / "docs/runbooks"

INSTANCES = {"main": ("/opt/vllm-lowmem", 8000), "second": ("/opt/vllm-second", 8001)}
COMPLETION = """
set -a; . {root}/etc/vllm.env; set +a
curl --silent --show-error --fail --max-time 120 http://127.0.0.1:{port}/v1/completions \
  -H "Authorization: Bearer $VLLM_API_KEY" -H 'Content-Type: application/json' \
  -d '{{"model": "SmolLM2-135M-Instruct", "prompt": "Hello", "max_tokens": 8, "ignore_eos": true}}'
"""


@pytest.fixture(autouse=True)
def as_root(host):
    with host.sudo():
        yield


@pytest.fixture(params=INSTANCES)
def instance(request):
    return request.param


def shown(host, unit, *names):
    """Properties of a unit as systemd has them."""
    text = host.check_output("systemctl show %s --property=%s", unit, ",".join(names))
    return dict(line.split("=", 1) for line in text.splitlines())


def until_started(host, unit):
    """It is `activating` until it answers; the play waits for that, a reboot does not."""
    host.run(
        "timeout 600 sh -c 'while [ \"$(systemctl is-active %s)\" = activating ]; do sleep 1; done'", unit
    )


def test_it_runs_starts_at_boot_and_answers(host, instance):
    root, port = INSTANCES[instance]
    unit = f"vllm@{instance}.service"
    until_started(host, unit)
    seen = shown(host, unit, "ActiveState", "UnitFileState", "User", "KillMode", "Type", "NRestarts")
    wanted = {
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "User": "vllm",
        "KillMode": "mixed",
        "Type": "exec",
        "NRestarts": "0",
    }
    assert seen == wanted, host.run(
        "tail -n 60 %s/log/vllm.log; journalctl -u %s -n 30 --no-pager", root, unit
    ).stdout
    answer = json.loads(host.check_output("bash -c %s", COMPLETION.format(root=root, port=port)))
    assert answer["usage"]["completion_tokens"] == 8


def test_the_watchdog_runs_beside_it(host, instance):
    unit = f"vllm-watchdog@{instance}.service"
    assert shown(host, unit, "ActiveState", "UnitFileState", "NRestarts") == {
        "ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0",
    }  # fmt: skip
    # it sees the server that it is there to end
    pid = shown(host, f"vllm@{instance}.service", "MainPID")["MainPID"]
    watchdog = shown(host, unit, "MainPID")["MainPID"]
    assert host.run("nsenter --target %s --mount ls /proc/%s/cmdline", watchdog, pid).rc == 0


def test_limits_are_the_plans(host, instance):
    root, _ = INSTANCES[instance]
    plan = json.loads(host.file(f"{root}/etc/plan.json").content_string)
    seen = shown(
        host,
        f"vllm@{instance}.service",
        "MemoryMax",
        "TimeoutStartUSec",
        "TimeoutStopUSec",
        "StartLimitBurst",
        "OOMPolicy",
    )
    assert seen["MemoryMax"] == str(plan["service"]["memory_max_bytes"])
    assert seconds(seen["TimeoutStartUSec"]) == plan["service"]["timeout_start_s"]
    assert (
        seconds(seen["TimeoutStopUSec"])
        == plan["service"]["timeout_stop_s"]
        == plan["service"]["drain_s"] + 30
    )
    assert (seen["StartLimitBurst"], seen["OOMPolicy"]) == ("3", "kill")
    argv = plan["argv"]
    assert argv[argv.index("--shutdown-timeout") + 1] == str(plan["service"]["drain_s"])


def seconds(text):
    """`5min 12s` as 312."""
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(min|h|s)", text))


def test_the_sandbox_holds(host, instance):
    """As the running manager judges it, and as the kernel has it for the engine's own process."""
    unit = f"vllm@{instance}.service"
    for name in (unit, f"vllm-watchdog@{instance}.service"):
        said = host.run("systemd-analyze security --no-pager %s", name).stdout
        assert float(re.search(r"Overall exposure level for \S+: (\d+\.\d)", said)[1]) <= 2.0, said
        assert host.run("systemd-analyze verify --man=no %s", name).stderr == ""
    pid = shown(host, unit, "MainPID")["MainPID"]
    status = dict(
        line.split(":\t", 1)
        for line in host.file(f"/proc/{pid}/status").content_string.splitlines()
        if ":\t" in line
    )
    assert {status["CapEff"], status["CapBnd"]} == {"0000000000000000"}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = ["nsenter", "--target", pid, "--mount"]
    for path in ("/usr", "/etc", INSTANCES[instance][0]):
        assert "ro" in host.check_output(
            f"{' '.join(inside)} findmnt --noheadings --output OPTIONS --target {path}"
        ).split(","), path
    assert host.run(f"{' '.join(inside)} ls /home/ops").rc != 0
    devices = host.check_output(f"{' '.join(inside)} ls /dev").split()
    assert "null" in devices
    assert not [name for name in devices if name.startswith(("nvidia", "console", "kmsg", "loop"))]


def test_another_user_cannot_read_the_key_or_the_cache(host, instance):
    root, _ = INSTANCES[instance]
    assert (host.file(f"{root}/etc/vllm.env").mode, host.file(f"{root}/etc/vllm.env").user) == (0o600, "vllm")
    assert (host.file(f"{root}/cache").mode, host.file(f"{root}/cache").user) == (0o700, "vllm")
    # nobody but root can put a link in the place of a log that root opens
    log = host.file(f"{root}/log")
    assert (log.mode, log.user, log.group) == (0o750, "root", "vllm")
    # systemd would make it as root's own, whom nobody measures as
    assert (host.file(f"{root}/log/vllm.log").mode, host.file(f"{root}/log/vllm.log").user) == (0o600, "vllm")


def test_each_listens_where_its_plan_says_and_nowhere_else(host):
    listening = {
        line.split()[3]
        for line in host.check_output("ss --no-header --listening --tcp --numeric").splitlines()
    }
    assert {"0.0.0.0:8000", "127.0.0.1:8001"} <= listening
    other = {address.rsplit(":", 1)[0] for address in listening if not address.endswith((":22", ":8000"))}
    assert other <= {"127.0.0.1", "[::1]"}, listening


def test_the_log_is_rotated_and_goes_on(host, instance):
    root, _ = INSTANCES[instance]
    done = host.run("logrotate --force --state /run/test-rotated /etc/logrotate.d/vllm-%s", instance)
    assert (done.rc, done.stderr) == (0, "")
    assert host.file(f"{root}/log/vllm.log.1").size > 0
    host.check_output("bash -c %s", COMPLETION.format(root=root, port=INSTANCES[instance][1]))
    assert host.run("timeout 60 sh -c 'until [ -s %s/log/vllm.log ]; do sleep 1; done'", root).rc == 0


def quoted():
    """The commands that runbooks quote for a systemd host: blocks marked `bash service`."""
    block = re.compile(r"^( *)```bash service\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for path in sorted(RUNBOOKS.glob("*.md")):
        for _, text in block.findall(path.read_text()):
            for line in filter(None, map(str.strip, text.splitlines())):
                yield pytest.param(line, id=f"{path.stem}: {line[:50]}")


@pytest.mark.parametrize("command", quoted())
def test_runbook_commands_run(host, command):
    done = host.run("bash -euo pipefail -c %s", command)
    assert done.rc == 0, done.stderr + done.stdout
