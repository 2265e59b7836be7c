"""What the role renders: literal files, and legal for the programs that read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import GOLDEN, REPOSITORY

FILES = sorted(
    path.name.removesuffix(".j2") for path in (REPOSITORY / "roles/monitoring/templates").glob("*.j2")
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_golden(rendered: dict[str, Path], kind: str, name: str) -> None:
    """After a wanted change: LOWMEM_GOLDEN=write .lowmem/venv/bin/pytest tests/monitoring, and
    read the diff.
    """
    assert (rendered[kind] / name).read_text() == (GOLDEN / kind / name).read_text()


def test_the_golden_folder_holds_nothing_else() -> None:
    assert {path.name for folder in GOLDEN.iterdir() for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_prometheus_takes_the_rules_and_the_configuration(
    rendered: dict[str, Path], promtool: Any, kind: str, tmp_path: Path
) -> None:
    for name in ("rules", "targets"):
        (tmp_path / name).mkdir()
    for name in ("host", "vllm"):
        shutil.copy(rendered[kind] / f"{name}.rules.yml", tmp_path / "rules" / f"{name}.yml")
    shutil.copy(rendered[kind] / "targets.yml", tmp_path / "targets/vllm-main.yml")
    shutil.copy(rendered[kind] / "targets-gpu.yml", tmp_path / "targets/gpu.yml")
    shutil.copy(rendered[kind] / "targets-gateway.yml", tmp_path / "targets/gateway-main.yml")
    config = (
        (rendered[kind] / "prometheus.yml").read_text().replace("/etc/prometheus/vllm-lowmem", str(tmp_path))
    )
    (tmp_path / "prometheus.yml").write_text(config)
    said = promtool("check", "config", tmp_path / "prometheus.yml")
    assert said.count("SUCCESS: ") == 4, said
    assert "WARNING" not in said


def test_an_alertmanager_is_optional_and_whole(rendered: dict[str, Path]) -> None:
    cpu, cuda = (yaml.safe_load((rendered[kind] / "prometheus.yml").read_text()) for kind in ("cpu", "cuda"))
    assert "alerting" not in cpu
    assert cuda["alerting"]["alertmanagers"] == [
        {
            "scheme": "https",
            "path_prefix": "/team",
            "static_configs": [{"targets": ["alerts.example.org:9093"]}],
        }
    ]
    assert (cpu["global"]["external_labels"], cuda["global"]["external_labels"]) == (
        {"host": "demo"},
        {"host": "demo", "site": "north"},
    )


def test_limits_are_the_plans(rendered: dict[str, Path]) -> None:
    def limits(kind: str) -> dict[str, str]:
        rules = [
            rule
            for group in yaml.safe_load((rendered[kind] / "vllm.rules.yml").read_text())["groups"]
            for rule in group["rules"]
        ]
        return {
            rule["record"]: rule["expr"]
            for rule in rules
            if rule.get("record", "").startswith("lowmem:limit")
        }

    assert limits("cpu") == {
        "lowmem:limit_tpot_p99_seconds": "vector(1000.0) / 1000",
        "lowmem:limit_ttft_p99_seconds": "vector(10000.0) / 1000",
        "lowmem:limit_memory_bytes": "vector(3221225472)",
    }
    assert limits("cuda") == {
        "lowmem:limit_tpot_p99_seconds": "vector(200.0) / 1000",
        "lowmem:limit_ttft_p99_seconds": "vector(2000.0) / 1000",
        "lowmem:limit_memory_bytes": "vector(21474836480)",
    }


def test_everything_listens_on_loopback(rendered: dict[str, Path]) -> None:
    text = "".join(
        (rendered["cpu"] / name).read_text()
        for name in ("prometheus.conf", "node-exporter.conf", "vllm-gpu-exporter.service")
    )
    assert re.findall(r"--(?:web\.listen-|bind-)address[= ](\S+)", text) == [
        "127.0.0.1:9090",
        "127.0.0.1:9100",
        "127.0.0.1",
    ]
    assert "--web.listen-address=[::1]:9090" in (rendered["cuda"] / "prometheus.conf").read_text()


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed (Debian package systemd)",
)
@pytest.mark.parametrize(
    "name", ["vllm-gpu-exporter.service", "vllm-host-metrics.service", "vllm-host-metrics.timer"]
)
def test_systemd_reads_the_units(rendered: dict[str, Path], name: str, tmp_path: Path) -> None:
    # a timer is looked at with its service
    for unit in ("vllm-gpu-exporter.service", "vllm-host-metrics.service", "vllm-host-metrics.timer"):
        text = (rendered["cuda"] / unit).read_text()
        (tmp_path / unit).write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "vllm-" in line] == []


RUNBOOKS = {
    rule["alert"]: rule["annotations"]["runbook"]
    for path in sorted(GOLDEN.glob("*/*.rules.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


@pytest.mark.parametrize("alert", RUNBOOKS)
def test_each_alert_names_a_runbook_that_names_it(alert: str) -> None:
    runbook = REPOSITORY / RUNBOOKS[alert]
    assert runbook.is_file()
    assert alert in runbook.read_text(), "the runbook does not say that it is for this alert"


NEW = ["kv-cache-full", "memory-over-plan", "gpu-errors", "gpu-throttled", "swap-in-use", "monitoring-blind"]


@pytest.mark.parametrize("name", NEW)
def test_a_runbook_has_its_four_parts_in_order(name: str) -> None:
    text = (REPOSITORY / f"docs/runbooks/{name}.md").read_text()
    assert re.findall(r"^\*\*([^*]+)\.\*\*", text, re.MULTILINE) == [
        "Symptom",
        "What to run",
        "What it prints",
        "What to do",
    ]
    assert "```bash" in text


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("*/*.rules.yml")), ids=lambda path: f"{path.parent.name} {path.stem}"
)
def test_each_alert_says_how_grave_it_is(path: Path) -> None:
    for group in yaml.safe_load(path.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
                assert rule["annotations"]["summary"].endswith("."), rule["alert"]
