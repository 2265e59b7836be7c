"""What gpu_report makes of a driver's own words, of an old one's and of the stub's."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT, load

OLD = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>535.261.03</driver_version><cuda_version>12.2</cuda_version>
<gpu id="00000000:3B:00.0"><product_name>NVIDIA A100-PCIE-40GB</product_name><uuid>GPU-x</uuid>
<mig_mode><current_mig>N/A</current_mig></mig_mode>
<pci><pci_gpu_link_info><pcie_gen><max_link_gen>4</max_link_gen><current_link_gen>1</current_link_gen></pcie_gen>
<link_widths><max_link_width>16x</max_link_width><current_link_width>8x</current_link_width></link_widths></pci_gpu_link_info></pci>
<performance_state>P0</performance_state>
<clocks_throttle_reasons><clocks_throttle_reason_gpu_idle>Not Active</clocks_throttle_reason_gpu_idle>
<clocks_throttle_reason_sw_power_cap>Active</clocks_throttle_reason_sw_power_cap></clocks_throttle_reasons>
<fb_memory_usage><total>40960 MiB</total><reserved>571 MiB</reserved>
<used>38000 MiB</used><free>2389 MiB</free></fb_memory_usage>
<ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
<ecc_errors><volatile><sram_correctable>9</sram_correctable><sram_uncorrectable>1</sram_uncorrectable>
<dram_uncorrectable>2</dram_uncorrectable></volatile>
<aggregate><sram_uncorrectable>N/A</sram_uncorrectable><dram_uncorrectable>N/A</dram_uncorrectable></aggregate></ecc_errors>
<temperature><gpu_temp>71 C</gpu_temp></temperature>
<processes><process_info><pid>4242</pid>
<process_name>VLLM::Worker_TP0</process_name><used_memory>37990 MiB</used_memory></process_info></processes>
</gpu></nvidia_smi_log>"""


def answer(gpu_report, monkeypatch, rc, out, err=""):
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(gpu_report, "output", lambda *command, **options: (rc, out, err))
    return gpu_report.smi()


def test_an_old_driver(gpu_report, monkeypatch):
    smi = answer(gpu_report, monkeypatch, 0, OLD)
    assert (smi["rc"], smi["driver_version"], smi["cuda_version"]) == (0, "535.261.03", "12.2")
    (card,) = smi["gpus"]
    assert card["memory_free_mib"] == 2389
    assert (
        card["link_generation"],
        card["link_generation_max"],
        card["link_width"],
        card["link_width_max"],
    ) == (1, 4, 8, 16)
    assert card["slowed_by"] == ["sw_power_cap"]
    assert card["ecc_uncorrected_volatile"] == 3
    assert card["ecc_uncorrected_aggregate"] is None
    assert card["mig"] == "N/A"
    assert card["remap_pending"] is None
    assert card["processes"] == [{"pid": 4242, "name": "VLLM::Worker_TP0", "used_mib": 37990}]


def test_a_real_answer(gpu_report, monkeypatch):
    """`nvidia-smi -q -x` of two H200, driver 580.159.04, 2026-11-23; identities replaced, supported clocks
    left out.
    """
    smi = answer(gpu_report, monkeypatch, 0, (ROOT / "tests" / "data" / "nvidia-smi-h200.xml").read_text())
    assert (smi["rc"], smi["driver_version"], smi["cuda_version"]) == (0, "580.159.04", "13.0")
    first, second = smi["gpus"]
    assert (first["name"], second["name"]) == ("NVIDIA H200", "NVIDIA H200")
    assert (first["memory_total_mib"], first["memory_free_mib"]) == (143771, 143156)
    assert (first["link_generation_max"], first["link_width_max"]) == (5, 16)
    assert (first["mig"], first["remap_pending"], first["slowed_by"], first["processes"]) == (
        "Disabled",
        "No",
        ["gpu_idle"],
        [],
    )
    assert (first["ecc_uncorrected_volatile"], first["ecc_uncorrected_aggregate"]) == (0, 0)


def test_the_names_that_are_to_come(gpu_report, monkeypatch):
    text = OLD.replace("driver_version", "kmd_version").replace("cuda_version", "cuda_umd_version")
    smi = answer(gpu_report, monkeypatch, 0, text)
    assert (smi["driver_version"], smi["cuda_version"]) == ("535.261.03", "12.2")


@pytest.mark.parametrize(
    ("rc", "out", "error"),
    [
        (
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
            "it couldn't communicate",
        ),
        (
            18,
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.159\n",
            "Driver/library version mismatch NVML",
        ),
        (6, "No devices were found\n", "No devices were found"),
        (124, "", "exit status 124, no output"),
    ],
)
def test_a_driver_that_does_not_answer(gpu_report, monkeypatch, rc, out, error):
    smi = answer(gpu_report, monkeypatch, rc, out)
    assert smi["rc"] == rc
    assert error in smi["error"]
    assert smi["gpus"] == []


def test_xids(gpu_report, monkeypatch):
    log = """\
1764000000.1 host kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python3, GPU has fallen off the bus.
1764000001.1 host kernel: NVRM: GPU at PCI:0000:3b:00: GPU-1
1764000002.1 host kernel: NVRM: Xid (PCI:0000:5e:00): 31, pid=99, Ch 00000008
"""
    monkeypatch.setattr(gpu_report, "output", lambda *command, **options: (0, log, ""))
    assert gpu_report.xids() == [
        {
            "address": "0000:3b:00",
            "xid": 79,
            "text": "pid=1234, name=python3, GPU has fallen off the bus.",
            "at": 1764000000.1,
        },
        {"address": "0000:5e:00", "xid": 31, "text": "pid=99, Ch 00000008", "at": 1764000002.1},
    ]


def test_the_module_changes_nothing_and_needs_no_root(tmp_path):
    """Run as Ansible runs it, on this machine, which need not have a card."""
    arguments = tmp_path / "arguments.json"
    arguments.write_text(
        json.dumps(
            {"ANSIBLE_MODULE_ARGS": {"_ansible_check_mode": True, "_ansible_remote_tmp": str(tmp_path)}}
        )
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "plugins/modules/gpu_report.py"), str(arguments)],
        capture_output=True, text=True, check=False, timeout=60, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["changed"] is False
    assert sorted(result["report"]) == [
        "cards", "compilers", "held", "holders", "kernel", "module", "nouveau", "nvswitches", "packages",
        "runfile", "secure_boot",
        "services", "smi", "uvm", "xid",
    ]  # fmt: skip


def test_the_stubs_kernel_module_is_elf(tmp_path):
    """What the real modinfo reads in the test hosts: a version and a licence in a .modinfo section."""
    built = load("molecule/stub/build_repo.py").kernel_module(
        {"version": "580.159.04", "license": "Dual MIT/GPL"}
    )
    assert built[:4] == b"\x7fELF"
    assert b"version=580.159.04\0license=Dual MIT/GPL\0" in built


@pytest.mark.parametrize(
    ("file", "licence", "flavour"),
    [
        ("nvidia", "NVIDIA", "proprietary"),
        ("nvidia-current", "NVIDIA", "proprietary"),
        ("nvidia-current-open", "Dual MIT/GPL", "open"),
    ],
)
def test_the_installed_module_is_found_under_the_name_that_its_file_has(
    gpu_report, monkeypatch, file, licence, flavour
):
    """Debian's own packages install nvidia-current.ko, seen with 550.163.01 on Debian 13."""

    def modinfo(*command, **_):
        assert command[:3] == ("modinfo", "-k", "6.12.1")
        return (
            (0, {"version": "550.163.01\n", "license": f"{licence}\n"}[command[4]], "")
            if command[5] == file
            else (1, "", "not found")
        )

    monkeypatch.setattr(gpu_report, "output", modinfo)
    found = gpu_report.module("nvidia", "6.12.1")
    assert (found["installed_version"], found["flavour"]) == ("550.163.01", flavour)
