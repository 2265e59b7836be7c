"""Runs measured on real GPUs, read back as inputs of the plan: what was predicted beside what was seen."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowmem.artefacts import read
from lowmem.inputs import profiles
from lowmem.inputs.model_cards import card_from_config, names
from lowmem.measure.calibrate import request_of
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import ModelCard, Plan, Receipt, Scalar
from lowmem.units import MIB

_SHORT = {"-tp": "--tensor-parallel-size"}

_BARE = ("--enforce-eager", "--enable-chunked-prefill", "--disable-log-stats", "--disable-custom-all-reduce")

_NOT_KNOBS = ("model", "served_model_name", "load_format")


def knobs_of(args: str) -> dict[str, Scalar]:
    """Return the arguments of a run by knob."""
    words, found, i = shlex.split(args), {}, 0
    while i < len(words):
        flag = _SHORT.get(words[i], words[i])
        name = flag.removeprefix("--").replace("-", "_")
        if flag in _BARE:
            value: Scalar = True
        elif name.startswith("no_"):
            name, value = name.removeprefix("no_"), False
        else:
            i += 1
            value = words[i]
        if name not in _NOT_KNOBS:
            found[name] = value
        i += 1
    return found


@dataclass(frozen=True)
class Compared:
    """Run with the plan made for it and its measurement.

    The measurement is None if the run did not get that far.
    """

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
    """Make the plan of a run of the reference file, beside its measurement.

    Only the run's arguments, versions and load go into the plan.
    """
    bare = profiles.load_profile("low_mem")
    awq = bare.quantization.model_copy(update={"method": "awq"})
    empty = bare.model_copy(update={"name": "reference", "quantization": awq, "knobs": {}, "environment": {}})
    knobs = knobs_of(run["args"])
    count = int(knobs.get("tensor_parallel_size", 1))
    plan = make_plan(
        PlanRequest(
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
    )
    log = run["engine_log"]
    kv, tokens = (
        _logged(log, r"Available KV cache memory: (-?[\d.]+) GiB"),
        _logged(log, r"GPU KV cache size: ([\d,]+) tokens"),
    )
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


@cache
def load_runs(path: Path) -> list[Compared]:
    """Load all runs of a reference file."""
    return [compare(run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]


@dataclass(frozen=True)
class ModelRun:
    """Run of another model on the default kernels, with its plan and its measurement at one load."""

    name: str
    clients: int
    plan: Plan
    weights_gib: float
    kv_gib: float
    kv_tokens: int
    idle_mib: float
    peak_mib: float
    step_ms: float
    tpot_ms: float


@cache
def load_models(path: Path) -> list[ModelRun]:
    """Load the runs of other models (tests/data/gpu_runs_models.json), each at eight clients and at one."""
    found = []
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        empty = profiles.load_profile("low_mem").model_copy(
            update={"name": run["name"], "knobs": {}, "environment": {}}
        )
        card = card_from_config(run["config"], run["model"], "config.json")
        for load in (run["load8"], run["load1"]):
            plan = make_plan(
                PlanRequest(
                    empty,
                    card,
                    "h200",
                    run["gpus"],
                    knobs_of(shlex.join(run["args"])),
                    clients=load["clients"],
                    input_tokens=load["in"],
                    output_tokens=load["out"],
                    memory_limit_bytes=143771 * MIB,
                    weights="stored",
                    search=False,
                )
            )
            found.append(
                ModelRun(
                    name=run["name"],
                    clients=load["clients"],
                    plan=plan,
                    weights_gib=run["weights_gib"],
                    kv_gib=run["kv_available_gib"],
                    kv_tokens=run["kv_tokens"],
                    idle_mib=max(run["idle_mib"]),
                    peak_mib=run["peaks_mib"]["load"],
                    step_ms=load["itl_p50"],
                    tpot_ms=load["tpot_mean_ms"],
                )
            )
    return found


@dataclass(frozen=True)
class Session:
    """Run of our own sessions with its plan and its readings, in MiB a card.

    A reading is None if the run did not get that far.
    """

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
        """Return the plan's memory on the card when the engine first reads free memory."""
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
            PlanRequest(
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
        )
        seen = {
            k: run[k]
            for k in ("calibrates", "loaded_mib", "before_start_mib", "idle_mib", "start_peak_mib", "outcome")
        }
        found.append(Session(run["name"], plan, **seen))
    return found


@dataclass(frozen=True)
class Received:
    """Receipt of a run on a real card, beside today's plan for that card with the same arguments."""

    name: str
    receipt: Receipt
    plan: Plan
    knobs: Mapping[str, Scalar]

    @property
    def idle_mib(self) -> float:
        return (
            max(
                a - b
                for a, b in zip(self.receipt.memory_idle_bytes, self.receipt.memory_before_bytes, strict=True)
            )
            / MIB
        )

    @property
    def peak_mib(self) -> float:
        """Highest under load."""
        return float(next(t.measured_bytes or 0 for t in self.receipt.terms if t.name == "peak")) / MIB

    @property
    def tpot_ms(self) -> float:
        """Mean over the requests of the first load."""
        return self.receipt.loads[0].tpot_ms.mean


def received(name: str, receipt: Receipt, card: ModelCard | None = None) -> Received:
    """Nothing of the receipt but the card, arguments, environment, model and load goes into the plan.

    `card` is the model where it is no built-in one; it is planned as it is stored.
    """
    old = receipt.plan.model
    model = card or (old if old in names() else "llama-2-70b")
    request = request_of(name, receipt, receipt.loads[0].load, model, "stored" if card else "profile")
    return Received(name, receipt, make_plan(request), request.overrides)


@cache
def load_receipts(folder: Path) -> list[Received]:
    """Load the receipts of a folder whose service answered a load, by name, each planned for its own card.

    Other JSON files are skipped.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        text = file.read_text(encoding="utf-8")
        if '"argv"' in text and '"ready_s"' in text:
            receipt = read(file)
            if receipt.loads:
                found.append(received(file.stem, receipt, published_beside(file)))
    return found


def published_beside(receipt: Path) -> ModelCard | None:
    """Return the model of a receipt whose config.json lies beside it, as NAME.config.json."""
    config = receipt.with_suffix(".config.json")
    if not config.exists():
        return None
    return card_from_config(json.loads(config.read_text(encoding="utf-8")), receipt.stem, str(config))
