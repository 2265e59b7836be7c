"""The modules that look at a host and wait for an answer, against small stand-ins with literal answers."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lowmem.service import api_keys

from .plugin import load

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "sk-test-0123456789abcdef"


# on a host it lies among Ansible's own module utilities
sys.modules["ansible.module_utils.api_keys"] = api_keys

host_report = load("modules/host_report.py")
vllm_ready = load("modules/vllm_ready.py")
controller_wheel = load("action/controller_wheel.py")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(
        "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nSwapTotal: 50 kB\nSwapFree: 50"
        " kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n/swapfile file 2097148 0 -2\n")
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/vm/swappiness").write_text("60\n")
    return tmp_path


def test_memory_without_a_limit(proc: Path) -> None:
    assert host_report.memory(proc, proc) == {
        "total_bytes": 1_024_000,
        "available_bytes": 409_600,
        "swap_total_bytes": 51_200,
    }


def test_memory_within_a_control_group(proc: Path) -> None:
    (proc / "memory.max").write_text("500000\n")
    (proc / "memory.current").write_text("200000\n")
    assert host_report.memory(proc, proc) == {
        "total_bytes": 500_000,
        "available_bytes": 300_000,
        "swap_total_bytes": 51_200,
    }


def test_memory_in_an_unlimited_control_group(proc: Path) -> None:
    (proc / "memory.max").write_text("max\n")
    (proc / "memory.current").write_text("200000\n")
    assert host_report.memory(proc, proc)["total_bytes"] == 1_024_000


def test_swaps_and_sysctls(proc: Path) -> None:
    assert host_report.swaps(proc) == [{"path": "/swapfile", "size_bytes": 2_147_479_552}]
    assert host_report.sysctls(("vm.swappiness",), proc) == {"vm.swappiness": 60}


def test_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    there, not_there = host_report.disk(str(tmp_path)), host_report.disk(str(tmp_path / "a/b/c"))
    assert (there["exists"], not_there["exists"]) == (True, False)
    assert there["total_bytes"] == not_there["total_bytes"] > 0


def test_a_listener_and_whose_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port, free = server.getsockname()[1], unused.getsockname()[1]
        stranger = host_report.listeners([port, free], str(tmp_path))
        mine = host_report.listeners([port], str(Path.cwd()))
    assert [entry["own"] for entry in stranger[str(port)]] == [False]
    assert stranger[str(free)] == []
    assert [entry["own"] for entry in mine[str(port)]] == [True]


def test_missing_pieces() -> None:
    assert host_report.missing_libraries(["libc.so.6", "libnothere9.so.1"]) == ["libnothere9.so.1"]
    assert host_report.missing_commands(["bash", "nothere9"]) == ["nothere9"]


class Answers(BaseHTTPRequestHandler):
    """Gives the server's `script` of (status, body), one a request, the last of them for ever; keeps what it
    was sent.
    """

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], sent))  # type: ignore[attr-defined]
        script = self.server.script  # type: ignore[attr-defined]
        status, body = script.pop(0) if len(script) > 1 else script[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


GOOD = json.dumps({"choices": [{"text": " there"}], "usage": {"completion_tokens": 4}})


def wait(
    server: HTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: list,
    state: str = "RUNNING",
    timeout_s: int = 30,
) -> dict:
    """What the module ends with, and what it says."""
    server.script = script  # type: ignore[attr-defined]
    (tmp_path / "vllm.env").write_text(f"# a comment\nHF_HUB_OFFLINE=1\nVLLM_API_KEY='{KEY}'\n")
    (tmp_path / "vllm.log").write_text("one\ntwo\nthree\n")
    ended: dict[str, Any] = {}

    class Ended(Exception):
        pass

    class Module:
        check_mode = False
        params: ClassVar[dict[str, Any]] = {
            "url": f"http://127.0.0.1:{server.server_address[1]}",
            "model": "m",
            "env_file": str(tmp_path / "vllm.env"),
            "timeout_s": timeout_s,
            "state_command": ["echo", "vllm", state],
            "failed_states": ["FATAL", "failed"],
            "log_file": str(tmp_path / "vllm.log"),
            "log_lines": 2,
        }

        def exit_json(self, **result: Any) -> None:
            ended.update(result, failed=False)
            raise Ended

        def fail_json(self, **result: Any) -> None:
            ended.update(result, failed=True)
            raise Ended

    monkeypatch.setattr(vllm_ready, "AnsibleModule", lambda **_: Module())
    monkeypatch.setattr(vllm_ready, "PAUSE_S", 0.01)
    with pytest.raises(Ended):
        vllm_ready.main()
    return ended


def test_ready_is_a_completion_with_the_key(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = wait(server, tmp_path, monkeypatch, [(503, ""), (500, "engine is dead"), (200, GOOD)])
    assert ended["failed"] is False
    path, authorization, sent = server.seen[-1]  # type: ignore[attr-defined]
    assert (path, authorization) == ("/v1/completions", f"Bearer {KEY}")
    assert (sent["model"], sent["max_tokens"]) == ("m", 4)
    assert len(server.seen) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ([(401, "")], "RUNNING", "does not take this deployment's API key"),
        ([(404, "")], "RUNNING", "does not serve this model"),
        ([(503, "")], "FATAL", "the service manager has given up on it (vllm FATAL)"),
        ([(500, "")], "failed", "the service manager has given up on it (vllm failed)"),
    ],
)
def test_what_waiting_cannot_mend_ends_at_once(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: list, state: str, words: str
) -> None:
    ended = wait(server, tmp_path, monkeypatch, script, state)
    assert ended["failed"] is True
    assert words in ended["msg"]
    assert ended["log_tail"] == ["two", "three"]
    assert len(server.seen) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("body", ["not JSON", "{}", json.dumps({"usage": {"completion_tokens": 0}})])
def test_an_answer_without_tokens_is_none(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    ended = wait(server, tmp_path, monkeypatch, [(200, body)], timeout_s=1)
    assert ended["failed"] is True
    assert ended["msg"].startswith(
        "vLLM does not answer a completion: waited 1 s, the last attempt ended with: http://127.0.0.1:"
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "source/little").mkdir(parents=True)
    (tmp_path / "source/pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "little"\nversion = "1.0"\nrequires-python = ">=3.11"\n'
    )
    (tmp_path / "source/little/__init__.py").write_text("")
    return tmp_path / "source"


def test_a_wheels_path_changes_exactly_when_its_source_does(project: Path, tmp_path: Path) -> None:
    first, built = controller_wheel.build(project, tmp_path / "dist")
    assert (first.name, built) == ("little-1.0-py3-none-any.whl", True)
    (project / "notes.txt").write_text("not part of the wheel")
    assert controller_wheel.build(project, tmp_path / "dist") == (first, False)
    (project / "little/__init__.py").write_text("x = 1\n")
    second, built = controller_wheel.build(project, tmp_path / "dist")
    assert (built, second != first, second.parent.parent) == (True, True, first.parent.parent)
    assert not list((tmp_path / "dist").glob(".*")), "scratch folders are gone"


def test_of_several_that_ask_at_once_one_builds_the_wheel(project: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: controller_wheel.build(project, tmp_path / "dist"), range(4)))
    assert len({wheel for wheel, _ in answers}) == 1
    assert [built for _, built in answers].count(True) == 1


def test_a_wheel_that_cannot_be_built_says_why(project: Path, tmp_path: Path) -> None:
    (project / "pyproject.toml").write_text("[project\n")
    with pytest.raises(RuntimeError, match=r"\S"):
        controller_wheel.build(project, tmp_path / "dist")
    assert not list((tmp_path / "dist").glob(".*"))
