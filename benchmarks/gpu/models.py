#!/usr/bin/env python3
"""Writes model folders without weights, for `vllm serve --load-format dummy`.

Memory and speed are real; the text is noise.

    python3 benchmarks/gpu/models.py DIRECTORY [--model llama-2-70b-awq …]

A folder has config.json and a tokenizer, both made on the spot. The tokenizer has as many whole words as the
vocabulary. So every prompt of n tokens decodes and encodes to n tokens again. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

# config.json of meta-llama/Llama-2-70b-hf and Llama-2-7b-hf
SHAPES: dict[str, dict[str, int]] = {
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    # what one of two ranks holds of the 70B (tensor parallelism): half the heads, half the MLP, half the
    # vocabulary
    "llama-2-70b-rank": {
        "hidden_size": 8192,
        "intermediate_size": 14336,
        "num_hidden_layers": 80,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 16000,
    },
    # config.json of TinyLlama/TinyLlama_v1.1: the draft of speculative decoding
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def auto_round(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "auto-round", "bits": bits, "group_size": group_size, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
    }  # fmt: skip


def compressed_tensors(group_size: int) -> dict[str, Any]:
    """Return the quantization as llm-compressor's AWQModifier with scheme W4A16_ASYM saves it."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size,
        "dynamic": False,
        "observer": "minmax",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
        "output_activations": None}},
    }  # fmt: skip


QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "fp16": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "w4": compressed_tensors(128),
    "w4-gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "w3": auto_round(3, 128),
    "w2": auto_round(2, 128),
    "w2-g64": auto_round(2, 64),
}
VOCABULARY = 32000


def config(shape: str, quantization: str) -> dict[str, Any]:
    """Return config.json as transformers writes it; fp16 has no quantization_config."""
    base: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        **SHAPES[shape], "hidden_act": "silu",
        "rms_norm_eps": 1e-05, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "torch_dtype": "float16",
        "initializer_range": 0.02,
    }  # fmt: skip
    extra = QUANTIZATIONS[quantization]
    return base if extra is None else base | {"quantization_config": extra}


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocabulary))]
    # 0.32 refuses a text longer than its longest word times max_model_len, before it counts tokens
    # (tokenizers/hf.py); spaces count too
    words[-1] = words[-1].ljust(16, "w")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write(directory: Path, name: str) -> Path:
    """Folder of the model `<shape>-<quantization>`, such as llama-2-70b-awq."""
    shape = max((s for s in SHAPES if name.startswith(f"{s}-")), key=len)
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape, name.removeprefix(f"{shape}-")), indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    write_tokenizer(folder, SHAPES[shape].get("vocab_size", VOCABULARY))
    return folder


NAMES = [f"{shape}-{quantization}" for shape in SHAPES for quantization in QUANTIZATIONS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", action="append", choices=NAMES, help="repeatable (default: all)")
    options = parser.parse_args()
    for name in options.model or NAMES:
        print(write(options.directory, name))


if __name__ == "__main__":
    main()
