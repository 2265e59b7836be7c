"""The table of vLLM's options: its classes, types, choices and messages."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import options
from lowmem.plan.knobs import checked
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest

ROOT = Path(__file__).parents[2]


def test_each_option_stands_in_one_class():
    table = load_yaml("options.yml")
    groups = [table["modelled"], *(g["options"] for c in ("neutral", "unmodelled") for g in table[c])]
    names = [*" ".join(groups).split(), *table["refused"]]
    assert sorted(names) == sorted(options.options())
    assert len(names) == 315


def test_no_removed_option_exists_and_each_replacement_does():
    assert not options.removed().keys() & options.options().keys()
    for name, gone in options.removed().items():
        first = gone.use.split()[0].rstrip(":,;").split(".")[0].replace("-", "_").removeprefix("no_")
        assert first in options.options() or first in ("nothing", "scales"), name
    for name, meant in load_yaml("options.yml")["meant"].items():
        assert name not in options.options(), name
        assert meant.replace("-", "_").removeprefix("no_") in options.options(), name


def test_no_removed_field_exists_and_each_replacement_does():
    for path, use in options.removed_fields().items():
        option, _, field = path.partition(".")
        keys = options.options()[option].keys
        assert field not in keys, path
        named = use.split()[0].rstrip(":,;").split(".")[0]
        assert named == "nothing" or named in keys or (option == "speculative_config" and not keys), path


def engine_python() -> Path | None:
    """The Python of a vLLM environment: $LOWMEM_ENGINE_PYTHON, or the one that the demo built."""
    if named := os.environ.get("LOWMEM_ENGINE_PYTHON"):
        return Path(named)
    return next(iter(sorted((ROOT / ".lowmem/host/envs").glob("vllm-*/bin/python"))), None)


ASK_THE_ENGINE = """
import json, sys
wanted = json.load(sys.stdin)
sys.path.insert(0, wanted["scripts"])
import engine_options
parser = engine_options.make_arg_parser(engine_options.FlexibleArgumentParser(prog="vllm serve"))

def refused(argv):
    try:
        parser.parse_args(argv)
    except SystemExit:
        return True
    return False

print()
print(json.dumps({
    "options": engine_options.table(),
    "refused": [argv for argv in wanted["accepted"] if refused(argv)],
    "taken": [argv for argv in wanted["removed"] if not refused(argv)],
}))
"""


@pytest.mark.engine
def test_the_installed_engine_has_this_table_and_takes_what_is_written_for_it():
    python = engine_python()
    if python is None:
        pytest.skip("no vLLM environment; `make demo` builds one, $LOWMEM_ENGINE_PYTHON names another")
    cases = yaml.safe_load((ROOT / "tests/data/commands.yml").read_text())
    accepted = [
        [case["model"], *(w for n, v in case.get("options", {}).items() for w in options.tokens(n, v))]
        for case in cases
    ]
    removed = [
        [f"--{n.replace('_', '-')}", *([] if r.switch else ["1"])] for n, r in options.removed().items()
    ]
    done = subprocess.run(
        [python, "-c", ASK_THE_ENGINE],
        input=json.dumps({"scripts": str(ROOT / "scripts"), "accepted": accepted, "removed": removed}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] == [], done.stderr
    assert found["taken"] == []
    known = json.loads((ROOT / "lowmem/data/engine_options_0.32.0.json").read_text())
    assert found["options"] == known["options"]


@pytest.mark.parametrize(
    ("name", "value", "wanted", "tokens"),
    [
        ("tool_call_parser", "hermes", "hermes", ["--tool-call-parser", "hermes"]),
        ("enable_auto_tool_choice", "true", True, ["--enable-auto-tool-choice"]),
        ("enable_log_deltas", False, False, ["--no-enable-log-deltas"]),
        ("aggregate_engine_logging", False, False, []),
        ("max_num_queued_tokens", "32k", 32_000, ["--max-num-queued-tokens", "32000"]),
        ("max_num_queued_tokens", "32K", 32_768, ["--max-num-queued-tokens", "32768"]),
        ("watermark", "0.01", 0.01, ["--watermark", "0.01"]),
        ("max_lora_rank", "64", 64, ["--max-lora-rank", "64"]),
        (
            "override_generation_config",
            {"top_k": 1},
            '{"top_k":1}',
            ["--override-generation-config", '{"top_k":1}'],
        ),
        ("hf_overrides", '{"a": [1]}', '{"a":[1]}', ["--hf-overrides", '{"a":[1]}']),
        ("lora_modules", ["a=/x y", "b=/z"], "'a=/x y' b=/z", ["--lora-modules", "a=/x y", "b=/z"]),
        (
            "lora_modules",
            [{"name": "a", "path": "/x"}],
            """'{"name":"a","path":"/x"}'""",
            ["--lora-modules", '{"name":"a","path":"/x"}'],
        ),
        (
            "collect_detailed_traces",
            "model worker",
            "model worker",
            ["--collect-detailed-traces", "model", "worker"],
        ),
        ("compilation_config", '{"mode": 3}', '{"mode":3}', ["--compilation-config", '{"mode":3}']),
    ],
)
def test_values_and_their_words(name, value, wanted, tokens):
    assert options.checked(name, value) == wanted
    assert options.tokens(name, wanted) == tokens


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_lora_rank", 17, "max_lora_rank=17 is not one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ("moe_backend", "marln", "did you mean marlin"),
        ("max_logprobs", "many", "max_logprobs='many' is not a whole number; correct it"),
        ("max_logprobs", True, "max_logprobs=True is not a whole number; correct it"),
        ("max_logprobs", "9" * 4000, "is not a whole number; correct it"),
        ("watermark", "nan", "watermark='nan' is not a number; correct it"),
        ("hf_overrides", "{", "hf_overrides='{' is not JSON"),
        ("compilation_config", "3", "compilation_config='3' is not JSON"),
        ("compilation_config", '{"modes": 3}', "compilation_config has no field 'modes'; did you mean mode"),
        ("chat_template", "a\nb", "is not one line of text"),
        ("chat_template", "--port", "is not one line of text that does not begin with a dash"),
        ("chat_template", "x" * 20_000, "chat_template has 20,000 characters; the longest value is 16,384"),
        ("lora_modules", "a='b", "has a quote that does not end"),
        (
            "max_num_seq",
            4,
            "knob 'max_num_seq' is unknown; knobs are vLLM's flags in snake_case, did you mean max_num_seqs",
        ),
        ("lora", True, "did you mean enable_lora"),
        ("disable_prefix_caching", True, "did you mean no-enable-prefix-caching"),
        ("context_length", 1, "did you mean max_model_len"),
        (
            "rope_scaling",
            "{}",
            "--rope-scaling: vLLM 0.32.0 has it no longer since 0.12.0 at the latest; use hf_overrides",
        ),
        ("host", "0.0.0.0", "host is not for a profile or an override; use lowmem_host of the inventory"),
        ("api_key", "x", "use vllm_service_api_keys of the inventory"),
        ("ssl_keyfile", "x", "use gateway_tls_certificate and gateway_tls_key of the inventory"),
        ("headless", True, "use a profile with hosts: 2 or more"),
    ],
)
def test_wrong_values(name, value, message):
    with pytest.raises(BadInput) as error:
        checked(name, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"compilation_config.mode": "3"}, {"compilation_config": {"mode": 3}}),
        (
            {"compilation_config": '{"mode": 3}', "compilation_config.pass_config.fuse_norm_quant": "true"},
            {"compilation_config": {"mode": 3, "pass_config": {"fuse_norm_quant": True}}},
        ),
        ({"speculative-config.method": "ngram"}, {"speculative_config": {"method": "ngram"}}),
        ({"hf_overrides.a+": "x,y"}, {"hf_overrides": {"a": ["x", "y"]}}),
        ({"hf_overrides.big": "1k"}, {"hf_overrides": {"big": 1000}}),
    ],
)
def test_dotted_names(given, wanted):
    assert options.folded(given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_num_seqs.a": 1}, "max_num_seqs takes no fields"),
        ({"nothing_of_vllm.a": 1}, "knob 'nothing_of_vllm' is unknown"),
        ({"hf_overrides.": 1}, "is not the name of a field"),
        ({"hf_overrides." + "a." * 20 + "b": 1}, "is not the name of a field"),
        ({"hf_overrides.a": 1, "hf_overrides.a.b": 1}, "has a value already"),
    ],
)
def test_wrong_dotted_names(given, message):
    with pytest.raises(BadInput, match=message):
        options.folded(given)


def test_the_plan_carries_every_option_and_says_what_it_does_not_count():
    given = {
        "tool_call_parser": "hermes",
        "moe_backend": "triton",
        "kv_transfer_config": {"kv_connector": "X"},
    }
    plan = make_plan(PlanRequest("low_latency", overrides=given, search=False))
    assert plan.argv[-6:] == [
        "--tool-call-parser", "hermes", "--moe-backend", "triton",
        "--kv-transfer-config", '{"kv_connector":"X"}',
    ]  # fmt: skip
    plain = make_plan(PlanRequest("low_latency", search=False))
    assert plan.per_gpu == plain.per_gpu
    assert [r for r in plan.reasons if r not in plain.reasons] == [
        "not counted, passed on as given: moe_backend; memory is as planned; for latency the plan's error of"
        " 2% no longer holds: measure it",
        "not counted, passed on as given: kv_transfer_config; for memory and latency the plan's error of 2%"
        " no longer holds: measure it",
    ]
