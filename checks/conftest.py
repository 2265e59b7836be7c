"""Checks of a deployed host, from the controller, through the Ansible inventory:

    pytest checks/ --hosts=ansible://all --ansible-inventory=inventory/demo

Every expectation is read from the plan that was deployed (`etc/plan.json` on the host); nothing is computed
again. Programs that must run on the host are run with the deployed environment's own Python, which is there
whatever else is not.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.schema import Plan, Receipt

LOG_TAIL_LINES = 25

HTTP = r"""
import json, sys, urllib.error, urllib.request
request = json.loads(sys.argv[1])
key = request["key"]
if key == "deployed":
    from lowmem.api_keys import read_keys
    key = read_keys(open(request["env_file"]).read())[""]
body = json.dumps(request["body"]).encode() if request["body"] is not None else None
call = urllib.request.Request(request["url"], data=body, headers={"Content-Type": "application/json"})
if key:
    call.add_header("Authorization", "Bearer " + key)
try:
    with urllib.request.urlopen(call, timeout=request["timeout_s"]) as answer:
        print(json.dumps([answer.status, answer.read().decode()]))
except urllib.error.HTTPError as error:
    print(json.dumps([error.code, error.read().decode()]))
except OSError as error:
    print(json.dumps([0, str(error)]))
"""

PROCESSES = r"""
import json, psutil, sys
port = int(sys.argv[1])
listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
found = {"addresses": sorted({c.laddr.ip for c in listening}), "processes": []}
for pid in {c.pid for c in listening if c.pid}:
    main = psutil.Process(pid)
    for p in [main, *main.children(recursive=True)]:
        try:
            facts = {"pid": p.pid, "main": p.pid == pid, "user": p.username(), "argv": p.cmdline()}
            facts |= {"started": p.create_time()}
        except psutil.Error:  # it ended while we looked
            continue
        found["processes"].append(facts)
print(json.dumps(found))
"""


class Deployment:
    """One deployed host: its plan and how to ask it things."""

    def __init__(self, host: Any, root: str) -> None:
        self.host = host
        self.root = root
        self.plan = Plan.model_validate_json(self.read("etc/plan.json"))
        self.environment = self.path("current/env")
        assert self.plan.deploy, f"{self.path('etc/plan.json')} is no deployment's plan"
        self.deploy = self.plan.deploy

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> str:
        file = self.host.file(self.path(name))
        assert file.exists, f"{self.path(name)} is missing on the host: was it deployed?"
        return str(file.content_string)

    def python(self, program: str, *arguments: str, timeout_s: int = 600) -> str:
        """Standard output of a program run by the deployed environment's Python on the host."""
        words = shlex.join([f"{self.environment}/bin/python", "-c", program, *arguments])
        done = self.host.run(f"timeout {timeout_s} {words}")
        assert done.rc == 0, f"exit {done.rc}: {done.stderr.strip()[-2000:] or done.stdout[-2000:]}"
        return str(done.stdout)

    def http(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        key: str | None = "deployed",
        timeout_s: int = 120,
    ) -> tuple[int, str]:
        """Status (0: no connection) and body; asked from the host itself, where the service listens."""
        request = {
            "url": f"{self.deploy.local_url}{path}", "body": body, "key": key, "timeout_s": timeout_s,
            "env_file": self.path("etc/vllm.env"),
        }  # fmt: skip
        status, text = json.loads(self.python(HTTP, json.dumps(request)))
        return status, text

    def processes(self) -> dict[str, Any]:
        """`addresses` that are listened on at the plan's port, and the `processes` of whoever listens."""
        found: dict[str, Any] = json.loads(self.python(PROCESSES, str(self.deploy.port)))
        return found

    def environ(self, pid: int) -> str:
        """What a process was started with; empty where it has ended."""
        return str(self.host.run(f"tr '\\0' '\\n' </proc/{pid}/environ").stdout)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Without the lines of answered requests, which hide the rest."""
        log = shlex.quote(self.path("log/vllm.log"))
        return str(self.host.run(f"grep -v 'HTTP/1.1. 200 OK' {log} | tail -n {lines}").stdout)

    def unit(self) -> str:
        """The systemd unit of this deployment, among those of its host."""
        launcher = shlex.quote(f"ExecStart={self.path('current/low_mem.sh')}")
        found = self.host.run(
            f"grep --files-with-matches --line-regexp --fixed-strings {launcher}"
            " /etc/systemd/system/vllm@*.service"
        )
        assert found.rc == 0, f"no unit vllm@….service of this host runs {self.path('current/low_mem.sh')}"
        return str(found.stdout.split()[0].rsplit("/", 1)[1])

    def journal_tail(self) -> str:
        if self.host.file(self.path("etc/supervisord.conf")).exists:
            return ""
        return str(self.host.run("journalctl -u 'vllm@*' -n 20 --no-pager").stdout)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowmem")
    group.addoption(
        "--lowmem-root",
        help=(
            "folder of the deployment on the host (default: lowmem_root of the inventory, or"
            " /opt/vllm-lowmem)"
        ),
    )
    group.addoption("--lowmem-become", action="store_true", help="become root on the host, as the deploy did")
    group.addoption(
        "--measurement",
        type=Path,
        help="receipt of `lowmem measure` for this deployment; without it the load is driven here",
    )
    group.addoption(
        "--leave-running",
        action="store_true",
        help="skip the checks that kill the service to see it come back",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: kills the service")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # what a receipt calls the check: without the host, which pytest-testinfra puts among the parameters
        suite = Path(item.path).stem.removeprefix("test_")
        words = item.name.split("[")[0].removeprefix("test_").replace("_", " ")
        parameters = [
            str(v)
            for k, v in getattr(getattr(item, "callspec", None), "params", {}).items()
            if k != "_testinfra_host"
        ]
        detail = f" ({', '.join(parameters)})" if parameters else ""
        item.user_properties.append(("check", f"{suite}: {words}{detail}"))
    disruptive = [i for i in items if i.get_closest_marker("disruptive")]
    items[:] = [i for i in items if i not in disruptive] + disruptive
    if config.getoption("--leave-running"):
        for item in disruptive:
            item.add_marker(pytest.mark.skip(reason="--leave-running"))


DEPLOYMENTS: dict[str, Deployment] = {}


@pytest.fixture(scope="module")
def deployment(host: Any, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    name = str(host.backend.get_pytest_id())
    root = request.config.getoption("--lowmem-root")
    if not root:
        wanted = "msg={{ lowmem_root | default('/opt/vllm-lowmem') }}"
        root = host.ansible("debug", wanted, check=False)["msg"] if "ansible" in name else "/opt/vllm-lowmem"
    if not request.config.getoption("--lowmem-become") or host.user().name == "root":
        DEPLOYMENTS.setdefault(name, Deployment(host, root))
        yield DEPLOYMENTS[name]
        return
    with host.sudo():
        DEPLOYMENTS.setdefault(name, Deployment(host, root))
        yield DEPLOYMENTS[name]


@pytest.fixture(scope="module")
def plan(deployment: Deployment) -> Plan:
    return deployment.plan


MEASUREMENTS: dict[str, Receipt] = {}


@pytest.fixture(scope="module")
def measurement(deployment: Deployment, request: pytest.FixtureRequest) -> Receipt:
    """The load of the plan, driven against the running service; once for each host."""
    given = request.config.getoption("--measurement")
    if given:
        return Receipt.model_validate_json(given.read_text())
    if deployment.root not in MEASUREMENTS:
        out = deployment.path("run/measured.json")
        command = [
            f"{deployment.environment}/bin/lowmem", "measure", "--plan", deployment.path("etc/plan.json"),
            "--out", out,
            "--url", deployment.deploy.local_url, "--env-file", deployment.path("etc/vllm.env"),
            "--log", deployment.path("log/vllm.log"),
        ]  # fmt: skip
        done = deployment.host.run(shlex.join(command))
        assert done.rc in (0, 2), done.stderr
        MEASUREMENTS[deployment.root] = Receipt.model_validate_json(deployment.read("run/measured.json"))
    return MEASUREMENTS[deployment.root]


TOLD: set[str] = set()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """The first failed check of a host shows what the engine and its service manager said last."""
    outcome = yield
    report = outcome.get_result()
    deployment = getattr(item, "funcargs", {}).get("deployment")
    if report.failed and isinstance(deployment, Deployment) and deployment.root not in TOLD:
        TOLD.add(deployment.root)
        report.sections.append(("last lines of log/vllm.log", deployment.log_tail()))
        if journal := deployment.journal_tail():
            report.sections.append(("journalctl -u 'vllm@*'", journal))
