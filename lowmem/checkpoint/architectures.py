"""Lists the modules that vLLM builds for a config.json, by the table data/architectures.yml.

The table holds per architecture the modules, their sizes as expressions of config fields, the axis that
tensor parallelism cuts, and the use. This file knows the kinds of module of the engine, and no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.checkpoint.expressions import ALIAS, Scope, evaluate, evaluate_size
from lowmem.data import load_yaml
from lowmem.errors import BadInput

VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to this before it splits it (0.32.0, vocab_parallel_embedding.py)."""

LAYERS_LIMIT = 2_000
"""No model has as many layers; a larger number is damage."""

DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "float8", "uint8", "bool")

MAPPING: Mapping[str, Any] = {}

_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Module:
    """Module of the engine on one GPU of a tensor-parallel group.

    `out` holds the rows of each merged part and `inp` the columns, both cut. `whole_out` and `whole_inp` are
    uncut. `parts` are the names of the checkpoint's modules that are merged into it. A tensor has a `shape`.
    """

    name: str
    kind: str
    use: str
    out: tuple[int, ...] = ()
    inp: int = 0
    whole_out: tuple[int, ...] = ()
    whole_inp: int = 0
    parts: tuple[str, ...] = ()
    bias: bool = False
    bias_rows: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    experts: int = 0
    gated: bool = True
    plain: bool = False
    layer: int = -1
    per_token: int = 0

    @property
    def is_linear(self) -> bool:
        """Tell whether a quantization may store this module's weight in another format."""
        return self.kind in ("column", "row", "replicated", "lm_head", "experts") and not self.plain


@dataclass(frozen=True)
class Architecture:
    """Entry of the table: what is built, from which part of config.json, and how names are mapped."""

    name: str
    entry: Mapping[str, Any]
    text: Mapping[str, Any]

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """Return prefixes of the checkpoint's names and what vLLM calls them, first match first."""
        return tuple((str(a), str(b)) for a, b in self.entry.get("renames", ()))

    @property
    def pooling(self) -> bool:
        """Tell whether vLLM runs the model as a pooling model, which has no lm_head."""
        return bool(self.entry.get("pooling", False))


def table() -> Mapping[str, Any]:
    """Return data/architectures.yml."""
    found: Mapping[str, Any] = load_yaml("architectures.yml")
    return found


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the entry of the table for a config.json, or None where the table has none."""
    names = config.get("architectures")
    listed = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    kind = config.get("model_type")
    if not listed and isinstance(kind, str):
        default = table()["model_types"].get(kind)
        listed = [default] if default else []
    for name in listed:
        entry = _resolved(name)
        if entry is not None:
            return Architecture(name, entry, text_config(config))
    return None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the text model; the whole one where it is not nested."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, Mapping):
            return part
    return config


def _resolved(name: str) -> Mapping[str, Any] | None:
    """Return an entry with those it extends merged in; `let` and `defaults` are merged key by key."""
    entries = table()["architectures"]
    entry = entries.get(name)
    if entry is None:
        return None
    seen = [name]
    while "like" in entry:
        base_name = entry["like"]
        if base_name in seen:
            raise ValueError(f"architectures.yml: {name} is like itself")
        seen.append(base_name)
        base = entries[base_name]
        entry = _over(base, entry) | ({"like": base["like"]} if "like" in base else {})
    return dict(entry)


class Part:
    """Names that the expressions of one part of a model may use."""

    def __init__(self, top: Mapping[str, Any], config: Mapping[str, Any], entry: Mapping[str, Any],
                 known: Mapping[str, Any]) -> None:  # fmt: skip
        """Bind the whole config.json, this part's own one, the part's entry and other names."""
        self._config = config
        self._lets: Mapping[str, Any] = entry.get("let", MAPPING)
        self._defaults: Mapping[str, Any] = entry.get("defaults", MAPPING)
        self._layer_lets: Mapping[str, Any] = entry.get("layer_let", MAPPING)
        self._known: dict[str, Any] = {"top": top, "config": config, **known}
        self._open: set[str] = set()

    def scope(self, name: str) -> Any:
        """Return the value of a name: a `let`, a field of config.json, a default of its class, or None."""
        if name in self._known:
            return self._known[name]
        if name.startswith(ALIAS):
            return self._lets.get(name.removeprefix(ALIAS))
        if name in self._lets and name not in self._open:
            self._open.add(name)  # within its own `let` a name means the field of config.json
            value = evaluate(self._lets[name], self.scope)
            self._open.discard(name)
            self._known[name] = value
            return value
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def layer(self, index: int, lets: Mapping[str, Any]) -> Scope:
        """Return the scope of one layer: `i` is its index, and the layer's own `let` come first."""
        known: dict[str, Any] = {"i": index}
        lets = {**lets, **self._layer_lets}

        def scope(name: str) -> Any:
            if name in known:
                return known[name]
            if name in lets:
                known[name] = value = evaluate(lets[name], scope)
                return value
            return self.scope(name)

        return scope


def modules(
    architecture: Architecture, config: Mapping[str, Any], tp: int, method: str = "none"
) -> Iterator[Module]:
    """Yield the modules on one of `tp` GPUs in the order of the table. BadInput where they cannot be cut."""
    entry = architecture.entry
    for gap in entry.get("unknown", ()):
        if evaluate(gap["when"], Part(config, config, MAPPING, {}).scope):
            raise BadInput(
                f"config.json: {architecture.name} is counted without {gap['what']}, and this one has it;"
                " sizes are not guessed: start vLLM with it and read 'Model loading took' in its log"
            )
    for part in entry.get("parts", (entry,)):
        whole = _family(part)
        base = Part(config, config, MAPPING, {}).scope
        source = whole.get("config", "config")
        own = evaluate(source, base)
        if own is None and part.get("defaults"):
            own = MAPPING  # transformers fills the whole part with the defaults of its class
        if not isinstance(own, Mapping):
            raise BadInput(
                f"config.json: {source} is missing though architectures names {architecture.name}; download"
                " the checkpoint's config.json again"
            )
        names = Part(config, own, whole, {"tp": tp, "method": method})
        context = _Context(
            str(whole.get("at", "")), str(whole.get("use", "")), tp, plain=bool(whole.get("plain"))
        )
        yield from _expanded(whole["modules"], names, names.scope, context)


_DIMENSIONS = {
    "layers": "layers or num_hidden_layers or num_layers or len(items(layers_block_type))",
    "hidden": "hidden or hidden_size",
    "heads": "heads or num_attention_heads",
    "kv_heads": "kv_heads or num_key_value_heads or heads or num_attention_heads",
    "head": "head or head_dim or (hidden or hidden_size) // (heads or num_attention_heads or 1)",
    "inner": "inner or intermediate_size or moe_intermediate_size",
    "vocab": "vocab or vocab_size",
    "positions": "positions or max_position_embeddings or seq_length or 2048",
}  # fmt: skip


def dimensions(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of the text model by name, as _DIMENSIONS lists them.

    A model without attention has one head of its hidden size.
    """
    part = architecture.entry.get("parts", (architecture.entry,))[-1]
    whole = _family(part)
    own = evaluate(whole.get("config", "config"), Part(config, config, MAPPING, {}).scope)
    names = Part(config, own if isinstance(own, Mapping) else MAPPING, whole, {"tp": 1, "method": "none"})
    scope = names.layer(0, MAPPING)
    return {name: max(1, evaluate_size(e, scope)) if evaluate(e, scope) is not None else 1
            for name, e in _DIMENSIONS.items()}  # fmt: skip


def _family(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part with its family merged in."""
    if "family" not in part:
        return part
    family = _known_family(part["family"])
    return _over(family, part)


def _known_family(name: str) -> Mapping[str, Any]:
    """Return a family, with the one that it is like merged in."""
    family = table()["families"][name]
    return _over(_known_family(family["like"]), family) if "like" in family else family


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with another one below it; names are merged one by one."""
    merged = {**base, **{k: v for k, v in own.items() if k != "like"}}
    for key in ("let", "layer_let", "defaults"):
        merged[key] = {**base.get(key, {}), **own.get(key, {})}
    return merged


@dataclass(frozen=True)
class _Context:
    """Place in the tree of modules: the prefix, a use that overrides, the GPUs and the layer."""

    prefix: str
    use: str
    tp: int
    layer: int = -1
    plain: bool = False

    def path(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix and name else self.prefix or name


def _expanded(items: Any, part: Part, scope: Scope, context: _Context) -> Iterator[Module]:
    for item in items:
        if "when" in item and not evaluate(item["when"], scope):
            continue
        if "family" in item:  # modules of another family at this place
            yield from _expanded(table()["families"][item["family"]]["modules"], part, scope, context)
        elif "layers" in item:
            count = evaluate_size(item["layers"], scope)
            if count > LAYERS_LIMIT:
                raise BadInput(f"config.json: {item['layers']} is {count}; the limit is {LAYERS_LIMIT}")
            for i in range(count):
                inside = _Context(context.path(f"{item['at']}.{i}"), item.get("use", context.use),
                                  context.tp, i, context.plain)  # fmt: skip
                layer = part.layer(i, item.get("let", MAPPING))
                yield from _expanded(item["modules"], part, layer, inside)
        else:
            yield _module(item, scope, context)


def _named(name: str, scope: Scope) -> str:
    """Return a name with its `{let}` filled in."""
    while "{" in name:
        before, _, rest = name.partition("{")
        inside, _, after = rest.partition("}")
        name = f"{before}{scope(inside)}{after}"
    return name


def _cut(size: int, tp: int, what: str) -> int:
    if size % tp:
        raise BadInput(
            f"tensor_parallel_size {tp} does not divide the {size} of {what}; vLLM refuses it: use a divisor"
            f" of {size}"
        )
    return size // tp


def _module(item: Mapping[str, Any], scope: Scope, context: _Context) -> Module:
    """Make one module from its entry."""
    kind = item["is"]
    name = context.path(_named(item["at"], scope))
    maker = _KINDS.get(kind)
    if maker is None:
        raise ValueError(f"architectures.yml: {name}: {kind!r} is no kind of module")
    fields = maker(item, scope, context.tp, name)
    use = context.use or item.get("use") or _USES.get(kind) or ""
    parts = tuple(item["parts"]) if "parts" in item else _FUSED.get(item["at"].rsplit(".", 1)[-1], ())
    dtype = item.get("dtype", "")
    dtype = dtype if dtype in DTYPES else evaluate(dtype, scope) if dtype else ""
    fields.setdefault("kind", kind)
    if 0 in fields.get("out", ()) or fields.get("inp") == 0 or 0 in fields.get("shape", ()):
        raise BadInput(f"config.json: a size of {name} is 0; check the checkpoint's config.json")
    return Module(name=name, use=use, parts=parts, dtype=dtype, layer=context.layer,
                  plain=context.plain or bool(evaluate(item.get("plain", False), scope)),
                  **fields)  # fmt: skip


_USES = {"embedding": "embedding", "lm_head": "lm_head", "norm": "norm", "experts": "experts",
         "rope": "buffer",
         "buffer": "buffer", "attention": "attention", "qkv": "attention"}  # fmt: skip


def _sizes(expression: Any, scope: Scope) -> tuple[int, ...]:
    """Evaluate the rows of a module: one expression, or a list of them for merged parts."""
    if isinstance(expression, list):
        return tuple(evaluate_size(e, scope) for e in expression)
    return (evaluate_size(expression, scope),)


def _vocabulary(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    rows, inp = evaluate_size(item["rows"], scope), evaluate_size(item["in"], scope)
    multiple = item.get("pad", VOCAB_MULTIPLE)
    padded = -(-rows // multiple) * multiple
    own = -(-padded // tp)
    bias = bool(evaluate(item.get("bias", False), scope))
    return {"out": (own,), "inp": inp, "whole_out": (padded,), "whole_inp": inp, "bias": bias,
            "bias_rows": own}  # fmt: skip


def _column(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    whole, inp = _sizes(item["out"], scope), evaluate_size(item["in"], scope)
    own = tuple(_cut(rows, tp, name) for rows in whole)
    return {"out": own, "inp": inp, "whole_out": whole, "whole_inp": inp, "bias_rows": sum(own),
            "bias": bool(evaluate(item.get("bias", False), scope))}  # fmt: skip


def _row(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    whole, inp = _sizes(item["out"], scope), evaluate_size(item["in"], scope)
    return {"out": whole, "inp": _cut(inp, tp, name), "whole_out": whole, "whole_inp": inp,
            "bias_rows": sum(whole), "bias": bool(evaluate(item.get("bias", False), scope))}  # fmt: skip


def _replicated(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    return _row(item, scope, 1, name)


def _qkv(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    """Cut query heads by TP, and key/value heads too until each GPU has one, which is then repeated."""
    heads, kv_heads = evaluate_size(item["heads"], scope), evaluate_size(item["kv_heads"], scope)
    size = evaluate_size(item["head_dim"], scope)
    value_size = evaluate_size(item["v_head_dim"], scope) if "v_head_dim" in item else size
    inp = evaluate_size(item["in"], scope)
    if not heads or not kv_heads:
        raise BadInput(f"config.json: {item['heads']} or {item['kv_heads']} is 0; check config.json")
    own_heads = _cut(heads, tp, f"heads of {name}")
    if kv_heads >= tp:
        own_kv, copies = _cut(kv_heads, tp, f"key/value heads of {name}"), 1
    else:
        own_kv, copies = 1, tp // kv_heads
        _cut(tp, kv_heads, f"GPUs by the key/value heads of {name}")
    own = (own_heads * size, own_kv * size, own_kv * value_size)
    whole = (heads * size, kv_heads * copies * size, kv_heads * copies * value_size)
    return {"kind": "column", "out": own, "inp": inp, "whole_out": whole, "whole_inp": inp,
            "bias_rows": sum(own), "bias": bool(evaluate(item.get("bias", False), scope))}  # fmt: skip


def _norm(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    size = evaluate_size(item["size"], scope)
    own = max(1, size // tp) if item.get("axis") == 0 else size
    bias = bool(evaluate(item.get("bias", False), scope))
    return {"kind": "norm", "shape": (own,), "bias": bias, "bias_rows": own}


def _tensor(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    shape = [evaluate_size(size, scope) for size in item["shape"]]
    axis = item.get("axis")
    if axis is not None:
        shape[axis] = _cut(shape[axis], tp, name)
    return {"shape": tuple(shape)}


def _experts(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    hidden, inner = evaluate_size(item["hidden"], scope), evaluate_size(item["inner"], scope)
    gated = bool(evaluate(item.get("gated", True), scope))
    own = _cut(inner, tp, name)
    return {"experts": evaluate_size(item["count"], scope), "out": (own,) * (2 if gated else 1),
            "inp": hidden,
            "whole_out": (inner,), "whole_inp": hidden, "gated": gated,
            "per_token": evaluate_size(item["per_token"], scope),
            "bias": bool(evaluate(item.get("bias", False), scope))}  # fmt: skip


def _attention(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    return {}


def _rope(item: Mapping[str, Any], scope: Scope, tp: int, name: str) -> dict[str, Any]:
    """Size the cache of cosines and sines: positions by rotary dimension."""
    scaling = (
        evaluate(item["scaling"], scope)
        if "scaling" in item
        else scope("rope_parameters") or scope("rope_scaling")
    )
    scaling = scaling if isinstance(scaling, Mapping) else MAPPING
    positions = evaluate_size(item.get("positions", "max_position_embeddings"), scope)
    share = evaluate(item.get("share", "rope_parameters.partial_rotary_factor or partial_rotary_factor or 1"),
                     scope)  # fmt: skip
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise BadInput(f"config.json: partial_rotary_factor is {share!r}; it must be above 0 and at most 1")
    dim = int(evaluate_size(item["dim"], scope) * share)
    original = scaling.get("original_max_position_embeddings") or scope("original_max_position_embeddings")
    factor = scaling.get("factor") or 1
    for value in (factor, original or 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**32:
            raise BadInput(f"config.json: rope_scaling has {value!r}; it must be a number above 0")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("linear", "ntk") or (kind == "dynamic" and not scaling.get("alpha")):
        positions = int(positions * factor)
    elif kind in ("yarn", "deepseek_yarn", "deepseek_llama_scaling"):
        positions = int((original or positions) * factor)
    elif kind in ("longrope", "su"):
        positions += int(original or positions)
    if scaling.get("mrope_section") and kind in ("default", "mrope"):
        positions *= evaluate_size(item.get("mrope", 4), scope)
    return {"shape": (positions, dim)}


_KINDS = {
    "embedding": _vocabulary, "lm_head": _vocabulary, "column": _column, "row": _row,
    "replicated": _replicated,
    "qkv": _qkv, "norm": _norm, "tensor": _tensor, "buffer": _tensor, "experts": _experts,
    "attention": _attention, "rope": _rope,
}  # fmt: skip
