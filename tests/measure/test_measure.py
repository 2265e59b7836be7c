"""`lowmem measure` against a fake engine: what it starts, stops, reads and decides."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.schema import Receipt
from lowmem.service.process import base_url


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
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(deployed) in " ".join(p.info["cmdline"] or []) and "serve" in p.info["cmdline"]
    ]
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
        ([], "one of --start LAUNCHER, --serve or --url URL is needed, none given"),
        (
            ["--serve", "--clients", "8,none"],
            (
                "--clients 8,none: a comma-separated list of whole numbers of at least 1 is wanted, such as"
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
        (["--host", "::", "--port", "8001"], "http://127.0.0.1:8001"),
        (["--port", "8000", "--port=8001"], "http://127.0.0.1:8001"),
        (["--host=10.0.0.5", "--port=9"], "http://10.0.0.5:9"),
    ],
)
def test_the_service_is_asked_where_its_last_arguments_put_it(words: list[str], url: str) -> None:
    assert base_url(words) == url
