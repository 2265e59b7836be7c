"""The device table, what an operator may write instead of a name, and the device of this machine."""

import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from lowmem import probes
from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import devices
from lowmem.units import MIB

ALWAYS = {
    "nvml_total_mib", "torch_total_mib", "hbm_gb_per_s", "link_gb_per_s", "fp16_tflops", "peer_gb_per_s",
    "sm_count",
}  # fmt: skip


@pytest.mark.parametrize("name", devices.names())
def test_every_figure_has_a_source(name):
    for device in map(devices.load_device, (name, *devices.slices(name))):
        given = {figure for figure in devices.FIGURES if getattr(device, figure)}
        assert given - {"sm_count"} <= set(device.source)
        assert set(device.source) >= ALWAYS
        assert all(device.source.values())


@pytest.mark.parametrize("name", devices.names())
def test_the_driver_hands_out_no_more_than_nvml_shows(name):
    device = devices.load_device(name)
    assert 0.97 * device.nvml_total_mib < device.torch_total_mib <= device.nvml_total_mib


@pytest.mark.parametrize("name", devices.names())
def test_rates_follow_the_generation(name):
    """No bf16 before 8.0, no fp8 before 8.9, no fp4 before 10.0; each half as wide is twice as fast."""
    device = devices.load_device(name)
    if device.kind == "cpu":
        return
    capability = float(device.capability)
    assert (device.bf16_tflops is None) == (capability < 8)
    assert (device.fp8_tflops is None) == (capability < 8.9)
    assert (device.fp4_tflops is None) == (capability < 10)
    if device.fp8_tflops:
        assert device.fp8_tflops / device.fp16_tflops == pytest.approx(2, rel=0.02)


def test_aliases_name_one_device_each():
    seen = [a for name, entry in load_yaml("devices.yml").items() for a in (name, *entry.get("aliases", ()))]
    assert len(seen) == len(set(seen))
    written = [devices._canonical(a) for a in seen]
    assert len(written) == len(set(written))


@pytest.mark.parametrize(
    ("said", "total_mib", "name"),
    [
        ("Tesla V100-SXM2-32GB", 32510, "v100-32g"),
        ("Tesla V100-PCIE-16GB", 16160, "v100-16g-pcie"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA GeForce RTX 2080 Ti", 11264, "rtx-2080-ti"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", 40536, "a100-40g-pcie"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80g-pcie"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80g"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096, "a100-40g-mig-3g.20gb"),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", 9728, "a100-80g-pcie-mig-1g.10gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.20gb", 20096, "h100-mig-1g.20gb"),
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA A10G", 23028, "a10g"),
        ("NVIDIA A2", 15356, "a2"),
        ("NVIDIA A30", 24576, "a30"),
        ("NVIDIA A40", 46068, "a40"),
        ("NVIDIA RTX A6000", 49140, "rtx-a6000"),
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12g"),
        ("NVIDIA GeForce RTX 3090", 24576, "rtx-3090"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA L40", 46068, "l40"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16g"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "rtx-pro-6000-server"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA H100 NVL", 95830, "h100-nvl"),
        ("NVIDIA H20", 97871, "h20"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA H200 NVL", 143771, "h200-nvl"),
        ("NVIDIA GH200 480GB", 97871, "gh200-96g"),
        ("NVIDIA GH200 144G HBM3e", 146831, "gh200-144g"),
        ("NVIDIA B200", 183359, "b200"),
        ("NVIDIA B300 SXM6 AC", 275040, "b300"),
        ("NVIDIA GB200", 189471, "gb200"),
        ("NVIDIA GB10", 124610, "gb10"),
    ],
)
def test_nvml_names(said, total_mib, name):
    device = devices.by_nvml_name(said, total_mib)
    assert (device.name, device.nvml_total_mib) == (name, total_mib)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("geforce-rtx-4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("A100-SXM4-40GB", "a100-40g"), ("a100_40gb", "a100-40g"), ("a100-40g", "a100-40g"),
        ("NVIDIA RTX A6000", "rtx-a6000"), ("a6000", "rtx-a6000"), ("4070 Ti Super", "rtx-4070-ti-super"),
        ("a100-1g.5gb", "a100-40g-mig-1g.5gb"), ("A100-7g.80gb", "a100-80g-mig-7g.80gb"),
        ("h100-3g.40gb", "h100-mig-3g.40gb"), ("dgx spark", "gb10"),
        ("a100-pcie-80g", "a100-80g-pcie"), ("PCIe H100", "h100-pcie"), ("V100-PCIE-32GB", "v100-32g-pcie"),
        ("a100-pcie-40gb", "a100-40g-pcie"), ("a100-40g-sxm", "a100-40g"), ("a100-sxm-80g", "a100-80g"),
        ("h100-sxm", "h100"), ("h200-141g", "h200"), ("rtx_4090", "rtx-4090"),
    ],
)  # fmt: skip
def test_a_name_is_read_as_people_write_it(written, name):
    assert devices.load_device(written).name == name


def test_a_slice_has_its_share_of_the_card():
    part = devices.load_device("a100-40g-mig-3g.20gb")
    assert (part.nvml_total_mib, part.sm_count, part.hbm_gb_per_s, part.fp16_tflops) == (
        19968, 42, 777.5, 121.3,
    )  # fmt: skip
    assert (part.slice_of, part.nvlink, part.peer_access) == ("a100-40g", False, False)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match=r"^device 'rtx-4099' is not in the table; use one of .*rtx-4090.* \("):
        devices.load_device("rtx-4099")


def test_a_custom_device_is_read_in_any_order():
    for text in (
        "custom:24GiB,936GB/s,71TFLOPS,sm_86,pcie4x16,82SM",
        "CUSTOM: sm_86 , 71 TFLOPS, pcie4x16,82SM, 0.936TB/s,24576MiB",
    ):
        card = devices.load_device(text)
        assert (card.name, card.capability, card.nvml_total_mib, card.torch_total_mib) == (
            "custom-24g-sm86", "8.6", 24576, 24084,
        )  # fmt: skip
        assert (card.hbm_gb_per_s, card.fp16_tflops, card.link_gb_per_s, card.sm_count) == (936, 71, 25, 82)
        assert card.source["fp16_tflops"] == "given by the operator"
        assert card.source["torch_total_mib"] == "estimated: 98% of what NVML shows"


def test_decimal_and_binary_memory_are_told_apart():
    assert devices.load_device("custom:24GB,936GB/s,71TFLOPS,sm_86").nvml_total_mib == 22888


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("custom:", "give its memory, such as 24GiB"),
        ("custom:24GiB,71TFLOPS,sm_86", "give its memory bandwidth, such as 936GB/s"),
        ("custom:24GiB,936GB/s,sm_86", "give its dense FP16 rate, such as 71TFLOPS"),
        ("custom:24GiB,936GB/s,71TFLOPS", "give its compute capability, such as sm_86"),
        ("custom:24GiB,20GiB,936GB/s,71TFLOPS,sm_86", "'20GiB' gives nvml_total_mib again"),
        ("custom:24,936GB/s,71TFLOPS,sm_86", "'24' is no memory (24GiB)"),
        ("custom:24Gb,936GB/s,71TFLOPS,sm_861", "'sm_861' is no memory"),
        ("custom:-24GiB,936GB/s,71TFLOPS,sm_86", "'-24GiB' is no memory"),
        ("custom:0GiB,936GB/s,71TFLOPS,sm_86", "nvml_total_mib: Input should be greater than 0"),
        ("custom:24GiB,0GB/s,71TFLOPS,sm_86", "hbm_gb_per_s: Input should be greater than 0"),
        ("custom:24GiB,936GB/s,71TFLOPS,sm_86,pcie9x16", "pcie is '9x16'; write generation x lanes"),
        ("custom:" + "1GiB," * 100, "the limit is 300"),
    ],
)
def test_a_mistake_in_a_custom_device_is_one_clear_line(text, said):
    with pytest.raises(BadInput) as refused:
        devices.load_device(text)
    assert said in str(refused.value)
    assert str(refused.value).startswith("--device custom")
    assert "\n" not in str(refused.value)


CARD = "nvml_total_mib: 24576\nhbm_gb_per_s: 936\nfp16_tflops: 71.2\ncapability: 8.6\npcie: 4x8\n"


def test_a_device_file_has_the_fields_of_the_table(tmp_path):
    path = tmp_path / "card.yml"
    path.write_text(CARD)
    card = devices.load_device(str(path))
    assert (card.name, card.capability, card.torch_total_mib, card.link_gb_per_s, card.bf16_tflops) == (
        "card", "8.6", 24084, 12.5, 71.2,
    )  # fmt: skip
    assert card.source["hbm_gb_per_s"] == str(path)
    path.write_text("lab-card:\n" + "".join(f"  {line}\n" for line in CARD.splitlines()))
    assert devices.load_device(str(path)).name == "lab-card"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds no device"),
        (CARD.replace("fp16_tflops: 71.2\n", ""), "fp16_tflops is missing; a device needs"),
        (CARD + "tflops: 3\n", "tflops: Extra inputs are not permitted"),
        (CARD.replace("24576", "true"), "nvml_total_mib is 'True'; it must be a number"),
        (CARD.replace("936", "fast"), "hbm_gb_per_s is 'fast'; it must be a number"),
        (CARD.replace("936", ".inf"), "which is not a finite number"),
        (CARD.replace("8.6", "Ampere"), "capability is 'Ampere'; write it with its minor number"),
        (CARD + "torch_total_mib: 30000\n", "torch_total_mib is 30000, more than nvml_total_mib=24576"),
        (CARD + "name: '$(reboot)'\n", "name: String should match"),
        (CARD + "title: \"a\\nb\"\n", "title: String should match"),
        (CARD + "source: datasheet\n", "source is not a mapping"),
        ("a: &a [*a]\n", "contains itself"),
    ],
)  # fmt: skip
def test_a_bad_device_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "card.yml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        devices.load_device(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def a_card(**changed):
    told = {
        "index": 0, "name": "NVIDIA RTX A5500", "capability": "8.6", "total_bytes": 24564 * MIB,
        "free_bytes": 0, "bus_bits": 384, "memory_mhz": 8001, "sm_mhz": 1665, "cores": 10240,
        "pcie_generation": 4, "pcie_lanes": 16,
    }  # fmt: skip
    return probes.Card(**{**told, **changed})


def test_a_card_that_is_not_in_the_table_is_estimated_from_what_nvml_tells():
    device = devices.of_card(a_card())
    assert (device.hbm_gb_per_s, device.fp16_tflops, device.sm_count, device.link_gb_per_s) == (
        768.1, 136.4, 80, 25,
    )  # fmt: skip
    assert device.estimate.startswith("NVIDIA RTX A5500 is not in the table, estimated")


def test_a_card_of_known_name_and_other_memory_is_estimated():
    device = devices.of_card(
        a_card(name="NVIDIA GeForce RTX 4060 Ti", capability="8.9", total_bytes=8188 * MIB)
    )
    assert (device.nvml_total_mib, bool(device.estimate), device.peer_access) == (8188, True, False)


def test_an_unknown_gpu_that_nvml_tells_nothing_about_is_refused_with_what_to_give():
    with pytest.raises(BadInput, match=r"NVIDIA RTX A5500 .*describe it: --device custom:24GiB"):
        devices.of_card(a_card(cores=0))
    with pytest.raises(BadInput, match="Quadro P400"):
        devices.by_nvml_name("Quadro P400", 2048)


def test_auto_is_this_machine():
    assert devices.load_device("auto").nvml_total_mib > 0


class NvmlError(Exception):
    pass


def nvml_of(monkeypatch, slices=0, unified=False):
    """Play an NVML with one card, in MIG mode or with the CPU's memory, as DGX Spark has it."""
    module = ModuleType("pynvml")

    def memory(handle, version=None):
        if unified:
            raise NvmlError("Not Supported")
        return SimpleNamespace(total=4864 * MIB if handle == "slice" else 40960 * MIB, free=0, used=0)

    def part(_, number):
        if number:
            raise NvmlError("Not Found")
        return "slice"

    module.NVMLError = NvmlError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda _: "whole"
    module.nvmlDeviceGetMemoryInfo = memory
    module.nvmlDeviceGetName = lambda handle: (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb" if handle == "slice" else "NVIDIA A100-SXM4-40GB"
    )
    module.nvmlDeviceGetCudaComputeCapability = lambda _: (8, 0)
    module.nvmlDeviceGetComputeRunningProcesses = lambda _: []
    module.nvmlDeviceGetMigMode = lambda _: (bool(slices), bool(slices))
    module.nvmlDeviceGetMaxMigDeviceCount = lambda _: 7
    module.nvmlDeviceGetMigDeviceHandleByIndex = part
    module.nvmlDeviceGetMaxClockInfo = lambda _, clock: {1: 1410, 2: 1215}[clock]
    module.nvmlDeviceGetMemoryBusWidth = lambda _: 5120
    module.nvmlDeviceGetNumGpuCores = lambda _: 6912
    module.nvmlDeviceGetMaxPcieLinkGeneration = lambda _: 4
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_auto_reads_nvml(monkeypatch):
    nvml_of(monkeypatch)
    assert devices.load_device("auto").name == "a100-40g"
    (card,) = probes.cards()
    assert (card.bus_bits, card.memory_mhz, card.sm_mhz, card.cores) == (5120, 1215, 1410, 6912)
    assert (card.pcie_generation, card.pcie_lanes) == (4, 0)


def test_auto_in_mig_mode_is_the_slice(monkeypatch):
    nvml_of(monkeypatch, slices=1)
    assert devices.load_device("auto").name == "a100-40g-mig-1g.5gb"


def test_a_card_without_memory_of_its_own_has_the_cpus(monkeypatch):
    nvml_of(monkeypatch, unified=True)
    ram = psutil.virtual_memory()
    assert probes.cards()[0].total_bytes == ram.total
    assert 0 < probes.Gpus(1).used_bytes()[0] <= ram.total
