"""GGUF file to a Hugging Face checkpoint folder: safetensors in float16, tokenizer, chat template. No torch
needed.

For the llama architecture with a byte-level BPE tokenizer, as SmolLM2 has them; anything else is refused by
name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

ARCHITECTURE = "llama"
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's name of the pre-tokenizer -> digits are split one by one before the byte-level step
PRE_TOKENIZERS = {"smollm": True, "gpt-2": False, "default": False}


def checkpoint_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; ValueError for a tensor that has no
    place.
    """
    if gguf_name in OUTER:
        return OUTER[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"] if part in INNER:
            return f"model.layers.{layer}.{INNER[part]}.weight"
    raise ValueError(f"tensor {gguf_name!r} is not part of a plain {ARCHITECTURE} model")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves of each head; weight [heads * head_dim, in],
    same shape back.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def to_float16(name: str, weight: np.ndarray) -> np.ndarray:
    """ValueError when a value has no float16: such a model must not be served in it."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(weight, dtype=np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"tensor {name!r} has values beyond float16 (65504)")
    return half


def read_tensors(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Every weight by its checkpoint name, float16, dequantized by gguf's own reference."""
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_freqs"):  # derived from rope_theta
            continue
        name = checkpoint_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, kv_heads)
        tensors[name] = to_float16(name, weight)
    return tensors


def model_config(
    get: Callable[..., Any], tokens: dict[str, int], vocab_size: int, tied: bool
) -> dict[str, Any]:
    """config.json; `get` reads one key of the architecture's own metadata."""
    heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    # stored as float32: 1e-05 comes back as 9.999999747378752e-06
    epsilon = float(f"{get('attention.layer_norm_rms_epsilon'):.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "head_dim": hidden // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv")),
        "num_hidden_layers": int(get("block_count")),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": epsilon,
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
        **tokens,
    }


def build_tokenizer(texts: list[str], types: list[int], merges: list[str], split_digits: bool) -> Tokenizer:
    """Byte-level BPE; tokens of the control type are special and never split."""
    tokenizer = Tokenizer(
        BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
        if split_digits
        else bytes_of
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(texts, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def convert(source: Path, folder: Path) -> int:
    """Write the checkpoint of the GGUF file `source` into `folder`, which must exist; returns the number of
    tensors.

    ValueError, naming the part, for a model that this cannot convert faithfully.
    """
    reader = GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    architecture = meta["general.architecture"]
    if architecture != ARCHITECTURE:
        raise ValueError(f"architecture {architecture!r}: only {ARCHITECTURE!r} can be converted")
    if meta["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(
            f"tokenizer {meta['tokenizer.ggml.model']!r}: only byte-level BPE ('gpt2') can be converted"
        )
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {pre!r} is none of {', '.join(PRE_TOKENIZERS)}")
    if f"{architecture}.rope.scaling.type" in meta:
        raise ValueError("a scaled rotary embedding cannot be converted")

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"metadata {architecture}.{key} is missing")
        return value

    tensors = read_tensors(reader, int(get("attention.head_count")), int(get("attention.head_count_kv")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    texts = meta["tokenizer.ggml.tokens"]
    ids = {
        f"{name}_token_id": int(meta[f"tokenizer.ggml.{key}_token_id"])
        for name, key in (("bos", "bos"), ("eos", "eos"))
    }
    ids["pad_token_id"] = int(meta.get("tokenizer.ggml.padding_token_id", ids["eos_token_id"]))
    tied = "lm_head.weight" not in tensors
    write_json(folder / "config.json", model_config(get, ids, len(texts), tied))
    write_json(folder / "generation_config.json", ids)

    build_tokenizer(
        texts, meta["tokenizer.ggml.token_type"], meta["tokenizer.ggml.merges"], PRE_TOKENIZERS[pre]
    ).save(str(folder / "tokenizer.json"))
    special = {key.removesuffix("_id"): texts[number] for key, number in ids.items()}
    special["unk_token"] = texts[int(meta.get("tokenizer.ggml.unknown_token_id", ids["eos_token_id"]))]
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": [special["bos_token"], special["eos_token"]],
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(get("context_length")),
            "chat_template": meta.get("tokenizer.chat_template"),
        },
    )
    return len(tensors)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
