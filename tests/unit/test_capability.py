"""What vLLM 0.32.0 runs on a card, by its compute capability."""

import json

import pytest

from lowmem.data import load_yaml
from lowmem.inputs import devices
from lowmem.plan import capability
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest

GEMMA = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def plan_on(device, count=1, model="smollm2-135m", **knobs):
    overrides = {"dtype": "auto", "tensor_parallel_size": count, "max_model_len": 2048, **knobs}
    request = PlanRequest("low_mem", model, device, count, overrides, weights="stored", search=False)
    return make_plan(request)


def said_of(device, count=1, **more):
    plan = plan_on(device, count, **more)
    return plan.verdict, " | ".join((*plan.reasons, *plan.device_notes))


def test_a_card_without_machine_code_in_the_wheels_is_refused():
    verdict, said = said_of("v100-32g")
    assert verdict == "impossible"
    assert "no machine code for compute capability 7.0 of NVIDIA Tesla V100 32 GB SXM2" in said


@pytest.mark.parametrize(
    ("own", "runs"),
    [("7.0", False), ("7.5", True), ("8.7", True), ("8.9", True), ("9.0", True), ("10.3", True),
     ("11.0", False), ("12.1", True), ("13.0", False)],
)  # fmt: skip
def test_code_runs_on_the_same_major_number_and_no_lower_a_minor_one(own, runs):
    card = devices.load_device(f"custom:24GiB,936GB/s,71TFLOPS,sm_{own.replace('.', '')}")
    assert (card.capability, capability.has_machine_code(card)) == (own, runs)


def test_without_bfloat16_the_plan_takes_float16_and_says_so():
    plan = plan_on("t4")
    assert plan.checkpoint.dtype == "float16"
    assert "dtype: float16, since compute capability 7.5 has no bfloat16; the weights are cast" in (
        plan.device_notes
    )
    assert plan_on("rtx-3090").checkpoint.dtype == "bfloat16"
    verdict, said = said_of("t4", dtype="bfloat16")
    assert verdict == "impossible"
    assert "dtype=bfloat16 needs compute capability 8.0" in said


def test_below_8_0_attention_is_tritons():
    assert "attention: Triton attention, since FlashAttention needs 8.0 and the card has 7.5" in (
        plan_on("t4").device_notes
    )


def test_a_model_that_float16_breaks_needs_bfloat16_or_float32(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    model = str(tmp_path)
    verdict, said = said_of("t4", model=model)
    assert verdict == "impossible"
    assert "model type gemma2 needs bfloat16 or float32" in said
    assert "gemma2" not in said_of("t4", model=model, dtype="float32")[1]
    assert "gemma2" not in said_of("l4", model=model)[1]
    assert "dtype=float16: vLLM refuses model type gemma2" in said_of("l4", model=model, dtype="float16")[1]


@pytest.mark.parametrize(
    ("device", "cards", "works"),
    [
        ("a100-40g", 2, True), ("a100-40g", 4, True), ("a100-40g", 3, False), ("a100-40g-pcie", 2, True),
        ("a100-40g-pcie", 4, False), ("l40s", 2, True), ("l40s", 4, False), ("rtx-3090", 2, False),
        ("rtx-4090", 4, False), ("rtx-a6000", 2, True), ("h200", 8, True), ("b200", 16, True),
    ],
)  # fmt: skip
def test_custom_all_reduce_needs_peer_access_and_nvlink_beyond_two_cards(device, cards, works):
    assert capability.custom_all_reduce(devices.load_device(device), cards) is works


def test_the_plan_counts_nccl_where_vllms_own_all_reduce_does_not_run():
    pcie, nvlink = plan_on("a100-40g-pcie", 4, "llama-2-70b"), plan_on("a100-40g", 4, "llama-2-70b")
    own_mib = load_yaml("calibration.yml")["memory"]["custom_all_reduce_mib"]["value"]
    assert nvlink.per_gpu["nccl"] - pcie.per_gpu["nccl"] == own_mib * 2**20
    assert pcie.per_gpu["cuda_graphs"] > nvlink.per_gpu["cuda_graphs"]
    assert any(
        n.startswith("all-reduce: NCCL, since vLLM's own takes more than 2") for n in pcie.device_notes
    )


def test_slices_of_one_card_are_no_group():
    verdict, said = said_of("a100-3g.20gb", 2, model="llama-2-70b")
    assert verdict == "impossible"
    assert "tensor_parallel_size=2 on 2 MIG slices: no slice reaches another" in said
    assert plan_on("a100-3g.20gb").verdict != "impossible"


def test_the_context_is_said_to_be_an_estimate_where_no_card_was_measured():
    assert not plan_on("h200").device_notes
    assert "estimate: CUDA context and NCCL are those measured on 9.0, not on 8.0" in (
        plan_on("a100-40g").device_notes
    )


def test_the_plan_carries_the_figures_with_their_sources():
    plan = plan_on("custom:24GiB,936GB/s,71TFLOPS,sm_86")
    assert (plan.device, plan.device_figures.hbm_gb_per_s) == ("custom-24g-sm86", 936)
    assert plan.device_figures.source["hbm_gb_per_s"] == "given by the operator"
