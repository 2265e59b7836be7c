#!/usr/bin/env python3
"""Writes model folders without weights, for `vllm serve --load-format dummy`.

Memory and speed are real; the text is noise.

    python3 benchmarks/gpu/models.py DIRECTORY [--model llama-2-70b-awq …] [--published Qwen3-VL-8B-Instruct …]

A folder has config.json and a tokenizer, both made on the spot. The tokenizer has as many whole words as the
vocabulary. So every prompt of n tokens decodes and encodes to n tokens again. Nothing is downloaded.

`--published` takes a config.json of the tests' data, or `deepseek-v2-lite`. A vision-language model also gets
the files that its processor reads.
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


PUBLISHED = Path(__file__).resolve().parents[2] / "tests/data/checkpoints/models_vllm_0.32.json"
# config.json of deepseek-ai/DeepSeek-V2-Lite: multi-head latent attention on a card's scale
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
    "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": False,
    "scoring_func": "softmax", "hidden_act": "silu", "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False, "attention_bias": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_VISION = {
    "words": {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>",
              "video": "<|video_pad|>"},
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor",
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    },
}  # fmt: skip
# what a model's processor reads, by model_type; `words` are tokens that it looks up by name
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen3_vl": QWEN_VISION,
    "qwen3_5_moe": QWEN_VISION,
    "gemma3": {
        "words": {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"},
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessorFast", "processor_class": "Gemma3Processor",
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 896, "width": 896},
        },
        "processor_config.json": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
    },
    "llava": {
        "words": {"image": "<image>"},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
        },
        "processor_config.json": {
            "patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>",
            "num_additional_image_tokens": 1, "processor_class": "LlavaProcessor",
        },
    },
}  # fmt: skip
# where a config does not say it: the class's own default
TEXT_VOCABULARY = {"gemma3": 262208}


def write_tokenizer(folder: Path, vocabulary: int, named: dict[str, tuple[int, str]] | None = None) -> None:
    """Write a tokenizer of whole words. `named`: id and word of tokens that a processor looks up."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocabulary))]
    for number, word in (named or {}).values():
        words[number] = word
    # 0.32 refuses a text longer than its longest word times max_model_len, before it counts tokens
    # (tokenizers/hf.py); spaces count too
    words[-1] = words[-1].ljust(16, "w")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3] + [word for _, word in (named or {}).values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
        **{f"{role}_token": word for role, (_, word) in (named or {}).items()},
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


def token_id(config: dict[str, Any], role: str) -> int | None:
    """Return the id that a config gives a token of a processor, under any of the names in use."""
    keys = (f"{role}_token_id", f"{role}_token_index")
    return next((int(config[key]) for key in keys if key in config), None)


def write_published(directory: Path, name: str) -> Path:
    """Folder of a published config.json: the model as it is, less its weights."""
    if name == "deepseek-v2-lite":
        published = DEEPSEEK_V2_LITE
    else:
        known = json.loads(PUBLISHED.read_text())["models"]
        published = known[name]["config"]
    kind = published["model_type"]
    text = published.get("text_config", {})
    vocabulary = text.get("vocab_size") or published.get("vocab_size") or TEXT_VOCABULARY[kind]
    processor = dict(PROCESSORS.get(kind, {}))
    named, free = {}, vocabulary - 10
    for role, word in processor.pop("words", {}).items():
        number = token_id(published, role)
        # its own table has a place for it, whichever
        named[role] = (free if number is None else number, word)
        free -= number is None
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    for file, content in processor.items():
        (folder / file).write_text(json.dumps(content, indent=1))
    write_tokenizer(folder, vocabulary, named)
    return folder


NAMES = [f"{shape}-{quantization}" for shape in SHAPES for quantization in QUANTIZATIONS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", action="append", choices=NAMES, help="repeatable (default: all)")
    parser.add_argument("--published", action="append", default=[], help="repeatable")
    options = parser.parse_args()
    for name in options.model or ([] if options.published else NAMES):
        print(write(options.directory, name))
    for name in options.published:
        print(write_published(options.directory, name))


if __name__ == "__main__":
    main()
