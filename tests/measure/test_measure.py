"""`lowmem measure` against a fake engine: what it starts, stops, reads and decides."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.measure import session
from lowmem.schema import Deploy, Receipt
from lowmem.service import process
from lowmem.service.process import listening_url


def run(folder: Path, *words: str) -> tuple[int, str, Receipt | None]:
    result = CliRunner().invoke(
        app, ["measure", "--plan", str(folder / "plan.json"), "--out", str(folder / "receipt.json"), *words]
    )
    path = folder / "receipt.json"
    return (
        result.exit_code,
        result.output,
        Receipt.model_validate_json(path.read_text()) if path.exists() else None,
    )


def fake(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    monkeypatch.setenv("FAKE_VLLM", json.dumps(settings))


def test_a_started_service_is_measured_and_stopped(deployed: Path) -> None:
    code, output, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"), "--clients", "2,1")
    assert code == 0, output
    assert receipt is not None
    assert receipt.verdict == "passed"
    assert receipt.ready_s is not None
    assert [r.load.clients for r in receipt.loads] == [2, 1]
    assert [r.requests for r in receipt.loads] == [8, 4]
    assert receipt.loads[0].tpot_ms.p99 == 100.0
    assert receipt.argv[-3:] == ("/models/fake", "--port", receipt.plan.argv[-1])
    assert {t.name: t.measured_bytes for t in receipt.terms}["kv_cache"] == 268435456
    assert receipt.memory_before_bytes == (0,)
    assert receipt.memory_peak_bytes[0] > 5 * 2**20
    assert not left_running(deployed)
    assert "sk-test-1" not in (deployed / "receipt.json").read_text()


def test_a_service_over_its_latency_limit_fails_by_name(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, bench={"p99_tpot_ms": 250.5})
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings == ("latency: TPOT p99 250.5 ms at 2 clients, limit 200.0 ms",)


def test_a_service_that_does_not_start_gives_a_receipt_with_its_own_words(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(
        monkeypatch,
        fail=[
            "(EngineCore pid=7) ERROR 11-22 20:00:00 [core.py:1] ValueError: No available memory for the"
            " cache blocks. Try increasing"
        ],
    )
    code, output, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.ready_s is None
    assert receipt.loads == ()
    assert receipt.error == "ValueError: No available memory for the cache blocks. Try increasing"
    assert receipt.advice is not None
    assert receipt.advice.startswith("the budget leaves nothing for the KV cache")
    assert receipt.findings[0] == "start: the service did not become ready: the process ended"
    assert "advice: the budget leaves nothing" in output


def test_a_service_that_ignores_sigterm_is_killed_and_reported(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, stubborn=True)
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings[0].startswith("stop: still running after SIGTERM, killed: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--start", "nowhere.sh"], "--start nowhere.sh: no such file"),
        ([], "give one of --start LAUNCHER, --serve and --url URL; none was given"),
        (
            ["--serve", "--clients", "8,none"],
            (
                "--clients 8,none: give a comma-separated list of whole numbers from 1 to 100000, such as"
                " 8,1,4"
            ),
        ),
        (["--serve", "--env-file", "none.env"], "--env-file none.env: no such file"),
    ],
)
def test_bad_input_is_one_line(deployed: Path, words: list[str], line: str) -> None:
    code, output, receipt = run(deployed, *words)
    assert (code, output.strip(), receipt) == (1, f"lowmem: {line}", None)


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--host", "::", "--port", "8001"], "http://[::1]:8001"),
        (["--port", "8000", "--port=8001"], "http://127.0.0.1:8001"),
        (["--host=10.0.0.5", "--port=9"], "http://10.0.0.5:9"),
        (["--load-format", "dummy", "--host=fd00::5"], "http://[fd00::5]:8000"),
    ],
)
def test_the_service_is_asked_where_its_last_arguments_put_it(words: list[str], url: str) -> None:
    assert listening_url(None, words) == url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8003"),
        ("0.0.0.0", "http://127.0.0.1:8003"),
        ("::", "http://[::1]:8003"),
        ("::1", "http://[::1]:8003"),
        ("gpu-1.example.org", "http://gpu-1.example.org:8003"),
    ],
)
def test_a_deployment_says_where_its_own_host_reaches_it(host: str, url: str) -> None:
    deploy = Deploy(model_path="/m", served_model_name="m", host=host, port=8003)
    assert deploy.local_url == url
    assert listening_url(deploy, ()) == url
    assert listening_url(deploy, ("--port=9",)) == url.replace("8003", "9")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]",
        "127.0.0.1:8000",
        "http://127.0.0.1:0",
        "http://a:99999",
        "http://[::1:8000",
        "http://a:1/v1",
        "http://user:word@a:1",
        "ftp://a:1",
        "http://a:1?x",
        "http://:8000",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(deployed: Path, url: str) -> None:
    code, output, receipt = run(deployed, "--url", url)
    line = f"lowmem: --url {url}: give http://HOST:PORT, such as http://127.0.0.1:8000"
    assert (code, output.strip(), receipt) == (1, line, None)


def test_a_taken_port_of_ipv6_is_refused(deployed: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        code, output, receipt = run(deployed, "--serve", "--arg=--host=::1", f"--arg=--port={port}")
    url = f"http://[::1]:{port}"
    assert (code, receipt) == (1, None)
    assert f"{url}: another process listens there already: stop it, or measure it with --url {url}" in output


PHASES = {
    "before": ("start_engine", "interrupted in phase loading"),
    "loading": ("wait_ready", "interrupted in phase loading"),
    "start": ("warm_up", "interrupted in phase"),
    "load": ("drive", "interrupted in phase load:2"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_in_any_phase_leaves_a_receipt(
    phase: str, deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, finding = PHASES[phase]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lowmem.measure.session.{function}", interrupt)
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings[0].startswith(finding)
    assert receipt.verdict == "failed"
    assert not left_running(deployed)


def test_an_interrupt_while_idle_leaves_a_receipt(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.time.sleep

    def sleep(seconds: float) -> None:
        if seconds == session.IDLE_S:
            raise KeyboardInterrupt
        real(seconds)

    monkeypatch.setattr("lowmem.measure.session.time.sleep", sleep)
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings == ("interrupted in phase idle",)
    assert receipt.memory_idle_bytes == ()


def test_an_interrupt_while_stopping_leaves_a_receipt_and_no_process(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = process.Engine.stop, []

    def stop(self: process.Engine, timeout_s: float) -> list[str]:
        calls.append(timeout_s)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, 5)

    monkeypatch.setattr(process.Engine, "stop", stop)
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings == ("interrupted in phase stopping",)
    assert calls == [3.0, 0]
    assert not left_running(deployed)


@pytest.mark.parametrize(
    ("function", "finding"), [("warm_up", "start: the engine died"), ("drive", "load: the engine died")]
)
def test_an_engine_that_dies_after_it_was_ready_leaves_a_receipt(
    function: str, finding: str, deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(session, function)
    began: list[process.Engine] = []
    start = session.start_engine

    def remember(command: list[str], variables: dict[str, str], log: Path) -> process.Engine:
        began.append(start(command, variables, log))
        return began[0]

    def die(*words: object) -> object:
        began[0].process.kill()  # type: ignore[union-attr]
        began[0].process.wait()  # type: ignore[union-attr]
        for child in began[0].seen:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if function == "drive":
            raise RuntimeError("vllm bench serve gave no result")
        return real(*words)

    monkeypatch.setattr(session, "start_engine", remember)
    monkeypatch.setattr(session, function, die)
    code, _, receipt = run(deployed, "--start", str(deployed / "low_mem.sh"))
    assert code == 2
    assert receipt is not None
    assert receipt.findings[0].startswith(finding)
    assert receipt.loads == ()
    assert not left_running(deployed)


def left_running(folder: Path) -> list[psutil.Process]:
    """Servers that were started from this folder and still run."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or []) and "serve" in p.info["cmdline"]
    ]
