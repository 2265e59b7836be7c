"""The plan against runs of four other families on an H200 (docs/measurements/2026-12-01-1xh200-families).

None of them calibrates a constant.
"""

import json
from pathlib import Path

import pytest
from reference_runs import load_receipts

from lowmem.inputs.model_cards import card_from_config
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.units import GIB, MIB

TOP = Path(__file__).parents[2]
FOLDER = TOP / "docs/measurements/2026-12-01-1xh200-families"
RUNS = {run.name: run for run in load_receipts(FOLDER)}

# name: weights GiB, "Available KV cache memory" GiB, KV tokens, idle MiB, peak MiB as measured
MEMORY = {
    "smollm3": (5.76, 91.18, 1327936, 100195, 100411),
    "deepseek-v2-lite": (29.32, 67.66, 2335856, 100515, 100647),
    "qwen3-vl-8b": (16.49, 78.74, 573328, 98477, 98725),
    "ernie-4.5-21b-a3b": (40.74, 56.15, 1051408, 100389, 100569),
}
# name: milliseconds of a decode step at eight clients, and of a token
STEPS = {"smollm3": (3.12, 3.2), "deepseek-v2-lite": (6.42, 6.75), "qwen3-vl-8b": (5.5, 5.72)}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name):
    weights_gib, kv_gib, kv_tokens, idle_mib, peak_mib = MEMORY[name]
    run = RUNS[name]
    values = run.receipt.engine_values
    assert (round(values["weights"][0] / GIB, 2), round(values["kv_cache"][0] / GIB, 2)) == (
        weights_gib, kv_gib,
    )  # fmt: skip
    assert (values["kv_tokens"][0], round(run.idle_mib), round(run.peak_mib)) == (
        kv_tokens, idle_mib, peak_mib,
    )  # fmt: skip
    assert run.plan.per_gpu["weights"] / GIB == pytest.approx(weights_gib, abs=0.11)
    assert run.plan.kv_available_bytes / GIB == pytest.approx(kv_gib, abs=0.36)
    assert run.plan.kv_tokens == pytest.approx(kv_tokens, rel=0.005)
    assert run.plan.per_gpu["total"] / MIB == pytest.approx(idle_mib, rel=0.003)
    # a vision-language model is planned for pictures, and the load had none
    pictures = 0.03 if name == "qwen3-vl-8b" else 0
    assert run.plan.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.003 + pictures)


@pytest.mark.parametrize("name", STEPS)
def test_time_within_fifteen_percent(name):
    step_ms, token_ms = STEPS[name]
    run = RUNS[name]
    load = run.receipt.loads[0]
    assert (round(load.itl_ms.p50, 2), round(load.tpot_ms.mean, 2)) == (step_ms, token_ms)
    assert run.plan.latency_ms.terms["steady_step"] == pytest.approx(step_ms, rel=0.15)
    assert run.plan.latency_ms.decode_expected == pytest.approx(token_ms, rel=0.15)


def test_eight_bit_weights_with_an_eight_bit_cache():
    """Its receipt has no load: DeepGEMM compiled for longer than the start was given."""
    receipt = json.loads((FOLDER / "qwen3-8b-fp8-kv-fp8.json").read_text())
    assert receipt["engine_values"]["kv_tokens"] == [1274256.0]
    config = json.loads((FOLDER / "qwen3-8b-fp8-kv-fp8.config.json").read_text())
    plan = make_plan(
        PlanRequest(
            str(TOP / "benchmarks/gpu/family.yml"),
            card_from_config(config, "qwen3-8b-fp8", "config.json"),
            overrides={"kv_cache_dtype": "fp8"},
            weights="stored",
            search=False,
        )
    )
    assert plan.kv_tokens == pytest.approx(1274256, rel=0.005)
    assert plan.per_gpu["weights"] / GIB == pytest.approx(8.8, abs=0.06)
