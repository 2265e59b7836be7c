"""The real vllm-router, started with the unit's own command, before stub replicas on loopback
(stub_replica.py).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.quantize.support import HOST, PYTHON, REPOSITORY, include, play

SOON_S = 60
"""How long a test waits for what must come; on a busy machine everything takes longer."""

DEFAULTS = yaml.safe_load((REPOSITORY / "roles/router/defaults/main.yml").read_text())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str, method: str = "GET", body: object = None, key: str = "") -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(
        urllib.request.Request(url, data, headers, method=method), timeout=SOON_S
    ) as answer:
        text = answer.read().decode()
    return json.loads(text) if text[:1] in "{[" else text


def wait(what: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if what():
                return
        time.sleep(0.05)
    pytest.fail("it did not come")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of the lock, and the unit and its settings as the role writes them; `path` says where
    the environment is.
    """
    folder = tmp_path_factory.mktemp("router")
    templates = REPOSITORY / "roles/router/templates"
    tasks: list[dict[str, Any]] = [
        include("python_env"),
        {
            "ansible.builtin.copy": {
                "content": "{{ python_env_paths['vllm-router'] }}",
                "dest": str(folder / "path"),
                "mode": "0644",
            }
        },
    ]
    for name in ("vllm-router.service", "router.env"):
        tasks.append(
            {
                "ansible.builtin.template": {
                    "src": str(templates / f"{name}.j2"),
                    "dest": str(folder / name),
                    "mode": "0644",
                }
            }
        )
    variables = {
        **DEFAULTS,
        "router_version": "0.1.17",
        "__router_effective_policy": DEFAULTS["router_policy"],
        "__router_environment": "/opt/vllm-router/envs/vllm-router",
        "router_workers": ["http://10.0.0.11:8000", "http://10.0.0.12:8000"],
        "python_env_name": "vllm-router",
        "python_env_version": "0.1.17",
        "python_env_lock": str(REPOSITORY / "locks/vllm-router.txt"),
        "python_env_torch_lock": "",
        "python_env_root": str(HOST),
        "python_env_python": PYTHON,
        "ansible_async_dir": str(HOST / "run/async"),
    }
    done = play(tasks, folder, variables)
    assert done.returncode == 0, done.stdout
    return folder


class Cluster:
    """Replicas by name and a router before them."""

    def __init__(self, rendered: Path, folder: Path, **seconds: float) -> None:
        self.ports = {name: free_port() for name in seconds}
        self.seconds = seconds
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in seconds:
            self.start(name)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        unit = (rendered / "vllm-router.service").read_text().replace("\\\n", " ")
        (command,) = [
            line.removeprefix("ExecStart=") for line in unit.splitlines() if line.startswith("ExecStart=")
        ]
        words = shlex.split(
            command.replace("$ROUTER_WORKERS", " ".join(self.replica(name) for name in seconds))
        )
        words[0] = f"{(rendered / 'path').read_text()}/bin/vllm-router"
        words[words.index("--port") + 1] = str(port)
        words[words.index("--prometheus-port") + 1] = str(free_port())
        with (folder / "router.log").open("w") as log:
            self.router = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        wait(lambda: self.router.poll() is not None or len(self.healthy()) == len(seconds))
        assert self.router.poll() is None, (folder / "router.log").read_text()

    def replica(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def start(self, name: str) -> None:
        arguments = [str(self.ports[name]), name, str(self.seconds[name])]
        self.processes[name] = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "stub_replica.py"), *arguments]
        )
        wait(lambda: get(f"{self.replica(name)}/health") == {})

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def workers(self) -> dict[str, dict[str, Any]]:
        names = {self.replica(name): name for name in self.ports}
        return {names[w["url"]]: w for w in get(f"{self.url}/workers")["workers"]}

    def healthy(self) -> set[str]:
        return {name for name, worker in self.workers().items() if worker["is_healthy"]}

    def ask(self, prompt: str, key: str = "") -> str:
        answer = get(f"{self.url}/v1/completions", "POST", {"model": "m", "prompt": prompt}, key)
        return str(answer["choices"][0]["text"])

    @contextlib.contextmanager
    def load(self, clients: int = 6) -> Iterator[list[str]]:
        """Clients that ask one request after the other; what each request got, an error as such."""
        got: list[str] = []
        ended = threading.Event()

        def client(number: int) -> None:
            while not ended.is_set():
                try:
                    got.append(self.ask(f"client {number}, request {len(got)}"))
                except (OSError, KeyError, ValueError) as error:
                    got.append(f"lost: {error}")

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield got
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        for process in (self.router, *self.processes.values()):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(rendered: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(**seconds: float) -> Cluster:
        made.append(Cluster(rendered, tmp_path, **seconds))
        return made[-1]

    yield make
    for one in made:
        one.close()


def lost(got: list[str]) -> list[str]:
    return [text for text in got if text.startswith("lost")]


def more(got: list[str], name: str) -> Callable[[], bool]:
    """Whether ten requests more than now were answered by this replica."""
    now = got.count(name)
    return lambda: got.count(name) >= now + 10


@pytest.mark.engine
def test_both_replicas_get_requests_with_the_clients_own_key(cluster: Callable[..., Cluster]) -> None:
    two = cluster(a=0.05, b=0.05)
    with two.load() as got:
        wait(more(got, "a"))
        wait(more(got, "b"))
    assert lost(got) == []
    assert two.ask("x", key="of-the-client").split(maxsplit=1)[1] == "Bearer of-the-client"
    assert get(f"{two.url}/v1/models")["data"][0]["id"] == "m"


@pytest.mark.engine
def test_readiness_is_whether_there_is_a_replica_to_send_to(cluster: Callable[..., Cluster]) -> None:
    """What the gateway's /healthz says: 200, and 503 where nobody is left; /health is 200 in both cases."""
    two = cluster(a=0, b=0)

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{two.url}{path}", timeout=SOON_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert (status("/readiness"), status("/health")) == (200, 200)
    two.kill("a")
    wait(lambda: two.healthy() == {"b"})
    assert status("/readiness") == 200
    two.kill("b")
    wait(lambda: two.healthy() == set())
    assert status("/readiness") == 503
    two.start("a")
    wait(lambda: status("/readiness") == 200)


@pytest.mark.engine
def test_a_replica_that_dies_under_load_is_out_and_comes_back_and_no_request_is_lost(
    cluster: Callable[..., Cluster],
) -> None:
    two = cluster(a=0.1, b=0.1)
    with two.load() as got:
        wait(more(got, "a"))
        two.kill("a")  # with requests in it
        wait(lambda: two.healthy() == {"b"})
        wait(more(got, "b"))
        two.start("a")
        wait(lambda: two.healthy() == {"a", "b"})
        wait(more(got, "a"))
    assert lost(got) == []


def test_a_dead_replica_is_out_within_seconds_by_the_settings() -> None:
    """Two looks that are refused; one that hangs is given its time on top."""
    refused = DEFAULTS["router_health_failures"] * DEFAULTS["router_health_interval_s"]
    assert refused <= 5
    assert refused + DEFAULTS["router_health_failures"] * DEFAULTS["router_health_timeout_s"] <= 15


@pytest.mark.engine
def test_a_slow_replica_gets_less(cluster: Callable[..., Cluster]) -> None:
    two = cluster(slow=1.0, quick=0.1)
    with two.load() as got:
        wait(lambda: len(got) >= 60)
    assert got.count("quick") > 2 * got.count("slow") > 0


@pytest.mark.engine
def test_the_inventorys_list_reaches_a_running_router_and_what_is_open_ends(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    three = cluster(a=0.3, b=0.3, c=0.3)
    wanted = {
        "router_workers": [three.replica("a"), three.replica("b")],
        "router_port": int(three.url.rsplit(":", 1)[1]),
    }
    with three.load() as got:
        wait(more(got, "c"))
        done = play(
            [include("router", tasks_from="workers")],
            tmp_path,
            {**wanted, "ansible_python_interpreter": sys.executable},
        )
        assert done.returncode == 0, done.stdout
        assert "changed=1" in done.stdout
        assert set(three.workers()) == {"a", "b"}
        wait(more(got, "a"))
        now = got.count("c")
        wait(more(got, "b"))
        assert got.count("c") == now
        wanted["router_workers"] = [three.replica(name) for name in "abc"]
        done = play(
            [include("router", tasks_from="workers")],
            tmp_path,
            {**wanted, "ansible_python_interpreter": sys.executable},
        )
        assert done.returncode == 0, done.stdout
        wait(more(got, "c"))
    assert lost(got) == []


@pytest.mark.engine
def test_a_stop_ends_what_is_open(cluster: Callable[..., Cluster]) -> None:
    two = cluster(a=2.0, b=2.0)
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(two.ask("x")))
    thread.start()
    wait(lambda: sum(worker["load"] for worker in two.workers().values()) == 1)
    two.router.terminate()
    thread.join()
    assert got in (["a"], ["b"])
    assert two.router.wait(SOON_S) == 0


@pytest.mark.engine
def test_it_starts_with_a_dead_replica_and_without_any_it_ends_to_be_tried_again(
    cluster: Callable[..., Cluster],
) -> None:
    two = cluster(a=0.05, b=0.05)
    words = list(two.router.args) if isinstance(two.router.args, list) else []
    two.kill("b")
    two.router.kill()
    two.router.wait()
    two.router = subprocess.Popen(words)
    wait(lambda: two.healthy() == {"a"})
    assert two.ask("x") == "a"
    two.kill("a")
    two.router.kill()
    two.router.wait()
    two.router = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert two.router.wait(SOON_S) != 0


@pytest.mark.engine
def test_the_unit_as_it_was_last_reviewed(rendered: Path) -> None:
    """After a wanted change copy the file that is named below, and read the diff."""
    golden = Path(__file__).parent / "golden/vllm-router.service"
    assert (rendered / "vllm-router.service").read_text() == golden.read_text(), (
        f"cp {rendered}/vllm-router.service {golden}"
    )
    assert (rendered / "router.env").read_text().splitlines()[
        -1
    ] == "ROUTER_WORKERS='http://10.0.0.11:8000 http://10.0.0.12:8000'"


@pytest.mark.engine
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_the_units_exposure_small(rendered: Path) -> None:
    unit = str(rendered / "vllm-router.service")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=17", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


def test_preflight_refuses_in_one_line_each(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({"router_workers": []}, "router_workers is []: list each replica once, as http://host:port"),
        "no port": ({"router_workers": ["http://10.0.0.11"]}, "list each replica once, as http://host:port"),
        "twice": ({"router_workers": ["http://a:1", "http://a:1"]}, "list each replica once"),
        "everywhere": (
            {"router_workers": ["http://a:1"], "router_host": "0.0.0.0"},
            "router_host is 0.0.0.0: who reaches the router may",
        ),
        "no systemd": ({"router_workers": ["http://a:1"]}, "the router is a systemd unit"),
    }
    tasks: list[dict[str, Any]] = []
    for name, (variables, _) in cases.items():
        said = {
            "ansible.builtin.copy": {
                "content": "{{ ansible_failed_result.msg }}",
                "dest": str(tmp_path / name),
                "mode": "0644",
            }
        }
        tasks.append({"block": [include("router", variables, tasks_from="preflight")], "rescue": [said]})
    done = play(
        [{"ansible.builtin.set_fact": {"ansible_facts": {"service_mgr": "supervisor"}}}, *tasks], tmp_path
    )
    assert done.returncode == 0, done.stdout
    for name, (_, wanted) in cases.items():
        assert wanted in (tmp_path / name).read_text()
