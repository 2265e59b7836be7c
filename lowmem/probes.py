"""Reads memory from the driver (NVML) and from process trees."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowmem.units import MIB


@dataclass(frozen=True)
class Card:
    """GPU, or MIG slice of one, that this process may open.

    `holders` names the processes that compute on it, each as `pid (name)`. The figures after it are those of
    the whole GPU; 0 is one that NVML does not tell.
    """

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int
    holders: tuple[str, ...] = ()
    bus_bits: int = 0
    memory_mhz: int = 0
    sm_mhz: int = 0
    cores: int = 0
    pcie_generation: int = 0
    pcie_lanes: int = 0


def _nvml() -> Any:
    """Open NVML. Raises RuntimeError, one line, if its Python package, a driver or a GPU is missing."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise RuntimeError(
            "nvidia-ml-py is not installed: `pip install nvidia-ml-py` into this environment"
        ) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise RuntimeError(f"NVML does not start ({error}): look at nvidia-smi") from None
    return nvml


def cards() -> list[Card]:
    """List every GPU that this process may open; of a GPU in MIG mode its slices.

    Raises RuntimeError if NVML does not start.
    """
    nvml = _nvml()
    opened = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            whole = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError:  # DeviceAllow closes the card of another instance
            continue
        opened += [_card(nvml, index, whole, part) for part in _slices(nvml, whole) or [whole]]
    return opened


def _card(nvml: Any, index: int, whole: Any, handle: Any) -> Card:
    """Read a GPU, or a slice of it, which has the capability, clocks and slot of the whole."""
    total, free = _memory_bytes(nvml, handle)
    holders: list[str] = []
    with contextlib.suppress(nvml.NVMLError):
        holders = [f"pid {p.pid}{_named(p.pid)}" for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]

    def told(function: str, *arguments: Any) -> int:
        with contextlib.suppress(nvml.NVMLError, AttributeError):  # an older package has no such function
            return int(getattr(nvml, function)(whole, *arguments))
        return 0

    return Card(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        capability=".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(whole))),
        total_bytes=total,
        free_bytes=free,
        holders=tuple(holders),
        bus_bits=told("nvmlDeviceGetMemoryBusWidth"),
        memory_mhz=told("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_MEM", 2)),
        sm_mhz=told("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1)),
        cores=told("nvmlDeviceGetNumGpuCores"),
        pcie_generation=told("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_lanes=told("nvmlDeviceGetMaxPcieLinkWidth"),
    )


def _memory_bytes(nvml: Any, handle: Any) -> tuple[int, int]:
    """Read total and free memory. A GPU that shares the CPU's has none of its own, and NVML refuses."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=getattr(nvml, "nvmlMemory_v2", None))
    except nvml.NVMLError:
        ram = psutil.virtual_memory()
        return int(ram.total), int(ram.available)
    return int(memory.total), int(memory.free)


def _slices(nvml: Any, whole: Any) -> list[Any]:
    """Return the MIG slices of a GPU; none if it is not in MIG mode."""
    found = []
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        if nvml.nvmlDeviceGetMigMode(whole)[0]:
            for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
                with contextlib.suppress(nvml.NVMLError):  # fewer slices than there may be
                    found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, number))
    return found


def _text(value: bytes | str) -> str:
    # releases of nvidia-ml-py differ in what they return
    return value.decode() if isinstance(value, bytes) else str(value)


def _named(pid: int) -> str:
    try:
        return f" ({psutil.Process(pid).name()})"
    except psutil.Error:  # the sandbox hides processes of other users
        return ""


class Gpus:
    """Visible NVIDIA GPUs in the order of CUDA_VISIBLE_DEVICES.

    Raises RuntimeError if NVML does not start or if fewer than `count` GPUs are visible.
    """

    def __init__(self, count: int) -> None:
        nvml = self._nvml = _nvml()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
        if visible:
            handles = [self._handle(name.strip()) for name in visible.split(",")]
        else:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        if len(handles) < count:
            raise RuntimeError(f"the plan is for {count} GPUs, {len(handles)} are visible")
        self._handles = handles[:count]

    def _handle(self, name: str) -> Any:
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def used_bytes(self) -> tuple[int, ...]:
        """Read the bytes in use on each GPU, by all processes together."""
        return tuple(self._used(handle) for handle in self._handles)

    def _used(self, handle: Any) -> int:
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(handle, version=version).used)
        except self._nvml.NVMLError:  # a GPU that shares the CPU's memory
            ram = psutil.virtual_memory()
            return int(ram.total - ram.available)

    def used_by_bytes(self, pids: set[int]) -> tuple[int, ...]:
        """Read the bytes that these processes use on each GPU.

        They are 0 if the driver does not tell, as in some containers.
        """
        sums = []
        for handle in self._handles:
            processes: list[Any] = []
            with contextlib.suppress(self._nvml.NVMLError):
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            sums.append(sum(int(p.usedGpuMemory or 0) for p in processes if p.pid in pids))
        return tuple(sums)

    def describe(self) -> dict[str, str]:
        """Read name, memory, driver, link and clocks of the first GPU, and the number of GPUs."""
        nvml, handle = self._nvml, self._handles[0]
        facts: dict[str, str] = {"gpus": str(len(self._handles))}

        def note(name: str, read: Callable[[], Any]) -> None:
            with contextlib.suppress(nvml.NVMLError):
                facts[name] = _text(read())

        note("gpu", lambda: nvml.nvmlDeviceGetName(handle))
        note("gpu_total_mib", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total // MIB)
        note("driver", nvml.nvmlSystemGetDriverVersion)
        note("cuda_driver", nvml.nvmlSystemGetCudaDriverVersion)
        note("pcie_generation", lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
        note("pcie_width", lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
        note("sm_clock_max_mhz", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
        note("power_limit_w", lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) // 1000)
        return facts


class ProcessTree:
    """Process and its descendants; `source` says which figure `memory_bytes` gives.

    Reading PSS walks every page of a process under its memory lock. That suits a CPU engine of a few GiB. It
    would disturb an engine that has pinned tens of GiB for a GPU, so `pss=False` reads RSS.
    """

    def __init__(self, root_pid: int, pss: bool) -> None:
        self.root_pid = root_pid
        self.pss = pss
        self.source = "PSS of the process tree" if pss else "RSS of the process tree"
        self._pids: set[int] = {root_pid}
        self._read_at = 0.0

    def pids(self) -> set[int]:
        """Return the processes that are alive; they are looked up at most once a second."""
        if time.monotonic() - self._read_at > 1:
            self._read_at = time.monotonic()
            try:
                self._pids = {
                    self.root_pid,
                    *(p.pid for p in psutil.Process(self.root_pid).children(recursive=True)),
                }
            except psutil.Error:
                self._pids = set()
        return self._pids

    def memory_bytes(self) -> int:
        """Return the bytes of all processes that are alive, as PSS or as RSS."""
        total = 0
        for pid in self.pids():
            try:
                total += _pss_bytes(pid) if self.pss else psutil.Process(pid).memory_info().rss
            except PermissionError:
                self.pss = False
                self.source = (
                    "RSS of the process tree (PSS not readable; shared pages count once per process)"
                )
            except (OSError, psutil.Error):  # the process has ended meanwhile
                continue
        return total


def _pss_bytes(pid: int) -> int:
    with Path(f"/proc/{pid}/smaps_rollup").open() as rollup:
        for line in rollup:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
