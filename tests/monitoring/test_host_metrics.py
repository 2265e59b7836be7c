"""What host_metrics.py makes of a driver's answer, a kernel log, a watchdog's journal and certificates."""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowmem.cli import watch
from lowmem.service import watchdog

from .conftest import REPOSITORY

FOLDERS = (REPOSITORY / "roles/monitoring/files", REPOSITORY / "plugins/modules")


@pytest.fixture
def host_metrics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As on a host, where gpu_report lies beside it."""
    monkeypatch.syspath_prepend(str(FOLDERS[1]))
    spec = importlib.util.spec_from_file_location("host_metrics", FOLDERS[0] / "host_metrics.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cards(host_metrics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real `nvidia-smi -q -x` of two H200, changed in what an idle healthy pair does not show."""
    answer = (REPOSITORY / "tests/data/nvidia-smi-h200.xml").read_text()
    answer = answer.replace("<remapped_row_pending>No<", "<remapped_row_pending>Yes<", 1)
    log = (
        "1764000000.5 h kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n1764000100.5 h kernel: NVRM: Xid"
        " (PCI:0000:3b:00): 79, pid=1\n"
    )
    report = host_metrics.gpu_report
    monkeypatch.setattr(report, "pci", lambda: ([{"address": "a", "device": "b"}] * 2, []))
    monkeypatch.setattr(report.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        report, "output", lambda *command, **_: (0, log if command[0] == "journalctl" else answer, "")
    )
    seen = set(host_metrics.text(list(host_metrics.cards())).splitlines())
    assert {
        'lowmem_gpu_cards{state="on_bus"} 2.0',
        'lowmem_gpu_cards{state="answering"} 2.0',
        'lowmem_gpu_ecc_uncorrected_errors{gpu="1",counter="volatile"} 0.0',
        'lowmem_gpu_row_remap{gpu="0",state="pending"} 1.0',
        'lowmem_gpu_row_remap{gpu="1",state="pending"} 0.0',
        'lowmem_gpu_slowed{gpu="0",reason="gpu_idle"} 1.0',
        'lowmem_gpu_xid_errors{address="0000:3b:00",xid="79"} 2.0',
        'lowmem_gpu_xid_last_timestamp_seconds{address="0000:3b:00",xid="79"} 1764000100.5',
    } <= seen


def test_a_driver_that_does_not_answer_is_no_card(
    host_metrics: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = host_metrics.gpu_report
    monkeypatch.setattr(report, "pci", lambda: ([{"address": "a", "device": "b"}], []))
    monkeypatch.setattr(report.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        report, "output", lambda *command, **_: (9, "couldn't communicate with the NVIDIA driver", "")
    )
    samples = [sample for sample in host_metrics.cards() if sample[0] == "lowmem_gpu_cards"]
    assert samples == [
        ("lowmem_gpu_cards", {"state": "on_bus"}, 1),
        ("lowmem_gpu_cards", {"state": "answering"}, 0),
    ]
    assert "nvidia-smi: couldn't communicate" in capsys.readouterr().err


def test_a_host_without_cards_says_nothing_of_them(
    host_metrics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_metrics.gpu_report, "pci", lambda: ([], []))
    monkeypatch.setattr(host_metrics.gpu_report.shutil, "which", lambda name: None)
    assert list(host_metrics.cards()) == []


class Ended:
    """A server in which the watchdog finds something to end."""

    url = "http://127.0.0.1:1"

    def __init__(self, *_: Any) -> None: ...

    def end(self, report_s: float) -> list[str]:
        return ["12 (VLLM::EngineCor)", "11 (vllm)"]


def test_an_end_as_the_watchdog_itself_says_it(
    host_metrics: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def enough(_: float) -> None:
        raise KeyboardInterrupt

    verdicts = iter(["serving", "hung"])
    monkeypatch.setattr(watch, "VllmServer", Ended)
    monkeypatch.setattr(watchdog.Watch, "look", lambda self, now: next(verdicts))
    monkeypatch.setattr(watch.time, "sleep", lambda s: None if s == 5 else enough(s))
    plan = REPOSITORY / "tests/ansible/files/plan.json"
    with pytest.raises((KeyboardInterrupt, StopIteration, RuntimeError)):
        watch.watch(plan, Path("/nowhere"), silence_s=180, every_s=5, report_s=15)
    words = capsys.readouterr().out.splitlines()
    assert words[-1].startswith("watchdog: no sign of the engine for 180 s: ended 12 (VLLM::EngineCor)")

    unit = "vllm-watchdog@main.service"
    journal = "\n".join(
        json.dumps(
            {
                "_SYSTEMD_UNIT": unit,
                "MESSAGE": word,
                "__REALTIME_TIMESTAMP": str((1764000000 + second) * 10**6),
            }
        )
        for second, word in enumerate(words)
    )
    monkeypatch.setattr(host_metrics.gpu_report, "output", lambda *command, **_: (0, journal, ""))
    assert list(host_metrics.watchdog()) == [
        ("lowmem_watchdog_ends", {"unit": unit}, 1),
        ("lowmem_watchdog_last_end_timestamp_seconds", {"unit": unit}, 1764000000.0 + len(words) - 1),
    ]


def test_memory_of_units_that_run(
    host_metrics: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = (
        "Id=vllm@main.service\nControlGroup=/system.slice/vllm@main.service\n\n"
        "Id=vllm@second.service\nControlGroup=\n"
    )
    monkeypatch.setattr(host_metrics.gpu_report, "output", lambda *command, **_: (0, said, ""))
    folder = tmp_path / "system.slice/vllm@main.service"
    folder.mkdir(parents=True)
    assert list(host_metrics.service_memory(tmp_path)) == []
    (folder / "memory.stat").write_text("anon 10\nfile 20\nfile_mapped 7\nshmem 3\n")
    kinds = {labels["kind"]: value for _, labels, value in host_metrics.service_memory(tmp_path)}
    assert kinds == {"anon": 10, "file_mapped": 7, "shmem": 3}
    (folder / "memory.swap.current").write_text("4096\n")
    assert {labels["kind"] for _, labels, _ in host_metrics.service_memory(tmp_path)} == {
        "anon",
        "file_mapped",
        "shmem",
        "swap",
    }


def test_the_program_as_it_is_run(tmp_path: Path, promtool: Any) -> None:
    """On this machine, with a real certificate and a file that is none; Prometheus' own tool reads what it
    writes.
    """
    for folder, name in zip(FOLDERS, ("host_metrics.py", "gpu_report.py"), strict=True):
        (tmp_path / name).write_text((folder / name).read_text())
    certificate, none, out = tmp_path / "c.pem", tmp_path / "none.pem", tmp_path / "out.prom"
    words = "req -x509 -newkey rsa:2048 -nodes -days 10 -subj /CN=x"
    subprocess.run(
        ["openssl", *words.split(), "-keyout", tmp_path / "k", "-out", certificate],
        check=True,
        capture_output=True,
    )
    none.write_text("no certificate\n")
    program = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import host_metrics; host_metrics.main()",
    ]
    done = subprocess.run(
        [*program, "--out", out, "--certificate", certificate, "--certificate", none],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert (
        f'lowmem_certificate_readable{{path="{certificate}"}}'
        f' 1.0\nlowmem_certificate_readable{{path="{none}"}} 0.0\n' in text
    )
    [ends] = [line for line in text.splitlines() if line.startswith("lowmem_certificate_not_after")]
    in_days = (float(ends.split()[1]) - datetime.datetime.now(datetime.UTC).timestamp()) / 86400
    assert 9.9 < in_days <= 10
    assert "openssl x509 -noout" in done.stderr
    assert not list(tmp_path.glob("*.new"))
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
