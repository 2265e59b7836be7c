"""Quantization that the engine makes of 16-bit weights while it loads them (vLLM 0.32.0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.plan.search import changes
from lowmem.schema import ModelCard, Plan

MODELS = json.loads((Path(__file__).parents[1] / "data/checkpoints/models_vllm_0.32.json").read_text())[
    "models"
]
LLAMA, OLMOE = "Meta-Llama-3.1-8B", "OLMoE-1B-7B-0924"

# By hand. Llama: 6,979,321,856 weights in linear layers; the rest is 2,101,878,784 bytes.
# A scale has 4 bytes: 128 layers of one, 1,376,256 rows, or 425,984 blocks; 32 weights of mx share a byte.
# OLMoE: 6,442,450,944 weights in experts, 268,435,456 in attention; the rest is 416,550,912 bytes.
AFTER = {
    (LLAMA, "fp8_per_tensor"): 9_081_201_152,
    (LLAMA, "fp8"): 9_081_201_152,
    (LLAMA, "fp8_per_channel"): 9_086_705_664,
    (LLAMA, "fp8_per_block"): 9_082_904_576,
    (LLAMA, "mxfp8"): 9_299_304_448,
    (LLAMA, "mxfp4"): 5_809_643_520,
    (LLAMA, "int8_per_channel_weight_only"): 16_060_522_496,
    (LLAMA, "nvfp4_per_token"): 16_060_522_496,
    (OLMOE, "fp8_per_tensor"): 7_127_445_632,
    (OLMOE, "experts_int8"): 7_412_649_984,
}
BUFFERS = {LLAMA: 33_554_944, OLMOE: 1_048_832}
STORED = {LLAMA: 16_060_522_496, OLMOE: 13_838_323_712}


def card(name: str) -> ModelCard:
    return card_from_config(MODELS[name]["config"], name, name)


def plan(name: str, quantization: str, device: str = "h100", **more: Any) -> Plan:
    knobs = {"tensor_parallel_size": 1, "dtype": "bfloat16", "quantization": quantization}
    return make_plan(
        PlanRequest("low_mem", card(name), device, 1, knobs, weights="stored", search=False, **more)
    )


@pytest.mark.parametrize(("name", "quantization"), sorted(AFTER))
def test_weights_are_those_after_loading(name: str, quantization: str) -> None:
    made = plan(name, quantization)
    assert made.per_gpu["weights"] - BUFFERS[name] == AFTER[name, quantization]
    # what is registered before a weight is loaded, which `lowmem oracle` compares
    assert made.checkpoint is not None
    assert made.checkpoint.parameter_bytes == STORED[name]


@pytest.mark.parametrize(
    ("name", "module_bytes"), [(LLAMA, 2 * 4096 * 14336 * 2), (OLMOE, 64 * 3 * 1024 * 2048 * 2)]
)
def test_the_start_holds_the_largest_module_at_16_bits_too(name: str, module_bytes: int) -> None:
    made = plan(name, "fp8_per_tensor", memory_limit_bytes=10 * 2**30)
    rest = made.per_gpu["weights"] + made.before_start_bytes + module_bytes
    assert made.start_peak_bytes == max(rest, made.peak_bytes)
    assert rest > made.per_gpu["weights"] + made.before_start_bytes


def test_the_plan_says_in_words_who_quantizes() -> None:
    assert plan(LLAMA, "fp8").weights == "quantized by the engine while it loads: fp8_per_tensor"
    assert make_plan(PlanRequest("low_mem")).weights == "to be quantized by this deployment"
    stored = make_plan(PlanRequest("low_mem", card(LLAMA), weights="stored", search=False))
    assert stored.weights == "as stored"
    first = make_plan(PlanRequest("low_mem", card(LLAMA), weights="awq-4bit", search=False))
    assert (first.weights, first.quantization.method) == ("to be quantized by this deployment", "awq")


@pytest.mark.parametrize(
    ("name", "quantization", "device", "says"),
    [
        (OLMOE, "nvfp4_per_token", "h100", "requires a Blackwell (SM100) GPU and NVIDIA H100"),
        (OLMOE, "fp8_per_channel", "a100-80g", "FP8 PTPC online MoE quant is not supported with the Marlin"),
        (OLMOE, "mxfp4", "h100", "quantization=mxfp4 of experts is not counted"),
        (LLAMA, "fp8", "cpu", "quantization=fp8_per_tensor is not planned on a CPU"),
    ],
)
def test_what_the_engine_cannot_make_is_impossible(
    name: str, quantization: str, device: str, says: str
) -> None:
    made = plan(name, quantization, device)
    assert made.verdict == "impossible"
    assert says in " ".join(made.reasons)


def test_another_version_is_not_planned() -> None:
    made = plan(LLAMA, "fp8_per_tensor", vllm_version="0.30.0")
    assert "quantization=fp8_per_tensor is planned as vLLM 0.32 does it; use 0.32.0 or later" in made.reasons


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao", "gguf", "FP8", "online"])
def test_an_unknown_method_is_one_line_with_those_that_there_are(name: str) -> None:
    with pytest.raises(
        BadInput, match=rf"^quantization='{name}' is not a method .*: fp8_per_tensor, fp8_per_block"
    ):
        plan(LLAMA, name)


def test_float32_has_no_online_quantization() -> None:
    with pytest.raises(BadInput, match=r"^dtype=float32 is not supported for quantization method mxfp8"):
        make_plan(PlanRequest("low_mem", card(LLAMA), overrides={"dtype": "float32", "quantization": "mxfp8"},
                              weights="stored"))  # fmt: skip


def test_a_quantized_checkpoint_keeps_its_own_method() -> None:
    with pytest.raises(
        BadInput, match=r"^quantization=fp8_per_tensor does not match the checkpoint's own method,"
    ):
        make_plan(PlanRequest("low_mem", card(LLAMA), overrides={"quantization": "fp8_per_tensor"},
                              weights="awq-4bit"))  # fmt: skip


def test_a_removed_architecture_is_impossible_like_any_other_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Qwen-7B"]["config"]))
    says = "vLLM 0.32.0 refuses QWenLMHeadModel: it was supported until 0.23.0, and is not supported anymore"
    told = CliRunner().invoke(app, ["plan", "--model", str(tmp_path)])
    assert (told.exit_code, told.stderr) == (2, "")
    assert told.stdout.startswith(f"impossible\n  {says}")
    told = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--json"])
    assert told.exit_code == 2
    answer = json.loads(told.stdout)
    assert answer["verdict"] == "impossible"
    assert answer["reasons"][0].startswith(says)


def test_nearest_names_everything_that_it_changes() -> None:
    old = make_plan(PlanRequest("low_mem", search=False))
    new = make_plan(
        PlanRequest("low_mem", "llama-2-70b", count=4, weights="stored", memory_limit_bytes=60 * 2**30,
                    overrides={"tensor_parallel_size": 4, "enforce_eager": True}, search=False)
    )  # fmt: skip
    assert changes(old, new) == [
        "cards 2 -> 4",
        "weights compressed-tensors 4-bit (to be quantized by this deployment) -> 16-bit (as stored)",
        "memory limit 20,480 MiB -> 61,440 MiB",
        "--tensor-parallel-size 2 -> 4",
        "--enforce-eager not set -> on",
    ]
    assert changes(old, old) == ["nothing"]
