"""Runs measured on real GPUs, read back as inputs of the plan: what was predicted beside what was seen."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem import profiles
from lowmem.planner import make_plan
from lowmem.schema import Plan, Scalar
from lowmem.units import MIB

_SHORT = {"-tp": "--tensor-parallel-size"}
_BARE = ("--enforce-eager", "--enable-chunked-prefill", "--disable-log-stats")
_NOT_KNOBS = ("model", "served_model_name", "load_format")


def knobs_of(args: str) -> dict[str, Scalar]:
    """The arguments of a run as knob -> value."""
    words, found, i = shlex.split(args), {}, 0
    while i < len(words):
        flag = _SHORT.get(words[i], words[i])
        name = flag.removeprefix("--").replace("-", "_")
        if flag in _BARE:
            value: Scalar = True
        else:
            i += 1
            value = words[i]
        if name not in _NOT_KNOBS:
            found[name] = value
        i += 1
    return found


@dataclass(frozen=True)
class Compared:
    """One run: the plan made for it, and what was measured (None: the run did not get that far)."""

    name: str
    vllm: str
    plan: Plan
    idle_mib: float | None
    kv_gib: float | None
    kv_tokens: int | None
    tpot_ms: float | None
    error: str | None

    @property
    def planned_idle_mib(self) -> float:
        return self.plan.per_gpu["total"] / MIB


def _logged(lines: list[str], pattern: str) -> str | None:
    for line in lines:
        if match := re.search(pattern, line):
            return match[1]
    return None


def compare(run: Mapping[str, Any], device: str = "h200") -> Compared:
    """A run of the reference file beside its plan; nothing of the run but its arguments, versions and load goes into the plan."""
    bare = profiles.load_profile("low_mem")
    awq = bare.quantization.model_copy(update={"method": "awq"})
    empty = bare.model_copy(update={"name": "reference", "quantization": awq, "knobs": {}, "environment": {}})
    knobs = knobs_of(run["args"])
    count = int(knobs.get("tensor_parallel_size", 1))
    plan = make_plan(
        empty,
        "llama-2-70b",
        device,
        count,
        knobs,
        clients=run["clients"],
        input_tokens=run["input_tokens"],
        output_tokens=run["output_tokens"],
        vllm_version=run["vllm"],
        memory_limit_bytes=143771 * MIB,
        search=False,
    )
    log = run["engine_log"]
    kv, tokens = _logged(log, r"Available KV cache memory: (-?[\d.]+) GiB"), _logged(log, r"GPU KV cache size: ([\d,]+) tokens")
    error = _logged(log, r"(unrecognized arguments: .*|No available memory for the cache blocks)")
    return Compared(
        name=run["name"],
        vllm=run["vllm"],
        plan=plan,
        idle_mib=float(run["idle_mib"][0]) if run["ready_s"] is not None else None,
        kv_gib=float(kv) if kv else None,
        kv_tokens=int(tokens.replace(",", "")) if tokens else None,
        tpot_ms=run["tpot_ms_mean"],
        error=error,
    )


def load_runs(path: Path) -> list[Compared]:
    """All runs of a reference file."""
    return [compare(run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]


@dataclass(frozen=True)
class Session:
    """One run of our own sessions: its plan, and what was read (None: the run did not get that far), MiB a card."""

    name: str
    plan: Plan
    calibrates: bool
    loaded_mib: float
    before_start_mib: float
    idle_mib: float | None
    start_peak_mib: float | None
    outcome: str

    @property
    def planned_before_start_mib(self) -> float:
        """What the plan has on the card when the engine first reads free memory."""
        return self.plan.before_start_bytes / MIB


def load_session(path: Path) -> list[Session]:
    """Our own runs (tests/data/gpu_session.json)."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for run in data["runs"]:
        p = profiles.load_profile(run["profile"])
        q = p.quantization.model_copy(update={"method": run["method"], "bits": run["bits"]})
        p = p.model_copy(update={"quantization": q, "environment": {}})
        plan = make_plan(
            p,
            "llama-2-70b",
            data["device"],
            run["count"],
            run["knobs"],
            environment=run["environment"],
            vllm_version=data["vllm"],
            memory_limit_bytes=143771 * MIB,
            search=False,
        )
        seen = {k: run[k] for k in ("calibrates", "loaded_mib", "before_start_mib", "idle_mib", "start_peak_mib", "outcome")}
        found.append(Session(run["name"], plan, **seen))
    return found
