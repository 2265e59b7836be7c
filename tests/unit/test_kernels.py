"""Kernels that vLLM 0.32.0 takes, by format and compute capability, and what a token uses of a model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.data import load_yaml
from lowmem.inputs.devices import load_device
from lowmem.inputs.model_cards import card_from_config, load_card
from lowmem.plan.compute import engine_of
from lowmem.plan.planner import make_plan
from lowmem.plan.reads import active_parameters, expert_share
from lowmem.plan.request import PlanRequest, gather

DATA = Path(__file__).parents[1] / "data"
RUNS = {run["name"]: run["config"] for run in json.loads((DATA / "gpu_runs_models.json").read_text())["runs"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCK_FP8 = {**FP8, "weight_block_size": [128, 128]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}


def kernels(config, capability="9.0", **request):
    """Linear and expert kernel of a checkpoint on an H200 that has another compute capability."""
    device = load_device("h200").model_copy(update={"capability": capability})
    card = card_from_config(config, "m", "config.json")
    engine = engine_of(gather(PlanRequest("lab", card, device, 1, weights="stored", **request)))
    return engine.kernel, engine.expert_kernel


@pytest.mark.parametrize(
    ("name", "linear", "experts"),
    [
        ("llama-3.1-8b", "native16", "triton"),
        ("qwen3-30b-a3b", "native16", "triton"),
        ("qwen3-32b-w4", "machete", "triton"),
        ("mixtral-8x7b-awq", "machete", "humming"),
        ("gpt-oss-20b", "native16", "triton_mxfp4"),
        ("gemma-3-27b-text", "native16", "triton"),
    ],
)
def test_the_kernels_that_the_log_named(name, linear, experts):
    assert kernels(RUNS[name]) == (linear, experts)


@pytest.mark.parametrize(
    ("capability", "name", "linear", "experts"),
    [
        ("8.0", "mixtral-8x7b-awq", "marlin", "marlin"),
        ("12.0", "mixtral-8x7b-awq", "marlin", "marlin"),
        ("8.0", "gpt-oss-20b", "native16", "marlin"),
        ("10.0", "gpt-oss-20b", "native16", "triton_mxfp4"),
        ("12.0", "gpt-oss-20b", "native16", "marlin"),
    ],
)
def test_other_capabilities_take_other_kernels(capability, name, linear, experts):
    assert kernels(RUNS[name], capability) == (linear, experts)


@pytest.mark.parametrize(
    ("recipe", "capability", "linear"),
    [
        (FP8, "8.0", "marlin"), (FP8, "8.9", "fp8"), (FP8, "9.0", "fp8"),
        (BLOCK_FP8, "8.9", "marlin"), (BLOCK_FP8, "9.0", "fp8"),
        (NVFP4, "8.0", "marlin"), (NVFP4, "9.0", "humming"), (NVFP4, "10.0", "fp4"),
    ],
)  # fmt: skip
def test_eight_and_four_bit_floats(recipe, capability, linear):
    config = {**RUNS["llama-3.1-8b"], "quantization_config": recipe}
    assert kernels(config, capability)[0] == linear


def test_machete_takes_groups_of_64_and_128_only():
    config = json.loads(json.dumps(RUNS["qwen3-32b-w4"]))
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["group_size"] = 32
    assert kernels(config)[0] == "humming"
    weights["group_size"] = 64
    assert kernels(config)[0] == "machete"


def test_a_wanted_kernel_is_taken():
    assert kernels(RUNS["qwen3-32b-w4"], overrides={"linear_backend": "marlin"})[0] == "marlin"


def test_a_processor_has_a_kernel_of_its_own():
    engine = engine_of(gather(PlanRequest("demo_cpu")))
    assert (engine.kernel, engine.expert_kernel) == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 3.04), ("gpt-oss-20b", 3.61), ("mixtral-8x7b-awq", 12.75), ("llama-3.1-8b", 7.50)],
)
def test_parameters_that_a_token_uses(name, billions):
    """Published: 3.3, 3.61, 12.9 and 8.0 billion; all but the second count the embedding too."""
    card = card_from_config(RUNS[name], name, "config.json")
    assert active_parameters(card) / 1e9 == pytest.approx(billions, abs=0.01)


def test_distinct_experts():
    card = card_from_config(RUNS["qwen3-30b-a3b"], "m", "config.json")
    assert expert_share(card, 1) == pytest.approx(8 / 128)
    assert expert_share(card, 8) == pytest.approx(0.403281, abs=1e-6)
    assert expert_share(load_card("llama-2-70b"), 1) == 1.0


def test_every_kernel_has_its_figures():
    rules = load_yaml("kernels.yml")
    named = {
        section: {rule["kernel"] for found in rules[section].values() for rule in found}
        for section in ("linear", "experts")
    }
    assert named == {
        "linear": {"fp8", "int8", "fp4", "marlin", "humming"},
        "experts": {"fp8", "int8", "fp4", "marlin", "humming", "triton", "triton_mxfp4"},
    }
    figures = load_yaml("calibration.yml")
    linear = {*named["linear"], "machete", "native16", "cpu"}
    for table in ("hbm_efficiency", "flop_efficiency"):
        assert linear <= set(figures["latency"][table]["value"])
    experts = {*named["experts"], "cpu"}
    assert experts <= set(figures["latency"]["expert_hbm_efficiency"]["value"])
    assert experts <= set(figures["memory"]["expert_kernel_mib"]["value"])


@pytest.mark.parametrize("recipe", [FP8, BLOCK_FP8, NVFP4])
def test_a_checkpoint_of_floats_has_a_plan(recipe):
    config = {**RUNS["llama-3.1-8b"], "quantization_config": recipe}
    card = card_from_config(config, "m", "config.json")
    plan = make_plan(PlanRequest("lab", card, "h200", 1, weights="stored", search=False))
    assert plan.decode_step.linear_kernel == {"modelopt": "humming"}.get(recipe["quant_method"], "fp8")


@pytest.mark.parametrize("command", [("plan", "--profile", "low_mem"), ("explain", "low_mem")])
def test_the_text_says_what_a_step_reads_and_by_which_kernel(command):
    """18.05 GB is half of the 4-bit model less its embedding, and 1.51 GB the KV cache of 8 requests."""
    said = " ".join(CliRunner().invoke(app, command).stdout.split())
    assert "a token uses 68.71 of 68.98 billion parameters" in said
    assert "reads 18.05 GB of weights and 1.51 GB of KV cache a card (kernels: marlin)" in said
