"""The plan against eight runs of six other models on an H200 (tests/data/gpu_runs_models.json).

Four of them calibrated it (lowmem/data/calibration.yml), the others try it.
"""

import json
from pathlib import Path

import accuracy_page
import pytest
from reference_runs import load_models

from lowmem.data import load_yaml
from lowmem.inputs.model_cards import card_from_config
from lowmem.plan import steps
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.units import GIB, MIB

DATA = Path(__file__).parents[1] / "data"
RUNS = {(r.name, r.clients): r for r in load_models(DATA / "gpu_runs_models.json")}

# name: weights GiB, "Available KV cache memory" GiB, KV tokens, idle MiB, peak MiB as measured
MEMORY = {
    "llama-3.1-8b": (15.0, 53.53, 438528, 71110.8, 71449),
    "qwen3-30b-a3b": (56.88, 70.77, 772960, 131794.8, 131879),
    "qwen3-32b-w4": (18.59, 45.2, 185136, 66350.9, 66895),
    "mixtral-8x7b-awq": (23.01, 41.7, 341616, 67696.9, 67809),
    "gpt-oss-20b": (13.03, 50.65, 1104259, 66758.8, 67247),
    "gemma-3-27b-text": (50.74, 74.82, 139628, 129560.8, 130019),
    "llama-3.3-70b-w4-tp2": (18.98, 46.18, 302640, 68616.8, 68957),
    "llama-3.1-8b-eager": (15.0, 54.41, 445696, 71890.8, 72181),
}
# name: milliseconds of a decode step at eight clients and at one (the median gap between two tokens)
STEPS = {
    "llama-3.1-8b": (5.257, 4.896),
    "qwen3-30b-a3b": (9.327, 4.003),
    "qwen3-32b-w4": (12.762, 12.161),
    "mixtral-8x7b-awq": (10.644, 4.985),
    "gpt-oss-20b": (3.452, 3.044),
    "gemma-3-27b-text": (16.904, 15.878),
    "llama-3.3-70b-w4-tp2": (14.423, 13.932),
    "llama-3.1-8b-eager": (12.378, 13.532),
}


def test_half_of_the_runs_calibrate():
    used = {name.removesuffix("-0.32.0") for name in load_yaml("calibration.yml")["calibrated_on"]}
    assert used & set(MEMORY) == {"llama-3.1-8b", "qwen3-30b-a3b", "mixtral-8x7b-awq", "gpt-oss-20b"}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name):
    weights_gib, kv_gib, kv_tokens, idle_mib, peak_mib = MEMORY[name]
    run = RUNS[name, 8]
    assert (run.weights_gib, run.kv_gib, run.kv_tokens) == (weights_gib, kv_gib, kv_tokens)
    assert (round(run.idle_mib, 1), run.peak_mib) == (idle_mib, peak_mib)
    assert run.plan.per_gpu["weights"] / GIB == pytest.approx(weights_gib, abs=0.06)
    assert run.plan.kv_available_bytes / GIB == pytest.approx(kv_gib, abs=0.3)
    assert run.plan.kv_tokens == pytest.approx(kv_tokens, rel=0.02)
    assert run.plan.per_gpu["total"] / MIB == pytest.approx(idle_mib, rel=0.02)
    assert run.plan.peak_bytes / MIB == pytest.approx(peak_mib, rel=0.02)


@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_within_fifteen_percent(name):
    for clients, ms in zip((8, 1), STEPS[name], strict=True):
        run = RUNS[name, clients]
        assert run.step_ms == ms
        assert run.plan.latency_ms.terms["steady_step"] == pytest.approx(ms, rel=0.15)


def test_a_batch_reads_the_distinct_experts_that_it_hits():
    """Of 128 experts a token takes 8, and eight tokens 128 x (1 - (1 - 8/128)^8) = 51.6."""
    eight, one = (RUNS["qwen3-30b-a3b", n].plan.latency_ms.terms["hbm_weights"] for n in (8, 1))
    expert_ms = 57_982_058_496 / 4800e9 * 1e3
    assert eight - one == pytest.approx(expert_ms * (51.613 - 8) / 128, abs=0.001)


def test_what_others_measured_within_fifteen_percent():
    (row,) = accuracy_page.public()
    planned, measured = row.terms["ms a token"]
    assert measured == 13.33
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "layers", "kind"), [("Qwen3.5-35B-A3B", 30, "state"), ("DeepSeek-V3", 61, "latent")]
)
def test_layers_with_states_or_latent_vectors_take_more_beside_their_bytes(monkeypatch, name, layers, kind):
    known = json.loads((DATA / "checkpoints" / "models_vllm_0.32.json").read_text())["models"]
    card = card_from_config(known[name]["config"], name, "config.json")
    request = PlanRequest("lab", card, "h200", 1, weights="stored", search=False)
    given = steps.constant

    def free(section, field):
        return {"state": 0.0, "latent": 0.0} if field == "other_layer_ms" else given(section, field)

    with_, each = make_plan(request).latency_ms, given("latency", "other_layer_ms")[kind]
    monkeypatch.setattr(steps, "constant", free)
    without = make_plan(request).latency_ms
    assert with_.terms["steady_step"] - without.terms["steady_step"] == pytest.approx(layers * each, abs=1e-3)
