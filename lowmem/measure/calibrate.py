"""Fits the constants of a site: values with which the plan says what the site's receipts measured.

The plan itself is asked: a receipt's own arguments are planned again, with one constant after the other
changed until planned and measured agree. So no formula of the plan is written here a second time.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem.artefacts import read
from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards, options, profiles
from lowmem.plan.calibration import calibrated, constant
from lowmem.plan.compute import compute, engine_of
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.request import Inputs, PlanRequest, gather
from lowmem.schema import Calibration, Load, ModelCard, Plan, Receipt, Scalar, SiteConstant
from lowmem.units import MIB

MOST_RECEIPTS = 200

CLOSE = 0.002
"""Ratio of planned to measured, as a logarithm, that ends a search."""

STEPS = 12

WIDEST = 8.0
"""Factor by which a site's constant may differ from the package's; beyond it the receipt is another case."""

PROMPT_STEP = 2.0
"""Ratio of the 99th percentile to the median of the gaps, from which the former is a step with a prompt."""

_ENVIRONMENT = ("NCCL_MAX_NCHANNELS", "VLLM_ALLREDUCE_USE_SYMM_MEM", "PYTORCH_CUDA_ALLOC_CONF",
                "VLLM_DISABLED_KERNELS")  # fmt: skip
"""Variables of the engine that change its memory or its kernels."""


@dataclass(frozen=True)
class Run:
    """Load of a receipt, as input of a plan, beside what was measured."""

    receipt: str
    inputs: Inputs
    engine: EngineConfig
    idle_mib: float | None
    step_ms: float
    prompt_step_ms: float | None
    """None: no gap is one of a step with a prompt."""
    token_ms: float
    """Mean of a token, with the prompts of the other clients between two."""
    cache: dict[tuple[tuple[str, float], ...], Plan] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, constants: dict[str, SiteConstant]) -> Plan:
        """Return the plan with these constants."""
        key = tuple(sorted((name, one.value) for name, one in constants.items()))
        if key not in self.cache:
            site = _site(self.inputs.device.name, constants, ("fit",)) if constants else None
            with calibrated(site, self.inputs.device.name):
                self.cache[key] = compute(self.inputs)
        return self.cache[key]


@dataclass(frozen=True)
class Target:
    """Constant, the runs that show it, and what of them it decides.

    `entry` is the run's own of a table, such as its kernel.
    """

    constant: str
    shows: Callable[[Run], bool]
    planned: Callable[[Plan], float]
    measured: Callable[[Run], float | None]
    entry: Callable[[Run], str] = lambda _: "any"

    def name(self, run: Run) -> str | None:
        """Return the full name of the constant for a run; None if this version has none."""
        section, _, field_name = self.constant.partition(".")
        table = load_yaml("calibration.yml")[section].get(field_name, {}).get("value")
        if not isinstance(table, dict):
            return None if table is None else self.constant
        own = next((entry for entry in (self.entry(run), "any") if entry in table), None)
        return own and f"{self.constant}.{own}"


def _idle_mib(plan: Plan) -> float:
    return plan.per_gpu["total"] / MIB


def _step_ms(plan: Plan) -> float:
    return plan.latency_ms.terms["steady_step"]


def _prompt_step_ms(plan: Plan) -> float:
    return plan.latency_ms.terms["chunk_step"]


def _token_ms(plan: Plan) -> float:
    return plan.latency_ms.decode_expected


def _alone(run: Run) -> bool:
    return run.engine.tp * run.engine.pp == 1


def _plain(run: Run) -> bool:
    """Tell whether a step is one of a dense model's kernels: no pipeline, offload, drafts or launches."""
    dense = not run.inputs.card.experts
    return dense and _one_stage(run) and not run.engine.eager and run.engine.offload == "none"


def _one_stage(run: Run) -> bool:
    return run.engine.pp == 1 and run.engine.speculation is None


def _kernel(run: Run) -> str:
    return run.engine.kernel


TARGETS = (
    Target("memory.snapshot_mib", _alone, _idle_mib, lambda run: run.idle_mib),
    Target(
        "memory.nccl_base_mib",
        lambda run: not _alone(run) and run.engine.pp == 1,
        _idle_mib,
        lambda run: run.idle_mib,
    ),
    Target(
        "latency.eager_ms_per_layer",
        lambda run: _one_stage(run) and run.engine.eager and run.engine.offload == "none",
        _step_ms,
        lambda run: run.step_ms,
    ),
    Target("latency.hbm_efficiency", _plain, _step_ms, lambda run: run.step_ms, _kernel),
    Target("latency.flop_efficiency", _plain, _prompt_step_ms, lambda run: run.prompt_step_ms, _kernel),
    Target(
        "latency.link_efficiency",
        lambda run: _one_stage(run) and run.engine.offload != "none",
        _step_ms,
        lambda run: run.step_ms,
        lambda run: run.engine.offload,
    ),
    Target("latency.interference_share", _plain, _token_ms, lambda run: run.token_ms),
)
"""In the order in which they are fitted: each takes those before it as given."""


def calibrate(paths: Sequence[Path], created_utc: str, model: str | None = None) -> Calibration:
    """Fit the constants of a site to its receipts.

    A constant is kept if it says the receipts better that it was not made of, each left out in turn. Raises
    BadInput, one line, for receipts that are damaged, of a CPU, of several kinds of card or without a load.
    """
    if not 1 <= len(paths) <= MOST_RECEIPTS:
        raise BadInput(f"{len(paths)} receipts: give 1 to {MOST_RECEIPTS}")
    found = [(path, read(path)) for path in paths]
    runs = [run for path, receipt in found for run in runs_of(path.name, receipt, model)]
    kinds = sorted({run.inputs.device.name for run in runs})
    if len(kinds) > 1:
        raise BadInput(f"the receipts are of several devices ({', '.join(kinds)}); calibrate each by itself")
    constants: dict[str, SiteConstant] = {}
    for target in TARGETS:
        shows = [(target.name(run), run) for run in runs if target.shows(run)]
        for name in sorted({name for name, _ in shows if name}):
            shown = [run for own, run in shows if own == name]
            if one := fitted(name, target, shown, constants):
                constants[name] = one
    if not constants:
        raise BadInput(
            f"the plan says these {len(paths)} receipts as well with its own constants; no file is needed"
        )
    digests = tuple(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths)
    versions = sorted({receipt.plan.vllm_version for _, receipt in found})
    site = _site(kinds[0], constants, digests)
    return site.model_copy(update={"created_utc": created_utc, "vllm_version": ", ".join(versions)})


def _site(device: str, constants: dict[str, SiteConstant], receipts: tuple[str, ...]) -> Calibration:
    return Calibration(created_utc="", device=device, vllm_version="", constants=constants, receipts=receipts)


def fitted(
    name: str, target: Target, runs: Sequence[Run], constants: dict[str, SiteConstant]
) -> SiteConstant | None:
    """Fit one constant to the runs that show it: the median of what each receipt asks for.

    None: the runs do not show it, or the package's value predicts them as well.
    """
    before = _package_value(name, runs[0])
    asked: dict[str, list[float]] = {}
    for run in runs:
        value = _solved(name, target, run, constants, before)
        if value is not None:
            asked.setdefault(run.receipt, []).append(value)
    each = {receipt: statistics.median(values) for receipt, values in asked.items()}
    if not each:
        return None

    def error(run: Run, value: float) -> float:
        measured = target.measured(run)
        changed = {**constants, name: SiteConstant(value=value, before=before, source="")}
        return abs(math.log(target.planned(run.plan(changed)) / measured)) if measured else 0.0

    seen = [run for run in runs if run.receipt in each]
    if len(each) > 1:
        without = {
            left: statistics.median(v for receipt, v in each.items() if receipt != left) for left in each
        }
        predicted = statistics.mean(error(run, without[run.receipt]) for run in seen)
        if predicted >= statistics.mean(error(run, before) for run in seen):
            return None
    value = float(f"{statistics.median(each.values()):.4g}")
    low, high = min(each.values()), max(each.values())
    return SiteConstant(
        value=value,
        before=before,
        source=f"{low:.4g} to {high:.4g} in {', '.join(sorted(each))}"[:2000],
    )


def _package_value(name: str, run: Run) -> float:
    """Return what the package has for this constant, on this run's device."""
    section, field_name, *entry = name.split(".")
    value = constant(section, field_name)
    if not entry:
        return float(value)
    device = run.inputs.device
    keys = (f"{entry[0]}@{device.name}", f"{entry[0]}@{device.capability}", entry[0])
    return float(next(value[key] for key in keys if key in value))


def _solved(
    name: str, target: Target, run: Run, constants: dict[str, SiteConstant], before: float
) -> float | None:
    """Return the value of a constant with which the plan says what a run measured.

    None: the plan of this run hardly depends on it. The search halves the logarithm of the interval.
    """
    measured = target.measured(run)
    if not measured:
        return None

    def ratio(value: float) -> float:
        changed = {**constants, name: SiteConstant(value=value, before=before, source="")}
        return math.log(target.planned(run.plan(changed)) / measured)

    low, high = before / WIDEST, before * WIDEST
    at_low, at_high = ratio(low), ratio(high)
    if at_low * at_high > 0 or abs(at_low - at_high) < CLOSE:
        return None
    middle = before
    for _ in range(STEPS):
        at_middle = ratio(middle)
        if abs(at_middle) < CLOSE:
            break
        if at_middle * at_low > 0:
            low, at_low = middle, at_middle
        else:
            high = middle
        middle = math.sqrt(low * high)
    return middle


def runs_of(name: str, receipt: Receipt, model: str | None = None) -> list[Run]:
    """Plan a receipt's own arguments, model, cards and loads again.

    Raises BadInput for a receipt of a CPU, of a service that did not answer, or of a model that is not known.
    """
    if receipt.plan.device_kind == "cpu" or "gpu" not in receipt.hardware:
        raise BadInput(f"receipt {name} is of a CPU; only cards are calibrated")
    if not receipt.loads or not receipt.memory_idle_bytes:
        raise BadInput(f"receipt {name} holds no load: its service did not answer; leave it out")
    before = receipt.memory_before_bytes or (0,) * len(receipt.memory_idle_bytes)
    idle = max(a - b for a, b in zip(receipt.memory_idle_bytes, before, strict=True)) / MIB
    runs = []
    for n, result in enumerate(receipt.loads):
        inputs = gather(request_of(name, receipt, result.load, model))
        prompt = result.itl_ms.p99 if result.itl_ms.p99 > PROMPT_STEP * result.itl_ms.p50 else None
        runs.append(
            Run(
                receipt=name,
                inputs=inputs,
                engine=engine_of(inputs),
                idle_mib=None if n or receipt.mode == "attach" else idle,
                step_ms=result.itl_ms.p50,
                prompt_step_ms=prompt,
                token_ms=result.tpot_ms.mean,
            )
        )
    return runs


def request_of(
    name: str, receipt: Receipt, load: Load, model: str | ModelCard | None = None, weights: str = "profile"
) -> PlanRequest:
    """Return the request that plans a receipt's card, arguments, environment and model again, for a load.

    `model` is what the receipt's model is planned by, where its name is no built-in card or folder. Raises
    BadInput for a receipt that does not tell its model or card.
    """
    plan, hardware = receipt.plan, receipt.hardware
    total = hardware.get("gpu_total_mib", "")
    if not total.isdecimal():
        raise BadInput(f"receipt {name}: hardware.gpu_total_mib is {total[:40]!r}; it must be MiB in digits")
    device = plan.device_figures or devices.by_nvml_name(hardware["gpu"], int(total))
    bare = profiles.load_profile("low_mem").model_copy(
        update={"name": "receipt", "quantization": plan.quantization, "knobs": {}, "environment": {}}
    )
    return PlanRequest(
        bare,
        model or _model_of(name, plan.model),
        device,
        plan.device_count,
        knobs_of(receipt.argv),
        clients=load.clients,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        accepted_tokens=load.accepted_tokens,
        memory_limit_bytes=int(total) * MIB,
        environment={n: receipt.environment[n] for n in _ENVIRONMENT if n in receipt.environment},
        vllm_version=plan.vllm_version,
        search=False,
        weights=weights,
    )


def _model_of(name: str, model: str) -> str:
    """Return what a receipt's model is planned by; a folder that was quantized is named after its card."""
    known = [m for m in model_cards.builtin() if model == m or model.startswith(f"{m}-")]
    if known:
        return max(known, key=len)
    if Path(model).is_dir():
        return model
    raise BadInput(
        f"receipt {name}: model {model[:80]!r} is no built-in card or folder here; name it with --model"
    )


def knobs_of(argv: Sequence[str]) -> dict[str, Scalar]:
    """Return the knobs among the arguments of a server; the last one of a name counts.

    What the deployment sets itself, such as served_model_name, is none of them. The share of the card
    counts only where no size of the pool is given, as in the engine.
    """
    table = load_yaml("knobs.yml")
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    found: dict[str, Scalar] = {}
    for n, word in enumerate(words):
        name = word.removeprefix("--").replace("-", "_")
        negated = name.removeprefix("no_")
        if not word.startswith("--") or (name not in table and negated not in table):
            continue
        if name not in table:
            found[negated] = False
        elif table[name]["type"] == "bool":
            found[name] = True
        elif n + 1 < len(words):
            found[name] = words[n + 1]
    if "kv_cache_memory_bytes" in found:
        found.pop("gpu_memory_utilization", None)
    own = {"load_format", "attention_backend", *(n for n in found if options.is_refused(n))}
    return {name: value for name, value in found.items() if name not in own}
