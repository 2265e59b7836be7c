"""The watchdog's judgement, with a server and a clock that the test holds."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.schema import Plan
from lowmem.service.server import VllmServer
from lowmem.service.watchdog import ServerLook, Watch, fruitless_limit_s, silence_limit_s

PLAN = Path(__file__).parents[1] / "ansible/files/plan.json"


class Played:
    """A server whose answers the test sets."""

    def __init__(self) -> None:
        self.now: tuple[str, ...] | None = ("0",)
        self.running = False
        self.answer: Any = "tokens"
        self.asked = 0
        self.given: float | None = None

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        return self.now

    def busy(self) -> bool:
        return self.running

    def tokens(self) -> float | None:
        return self.given

    def complete(self, timeout_s: float) -> Any:
        self.asked += 1
        return self.answer


@pytest.fixture
def server() -> Played:
    return Played()


@pytest.fixture
def serving(server: Played) -> Watch:
    watch = Watch(server, silence_s=100, start_s=300)
    assert watch.look(0) == "serving"
    assert server.asked == 1
    return watch


def test_a_busy_engine_is_never_asked_and_never_ended(server: Played, serving: Watch) -> None:
    """Also through a prompt that takes ten times the limit: each step of it moves a figure."""
    server.running, server.answer = True, "nothing"
    for step in range(1, 200):
        server.now = (str(step),)
        assert serving.look(step * 5.0) == "serving"
    assert server.asked == 1


def test_a_busy_engine_that_stands_still_is_hung_at_the_limit(server: Played, serving: Watch) -> None:
    server.running = True
    assert serving.look(99.9) == "silent"
    assert serving.look(100) == "hung"
    assert server.asked == 1


def test_an_engine_that_works_and_gives_nobody_a_token_is_ended(server: Played, serving: Watch) -> None:
    """Its figures move for ever: it computes the same requests again and again."""
    server.running, server.given, serving.fruitless_s = True, 7.0, 150
    for now in range(10, 160, 10):
        server.now = (str(now),)
        assert serving.look(float(now)) == "serving"
    server.now = ("still moving",)
    assert serving.look(160) == "fruitless"
    assert server.asked == 1
    assert ServerLook(serving).trouble(160) == "", "the figures stand, and the limit of silence counts again"
    server.now = ("moving",)
    assert ServerLook(serving).trouble(161) == "no token to anybody for 150 s, though the engine works"


def test_one_token_to_anybody_or_nothing_owed_is_enough(server: Played, serving: Watch) -> None:
    server.running, server.given, serving.fruitless_s = True, 7.0, 150
    for now, given in ((100, 7.0), (149, 8.0), (290, 8.0), (295, None), (440, 8.0)):
        server.now, server.given = (str(now),), given
        assert serving.look(float(now)) == "serving"


def test_an_idle_engine_is_asked_now_and_then(server: Played, serving: Watch) -> None:
    assert [serving.look(t) for t in (10.0, 20.0, 25.0, 30.0, 50.0)] == [
        "silent",
        "silent",
        "serving",
        "silent",
        "serving",
    ]
    assert server.asked == 3


def test_an_idle_engine_that_does_not_answer_is_hung(server: Played, serving: Watch) -> None:
    server.answer = "nothing"
    assert [serving.look(t) for t in (30.0, 60.0, 90.0, 120.0)] == ["silent", "silent", "silent", "hung"]


def test_an_api_server_that_does_not_answer_is_hung_too(server: Played, serving: Watch) -> None:
    server.now, server.answer = (), "nothing"
    assert [serving.look(t) for t in (50.0, 100.0)] == ["silent", "hung"]


def test_a_start_has_its_own_time(server: Played) -> None:
    watch = Watch(server, silence_s=100, start_s=300)
    server.now = None
    assert [watch.look(t) for t in (0.0, 150.0, 299.0)] == ["starting"] * 3
    server.now, server.answer = ("0",), "nothing"
    assert watch.look(299.5) == "starting"
    assert watch.look(300) == "never ready"
    watch.ended(300)
    assert watch.look(599) == "starting"


def test_a_restart_by_somebody_else_is_a_start(server: Played, serving: Watch) -> None:
    server.now = None
    assert serving.look(1000) == "starting"
    assert serving.look(1299) == "starting"
    server.now = ("0",)
    assert serving.look(1299.5) == "serving"


def test_a_rotated_key_is_no_hang(server: Played, serving: Watch) -> None:
    server.answer = "refused"
    assert [serving.look(t) for t in (50.0, 100.0, 150.0, 1000.0)] == ["serving"] * 4
    assert serving.remark == "the server refuses this key or model: its engine cannot be judged"


def test_the_limit_is_what_a_sound_engine_was_seen_to_need() -> None:
    assert silence_limit_s(planned()) == 180


def test_a_plan_with_a_longer_limit_for_the_first_token_waits_as_long() -> None:
    assert (
        silence_limit_s(planned(limits={"memory_bytes": 1, "tpot_p99_ms": 1, "ttft_p99_ms": 600_000})) == 600
    )


def test_the_longest_prompt_has_ten_times_its_planned_time() -> None:
    latency = {"decode_floor": 1, "decode_expected": 1, "prefill_floor": 1, "prefill_expected": 500}
    load = {"clients": 1, "input_tokens": 1024, "output_tokens": 1}
    assert fruitless_limit_s(planned(latency_ms=latency, load=load, max_model_len=4096), 180) == 200


def planned(**changes: Any) -> Plan:
    return Plan.model_validate_json(json.dumps(json.loads(PLAN.read_text()) | changes))


METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 120.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 30.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 9.0
vllm:admission_rejections_total{engine="0",model_name="m"} 44.0
http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 7.0
"""


class Handler(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.reply(METRICS)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        ok = self.headers["Authorization"] == "Bearer sk-2"
        self.reply(json.dumps({"usage": {"completion_tokens": 1}}), self.status if ok else 401)

    def reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def real(tmp_path: Path) -> Iterator[VllmServer]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    (tmp_path / "vllm.env").write_text("VLLM_API_KEY=sk-2\n")
    deploy = {"model_path": "/m", "served_model_name": "m", "host": "0.0.0.0", "port": http.server_port}
    yield VllmServer(planned(deploy=deploy), tmp_path / "vllm.env")
    http.shutdown()
    http.server_close()
    Handler.status = 200


def test_only_what_the_engine_says_is_a_sign(real: VllmServer) -> None:
    assert real.figures(5) == ("2.0", "5.0", "0.25", "120.0", "30.0", "9.0")
    assert real.busy()
    assert real.tokens() == 30.0


def test_answers_are_told_apart(real: VllmServer, tmp_path: Path) -> None:
    assert real.complete(5) == "tokens"
    Handler.status = 500
    assert real.complete(5) == "nothing"
    Handler.status = 429  # this key has too many open requests, whatever the engine does
    assert real.complete(5) == "nothing"
    (tmp_path / "vllm.env").write_text("VLLM_API_KEY=sk-1\n")
    assert real.complete(5) == "refused"


def test_nobody_listening_is_a_start(tmp_path: Path) -> None:
    deploy = {"model_path": "/m", "served_model_name": "m", "port": 1}
    server = VllmServer(planned(deploy=deploy), tmp_path / "vllm.env")
    assert server.figures(1) is None
    assert server.processes() == []


@pytest.mark.parametrize(
    ("plan", "arguments", "said"),
    [
        (None, [], "lowmem: --plan {path}: No such file or directory"),
        ("{}", [], "lowmem: --plan {path}: profile: Field required (write it with `lowmem plan --json`)"),
        (
            "as on a host, undeployed",
            [],
            "lowmem: --plan {path} names no port and model: give the plan.json of a deployment",
        ),
        ("as on a host", ["--silence-s", "-1"], "lowmem: --silence-s -1 must be 0 (from the plan) or more"),
    ],
)
def test_bad_input_is_one_line(plan: str | None, arguments: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if plan == "as on a host":
        path.write_text(PLAN.read_text())
    elif plan == "as on a host, undeployed":
        path.write_text(json.dumps(json.loads(PLAN.read_text()) | {"deploy": None}))
    elif plan is not None:
        path.write_text(plan)
    done = CliRunner().invoke(app, ["watch", "--plan", str(path), "--env-file", os.devnull, *arguments])
    assert done.exit_code == 1
    assert done.stderr.strip() == said.format(path=path)
