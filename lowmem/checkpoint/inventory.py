"""Counts the bytes that vLLM registers on one GPU for a checkpoint: parameters and buffers, by use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.checkpoint.architectures import (
    Architecture,
    Module,
    architecture_of,
    modules,
    table,
    text_config,
)
from lowmem.checkpoint.quantization import Recipe, online_recipe, recipe_of
from lowmem.checkpoint.storage import Scheme, Stored, tensors
from lowmem.errors import BadInput, EngineRefuses

ENGINE_DTYPES = {"float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32",
                 "float": "float32"}  # fmt: skip

_HEADER_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Model types that vLLM 0.32.0 refuses in float16 (config/model.py)."""

_ATTENTION_BUFFER_BYTES = 16
"""Scales of query, key, value and softmax, in float32, of each attention layer."""

TP_LIMIT = 1024


@dataclass(frozen=True)
class TensorGroup:
    """Equal tensors of several layers on one GPU; `*` stands for the layer in the name."""

    name: str
    use: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Experts:
    """Routed experts on one GPU. A token reads `per_token` of `count` in each of `layers` layers."""

    layers: int
    count: int
    per_token: int
    bytes: int

    @property
    def active_bytes(self) -> int:
        """Return the bytes that one token reads."""
        return self.bytes * min(self.per_token, self.count) // self.count if self.count else 0


@dataclass(frozen=True)
class Inventory:
    """Tensors of a checkpoint on one GPU as vLLM 0.32.0 registers them, before a kernel repacks them."""

    architecture: str
    dtype: str
    method: str
    parameter_bytes: int
    buffer_bytes: int
    bytes_by_use: Mapping[str, int]
    tensors: tuple[TensorGroup, ...]
    experts: tuple[Experts, ...]
    layers: tuple[tuple[tuple[str, int], ...], ...]
    """Of each decoder layer the parameters' names inside it and their bytes, in the table's order."""
    schemes: Mapping[str, frozenset[Scheme | None]]
    """Formats of each linear module; `*` stands for the layer in the name."""
    modules: tuple[Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def active_bytes(self) -> int:
        """Return the bytes of parameters that one token reads: all of them but the idle experts."""
        return self.parameter_bytes - sum(e.bytes - e.active_bytes for e in self.experts)


def inventory_of(
    config: Mapping[str, Any],
    tp: int = 1,
    dtype: str = "auto",
    hf_quant_config: Mapping[str, Any] | None = None,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
    online: str = "",
) -> Inventory:
    """Count a checkpoint's tensors on one of `tp` GPUs.

    With the name of an online quantization they are those that the engine makes of them while it loads.
    `headers` holds {dtype, shape} by tensor name. BadInput for an architecture that is not in the table, for
    a config.json that is damaged, and, with vLLM's reason, for what vLLM refuses.
    """
    if isinstance(tp, bool) or not isinstance(tp, int) or not 1 <= tp <= TP_LIMIT:
        raise BadInput(f"tensor_parallel_size is {tp!r}; it must be a whole number from 1 to {TP_LIMIT}")
    architecture = known_architecture(config, headers)
    stored = {n: str(t.get("dtype")) for n, t in headers.items()} if headers else None
    recipe = online_recipe(online) if online else recipe_of(config, hf_quant_config, architecture, stored)
    engine_dtype = engine_dtype_of(config, architecture, dtype, stored)
    ledger = _Ledger(recipe, engine_dtype)
    listed = tuple(modules(architecture, config, tp, recipe.method))
    for module in listed:
        ledger.add(module)
    return replace(ledger.inventory(architecture.name), modules=listed)


def known_architecture(
    config: Mapping[str, Any], headers: Mapping[str, Mapping[str, Any]] | None = None
) -> Architecture:
    """Return the entry of a config.json. BadInput where vLLM has removed it or the table does not have it."""
    architecture = architecture_of(config)
    if architecture is not None:
        return architecture
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        last = table()["removed"].get(name) if isinstance(name, str) else None
        if last:
            raise EngineRefuses(
                f"vLLM 0.32.0 refuses {name}: it was supported until {last}, and is not supported anymore;"
                f" use vLLM {last} or another model"
            )
    raise BadInput(_unknown(config, headers))


def engine_dtype_of(
    config: Mapping[str, Any], architecture: Architecture, wanted: str, stored: Mapping[str, str] | None
) -> str:
    """Return the dtype that vLLM computes in: the given or the stored one, with 16 bits for float32."""
    if wanted != "auto":
        if wanted not in ENGINE_DTYPES:
            raise BadInput(f"dtype is {wanted!r}; it must be one of auto, {', '.join(ENGINE_DTYPES)}")
        return ENGINE_DTYPES[wanted]
    text = text_config(config)
    said = next((v for c in (config, text) for k in ("dtype", "torch_dtype") if (v := c.get(k))), None)
    if said is None and stored:
        found = [_HEADER_DTYPES[d] for d in stored.values() if d in _HEADER_DTYPES]
        said = max(set(found), key=found.count) if found else None
    found_dtype = ENGINE_DTYPES.get(str(said or "float32").removeprefix("torch."))
    if found_dtype is None:
        raise BadInput(f"config.json: torch_dtype is {str(said)[:40]!r}; it must be one of"
                       f" {', '.join(ENGINE_DTYPES)}")  # fmt: skip
    no_half = config.get("model_type") in _NO_FLOAT16
    if found_dtype == "float32":
        return "float16" if architecture.pooling and not no_half else "bfloat16"
    return "bfloat16" if found_dtype == "float16" and no_half else found_dtype


def _unknown(config: Mapping[str, Any], headers: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Say that an architecture is not in the table, what is known of the checkpoint, and what to do."""
    names = config.get("architectures")
    said = ", ".join(str(n)[:60] for n in names[:3]) if isinstance(names, list) and names else None
    kind = said or f"model_type {config.get('model_type')!r}"[:80]
    known = f"; its tensors are {_header_bytes(headers):,} bytes on disk" if headers else ""
    return (
        f"config.json: {kind} is not among the {len(table()['architectures'])} architectures that are counted"
        f" exactly, and sizes are not guessed{known}; plan a model of a known architecture, or measure this"
        " one: start vLLM with it and read 'Model loading took' in its log"
    )


def _header_bytes(headers: Mapping[str, Mapping[str, Any]]) -> int:
    from lowmem.checkpoint.headers import tensor_bytes

    return sum(tensor_bytes(tensor, name) for name, tensor in headers.items())


class _Ledger:
    """Sum of modules, kept by tensor, by use and by experts."""

    def __init__(self, recipe: Recipe, dtype: str) -> None:
        self._recipe, self._dtype = recipe, dtype
        self._groups: dict[tuple[Any, ...], int] = {}
        self._experts: dict[tuple[int, int], list[int]] = {}
        self._cache: dict[tuple[Any, ...], tuple[Stored, ...]] = {}
        self._layers: dict[int, dict[str, int]] = {}
        self._schemes: dict[str, set[Scheme | None]] = {}
        self.buffer_bytes = 0

    def add(self, module: Module) -> None:
        """Count one module."""
        if module.kind in ("rope", "buffer"):
            size = Stored("", module.shape, module.dtype or self._dtype).bytes
            self.buffer_bytes += size
            return
        if module.kind == "attention":
            self._add_attention(module)
            return
        scheme = self._recipe.choose(module) if module.is_linear else None
        if module.is_linear:
            self._schemes.setdefault(_starred(module.name), set()).add(scheme)
        key = (module.kind, module.out, module.inp, module.whole_inp, module.bias, module.shape, module.dtype,
               module.experts, module.bias_rows, scheme)  # fmt: skip
        if key not in self._cache:
            self._cache[key] = tuple(tensors(module, scheme, self._dtype))
        for stored in self._cache[key]:
            self._count(module, stored)
        if module.kind == "experts":
            entry = self._experts.setdefault((module.experts, module.per_token), [0, 0])
            entry[0] += 1
            entry[1] += sum(s.bytes for s in self._cache[key])

    def _add_attention(self, module: Module) -> None:
        self.buffer_bytes += _ATTENTION_BUFFER_BYTES if not module.bias else 0
        short, long = self._recipe.attention_scales
        if module.use == "latent" and not self._recipe.latent:
            return
        if module.use == "vision":
            return
        if short:
            self._count(module, Stored("scales", (short,), self._dtype))
        if long:
            self._count(module, Stored("scales_float32", (long,), "float32"))

    def _count(self, module: Module, stored: Stored) -> None:
        name = f"{module.name}.{stored.suffix}" if stored.suffix else module.name
        pattern = _starred(name)
        if module.layer >= 0 and module.use != "vision":
            layer = self._layers.setdefault(module.layer, {})
            inside = pattern.split(".*.", 1)[-1]
            layer[inside] = layer.get(inside, 0) + stored.bytes
        use = "attention" if module.use == "latent" else module.use
        key = (pattern, use, stored.shape, stored.dtype)
        self._groups[key] = self._groups.get(key, 0) + 1

    def inventory(self, architecture: str) -> Inventory:
        """Return what was counted."""
        groups = []
        by_use: dict[str, int] = {}
        for (name, use, shape, dtype), count in self._groups.items():
            size = count * Stored("", shape, dtype).bytes
            groups.append(TensorGroup(name, use, shape, dtype, count, size))
            by_use[use] = by_use.get(use, 0) + size
        experts = tuple(Experts(n, c, k, b) for (c, k), (n, b) in self._experts.items())
        layers = tuple(tuple(self._layers[n].items()) for n in sorted(self._layers))
        schemes = {name: frozenset(found) for name, found in self._schemes.items()}
        return Inventory(architecture, self._dtype, self._recipe.method, sum(by_use.values()),
                         self.buffer_bytes, by_use, tuple(groups), experts, layers, schemes)  # fmt: skip


def _starred(name: str) -> str:
    """Return a name with `*` for the layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
