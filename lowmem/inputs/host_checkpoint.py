"""Makes a model card of a folder on a host, from what a module reported of its files."""

from __future__ import annotations

import base64
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_directory
from lowmem.inputs.model_choice import choose
from lowmem.schema import ModelCard

HEAD_LIMIT_BYTES = 101 * 2**20
"""Most that describes one file of a checkpoint: the safetensors format's own limit on a header, and more."""


def card_from_report(path: str, files: Mapping[str, Mapping[str, Any]]) -> ModelCard:
    """Make the card of a folder of a host.

    `files`: name -> size in bytes, and its beginning, compressed by zlib, in Base64
    (plugins/modules/checkpoint_report.py). Each file is made again with its whole size and without its
    weights, so that the reader of checkpoints judges it. Raises BadInput with the folder's own path.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / choose(path, "").name
        folder.mkdir()
        try:
            for name, file in files.items():
                if "/" in name or name.startswith("."):
                    raise BadInput(f"{path}: the host names {name[:80]!r}, which is no file of its folder")
                head = zlib.decompressobj().decompress(base64.b64decode(file["head"]), HEAD_LIMIT_BYTES)
                with (folder / name).open("wb") as stream:
                    stream.write(head)
                    stream.truncate(max(int(file["size"]), len(head)))
            card = card_from_directory(folder)
        except BadInput as error:
            raise BadInput(str(error).replace(str(folder), path)) from None
        except (OSError, ValueError, zlib.error, KeyError, TypeError) as error:
            raise BadInput(f"{path}: what the host says of it cannot be read ({error})") from None
    return card.model_copy(update={"source": path})
