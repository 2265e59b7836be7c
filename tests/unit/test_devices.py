"""The device table, and the device of this machine by its NVML name."""

import pytest

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import devices

FIGURES = (
    "nvml_total_mib",
    "torch_total_mib",
    "hbm_gb_per_s",
    "link_gb_per_s",
    "fp16_tflops",
    "peer_gb_per_s",
    "sm_count",
)


@pytest.mark.parametrize("name", devices.names())
def test_every_figure_has_a_source(name):
    assert set(devices.load_device(name).source) == set(FIGURES)


@pytest.mark.parametrize("name", devices.names())
def test_the_driver_hands_out_no_more_than_nvml_shows(name):
    device = devices.load_device(name)
    assert 0.97 * device.nvml_total_mib < device.torch_total_mib <= device.nvml_total_mib


def test_aliases_name_one_device_each():
    seen = [a for name, entry in load_yaml("devices.yml").items() for a in (name, *entry.get("aliases", ()))]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("said", "total_mib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", 40536, "a100-40g-pcie"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80g-pcie"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80g"),
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA H200", 143771, "h200"),
    ],
)
def test_nvml_names(said, total_mib, name):
    device = devices.by_nvml_name(said, total_mib)
    assert (device.name, device.nvml_total_mib) == (name, total_mib)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(BadInput, match="Tesla T4"):
        devices.by_nvml_name("Tesla T4", 15360)


def test_auto_is_this_machine():
    assert devices.load_device("auto").nvml_total_mib > 0
