"""Measures llama.cpp on the same shapes and load, with memory by NVML.

It runs `llama-batched-bench` on a GGUF of Llama-2-70B's shapes, which it makes on the spot.

    python benchmarks/gpu/llama_bench.py OUT.json --bench DIR/batched-bench --type iq4_xs --clients 8,1

DIR holds the program and llama.cpp's libraries. npm has a CUDA build of them as
`@node-llama-cpp/linux-x64-cuda`. Its sources, to build the program, are in `node-llama-cpp`. The weights are
noise; memory and speed are real.

There is no server. Prompts come all at once, then every sequence decodes in step, which is the best case of a
service. `--layers 2` compiles the kernels into the driver's cache beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP))
from lowmem.measure.sampler import Sampler  # noqa: E402 - run from a checkout that is not installed
from lowmem.probes import Gpus  # noqa: E402
from lowmem.units import MIB  # noqa: E402

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 8192, 28672, 64, 8, 32000
# GGML's number, weights and bytes of a block, where its 16-bit scale lies
TYPES = {
    "f32": (0, 1, 4, 0),
    "q4_0": (2, 32, 18, 0),
    "q6_k": (14, 256, 210, 208),
    "iq4_xs": (23, 256, 136, 0),
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(key: str, value: str | int | float) -> bytes:
    """Encode one key of a GGUF header; types 4, 6 and 8 are u32, f32 and string."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + (
        struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
    )


def tensor(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Noise whose scales are finite."""
    _, weights, size, scale = TYPES[kind]
    if kind == "f32":
        return np.ones(rows * columns, np.float32).view(np.uint8)
    blocks = np.frombuffer(bytearray(rng.bytes(rows * columns // weights * size)), np.uint8).reshape(-1, size)
    blocks[:, scale : scale + 2] = np.array([1e-3], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def write_gguf(path: Path, kind: str, layers: int) -> int:
    """Write a model of `layers` decoder layers, all with the same noise. Return the bytes written."""
    rng = np.random.default_rng(1)
    layer = {
        "attn_norm": ("f32", 1, HIDDEN), "attn_q": (kind, HIDDEN, HIDDEN),
        "attn_k": (kind, KV_HEADS * 128, HIDDEN),
        "attn_v": (kind, KV_HEADS * 128, HIDDEN), "attn_output": (kind, HIDDEN, HIDDEN),
        "ffn_norm": ("f32", 1, HIDDEN),
        "ffn_gate": (kind, MLP, HIDDEN), "ffn_up": (kind, MLP, HIDDEN), "ffn_down": (kind, HIDDEN, MLP),
    }  # fmt: skip
    ends = {
        "token_embd": (kind, VOCABULARY, HIDDEN),
        "output_norm": ("f32", 1, HIDDEN),
        "output": ("q6_k", VOCABULARY, HIDDEN),
    }
    made = {name: tensor(rng, *shape) for name, shape in (layer | ends).items()}
    shapes = {f"{name}.weight": (name, shape) for name, shape in ends.items()}
    shapes |= {
        f"blk.{n}.{name}.weight": (name, shape) for n in range(layers) for name, shape in layer.items()
    }
    fields: dict[str, str | int | float] = {
        "general.architecture": "llama", "general.name": f"llama-2-70b-noise-{kind}",
        "llama.block_count": layers,
        "llama.context_length": 4096, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 128,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": VOCABULARY, "general.alignment": 32,
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    head = (
        b"GGUF"
        + struct.pack("<IQQ", 3, len(shapes), len(fields))
        + b"".join(field(k, v) for k, v in fields.items())
    )
    places, at = [], 0
    for key, (name, (type_name, rows, columns)) in shapes.items():
        dims = (columns,) if rows == 1 else (columns, rows)
        head += (
            text(key)
            + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            + struct.pack("<IQ", TYPES[type_name][0], at)
        )
        places.append((name, at))
        at += -(-made[name].nbytes // 32) * 32
    head += bytes(-len(head) % 32)
    with path.open("wb") as file:
        os.truncate(file.fileno(), len(head) + at)
        os.pwrite(file.fileno(), head, 0)

        def put(place: tuple[str, int]) -> None:
            blob, done = made[place[0]].tobytes(), 0
            while done < len(blob):
                done += os.pwrite(file.fileno(), memoryview(blob)[done:], len(head) + place[1] + done)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, places))
    return len(head) + at


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--type", choices=["q4_0", "iq4_xs"], default="iq4_xs")
    parser.add_argument("--kv", default="f16", help="type of keys and values")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--clients", default="8,1")
    parser.add_argument("--input-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm")
    )  # 36 GB that a disk would read for minutes
    parser.add_argument(
        "--arg", action="append", default=[], help="one more argument of the program, repeatable"
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model = options.folder / f"noise-{options.type}-{options.layers}.gguf"
    result: dict[str, Any] = {
        "name": "llama.cpp",
        "type": options.type,
        "kv": options.kv,
        "layers": options.layers,
        "loads": [],
    }
    most = max(int(c) for c in options.clients.split(","))
    command = [
        str(options.bench), "-m", str(model), "-ngl", "99", "-fit", "off", "-fa", "on", "-ctk", options.kv,
        "-ctv", options.kv,
        "-c", str(most * (options.input_tokens + options.output_tokens)), "-b", "2048", "-ub", "512",
        "-npp", str(options.input_tokens), "-ntg", str(options.output_tokens), "-npl", options.clients,
        "--output-format", "jsonl", *options.arg,
    ]  # fmt: skip
    result["command"] = command
    log = options.out.with_suffix(".log")
    try:
        began = time.monotonic()
        result["file_bytes"] = write_gguf(model, options.type, options.layers)
        result["written_s"] = round(time.monotonic() - began, 1)
        probes: dict[str, Callable[[], tuple[int, ...]]] = {"gpu": lambda: (0,)}
        try:
            gpus = Gpus(1)
        except RuntimeError as error:  # on a machine with no GPU: to try the file and the program
            result["gpu"] = str(error)
        else:
            result["gpu"] = gpus.describe()
            probes = {"gpu": gpus.used_bytes}
        with Sampler(probes, 0.1) as sampler:
            time.sleep(1)
            before = sampler.peak("gpu", "before")[0]
            sampler.phase, began = "run", time.monotonic()
            with log.open("w") as errors:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
            result["exit"], result["took_s"] = done.returncode, round(time.monotonic() - began, 1)
            result["memory_mib"] = {
                "before": before // MIB,
                "peak": (sampler.peak("gpu", "run")[0] - before) // MIB,
            }
    finally:
        model.unlink(missing_ok=True)
    for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
        steps = row["t_tg"] * 1e3 / row["tg"]
        made = row["pl"] * row["tg"] / (row["t_pp"] + row["t_tg"])
        result["loads"].append(
            {
                "clients": row["pl"],
                "step_ms": steps,
                "prompts_s": row["t_pp"],
                "output_tokens_per_s": made,
                "raw": row,
            }
        )
    if done.returncode or not result["loads"]:
        result["log_tail"] = (log.read_text(errors="replace") + done.stdout).splitlines()[-25:]
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "command"}), flush=True)


if __name__ == "__main__":
    main()
