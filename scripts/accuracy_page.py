"""Renders docs/accuracy.md: every run on a real GPU, planned beside measured, the worst first.

`python scripts/accuracy_page.py > docs/accuracy.md` writes it; a test compares.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from reference_runs import knobs_of, load_models, load_receipts, load_runs

from lowmem.data import load_yaml
from lowmem.inputs.devices import load_device
from lowmem.inputs.model_cards import card_from_config
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Scalar
from lowmem.units import MIB

TOP = Path(__file__).resolve().parent.parent
MEASUREMENTS = TOP / "docs" / "measurements"
NO_GPU = {MEASUREMENTS / "2026-11-23-soak", MEASUREMENTS / "2026-11-26-two-replicas-cpu"}
MADE_UP_ROUTING = ("ernie-4.5-21b-a3b",)
"""Runs whose time says nothing: a router with a bias sends made-up weights' tokens to the same experts."""
TERMS = ("idle MiB", "peak MiB", "KV tokens", "ms a step", "ms a token")

TEXT = """# Accuracy of the plan

`scripts/accuracy_page.py` writes this page.
It plans every run that was measured on a GPU again, with today's code.
Nothing of a run but its model, card, arguments, version and load goes into the plan.
A run calibrates constants of `lowmem/data/calibration.yml`, or it tests them; the table says which.

## What was learned

- Memory needs no constant for a model, but four rules of the engine.
  Its profile run on one card holds a second embedding while Inductor tunes kernels.
  Routed experts share a workspace that stays.
  Parameters above 20 MiB take whole steps of 2 MiB.
  The runner's own buffers lie inside the engine's budget.
- A batch reads the distinct experts that it hits.
  Eight tokens read 40 % of 128 experts of which each takes 8.
  Made-up weights with a bias in the router send all tokens to the same experts.
  `gpt-oss-20b` therefore reads less at eight clients than a real checkpoint would.
- What a layer costs beside its bytes depends on the kernel: 0.02 ms at 16 bits, 0.05 ms at 4 bits.
- 16-bit layers reach the same share of the bandwidth on an A100, as a published run shows.
- Without captured graphs the host decides: 0.4 ms a layer on one host, 0.8 ms on another, for 8B and for 70B.
- A token takes longer than a step, since prompts of other clients pass.
  Their share is the least certain term: it depends on when requests arrive.
  On Hopper a prompt's attention is counted at the rate of Triton's kernel; FlashAttention is faster.
  This makes `long_context` on two H200 look slower than it was.
- The first requests of `gpt-oss-20b` waited for kernels to compile, which the plan leaves out.

"""


@dataclass(frozen=True)
class Row:
    """Run with the planned and the measured value of each term; what was not measured is absent."""

    model: str
    card: str
    vllm: str
    name: str
    calibrates: bool
    terms: dict[str, tuple[float, float]]

    @property
    def errors(self) -> dict[str, float]:
        """Return planned over measured, less one, by term."""
        return {term: planned / measured - 1 for term, (planned, measured) in self.terms.items()}

    @property
    def worst(self) -> float:
        """Return the largest error of any term."""
        return max(map(abs, self.errors.values()))


def _calibrates(name: str, vllm: str) -> bool:
    return f"{name}-{vllm}" in load_yaml("calibration.yml")["calibrated_on"]


def receipts() -> Iterator[Row]:
    """Yield the receipts of docs/measurements whose service answered on a GPU."""
    for folder in sorted({file.parent for file in MEASUREMENTS.rglob("*.json")} - NO_GPU):
        for run in load_receipts(folder):
            plan, load = run.plan, run.receipt.loads[0]
            terms = {
                "idle MiB": (plan.per_gpu["total"] / MIB, run.idle_mib),
                "peak MiB": (plan.peak_bytes / MIB, run.peak_mib),
            }
            if "gpu_memory_utilization" in run.knobs:
                terms["KV tokens"] = (float(plan.kv_tokens), run.receipt.engine_values["kv_tokens"][0])
            if run.name not in MADE_UP_ROUTING:
                terms["ms a step"] = (plan.latency_ms.terms["steady_step"], load.itl_ms.p50)
                terms["ms a token"] = (plan.latency_ms.decode_expected, load.tpot_ms.mean)
            yield Row(
                plan.model,
                f"{plan.device_count} x {load_device(plan.device).title}",
                plan.vllm_version,
                f"[{run.name}]({folder.relative_to(TOP / 'docs')})",
                _calibrates(run.name, plan.vllm_version),
                terms,
            )


def drafted() -> Iterator[Row]:
    """Yield the runs with n-gram drafts at a set acceptance; their steps are not in the records."""
    marlin: dict[str, Scalar] = {"linear_backend": "marlin"}
    streamed = {**marlin, "kv_cache_memory_bytes": 3_400_000_000}
    runs: list[tuple[str, str, dict[str, Scalar], float]] = [
        ("2026-11-27-2xh200/offload-ngram-2", "offload_speculative", streamed, 2),
        ("2026-11-27-2xh200/offload-ngram-4", "offload_speculative", streamed, 4),
        ("2026-11-27-2xh200/offload-ngram-6", "offload_speculative", streamed, 6),
        ("2026-12-01-1xh200/offload_speculative-1", "offload_speculative", streamed, 1),
        ("2026-12-01-1xh200/offload_speculative-4", "offload_speculative", streamed, 4),
    ]
    for drafts, accepted in ((3, 2.5), (7, 4.0)):
        knob = json.dumps({"method": "ngram", "num_speculative_tokens": drafts})
        name = f"2026-12-01-1xh200/low_latency-ngram-{drafts}-drafts"
        runs.append((name, "low_latency", {**marlin, "speculative_config": knob}, accepted))
    for name, profile, knobs, accepted in runs:
        record = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
        for load in record["loads"]:
            plan = make_plan(
                PlanRequest(
                    profile,
                    device="h200",
                    overrides=knobs,
                    clients=load["clients"],
                    input_tokens=load["input_tokens"],
                    output_tokens=load["output_tokens"],
                    accepted_tokens=accepted,
                    search=False,
                )
            )
            clients = f", {load['clients']} client{'s' * (load['clients'] > 1)}"
            yield Row(
                plan.model,
                f"{plan.device_count} x {load_device(plan.device).title}",
                plan.vllm_version,
                f"[{Path(name).name}](measurements/{Path(name).parent}){clients}",
                profile == "low_latency",
                {
                    "peak MiB": (plan.peak_bytes / MIB, record["memory_mib"][f"load:{load['clients']}"]),
                    "ms a token": (plan.latency_ms.decode_expected, load["tpot_ms"]["mean"]),
                },
            )


def reference() -> Iterator[Row]:
    """Yield the runs of tests/data that started."""
    for run in load_runs(TOP / "tests" / "data" / "gpu_runs.json"):
        plan, terms = run.plan, {}
        if run.idle_mib is not None:
            terms["idle MiB"] = (run.planned_idle_mib, run.idle_mib)
        if run.kv_tokens:
            terms["KV tokens"] = (float(plan.kv_tokens), float(run.kv_tokens))
        if run.tpot_ms:
            terms["ms a token"] = (plan.latency_ms.decode_expected, run.tpot_ms)
        if terms:
            card = f"{plan.device_count} x {load_device(plan.device).title}"
            yield Row(plan.model, card, run.vllm, run.name, _calibrates(run.name, run.vllm), terms)
    for model in load_models(TOP / "tests" / "data" / "gpu_runs_models.json"):
        plan = model.plan
        yield Row(
            plan.model,
            f"{plan.device_count} x {load_device(plan.device).title}",
            plan.vllm_version,
            f"{model.name}, {model.clients} client{'s' * (model.clients > 1)}",
            _calibrates(model.name, plan.vllm_version),
            {
                "idle MiB": (plan.per_gpu["total"] / MIB, model.idle_mib),
                "peak MiB": (plan.peak_bytes / MIB, model.peak_mib),
                "KV tokens": (float(plan.kv_tokens), float(model.kv_tokens)),
                "ms a step": (plan.latency_ms.terms["steady_step"], model.step_ms),
                "ms a token": (plan.latency_ms.decode_expected, model.tpot_ms),
            },
        )


def public() -> Iterator[Row]:
    """Yield what others measured and published, for models whose config.json is in the runs above."""
    data = TOP / "tests" / "data"
    configs = {
        run["model"]: run["config"]
        for run in json.loads((data / "gpu_runs_models.json").read_text(encoding="utf-8"))["runs"]
    }
    for run in json.loads((data / "public_runs.json").read_text(encoding="utf-8"))["runs"]:
        plan = make_plan(
            PlanRequest(
                str(TOP / "benchmarks" / "gpu" / "plain.yml"),
                card_from_config(configs[run["model"]], run["model"], "config.json"),
                run["device"],
                run["gpus"],
                {"tensor_parallel_size": run["gpus"], **knobs_of(shlex.join(run["args"]))},
                clients=run["clients"],
                input_tokens=run["in"],
                output_tokens=run["out"],
                vllm_version=run["vllm"],
                weights="stored",
                search=False,
            )
        )
        yield Row(
            plan.model,
            f"{plan.device_count} x {load_device(plan.device).title}",
            run["vllm"],
            f"[{run['name']}]({run['source'].split(': ')[0]})",
            False,
            {"ms a token": (plan.latency_ms.decode_expected, run["ms_per_token"])},
        )


def _worst_of(rows: list[Row], term: str) -> str:
    errors = [row.errors[term] for row in rows if term in row.errors]
    return f"{max(errors, key=abs):+.1%}" if errors else ""


def summary(rows: list[Row]) -> list[str]:
    """Render the worst error of each term by model, card and version, the worst first."""
    lines = [f"| model | card | vLLM | runs | {' | '.join(TERMS)} |", f"|---|---|---|{'--:|' * 6}"]

    def place(row: Row) -> tuple[str, str, str]:
        return row.model, row.card, row.vllm

    groups = [(key, list(found)) for key, found in groupby(sorted(rows, key=place), key=place)]
    for key, found in sorted(groups, key=lambda g: -max(row.worst for row in g[1])):
        cells = [*key, str(len(found)), *(_worst_of(found, term) for term in TERMS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: Row, term: str) -> str:
    if term not in row.terms:
        return ""
    planned, measured = row.terms[term]
    digits = 2 if term.startswith("ms") else 0
    return f"{planned:,.{digits}f} / {measured:,.{digits}f} ({row.errors[term]:+.1%})"


def details(rows: list[Row]) -> list[str]:
    """Render every run, the worst first."""
    lines = [
        f"| run | model | card | vLLM | use | {' | '.join(TERMS)} |",
        f"|---|---|---|---|---|{'--:|' * 5}",
    ]
    for row in sorted(rows, key=lambda row: -row.worst):
        use = "calibrates" if row.calibrates else "tests"
        cells = [row.name, row.model, row.card, row.vllm, use, *(_cell(row, term) for term in TERMS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(rows: list[Row], term: str) -> str:
    """Say the median and the largest error of a term over the runs that test."""
    errors = sorted(abs(row.errors[term]) for row in rows if term in row.errors and not row.calibrates)
    return f"{errors[len(errors) // 2]:.1%} in the median and {errors[-1]:.1%} at most"


def page() -> str:
    """Render the whole page."""
    rows = [*receipts(), *drafted(), *reference(), *public()]
    tests = [row for row in rows if not row.calibrates]
    return "\n".join(
        [
            TEXT,
            f"The page has {len(rows)} rows, and {len(tests)} of them test.",
            f"The error of their idle memory is {_spread(rows, 'idle MiB')}.",
            f"The error of their decode step is {_spread(rows, 'ms a step')}.",
            "",
            "## By model, card and version: the worst error of each term",
            "",
            *summary(rows),
            "",
            "## Every run: planned / measured (error)",
            "",
            *details(rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(page())
