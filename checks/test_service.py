"""The service runs as its own user, keeps its secret, and comes back when it is killed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest


@pytest.fixture
def owner(deployment: Any) -> str:
    """Who the environment file, and so the service, belongs to."""
    return str(deployment.host.file(deployment.path("etc/vllm.env")).user)


@pytest.fixture
def key(deployment: Any) -> str:
    lines = deployment.read("etc/vllm.env").splitlines()
    return next(line.partition("=")[2].strip("'\"") for line in lines if line.startswith("VLLM_API_KEY="))


def test_the_manager_says_it_runs(deployment: Any) -> None:
    supervisor = deployment.path("etc/supervisord.conf")
    if deployment.host.file(supervisor).exists:
        state = deployment.host.run(
            f"{deployment.environment}/bin/supervisorctl -c {supervisor} status vllm"
        ).stdout
        # STARTING: it answers already, and has not yet run for as long as the supervisor wants to see
        assert state.split()[1:2] in (["RUNNING"], ["STARTING"]), state
    else:
        service = deployment.host.service(deployment.unit())
        assert (service.is_running, service.is_enabled) == (True, True)


def test_every_process_belongs_to_the_services_user(deployment: Any, owner: str) -> None:
    processes = deployment.processes()["processes"]
    assert {p["user"] for p in processes} == {owner}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("etc/vllm.env", "0o600"),
        ("current/low_mem.sh", "0o755"),
        ("current/plan.json", "0o644"),
        ("cache", "0o700"),
    ],
)
def test_modes(deployment: Any, name: str, mode: str) -> None:
    assert oct(deployment.host.file(deployment.path(name)).mode) == mode


def test_nobody_but_the_owner_writes_where_the_logs_are_opened(deployment: Any) -> None:
    """systemd opens the log as root, so the folder is root's; a supervisor opens it as its own user."""
    log = deployment.host.file(deployment.path("log"))
    if deployment.host.file(deployment.path("etc/supervisord.conf")).exists:
        assert oct(log.mode) == "0o700"
    else:
        assert (oct(log.mode), log.user) == ("0o750", "root")


def test_the_model_is_readable_by_the_service_and_writable_by_its_owner_only(deployment: Any) -> None:
    found = deployment.host.check_output("find %s -perm /022 -print", deployment.deploy.model_path)
    assert found == "", "writable by group or others"


def test_the_key_is_in_no_argument_list(deployment: Any, key: str) -> None:
    assert [
        p["pid"] for p in deployment.processes()["processes"] if any(key in word for word in p["argv"])
    ] == []


def test_the_key_is_in_no_environment(deployment: Any, key: str) -> None:
    holders = [p["pid"] for p in deployment.processes()["processes"] if key in deployment.environ(p["pid"])]
    assert holders == []


def test_the_log_has_no_key(deployment: Any, key: str) -> None:
    assert key not in deployment.read("log/vllm.log")


@pytest.mark.disruptive
def test_it_answers_again_after_its_engine_was_killed(deployment: Any) -> None:
    before = deployment.processes()["processes"]
    engine = next(p["pid"] for p in before if any("EngineCore" in word for word in p["argv"]))
    deployment.host.run_expect([0], f"kill -KILL {engine}")
    old = {(p["pid"], p["started"]) for p in before}
    deadline = time.monotonic() + deployment.plan.service.timeout_start_s
    body = {"model": deployment.deploy.served_model_name, "prompt": "Hello", "max_tokens": 2}
    answered = False
    while not answered and time.monotonic() < deadline:
        time.sleep(1)
        now = {(p["pid"], p["started"]) for p in deployment.processes()["processes"]}
        answered = bool(now) and not now & old and deployment.http("/v1/completions", body)[0] == 200
    assert answered, f"no completion within {deployment.plan.service.timeout_start_s} s of the kill"
    running = json.loads(
        deployment.python(
            "import psutil, json; print(json.dumps([(p.pid, p.create_time()) for p in"
            " psutil.process_iter()]))"
        )
    )
    assert sorted(old & {(pid, started) for pid, started in running}) == [], (
        "processes of the killed engine are still there"
    )
