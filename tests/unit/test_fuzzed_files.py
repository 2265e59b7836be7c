"""Every file that a command reads is mutated, and the command answers in one line within two seconds.

The commands and their paths are read from the command line itself: a new one fails here until it is covered.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import resource
import runpy
import shutil
import time
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowmem.cli import main
from lowmem.files import parse_json
from lowmem.measure import engine_log
from lowmem.service.gateway_health import text_of
from lowmem.status.metrics import parse

from .command import ROOT

LIMIT_S = 2.0
"""CPU seconds of one call, which the machine's load does not change."""

PLAN = (ROOT / "tests/ansible/files/plan.json").read_text()
RECEIPT = (ROOT / "docs/measurements/2026-11-26-4xh100/fleet/one.json").read_text()
METRICS = (ROOT / "tests/data/metrics/vllm_0.32_cpu_probes.txt").read_text()
ENVIRONMENT = "VLLM_API_KEY=sk-0123456789abcdef\nVLLM_CPU_OMP_THREADS_BIND=0-1\n"
CHECKS = (
    '<testsuite><testcase classname="a" name="b" time="0.5"><failure message="m"/></testcase></testsuite>'
)

SAMPLE = parse(METRICS, time.time() - 60).model_dump_json() + "\n"
_DOCTOR = runpy.run_path(str(ROOT / "tests/hosts/conftest.py"))
DOCTOR = json.dumps({"gpu": _DOCTOR["GPU"], "memory": _DOCTOR["MEMORY"], "plan": _DOCTOR["PLAN"]})

ABLATIONS = (ROOT / "docs/measurements/ablations.yml").read_text()

CARD = json.dumps({
    "nvml_total_mib": 24576, "hbm_gb_per_s": 936, "fp16_tflops": 71.2, "capability": "8.6", "pcie": "4x16",
    "source": {"datasheet": "a page"},
})  # fmt: skip
SITE = json.dumps({
    "created_utc": "2026-12-01T00:00:00Z", "device": "a100-40g", "vllm_version": "0.32.0",
    "constants": {"latency.hbm_efficiency.marlin": {"value": 0.6, "before": 0.66, "source": "a receipt"}},
    "receipts": ["a.json 0"],
})  # fmt: skip

NOWHERE = ("--url", "http://127.0.0.1:9")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # command, parameter -> a valid text, and the words with {} for the file
    "plan profile": ((ROOT / "profiles/low_mem.yml").read_text(), ("plan", "--profile", "{}")),
    "explain profile": ((ROOT / "profiles/low_mem.yml").read_text(), ("explain", "{}")),
    "plan device": (CARD, ("plan", "--device", "{yaml}")),
    "plan calibration": (SITE, ("plan", "--calibration", "{}")),
    "calibrate receipt": (RECEIPT, ("calibrate", "{}", "--out", "{out}")),
    "calibrate plan": (PLAN, ("calibrate", "--plan", "{}", "--out", "{out}", *NOWHERE)),
    "fleet receipt": (RECEIPT, ("fleet", "--qps", "1", "--at-most", "2", "--receipt", "{}")),
    "receipt measurement": (RECEIPT, ("receipt", "{}")),
    "receipt checks": (CHECKS, ("receipt", "{receipt}", "--checks", "{}")),
    "explain measurements": (ABLATIONS, ("explain", "low_mem", "--measurements", "{folder}")),
    "report receipts": (RECEIPT, ("report", "{}", "--out", "{out}")),
    "report plan": (PLAN, ("report", "--live", "--plan", "{}", "--out", "{out}")),
    "report samples": (
        SAMPLE,
        ("report", "--live", "--plan", "{plan}", "--samples", "{}", "--out", "{out}"),
    ),
    "measure plan": (PLAN, ("measure", "--plan", "{}", "--out", "{out}", *NOWHERE, "--pid", "4194303")),
    "measure env_file": (
        ENVIRONMENT,
        ("measure", "--plan", "{plan}", "--env-file", "{}", "--out", "{out}", *NOWHERE, "--pid", "4194303"),
    ),
    "measure pid_file": (
        "4194303",
        ("measure", "--plan", "{plan}", "--pid-file", "{}", "--out", "{out}", *NOWHERE),
    ),
    "doctor report": (DOCTOR, ("doctor", "{}")),
    "top plan": (PLAN, ("top", "--plan", "{}", "--once")),
    "start-check plan": (PLAN, ("start-check", "--plan", "{}", "--wait-s", "0")),
    "ready plan": (PLAN, ("ready", "--plan", "{}", "--env-file", "{env_file}", "--timeout-s", "0.1")),
    "ready env_file": (ENVIRONMENT, ("ready", "--plan", "{plan}", "--env-file", "{}", "--timeout-s", "0.1")),
    "watch plan": (PLAN, ("watch", "--plan", "{}", "--env-file", "{env_file}")),
    "watch env_file": (ENVIRONMENT, ("watch", "--plan", "{plan}", "--env-file", "{}")),
    "gateway-health plan": (
        PLAN,
        ("gateway-health", "--plan", "{}", "--env-file", "{env_file}", "--socket", "{socket}"),
    ),
    "gateway-health env_file": (
        ENVIRONMENT,
        ("gateway-health", "--plan", "{plan}", "--env-file", "{}", "--socket", "{socket}"),
    ),
}  # fmt: skip

WRITTEN = {
    "calibrate out", "capacity out", "frontier out", "measure out", "receipt out", "report out",
    "gateway-health socket",
}  # fmt: skip
"""Paths that a command writes."""

READ_ELSEWHERE = {
    "measure start": "a launcher that is started, not read",
    "measure log": "tests/measure/test_enginelog.py",
    "gateway-health figures": "test_figures_that_are_no_text_are_left_out",
    "plan model": "tests of the model cards",
    "doctor plan": "case `top plan`: one reader",
    "oracle model": "tests of the model cards",
    "oracle against": "tests/unit/test_oracle.py: vLLM is looked for before it is read",
    "oracle record": "tests/unit/test_oracle.py: another question is asked anew",
    "oracle device": "case `plan device`",
    "capacity profile": "case `plan profile`",
    "capacity device": "case `plan device`",
    "capacity model": "tests of the model cards",
    "explain model": "tests of the model cards",
    "frontier model": "tests of the model cards",
    "fleet profile": "case `plan profile`",
    "calibrate model": "tests of the model cards",
    "explain device": "case `plan device`",
    "frontier device": "case `plan device`",
    "fleet device": "case `plan device`",
}

NO_FILE = {"check-article"}

TEXTS = ("profile", "model", "device")
"""Parameters that are texts and may name a file."""


def parameters() -> dict[str, list[str]]:
    """Command to its parameters that are paths, or texts that may name a file."""
    found = {}
    for name, place in main.COMMANDS.items():
        module, function = place.split(":")
        hints = get_type_hints(getattr(importlib.import_module(module), function))
        found[name] = [p for p, kind in hints.items() if "Path" in str(kind) or p in TEXTS]
    return found


def test_every_path_of_every_command_is_covered() -> None:
    paths = {f"{command} {path}" for command, names in parameters().items() for path in names}
    assert "watch env_file" in paths
    covered = set(CASES) | WRITTEN | set(READ_ELSEWHERE)
    assert paths - covered == set()
    commands = {word.split()[0] for word in covered}
    assert set(main.COMMANDS) - commands == NO_FILE


LEAVES = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**31, 2**63, 10**19, 10**21, 0.0, -0.5, 1e-300, 1e300, float("nan"),
        float("inf"), "", "x", "nan", "1e999", "0-999999999", "9" * 5000, "re:(a+)+$", "\x1b[2J", "\u202e",
        "../../etc/passwd", "\x00", [], [[]], {}, {"a": 1}, [1] * 1000, "x" * 100_000,
    ]
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in a JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, below in inner for path in places(below, (*here, key)))]


def replaced(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    if not path:
        return leaf
    changed = copy.deepcopy(value)
    at = changed
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = leaf
    return changed


@st.composite
def mutated(draw: st.DrawFn, text: str) -> bytes:
    """Return a valid file with one thing changed: a value of its JSON, or some of its bytes."""
    try:
        value = parse_json(text, "it")
    except ValueError:
        data = text.encode()
        at = draw(st.integers(0, len(data)))
        inserted = draw(
            st.binary(max_size=20)
            | st.sampled_from(
                [b"9" * 5000, b"nan", b"[" * 5000, b"\xff", b"'", b"\n=\n", b"&a [*a]", b"1e999"]
            )
        )
        return data[:at] + inserted + data[at + draw(st.integers(0, 40)) :]
    return json.dumps(replaced(value, draw(st.sampled_from(places(value))), draw(LEAVES))).encode()


class Ended(KeyboardInterrupt):
    """Takes the place of a command's second look."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, text in (("plan", PLAN), ("env_file", ENVIRONMENT), ("receipt", RECEIPT)):
        (folder / name).write_text(text)
    return folder


def run(words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a command: an answer, or one line on stderr that blames no program."""

    def sleep(_: float) -> None:
        raise Ended

    shutil.copyfile(folder / "it", folder / "ablations.yml")
    names = {"{folder}": "", "{}": "it", "{out}": "out", "{socket}": "s", "{yaml}": "ablations.yml"}
    given = [str(folder / names.get(word, word[1:-1])) if word.startswith("{") else word for word in words]
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        before = resource.getrusage(resource.RUSAGE_SELF)
        done = CliRunner().invoke(main.app, given)
        after = resource.getrusage(resource.RUSAGE_SELF)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took_s < LIMIT_S, given
    assert "a fault in lowmem itself" not in done.stderr, done.stderr
    assert done.exit_code in (0, 1, 2, 3, 130), done.stderr
    if done.exit_code == 1 and "start-check" not in given:
        assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_command_answers_a_mutated_file_in_one_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = CASES[case]
    (folder / "it").write_text(text)
    run(words, folder, monkeypatch)  # imports the command

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(mutated(text))
    def any_change(content: bytes) -> None:
        (folder / "it").write_bytes(content)
        run(words, folder, monkeypatch)

    any_change()


@pytest.mark.parametrize("content", [b"\xff", None], ids=["bytes", "fifo"])
def test_figures_that_are_no_text_are_left_out(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "figures.prom"
    path.write_bytes(content) if content else os.mkfifo(path)
    assert text_of(path) == ""


@settings(max_examples=50, deadline=None, derandomize=True)
@given(mutated(METRICS))
def test_metrics_of_any_text_are_read_or_refused(content: bytes) -> None:
    before = time.process_time()
    with contextlib.suppress(ValueError):
        parse(content.decode(errors="replace"), 0)
    assert time.process_time() - before < LIMIT_S


GREEDY = (
    "init engine (" * 20_000,
    "[PrefetchOffloader] Initialized " * 20_000,
    "Model loading took " * 50_000,
    "\x1b[0" * 100_000,
    "(" * 100_000 + "pid=1" * 100_000,
    "ValueError: x " * 100_000,
    "KV cache size: ,,, tokens",
    "Available KV cache memory: " + "9" * 5000 + " GiB",
    "Model loading took nan GiB",
)


@pytest.mark.parametrize("line", GREEDY, ids=lambda line: line[:12])
def test_a_line_of_any_length_is_read_at_once(line: str) -> None:
    before = time.process_time()
    seen = engine_log.read([line, "Available KV cache memory: 2.00 GiB"])
    assert time.process_time() - before < LIMIT_S
    assert seen.largest("kv_cache") == 2 * 2**30


def test_a_log_of_many_errors_is_read_at_once() -> None:
    before = time.process_time()
    seen = engine_log.read(f"Using A{n} attention backend" for n in range(20_000))
    seen = engine_log.read(f"ValueError: {n}" for n in range(20_000))
    assert time.process_time() - before < 10 * LIMIT_S
    assert (len(seen.lines), seen.error) == (1000, "ValueError: 0")
