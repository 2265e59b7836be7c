"""Verdicts, arguments and reasons of every profile; what each knob does to a plan."""

import json
import os
from pathlib import Path

import pytest

from lowmem.errors import BadInput
from lowmem.inputs import model_cards, profiles
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Plan
from lowmem.units import GIB, MIB

UVA = {"offload_group_size": 0, "offload_num_in_group": 1}
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
VERDICT = {
    "low_mem": "fits",
    "long_context": "fits",
    "extreme": "fits",
    "offload": "slow",
    "offload_speculative": "slow",
    "low_latency": "fits",
    "demo_cpu": "fits",
    "lab": "fits",
    "article": "impossible",
    "two_hosts": "fits",
    "llama_3_3_70b": "fits",
    "qwen3_32b_40g": "fits",
    "qwen3_32b_24g": "fits",
    "qwen3_30b_a3b_40g": "fits",
    "qwen3_30b_a3b_24g": "fits",
    "gpt_oss_20b_40g": "fits",
    "gpt_oss_20b_24g": "fits",
    "gemma_3_27b_40g": "fits",
    "gemma_3_27b_24g": "fits",
    "mistral_small_24b_40g": "fits",
    "mistral_small_24b_24g": "fits",
}


def test_the_profiles():
    assert profiles.names() == sorted(VERDICT)


@pytest.mark.parametrize(("name", "verdict"), VERDICT.items())
def test_verdict_of_each_profile(name, verdict):
    plan = make_plan(PlanRequest(name))
    assert plan.verdict == verdict, plan.reasons


@pytest.mark.parametrize("name", VERDICT)
def test_golden_arguments(name):
    """The argument vector, environment and terms as they were last reviewed; LOWMEM_UPDATE_GOLDEN=1 writes
    them anew.
    """
    plan = make_plan(
        PlanRequest(
            name,
            deploy={
                "model_path": "/srv/models/m",
                "served_model_name": "m",
                "host": "127.0.0.1",
                "port": 8000,
            },
        )
    )
    text = (
        json.dumps(
            {
                "argv": plan.argv,
                "environment": {v.name: v.value for v in plan.environment},
                "per_gpu": plan.per_gpu,
            },
            indent=1,
        )
        + "\n"
    )
    file = GOLDEN / f"{name}.json"
    if os.environ.get("LOWMEM_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", VERDICT)
def test_a_plan_reads_back_as_it_was(name):
    plan = make_plan(PlanRequest(name))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("name", VERDICT)
def test_the_documented_interface(name):
    data = json.loads(make_plan(PlanRequest(name)).model_dump_json())
    for key in (
        "verdict",
        "reasons",
        "limit_bytes",
        "per_gpu",
        "host_ram_bytes",
        "kv_tokens",
        "kv_cache",
        "max_requests",
        "latency_ms",
        "argv",
        "nearest",
    ):
        assert key in data
    assert {"decode_floor", "decode_expected", "prefill_expected"} <= set(data["latency_ms"])
    assert sum(v for k, v in data["per_gpu"].items() if k != "total") == data["per_gpu"]["total"]


@pytest.mark.parametrize("name", [n for n, v in VERDICT.items() if v != "impossible"])
def test_a_plan_that_deploys_stays_under_its_limit_and_holds_its_load(name):
    plan = make_plan(PlanRequest(name))
    assert plan.per_gpu["total"] <= plan.peak_bytes <= plan.limit_bytes
    assert plan.max_requests >= plan.load.clients


@pytest.mark.parametrize("name", VERDICT)
def test_every_argument_has_its_reason(name):
    plan = make_plan(PlanRequest(name))
    assert all(a.why for a in plan.arguments)
    assert all(v.why for v in plan.environment)


def test_llama_3_3_70b_fits_20_gib_a_card_only_with_a_quantized_kv_cache():
    plan = make_plan(PlanRequest("llama_3_3_70b"))
    assert (plan.max_requests, plan.limit_bytes // GIB) == (4, 20)
    whole = make_plan(PlanRequest("llama_3_3_70b", overrides={"kv_cache_dtype": "auto"}))
    assert whole.verdict == "slow"
    assert any(r.startswith("kv_cache: the pool holds 1 requests of 1280 tokens") for r in whole.reasons)


@pytest.mark.parametrize("name", [n for n in VERDICT if n[-4:] in ("_40g", "_24g", "_70b")])
def test_profiles_that_nothing_measured_say_so(name):
    profile = profiles.load_profile(name)
    assert profile.summary.endswith("planned, not measured")
    assert "Checkpoint as published: " in (profiles.folder() / f"{name}.yml").read_text()
    stored = model_cards.load_card(profile.model).quantization
    assert profile.quantization.method == stored.method
    assert profile.quantization.bits == stored.bits


def test_a_fitting_plan_has_no_nearest():
    assert make_plan(PlanRequest("low_mem")).nearest is None


def test_the_article_is_sent_to_a_profile_that_fits():
    plan = make_plan(PlanRequest("article"))
    assert plan.nearest == "low_mem"
    assert plan.reasons[0].startswith("unrecognized arguments: --max-batch-size")
    assert any(
        "No available memory for the cache blocks: Available KV cache memory: -1" in r for r in plan.reasons
    )


def test_slow_names_term_and_excess():
    plan = make_plan(PlanRequest("offload"))
    assert plan.latency_ms.terms["link_offload"] == pytest.approx(
        plan.weight_terms["offloaded"] / 25e9 * 1e3, rel=1e-3
    )
    assert "largest term link_offload" in plan.reasons[0]
    assert "over the limit of 200" in plan.reasons[0]


def test_a_given_utilization_replaces_the_profiles_pool():
    plan = make_plan(PlanRequest("low_mem", overrides={"gpu_memory_utilization": 0.5}))
    assert "--kv-cache-memory-bytes" not in plan.argv
    assert plan.argv[plan.argv.index("--gpu-memory-utilization") + 1] == "0.5"


def test_a_given_pool_is_used_in_whole_blocks():
    plan = make_plan(PlanRequest("low_mem", overrides={"kv_cache_memory_bytes": "1GiB"}))
    assert plan.kv_tokens == 1024**3 // (160 * 1024 * 16) * 16
    assert plan.per_gpu["kv_cache"] == plan.kv_tokens * 160 * 1024
    assert plan.argv[plan.argv.index("--kv-cache-memory-bytes") + 1] == str(1024**3)


def test_the_start_up_check_asks_for_no_more_than_the_plan_needs():
    plan = make_plan(PlanRequest("low_mem"))
    share = float(plan.argv[plan.argv.index("--gpu-memory-utilization") + 1])
    assert share * 40335 * MIB <= plan.peak_bytes
    assert share < 0.55


def test_a_cpu_plan_has_no_gpu_arguments():
    assert "--gpu-memory-utilization" not in make_plan(PlanRequest("demo_cpu")).argv


@pytest.mark.parametrize(
    ("dtype", "bytes_per_token"),
    [
        ("auto", 320 * 1024),
        ("fp8", 160 * 1024),
        ("int8_per_token_head", 80 * 8 * (2 * 128 + 8)),
        ("int4_per_token_head", 80 * 8 * (128 + 8)),
        ("turboquant_4bit_nc", 8 * (4 * 512 + 76 * (66 + 68))),
    ],
)
def test_kv_bytes_per_token(dtype, bytes_per_token):
    plan = make_plan(
        PlanRequest(
            "low_latency",
            device="h200",
            overrides={"kv_cache_dtype": dtype, "kv_cache_memory_bytes": 4 * GIB},
        )
    )
    assert plan.per_gpu["kv_cache"] == plan.kv_tokens * bytes_per_token


def test_uva_offload_takes_whole_parameters_in_order():
    # the engine logged "Total CPU offloaded parameters: 19.04" for 19 asked
    plan = make_plan(PlanRequest("offload", overrides=UVA | {"cpu_offload_gb": 19}))
    assert plan.weight_terms["offloaded"] / GIB == pytest.approx(19.04, abs=0.005)


def test_prefetch_offload_takes_the_last_layers_of_each_group():
    knobs = {
        "cpu_offload_gb": 0,
        "offload_group_size": 2,
        "offload_num_in_group": 1,
        "offload_prefetch_step": 1,
    }
    plan = make_plan(PlanRequest("offload", overrides=knobs))
    layer = plan.weight_terms["offloaded"] // 40
    assert plan.weight_terms["offloaded"] == 40 * layer
    assert plan.per_gpu["offload_buffers"] == layer


def test_machete_keeps_zero_points_in_16_bits_and_marlin_does_not():
    hopper = make_plan(PlanRequest("low_latency", device="h200"))
    marlin = make_plan(
        PlanRequest(
            "low_latency", device="h200", environment={"VLLM_DISABLED_KERNELS": "MacheteLinearKernel"}
        )
    )
    zeros = 68_451_041_280 // 128
    assert hopper.weight_terms["repacking"] == zeros * 2 - zeros // 2
    assert marlin.weight_terms["repacking"] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, ("needs compute capability 8.9", "has 8.0")),
        ({"swap_space": 20}, ("removed in vLLM 0.18", "--kv-offloading-size")),
        ({"max_batch_size": 2}, ("no vLLM version has it", "--max-num-seqs")),
        ({"kv_cache_memory_bytes": 10 * MIB}, ("short by", "raise kv_cache_memory_bytes")),
        ({"gpu_memory_utilization": 1.0}, ("free memory at start",)),
        (
            {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.5},
            ("No available memory for the cache blocks",),
        ),
    ],
)
def test_what_cannot_run_is_impossible_and_says_why(overrides, words):
    plan = make_plan(PlanRequest("low_mem", overrides=overrides))
    assert plan.verdict == "impossible"
    assert all(any(w in r for r in plan.reasons) for w in words), plan.reasons


def test_weights_larger_than_the_card_are_out_of_memory():
    plan = make_plan(PlanRequest("low_latency", device="l4"))
    assert plan.verdict == "impossible"
    assert plan.reasons[0].startswith("weights: CUDA out of memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"overrides": {"tensor_parallel_size": 3}, "count": 3},
            "tensor_parallel_size=3 does not divide the 64 attention heads",
        ),
        ({"overrides": {"tensor_parallel_size": 4}}, "tensor_parallel_size=4 is more than the 2 card"),
        ({"count": 0}, "count=0"),
        ({"count": -2}, "count=-2"),
        ({"count": 65}, "count=65"),
        (
            {"overrides": {"max_num_batched_tokens": 4}},
            "max_num_batched_tokens=4 is less than max_num_seqs=8",
        ),
        ({"overrides": {"max_num_seqs": 0}}, "max_num_seqs=0 is below"),
        ({"overrides": {"max_num_seqs": "8.5"}}, "max_num_seqs='8.5' is not a whole number"),
        ({"overrides": {"gpu_memory_utilization": 0}}, "gpu_memory_utilization=0 is below"),
        ({"overrides": {"gpu_memory_utilization": 1.01}}, "above its greatest value"),
        ({"overrides": {"gpu_memory_utilization": "inf"}}, "gpu_memory_utilization=inf"),
        ({"overrides": {"cpu_offload_gb": -1}}, "cpu_offload_gb=-1 is below"),
        ({"overrides": {"cpu_offload_gb": 5, "offload_group_size": 4}}, "two offload back ends"),
        (
            {"overrides": {"offload_group_size": 4, "offload_num_in_group": 5}},
            "offload_num_in_group=5 is more than",
        ),
        ({"overrides": {"offload_group_size": 4, "offload_prefetch_step": 0}}, "offload_prefetch_step=0"),
        ({"overrides": {"offload_backend": "prefetch"}}, "offload_backend=prefetch needs offload_group_size"),
        ({"overrides": {"max_model_len": 8192}}, "max_model_len=8192 is more than the 4096 positions"),
        (
            {"overrides": {"max_model_len": 1000}, "input_tokens": 900},
            "input_tokens=900 + output_tokens=256 is more than max_model_len=1000",
        ),
        ({"overrides": {"kv_cache_dtype": "int3"}}, "kv_cache_dtype='int3' is not one of"),
        ({"overrides": {"enforce_eager": "maybe"}}, "enforce_eager='maybe' is not true or false"),
        ({"overrides": {"block_size": 20}}, "block_size=20 is not a multiple of 16"),
        ({"overrides": {"nonsense": 1}}, "knob 'nonsense' is unknown"),
        ({"overrides": {"enable_chunked_prefill": False}}, "is smaller than max_model_len=2048"),
        ({"device": "tpu"}, "device 'tpu' is not in the table"),
        ({"model": "gpt-5"}, "model 'gpt-5' is no built-in card"),
        ({"clients": 0}, "clients=0"),
        ({"input_tokens": -5}, "input_tokens=-5"),
        ({"vllm_version": "0.9.1"}, "older than 0.17.0"),
        ({"vllm_version": "latest"}, "vllm_version 'latest' is not a version"),
        ({"memory_limit_bytes": 20}, "less than 1 MiB"),
        ({"device": "cpu", "count": 2}, "a CPU is one device"),
    ],
)
def test_bad_input_is_one_line_that_names_variable_and_value(arguments, message):
    with pytest.raises(BadInput) as e:
        make_plan(PlanRequest("low_mem", **arguments))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_mistyped_profile_key_is_an_error(tmp_path):
    text = (profiles.folder() / "low_mem.yml").read_text().replace("device_count:", "device_cuont:")
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(BadInput, match="device_cuont"):
        make_plan(PlanRequest(str(tmp_path / "mine.yml")))


def test_a_quantization_knob_names_the_format_of_the_checkpoint_to_come():
    plan = make_plan(PlanRequest("low_mem", overrides={"quantization": "awq"}))
    assert plan.quantization.method == "awq"
    assert plan.verdict == "fits"
    assert plan.start_peak_bytes > plan.limit_bytes
    assert any(r.startswith("start: while loading") for r in plan.reasons)
    assert make_plan(PlanRequest("low_mem")).start_peak_bytes <= plan.limit_bytes


def test_loading_awq_needs_eight_and_a_half_bytes_a_weight_of_the_largest_linear():
    plan = make_plan(
        PlanRequest(
            "low_mem", device="rtx-4090", overrides={"quantization": "awq"}, memory_limit_bytes=24 * GIB
        )
    )
    largest = 8192 * 2 * 28672 // 2
    assert plan.verdict == "fits"
    small = make_plan(
        PlanRequest("low_mem", device="a10", overrides={"quantization": "awq"}, memory_limit_bytes=22 * GIB)
    )
    need = plan.per_gpu["weights"] + plan.before_start_bytes + round(8.5 * largest)
    assert (need > 22589 * MIB) == (small.verdict == "impossible")


def test_max_model_len_auto_is_what_the_pool_holds():
    plan = make_plan(PlanRequest("low_latency", overrides={"max_model_len": "auto"}))
    assert plan.verdict in ("fits", "slow")
    assert plan.argv[plan.argv.index("--max-model-len") + 1] == "auto"


def test_a_shorter_max_model_len_shortens_the_profiles_own_load():
    plan = make_plan(PlanRequest("low_mem", overrides={"max_model_len": 1024}))
    assert (plan.load.input_tokens, plan.load.output_tokens) == (768, 256)
    said = "the load follows max_model_len: 768 + 256 tokens a request (profile low_mem: 1024 + 256)"
    assert said in plan.reasons
    assert plan.verdict == "fits"


def test_a_pool_that_ends_below_the_limit_says_why():
    plan = make_plan(PlanRequest("low_mem", memory_limit_bytes=36 * GIB))
    assert plan.reasons[1].startswith("the pool ends at max_num_seqs=8 requests of max_model_len=2048 tokens")
    assert len(make_plan(PlanRequest("low_mem")).reasons) == 1


@pytest.mark.parametrize(
    ("profile", "model"),
    [
        ("low_mem", "llama-2-70b-compressed-tensors"),
        ("qwen3_32b_40g", "Qwen/Qwen3-32B-AWQ"),
        ("gpt_oss_20b_24g", "openai/gpt-oss-20b"),
    ],
)
def test_the_command_names_the_published_checkpoint_or_the_one_to_be_made(profile, model):
    assert make_plan(PlanRequest(profile)).argv[0] == model


def test_a_two_bit_awq_does_not_exist():
    assert any(
        "2-bit AWQ has no loader" in r
        for r in make_plan(PlanRequest("extreme", overrides={"quantization": "awq"})).reasons
    )


@pytest.mark.parametrize(
    ("model", "device", "count", "knobs", "group_size"),
    [
        ("llama-2-70b", "a100-40g", 2, {}, 128),
        ("smollm2-135m", "a100-40g", 1, {}, 64),  # 576 inputs
        (
            "qwen2.5-72b",
            "a100-80g",
            2,
            {"tensor_parallel_size": 2},
            64,
        ),  # 29,568 inputs: 14,784 a card are 115.5 groups of 128
        ("qwen2.5-72b", "a100-80g", 1, {}, 128),
    ],
)
def test_the_group_size_fits_the_model_and_its_split(
    model: str, device: str, count: int, knobs: dict[str, int], group_size: int
) -> None:
    plan = make_plan(PlanRequest("low_latency", model=model, device=device, count=count, overrides=knobs))
    assert plan.quantization.group_size == group_size


MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "torch_dtype": "bfloat16",
    "max_position_embeddings": 32768, "sliding_window": 4096,
}  # fmt: skip
LONG = {"tensor_parallel_size": 1, "max_model_len": 32768, "max_num_batched_tokens": 512}


def plan_of_config(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return make_plan(PlanRequest("low_latency", model=str(tmp_path), overrides=LONG, search=False))


def test_a_sliding_window_holds_642_mib_and_not_4_gib(tmp_path):
    plan = plan_of_config(tmp_path, MISTRAL)
    assert plan.kv_cache.bytes_per_request == 642 * MIB
    assert [g.model_dump() for g in plan.kv_cache.groups] == [
        {
            "kind": "sliding",
            "layers": 32,
            "block_tokens": 16,
            "page_bytes": 2 * MIB,
            "blocks_per_request": 321,
            "groups": 1,
        }
    ]
    whole = plan_of_config(tmp_path, {**MISTRAL, "sliding_window": None})
    assert whole.kv_cache.bytes_per_request == 4 * GIB


def test_the_kv_type_of_the_checkpoint_counts(tmp_path):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    weights = {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "kv_cache_scheme": scheme,
    }
    plan = plan_of_config(tmp_path, {**MISTRAL, "quantization_config": quantization})
    assert plan.kv_cache.bytes_per_request == 321 * MIB
    assert plan.reasons[0].startswith("kv_cache_dtype=fp8 needs compute capability 8.9")


def test_a_request_and_block_0_must_fit():
    one = {"max_model_len": 2048, "max_num_seqs": 1, "kv_cache_memory_bytes": 128 * 160 * 1024 * 16}
    load = {"clients": 1, "input_tokens": 100, "output_tokens": 100, "search": False}
    short = make_plan(PlanRequest("low_mem", overrides=one, **load))
    assert "kv_cache: to serve one request" in short.reasons[0]
    assert "short by 2621440 bytes" in short.reasons[0]
    more = {**one, "kv_cache_memory_bytes": 129 * 160 * 1024 * 16}
    assert make_plan(PlanRequest("low_mem", overrides=more, **load)).verdict != "impossible"
