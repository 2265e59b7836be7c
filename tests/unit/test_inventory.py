"""Bytes of checkpoints, compared with what vLLM 0.32.0's own classes register."""

import copy
import json
import random
from pathlib import Path

import pytest

from lowmem.checkpoint.inventory import inventory_of
from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
MODELS = json.loads((DATA / "models_vllm_0.32.json").read_text())["models"]
ORACLES = {name: entry for name, entry in MODELS.items() if "oracle" in entry}
QUANTIZED = json.loads((DATA / "quantized_llama_8b_vllm_0.32.json").read_text())
FAMILIES = json.loads((DATA / "families_vllm_0.32.json").read_text())["models"]
RECIPES = json.loads((DATA / "recipes_vllm_0.32.json").read_text())
LLAMA = MODELS["Meta-Llama-3.1-8B"]["config"]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("tp", "key"), [(1, "parameter_bytes"), (2, "tp2_bytes")])
def test_bytes_are_those_that_vllm_registers(name, tp, key):
    entry = ORACLES[name]
    if entry["oracle"][key] is None:
        pytest.skip("vLLM did not build it for two GPUs")
    found = inventory_of(entry["config"], tp, hf_quant_config=entry.get("hf_quant_config"))
    assert found.parameter_bytes == entry["oracle"][key]
    if tp == 1:
        assert found.buffer_bytes == entry["oracle"]["buffer_bytes"]


def test_the_oracles_are_seventy_nine():
    assert len(ORACLES) == 79


@pytest.mark.parametrize("name", QUANTIZED["variants"])
def test_a_quantized_variant_has_the_bytes_that_vllm_registers(name):
    variant = QUANTIZED["variants"][name]
    config = {**QUANTIZED["base_config"], "quantization_config": variant["quantization_config"]}
    if isinstance(variant["oracle"], str):
        with pytest.raises(BadInput, match=r"vLLM 0\.32\.0"):
            inventory_of(config)
        return
    found = inventory_of(config)
    assert (found.parameter_bytes, found.buffer_bytes) == tuple(variant["oracle"].values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_bytes_that_vllm_registers(name):
    config, oracle = FAMILIES[name]["config"], FAMILIES[name]["oracle"]
    found = inventory_of(config)
    assert (found.parameter_bytes, found.buffer_bytes) == (oracle["parameter_bytes"], oracle["buffer_bytes"])
    if "tp2_bytes" in oracle:
        assert inventory_of(config, 2).parameter_bytes == oracle["tp2_bytes"]


@pytest.mark.parametrize("name", RECIPES["variants"])
def test_a_recipe_stores_the_bytes_that_vllm_registers(name):
    variant = RECIPES["variants"][name]
    config = {**RECIPES["bases"][variant["base"]], "quantization_config": variant["quantization_config"]}
    found = inventory_of(config)
    assert (found.parameter_bytes, found.buffer_bytes) == tuple(variant["oracle"].values())


def test_a_removed_architecture_is_named_with_its_last_version():
    with pytest.raises(BadInput, match=r"refuses XverseForCausalLM: it was supported until 0\.23\.0"):
        inventory_of(MODELS["XVERSE-7B"]["config"])


def test_groups_say_what_a_layer_holds():
    found = inventory_of(LLAMA, tp=2)
    assert found.bytes_by_use == {
        "embedding": 525_336_576, "attention": 1_342_177_280, "mlp": 5_637_144_576, "norm": 532_480,
        "lm_head": 525_336_576,
    }  # fmt: skip
    assert {t.name: (t.shape, t.count) for t in found.tensors if t.use == "attention"} == {
        "model.layers.*.self_attn.qkv_proj.weight": ((3072, 4096), 32),
        "model.layers.*.self_attn.o_proj.weight": ((4096, 2048), 32),
    }


def test_a_token_reads_a_part_of_the_experts():
    found = inventory_of(MODELS["Qwen3-235B-A22B"]["config"])
    (experts,) = found.experts
    assert (experts.layers, experts.count, experts.per_token) == (94, 128, 8)
    assert experts.bytes == 454_192_791_552
    assert found.active_bytes == found.parameter_bytes - 454_192_791_552 * 120 // 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NovelForCausalLM"]}, "NovelForCausalLM is not among the"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "it must be a"),
        ({"hidden_size": -4096}, "whole number from 0"),
        ({"vocab_size": 1e300}, "whole number from 0"),
        ({"num_hidden_layers": 10**9}, "the limit is 2000"),
        ({"num_attention_heads": 0, "head_dim": None}, "cannot be computed"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "rope_scaling has -1"),
        ({"torch_dtype": "int7"}, "torch_dtype is 'int7'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "sym": True}}, "bits=3"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "bits=8"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "no quantization method 'aqlm'"),
        ({"quantization_config": [1]}, "is not an object"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "two whole numbers"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True,
                                     "dynamic": {"-:(": {}}}},
            "is no regular expression",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 96, "sym": True}},
            "does not divide",
        ),
    ],
)  # fmt: skip
def test_a_damaged_config_is_one_line(change, message):
    with pytest.raises(BadInput, match=message) as caught:
        inventory_of({**LLAMA, **change})
    assert "\n" not in str(caught.value)


def test_heads_that_gpus_do_not_divide_are_refused():
    with pytest.raises(BadInput, match="tensor_parallel_size 3 does not divide the 32 of heads"):
        inventory_of(LLAMA, tp=3)


def test_key_value_heads_are_repeated_on_more_gpus_than_heads():
    found = inventory_of(LLAMA, tp=16)
    (qkv,) = [t for t in found.tensors if t.name.endswith("qkv_proj.weight")]
    assert qkv.shape == (2 * 128 + 128 + 128, 4096)


def test_an_unknown_architecture_says_what_lies_on_disk():
    headers = {"a": {"dtype": "BF16", "shape": [10, 10]}, "b": {"dtype": "F8_E8M0", "shape": [100]}}
    with pytest.raises(BadInput, match="its tensors are 300 bytes on disk"):
        inventory_of({"architectures": ["NovelForCausalLM"]}, headers=headers)


def test_headers_say_which_modules_of_an_awq_checkpoint_are_quantized():
    config = {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    headers = {}
    for layer in range(32):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            headers[f"model.layers.{layer}.{name}.weight"] = {"dtype": "BF16", "shape": [1]}
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            headers[f"model.layers.{layer}.{name}.qweight"] = {"dtype": "I32", "shape": [1]}
    assert inventory_of(config, headers=headers).parameter_bytes == 7_714_906_112  # as awq-skip-attn


def test_a_hostile_pattern_takes_no_time():
    config = {
        **LLAMA,
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
            "dynamic": {"-:(([a-z.0-9_]+)+)+!": {}},
        },
    }  # fmt: skip
    assert inventory_of(config).parameter_bytes == 5_727_854_592  # as gptq


ODD = (
    None,
    -1,
    0,
    1,
    1.5,
    1e300,
    float("inf"),
    float("nan"),
    2**70,
    "",
    "x",
    "re:(",
    True,
    [],
    [1],
    {},
    {"a": 1},
)


def damaged(config, chance):
    """A copy of a config.json in which some fields are gone or hold what they never should."""
    result = copy.deepcopy(config)
    for _ in range(chance.choice((1, 1, 2, 4))):
        parts = [result, *(v for v in result.values() if isinstance(v, dict))]
        owner = chance.choice([part for part in parts if part])
        field = chance.choice(list(owner))
        if chance.random() < 0.2:
            del owner[field]
        else:
            owner[field] = copy.deepcopy(chance.choice(ODD))
    return result


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_config_of_any_family_is_one_line(seed):
    chance = random.Random(seed)
    configs = [entry["config"] for entry in (*MODELS.values(), *FAMILIES.values())]
    for variants, bases in ((QUANTIZED, {"": QUANTIZED["base_config"]}), (RECIPES, RECIPES["bases"])):
        for variant in variants["variants"].values():
            recipe = {"quantization_config": variant["quantization_config"]}
            configs.append({**bases[variant.get("base", "")], **recipe})
    for _ in range(40):
        config = damaged(chance.choice(configs), chance)
        try:
            card_from_config(config, "m", "config.json")
            inventory_of(config, chance.choice((1, 2, 7)))
        except BadInput as error:
            assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, some has no effect
