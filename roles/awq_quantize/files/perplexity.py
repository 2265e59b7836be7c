"""Perplexity of a checkpoint folder as it is stored, one decoder layer in memory at a time.

A quantized folder is judged by its own bytes: the 4-bit weights are dequantized here, independently of the
library that wrote them, so a checkpoint that was saved wrong shows. Any model of transformers with the usual
Llama layout (model.embed_tokens, model.layers, model.norm, lm_head) works, whatever its size.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from checkpoint import CheckpointError, Tensors, read_config
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def windows(tokens: list[int], length: int) -> torch.Tensor:
    """The text cut into rows of `length` tokens, int64 [rows, length]; a rest too short for a row is left
    out.
    """
    rows = max(1, len(tokens) // length)
    length = min(length, len(tokens))
    if length < 2:
        raise CheckpointError("the text for the perplexity has fewer than 2 tokens")
    return torch.tensor(tokens[: rows * length]).reshape(rows, length)


@torch.inference_mode()
def perplexity(folder: Path, text: str, window: int = 256) -> float:
    """exp of the mean negative log likelihood of each token after the first of its window, in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    core, tensors = model.model, Tensors(folder)
    stored = set(tensors.names())

    def fill(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """`module` with its parameters from the checkpoint; a parameter that is not there raises."""
        missing = [n for n, _ in module.named_parameters() if f"{prefix}.{n}" not in stored]
        if missing:
            raise CheckpointError(f"{folder}: tensor {prefix}.{missing[0]} is missing")
        weights = {n: tensors.read(f"{prefix}.{n}").to(device) for n, _ in module.named_parameters()}
        module.load_state_dict(weights, strict=True, assign=True)
        return module

    tokens = windows(
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text, add_special_tokens=False)[
            "input_ids"
        ],
        window,
    ).to(device)
    embedding = fill(core.embed_tokens, "model.embed_tokens")
    hidden = embedding(tokens)
    positions = torch.arange(tokens.shape[1], device=device).unsqueeze(0)
    rotary = type(core.rotary_emb)(config=config).to(device)(hidden, positions)
    for i, layer in enumerate(core.layers):
        out = fill(layer, f"model.layers.{i}")(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary
        )
        hidden = out[0] if isinstance(out, tuple) else out
        layer.to("meta")
    hidden = fill(core.norm, "model.norm")(hidden)
    head = embedding.weight if "lm_head.weight" not in stored else tensors.read("lm_head.weight").to(device)
    losses = [
        functional.cross_entropy(functional.linear(row[:-1], head), target[1:], reduction="sum").item()
        for row, target in zip(hidden, tokens, strict=True)
    ]
    return math.exp(min(sum(losses) / (tokens.numel() - tokens.shape[0]), 700.0))


def main() -> None:
    """perplexity.py FOLDER TEXT: one JSON line {"perplexity": ...}."""
    folder, text = map(Path, sys.argv[1:])
    read_config(folder)
    sys.stdout.write(json.dumps({"perplexity": perplexity(folder, text.read_text(encoding="utf-8"))}) + "\n")


if __name__ == "__main__":
    main()
