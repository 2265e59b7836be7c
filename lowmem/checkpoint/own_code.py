"""Refuses a checkpoint that only works with code of its own.

`auto_map` in its JSON files names that code, in the checkpoint or in any repository of a hub, and
trust_remote_code would run it. Here it is never run. Where the engine's libraries know the type by
themselves they leave the code aside, and so the checkpoint is served.

`native` is data/native_types.json. The module imports the standard library only, since it is also copied to
hosts, with the table beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 * 2**20
"""The largest tokenizer_config.json of a known model has 1 MB."""

ADVICE = (
    "no code of a checkpoint is ever run (trust_remote_code stays false): use a checkpoint of a type that"
    " vLLM knows by itself"
)

Native = Mapping[str, list[str]]


def table() -> Native:
    """Read the table beside this file, or that of the package."""
    here = Path(__file__).parent
    beside = here / "native_types.json"
    found = beside if beside.exists() else here.parent / "data/native_types.json"
    native: Native = json.loads(found.read_text(encoding="utf-8"))
    return native


def refusals(config: Mapping[str, Any], tokenizer: Mapping[str, Any], native: Native) -> Iterator[str]:
    """Yield a line for each of config.json and tokenizer_config.json that asks for code of its own."""
    kind = config.get("model_type")
    code = _named(config.get("auto_map"), "AutoConfig")
    if code and kind not in native["model_types"]:
        yield f"config.json: model_type {_shown(kind)} needs the code {code} of auto_map, and {ADVICE}"
    code = _named(tokenizer.get("auto_map"), "AutoTokenizer")
    name = tokenizer.get("tokenizer_class")
    short = name.removesuffix("Fast") if isinstance(name, str) else name
    if code and kind not in native["tokenizer_types"] and short not in native["tokenizer_classes"]:
        yield (
            f"tokenizer_config.json: tokenizer_class {_shown(name)} needs the code {code} of auto_map, and"
            f" {ADVICE}"
        )


def refusals_of(folder: Path, native: Native) -> Iterator[str]:
    """Yield the `refusals` of a checkpoint folder; a file that cannot be read is one."""
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            found.append(_object(folder / name))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{name} cannot be read ({type(error).__name__}): bring it again"
            return
    yield from refusals(found[0], found[1], native)


def _object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; one that does not exist is empty."""
    if not path.exists():
        return {}
    if not path.is_file() or path.stat().st_size > LIMIT_BYTES:
        raise ValueError(path)
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(path)
    return value


def _named(auto_map: Any, key: str) -> str:
    """Return the code that auto_map names for a class of transformers; empty if it names none.

    transformers asks for the key with `in`, so a text that contains it counts; a list is a tokenizer's.
    """
    if isinstance(auto_map, Mapping):
        found = auto_map.get(key)
    else:
        found = auto_map if isinstance(auto_map, list) or key in str(auto_map) else None
    parts = found if isinstance(found, list) else [found]
    return ", ".join(_shown(part) for part in parts if part is not None)


def _shown(value: Any) -> str:
    """Return a value of a foreign file as a terminal and a log may show it."""
    return ascii(value)[:80]
