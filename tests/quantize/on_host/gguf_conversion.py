"""Runs in the model-source environment: a small GGUF written here, converted, and compared with what was
written.
"""

import json
import sys
from pathlib import Path

import convert_gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS = 4, 2, 8, 32, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "Ġ"]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k, written out row by row: halves h0..h3 h4..h7 of a head become h0 h4 h1
    h5 ...
    """
    rows = []
    for head in range(heads):
        first = head * HEAD_DIM
        for i in range(HEAD_DIM // 2):
            rows += [weight[first + i], weight[first + HEAD_DIM // 2 + i]]
    return np.stack(rows)


def write(path: Path, architecture: str = "llama", pre: str = "smollm") -> dict[str, np.ndarray]:
    """The weights by checkpoint name, as they should come out: q and k not interleaved, Q8_0 rounding
    included.
    """
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    expected = {}

    def add(name: str, checkpoint: str, shape: tuple[int, ...], heads: int = 0) -> None:
        weight = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
        else:
            packed = quantize(interleave(weight, heads) if heads else weight, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
            # rounding is by row, so it does not matter whether rows are moved before or after it
            weight = dequantize(quantize(weight, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        expected[checkpoint] = weight.astype(np.float16)

    add("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        add(f"blk.{i}.attn_norm.weight", f"{layer}.input_layernorm.weight", (HIDDEN,))
        add(f"blk.{i}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN), HEADS)
        add(
            f"blk.{i}.attn_k.weight",
            f"{layer}.self_attn.k_proj.weight",
            (KV_HEADS * HEAD_DIM, HIDDEN),
            KV_HEADS,
        )
        add(f"blk.{i}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN))
        add(f"blk.{i}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN))
        add(f"blk.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (HIDDEN,))
        add(f"blk.{i}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (INNER, HIDDEN))
        add(f"blk.{i}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (INNER, HIDDEN))
        add(f"blk.{i}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (HIDDEN, INNER))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def refusal(path: Path, **how: str) -> str:
    write(path, **how)
    try:
        convert_gguf.convert(path, path.parent)
    except ValueError as error:
        return str(error)
    return ""


folder = Path(sys.argv[1])
expected = write(folder / "m.gguf")
count = convert_gguf.convert(folder / "m.gguf", folder)
stored = load_file(folder / "model.safetensors")
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
try:
    convert_gguf.to_float16("w", np.array([70000.0]))
    beyond = ""
except ValueError as error:
    beyond = str(error)
print(
    json.dumps(
        {
            "count": count,
            "names": sorted(stored) == sorted(expected),
            "differ": [name for name, weight in expected.items() if not np.array_equal(stored[name], weight)],
            "dtypes": sorted({str(weight.dtype) for weight in stored.values()}),
            "ids": tokenizer.encode("<|im_start|>ab12 a").ids,
            "refusals": [
                refusal(folder / "n.gguf", architecture="qwen2"),
                refusal(folder / "n.gguf", pre="llama-bpe"),
                beyond,
            ],
        }
    )
)
