"""Gives each layer of a model that attends its cache, by the rule of its family in data/kv_families.yml.

Every rule names the class of vLLM 0.32.0 that it follows. kv_states.py has the rules of layers with a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan.kv_specs import Fields, Kind, KvHeads, KvSettings, LayerCache, Layers, checked
from lowmem.plan.kv_types import head_bytes, latent_bytes, layer_kv_dtype

BLOCK_TOKENS = 16

Rule = Callable[[Fields, KvSettings], Layers]


def block_tokens(fields: Fields, settings: KvSettings) -> int:
    """Return the tokens of a block before any alignment."""
    return settings.block_tokens or fields.family.get("block", BLOCK_TOKENS)


def attention(
    settings: KvSettings, block: int, heads: KvHeads, window: int = 0, chunk: int = 0
) -> LayerCache:
    """Return the cache of a layer that attends (layers/attention/attention.py, get_kv_cache_spec).

    Each GPU has its share of the heads, and at least one.
    """
    mine, value, dtype = max(1, heads.count // settings.tp), heads.value or heads.key, settings.kv_dtype
    kind: Kind = "sliding" if window else "chunked" if chunk else "full"
    page = block * mine * head_bytes(heads.key, value, dtype, settings.dtype_bytes)
    return LayerCache(kind, block, page, window or chunk, shape=(mine, heads.key, value, dtype))


def _alike(fields: Fields, settings: KvSettings, count: int, size: int) -> Layers:
    """Return the caches of layers that are all alike and attend to everything."""
    return [(attention(settings, block_tokens(fields, settings), KvHeads(count, size)),)] * fields.layers


def windows(fields: Fields) -> list[int]:
    """Return the window of each layer in tokens; 0: it attends to everything.

    A layer has its own, or that of the whole model if all layers slide (engine/arg_utils.py,
    create_engine_config). The config class fills in missing layer types.
    """
    window, layers, family = fields.window, fields.layers, fields.family
    types = fields.words("layer_types")
    if types is None and (family.get("full_every") or family.get("all_slide")):
        types = _filled_in_types(fields)
    extra = family.get("window_extra", 0) if window else 0
    if types is None or all(t == "sliding_attention" for t in types):
        return [window + extra] * layers
    if not family.get("by_layer"):
        return [0] * layers
    return [window + extra if t == "sliding_attention" else 0 for t in types]


def _filled_in_types(fields: Fields) -> list[str]:
    """Return the layer types that transformers' config class derives from a period."""
    if fields.family.get("all_slide"):
        return ["sliding_attention" if fields.window else "full_attention"] * fields.layers
    period = fields.whole(fields.family.get("period_field", "-"), fields.family["full_every"])
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(fields.layers)]


def _attention(fields: Fields, settings: KvSettings) -> Layers:
    """Follow the classes whose layers differ in their window at most (llama.py, gemma3.py, …)."""
    block, layers = block_tokens(fields, settings), fields.layers
    found = []
    for layer, window in enumerate(windows(fields)):
        mine = replace(settings, kv_dtype=layer_kv_dtype(settings.kv_dtype, layer, layers))
        found.append((attention(mine, block, fields.kv, window),))
    return found


def _qwen(fields: Fields, settings: KvSettings) -> Layers:
    """Follow qwen2.py, whose window counts with `use_sliding_window` only, and for all layers or none."""
    if not fields.get("use_sliding_window"):
        return _attention(_with(fields, sliding_window=0, layer_types=None), settings)
    full, layers = fields.get("max_window_layers"), fields.layers
    types = fields.words("layer_types")
    if types is None and full is not None and not fields.family.get("all_slide") and fields.window:
        types = [
            "sliding_attention" if i >= checked("max_window_layers", full, 0) else "" for i in range(layers)
        ]
    if types is not None and len({t == "sliding_attention" for t in types}) > 1:
        raise BadInput(
            "config.json: use_sliding_window is true for some of the layers; vLLM 0.32.0 refuses this for"
            f" {fields.model_type}; set max_window_layers to 0 or to {layers}"
        )
    return _attention(_with(fields, layer_types=types), settings)


def _with(fields: Fields, **changes: Any) -> Fields:
    return Fields({**fields.values, **changes}, fields.family, fields.model_type)


def _chatglm(fields: Fields, settings: KvSettings) -> Layers:
    """Follow chatglm.py: the KV heads have a name of their own, and count with multi_query_attention."""
    shared = bool(fields.get("multi_query_attention"))
    heads = fields.whole("multi_query_group_num") if shared else fields.heads
    head = max(1, fields.whole("hidden_size") // fields.heads)
    return _alike(fields, settings, heads, head)


def _dbrx(fields: Fields, settings: KvSettings) -> Layers:
    """Follow dbrx.py: the KV heads are inside attn_config."""
    inner = fields.get("attn_config")
    heads = inner.get("kv_n_heads") if isinstance(inner, Mapping) else None
    heads = fields.heads if heads is None else checked("kv_n_heads", heads)
    return _alike(fields, settings, heads, fields.head_dim)


def _falcon(fields: Fields, settings: KvSettings) -> Layers:
    """Follow falcon.py: old models share one KV head unless multi_query is false."""
    one = not fields.get("new_decoder_architecture") and fields.get("multi_query") is not False
    heads = 1 if one else fields.kv_heads
    return _alike(fields, settings, heads, fields.head_dim)


def _minicpm3(fields: Fields, settings: KvSettings) -> Layers:
    """Follow minicpm3.py, which unpacks the latent vector and keeps full heads."""
    head = fields.whole("qk_nope_head_dim") + fields.whole("qk_rope_head_dim")
    return _alike(fields, settings, fields.heads, head)


def _own_types(fields: Fields) -> list[Any]:
    """Return the types of the layers that have caches; the last ones may use those of earlier layers."""
    types = fields.words("layer_types") or _filled_in_types(fields)
    own = fields.layers - fields.whole("num_kv_shared_layers", 0, least=0)
    return types[:own] if own > 0 else types


def _gemma3n(fields: Fields, settings: KvSettings) -> Layers:
    """Follow gemma3n.py: the last layers use the caches of earlier ones."""
    block = block_tokens(fields, settings)
    full, near = attention(settings, block, fields.kv), attention(settings, block, fields.kv, fields.window)
    return [(near if t == "sliding_attention" else full,) for t in _own_types(fields)]


def _gemma4(fields: Fields, settings: KvSettings) -> Layers:
    """Follow gemma4.py: full layers have heads of their own, and the last layers share caches.

    The config class makes the last layer a full one.
    """
    block, wide = block_tokens(fields, settings), fields.kv_heads
    if fields.get("num_global_key_value_heads") is not None and fields.get("attention_k_eq_v"):
        wide = fields.whole("num_global_key_value_heads")
    full = attention(settings, block, KvHeads(wide, fields.whole("global_head_dim")))
    near = attention(settings, block, fields.kv, fields.window)
    types = _own_types(fields)
    if len(types) == fields.layers:
        types = [*types[:-1], "full_attention"]
    return [(near if t == "sliding_attention" else full,) for t in types]


def _llama4(fields: Fields, settings: KvSettings) -> Layers:
    """Follow llama4.py: layers with a rotary embedding attend within a chunk."""
    every, chunk = fields.whole("no_rope_layer_interval"), fields.whole("attention_chunk_size", 0, least=0)
    rotary = fields.words("no_rope_layers") if fields.get("no_rope_layers") else None
    if rotary is None:
        rotary = [(i + 1) % every for i in range(fields.layers)]
    block = block_tokens(fields, settings)
    return [(attention(settings, block, fields.kv, chunk=chunk if r != 0 else 0),) for r in rotary]


def _mimo_v2(fields: Fields, settings: KvSettings) -> Layers:
    """Follow mimo_v2.py: layers of `hybrid_layer_pattern` 1 slide and have heads of their own."""
    pattern = fields.words("hybrid_layer_pattern")
    if pattern is None:
        raise BadInput(
            "config.json: hybrid_layer_pattern is missing; it says which layers of a mimo_v2 model slide;"
            " download the checkpoint's config.json again"
        )
    block, head = block_tokens(fields, settings), fields.head_dim
    full = attention(settings, block, KvHeads(fields.kv_heads, head, fields.whole("v_head_dim", head)))
    if 1 not in pattern:
        return [(full,)] * fields.layers
    head = fields.whole("swa_head_dim")
    heads = KvHeads(fields.whole("swa_num_key_value_heads"), head, fields.whole("swa_v_head_dim", head))
    near = attention(settings, block, heads, fields.whole("sliding_window_size"))
    return [(near if p == 1 else full,) for p in pattern]


def _minimax_m3(fields: Fields, settings: KvSettings) -> Layers:
    """Follow models/minimax_m3: sparse layers also keep 16-bit keys of an index."""
    sparse = fields.get("sparse_attention_config")
    sparse = sparse if isinstance(sparse, Mapping) else {}
    flags = Fields({**fields.values, "frequency": sparse.get("sparse_attention_freq")}, fields.family, "")
    block = block_tokens(fields, settings)
    main = attention(settings, block, fields.kv)
    frequency = flags.words("frequency") or [0] * fields.layers
    if not any(frequency):
        return [(main,)] * fields.layers
    size = checked("sparse_index_dim", sparse.get("sparse_index_dim"))
    index = LayerCache("mla", block, block * size * 2, shape=(1, size, "indexer"))
    return [(main, index) if flag != 0 else (main,) for flag in frequency]


def _step3p5(fields: Fields, settings: KvSettings) -> Layers:
    """Follow step3p5.py: every second layer slides unless layer_types says, and some have other heads."""
    types = fields.words("layer_types")
    other = fields.get("attention_other_setting")
    other = other if isinstance(other, Mapping) else {}
    block, found = block_tokens(fields, settings), []
    for layer in range(fields.layers):
        kind = types[layer] if types else "sliding_attention" if layer % 2 == 0 else "full_attention"
        heads, head = fields.kv_heads, fields.head_dim
        if types and other and kind == other.get("attention_type"):
            heads = checked("num_attention_groups", other.get("num_attention_groups") or heads)
            head = checked("head_dim", other.get("head_dim") or head)
        window = fields.window if kind == "sliding_attention" else 0
        found.append((attention(settings, block, KvHeads(heads, head), window),))
    return found


def _mla(fields: Fields, settings: KvSettings) -> Layers:
    """Follow deepseek_v2.py: one latent vector a token, whole on every GPU."""
    block, head = block_tokens(fields, settings), _latent(fields)
    page = block * latent_bytes(head, settings.kv_dtype, settings.dtype_bytes)
    return [(LayerCache("mla", block, page, shape=(1, head)),)] * fields.layers


def _latent(fields: Fields) -> int:
    return fields.whole("kv_lora_rank") + fields.whole("qk_rope_head_dim")


def _sparse_mla(fields: Fields, settings: KvSettings) -> Layers:
    """Follow models/deepseek_v32/attention.py: layers that choose tokens also keep 8-bit keys of an index.

    Each of its keys has a 32-bit scale for 128 numbers.
    """
    block, head = block_tokens(fields, settings), _latent(fields)
    page = block * latent_bytes(head, settings.kv_dtype, settings.dtype_bytes, sparse=True)
    size = fields.whole("index_head_dim")
    index = LayerCache("mla", block, block * (size + size // 128 * 4), shape=(1, size, "indexer"))
    leads = LayerCache("mla", block, page, shape=(1, head, "leader"))
    follows = LayerCache("mla", block, page, shape=(1, head, ""))
    return [(index, leads) if _has_indexer(fields, n) else (follows,) for n in range(fields.layers)]


def _has_indexer(fields: Fields, layer: int) -> bool:
    """Say whether a layer chooses its tokens itself, or uses the choice of one before it."""
    pattern = fields.get("index_topk_pattern")
    if isinstance(pattern, str | list):
        return not (layer < len(pattern) and pattern[layer] == "S")
    offset = fields.whole("index_skip_topk_offset", 2, least=0)
    return max(layer - offset + 1, 0) % fields.whole("index_topk_freq", 1) == 0


def _deepseek_v4(fields: Fields, settings: KvSettings) -> Layers:
    """Follow models/deepseek_v4: every layer slides, most also keep compressed tokens and a state.

    The state is that of the compressor. Pages are multiples of 576 bytes. A token takes 584 bytes in the
    packed 8-bit format.
    """
    if settings.kv_dtype != "auto" and not settings.kv_dtype.startswith("fp8"):
        raise BadInput(f"kv_cache_dtype={settings.kv_dtype[:40]!r} is not fp8; deepseek_v4 takes fp8 only")
    ratios = fields.words("compress_ratios")
    if ratios is None:
        raise BadInput(
            "config.json: compress_ratios is missing; it says what each layer of deepseek_v4 keeps; download"
            " the checkpoint's config.json again"
        )
    block, head = block_tokens(fields, settings), fields.whole("head_dim")
    index = fields.whole("index_head_dim")
    layers = []
    for ratio in ratios:
        layer = [_padded("sliding_mla", 64, 64 * 584, fields.whole("sliding_window"))]
        if not isinstance(ratio, int) or ratio not in (0, 1, 4, 128):
            raise BadInput(
                f"config.json: compress_ratios has {str(ratio)[:20]}; vLLM 0.32.0 knows 0, 1, 4 and 128;"
                " check the checkpoint's config.json"
            )
        if ratio == 4:
            keys = block // 4 * (index + index // 128 * 4)
            layer += [_padded("mla", block, keys, role="indexer"), _compressor(index, ratio)]
        if ratio > 1:
            layer += [_padded("mla", block, block // ratio * 584, role=str(ratio)), _compressor(head, ratio)]
        layers.append(tuple(layer))
    return layers


def _compressor(head: int, ratio: int) -> LayerCache:
    """Return the 32-bit state of the tokens that a compressor has not closed yet (compressor.py)."""
    overlap, block = (2, 4) if ratio == 4 else (1, 8)
    return _padded("sliding_mla", block, block * 2 * overlap * head * 4, overlap * ratio)


def _padded(kind: Kind, block: int, page: int, window: int = 0, role: str = "") -> LayerCache:
    return LayerCache(kind, block, -(-page // 576) * 576, window, shape=(page, role))


ATTENTION_RULES: dict[str, Rule] = {
    "attention": _attention,
    "chatglm": _chatglm,
    "dbrx": _dbrx,
    "deepseek_v4": _deepseek_v4,
    "falcon": _falcon,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "mimo_v2": _mimo_v2,
    "minicpm3": _minicpm3,
    "minimax_m3": _minimax_m3,
    "mla": _mla,
    "qwen": _qwen,
    "sparse_mla": _sparse_mla,
    "step3p5": _step3p5,
}
