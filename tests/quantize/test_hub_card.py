"""A model card from a Hugging Face id: config.json and the safetensors header, over the stub hub; the weights
are never asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .stub_hub import StubHub

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True,
    "torch_dtype": "float16",
}  # fmt: skip


def safetensors() -> bytes:
    """A checkpoint of CONFIG, 16 bits a weight."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.input_layernorm.weight": (64,), f"{name}.post_attention_layernorm.weight": (64,)}
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (64, 64) for p in "qo"} | {
            f"{name}.self_attn.{p}_proj.weight": (32, 64) for p in "kv"
        }
        shapes |= {f"{name}.mlp.{p}_proj.weight": (128, 64) for p in ("gate", "up")} | {
            f"{name}.mlp.down_proj.weight": (64, 128)
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def plan(endpoint: str, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
    }
    words = ["plan", "--profile", "low_latency", "--model", model, "--set", "max_model_len=1280", "--json"]
    return subprocess.run(
        [sys.executable, "-m", "lowmem", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def hub() -> Iterator[StubHub]:
    stub = StubHub(
        {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors()}, commit="main"
    )
    yield stub
    stub.close()


def test_a_card_from_the_hub_counts_the_header_s_tensors(hub: StubHub, tmp_path: Path) -> None:
    done = plan(hub.endpoint, tmp_path, "owner/name")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    # embeddings 16,384; norms 64 + 2 x 128; a layer's linears 8,192 + 4,096 + 24,576, all at 16 bits, or at 4
    # bits with their scales
    assert answer["parameters"] == 16_384 + 64 + 2 * (128 + 8_192 + 4_096 + 24_576)
    assert {name for name, _ in hub.ranges} == {"config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_the_hub_does_not_have_is_one_line(hub: StubHub, tmp_path: Path) -> None:
    done = plan(hub.endpoint, tmp_path, "owner/other")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "lowmem: model 'owner/other' is no built-in card or directory, and Hugging Face gave no config.json"
        " for it"
    )
