"""LoRA adapters, replicas inside one server, and models without their encoders of pictures."""

import json
from pathlib import Path

import pytest

from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config, load_card
from lowmem.plan.lora import Lora, lora_of, places_bytes, worker_bytes
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest

FAMILIES = json.loads((Path(__file__).parents[1] / "data/checkpoints/families_vllm_0.32.json").read_text())[
    "models"
]


def planned(**overrides):
    request = {
        "model": "llama-3.1-8b",
        "device": "a100-80g",
        "count": 2,
        "weights": "stored",
        "search": False,
    }
    request |= overrides.pop("request", {})
    pool = {"tensor_parallel_size": 1}
    return make_plan(PlanRequest("low_latency", overrides={**pool, **overrides}, **request))


def card():
    return load_card("llama-3.1-8b")


# vLLM's create_lora_weights for Llama-3.1-8B, by hand. A layer has for each of rank's rows, at TP 1:
# q 4096+4096, k and v 4096+1024 each, o 4096+4096, gate and up 4096+14336 each, down 14336+4096: 81,920.
# At TP 2 the outputs of columns and the inputs of rows halve: 55,296. Embedding and logits: 128256+4096 each.
@pytest.mark.parametrize(
    ("lora", "tp", "rows"),
    [
        (Lora(1, 1, 16, False), 1, 32 * 81_920 + 2 * 132_352),
        (Lora(4, 8, 64, False), 1, 32 * 81_920 + 2 * 132_352),
        (Lora(1, 1, 16, False), 2, 32 * 55_296 + 2 * 132_352),
        # fully sharded: A of columns and B of rows halve too
        (Lora(1, 1, 16, True), 2, 32 * 40_960 + 2 * 132_352),
    ],
)
def test_places_are_those_of_vllms_layers(lora, tp, rows):
    assert places_bytes(card(), lora, tp) == lora.places * lora.rank * rows * 2


def test_a_worker_keeps_whole_adapters():
    assert worker_bytes(card(), Lora(4, 8, 64, False)) == 8 * 64 * (32 * 81_920 + 2 * 132_352) * 2
    assert worker_bytes(card(), None) == places_bytes(card(), None, 1) == 0


def test_adapters_are_weights_of_the_plan():
    with_them = planned(enable_lora=True, max_loras=4, max_lora_rank=64, max_cpu_loras=8)
    without = planned(max_loras=4)
    assert with_them.weight_terms["lora"] == 1_477_705_728
    assert with_them.per_gpu["weights"] - without.per_gpu["weights"] == 1_477_705_728
    assert with_them.host_ram["lora_adapters"] == 2_955_411_456
    assert "lora" not in without.weight_terms
    assert with_them.per_gpu["cuda_graphs"] > without.per_gpu["cuda_graphs"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_loras": 4, "max_cpu_loras": 2}, "max_cpu_loras=2 is less than max_loras=4; raise it"),
        ({"max_loras": 0}, "max_loras=0 is below its least value 1; raise it"),
    ],
)
def test_contradicting_places(knobs, message):
    with pytest.raises(BadInput, match=message):
        lora_of({"enable_lora": True, **knobs})


def test_replicas_need_their_cards_and_share_the_load():
    with pytest.raises(
        BadInput, match=r"data_parallel_size=2 replicas of 2 card\(s\) need 4, and the host has 2"
    ):
        planned(data_parallel_size=2, tensor_parallel_size=2)
    one, two = planned(), planned(data_parallel_size=2)
    assert two.max_requests == 2 * one.max_requests
    assert two.per_gpu["weights"] == one.per_gpu["weights"]
    assert two.latency_ms.decode_expected < one.latency_ms.decode_expected
    assert two.host_ram["workers"] == 2 * one.host_ram["workers"]
    assert any(
        reason.startswith("data_parallel_size=2: the memory is that of a card") for reason in two.reasons
    )


def test_replicas_over_hosts_are_refused():
    with pytest.raises(BadInput, match="data_parallel_size=2 over 2 hosts is not planned"):
        make_plan(PlanRequest("two_hosts", overrides={"data_parallel_size": 2}, search=False))


@pytest.mark.parametrize(
    ("knobs", "loaded"),
    [
        ({}, True),
        ({"limit_mm_per_prompt": {"image": 0}}, True),
        ({"limit_mm_per_prompt": {"image": 2, "video": 0}}, True),
        ({"limit_mm_per_prompt": {"image": 0, "video": {"count": 0}}}, False),
        ({"language_model_only": True}, False),
    ],
)
def test_an_encoder_of_pictures_is_loaded_where_it_is_used(knobs, loaded):
    config = FAMILIES["mistral-small-3.1"]["config"]
    pictures = card_from_config(config, "m", "a/m")
    both = {"request": {"model": pictures, "weights": "stored"}, "max_model_len": 8192}
    whole, found = planned(**both), planned(**both, **knobs)
    vision = whole.checkpoint.bytes_by_use["vision"]
    assert vision == 877_916_160
    assert whole.per_gpu["weights"] - found.per_gpu["weights"] == (0 if loaded else vision)


def test_a_limit_of_pictures_is_an_object():
    with pytest.raises(BadInput, match="limit_mm_per_prompt is not a JSON object; write it like"):
        planned(limit_mm_per_prompt="[1]")
