"""Runs in a quantization environment: float tensors come out in the source's type; and why a GPU works in
bfloat16.
"""

import json
import sys
from pathlib import Path

import manifest
import torch
from quantize_model import Refused, to_half
from safetensors.torch import save_file

folder = Path(sys.argv[1])
tensors = {
    "single": torch.tensor([0.5]),
    "brain": torch.tensor([1.5], dtype=torch.bfloat16),
    "half": torch.tensor([2.5], dtype=torch.float16),
    "packed": torch.tensor([7], dtype=torch.int32),
}
save_file(tensors, folder / "model.safetensors")
manifest.write_json(folder / "config.json", {"torch_dtype": "float32"})


def stored() -> dict[str, str]:
    return {
        name: tensor["dtype"]
        for name, tensor in manifest.safetensors_header(folder / "model.safetensors").items()
    }


answer: dict[str, object] = {}
for dtype in ("float16", "bfloat16"):
    to_half(folder, dtype)
    answer[dtype] = stored()
answer["config"] = json.loads((folder / "config.json").read_text())
save_file({"large": torch.tensor([1e5], dtype=torch.bfloat16)}, folder / "model.safetensors")
try:
    to_half(folder, "float16")
except Refused as refusal:
    answer["refused"] = str(refusal)
# llm-compressor's loss of one sample of 512 tokens of SmolLM2, each output off by a half
for kind in (torch.float16, torch.bfloat16):
    exact = torch.zeros(512, 576, dtype=kind)
    answer[f"loss in {kind}"] = (
        torch.nn.functional.mse_loss(exact, exact + 0.5, reduction="sum").isfinite().item()
    )
print(json.dumps(answer))
