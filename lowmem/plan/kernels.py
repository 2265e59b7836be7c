"""Chooses the kernels of the linear layers and of the experts, in the order of vLLM 0.32.0's own choice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lowmem.checkpoint.storage import Scheme
from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.weights import inventory_of_card
from lowmem.schema import Device, ModelCard
from lowmem.units import capability_tuple

_INTEGER = ("gptq", "awq", "packed")


def with_kernels(
    engine: EngineConfig, card: ModelCard, device: Device, wanted: str, disabled: str
) -> EngineConfig:
    """Return the settings with the kernels that vLLM takes for this checkpoint on this device.

    `wanted` is --linear-backend, and `disabled` is VLLM_DISABLED_KERNELS.
    """
    if device.kind == "cpu":
        return replace(engine, kernel="cpu", expert_kernel="cpu")
    linear, experts = _formats(card, engine)
    capability = capability_tuple(device.capability)
    if linear == "integer":
        kernel = _integer_kernel(card, engine.vllm, capability, wanted, disabled)
    else:
        kernel = _first("linear", linear, capability) or "native16"
    return replace(engine, kernel=kernel, expert_kernel=_first("experts", experts, capability) or "triton")


def _formats(card: ModelCard, engine: EngineConfig) -> tuple[str, str]:
    """Return the format of most linear layers and that of most experts; "none" is 16 bits."""
    try:
        inventory = inventory_of_card(card, engine)
    except BadInput:  # the plan says why the engine refuses it
        inventory = None
    if inventory is None:
        said = "none" if card.quantization.method == "none" else "integer"
        return ("fp8" if card.quantization.method == "fp8" else said), "none"
    linear: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    for name, schemes in inventory.schemes.items():
        counted = experts if name.endswith(".experts") else linear
        for scheme in schemes - {None}:
            counted[_format(scheme)] += 1
    return _most(linear), _most(experts)


def _most(found: Counter[str]) -> str:
    return found.most_common(1)[0][0] if found else "none"


def _format(scheme: Scheme | None) -> str:
    """Return the name of a format in data/kernels.yml."""
    if scheme is None:
        return "none"
    if scheme.layout in _INTEGER:
        return "integer"
    if scheme.layout == "fp8" and scheme.strategy == "block":
        return "fp8_block"
    return "mx_gpt_oss" if scheme.layout == "mx" and scheme.padded != (1, 1) else scheme.layout


def _first(section: str, name: str, capability: tuple[int, int]) -> str | None:
    """Return the first kernel of a format that takes this capability."""
    for rule in load_yaml("kernels.yml")[section].get(name, ()):
        if "only" in rule:
            fits = capability == capability_tuple(rule["only"])
        else:
            fits = capability >= capability_tuple(rule["from"])
            fits = fits and ("below" not in rule or capability < capability_tuple(rule["below"]))
        if fits:
            return str(rule["kernel"])
    return None


def _integer_kernel(
    card: ModelCard, vllm: tuple[int, int, int], capability: tuple[int, int], wanted: str, disabled: str
) -> str:
    """Choose the kernel of weights in integers.

    Source: 0.32.0, model_executor/kernels/linear and quantization/utils/humming/priority.py.
    """
    q = card.quantization
    if q.bits in (2, 3):
        return "humming"
    if wanted in ("marlin", "machete", "humming"):
        return wanted
    if capability != (9, 0):
        return "marlin"
    if "MacheteLinearKernel" not in disabled and q.group_size in (-1, 64, 128):  # machete_utils.py
        return "machete"
    return "humming" if vllm >= (0, 30, 0) and "HummingLinearKernel" not in disabled else "marlin"
