"""Gives layers that keep a state instead of tokens their caches: Mamba, gated delta nets, short convolutions.

Sources: vLLM 0.32.0, layers/mamba/mamba_utils.py for the states, platforms/interface.py for their alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan.kv_layers import Rule, attention, block_tokens
from lowmem.plan.kv_specs import Fields, KvSettings, LayerCache, Layers, checked

_KERNEL_TOKENS = 16  # the smallest block of the attention kernels

_DTYPE_BYTES = {"auto": 0, "bfloat16": 2, "float16": 2, "float32": 4}


def _share(name: str, count: int, settings: KvSettings) -> int:
    """Return one GPU's share. Raises BadInput if the cards do not divide it, as vLLM does."""
    if count % settings.tp:
        raise BadInput(
            f"tensor_parallel_size={settings.tp} does not divide {name} {count}, which vLLM 0.32.0 asks for"
            " in layers with a state; use a divisor"
        )
    return count // settings.tp


def _state_dtype_bytes(wanted: Any, settings: KvSettings) -> int:
    """Return the bytes of a number of the recurrent state; `wanted` is config.json's type of it."""
    name = "auto" if wanted is None else str(wanted)
    if name not in _DTYPE_BYTES:
        raise BadInput(
            f"config.json: the state's type is {name[:40]!r}; it must be float32, float16 or bfloat16"
        )
    return _DTYPE_BYTES[name] or settings.dtype_bytes


def _mamba1_bytes(inner: int, state: int, kernel: int, settings: KvSettings) -> int:
    mine = _share("the inner size", inner, settings)
    return mine * (kernel - 1 + state) * settings.dtype_bytes


def _mamba2_bytes(
    sizes: tuple[int, int, int, int, int], kernel: int, dtype_bytes: int, settings: KvSettings
) -> int:
    """Return the bytes of a Mamba-2 layer's state.

    `sizes` are inner size, groups, heads, size of a head and size of its state. Groups are repeated until
    each GPU has one.
    """
    inner, groups, heads, head, state = sizes
    if groups % settings.tp:
        groups = settings.tp
    convolved = _share("the convolution's size", inner + 2 * groups * state, settings)
    mine = _share("the number of heads", heads, settings)
    return convolved * (kernel - 1) * settings.dtype_bytes + mine * head * state * dtype_bytes


def _delta_net_bytes(fields: Fields, settings: KvSettings) -> int:
    """Return the bytes of a gated delta net's state."""
    keys, key = fields.whole("linear_num_key_heads"), fields.whole("linear_key_head_dim")
    values, value = fields.whole("linear_num_value_heads"), fields.whole("linear_value_head_dim")
    convolved = _share("the convolution's size", 2 * keys * key + values * value, settings)
    recurrent = _share("linear_num_value_heads", values, settings) * value * key
    kernel = fields.whole("linear_conv_kernel_dim") - 1
    return convolved * kernel * settings.dtype_bytes + recurrent * _state_dtype_bytes(
        fields.get("mamba_ssm_dtype"), settings
    )


def _aligned_block(token_bytes: int, state_bytes: int, block: int) -> int:
    """Return the tokens of a block whose page holds a state (interface.py, _align_hybrid_block_size)."""
    kernel = max(_KERNEL_TOKENS, block)
    least = kernel * -(-state_bytes // (kernel * token_bytes))
    return max(block, -(-least // _KERNEL_TOKENS) * _KERNEL_TOKENS)


def _hybrid(
    fields: Fields, settings: KvSettings, pattern: Sequence[str], state_bytes: int, checkpoints: int = 0
) -> Layers:
    """Return the caches of layers of which some attend and some keep a state.

    `pattern` has "attention", "state", "both" or "" for each layer. A state fills the page of an attention
    block. With prefix caching a request holds two, and a checkpoint where the kernel writes one; without, a
    state stands for all tokens (v1/kv_cache_interface.py, MambaSpec).
    """
    block = block_tokens(fields, settings)
    window = fields.window if fields.family.get("rule") == "nemotron_h" else 0
    token_bytes = attention(settings, 1, fields.kv).page_bytes
    if "state" in pattern or "both" in pattern:
        block = _aligned_block(token_bytes, state_bytes, block)
    attends = attention(settings, block, fields.kv, window)
    cached = settings.prefix_caching
    state = LayerCache(
        "mamba",
        block if cached else settings.max_model_len,
        block * token_bytes,
        states=2 + checkpoints if cached else 1,
        shape=(state_bytes,),
    )
    layers = {"attention": (attends,), "state": (state,), "both": (attends, state)}
    return [layers.get(kind, ()) for kind in pattern]


def _kinds(types: Sequence[Any]) -> list[str]:
    """Translate layer types of config.json."""
    return ["attention" if t in ("attention", "full_attention") else "state" for t in types]


def _gated_delta_net(fields: Fields, settings: KvSettings) -> Layers:
    """Follow qwen3_next.py and qwen3_5.py: three delta nets, then a layer that attends."""
    types = fields.words("layer_types")
    every = fields.whole("full_attention_interval", 4)
    kinds = (
        _kinds(types)
        if types
        else ["state" if (i + 1) % every else "attention" for i in range(fields.layers)]
    )
    return _hybrid(fields, settings, kinds, _delta_net_bytes(fields, settings))


def _nemotron_h(fields: Fields, settings: KvSettings) -> Layers:
    """Follow nemotron_h.py: a letter or a word for each layer, of which some keep nothing."""
    pattern = fields.get("hybrid_override_pattern")
    types = fields.get("layers_block_type") or fields.get("layer_types")
    if isinstance(pattern, str) and not types:
        kinds = [{"M": "state", "*": "attention"}.get(letter, "") for letter in pattern]
    elif isinstance(types, list) and types:
        names = {
            "mamba": "state",
            "linear_attention": "state",
            "attention": "attention",
            "full_attention": "attention",
        }
        kinds = [names.get(t, "") if isinstance(t, str) else "" for t in types]
    else:
        raise BadInput(
            "config.json: hybrid_override_pattern is missing; it says which layers of a nemotron_h model"
            " attend; download the checkpoint's config.json again"
        )
    checked("the number of layers", len(kinds), 1, 4096)
    heads, head = fields.whole("mamba_num_heads"), fields.whole("mamba_head_dim")
    sizes = (heads * head, fields.whole("n_groups"), heads, head, fields.whole("ssm_state_size"))
    dtype_bytes = _state_dtype_bytes(fields.get("mamba_ssm_cache_dtype"), settings)
    state = _mamba2_bytes(sizes, fields.whole("conv_kernel"), dtype_bytes, settings)
    return _hybrid(fields, settings, kinds, state, checkpoints=1)


def _mamba2_state(fields: Fields, settings: KvSettings, inner: int) -> int:
    """Return the bytes of the state of a Mamba-2 layer whose fields begin with mamba_."""
    heads = fields.whole("mamba_n_heads")
    head = fields.get("mamba_d_head")
    head = inner // heads if head in (None, "auto") else checked("mamba_d_head", head)
    sizes = (inner, fields.whole("mamba_n_groups"), heads, head, fields.whole("mamba_d_state"))
    return _mamba2_bytes(sizes, fields.whole("mamba_d_conv"), settings.dtype_bytes, settings)


def _falcon_h1(fields: Fields, settings: KvSettings) -> Layers:
    """Follow falcon_h1.py: every layer attends and keeps a state."""
    inner = fields.get("mamba_d_ssm")
    if inner is None:
        inner = fields.whole("mamba_expand") * fields.whole("hidden_size")
    state = _mamba2_state(fields, settings, checked("mamba_d_ssm", inner))
    return _hybrid(fields, settings, ["both"] * fields.layers, state, checkpoints=1)


def _granite_hybrid(fields: Fields, settings: KvSettings) -> Layers:
    """Follow granitemoehybrid.py, whose smallest models only attend."""
    types = fields.words("layer_types") or fields.words("layers_block_type") or ["mamba"] * fields.layers
    state = _mamba2_state(fields, settings, fields.whole("mamba_expand") * fields.whole("hidden_size"))
    return _hybrid(fields, settings, _kinds(types), state, checkpoints=1)


def _jamba(fields: Fields, settings: KvSettings) -> Layers:
    """Follow jamba.py: one layer of a period attends."""
    period, offset = fields.whole("attn_layer_period"), fields.whole("attn_layer_offset", least=0)
    inner = fields.whole("mamba_expand") * fields.whole("hidden_size")
    state = _mamba1_bytes(inner, fields.whole("mamba_d_state"), fields.whole("mamba_d_conv"), settings)
    kinds = ["attention" if i % period == offset else "state" for i in range(fields.layers)]
    return _hybrid(fields, settings, kinds, state)


def _lfm2(fields: Fields, settings: KvSettings) -> Layers:
    """Follow lfm2.py: layers that do not attend keep the last numbers of a short convolution."""
    types = fields.words("layer_types")
    attends = fields.get("full_attn_idxs")
    if types is None:
        attends = list(range(fields.layers)) if not isinstance(attends, list) else attends
        types = ["full_attention" if i in attends else "conv" for i in range(fields.layers)]
    size = fields.whole("conv_dim", fields.whole("hidden_size"))
    if fields.model_type == "lfm2_moe":
        size = fields.whole("hidden_size")
    kept = fields.whole("conv_L_cache") - 1
    state = _share("conv_dim", size, settings) * kept * settings.dtype_bytes
    return _hybrid(fields, settings, _kinds(types), state)


def _states_only(settings: KvSettings, state_bytes: int, layers: int) -> Layers:
    """Return the caches of a model without attention, for which vLLM caches no prefixes."""
    return [(LayerCache("mamba", settings.max_model_len, state_bytes, states=1),)] * layers


def _mamba1(fields: Fields, settings: KvSettings) -> Layers:
    """Follow mamba.py."""
    inner = fields.get("intermediate_size")
    if inner is None:
        inner = fields.whole("expand") * fields.whole("hidden_size")
    sizes = (checked("intermediate_size", inner), fields.whole("state_size"), fields.whole("conv_kernel"))
    return _states_only(settings, _mamba1_bytes(*sizes, settings), fields.layers)


def _mamba2(fields: Fields, settings: KvSettings) -> Layers:
    """Follow mamba2.py."""
    heads, head = fields.whole("num_heads"), fields.whole("head_dim")
    inner = fields.whole("expand") * fields.whole("hidden_size")
    sizes = (inner, fields.whole("n_groups"), heads, head, fields.whole("state_size"))
    state = _mamba2_bytes(sizes, fields.whole("conv_kernel"), settings.dtype_bytes, settings)
    return _states_only(settings, state, fields.layers)


STATE_RULES: dict[str, Rule] = {
    "falcon_h1": _falcon_h1,
    "gated_delta_net": _gated_delta_net,
    "granite_hybrid": _granite_hybrid,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
}
