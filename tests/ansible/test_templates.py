"""What the templates make of a plan: literal files, legal for the programs that read them, and exactly the plan's arguments."""

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

FILES = Path(__file__).parent / "files"
GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[2]


def render(playbook: Any, destination: Path, plan: dict[str, Any]) -> Path:
    destination.mkdir(exist_ok=True)
    variables = {"templates": str(REPOSITORY / "templates"), "destination": str(destination), "lowmem_plan": plan}
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
    return render(playbook, tmp_path_factory.mktemp("rendered") / "cuda", {**plan, "device_kind": "cuda", "service": service})


@pytest.mark.parametrize(
    "name",
    [
        "low_mem.sh",
        "engine.env",
        "vllm.env",
        "supervised.sh",
        "supervise.sh",
        "supervisord.conf",
        "vllm.service",
        "vllm-watchdog.service",
        "vllm.logrotate",
    ],
)
def test_golden(rendered: Path, name: str) -> None:
    """After a wanted change: LOWMEM_GOLDEN=write .lowmem/venv/bin/pytest tests/ansible/test_templates.py, and read the diff."""
    if os.environ.get("LOWMEM_GOLDEN") == "write":
        shutil.copyfile(rendered / name, GOLDEN / name)
    assert (rendered / name).read_text() == (GOLDEN / name).read_text()


def test_the_launchers_are_legal_bash(rendered: Path) -> None:
    for name in ("low_mem.sh", "supervised.sh", "supervise.sh"):
        subprocess.run(["bash", "-n", rendered / name], check=True)
        subprocess.run(["shellcheck", "--severity=warning", rendered / name], check=True)


def test_the_launcher_gives_exactly_the_plans_arguments(rendered: Path, plan: dict[str, Any], tmp_path: Path) -> None:
    """Run with a program in vLLM's place that writes down what it was given: quotes, blanks and dollars come through as they are."""
    probe = tmp_path / "vllm"
    probe.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$SEEN"\nenv -0 >"$SEEN.env"\n')
    probe.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VLLM_BIN": str(probe), "SEEN": str(tmp_path / "seen")}
    launcher = tmp_path / "low_mem.sh"
    launcher.write_text((rendered / "low_mem.sh").read_text().replace("/srv/vllm-lowmem/etc/vllm.env", str(rendered / "vllm.env")))
    launcher.chmod(0o755)
    shutil.copy(rendered / "engine.env", tmp_path)
    (tmp_path / "elsewhere").symlink_to(launcher)
    subprocess.run([tmp_path / "elsewhere", "--one-more", "a b"], env=environment, check=True)
    assert (tmp_path / "seen").read_text().split("\0")[:-1] == ["serve", *plan["argv"], "--one-more", "a b"]
    seen = dict(pair.split("=", 1) for pair in (tmp_path / "seen.env").read_text().split("\0")[:-1])
    assert seen["VLLM_API_KEY"] == "sk-test-0123456789abcdef"
    assert seen["LOWMEM_RELEASE"] == str(tmp_path)
    assert seen["VLLM_LOGGING_LEVEL"] == "DEBUG it's"
    assert seen["HF_HOME"] == "/srv/vllm-lowmem/cache/huggingface"
    for variable in plan["environment"]:
        assert seen[variable["name"]] == variable["value"]


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
    assert program["program:vllm"]["command"] == "/srv/vllm-lowmem/etc/supervised.sh"
    assert program["program:vllm"]["autorestart"] == "true"
    assert program["program:vllm"]["startsecs"] == "45"
    assert program["program:vllm"]["startretries"] == "3"
    assert program["unix_http_server"]["chmod"] == "0600"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian package systemd)")
def test_systemd_reads_the_unit(rendered: Path, tmp_path: Path) -> None:
    unit = tmp_path / "vllm.service"
    # the launcher's own path does not exist here
    unit.write_text((rendered / "vllm.service").read_text().replace("/srv/vllm-lowmem/etc/low_mem.sh", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "vllm.service" in line]
    assert complaints == []


def test_a_gpu_unit_may_lock_memory_and_see_its_devices(rendered: Path, rendered_cuda: Path) -> None:
    cpu, cuda = ((folder / "vllm.service").read_text().splitlines() for folder in (rendered, rendered_cuda))
    assert "LimitMEMLOCK=infinity" in cuda
    assert "DeviceAllow=char-nvidia-uvm rw" in cuda
    assert "PrivateDevices=yes" not in cuda
    assert "LimitMEMLOCK=infinity" not in cpu
    assert "PrivateDevices=yes" in cpu


def test_templates_hold_no_number() -> None:
    """Every figure is in the plan or a default; file modes and what a format itself asks for are all that is left."""
    allowed = {
        "low_mem.sh.j2": {"0"},
        "vllm.env.j2": set(),
        "engine.env.j2": set(),
        "supervisord.conf.j2": {"0600", "1", "077"},
        "vllm.service.j2": {"0077", "6"},
    }
    for name, numbers in allowed.items():
        text = re.sub(r"\{[{%].*?[%}]\}", "", (REPOSITORY / "templates" / name).read_text())
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("#", ";")))
        assert set(re.findall(r"(?<![A-Za-z_])\d+", text)) <= numbers, name
