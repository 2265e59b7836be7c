"""Read checkpoint folders: config, tensor shapes, group size, and 4-bit weights as the floating-point
matrices they stand for.

Stdlib only until a tensor is asked for, so that a host without torch can still say what is wrong with a
folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifest import safetensors_header

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (128, 64, 32)
# which column of a group of eight AutoAWQ keeps in nibble 0, 1, ... of a word
AUTOAWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
MIDPOINT = 8  # symmetric 4-bit weights are stored with 8 added


class CheckpointError(ValueError):
    """The folder is not a checkpoint that this can work with; the message names the file or tensor."""


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; is this a checkpoint folder?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return config


def shards(folder: Path) -> list[Path]:
    """The safetensors files of the folder; a broken or missing set raises."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; other formats are not supported")
    return files


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(t["shape"]) for path in shards(folder) for name, t in safetensors_header(path).items()
    }


def linear_inputs(tensor_shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Input dimension of each weight that is quantized: the matrices inside the layers. Embeddings and
    lm_head stay 16-bit.
    """
    return {
        name: shape[1]
        for name, shape in tensor_shapes.items()
        if ".layers." in name
        and name.endswith(".weight")
        and len(shape) == 2
        and not name.endswith(".gate.weight")
    }


def choose_group_size(inputs: dict[str, int], wanted: int | None = None) -> int:
    """The largest of 128, 64 and 32 that divides every input dimension, or `wanted` if that divides them all.

    Larger groups cost less memory, smaller ones less quality. CheckpointError names the tensor that stands in
    the way.
    """
    if not inputs:
        raise CheckpointError("no linear layer to quantize: no 2-dimensional '.layers.*.weight' tensor")
    for size in (wanted,) if wanted else GROUP_SIZES:
        bad = next((name for name, n in inputs.items() if n % size), None)
        if bad is None:
            return size
    raise CheckpointError(
        f"group size {size} does not divide the {inputs[bad]} inputs of {bad}"
        + (f"; the largest that fits all layers is {choose_group_size(inputs)}" if wanted else "")
    )


def unpack(words: torch.Tensor, dim: int, order: tuple[int, ...] = PLAIN_ORDER) -> torch.Tensor:
    """int32 words of eight 4-bit values along `dim` to values 0..15; nibble i of a word is element order[i]
    of its eight.
    """
    import torch

    words = words.movedim(dim, -1)
    values = torch.empty(*words.shape, 8, dtype=torch.int32)
    for nibble, place in enumerate(order):
        values[..., place] = (words >> (4 * nibble)) & 15
    return values.flatten(-2).movedim(-1, dim)


def dequantize(part: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [out, in] of one linear layer as stored; `part` maps the last word of each tensor name to the
    tensor.

    Understands AutoAWQ (qweight, qzeros, scales) and compressed-tensors pack-quantized (weight_packed,
    weight_scale, weight_zero_point). w = (q - zero) * scale, scale and zero shared by a group of inputs.
    """
    if "qweight" in part:
        scale = part["scales"].float().t()
        q = unpack(part["qweight"], 1, AUTOAWQ_ORDER).t()
        zero = unpack(part["qzeros"], 1, AUTOAWQ_ORDER).t()
    elif "weight_packed" in part:
        scale = part["weight_scale"].float()
        q = unpack(part["weight_packed"], 1)
        zero = unpack(part["weight_zero_point"], 0) if "weight_zero_point" in part else MIDPOINT
    else:
        raise CheckpointError(f"no 4-bit format has the tensors {', '.join(sorted(part))}")
    group = q.shape[1] // scale.shape[1]
    if not isinstance(zero, int):
        zero = zero.repeat_interleave(group, dim=1)
    weight: torch.Tensor = (q - zero) * scale.repeat_interleave(group, dim=1)
    return weight


class Tensors:
    """The weights of a checkpoint folder by their unquantized names, read from disk one at
    a time, float32.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {name: path for path in shards(folder) for name in safetensors_header(path)}
        self.parts: dict[str, list[str]] = {}
        for name in self.files:
            module, _, leaf = name.rpartition(".")
            self.parts.setdefault(module, []).append(leaf)

    def names(self) -> Iterator[str]:
        for module, leaves in self.parts.items():
            if "qweight" in leaves or "weight_packed" in leaves:
                yield f"{module}.weight"
                yield from (f"{module}.{leaf}" for leaf in leaves if leaf == "bias")
            else:
                yield from (f"{module}.{leaf}" for leaf in leaves)

    def read(self, name: str) -> torch.Tensor:
        if name in self.files:
            return self._stored(name).float()
        module = name.removesuffix(".weight")
        return dequantize({leaf: self._stored(f"{module}.{leaf}") for leaf in self.parts.get(module, [])})

    def _stored(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def parameter_count(tensor_shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes.values())
