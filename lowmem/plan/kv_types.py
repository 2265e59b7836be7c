"""Says in which type a KV cache is kept, and the bytes that a token takes in it.

Source: vLLM 0.32.0, utils/torch_utils.py and v1/attention/backends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowmem.errors import BadInput

_TURBOQUANT_BITS = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}

# Layers at each end of the model that TurboQuant leaves at 16 bits (turboquant/config.py,
# get_boundary_skip_layers).
_TURBOQUANT_ENDS = 2


def stored_kv_dtype(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None) -> str:
    """Return the KV type that a checkpoint asks for; "auto" is that of the activations.

    `hf_quant_config` is the file beside config.json, which counts if config.json has no quantization
    (transformers_utils/config.py, get_config). Raises BadInput for a scheme that vLLM refuses.
    """
    text = config.get("text_config")
    given = [config.get("quantization_config"), hf_quant_config, config.get("compression_config")]
    given += [text.get("quantization_config")] if isinstance(text, Mapping) else []
    quantization = next((q for q in given if isinstance(q, Mapping) and q), None)
    if quantization is None:
        return "auto"
    inner = quantization.get("quantization")
    inner = inner if isinstance(inner, Mapping) else {}
    if _is_modelopt(quantization, inner):
        return _modelopt_kv_dtype({**quantization, **inner})
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if quantization.get("kv_cache_scheme") is None or method not in ("compressed-tensors", ""):
        return "auto"
    return _compressed_tensors_kv_dtype(quantization["kv_cache_scheme"]) if method else "auto"


def _is_modelopt(quantization: Mapping[str, Any], inner: Mapping[str, Any]) -> bool:
    """Say whether ModelOpt made the checkpoint.

    Source: transformers_utils/model_arch_config_convertor.py, _normalize_quantization_config.
    """
    if str(quantization.get("quant_method", "")).lower().startswith("modelopt"):
        return True
    producer = quantization.get("producer")
    named = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    return (named or "modelopt_quant_config" in inner) and inner.get("quant_algo") is not None


def _modelopt_kv_dtype(quantization: Mapping[str, Any]) -> str:
    """Return the KV type of ModelOpt's fields (torch_utils.py, get_kv_cache_quant_algo_string)."""
    wanted = quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo")
    if isinstance(wanted, Mapping):
        is_float, bits = wanted.get("type") == "float", wanted.get("num_bits")
        wanted = (
            "fp8"
            if is_float and bits == 8 and wanted.get("dynamic") is False
            else "nvfp4"
            if is_float and bits == 4
            else None
        )
    return {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}.get(str(wanted).lower(), "auto")


def _compressed_tensors_kv_dtype(scheme: Any) -> str:
    """Return fp8, the one type that vLLM takes (compressed_tensors.py, validate_kv_cache_scheme)."""
    if not isinstance(scheme, Mapping) or scheme.get("type") != "float" or scheme.get("num_bits") != 8:
        raise BadInput(
            f"config.json: kv_cache_scheme is {str(scheme)[:60]}; vLLM 0.32.0 takes 8-bit float only;"
            " quantize the checkpoint again, or without a KV scheme"
        )
    return "fp8"


def head_bytes(head: int, head_v: int, kv_dtype: str, dtype_bytes: int) -> int:
    """Return the bytes of one token's key and value in one head of `head` and `head_v` numbers.

    Raises BadInput for a type that is not known.
    """
    both = head + head_v
    if kv_dtype == "auto":
        return both * dtype_bytes
    if kv_dtype in ("float16", "bfloat16"):
        return both * 2
    if kv_dtype in ("int8_per_token_head", "fp8_per_token_head"):  # a 32-bit scale for each of key and value
        return both + 8
    if kv_dtype == "int4_per_token_head":
        return head // 2 + head_v // 2 + 8
    if kv_dtype.startswith("fp8"):
        return both
    if kv_dtype.startswith("nvfp4"):  # 4 bits, and an 8-bit scale for 16 of them
        return head // 2 + head // 16 + head_v // 2 + head_v // 16
    if kv_dtype in _TURBOQUANT_BITS:
        return _turboquant_bytes(head, head_v, *_TURBOQUANT_BITS[kv_dtype])
    raise BadInput(f"kv_cache_dtype={kv_dtype[:40]!r} is not a KV type of vLLM 0.32.0; use auto or fp8")


def _turboquant_bytes(head: int, head_v: int, key_bits: int, value_bits: int) -> int:
    """Return the bytes of TurboQuant's packed slot, which is even (turboquant_attn.py)."""
    key = head if key_bits == 8 else math.ceil(head * key_bits / 8) + 2
    slot = key + math.ceil(head_v * value_bits / 8) + 4
    return slot + slot % 2


def layer_kv_dtype(kv_dtype: str, layer: int, layers: int) -> str:
    """Return the KV type of one layer; TurboQuant leaves the first and the last ones at 16 bits."""
    if kv_dtype not in _TURBOQUANT_BITS:
        return kv_dtype
    at_an_end = layer < _TURBOQUANT_ENDS or layer >= layers - _TURBOQUANT_ENDS
    return "auto" if at_an_end else kv_dtype


def latent_bytes(head: int, kv_dtype: str, dtype_bytes: int, sparse: bool = False) -> int:
    """Return the bytes of one token's latent vector.

    Sparse attention packs 8 bits with scales and a 16-bit rotary part (mla_attention.py, get_kv_cache_spec).
    Raises BadInput for a type that no kernel takes.
    """
    if kv_dtype in ("auto", "float16", "bfloat16"):
        return head * (dtype_bytes if kv_dtype == "auto" else 2)
    if kv_dtype.startswith("fp8") and not kv_dtype.endswith("per_token_head"):
        return 656 if sparse else head
    raise BadInput(
        f"kv_cache_dtype={kv_dtype[:40]!r} has no kernel for latent attention; use auto, bfloat16 or fp8"
    )
