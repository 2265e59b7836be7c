"""Memory that images take: the tower's largest batch and the cache of its outputs."""

import json
from pathlib import Path

import pytest

from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config
from lowmem.plan.compute import engine_of
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest, gather
from lowmem.plan.vision import VisionMemory, vision_memory
from lowmem.units import MIB

MODELS = json.loads(
    (Path(__file__).parents[1] / "data" / "checkpoints" / "models_vllm_0.32.json").read_text()
)["models"]
KNOBS = {
    "tensor_parallel_size": 1, "max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.9,
}  # fmt: skip


def request(config, **knobs):
    card = card_from_config(config, "m", "config.json")
    return PlanRequest("lab", card, "h200", 1, {**KNOBS, **knobs}, weights="stored", search=False)


def images(config, **knobs):
    inputs = gather(request(config, **knobs))
    return vision_memory(inputs.card, engine_of(inputs))


@pytest.mark.parametrize(
    ("name", "numbers", "patches", "outputs"),
    [
        # pixels of a patch, two states, the wider of attention and MLP; tokens of one image by their width
        ("Qwen3-VL-8B-Instruct", 3 * 2 * 16 * 16 + 2 * 1152 + 2 * 4304, 65536, 16384 * 4096 * 4),
        ("Qwen2-VL-7B-Instruct", 3 * 2 * 14 * 14 + 2 * 1280 + 2 * 5120, 65536, 16384 * 3584),
        # eight images of 4,096 patches and 256 tokens fill a budget of 2,048 tokens
        ("gemma-3-12b-it", 3 * 14 * 14 + 2 * 1152 + 2 * 4304, 8 * 4096, 8 * 256 * 3840),
        # three of 576
        ("llava-1.5-7b-hf", 3 * 14 * 14 + 2 * 1024 + 2 * 4096, 3 * 576, 3 * 576 * 4096),
    ],
)
def test_the_largest_batch_of_images(name, numbers, patches, outputs):
    assert images(MODELS[name]["config"]).activations == 2 * (patches * numbers + outputs)


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [("Qwen3-VL-8B-Instruct", 16384, 4 * 4096), ("gemma-3-12b-it", 2048, 3840)],
)
def test_the_cache_holds_the_budget_of_tokens(name, tokens, width):
    assert images(MODELS[name]["config"]).cache == 2 * tokens * width


def test_a_model_of_text_has_no_images():
    assert images(MODELS["Qwen3-4B"]["config"]) == VisionMemory()
    assert "images" not in make_plan(request(MODELS["Qwen3-4B"]["config"])).load_growth


def test_images_are_a_term_of_the_load():
    plan = make_plan(request(MODELS["Qwen3-VL-8B-Instruct"]["config"]))
    vision = images(MODELS["Qwen3-VL-8B-Instruct"]["config"])
    growth = plan.load_growth
    assert growth["images"] == vision.cache + vision.activations - growth["activations"]
    assert growth["images"] / MIB == pytest.approx(2298, abs=1)


def test_a_damaged_tower_is_one_line():
    config = json.loads(json.dumps(MODELS["gemma-3-12b-it"]["config"]))
    config["vision_config"]["patch_size"] = "x"
    with pytest.raises(BadInput) as refused:
        images(config)
    assert "patch_size" in str(refused.value)
    assert "\n" not in str(refused.value)
