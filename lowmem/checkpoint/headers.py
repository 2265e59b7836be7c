"""Reads the headers of safetensors files and small JSON files of a checkpoint. No weight is read.

A checkpoint may come from anybody: a header that is damaged, hostile or cut short is one line, and 90,000
tensors take about a second.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.files import open_regular, read_json_object

HEADER_LIMIT_BYTES = 100 * 2**20
"""The safetensors format's own limit on a header."""

INDEX_LIMIT_BYTES = 64 * 2**20
"""An index of 90,000 tensors has 10 MB."""

FILES_LIMIT = 10_000

ELEMENTS_LIMIT = 2**48
"""No tensor has as many elements; a larger product of dimensions is damage."""

_DIMENSIONS_LIMIT = 16

_INDEX = "model.safetensors.index.json"

_BESIDE = ("adapter_", "consolidated")
"""Begin the names of files that vLLM does not load as a model beside others: adapters, a second copy."""

_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

Header = dict[str, dict[str, Any]]


def tensor_bytes(tensor: Any, name: str) -> int:
    """Return the bytes of one tensor by its dtype and shape. BadInput where it has no usable ones."""
    dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    if not isinstance(dtype, str) or not isinstance(shape, list | tuple) or len(shape) > _DIMENSIONS_LIMIT:
        raise _unusable(name, f"dtype {str(dtype)[:20]!r}, shape {str(shape)[:40]}")
    try:
        return _size(dtype, *shape)
    except (TypeError, ValueError) as error:  # a dimension that has no hash is no number either
        raise _unusable(
            name, str(error) if isinstance(error, ValueError) else f"shape {shape}"[:60]
        ) from None


@lru_cache(maxsize=4096, typed=True)
def _size(dtype: str, *shape: Any) -> int:
    """Return the bytes of a shape; a checkpoint has few shapes. ValueError says what is wrong."""
    bits = _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"dtype {dtype[:20]!r}, shape {str(list(shape))[:40]}")
    elements = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(f"dimension {str(size)[:40]!r}, which is no whole number from 0")
        elements *= size
        if elements > ELEMENTS_LIMIT:
            raise ValueError(f"shape {str(list(shape))[:60]}, above the limit of 2**48 elements")
    return (elements * bits + 7) // 8


def _unusable(name: str, what: str) -> BadInput:
    return BadInput(
        f"safetensors header: tensor {name[:80]!r} has no usable dtype and shape ({what}); the file is"
        " damaged, download it again"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a checkpoint, such as config.json. BadInput where it is damaged."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; a model directory needs at least its config.json") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); download it again") from None
    if size == 0:
        raise BadInput(f"{path} is empty; download it again")
    try:
        return read_json_object(path, infinite_is_none=True)
    except BadInput as error:
        raise BadInput(f"{error}; download it again") from None


def read_header(path: Path) -> Header:
    """Read the header of one safetensors file: {dtype, shape, data_offsets} by tensor name.

    Raises BadInput if it is cut short, damaged, or speaks of data that the file does not have.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            (length,) = struct.unpack("<Q", first) if len(first) == 8 else (0,)
            if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise BadInput(
                    f"{path} has no safetensors header; the file is cut short or no safetensors, download it"
                    " again"
                )
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path}: its safetensors header cannot be read ({type(error).__name__}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: its safetensors header is no JSON object; download it again")
    header.pop("__metadata__", None)
    end = max((_end_of(tensor, name, path) for name, tensor in header.items()), default=0)
    if end + 8 + length > size:
        raise BadInput(
            f"{path} is {size} bytes, its header speaks of {end + 8 + length}; the download is incomplete"
        )
    return header


def _end_of(tensor: Any, name: str, path: Path) -> int:
    """Return where a tensor's data ends. BadInput where its offsets do not fit its dtype and shape."""
    size = tensor_bytes(tensor, name)
    offsets = tensor.get("data_offsets")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or type(offsets[0]) is not int
        or type(offsets[1]) is not int
        or offsets[0] < 0
        or offsets[1] - offsets[0] != size
    ):
        raise BadInput(
            f"{path}: tensor {name[:80]!r} has data_offsets {str(offsets)[:60]}, which do not fit its {size}"
            " bytes; the file is damaged, download it again"
        )
    end: int = offsets[1]
    return end


def checkpoint_files(folder: Path) -> tuple[list[Path], Mapping[str, Any]]:
    """Return the safetensors files that vLLM loads from a directory, and the index's weight map if any.

    The index decides. Without one, adapters and a second copy of the weights are left aside.
    """
    index = folder / _INDEX
    if index.exists():
        weights = read_json_object(index, INDEX_LIMIT_BYTES).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
            raise BadInput(f"{index} has no weight_map of tensors to files; download it again")
        names = sorted(set(weights.values()))
        for name in names:
            if "/" in name or name.startswith("."):
                raise BadInput(
                    f"{index} names {name[:80]!r}, which is no file of its folder; download it again"
                )
        files = [folder / name for name in names if (folder / name).exists()]
    else:
        weights, files = {}, sorted(folder.glob("*.safetensors"))
        own = [f for f in files if not f.name.startswith(_BESIDE)]
        files = own or files
    if len(files) > FILES_LIMIT:
        raise BadInput(f"{folder} has {len(files)} safetensors files; the limit is {FILES_LIMIT}")
    return files, weights


def checkpoint_headers(folder: Path) -> Header:
    """Read the headers of all files of a checkpoint. BadInput where they lack a tensor of the index."""
    files, weights = checkpoint_files(folder)
    header: Header = {}
    for file in files:
        header.update(read_header(file))
    missing = [name for name in weights if name not in header]
    if missing and (header or weights):
        raise BadInput(
            f"{folder}: {len(missing)} tensors of {_INDEX} are in none of the files (first:"
            f" {_first(missing)}); the download is incomplete"
        )
    return header


def _first(names: Iterable[str]) -> str:
    return min(names)[:120]
