"""Every variable of the role: a bad value ends in one line that names it, before the host is touched.

One ansible-playbook run for all cases."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import HERE, REPOSITORY

INT = "cannot be converted to an int"
PATH = "it must be an absolute path of letters, digits and _ . / + @ -."

# variable -> (bad value, words of the answer)
BAD: dict[str, list[tuple[Any, str]]] = {
    "monitoring_instance": [("a b", "lowmem_instance is a b: it must be 1 to 32 letters, digits or _")],
    "monitoring_cards": [([0, 1], "monitoring_cards is [0, 1]: the plan of profile demo_cpu is for no card")],
    "monitoring_take_over": [("perhaps", "is not a valid boolean")],
    "monitoring_bind": [
        (
            "localhost",
            "monitoring_bind is localhost: it must be an IP address of this host, such as 127.0.0.1.",
        )
    ],
    "monitoring_prometheus_port": [
        (0, "monitoring_prometheus_port is 0: it must be a TCP port, 1 to 65535."),
        (65536, "monitoring_prometheus_port is 65536: it must be a TCP port, 1 to 65535."),
        ("http", INT),
        (8000, "two of them are the same port; give each its own."),
    ],
    "monitoring_node_exporter_port": [(-1, "monitoring_node_exporter_port is -1: it must be a TCP port")],
    "monitoring_gpu_exporter_port": [(9100, "two of them are the same port")],
    "monitoring_gateway_port": [
        (70000, "monitoring_gateway_port is 70000: it must be 0 to 65535 (0: no gateway).")
    ],
    "monitoring_scrape_interval_s": [(60, "monitoring_scrape_interval_s is 60: it must be 5 to 30 seconds.")],
    "monitoring_host_metrics_interval_s": [
        (1, "monitoring_host_metrics_interval_s is 1: it must be 15 to 120 seconds.")
    ],
    "monitoring_retention_days": [(0, "monitoring_retention_days is 0: it must be 1 to 3650 days.")],
    "monitoring_retention_size_gib": [(0, "monitoring_retention_size_gib is 0: it must be 1 to 100000 GiB.")],
    "monitoring_alertmanager_url": [
        (
            "ftp://alerts.example.org",
            "monitoring_alertmanager_url is ftp://alerts.example.org: it must be http:// or https://, a host",
        ),
        ("https://user:word@alerts.example.org", "it must be http:// or https://, a host"),
    ],
    "monitoring_external_labels": [
        ({"the-site": "north"}, "monitoring_external_labels has the-site: a label must be a letter or _")
    ],
    "monitoring_dashboards_path": [
        ("boards", f"boards in monitoring_certificates or monitoring_dashboards_path: {PATH}")
    ],
    "monitoring_certificates": [
        (["/my cert.pem"], f"/my cert.pem in monitoring_certificates or monitoring_dashboards_path: {PATH}")
    ],
    "monitoring_certificate_days": [(0, "monitoring_certificate_days is 0: it must be 1 to 365 days.")],
    "monitoring_disk_free_percent": [
        (100, "monitoring_disk_free_percent is 100: it must be 1 to 99 percent.")
    ],
    "monitoring_kv_cache_full_percent": [(0.95, INT)],
    "monitoring_percentile_requests": [
        (0, "monitoring_percentile_requests is 0: it must be 1 to 100000 requests.")
    ],
}
# what the operator sets by another name, or what the role finds by itself
SET_ELSEWHERE = {"monitoring_root", "monitoring_store", "monitoring_python", "monitoring_source"}
CASES = [(variable, value, words) for variable, values in BAD.items() for value, words in values]


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port that a stranger, this test, listens on."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        yield stranger.getsockname()[1]


@pytest.fixture(scope="module")
def said(
    taken: int, plans: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """Host of the inventory -> what its first failed task said; None where nothing was refused."""
    # no port of these is one that may be in use where the tests run
    free = {"monitoring_prometheus_port": 18_190, "monitoring_node_exporter_port": 18_191}
    hosts: dict[str, dict[str, Any]] = {
        f"case-{number}": {variable: value} for number, (variable, value, _) in enumerate(CASES)
    }
    hosts["good"] = {
        **free,
        "monitoring_alertmanager_url": "https://alerts.example.org:9093/team",
        "monitoring_bind": "::1",
    }
    hosts["no-systemd"] = {"case_manager": "runit"}
    hosts["other-system"] = {"case_family": "RedHat"}
    hosts["stranger"] = {**free, "monitoring_prometheus_port": taken}
    shared = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "lowmem_plan": plans["cpu"],
    }
    inventory = tmp_path_factory.mktemp("inventory") / "hosts.json"
    inventory.write_text(json.dumps({"cases": {"hosts": hosts, "vars": shared}}))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, HERE / "refusals.yml"],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORKS": "4",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    answers: dict[str, str | None] = dict.fromkeys(hosts)
    for task in report["plays"][0]["tasks"]:
        for host, result in task["hosts"].items():
            if result.get("failed") and answers[host] is None:
                # a loop says what each of its items said
                [line, *_] = [item["msg"] for item in result.get("results", [result]) if item.get("failed")]
                answers[host] = re.sub(r"^Validation of arguments failed:\n", "", line.strip())
    assert all(counts["changed"] == 0 for counts in report["stats"].values())
    return answers


def test_every_variable_has_an_entry() -> None:
    options = yaml.safe_load((REPOSITORY / "roles/monitoring/meta/argument_specs.yml").read_text())[
        "argument_specs"
    ]["main"]["options"]
    assert set(BAD) | SET_ELSEWHERE == set(options)


@pytest.mark.parametrize(
    ("number", "case"),
    [*enumerate(CASES)],
    ids=[f"{variable}={str(value)[:20]}" for variable, value, _ in CASES],
)
def test_a_bad_value_is_one_line(
    said: dict[str, str | None], number: int, case: tuple[str, Any, str]
) -> None:
    line = said[f"case-{number}"]
    assert line is not None, "it was not refused"
    assert "\n" not in line
    assert case[2] in line
    assert case[0] in line or case[0].replace("monitoring_", "lowmem_") in line


def test_good_values_pass(said: dict[str, str | None]) -> None:
    assert said["good"] is None


def test_a_system_without_systemd_is_refused(said: dict[str, str | None]) -> None:
    wanted = (
        ": role monitoring is for Debian and Ubuntu under systemd; take the host out of the group monitoring."
    )
    assert said["no-systemd"] == f"no-systemd is Debian under runit{wanted}"
    assert said["other-system"] == f"other-system is Debian under systemd{wanted}"


def test_a_port_that_a_stranger_has(said: dict[str, str | None], taken: int) -> None:
    line = said["stranger"]
    assert line is not None
    assert line.startswith(f"monitoring_prometheus_port is {taken}, and ")
    assert f"(pid {os.getpid()}) listens there already: stop it, or choose another port." in line
