"""A LoRA adapter for the demo's model, made on the spot: a folder as peft writes it, without peft."""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path
from typing import Any

MODULES = {"q_proj": "num_attention_heads", "v_proj": "num_key_value_heads"}


def write_adapter(folder: Path, config: dict[str, Any], rank: int = 4) -> Path:
    """Write an adapter that changes the answers of a Llama model with this config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    shapes = {}
    for layer in range(config["num_hidden_layers"]):
        for module, heads in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{name}.lora_A.weight"] = (rank, hidden)
            shapes[f"{name}.lora_B.weight"] = (config[heads] * head, rank)
    header, values, numbers = {}, array("f"), random.Random(7)
    for name, (rows, columns) in shapes.items():
        begin = 4 * len(values)
        values.extend(numbers.gauss(0, 0.3) for _ in range(rows * columns))
        header[name] = {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [begin, 4 * len(values)],
        }
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "demo",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
