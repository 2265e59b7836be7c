"""The demo's deployment as the faults see it: its processes, a client, and a second watchdog with a limit
short enough for a test.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from .hold import Hold
from .ledger import Client
from .node import UNIT, WATCHDOG, Node, connect, run_there

REPOSITORY = Path(__file__).resolve().parents[2]
# checkouts that are tested side by side share the loopback
PORT = int(os.environ.get("LOWMEM_SECOND_PORT", "18994"))


@dataclass(frozen=True)
class Service:
    """A deployed server under a supervisor."""

    root: Path
    client: Client

    @property
    def environment(self) -> Path:
        return (self.root / "current/env").resolve()

    def control(self, *words: str) -> str:
        command = [
            str(self.environment / "bin/supervisorctl"),
            "-c",
            str(self.root / "etc/supervisord.conf"),
            *words,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def family(self) -> dict[str, psutil.Process]:
        """server, engine and worker of the server that runs now."""
        supervisor = psutil.Process(int((self.root / "run/supervisord.pid").read_text()))
        [server] = [child for child in supervisor.children() if "watch" not in child.cmdline()]
        named = {process.name(): process for process in server.children(recursive=True)}
        return {"server": server, "engine": named["VLLM::EngineCore"], "worker": named["VLLM::Worker"]}

    def log(self) -> str:
        return (self.root / "log/vllm.log").read_text(errors="replace")


@pytest.fixture
def service(deployed: Any) -> Service:
    """The demo's own, answering."""
    client = Client(deployed.url, deployed.key, deployed.plan["deploy"]["served_model_name"])
    client.recovery_s(time.monotonic())
    return Service(deployed.root, client)


def playbook_command(root: Path, name: str) -> list[str]:
    program = str(Path(sys.executable).parent / "ansible-playbook")
    return [
        program,
        name,
        "-e",
        f"lowmem_root={root}",
        "-e",
        f"lowmem_port={PORT}",
        "-e",
        "vllm_service_settle_s=20",
    ]


def arguments(root: Path) -> list[str]:
    return [*playbook_command(root, "site.yml"), "--skip-tags", "verify"]


def kill_before(task: str, command: list[str], folder: Path) -> None:
    """Run a play and kill it before this task; `folder` is empty."""
    hold = Hold(task, folder)
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | hold.environment, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as play:  # fmt: skip
        hold.wait(play)
        os.killpg(play.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def root(deployed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the root of a second deployment beside the demo's, with a copy of its checkpoint.

    If root runs the tests, its log lies on a small tmpfs.
    """
    root = tmp_path_factory.mktemp("second") / "host"
    (root / "log").mkdir(parents=True)
    (root / "log").chmod(0o700)
    (root / "envs").symlink_to(deployed.root / "envs")
    shutil.copytree(deployed.root / "models", root / "models")
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", root / "log"]
        ).returncode
    )
    yield root
    control = next((deployed.root / "envs").glob("vllm-*/bin/supervisorctl"))
    if (root / "etc/supervisord.conf").exists():
        subprocess.run([control, "-c", root / "etc/supervisord.conf", "shutdown"], check=False)
    deadline = time.monotonic() + 90
    while (root / "run/supervisord.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    if mounted and (root / "log").is_mount():
        subprocess.run(["umount", root / "log"], check=True)


@pytest.fixture(scope="session")
def killed_play(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The first play on this root, killed with SIGKILL when its release was whole and not yet the current
    one.
    """
    kill_before("vllm_service : Switch to the release", arguments(root), tmp_path_factory.mktemp("hold"))
    return {path.name: path.read_text() for path in (root / "etc").iterdir()}


@pytest.fixture(scope="session")
def second(root: Path, killed_play: dict[str, str], deployed: Any) -> Service:
    """Deployed by the play that came after the killed one. Its server counts as started before it answers
    (settle_s), so that one fault after another is no series of failed starts.
    """
    done = subprocess.run(arguments(root), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    [key] = re.findall(r"^VLLM_API_KEY=(.+)$", (root / "etc/vllm.env").read_text(), re.MULTILINE)
    return Service(
        root, Client(f"http://127.0.0.1:{PORT}", key, deployed.plan["deploy"]["served_model_name"])
    )


def none_left(processes: dict[str, psutil.Process]) -> list[psutil.Process]:
    """Those that still live, after a moment for the kernel."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout=10)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[Service, float], Any]:
    """watched(service, silence_s): a context with a watchdog of its own beside the deployment's; gives the
    path of what it says.
    """

    @contextmanager
    def start(service: Service, silence_s: float) -> Iterator[Path]:
        said = tmp_path / "watchdog.log"
        command = [service.environment / "bin/lowmem", "watch", "--plan", service.root / "etc/plan.json"]
        command += [
            "--env-file",
            service.root / "etc/vllm.env",
            "--silence-s",
            str(silence_s),
            "--every-s",
            "1",
            "--report-s",
            "10",
        ]
        with said.open("w") as stream:
            process = subprocess.Popen([str(word) for word in command], stdout=stream, stderr=stream)
        try:
            deadline = time.monotonic() + 60
            while "serving" not in said.read_text():
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.2)
            yield said
        finally:
            process.kill()
            process.wait()

    return start


@pytest.fixture(scope="session")
def systemd_host() -> Node:
    node = connect()
    # the other instance would only take the machine's time
    run_there(node.record, "systemctl stop vllm@second.service vllm-watchdog@second.service")
    return node


@pytest.fixture
def node(systemd_host: Node) -> Node:
    """Answering, and with all its starts before it."""
    systemd_host.sh(f"systemctl reset-failed {UNIT}; systemctl start --no-block {UNIT} {WATCHDOG}")
    systemd_host.until_active()
    return systemd_host
