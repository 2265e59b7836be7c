"""Each thing that can be wrong with a host gives one finding, with its grade and what to do; a healthy host
gives none.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowmem
from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.status import reading
from lowmem.status.doctor import lines, overall, triage

ROOT = Path(__file__).parents[2]


def findings(data):
    return {f.subject: f for f in triage(data["gpu"], data["memory"], data["plan"])}


def change(data, path, value):
    *way, last = path.split(".")
    for step in way:
        data = data[int(step)] if step.isdigit() else data[step]
    data[int(last) if last.isdigit() else last] = value


def test_a_healthy_host_is_ok_on_every_line(healthy):
    found = findings(healthy)
    assert {f.grade for f in found.values()} == {"ok"}
    assert {f.do for f in found.values()} == {""}
    assert found["GPU 1 memory"].says == "40,385 of 40,960 MiB free"
    assert found["driver module"].says == "loaded 580.159.04, installed 580.159.04"
    assert found["GPU 0 link"].says == "PCIe 4 x16, the card and slot can do 4 x16"
    assert found["GPU 0 clocks"].says == "not held down at 34 °C"
    assert overall(list(found.values())) == "ok"


@pytest.mark.parametrize(
    ("path", "value", "subject", "grade", "says"),
    [
        (
            "gpu.cards",
            [{"address": "0000:17:00.0", "device": "0x20f1"}],
            "cards",
            "bad",
            "1 on the PCI bus, 2 needed",
        ),
        ("gpu.nouveau.loaded", True, "nouveau", "bad", "loaded, so NVIDIA's driver cannot be"),
        (
            "gpu.module.loaded_version",
            "580.95.05",
            "driver module",
            "bad",
            "loaded 580.95.05, installed 580.159.04",
        ),
        ("gpu.module.loaded", False, "driver module", "bad", "loaded 580.159.04, installed 580.159.04"),
        (
            "gpu.smi.cuda_version",
            "12.8",
            "CUDA",
            "bad",
            "driver 580.159.04 runs CUDA up to 12.8, the engine needs 13",
        ),
        ("gpu.uvm.loaded", False, "nvidia-uvm", "bad", "not loaded"),
        ("gpu.services.persistenced.active", False, "persistence daemon", "warn", "does not run"),
        (
            "gpu.nvswitches",
            [{"address": "0000:c0:00.0", "device": "0x1af1"}],
            "fabric manager",
            "bad",
            "does not run",
        ),
        ("gpu.held", [], "packages held", "warn", "0 packages"),
        (
            "gpu.kernel.without_headers",
            ["6.1.0-31-amd64"],
            "kernel headers",
            "warn",
            "none for 6.1.0-31-amd64",
        ),
        ("gpu.smi.gpus.1.mig", "Enabled", "GPU 1 MIG", "bad", "the card is split"),
        (
            "gpu.smi.gpus.1.ecc_uncorrected_volatile",
            3,
            "GPU 1 ECC",
            "bad",
            "3 uncorrected errors since the driver was loaded, 0 ever",
        ),
        (
            "gpu.smi.gpus.1.ecc_uncorrected_aggregate",
            2,
            "GPU 1 ECC",
            "warn",
            "0 uncorrected errors since the driver was loaded, 2 ever",
        ),
        ("gpu.smi.gpus.1.ecc", "Disabled", "GPU 1 ECC", "warn", "off: a flipped bit goes unseen"),
        ("gpu.smi.gpus.0.remap_pending", "Yes", "GPU 0 row remapping", "warn", "pending"),
        ("gpu.smi.gpus.0.remap_failure", "Yes", "GPU 0 row remapping", "bad", "failed: no spare row is left"),
        ("gpu.smi.gpus.0.link_width", 8, "GPU 0 link", "warn", "PCIe 4 x8, the card and slot can do 4 x16"),
        (
            "gpu.smi.gpus.0.link_generation",
            1,
            "GPU 0 link",
            "warn",
            "PCIe 1 x16, the card and slot can do 4 x16",
        ),
        (
            "gpu.smi.gpus.0.slowed_by",
            ["gpu_idle", "hw_thermal_slowdown"],
            "GPU 0 clocks",
            "bad",
            "held down by hw_thermal_slowdown at 34 °C",
        ),
        (
            "gpu.smi.gpus.0.memory_free_mib",
            None,
            "GPU 0 memory",
            "bad",
            "memory not reported; the plan needs 20,000 MiB",
        ),
        (
            "memory.memory.available_bytes",
            2**30,
            "RAM",
            "bad",
            "256.00 GiB, 1.00 GiB available; the plan needs 40.00 GiB",
        ),
        ("memory.memory.swap_total_bytes", 0, "swap", "ok", "0.00 GiB, vm.swappiness 10"),
        (
            "memory.sysctl",
            {"vm.swappiness": 60, "vm.max_map_count": 65529},
            "vm.max_map_count",
            "warn",
            "65529",
        ),
    ],
)
def test_one_thing_wrong_is_one_line(healthy, path, value, subject, grade, says):
    change(healthy, path, value)
    found = findings(healthy)
    assert (found[subject].grade, found[subject].says) == (grade, says)
    assert bool(found[subject].do) == (grade != "ok")
    assert {name for name, f in found.items() if f.grade != "ok"} <= {subject}


def test_a_link_may_be_slow_while_the_card_idles(healthy):
    change(healthy, "gpu.smi.gpus.0.link_generation", 1)
    change(healthy, "gpu.smi.gpus.0.performance_state", "P8")
    assert findings(healthy)["GPU 0 link"].grade == "ok"


def test_who_holds_the_memory_is_named(healthy):
    change(healthy, "gpu.smi.gpus.0.memory_free_mib", 1200)
    change(healthy, "gpu.smi.gpus.0.processes", [{"pid": 77, "name": "/usr/bin/python3", "used_mib": 39000}])
    change(
        healthy,
        "gpu.holders",
        [{"pid": 77, "name": "python3", "unit": "notebook.service", "devices": ["/dev/nvidia0"]}],
    )
    found = findings(healthy)["GPU 0 memory"]
    assert found.grade == "bad"
    assert (
        found.says
        == "1,200 of 40,960 MiB free, held by python3 (pid 77, notebook.service); the plan needs 20,000 MiB"
    )


def test_the_service_itself_may_hold_its_memory(healthy):
    change(healthy, "gpu.smi.gpus.0.memory_free_mib", 1200)
    change(
        healthy,
        "gpu.holders",
        [{"pid": 77, "name": "VLLM::Worker", "unit": "vllm@main.service", "devices": ["/dev/nvidia0"]}],
    )
    assert findings(healthy)["GPU 0 memory"].grade == "ok"


def test_a_card_that_does_not_answer(healthy):
    healthy["gpu"]["smi"]["gpus"].pop()
    assert findings(healthy)["cards that answer"].says == "1 of 2"


def test_a_driver_that_does_not_answer(healthy):
    healthy["gpu"]["smi"].update(
        rc=18, error="Failed to initialize NVML: Driver/library version mismatch", gpus=[], cuda_version=None
    )
    found = findings(healthy)["driver answers"]
    assert (found.grade, found.says) == ("bad", "Failed to initialize NVML: Driver/library version mismatch")


def test_no_card_at_all(healthy):
    healthy["gpu"].update(
        cards=[],
        smi={
            "path": None,
            "rc": None,
            "error": None,
            "driver_version": None,
            "cuda_version": None,
            "gpus": [],
        },
    )
    found = findings(healthy)
    assert found["cards"].says == "0 on the PCI bus, 2 needed"
    assert "driver module" not in found


@pytest.mark.parametrize(
    ("cards", "wanted", "verdict"),
    [(0, 1, "bad"), (1, 1, "ok"), (1, 2, "bad"), (2, 1, "ok"), (2, 2, "ok"), (8, 8, "ok")],
)
def test_as_many_cards_as_the_plan_has(healthy, cards, wanted, verdict):
    one = healthy["gpu"]["smi"]["gpus"][0]
    healthy["gpu"]["cards"] = healthy["gpu"]["cards"][:1] * cards
    healthy["gpu"]["smi"]["gpus"] = [one | {"index": i} for i in range(cards)]
    healthy["plan"]["device_count"] = wanted
    found = triage(**healthy)
    assert overall(found) == verdict
    assert [f.says for f in found if f.subject == "cards"] == [f"{cards} on the PCI bus, {wanted} needed"]
    assert len([f for f in found if f.subject.endswith("link")]) == cards


def test_eight_cards(healthy):
    card = healthy["gpu"]["smi"]["gpus"][0]
    healthy["gpu"]["cards"] = healthy["gpu"]["cards"] * 4
    healthy["gpu"]["smi"]["gpus"] = [card | {"index": i} for i in range(8)]
    found = findings(healthy)
    assert [s for s in found if s.endswith("memory")] == [f"GPU {i} memory" for i in range(8)]
    assert found["driver answers"].says == "8 of 8 cards"


def test_xids_are_counted_by_card(healthy):
    healthy["gpu"]["xid"] = [
        {"address": "0000:3b:00", "xid": 79, "text": "pid=1, GPU has fallen off the bus."},
        {"address": "0000:3b:00", "xid": 79, "text": "pid=1, GPU has fallen off the bus."},
        {"address": "0000:5e:00", "xid": 31, "text": "pid=2"},
        {"address": "0000:5e:00", "xid": 999, "text": "something new"},
    ]
    found = findings(healthy)
    assert (found["Xid 79"].grade, found["Xid 79"].says) == (
        "bad",
        "2 x at 0000:3b:00: the card fell off the bus",
    )
    assert (found["Xid 31"].grade, found["Xid 31"].says) == (
        "warn",
        "1 x at 0000:5e:00: a program read memory that is not its own",
    )
    assert (found["Xid 999"].grade, found["Xid 999"].says) == ("warn", "1 x at 0000:5e:00: something new")


def test_a_plan_for_a_cpu_asks_for_no_card(healthy):
    healthy["plan"]["device_kind"] = "cpu"
    assert [*findings(healthy)] == ["RAM", "swap", "vm.max_map_count", "disk /opt/vllm-lowmem"]


def test_lines_are_one_each_and_in_columns(healthy):
    change(healthy, "gpu.held", [])
    found = [f for f in triage(**healthy) if f.subject in ("cards", "packages held")]
    assert lines(found) == [
        "ok    cards          2 on the PCI bus, 2 needed",
        (
            "warn  packages held  0 packages -> run site.yml: an unattended upgrade would break the running"
            " driver"
        ),
    ]


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "lowmem", "doctor", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )


def test_the_command_exits_2_where_something_is_bad(healthy, tmp_path):
    change(healthy, "gpu.uvm.loaded", False)
    report = tmp_path / "report.json"
    report.write_text(json.dumps(healthy))
    done = run(str(report))
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "verdict: bad"
    as_json = json.loads(run(str(report), "--json").stdout)
    assert as_json["verdict"] == "bad"
    assert [f["subject"] for f in as_json["findings"] if f["grade"] == "bad"] == ["nvidia-uvm"]


def test_the_command_exits_0_on_a_healthy_host(healthy, tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps(healthy))
    assert run(str(report)).returncode == 0


def test_a_file_that_is_no_report_is_one_line(tmp_path):
    report = tmp_path / "report.json"
    report.write_text("[]")
    done = run(str(report))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "is not a report of playbooks/doctor.yml" in done.stderr


def test_it_reads_its_own_host_without_a_report(tmp_path):
    words = ["doctor", "--plan", str(tmp_path / "etc/plan.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code in (0, 2), done.output
    first, *found = done.stdout.splitlines()
    assert first == f"read from this host, plan {tmp_path}/etc/plan.json (there is none)"
    assert any("RAM" in line.split() for line in found)
    assert re.fullmatch(r"verdict: (ok|warn|bad)", found[-1])


def test_an_installed_package_has_the_readers_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lowmem, "__file__", str(tmp_path / "lowmem/__init__.py"))
    assert reading.readers() == tmp_path / "lowmem/readers"
    with pytest.raises(BadInput, match="is not there: install lowmem again"):
        reading.this_host(tmp_path / "etc/plan.json")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in ("gpu_report", "host_report"):
        assert wheel["force-include"][f"plugins/modules/{name}.py"] == f"lowmem/readers/{name}.py"
