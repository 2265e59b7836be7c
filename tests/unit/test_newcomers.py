"""Questions of a newcomer and of an attacker: each has one true line for an answer."""

import json
import re

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.plan.capacity import further

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip

QWEN = {
    **LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip

BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24,
    "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 30522, "max_position_embeddings": 512,
    "type_vocab_size": 2, "torch_dtype": "float32", "hidden_act": "gelu",
}  # fmt: skip

DEEPSEEK = {
    **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    "intermediate_size": 18432, "max_position_embeddings": 163840, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    },
}  # fmt: skip

A100 = ("--device", "a100-40g")


@pytest.fixture
def lowmem(tmp_path):
    """Run a command on the checkpoint of a config.json; the first word is the command."""

    def run(config, command, *words):
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = [command, "--model", str(tmp_path), *map(str, words)]
        return CliRunner().invoke(app, asked, env={"COLUMNS": "80"})

    return run


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"quant_method": "hqq"}, "vLLM 0.32.0 has no quantization method 'hqq'; it takes auto-round, awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no quantization method 'bitsandbytes'"),
        ({"quant_method": "gguf"}, "vLLM 0.32.0 has no quantization method 'gguf'"),
        ({"quant_method": "fbgemm_fp8"}, "refuses quantization method 'fbgemm_fp8': it is deprecated"),
        ({"quant_method": "torchao"}, "its locked environment has no torchao"),
        ({"quant_method": "quark"}, "the export key should be included"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt currently only supports FP8"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits=5, sym=True"),
    ],
)  # fmt: skip
def test_a_recipe_that_the_engine_refuses_is_impossible_with_its_reason(lowmem, recipe, reason):
    """A plain Llama said `is not one of none, awq, …` and exit 1, even for methods that are planned."""
    done = lowmem({**LLAMA, "quantization_config": recipe}, "plan", *A100, "--json")
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert found["verdict"] == "impossible"
    assert reason in found["reasons"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accepted-tokens", 0), "lowmem: accepted_tokens=0 is not from 1 to 65; correct it"),
        (("--accepted-tokens", -1), "lowmem: accepted_tokens=-1 is not from 1 to 65; correct it"),
        (("--hosts", 0), "lowmem: hosts=0 is not from 1 to 64; give the number of hosts"),
        (("--hosts", -1), "lowmem: hosts=-1 is not from 1 to 64; give the number of hosts"),
        (
            ("--input-tokens", 131072),
            "lowmem: input_tokens=131072 and output_tokens=256 are together more than the 131072 positions",
        ),
    ],
)  # fmt: skip
def test_a_bad_goal_names_the_words_of_the_operator(lowmem, words, message):
    """A search took an acceptance of 0 (a division by zero) and of -1, and hosts below 1."""
    done = lowmem(LLAMA, "plan", *A100, *words)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output.startswith(message)


def test_a_model_of_few_positions_has_a_usual_load(lowmem):
    """An encoder of 512 positions was refused for a max_model_len that nobody had set."""
    done = lowmem(BERT, "plan", *A100, "--json")
    plan = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (plan["load"]["input_tokens"], plan["load"]["output_tokens"]) == (384, 128)
    assert lowmem(BERT, "plan", *A100, "--suggest").exit_code == 0
    assert lowmem(BERT, "plan", *A100, "--maximize", "requests").exit_code == 0
    counted = lowmem(BERT, "capacity", *A100, "--json")
    assert json.loads(counted.stdout)["contexts"] == [512]


@pytest.mark.parametrize("knob", ["max_num_seqs=4", "max_model_len=100"])
def test_capacity_refuses_a_knob_that_its_table_goes_through(lowmem, knob):
    """It was taken and had no effect."""
    done = lowmem(LLAMA, "capacity", *A100, "--set", knob)
    assert (done.exit_code, done.output) == (
        1,
        f"lowmem: --set {knob}: the table goes through its values; leave it out, or plan one with"
        " `lowmem plan`\n",
    )


def test_the_room_below_a_limit_ends_with_the_card(lowmem):
    """99999TiB of a card of 40 GiB had 104,856,533,885 MiB of room."""
    done = lowmem(LLAMA, "plan", *A100, "--memory-limit", "99999TiB", "--json")
    assert "below the limit of 40,335 MiB;" in json.loads(done.stdout)["reasons"][0]


@pytest.mark.parametrize(
    ("config", "device", "count", "load"),
    [
        (QWEN, "rtx-4090", 1, (16, 6000, 512, 30)),  # it named 8 clients, and 9 fit with larger steps
        (QWEN, "l4", 4, (200, 1500, 500, 40)),  # it named none, since the nearest plan was one of one card
    ],
)
def test_a_refused_goal_names_what_a_search_finds(lowmem, config, device, count, load):
    clients, prompt, answer, tpot = load
    asked = {"--count": count, "--input-tokens": prompt, "--output-tokens": answer, "--tpot-ms": tpot}
    words = ["--device", device, "--json", *(str(x) for pair in asked.items() for x in pair)]
    refused = json.loads(lowmem(config, "plan", *words, "--clients", clients).stdout)
    most = int(re.search(r"([0-9]+) client", refused["reasons"][-1])[1])
    assert refused["verdict"] == "slow"
    assert lowmem(config, "plan", *words, "--clients", most).exit_code == 0
    assert lowmem(config, "plan", *words, "--clients", most + 1).exit_code == 3


def test_further_asks_once_where_the_next_number_does_not():
    asked = []

    def does(number):
        asked.append(number)
        return number <= 37

    assert further(37, does, 1, 100) == 37
    assert asked == [38]
    assert further(5, does, 1, 100) == 37
    assert further(None, does, 1, 100) == 37
    assert further(None, does, 38, 100) is None
    assert further(100, does, 1, 100) == 100


def test_the_longest_context_with_weights_in_ram_is_searched(lowmem):
    """Where only an offload fits, the plan of the usual load was printed as the largest."""
    asked = ("--device", "h100", "--count", 8, "--maximize", "context", "--json")
    plan = json.loads(lowmem(DEEPSEEK, "plan", *asked).stdout)
    whole = plan["load"]["input_tokens"] + plan["load"]["output_tokens"]
    assert plan["weight_terms"]["offloaded"] > 0
    assert plan["reasons"][-1] == f"longest context: {whole:,} tokens a request at 8 clients"
    assert whole > 1280


QUARK = {
    "quant_method": "quark", "export": {"pack_method": "reorder", "kv_cache_group": []},
    "layer_quant_config": {}, "layer_type_quant_config": {}, "exclude": ["lm_head"],
    "global_quant_config": {
        "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
        "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
    },
}  # fmt: skip

W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True,
                              "symmetric": True},
    }},
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "device", "reason"),
    [
        (QUARK, "a100-80g", "8-bit quark weights need compute capability 8.9 and NVIDIA A100 80 GB SXM4 has"),
        (QUARK, "l40s", ""),
        (QUARK, "h100", ""),
        (W8A8, "a100-80g", ""),
        (W8A8, "h100", ""),
        (W8A8, "b200", "the int8 kernel needs compute capability below 10.0 and NVIDIA B200"),
        (W8A8, "rtx-pro-6000", "the int8 kernel needs compute capability below 10.0"),
    ],
)  # fmt: skip
def test_a_format_that_the_card_has_no_kernel_for_is_impossible(lowmem, recipe, device, reason):
    """vLLM raises for Quark FP8 below 8.9, and for int8 by int8 on Blackwell; both plans fitted."""
    done = lowmem({**LLAMA, "quantization_config": recipe}, "plan", "--device", device, "--json")
    found = json.loads(done.stdout)
    assert found["verdict"] == ("impossible" if reason else "fits")
    assert found["reasons"][0].startswith(reason)


CARD = "nvml_total_mib: 24576\nhbm_gb_per_s: 936\nfp16_tflops: 71\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: tpu\n" + CARD, "kind is 'tpu'; it must be cuda or cpu"),
        ("kind: [cuda]\n" + CARD, "kind is \"['cuda']\"; it must be cuda or cpu"),
        ("capability: 9\n" + CARD, "capability is '9'; write it with its minor number, such as 8.6"),
        ("capability: 86\n" + CARD, "capability is '86'; write it with its minor number, such as 8.6"),
        ("capability: ''\n" + CARD, "capability is missing; a device needs nvml_total_mib"),
        (
            "capability: 8.6\n" + CARD.replace("936", "0"),
            "hbm_gb_per_s: Input should be greater than 0, and is 0",
        ),
    ],
)
def test_a_damaged_device_file_is_one_line(lowmem, tmp_path, text, message):
    """A kind that is none was a KeyError, and a whole number `a valid string`."""
    (tmp_path / "card.yml").write_text(text)
    done = lowmem(LLAMA, "plan", "--device", tmp_path / "card.yml")
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output.startswith(f"lowmem: {tmp_path / 'card.yml'}: {message}")
