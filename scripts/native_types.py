"""Prints lowmem/data/native_types.json: what the engine's libraries load without a checkpoint's own code.

    <vLLM's environment>/bin/python scripts/native_types.py > lowmem/data/native_types.json

Run it with the Python of an environment that has the pinned vLLM. The names are the keys of transformers'
CONFIG_MAPPING_NAMES and TOKENIZER_MAPPING_NAMES, what its tokenizer_class_from_name finds, and vLLM's
_CONFIG_REGISTRY with the model types whose tokenizer it corrects.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable

import transformers
import vllm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)
from vllm.tokenizers.registry import _MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS
from vllm.transformers_utils.config import _CONFIG_REGISTRY


def block(name: str, names: Iterable[str]) -> str:
    """Return one list of the table, wrapped."""
    listed = ", ".join(f'"{n}"' for n in sorted(set(names)))
    folded = textwrap.fill(f"[{listed}]", 118, break_on_hyphens=False)
    return f'"{name}":\n' + textwrap.indent(folded, "  ")


def main() -> None:
    classes = {n.removesuffix("Fast") for n in dir(transformers) if re.search(r"Tokenizer(Fast)?$", n)}
    classes |= {n.removesuffix("Fast") for n in TOKENIZER_MAPPING_NAMES.values() if n}
    classes |= {"BloomTokenizer", "TokenizersBackend", "PythonBackend", "MistralCommonBackend"}
    tokenizers = {*TOKENIZER_MAPPING_NAMES, *MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS}
    versions = [f"vllm {vllm.__version__.split('+')[0]}", f"transformers {transformers.__version__}"]
    blocks = [
        block("source", [*versions, "scripts/native_types.py"]),
        block("model_types", {*CONFIG_MAPPING_NAMES, *_CONFIG_REGISTRY}),
        block("tokenizer_types", tokenizers | _MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS),
        block("tokenizer_classes", classes),
    ]
    sys.stdout.write("{" + ",\n".join(blocks) + "}\n")


if __name__ == "__main__":
    main()
