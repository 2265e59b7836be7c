#!/usr/bin/env python3
"""Compare data/architectures.yml with what vLLM's own classes registered, and print the score.

usage: scripts/check_architectures.py [FILE ...]

A file has the form of tests/data/checkpoints/models_vllm_0.32.json. Each model has its config.json, its
hf_quant_config.json if there is one, and `oracle`: parameter_bytes, buffer_bytes and, for two GPUs,
tp2_bytes.
Exit 1: fewer than 95 % are exact, or one is off by more than 1 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lowmem.checkpoint.inventory import inventory_of
from lowmem.errors import BadInput

DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "checkpoints"


def difference(entry: dict[str, Any], tp: int) -> float | str | None:
    """Return how far a model is off (0.0: exact), why it is refused, or None without a figure."""
    oracle = entry["oracle"]
    wanted = oracle.get("parameter_bytes" if tp == 1 else "tp2_bytes")
    if wanted is None:
        return None
    try:
        found = inventory_of(entry["config"], tp, hf_quant_config=entry.get("hf_quant_config"))
    except BadInput as error:
        return str(error)
    off = abs(found.parameter_bytes - wanted)
    if tp == 1:
        off += abs(found.buffer_bytes - oracle["buffer_bytes"])
    return off / wanted


def say(line: str) -> None:
    """Write one line to stdout."""
    sys.stdout.write(line + "\n")


def main(files: list[str]) -> int:
    """Print what is off or refused, then the score."""
    exact = wrong = refused = 0
    worst = 0.0
    for file in files or [str(DATA / f"{name}_vllm_0.32.json") for name in ("models", "families")]:
        for name, entry in json.loads(Path(file).read_text(encoding="utf-8"))["models"].items():
            for tp in (1, 2) if "oracle" in entry else ():
                off = difference(entry, tp)
                if isinstance(off, str):
                    refused += 1
                    say(f"{name} on {tp} GPU(s): {off}")
                elif off:
                    wrong, worst = wrong + 1, max(worst, off)
                    say(f"{name} on {tp} GPU(s): off by {off:.3%}")
                else:
                    exact += off is not None
    say(f"exact {exact}, off {wrong} (worst {worst:.3%}), refused {refused}")
    return int(worst > 0.01 or exact < 0.95 * (exact + wrong + refused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
