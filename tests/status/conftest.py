"""A deployment's plan, what a real server said of itself, and a stub of its HTTP side that says it again."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.schema import Plan

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "tests/data/metrics"


def recorded(name: str) -> str:
    """/metrics of vLLM 0.32 on a CPU, as it was; families that nothing here reads are left out."""
    return (METRICS / f"vllm_0.32_cpu_{name}.txt").read_text()


def demo_plan(port: int = 8000) -> Plan:
    plan = Plan.model_validate_json((ROOT / "tests/ansible/files/plan.json").read_text())
    assert plan.deploy is not None
    return plan.model_copy(
        update={"deploy": plan.deploy.model_copy(update={"port": port, "host": "127.0.0.1"})}
    )


class StubServer:
    """Answers each path with what `answers` says: a text, a status, or a text for each request in turn, the
    last one again and again.
    """

    def __init__(self) -> None:
        self.answers: dict[str, str | int | list[str]] = {"/health": "", "/metrics": recorded("probes")}
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = stub.answers.get(self.path, 404)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                self.wfile.write(answer.encode() if isinstance(answer, str) else b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()


@pytest.fixture
def plan_file(server: StubServer, tmp_path: Path) -> Path:
    """A release's plan.json whose server is the stub."""
    path = tmp_path / "releases/vllm-0.32.0-demo_cpu-0123456789ab/plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(demo_plan(server.port).model_dump_json())
    return path
