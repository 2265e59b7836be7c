"""What the templates make of a plan: literal files, legal for the programs that read them, and exactly the
plan's arguments.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lowmem.service.api_keys import read_keys

FILES = Path(__file__).parent / "files"
GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[2]


def render(playbook: Any, destination: Path, plan: dict[str, Any]) -> Path:
    destination.mkdir(exist_ok=True)
    variables = {
        "templates": str(REPOSITORY / "templates"),
        "destination": str(destination),
        "lowmem_plan": plan,
    }
    done = playbook(str(FILES / "render.yml"), variables=variables)
    assert done.rc == 0, done.text
    return destination


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return json.loads((FILES / "plan.json").read_text())


@pytest.fixture(scope="module")
def rendered(playbook: Any, plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(playbook, tmp_path_factory.mktemp("rendered") / "cpu", plan)


@pytest.fixture(scope="module")
def rendered_cuda(playbook: Any, plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    service = {**plan["service"], "memlock": "infinity"}
    return render(
        playbook,
        tmp_path_factory.mktemp("rendered") / "cuda",
        {**plan, "device_kind": "cuda", "device_count": 2, "service": service},
    )


@pytest.mark.parametrize(
    "name",
    [
        "low_mem.sh",
        "engine.env",
        "vllm.env",
        "run_under_supervisor.sh",
        "supervise.sh",
        "supervisord.conf",
        "vllm@.service",
        "vllm-watchdog@.service",
        "vllm.logrotate",
        "vllm-status@.service",
        "vllm-status@.timer",
    ],
)
def test_golden(rendered: Path, name: str) -> None:
    """After a wanted change: LOWMEM_GOLDEN=write .lowmem/venv/bin/pytest tests/ansible/test_templates.py, and
    read the diff.
    """
    if os.environ.get("LOWMEM_GOLDEN") == "write":
        shutil.copyfile(rendered / name, GOLDEN / name)
    assert (rendered / name).read_text() == (GOLDEN / name).read_text()


def test_the_launchers_are_legal_bash(rendered: Path) -> None:
    for name in ("low_mem.sh", "run_under_supervisor.sh", "supervise.sh"):
        subprocess.run(["bash", "-n", rendered / name], check=True)
        subprocess.run(["shellcheck", "--severity=warning", rendered / name], check=True)


def test_the_launcher_gives_exactly_the_plans_arguments(
    rendered: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    """Run with a program in vLLM's place that writes down what it was given: quotes, blanks and dollars come
    through as they are.
    """
    probe = tmp_path / "vllm"
    probe.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$SEEN"\nenv -0 >"$SEEN.env"\n')
    probe.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VLLM_BIN": str(probe), "SEEN": str(tmp_path / "seen")}
    launcher = tmp_path / "low_mem.sh"
    shutil.copy(rendered / "low_mem.sh", launcher)
    settings = (
        (rendered / "engine.env")
        .read_text()
        .replace("/srv/vllm-lowmem/etc/vllm.env", str(rendered / "vllm.env"))
    )
    (tmp_path / "engine.env").write_text(settings)
    (tmp_path / "elsewhere").symlink_to(launcher)
    subprocess.run([tmp_path / "elsewhere", "--one-more", "a b"], env=environment, check=True)
    assert (tmp_path / "seen").read_text().split("\0")[:-1] == ["serve", *plan["argv"], "--one-more", "a b"]
    seen = dict(pair.split("=", 1) for pair in (tmp_path / "seen.env").read_text().split("\0")[:-1])
    assert "sk-test-0123456789abcdef" not in str(seen)
    assert seen["LOWMEM_API_KEYS"] == str(rendered / "vllm.env")
    assert seen["LOWMEM_RELEASE"] == str(tmp_path)
    assert seen["VLLM_LOGGING_LEVEL"] == "DEBUG it's"
    assert seen["HF_HOME"] == "/srv/vllm-lowmem/cache/huggingface"
    for variable in plan["environment"]:
        assert seen[variable["name"]] == variable["value"]


def test_a_launcher_that_cannot_read_the_keys_starts_nothing(rendered: Path, tmp_path: Path) -> None:
    shutil.copy(rendered / "low_mem.sh", tmp_path)
    shutil.copy(rendered / "engine.env", tmp_path)
    done = subprocess.run(
        [tmp_path / "low_mem.sh"],
        env={"PATH": os.environ["PATH"], "VLLM_BIN": "/bin/true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "/srv/vllm-lowmem/etc/vllm.env cannot be read: a server without API keys answers nobody\n"
    )


def test_the_key_file_is_read_alike_by_bash_and_by_the_server(rendered: Path) -> None:
    script = 'source "$1"; printf "%s " "$VLLM_API_KEY" "$VLLM_API_KEY_default" "$VLLM_API_KEY_alice"'
    said = subprocess.run(
        ["bash", "-c", script, "bash", rendered / "vllm.env"], capture_output=True, text=True, check=True
    ).stdout
    first, alice = "sk-test-0123456789abcdef", "sk-alice~0123456789abcdef"
    assert said.split() == [first, first, alice]
    assert read_keys((rendered / "vllm.env").read_text()) == {"": first, "default": first, "alice": alice}


def test_every_argument_stands_under_its_reason(rendered: Path, plan: dict[str, Any]) -> None:
    lines = [line.strip() for line in (rendered / "low_mem.sh").read_text().splitlines()]
    for argument in plan["arguments"]:
        reason = "# " + " ".join(argument["why"].split())
        assert lines[lines.index(reason) + 1].startswith(argument["flag"])


def test_no_secret_but_in_the_environment_file(rendered: Path) -> None:
    holders = [path.name for path in rendered.iterdir() if "sk-test-0123456789abcdef" in path.read_text()]
    assert holders == ["vllm.env"]


def test_supervisor_reads_its_configuration(rendered: Path) -> None:
    program = configparser.ConfigParser(interpolation=None)
    program.read(rendered / "supervisord.conf")
    assert program["program:vllm"]["command"] == "/srv/vllm-lowmem/etc/run_under_supervisor.sh"
    assert program["program:vllm"]["autorestart"] == "true"
    assert program["program:vllm"]["startsecs"] == "45"
    assert program["program:vllm"]["startretries"] == "3"
    assert program["unix_http_server"]["chmod"] == "0600"


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed (Debian package systemd)",
)


def analyzed(folder: Path, name: str, destination: Path) -> Path:
    """A unit of this folder as a file whose programs exist here."""
    unit = destination / name.replace("@", "@main")
    text = (folder / name).read_text()
    unit.write_text(re.sub(r"/srv/vllm-lowmem/current/(low_mem.sh|env/bin/lowmem)", "/bin/true", text))
    return unit


@needs_systemd
@pytest.mark.parametrize("name", ["vllm@.service", "vllm-watchdog@.service", "vllm-status@.service"])
def test_systemd_reads_the_units(name: str, rendered: Path, rendered_cuda: Path, tmp_path: Path) -> None:
    for folder in (rendered, rendered_cuda):
        unit = analyzed(folder, name, tmp_path)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
        )
        assert [line for line in done.stderr.splitlines() if unit.name in line] == []


def named(unit: str, which: str) -> set[str]:
    """The directives that the role's README says are left out of a unit; `which`: the column cpu or gpu."""
    role = "status_page" if unit.startswith("vllm-status") else "vllm_service"
    readme = (REPOSITORY / "roles" / role / "README.md").read_text()
    rows = re.findall(
        r"^\| `([^|]+)` \| ([^|]*) \| ([^|]+) \|$",
        readme.split(f"### Left out of {unit}\n")[1].split("\n### ")[0],
        re.MULTILINE,
    )
    return {directive for directive, where, why in rows if where.strip() in ("both", which) and why.strip()}


@needs_systemd
@pytest.mark.parametrize(
    ("unit", "most"), [("vllm@.service", 2.0), ("vllm-watchdog@.service", 2.0), ("vllm-status@.service", 2.0)]
)
@pytest.mark.parametrize("which", ["cpu", "gpu"])
def test_the_sandbox_is_as_tight_as_said(
    unit: str, most: float, which: str, rendered: Path, rendered_cuda: Path, tmp_path: Path
) -> None:
    """Every finding of `systemd-analyze security` is named in the role's README with its reason, and nothing
    else is named.
    """
    file = analyzed(rendered if which == "cpu" else rendered_cuda, unit, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    findings = json.loads(
        subprocess.run([*command, "--json=short", file], capture_output=True, text=True, check=False).stdout
    )
    bad = {f["json_field"] for f in findings if f["exposure"]}
    assert bad == named(unit, which)
    text = subprocess.run([*command, file], capture_output=True, text=True, check=False).stdout
    [exposure] = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", text)
    assert float(exposure) <= most


def test_a_gpu_unit_may_open_its_own_devices_and_no_others(rendered: Path, rendered_cuda: Path) -> None:
    cpu, cuda = ((folder / "vllm@.service").read_text().splitlines() for folder in (rendered, rendered_cuda))
    allowed = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]
    assert [line for line in cuda if line.startswith("DeviceAllow")] == [
        f"DeviceAllow={device} rw" for device in allowed
    ]
    assert "DevicePolicy=closed" in cuda
    assert "LimitMEMLOCK=infinity" in cuda
    assert "PrivateDevices=yes" not in cuda
    assert "IPAddressDeny=any" not in cuda
    assert "LimitMEMLOCK=infinity" not in cpu
    assert "PrivateDevices=yes" in cpu
    assert "IPAddressDeny=any" in cpu
    # seen on a host: a single worker listened on 14 ports of the host's own address
    assert "Environment=GLOO_SOCKET_IFNAME=lo" in cpu
    assert "Environment=GLOO_SOCKET_IFNAME=lo" not in cuda


def test_a_service_that_cannot_start_reaches_its_limit(rendered: Path) -> None:
    """Also where each start takes all of its time: three times 2 x 300 s, a stop of 72 s and a pause of 5 s
    are less than the interval.
    """
    lines = (rendered / "vllm@.service").read_text().splitlines()
    assert "StartLimitBurst=3" in lines
    assert "StartLimitIntervalSec=2708" in lines


def test_templates_hold_no_number() -> None:
    """Every figure is in the plan or a default; file modes and what a format itself asks for are all that is
    left.
    """
    allowed = {
        "low_mem.sh.j2": {"0", "1", "2"},
        "vllm.env.j2": set(),
        "engine.env.j2": set(),
        "supervisord.conf.j2": {"0600", "1", "077"},
        "vllm@.service.j2": {"0077", "6", "65535"},
        "vllm-watchdog@.service.j2": {"0077", "6"},
    }
    for name, numbers in allowed.items():
        text = re.sub(r"\{[{%].*?[%}]\}", "", (REPOSITORY / "templates" / name).read_text())
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("#", ";")))
        assert set(re.findall(r"(?<![A-Za-z_])\d+", text)) <= numbers, name
