"""Takes vLLM's CUDA paths on a machine that has no card: stubs of NVML, of CUDA and of compiled kernels.

It is used only where no card is found. Nothing computes with the stubs: modules are built on the meta device.

NVML is stubbed: capability, name, memory, UUID, number and links of cards come from a `Card`.
The modules of compiled kernels are empty, for they need libcuda.
A kernel that is asked whether it supports a capability answers as its source does, and does nothing else.
CUDA's streams, events, current device and properties are stubbed.
So is Triton's configuration of a kernel, which Triton has only with a driver.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from lowmem.oracle.question import Card

_KERNELS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch")
_NAMESPACES = ("_C", "_moe_C", "_vllm_fa")
_SHARED_MEMORY_BYTES = {8: 166_912, 9: 232_448, 10: 232_448}
"""Shared memory that a block may opt in to, by major capability (CUDA programming guide, table 30)."""


def install(card: Card) -> None:
    """Put the stubs into place; before anything of vLLM is imported."""
    _stub_kernel_modules(card)
    _stub_torch(card)
    _stub_operators(card)
    _stub_platform(card)


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Idle:
    """Stands for a stream or an event: it may be entered, and each method does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _stub_kernel_modules(card: Card) -> None:
    for name in _KERNELS:
        sys.modules[name] = ModuleType(name)
    flash = ModuleType("vllm.vllm_flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec(flash.__name__, None)
    flash.__path__ = []

    def of_flash(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    # FlashAttention 3 is built for 9.0 (0.32.0, vllm_flash_attn/flash_attn_interface.py)
    supported = {"is_fa_version_supported": lambda v, *_: v == 2 or (v == 3 and card.capability[0] == 9)}
    vars(flash).update({"__getattr__": of_flash, **supported})
    sys.modules[flash.__name__] = flash


def _stub_torch(card: Card) -> None:
    import torch

    properties = SimpleNamespace(
        multi_processor_count=card.multiprocessors,
        total_memory=card.memory_bytes,
        major=card.capability[0],
        minor=card.capability[1],
        name=card.name,
        shared_memory_per_block_optin=_SHARED_MEMORY_BYTES.get(card.capability[0], 101_376),
    )
    cuda = {
        "Stream": _Idle,
        "Event": _Idle,
        "current_stream": lambda *_: _Idle(),
        "current_device": lambda: 0,
        "is_available": lambda: False,
        "get_device_properties": lambda *_, **__: properties,
        "get_device_capability": lambda *_: card.capability,
    }
    accelerator = {
        "current_device_index": lambda: 0,
        "current_device_idx": lambda: 0,
        "device_count": lambda: card.count,
        "set_device_index": _nothing,
        "synchronize": _nothing,
        "current_stream": lambda *_: _Idle(),
        "empty_cache": _nothing,
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "get_memory_info": lambda *_: (card.memory_bytes, card.memory_bytes),
    }
    for owner, stubs in ((torch.cuda, cuda), (torch.accelerator, accelerator)):
        for name, stub in stubs.items():
            setattr(owner, name, stub)
    torch.Stream = torch.Event = _Idle


class _Operator:
    """Stands for a compiled operator. It says which capability it supports, and computes nothing."""

    def __init__(self, name: str, card: Card) -> None:
        self._name, self._card, self.default = name, card, self

    def __call__(self, *_: Any, **__: Any) -> bool | None:
        if "supports" not in self._name:
            return None
        # csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu and fp4/nvfp4_scaled_mm_entry.cu of 0.32.0
        needs = {"fp4": (10, 0), "block_fp8": (9, 0), "fp8": (8, 9), "group_gemm": (9, 0)}
        least = next((c for word, c in needs.items() if word in self._name), (0, 0))
        return self._card.capability >= least

    def __getattr__(self, name: str) -> _Operator:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _stub_operators(card: Card) -> None:
    import torch._ops

    space = torch._ops._OpNamespace
    find = space.__getattr__

    def found_or_stub(self: Any, name: str) -> Any:
        try:
            return find(self, name)
        except AttributeError:
            mine = self.name.split("::")[-1].startswith(_NAMESPACES) and not name.startswith("__")
            # vLLM asks by hasattr whether a kernel was built, while it is imported
            if not mine or not ("supports" in name or _Ready.built):
                raise
            return _Operator(name, card)

    space.__getattr__ = found_or_stub


class _Ready:
    """Whether vLLM is imported; from then on an operator that is missing is one of a kernel module."""

    built = False


def imported() -> None:
    """Say that vLLM is imported: kernels are registered from now on."""
    _Ready.built = True


def _stub_platform(card: Card) -> None:
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class CudaWithoutCard(CudaPlatformBase):  # type: ignore[misc]
        """CUDA platform of vLLM with the figures of a card that is not here."""

    def has_capability(capability: Any, device_id: int = 0) -> bool:
        wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
        return bool(card.capability >= wanted)

    figures: dict[str, Any] = {
        "get_device_capability": lambda device_id=0: DeviceCapability(*card.capability),
        "has_device_capability": has_capability,
        "get_device_name": lambda device_id=0: card.name,
        "get_device_uuid": lambda device_id=0: "GPU-0",
        "get_device_total_memory": lambda device_id=0: card.memory_bytes,
        "is_fully_connected": lambda ids: True,
        "get_cuda_runtime_major": lambda: 12,
        "device_count": lambda: card.count,
        "num_compute_units": lambda device_id=0: card.multiprocessors,
        "is_integrated_gpu": lambda device_id=0: False,
        "set_device": _nothing,
        "log_warnings": _nothing,
        "manual_seed_all": _nothing,
    }
    for name, figure in figures.items():
        setattr(CudaWithoutCard, name, staticmethod(figure))
    vllm.platforms._current_platform = CudaWithoutCard()

    import vllm.triton_utils

    class Configuration:
        def __init__(self, kwargs: Any = None, num_warps: int = 4, num_stages: int = 2, **_: Any) -> None:
            self.kwargs, self.num_warps, self.num_stages, self.num_ctas = (
                kwargs or {},
                num_warps,
                num_stages,
                1,
            )

    vllm.triton_utils.triton.Config = Configuration
