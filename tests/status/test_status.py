"""A running server held against its plan."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.status.metrics import Histogram, Sample, parse
from lowmem.status.probe import deployed, read_samples, write_samples
from lowmem.status.status import Look, status
from lowmem.text import span

from .conftest import StubServer, demo_plan, recorded

MIB = 2**20
SLOW = Histogram(bounds=(0.5, 2.0), counts=(0, 10, 10))


def looked(at: float = 1795534600.0, **changes: object) -> Look:
    sample = parse(recorded("probes"), at)
    values: dict[str, object] = {
        "at": at,
        "state": "serving",
        "started": sample.started,
        "sample": sample,
        "memory_bytes": (2000 * MIB,),
    }
    return Look.model_validate(values | changes)


def test_a_server_within_its_limits_has_no_finding() -> None:
    seen = status(demo_plan(), looked())
    assert (seen.state, seen.findings, seen.up_since_utc) == ("serving", (), "2026-11-24T15:33:40Z")
    assert (seen.running, seen.running_most, seen.kv_tokens, seen.requests) == (0, 8, 11648, 16)
    assert (seen.memory_bytes, seen.memory_limit_bytes, seen.memory_plan_bytes) == (
        (2000 * MIB,),
        3072 * MIB,
        2267005158,
    )
    assert seen.window_s == pytest.approx(179.01)
    assert seen.output_tokens_per_s == pytest.approx(19 / 179.01)


def test_each_limit_that_is_missed_is_told_with_value_and_limit() -> None:
    sample = parse(recorded("probes"), 1795534600.0).model_copy(
        update={"tpot": SLOW, "ttft": SLOW, "preemptions": 3}
    )
    plan = demo_plan()
    plan = plan.model_copy(update={"limits": plan.limits.model_copy(update={"ttft_p99_ms": 1900})})
    seen = status(plan, looked(sample=sample, memory_bytes=(3100 * MIB,)))
    assert seen.findings == (
        "memory: the server's processes use 3,100 MiB, limit 3,072 MiB",
        "latency: TPOT p99 1,985.0 ms over 10 requests, limit 1,000.0 ms",
        "latency: TTFT p99 1,985.0 ms over 10 requests, limit 1,900.0 ms",
        "KV cache: 3 preemptions: it was full, and requests were computed again",
    )


def test_one_slow_request_is_no_finding() -> None:
    """The recording's only request of more than one token took 1 to 2.5 s for each: over the limit, and shown
    as it is.
    """
    seen = status(demo_plan(), looked())
    assert (seen.tpot_ms.count, seen.tpot_ms.p99, seen.tpot_p99_limit_ms) == (
        1,
        pytest.approx(2485.0),
        1000.0,
    )
    assert seen.findings == ()


def test_a_gpu_over_its_limit_is_named() -> None:
    plan = demo_plan().model_copy(update={"device_kind": "cuda", "device_count": 2})
    assert status(plan, looked(memory_bytes=(100, 4096 * MIB))).findings == (
        "memory: GPU 1 uses 4,096 MiB, limit 3,072 MiB",
    )


def test_what_lies_outside_the_window_is_not_told() -> None:
    now = looked()
    assert now.sample is not None
    earlier = [
        now.sample.model_copy(update={"at": now.at - age, "generation_tokens": 19 - age / 60})
        for age in (400, 290, 60)
    ]
    seen = status(demo_plan(), now, earlier, window_s=300)
    assert (seen.window_s, seen.requests) == (400, 0)
    assert seen.ttft_ms.p99 is None
    assert status(demo_plan(), now, earlier, window_s=60).output_tokens_per_s == pytest.approx(1 / 60)


def test_an_engine_that_hangs_is_a_finding() -> None:
    now = looked()
    assert now.sample is not None
    stuck = now.sample.model_copy(update={"running": 2})
    earlier = [stuck.model_copy(update={"at": now.at - age}) for age in (240, 120)]
    seen = status(demo_plan(), looked(sample=stuck), earlier)
    assert seen.findings == (
        "engine: 2 requests run and no token has come for 240 s; see docs/runbooks/service-hangs.md",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (8000, "2 h 13 min"),
        (90000, "1 d 1 h"),
        (86430, "1 d"),
    ],
)
def test_a_span_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("answers", "state", "trouble"),
    [
        ({}, "serving", ""),
        ({"/health": 503}, "failing", "{url}/health answers 503: its engine is dead"),
        ({"/metrics": 500}, "failing", "{url}/metrics answers 500"),
        (
            {"/metrics": "nothing_of_vllm 1\n"},
            "failing",
            "{url}/metrics: no vllm:num_requests_running among the metrics",
        ),
    ],
)
def test_what_a_look_makes_of_a_server(
    server: StubServer, plan_file: Path, answers: dict, state: str, trouble: str
) -> None:
    server.answers |= answers
    look = deployed(plan_file).look()
    assert look.state == state
    assert look.trouble.startswith(trouble.format(url=f"http://127.0.0.1:{server.port}"))
    assert bool(look.sample) == ("/metrics" not in answers)
    # no process of this plan runs here, so there is no memory to tell, and why is said
    assert (look.memory_bytes, look.memory_source) == (
        (),
        "the server's processes are not to be seen from here",
    )


def test_a_server_that_listens_and_says_nothing_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.status.probe.TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (tmp_path / "plan.json").write_text(demo_plan(port).model_dump_json())
        look = deployed(tmp_path / "plan.json").look()
    assert (look.state, look.trouble, look.sample) == ("silent", f"http://127.0.0.1:{port}: timed out", None)
    look = deployed(tmp_path / "plan.json").look()
    assert (look.state, look.trouble, look.sample) == (
        "down",
        f"http://127.0.0.1:{port}: connection refused",
        None,
    )


def test_looks_are_kept_and_broken_lines_left_out(tmp_path: Path) -> None:
    samples = [Sample(at=1, ttft=SLOW), Sample(at=2, memory_bytes=(5,))]
    path = tmp_path / "samples.jsonl"
    write_samples(path, samples)
    path.write_text(path.read_text() + '{"at": 3, "of_another": "version"}\n{"at"')
    assert read_samples(path) == samples
    assert read_samples(tmp_path / "none") == []


@pytest.mark.parametrize("command", [["report", "--live"], ["top"]])
def test_a_plan_without_a_deployment_is_one_line(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(demo_plan().model_copy(update={"deploy": None}).model_dump_json())
    result = CliRunner().invoke(app, [*command, "--plan", str(path)])
    assert result.exit_code == 1
    assert (
        result.output
        == f"lowmem: --plan {path} names no port and model: give the plan.json of a deployment\n"
    )
