"""Reads the headers of safetensors files and small JSON files of a checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput

_HEADER_LIMIT_BYTES = 100 * 2**20  # the safetensors format's own limit on a header

_SAFETENSORS_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip


def _header_size(tensor: Any, name: str) -> int:
    try:
        size = _SAFETENSORS_BITS[tensor["dtype"]]
        for n in tensor["shape"]:
            size *= int(n)
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"safetensors header: tensor {name!r} has no usable dtype and shape; the file is damaged,"
            " download it again"
        ) from None
    return size // 8


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; a model directory needs at least its config.json") from None
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path} cannot be read ({type(e).__name__}); download it again") from None
    if not text.strip():
        raise BadInput(f"{path} is empty; download it again")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise BadInput(f"{path} is not JSON ({str(e).splitlines()[0]}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object; download it again")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of one safetensors file: {dtype, shape, data_offsets} by tensor name.

    Raises BadInput if it is cut short or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            first = f.read(8)
            (length,) = struct.unpack("<Q", first) if len(first) == 8 else (0,)
            if not 2 <= length <= min(_HEADER_LIMIT_BYTES, size - 8):
                raise BadInput(
                    f"{path} has no safetensors header; the file is cut short or no safetensors, download it"
                    " again"
                )
            header = json.loads(f.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise BadInput(
            f"{path}: its safetensors header cannot be read ({type(e).__name__}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: its safetensors header is no JSON object; download it again")
    header.pop("__metadata__", None)
    ends = [
        t["data_offsets"][1]
        for t in header.values()
        if isinstance(t, dict) and isinstance(t.get("data_offsets"), list)
    ]
    if ends and max(ends) + 8 + length > size:
        raise BadInput(
            f"{path} is {size} bytes, its header speaks of {max(ends) + 8 + length}; the download is"
            " incomplete"
        )
    return header
