"""`lowmem top`: once, as JSON, in a pipe, in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.status.probe import deployed
from lowmem.status.top import Watcher, line, screen
from lowmem.text import sparkline

from .conftest import StubServer, recorded

COMMAND = [sys.executable, "-m", "lowmem", "top", "--every-s", "0.2"]


def later(tokens: int, requests: int) -> str:
    """The recording after so many more tokens of so many more requests, all of them at 100 to 150 ms a token
    and to the first one.
    """
    text = recorded("probes")

    def more(match: re.Match[str]) -> str:
        return f"{match[1]} {float(match[3]) + (requests if float(match[2]) >= 0.15 else 0)}"

    latencies = (
        r'(vllm:(?:time_to_first_token|request_time_per_output_token|inter_token_latency)_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\})'
        r" (\S+)"
    )
    text = re.sub(latencies, more, text)
    text = re.sub(r'(vllm:request_success_total\{[^}]*"length"[^}]*\}) \S+', rf"\1 {16 + requests}", text)
    text = re.sub(r"(vllm:generation_tokens_total\{[^}]*\}) \S+", rf"\1 {19 + tokens}", text)
    text = re.sub(r"(vllm:num_requests_running\{[^}]*\}) \S+", r"\1 3", text)
    return re.sub(r"(vllm:kv_cache_usage_perc\{[^}]*\}) \S+", r"\1 0.25", text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`lowmem.status.probe` reads the time from here: seconds since 1970."""
    now = [1795534600.0]
    monkeypatch.setattr("lowmem.status.probe.time.time", lambda: now[0])
    return now


def test_what_came_between_two_looks(server: StubServer, plan_file: Path, clock: list[float]) -> None:
    watcher = Watcher(deployed(plan_file), window_s=30)
    watcher.look()
    clock[0] += 10
    server.answers["/metrics"] = later(tokens=400, requests=20)
    seen, since = watcher.look()
    assert (seen.running, seen.kv_usage, seen.window_s, seen.output_tokens_per_s, seen.requests) == (
        3,
        0.25,
        10,
        40,
        20,
    )
    assert seen.tpot_ms.model_dump() == pytest.approx({"count": 20, "p50": 125, "p90": 145, "p99": 149.5})
    assert (since.requests, since.tpot_ms.count) == (36, 21)
    assert list(watcher.rates) == [40]
    # what is older than the window is forgotten, but for one look to begin at
    for _ in range(10):
        clock[0] += 10
        seen, _ = watcher.look()
    assert (seen.window_s, seen.output_tokens_per_s, len(watcher.samples)) == (30, 0, 4)


@pytest.mark.parametrize("width", [40, 64, 80, 110])
def test_the_view_fits_its_terminal(
    server: StubServer, plan_file: Path, clock: list[float], width: int
) -> None:
    watcher = Watcher(deployed(plan_file), window_s=30)
    watcher.look()
    clock[0] += 10
    server.answers["/metrics"] = later(tokens=400, requests=20)
    seen, since = watcher.look()
    seen = seen.model_copy(update={"memory_bytes": (2000 * 2**20,)})
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(screen(watcher.host.plan, seen, since, watcher.rates, width))
    lines = [text.rstrip() for text in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    words = {re.split(r"\s{2,}", text)[0]: text.split() for text in lines}
    assert words["requests"][1:3] == ["3", "running"]
    assert words["KV cache"][2:4] == ["25.0", "%"]
    assert words["memory"][1:3] == ["2,000", "MiB"]
    assert words["tokens/s out"][2] == "40.0"
    assert words["TPOT"][1:4] == ["125", "145", "150"]
    # what a narrow terminal leaves out
    assert (words["memory"][-4:] == ["of", "3,072,", "plan", "2,162"]) == (width >= 64)
    assert words["TPOT"][4:] == (["126", "2,185", "1,000"] if width >= 64 else ["2,185", "1,000"])


@pytest.mark.parametrize("width", [40, 80])
def test_memory_over_the_plan_is_said_before_the_limit_is_missed(
    server: StubServer, plan_file: Path, width: int
) -> None:
    watcher = Watcher(deployed(plan_file), window_s=30)
    seen, since = watcher.look()

    def shown(*memory_mib: float) -> str:
        known = seen.model_copy(update={"memory_bytes": tuple(round(mib * 2**20) for mib in memory_mib)})
        console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
        console.print(screen(watcher.host.plan, known, since, (), width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        over = re.findall(r"over_plan=\S+", line(known))
        return " ".join(text.split()) + " " + " ".join(over)

    assert "over the planned peak" not in shown(2162)
    assert "over_plan" not in shown(2162)
    said = shown(2200)
    assert "memory: 38 MiB over the planned peak of 2,162 MiB, within the limit" in said
    assert said.endswith("over_plan=38MiB")
    # a missed limit is a finding, and is said once
    assert "over the planned peak" not in shown(3100)
    assert shown(3100).endswith("over_plan=938MiB")
    # five digits fit too
    assert "20,455 MiB" in shown(20455)
    assert "memory: GPU 1 is 38 MiB over the planned peak" in shown(2100, 2200)


def test_a_line_of_a_pipe(server: StubServer, plan_file: Path, clock: list[float]) -> None:
    watcher = Watcher(deployed(plan_file), window_s=30)
    watcher.look()
    clock[0] += 10
    server.answers["/metrics"] = later(tokens=400, requests=20)
    assert (
        line(watcher.look()[0])
        == "2026-11-24T15:36:50Z serving running=3 waiting=0 kv=25.0% out=40.0/s in=0.0/s"
        " tpot_p99=149.5ms ttft_p99=248.5ms memory=?MiB limit=3072MiB"
    )
    server.close()
    assert (
        line(watcher.look()[0])
        == f"2026-11-24T15:36:50Z down: http://127.0.0.1:{server.port}: connection refused"
    )


def test_a_sparkline_goes_from_zero_to_the_highest() -> None:
    assert sparkline([9, 0, 1, 3, 7], 4) == "▁▂▄█"
    assert sparkline([0, 0], 5) == "▁▁"
    assert sparkline([], 5) == ""


def test_once_as_json(server: StubServer, plan_file: Path) -> None:
    server.answers["/metrics"] = [recorded("probes"), later(tokens=400, requests=20)]
    result = CliRunner().invoke(
        app, ["top", "--plan", str(plan_file), "--once", "--json", "--every-s", "0.2"]
    )
    assert result.exit_code == 0, result.output
    seen = json.loads(result.output)
    assert (seen["state"], seen["running"], seen["requests"], seen["tpot_ms"]["count"]) == (
        "serving",
        3,
        20,
        20,
    )


def test_a_server_that_is_not_there_is_one_line(server: StubServer, plan_file: Path) -> None:
    server.close()
    result = CliRunner().invoke(app, ["top", "--plan", str(plan_file)])
    assert result.exit_code == 1
    assert (
        result.output
        == f"lowmem: http://127.0.0.1:{server.port}: connection refused: the server of {plan_file} does not"
        " serve; docs/runbooks/service-down.md\n"
    )


def test_in_a_pipe_it_is_plain_lines_and_ends_with_its_reader(server: StubServer, plan_file: Path) -> None:
    command = " ".join([*COMMAND, "--plan", str(plan_file)])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 2; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [text.split()[1] for text in done.stdout.splitlines()] == ["serving", "serving"]
    assert "\x1b" not in done.stdout


def heed_interrupts() -> None:
    """A shell that starts the tests in the background has its children ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_it_without_a_word(server: StubServer, plan_file: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "--plan", str(plan_file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["state"] == "serving"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (0, "")


def test_in_a_terminal_it_draws_and_gives_the_screen_back(server: StubServer, plan_file: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        heed_interrupts()
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [*COMMAND, "--plan", str(plan_file)])
    shown = b""
    until = time.monotonic() + 120
    while b"TTFT" not in shown and time.monotonic() < until and select.select([terminal], [], [], 60)[0]:
        shown += os.read(terminal, 65536)
    assert b"\x1b[?1049h" in shown, shown[-500:]
    os.write(terminal, b"\x03")
    while time.monotonic() < until:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # its end
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"\x1b[?1049l" in shown
    # the last view stays
    assert b"SmolLM2-135M-Instruct" in shown.split(b"\x1b[?1049l")[1]
