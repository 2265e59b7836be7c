"""Model cards: exact tensors, and one clear line for whatever is no card."""

import json
import struct

import pytest

from lowmem.errors import BadInput
from lowmem.inputs import model_cards
from lowmem.plan.weights import stored_bytes
from lowmem.schema import Quantization

# Parameter counts as the publishers give them (safetensors index or model page).
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "smollm2-135m": 134_515_008,
    "llama-3.3-70b-w4a16": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "qwen3-32b-awq": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-gptq": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gemma-3-27b-w4a16": 27_432_406_640,
    "mistral-small-24b": 23_572_403_200,
    "mistral-small-24b-w4a16": 23_572_403_200,
}
BESIDE = {"gpt-oss-20b": 6_828_288, "gemma-3-27b-w4a16": 335_088}
"""Biases of experts, attention and image encoder: their bytes are counted, and they are no weight group."""
COMPRESSED = {"num_bits": 4, "group_size": 32, "symmetric": False}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "torch_dtype": "float16",
}  # fmt: skip


def write_safetensors(path, tensors, cut=0):
    """A file with the given name -> (dtype, shape, bytes a tensor) and empty data."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * (at - cut))


def folder(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config) if isinstance(config, dict) else config)
    return tmp_path


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_builtin_parameters_are_the_published_ones(name, count):
    assert model_cards.load_card(name).parameters == count - BESIDE.get(name, 0)


def test_every_builtin_card_is_checked_above():
    assert set(model_cards.names()) == set(PARAMETERS)


@pytest.mark.parametrize(
    ("quantization", "gigabytes"),
    [
        ({"method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 36.61),
        ({"method": "compressed-tensors", "bits": 3, "group_size": 128, "zero_point": False}, 27.79),
        ({"method": "compressed-tensors", "bits": 2, "group_size": 128, "zero_point": False}, 19.23),
        ({"method": "compressed-tensors", "bits": 2, "group_size": 64, "zero_point": False}, 20.30),
    ],
)
def test_quantized_llama_2_70b_has_the_known_size(quantization, gigabytes):
    card = model_cards.quantized(model_cards.load_card("llama-2-70b"), Quantization(**quantization))
    assert stored_bytes(card) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_awq_smollm2_equals_the_sum_of_a_real_checkpoints_headers():
    # AutoAWQ 0.2.9, 4 bit, group 64, of SmolLM2-135M-Instruct: 113,924,736 bytes of tensors
    card = model_cards.quantized(
        model_cards.load_card("smollm2-135m"), Quantization(method="awq", bits=4, group_size=64)
    )
    assert stored_bytes(card) == 113_924_736


@pytest.mark.parametrize(
    "alias", ["Llama-2-70B", "meta-llama/Llama-2-70b-hf", "llama-3-70b", "LLAMA-3.3-70B", "SmolLM2-135M"]
)
def test_aliases_and_any_case(alias):
    assert model_cards.load_card(alias).parameters in PARAMETERS.values()


def test_config_alone_is_enough(tmp_path):
    card = model_cards.load_card(str(folder(tmp_path, LLAMA)))
    per_layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert card.parameters == 2 * per_layer + 64 + 2 * 100 * 64
    assert stored_bytes(card) == 2 * card.parameters


def test_headers_refine_what_is_quantized(tmp_path):
    config = {
        **LLAMA,
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32},
    }
    tensors = {
        "model.embed_tokens.weight": ("F16", [100, 64], 12800),
        "model.norm.weight": ("F16", [64], 128),
    }
    for layer in range(2):
        for module in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            tensors[f"model.layers.{layer}.{module}.qweight"] = ("I32", [64, 8], 2048)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = ("F16", [64, 128], 16384)
    write_safetensors(folder(tmp_path, config) / "model.safetensors", tensors)
    card = model_cards.load_card(str(tmp_path))
    assert {g.name for g in card.groups if g.quantized} == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.up_proj",
    }  # fmt: skip
    assert stored_bytes(card) == sum(size for _, _, size in tensors.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ({**LLAMA, "model_type": "novel"}, "model_type 'novel' is not among the"),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, "model_type None"),
        ({**LLAMA, "hidden_size": -1}, "hidden_size is -1"),
        ({**LLAMA, "num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({**LLAMA, "hidden_size": 65}, "hidden_size 65 is not a multiple"),
        ({**LLAMA, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({**LLAMA, "torch_dtype": "int8"}, "torch_dtype 'int8'"),
        ({**LLAMA, "quantization_config": {"quant_method": "aqlm"}}, "quantization method 'aqlm'"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 5}}, "bits=5, sym=True"),
        ({**LLAMA, "quantization_config": "awq"}, "not an object"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path, config, message):
    with pytest.raises(BadInput, match=message.replace("[", "\\[")) as e:
        model_cards.load_card(str(folder(tmp_path, config)))
    assert "\n" not in str(e.value)


def test_a_cut_download_is_seen(tmp_path):
    tensors = {"model.embed_tokens.weight": ("F16", [100, 64], 12800)}
    write_safetensors(folder(tmp_path, LLAMA) / "model.safetensors", tensors, cut=100)
    with pytest.raises(BadInput, match="the download is incomplete"):
        model_cards.load_card(str(tmp_path))


def test_a_file_that_is_no_safetensors_is_seen(tmp_path):
    (folder(tmp_path, LLAMA) / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(BadInput, match="no safetensors header"):
        model_cards.load_card(str(tmp_path))


def test_an_index_without_its_files_is_seen(tmp_path):
    write_safetensors(
        folder(tmp_path, LLAMA) / "model-00001.safetensors",
        {"model.embed_tokens.weight": ("F16", [100, 64], 12800)},
    )
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002.safetensors"}})
    )
    with pytest.raises(BadInput, match=r"1 tensors of model\.safetensors\.index\.json"):
        model_cards.load_card(str(tmp_path))


@pytest.mark.parametrize(
    ("quantization_config", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, ("awq", 4, 128, True)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, ("gptq", 8, -1, False)),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 64, "sym": True, "packing_format": "x"},
        ("auto-round", 2, 64, False)),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": COMPRESSED}},
            "ignore": ["lm_head"]},
            ("compressed-tensors", 4, 32, True),
        ),
    ],
)  # fmt: skip
def test_quantization_is_read_from_the_checkpoint(tmp_path, quantization_config, expected):
    q = model_cards.load_card(
        str(folder(tmp_path, {**LLAMA, "quantization_config": quantization_config}))
    ).quantization
    assert (q.method, q.bits, q.group_size, q.zero_point) == expected
