"""Decides for every module in which format the checkpoint stores its weight, by the rules of vLLM 0.32.0.

A recipe is read from `quantization_config` or `compression_config` of config.json, or from
hf_quant_config.json. What vLLM refuses raises BadInput with vLLM's own reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.checkpoint.architectures import Architecture, Module
from lowmem.checkpoint.patterns import matches, matches_target
from lowmem.checkpoint.storage import Scheme
from lowmem.errors import BadInput, EngineRefuses

PATTERNS_LIMIT = 100_000
"""Names and patterns of one recipe."""

CLASS_NAMES = {"column": "MergedColumnParallelLinear", "row": "RowParallelLinear", "replicated":
               "ReplicatedLinear", "lm_head": "ParallelLMHead", "experts": "RoutedExperts"}  # fmt: skip

GROUP_SIZE_LIMIT = 65_536

Choice = Callable[[Module], "Scheme | None"]


@dataclass(frozen=True)
class Recipe:
    """Quantization of a checkpoint: its method, and the scheme of each module.

    `attention_scales` is the shape of the scales that each attention layer registers: elements of 16 bits and
    of 32 bits. `latent` tells whether latent attention (MLA) registers them too.
    """

    method: str
    choose: Choice
    attention_scales: tuple[int, int] = (0, 0)
    latent: bool = False


UNQUANTIZED = Recipe("none", lambda module: None)


_FP8_BLOCK = Scheme("fp8", 8, -1, strategy="block", online=True)

ONLINE: Mapping[str, tuple[Scheme | None, Scheme | None]] = {
    "fp8_per_tensor": (Scheme("fp8", 8, -1, online=True),) * 2,
    "fp8_per_block": (_FP8_BLOCK, replace(_FP8_BLOCK, padded=(128, 128))),
    "fp8_per_channel": (Scheme("fp8", 8, -1, strategy="channel", online=True),) * 2,
    "mxfp8": (Scheme("mx", 8, 32, online=True),) * 2,
    "mxfp4": (Scheme("mx", 4, 32, online=True),) * 2,
    "int8_per_channel_weight_only": (None, Scheme("int8", 8, -1, strategy="channel", online=True)),
    "nvfp4_per_token": (None, Scheme("nvfp4", 4, 16, static="float32", online=True)),
}
"""What the engine makes of linear layers and of experts at 16 bits while it loads them, by the value of
`--quantization` (0.32.0, config/quantization.py and layers/quantization/online)."""

ONLINE_ALIASES: Mapping[str, str] = {"fp8": "fp8_per_tensor", "experts_int8": "int8_per_channel_weight_only"}
"""Older names (0.32.0, model_loader/weight_utils.py and layers/quantization/experts_int8.py)."""


def online_recipe(name: str) -> Recipe:
    """Return the recipe of an entry of ONLINE; lm_head and embedding stay as they are."""
    linear, experts = ONLINE[name]

    def choose(module: Module) -> Scheme | None:
        if module.kind == "experts":
            return experts
        return None if module.kind == "lm_head" else linear

    return Recipe(name, choose)


def recipe_of(
    config: Mapping[str, Any],
    hf_quant_config: Mapping[str, Any] | None,
    architecture: Architecture,
    stored: Mapping[str, str] | None = None,
) -> Recipe:
    """Read the recipe of a checkpoint. `stored` holds the dtype of each tensor of its headers, if read."""
    found = _raw_recipe(config, hf_quant_config)
    if found is None:
        return UNQUANTIZED
    method = str(found.get("quant_method") or "").lower()
    names = _Names(architecture, stored or {})
    reader = _READERS.get(method) or _READERS.get(method.replace("_", "-"))
    if reader is None:
        raise EngineRefuses(
            f"config.json: vLLM 0.32.0 has no quantization method {method!r}; it takes"
            f" {', '.join(sorted(_READERS))}: use a checkpoint of one of these"
        )
    return reader(found, names)


def _raw_recipe(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Return the recipe as vLLM finds it; one without a method is none (transformers drops it)."""
    nested = config.get("text_config")
    for owner in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            value = owner.get(key)
            if not value:
                continue
            if not isinstance(value, Mapping):
                raise BadInput(
                    f"config.json: {key} is not an object; download the checkpoint's config.json again"
                )
            return _with_method(value)
    return _with_method(hf_quant_config) if hf_quant_config else None


def _with_method(recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a recipe with the method that vLLM gives it, or None where it has none and is passed over."""
    producer, inner = recipe.get("producer"), recipe.get("quantization")
    inner = inner if isinstance(inner, Mapping) else {}
    made_by_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    if (made_by_modelopt or "modelopt_quant_config" in inner) and inner.get("quant_algo") is not None:
        algorithm = str(inner["quant_algo"]).upper()
        if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"):
            raise EngineRefuses(
                f"vLLM 0.32.0 refuses this checkpoint (unknown ModelOpt quant algo: {algorithm[:40]}); use"
                " one whose config.json holds the quantization_config"
            )
        return {**recipe, "quant_method": "modelopt"}
    return recipe if recipe.get("quant_method") else None


@dataclass(frozen=True)
class _Names:
    """Names of modules in a recipe, said as vLLM says them."""

    architecture: Architecture
    stored: Mapping[str, str]

    def mapped(self, name: str) -> str:
        """Return vLLM's name for a name of the checkpoint."""
        for old, new in self.architecture.renames:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    def listed(self, recipe: Mapping[str, Any], *keys: str) -> list[str]:
        """Return the strings of the first of these keys that the recipe has."""
        for key in keys:
            value = recipe.get(key)
            if not value:
                continue
            if not isinstance(value, list) or len(value) > PATTERNS_LIMIT:
                raise BadInput(f"config.json: {key} of the quantization is no list of names; download"
                               " config.json again")  # fmt: skip
            return [n if n.startswith("re:") else self.mapped(n) for n in value if isinstance(n, str)]
        return []

    def quantized_modules(self) -> set[str]:
        """Return the modules whose headers hold no floating point of 16 bits or more."""
        plain = ("F16", "BF16", "F32", "F64")
        return {self.mapped(n.rsplit(".", 1)[0]) for n, dtype in self.stored.items() if dtype not in plain}


def shards_of(module: Module) -> list[str]:
    """Return the checkpoint's names of the parts of a merged module, or its own name."""
    if not module.parts:
        return [module.name]
    stem = module.name.rsplit(".", 1)[0]
    return [f"{stem}.{part}" for part in module.parts]


def _all_or_none(module: Module, found: list[bool]) -> bool:
    if any(found) and not all(found):
        raise BadInput(
            f"the recipe quantizes some parts of {module.name} and not others; vLLM 0.32.0 refuses it: use a"
            " recipe that treats them alike"
        )
    return all(found)


def _whole(recipe: Mapping[str, Any], keys: tuple[str, ...], default: int, allowed: Iterable[int]) -> int:
    """Return a whole number of a recipe; BadInput where it is none of `allowed`."""
    for key in keys:
        value = recipe.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise BadInput(f"config.json: quantization {key} is {str(value)[:40]!r}; vLLM 0.32.0 takes"
                           f" {_said(allowed)}")  # fmt: skip
        return value
    return default


def _said(allowed: Iterable[int]) -> str:
    return (
        f"-1 or 1 to {GROUP_SIZE_LIMIT}" if isinstance(allowed, _GroupSizes) else ", ".join(map(str, allowed))
    )


class _GroupSizes:
    """Group sizes that a recipe may have: -1 for a whole row, or a number of weights."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and (value == -1 or 1 <= value <= GROUP_SIZE_LIMIT)

    def __iter__(self) -> Any:
        return iter((-1, 32, 64, 128))


GROUP_SIZES = _GroupSizes()


# --- fp8 ---


def _exact_skip(ignored: list[str]) -> Callable[[Module], bool]:
    """Return vLLM's rule of exact names. A merged module follows its parts, and experts names with theirs."""
    exact = set(ignored)
    of_experts = [name for name in ignored if "experts" in name]

    def skipped(module: Module) -> bool:
        if module.name in exact:
            return True
        if module.parts:
            return _all_or_none(module, [name in exact for name in shards_of(module)])
        if "experts" in module.name:
            return any(module.name in name for name in of_experts)
        return False

    return skipped


def _fp8(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    activation = recipe.get("activation_scheme", "dynamic")
    if activation not in ("static", "dynamic"):
        raise BadInput(f"config.json: quantization activation_scheme is {str(activation)[:40]!r}; vLLM 0.32.0"
                       " takes static, dynamic")  # fmt: skip
    block = recipe.get("weight_block_size")
    static = "float32" if activation == "static" else ""
    if block is not None:
        if activation != "dynamic":
            raise BadInput("config.json: vLLM 0.32.0 takes fp8 blocks with activation_scheme dynamic only")
        scheme = Scheme("fp8", 8, -1, strategy="block", block=_block(block))
    else:
        scheme = Scheme("fp8", 8, -1, static=static)
    skipped = _exact_skip(names.listed(recipe, "ignored_layers", "modules_to_not_convert"))
    deepseek_v4 = names.architecture.entry.get("quantization") == "deepseek_v4"
    experts = scheme
    if deepseek_v4:
        nvfp4 = str(recipe.get("moe_quant_algo") or "").upper() == "NVFP4"
        fp4 = names.architecture.text.get("expert_dtype", "fp4") == "fp4"
        experts = _MODELOPT["NVFP4"] if nvfp4 else Scheme("mx", 4, 32) if fp4 else scheme
    scales = replace(scheme, scale="float8") if deepseek_v4 and recipe.get("scale_fmt") == "ue8m0" else scheme

    def choose(module: Module) -> Scheme | None:
        if module.kind == "lm_head" or skipped(module):
            return None
        return experts if module.kind == "experts" else scales

    return Recipe("fp8", choose, attention_scales=(0, 0) if deepseek_v4 else (4, 0))


def _block(value: Any) -> tuple[int, int]:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(n) is int and 1 <= n <= GROUP_SIZE_LIMIT for n in value)
    ):
        return (value[0], value[1])
    raise BadInput(f"config.json: quantization weight_block_size is {str(value)[:40]!r}; it must be two whole"
                   " numbers such as [128, 128]")  # fmt: skip


# --- GPTQ, AWQ, AutoRound ---


def _gptq(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    dynamic = recipe.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise BadInput("config.json: quantization dynamic is no object; download config.json again")
    base = _gptq_scheme(recipe, {})
    lm_head = bool(recipe.get("lm_head"))
    wanted = _gptq_modules(recipe, names)

    def choose(module: Module) -> Scheme | None:
        if module.kind == "lm_head" and not lm_head:
            return None
        if wanted and module.kind != "experts":
            found = [any(w in shard for w in wanted) for shard in shards_of(module)]
            if not _all_or_none(module, found):
                return None
        for pattern, override in dynamic.items():
            if pattern.startswith("-:") and matches(pattern[2:], module.name):
                return None
            if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module.name):
                return _gptq_scheme(recipe, override if isinstance(override, Mapping) else {})
        return base

    return Recipe("gptq", choose)


def _gptq_scheme(recipe: Mapping[str, Any], override: Mapping[str, Any]) -> Scheme:
    merged = {**recipe, **override}
    group = _whole(merged, ("group_size",), 128, GROUP_SIZES)
    bits, symmetric = merged.get("bits"), merged.get("sym", True)
    if bits not in (4, 8) or not symmetric:
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses this GPTQ checkpoint (unsupported quantization config: bits={bits},"
            f" sym={symmetric}); it takes symmetric 4 or 8 bits: use a checkpoint of one of these"
        )
    if merged.get("desc_act") and group != -1:
        raise EngineRefuses(
            "vLLM 0.32.0 refuses GPTQ checkpoints with desc_act (activation ordering) and groups; use a"
            " checkpoint made with desc_act false"
        )
    return Scheme("gptq", bits, group)


def _gptq_modules(recipe: Mapping[str, Any], names: _Names) -> list[str]:
    """Return the parts of names of quantized modules: what the recipe says, else what the headers show."""
    said = recipe.get("modules_in_block_to_quantize")
    if isinstance(said, list) and said:
        flat = [n for group in said for n in (group if isinstance(group, list) else [group])]
        return [names.mapped(n) for n in flat if isinstance(n, str)]
    return sorted(names.quantized_modules())


def _awq(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    bits = recipe.get("w_bit", recipe.get("bits"))
    if bits != 4:
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses AWQ with bits={str(bits)[:40]}; it takes 4: use a checkpoint of 4 bits"
        )
    scheme = Scheme("awq", 4, _whole(recipe, ("q_group_size", "group_size"), 128, GROUP_SIZES))
    ignored = names.listed(recipe, "modules_to_not_convert")
    if not ignored and names.stored:
        layers = {names.mapped(n.rsplit(".", 1)[0]) for n in names.stored}
        ignored = sorted(layers - names.quantized_modules())
    lm_head = bool(recipe.get("lm_head"))

    def choose(module: Module) -> Scheme | None:
        if module.kind == "lm_head" and not lm_head:
            return None
        found = [any(name in shard for name in ignored) for shard in shards_of(module)]
        return None if _all_or_none(module, found) else scheme

    return Recipe("awq", choose)


def _auto_round(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    """Read AutoRound ("inc"): bits by module, packed as GPTQ or AWQ, as fp8 blocks or as MXFP."""
    extra = recipe.get("extra_config") or {}
    if not isinstance(extra, Mapping) or len(extra) > PATTERNS_LIMIT:
        raise BadInput("config.json: quantization extra_config is no object; download config.json again")
    settings_of: dict[str, Mapping[str, Any]] = {
        names.mapped(k): v for k, v in extra.items() if isinstance(k, str) and isinstance(v, Mapping)
    }
    special = [k for k in settings_of if any(c in "*+?^$()[]{}|\\" for c in k)]
    blocks = recipe.get("block_name_to_quantize") or recipe.get("to_quant_block_names")
    blocks = [blocks] if isinstance(blocks, str) else blocks if isinstance(blocks, list) else []
    blocks = [names.mapped(b) for part in blocks for b in str(part).split(",") if b]

    def entry(name: str) -> Mapping[str, Any] | None:
        if name in settings_of:
            return settings_of[name]
        return next((settings_of[p] for p in special if matches(p, name, anywhere=True)), None)

    def settings(name: str, quantized: bool) -> tuple[int, Any, bool]:
        own = entry(name)
        own = {} if own is None else own
        return (own.get("bits", recipe.get("bits", 4) if quantized else 16),
                own.get("group_size", recipe.get("group_size", 128)),
                own.get("sym", recipe.get("sym", True)))  # fmt: skip

    def choose(module: Module) -> Scheme | None:
        quantized = module.kind != "lm_head"
        if blocks:
            quantized = any(module.name.startswith(block) for block in blocks)
        if module.kind == "experts":
            inside = [settings(n, quantized) for n in settings_of if n.startswith(module.name)]
            found = inside[:1] if inside and len(set(map(str, inside))) == 1 else []
            chosen = found[0] if found else settings(module.name, quantized)
        else:
            shards = shards_of(module)
            if module.parts and any(entry(shard) is not None for shard in shards):
                each = [settings(shard, quantized) for shard in shards]
                _all_or_none(module, [one == each[0] for one in each])
                chosen = each[0]
            else:
                short = next((k for k in settings_of if module.name.endswith("." + k)), module.name)
                chosen = settings(short, quantized)
        bits, group, symmetric = chosen
        return None if not isinstance(bits, int) or bits >= 16 else _auto_round_scheme(
            recipe, bits, group, bool(symmetric))  # fmt: skip

    return Recipe("auto-round", choose)


def _auto_round_scheme(recipe: Mapping[str, Any], bits: int, group: Any, symmetric: bool) -> Scheme:
    kind = str(recipe.get("data_type") or "int")
    if "mx_fp" in kind:
        return Scheme("mx", bits, 32)
    if kind.startswith("fp") and bits == 8:
        return Scheme("fp8", 8, -1, strategy="block", block=_block(group))
    group = _whole({"group_size": group}, ("group_size",), 128, GROUP_SIZES)
    if "awq" in str(recipe.get("packing_format", "")) or "awq" in str(recipe.get("backend", "")):
        if bits != 4:
            raise EngineRefuses(f"vLLM 0.32.0 refuses AutoRound packed as AWQ with bits={bits}; it takes 4")
        return Scheme("awq", bits, group)
    if not 2 <= bits <= 8:
        raise EngineRefuses(f"vLLM 0.32.0 refuses AutoRound with bits={bits}; it takes 2 to 8")
    if bits in (4, 8) and not symmetric:
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses this AutoRound checkpoint (bits={bits}, sym=False is not supported); use a"
            " symmetric one, or one packed as auto_round:auto_awq"
        )
    return Scheme("gptq", bits, group)


# --- compressed-tensors ---


def _compressed_tensors(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    groups = recipe.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise BadInput("config.json: quantization config_groups is no object; download config.json again")
    _refuse_sparsity(recipe)
    targets: dict[str, Scheme | None] = {}
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise BadInput(
                "config.json: a group of quantization config_groups has no targets; download config.json"
                " again"
            )
        listed = [t for t in group["targets"] if isinstance(t, str)]
        if len(listed) == 1 and listed[0].endswith("Attention"):
            continue
        scheme = _compressed_scheme(group, str(group.get("format") or recipe.get("format") or ""))
        for target in listed:
            mapped = names.mapped(target) if "." in target and not target.startswith("re:") else target
            targets[mapped] = scheme
    ignored = names.listed(recipe, "ignore")
    ignore_names, ignore_patterns = set(ignored), [i for i in ignored if i.startswith("re:")]

    def is_ignored(name: str) -> bool:
        return name in ignore_names or any(matches(p[3:], name) for p in ignore_patterns)

    def match(module: Module, shards: list[str]) -> Scheme | None:
        for target, scheme in targets.items():
            if matches_target(target, module.name):
                return scheme
        hits = [next((t for t in targets if matches_target(t, s)), None) for s in shards]
        if hits and all(h is not None for h in hits):
            return targets[str(hits[0])]
        kind = CLASS_NAMES[module.kind].lower()
        for target, scheme in targets.items():
            of_experts = module.kind == "experts" and target == "Linear"
            if not target.startswith("re:") and (of_experts or target.lower() in kind):
                return scheme
        return None

    def choose(module: Module) -> Scheme | None:
        shards = shards_of(module)
        if module.kind == "experts":
            shards = [f"{module.name}.0.{p}" for p in module.parts or ("gate_proj", "up_proj", "down_proj")]
        if is_ignored(module.name) and module.kind != "experts":
            return None
        if _all_or_none(module, [is_ignored(shard) for shard in shards]):
            return None
        return match(module, shards)

    return Recipe("compressed-tensors", choose, attention_scales=_compressed_attention(recipe))


def _refuse_sparsity(recipe: Mapping[str, Any]) -> None:
    sparsity = recipe.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("targets"):
        raise EngineRefuses(
            "vLLM 0.32.0 refuses this checkpoint (sparsity support has been removed from compressed-tensors);"
            " use a checkpoint without sparsity_config"
        )


def _compressed_attention(recipe: Mapping[str, Any]) -> tuple[int, int]:
    scheme = recipe.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and (scheme.get("type") != "float" or scheme.get("num_bits") != 8):
        raise EngineRefuses(
            "vLLM 0.32.0 refuses this kv_cache_scheme (supported is num_bits=8, type=float, however received"
            f" num_bits={scheme.get('num_bits')}, type={scheme.get('type')}); use a checkpoint without it"
        )
    return (3, 3)


def _compressed_scheme(group: Mapping[str, Any], form: str) -> Scheme | None:
    """Read one config group as compressed-tensors and vLLM do."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise BadInput("config.json: quantization config_groups has no object in weights; download"
                       " config.json again")  # fmt: skip
    order = weights.get("actorder")
    if order in ("group", "dynamic", True):
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses this checkpoint (activation ordering, actorder={order!r}, is no longer"
            " supported); use a checkpoint with static or weight ordering, or without one"
        )
    bits = _whole(weights, ("num_bits",), 8, range(2, 17))
    size = _whole(weights, ("group_size",), -1, GROUP_SIZES)
    strategy = weights.get("strategy") or ("group" if size > 0 else "channel" if size == -1 and
                                           weights.get("group_size") == -1 else "tensor")  # fmt: skip
    symmetric, is_float = bool(weights.get("symmetric", True)), weights.get("type", "int") == "float"
    activations: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    has_input = bool(activations)
    static = "float32" if has_input and not activations.get("dynamic") else ""
    if is_float and bits == 4 and size == 16:
        return Scheme("nvfp4", 4, 16, static="float32" if has_input else "")
    if is_float and size == 32 and strategy == "group" and bits in (4, 8):
        return Scheme("mx", bits, 32)
    if is_float and bits == 8 and strategy in ("tensor", "channel", "block"):
        block = weights.get("block_structure")
        return Scheme("fp8", 8, -1, strategy=strategy, static=static,
                      block=_block(block) if strategy == "block" else (128, 128))  # fmt: skip
    if is_float and bits == 4:
        return Scheme("packed", 4, size, zeros=not symmetric)
    packed = form == "pack-quantized" and strategy in ("channel", "group")
    if not is_float and packed and bits <= 8:
        return Scheme("packed", bits, size if strategy == "group" else -1, zeros=not symmetric)
    if not is_float and bits == 8 and has_input and strategy in ("tensor", "channel"):
        return Scheme("int8", 8, -1, strategy=strategy, static=static,
                      zeros=not activations.get("symmetric", True))  # fmt: skip
    raise EngineRefuses(
        f"vLLM 0.32.0 refuses this checkpoint (no compressed-tensors compatible scheme was found: num_bits"
        f" {bits}, type {weights.get('type')}, strategy {strategy}, format {form or None}); use another one"
    )


# --- ModelOpt ---

_MODELOPT = {
    "FP8": Scheme("fp8", 8, -1, static="float32"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", 8, -1, strategy="channel"),
    "FP8_PB_WO": Scheme("fp8", 8, -1, strategy="block"),
    "NVFP4": Scheme("nvfp4", 4, 16, static="float32"),
    "W4A16_NVFP4": Scheme("nvfp4", 4, 16, static="model"),
    "MXFP8": Scheme("mx", 8, 32),
}


def _modelopt(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    inner = recipe.get("quantization")
    own: Mapping[str, Any] = inner if isinstance(inner, Mapping) else recipe
    algorithm = str(own.get("quant_algo") or "").upper()
    skipped = _modelopt_skip(own, names)
    if algorithm == "MIXED_PRECISION":
        return _modelopt_mixed(own, names, skipped)
    if algorithm == "NVFP4" and _weights_only(recipe):
        algorithm = "W4A16_NVFP4"
    if algorithm not in _MODELOPT:
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses this checkpoint (ModelOpt currently only supports {', '.join(_MODELOPT)}"
            f" and MIXED_PRECISION, quant_algo is {algorithm or None}); use a checkpoint of one of these"
        )
    scheme = _MODELOPT[algorithm]
    if scheme.layout == "nvfp4":
        scheme = replace(scheme, group=_whole(own, ("group_size",), 16, GROUP_SIZES))

    def choose(module: Module) -> Scheme | None:
        return None if skipped(module) else scheme

    return Recipe(f"modelopt {algorithm}", choose, attention_scales=(4, 0), latent=True)


def _weights_only(recipe: Mapping[str, Any]) -> bool:
    groups = recipe.get("config_groups")
    return isinstance(groups, Mapping) and bool(groups) and all(
        isinstance(g, Mapping) and g.get("input_activations") is None for g in groups.values())  # fmt: skip


def _modelopt_skip(own: Mapping[str, Any], names: _Names) -> Callable[[Module], bool]:
    """Return ModelOpt's rule: exact names, parts of names, and wildcards."""
    said = own.get("exclude_modules") or own.get("ignore") or []
    if not isinstance(said, list):
        raise BadInput(
            "the recipe's exclude_modules is no list of names; download the checkpoint's files again"
        )
    listed = []
    for name in said:
        if isinstance(name, str):
            split = len(name) >= 2 and name[-1] == "*" and name[-2] != "."
            listed += [name[:-1], f"{name[:-1]}.*"] if split else [name]
    listed = [names.mapped(name) for name in listed[:PATTERNS_LIMIT]]
    exact = _exact_skip(listed)
    plain, wild = [n for n in listed if "*" not in n], [n for n in listed if any(c in n for c in "*?[")]

    def skipped(module: Module) -> bool:
        if listed and exact(module):
            return True
        name = module.name.removeprefix("language_model.")
        if any(n in module.name or n in name for n in plain):
            return True
        if any(fnmatch.fnmatchcase(module.name, pattern) for pattern in wild):
            return True
        return any(word in module.name for word in ("vision_tower", "vision_model", "vit_large_projector"))

    return skipped


def _modelopt_mixed(own: Mapping[str, Any], names: _Names, skipped: Callable[[Module], bool]) -> Recipe:
    layers = own.get("quantized_layers")
    if not isinstance(layers, Mapping) or not layers:
        raise EngineRefuses(
            "vLLM 0.32.0 refuses this checkpoint (MIXED_PRECISION requires a non-empty quantized_layers);"
            " download hf_quant_config.json again"
        )
    found = {names.mapped(k): str(v.get("quant_algo") or "").upper() for k, v in layers.items()
             if isinstance(k, str) and isinstance(v, Mapping)}  # fmt: skip
    groups = [v.get("group_size") for v in layers.values() if isinstance(v, Mapping)]
    group = _whole(
        {"g": next((g for g in groups if g is not None), own.get("group_size"))}, ("g",), 16, GROUP_SIZES
    )
    parents = _parents(found)

    def algorithm(module: Module) -> str | None:
        if module.name in found:
            return found[module.name]
        algos = {found[s] for s in shards_of(module) if s in found}
        if len(algos) > 1:
            _all_or_none(module, [True, False])
        if algos:
            return algos.pop()
        if module.name.endswith("lm_head") and "lm_head" in found:
            return found["lm_head"]
        if module.name in parents:
            return parents[module.name]
        if module.name.endswith(".experts"):
            return parents.get(module.name.removesuffix(".experts"))
        return None

    def choose(module: Module) -> Scheme | None:
        if skipped(module):
            return None
        scheme = _MODELOPT.get(algorithm(module) or "")
        return replace(scheme, group=group) if scheme and scheme.layout == "nvfp4" else scheme

    kv = own.get("kv_cache_quant_algo") or own.get("kv_cache_scheme")
    return Recipe("modelopt MIXED_PRECISION", choose, attention_scales=(4, 0) if kv else (0, 0))


def _parents(found: Mapping[str, str]) -> dict[str, str]:
    """Return the algorithm of the first quantized module below each module."""
    parents: dict[str, str] = {}
    for name, algorithm in found.items():
        while "." in name:
            name = name.rsplit(".", 1)[0]
            parents.setdefault(name, algorithm)
    return parents


# --- Quark, MXFP4 ---


def _quark(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    if not isinstance(recipe.get("export"), Mapping):
        raise EngineRefuses("vLLM 0.32.0 refuses this Quark checkpoint (the export key should be included);"
                       " download config.json again")  # fmt: skip
    ignored = names.listed(recipe, "exclude")
    base = recipe.get("global_quant_config")
    layers = recipe.get("layer_quant_config") or {}
    layers = layers if isinstance(layers, Mapping) else {}
    schemes: dict[int, Scheme] = {}

    def scheme_of(own: Any) -> Scheme:
        if id(own) not in schemes:
            schemes[id(own)] = _quark_scheme(own)
        return schemes[id(own)]

    def choose(module: Module) -> Scheme | None:
        if module.kind == "lm_head":
            return None
        shards = shards_of(module)
        if module.kind == "experts" and any(i.startswith(module.name + ".") for i in ignored):
            return None
        if any(matches_target(i, module.name) for i in ignored):
            return None
        if _all_or_none(module, [any(matches_target(i, s) for i in ignored) for s in shards]):
            return None
        for pattern, own in layers.items():
            if fnmatch.fnmatchcase(shards[0], pattern):
                return scheme_of(own)
        return scheme_of(base)

    return Recipe("quark", choose, attention_scales=(4, 0))


def _quark_scheme(own: Any) -> Scheme:
    weight = own.get("weight") if isinstance(own, Mapping) else None
    inputs = own.get("input_tensors") if isinstance(own, Mapping) else None
    weight = weight[0] if isinstance(weight, list) and len(weight) == 1 else weight
    inputs = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else inputs
    if isinstance(weight, Mapping):
        dtype, scheme = weight.get("dtype"), weight.get("qscheme")
        static = "float32" if isinstance(inputs, Mapping) and not inputs.get("is_dynamic") else ""
        if dtype == "fp8_e4m3" and isinstance(inputs, Mapping):
            if scheme == "per_block":
                return Scheme("fp8", 8, -1, strategy="block", block=_block(weight.get("block_size")))
            return Scheme(
                "fp8", 8, -1, strategy="channel" if scheme == "per_channel" else "tensor", static=static
            )
        if dtype == "int8" and isinstance(inputs, Mapping):
            by = "channel" if scheme == "per_channel" else "tensor"
            return Scheme("int8", 8, -1, strategy=by, static=static, stored_zeros=True)
        if dtype == "fp4" and scheme == "per_group":
            return Scheme("mx", 4, 32)
        if dtype in ("int4", "uint4") and inputs is None:
            return Scheme("awq", 4, _whole(weight, ("group_size",), 128, GROUP_SIZES))
    raise EngineRefuses(
        "vLLM 0.32.0 refuses this checkpoint (no Quark compatible scheme was found), or this plan does not"
        " know it; use one of fp8, int8, fp4 or int4 weights"
    )


def _mxfp4(recipe: Mapping[str, Any], names: _Names) -> Recipe:
    """Read MXFP4: experts only; the kernel of GPT-OSS rounds their sizes up."""
    gpt_oss = names.architecture.entry.get("quantization") == "gpt_oss"
    scheme = Scheme("mx", 4, 32, padded=(256, 128) if gpt_oss else (1, 1))
    return Recipe("mxfp4", lambda module: scheme if module.kind == "experts" else None)


def _refused(reason: str) -> Callable[[Mapping[str, Any], _Names], Recipe]:
    def refuse(recipe: Mapping[str, Any], names: _Names) -> Recipe:
        raise EngineRefuses(
            f"vLLM 0.32.0 refuses quantization method {recipe.get('quant_method')!r}: {reason}"
        )

    return refuse


_READERS: Mapping[str, Callable[[Mapping[str, Any], _Names], Recipe]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "inc": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "quark": _quark,
    "mxfp4": _mxfp4,
    "fbgemm_fp8": _refused("it is deprecated; use an fp8 or compressed-tensors checkpoint"),
    "fp_quant": _refused("it is deprecated; use a compressed-tensors checkpoint"),
    "torchao": _refused(
        "its locked environment has no torchao; use an awq, gptq or compressed-tensors checkpoint"
    ),
}
