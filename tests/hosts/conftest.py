"""A healthy host as the two report modules read it, to be changed by a test."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path):
    """A file that is not in a package, as a module."""
    name = Path(path).name.replace("-", "_").removesuffix(".py")
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


@pytest.fixture
def gpu_report():
    return load("plugins/modules/gpu_report.py")


CARD = {
    "index": 0,
    "address": "00000000:17:00.0",
    "uuid": "GPU-0",
    "name": "NVIDIA A100-PCIE-40GB",
    "memory_total_mib": 40960,
    "memory_reserved_mib": 571,
    "memory_used_mib": 4,
    "memory_free_mib": 40385,
    "mig": "Disabled",
    "ecc": "Enabled",
    "ecc_uncorrected_volatile": 0,
    "ecc_uncorrected_aggregate": 0,
    "remap_pending": "No",
    "remap_failure": "No",
    "link_generation": 4,
    "link_generation_max": 4,
    "link_width": 16,
    "link_width_max": 16,
    "performance_state": "P0",
    "temperature_c": 34,
    "persistence": "Enabled",
    "slowed_by": [],
    "processes": [],
}
GPU = {
    "cards": [{"address": "0000:17:00.0", "device": "0x20f1"},
    {"address": "0000:1f:00.0", "device": "0x20f1"}],
    "nvswitches": [],
    "secure_boot": None,
    "kernel": {"running": "6.1.0-30-amd64", "installed": ["6.1.0-30-amd64"], "meta_headers": [],
    "without_headers": []},
    "module": {"loaded": True, "loaded_version": "580.159.04", "installed_version": "580.159.04",
    "flavour": "open"},
    "uvm": {"loaded": True, "at_boot": True},
    "nouveau": {"loaded": False, "blacklisted": True},
    "packages": {"nvidia-driver-cuda": "580.159.04-1"},
    "held": ["nvidia-driver-cuda"],
    "runfile": False,
    "smi": {
        "path": "/usr/bin/nvidia-smi", "rc": 0, "error": None, "driver_version": "580.159.04",
        "cuda_version": "13.0",
        "gpus": [CARD, CARD | {"index": 1, "address": "00000000:1F:00.0"}],
    },
    "holders": [],
    "xid": [],
    "services": {
        "persistenced": {"present": True, "active": True, "enabled": True},
        "fabric_manager": {"present": False, "active": False, "enabled": False},
    },
    "compilers": {"cc": "/usr/bin/cc", "nvcc": None, "nvcc_version": None},
}  # fmt: skip
GIB = 2**30
MEMORY = {
    "memory": {"total_bytes": 256 * GIB, "available_bytes": 250 * GIB, "swap_total_bytes": 8 * GIB},
    "own_processes": [],
    "sysctl": {"vm.swappiness": 10, "vm.max_map_count": 262144, "vm.overcommit_memory": 0},
    "disk": {"/opt/vllm-lowmem": {"exists": True, "free_bytes": 500 * GIB, "total_bytes": 900 * GIB}},
}
PLAN = {
    "device_kind": "cuda",
    "device_count": 2,
    "host_ram_bytes": 40 * GIB,
    "per_gpu": {"total": 20_000 * 2**20},
}


@pytest.fixture
def healthy():
    return copy.deepcopy({"gpu": GPU, "memory": MEMORY, "plan": PLAN})
