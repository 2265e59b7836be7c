"""Says what vLLM 0.32.0 can run on a card of a compute capability, by the rules of data/capabilities.yml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.data import load_yaml
from lowmem.plan.engine_config import EngineConfig
from lowmem.schema import Device, ModelCard
from lowmem.units import capability_tuple

READ_SINCE = (0, 32, 0)
"""The version whose rules were read; an older one has other wheels."""


def _rules(section: str) -> dict[str, Any]:
    return load_yaml("capabilities.yml")[section]  # type: ignore[no-any-return]


def _allows(rule: Mapping[str, Any], device: Device) -> bool:
    """Tell whether the device has the capability of a rule; a CPU has none, and no such rule."""
    if device.kind == "cpu":
        return True
    if "only" in rule:
        return device.capability in rule["only"]
    return capability_tuple(device.capability) >= capability_tuple(rule["least"])


def has_machine_code(device: Device) -> bool:
    """Tell whether the locked wheels have code that the card runs: the same major and no higher a minor."""
    own = capability_tuple(device.capability)
    there = [capability_tuple(c) for c in _rules("machine_code")["capabilities"]]
    return device.kind == "cpu" or any(c[0] == own[0] and c[1] <= own[1] for c in there)


def usable_dtype(dtype: str, device: Device) -> str:
    """Return the type that the engine takes if the checkpoint's is asked for (config/model.py)."""
    rules = _rules("dtypes")
    return dtype if dtype not in rules or _allows(rules[dtype], device) else "float16"


def custom_all_reduce(device: Device, cards: int) -> bool:
    """Tell whether vLLM's own all-reduce runs between so many cards of one host."""
    rule = _rules("custom_all_reduce")
    if device.kind == "cpu" or cards == 1:
        return True
    near = cards <= rule["without_nvlink"] or device.nvlink
    return cards in rule["cards"] and near and device.peer_access


def _is_quark_fp8(recipe: object) -> bool:
    """Tell whether a Quark recipe has FP8 weights for all layers."""
    whole = recipe.get("global_quant_config") if isinstance(recipe, Mapping) else None
    weight = whole.get("weight") if isinstance(whole, Mapping) else None
    weight = weight[0] if isinstance(weight, list) and weight else weight
    return isinstance(weight, Mapping) and str(weight.get("dtype")).startswith("fp8")


def _format(card: ModelCard) -> str:
    """Return the number format of quantized weights, as the rules name it; empty for integers."""
    q = card.quantization
    if q.method == "fp8" or (q.method == "modelopt" and q.bits == 8):
        return "fp8"
    recipe = card.config.get("quantization_config")
    if q.method == "quark":
        return "fp8" if q.bits == 8 and _is_quark_fp8(recipe) else ""
    groups = recipe.get("config_groups") if isinstance(recipe, Mapping) else None
    listed = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    if any(isinstance(w, Mapping) and w.get("type") == "float" and w.get("num_bits") == 4 for w in weights):
        return "nvfp4"
    return {"modelopt": "nvfp4", "mxfp4": "mxfp4"}.get(q.method, "")


def refusals(engine: EngineConfig, card: ModelCard, device: Device) -> list[str]:
    """List what the card cannot run, each with what it needs."""
    if device.kind == "cpu":
        return []
    reasons, has = [], f"{device.title} has {device.capability}"
    if engine.vllm >= READ_SINCE and not has_machine_code(device):
        there = _rules("machine_code")["capabilities"]
        return [
            f"the locked wheels (torch 2.13.0+cu130) have no machine code for compute capability"
            f" {device.capability} of {device.title}; they have {', '.join(there)}; use a card"
            " of one of them"
        ]
    if engine.local_cards > 1 and device.slice_of:
        reasons.append(
            f"tensor_parallel_size={engine.tp} on {engine.local_cards} MIG slices: no slice reaches another,"
            " by NCCL or by peer access; use one slice, or cards without MIG"
        )
    q = card.quantization
    methods = _rules("methods")
    own = [f"{q.method}-{_format(card)}", q.method, f"{q.method}-{q.bits}"]
    rule = next((methods[name] for name in own if name in methods), None)
    if rule and not _allows(rule, device):
        reasons.append(
            f"{q.bits}-bit {q.method} weights need compute capability {rule['least']} and {has}; use weights"
            " of 16 bits or another format"
        )
    kernel = _rules("kernels").get(engine.kernel)
    if kernel and "least" in kernel and not _allows(kernel, device):
        reasons.append(
            f"the {engine.kernel} kernel needs compute capability {kernel['least']} and {has}; use weights of"
            " 16 bits"
        )
    if (
        kernel
        and "below" in kernel
        and capability_tuple(device.capability) >= capability_tuple(kernel["below"])
    ):
        reasons.append(
            f"the {engine.kernel} kernel needs compute capability below {kernel['below']} and {has}: vLLM"
            ' stops with "Int8 not supported"; use fp8 weights, or weights of 16 bits'
        )
    return reasons + _dtype_refusals(engine, card, device)


def _dtype_refusals(engine: EngineConfig, card: ModelCard, device: Device) -> list[str]:
    """Refuse float16 for the models that vLLM refuses in it."""
    kind = str(card.config.get("model_type", card.model_type))
    if engine.dtype != "float16" or kind not in _rules("float16_refused")["model_types"]:
        return []
    if _allows(_rules("dtypes")["bfloat16"], device):
        return [f"dtype=float16: vLLM refuses model type {kind} in it (numerical instability); use bfloat16"]
    return [
        f"dtype: model type {kind} needs bfloat16 or float32, and {device.title} ({device.capability}) has no"
        " bfloat16; set dtype=float32, which doubles the memory, or use a card of 8.0 or later"
    ]


def notes(engine: EngineConfig, card: ModelCard, device: Device) -> list[str]:
    """Say what the capability decides for this plan, and which figures of the card are estimates."""
    if device.kind == "cpu":
        return []
    found, has = [], f"compute capability {device.capability}"
    if engine.dtype != card.dtype and not _allows(_rules("dtypes").get(card.dtype, {"least": "1.0"}), device):
        found.append(f"dtype: {engine.dtype}, since {has} has no {card.dtype}; the weights are cast")
    tried = list(_rules("attention").items())
    usable = [name for name, rule in tried if _allows(rule, device)]
    if usable and usable[0] != tried[0][0]:
        needs = tried[0][1]["least"]
        found.append(
            f"attention: {usable[0]}, since {tried[0][0]} needs {needs} and the card has {device.capability}"
        )
    rule = _rules("weight_only_below").get(_format(card))
    if rule and not _allows(rule, device):
        found.append(
            f"{_format(card)} weights: no such kernel below {rule['least']}; Marlin multiplies in 16 bits, so"
            " they save memory and no time of a prompt"
        )
    if engine.tp > 1 and not custom_all_reduce(device, engine.tp):
        found.append(f"all-reduce: NCCL, since {_why_nccl(device, engine.tp)}")
    if device.capability not in _rules("measured_context")["capabilities"]:
        measured = ", ".join(_rules("measured_context")["capabilities"])
        found.append(
            f"estimate: CUDA context and NCCL are those measured on {measured}, not on {device.capability}"
        )
    if device.arm_host:
        found.append("host: this card comes with an ARM CPU, and the locked wheels are for x86-64; not tried")
    guessed = [k for k, text in device.source.items() if text.startswith("estimated") or "assumed" in text]
    if guessed:
        found.append(f"estimate: {', '.join(guessed)} of {device.title}; {device.source[guessed[0]]}")
    return found


def _why_nccl(device: Device, cards: int) -> str:
    rule = _rules("custom_all_reduce")
    if not device.peer_access:
        return f"{device.title} cards do not read one another's memory"
    if cards not in rule["cards"]:
        return f"vLLM's own takes {', '.join(map(str, rule['cards']))} cards, not {cards}"
    return f"vLLM's own takes more than {rule['without_nvlink']} cards over NVLink only"
