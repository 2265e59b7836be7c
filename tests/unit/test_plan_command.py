"""`lowmem plan -- vllm serve …`: the plan of a pasted command, its profile, and its flags alone."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.inputs import model_cards

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PASTED = (
    f"docker run --gpus all -e NCCL_MAX_NCHANNELS=2 vllm/vllm-openai:v0.9.0 --model {LLAMA} -tp 2"
    " --max-model-len 16k --swap-space 4 --lora-modules 'a=/x y' b=/z --enable-lora --max-lora-rank 64"
    """ --override-generation-config '{"temperature": 0.6}' --moe-backend triton --host 0.0.0.0"""
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_hub(repo, revision=None):
        raise model_cards.BadInput(f"model {repo!r} has no config.json here")

    monkeypatch.setattr(model_cards, "card_from_hub", no_hub)


def run(*arguments, text=None):
    return CliRunner().invoke(app, ["plan", *arguments], input=text)


def test_a_pasted_command_is_planned_as_it_is():
    done = run("--device", "a100-80g", "--json", "--", PASTED)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["argv"] == [
        LLAMA, "--tensor-parallel-size", "2", "--max-model-len", "16000",
        "--lora-modules", "a=/x y", "b=/z", "--enable-lora", "--max-lora-rank", "64",
        "--override-generation-config", '{"temperature":0.6}', "--moe-backend", "triton",
    ]  # fmt: skip
    assert (plan["device_count"], plan["model"], plan["quantization"]["method"]) == (
        2,
        "llama-3.1-8b",
        "none",
    )
    assert plan["limit_bytes"] == 81920 * 2**20
    assert {"name": "NCCL_MAX_NCHANNELS", "value": "2", "why": "of the pasted command"} in plan["environment"]
    assert done.stderr.splitlines() == [
        "lowmem: removed: --swap-space: vLLM 0.32.0 has it no longer since 0.18.0 at the latest; use"
        " kv_offloading_size for the KV cache, cpu_offload_gb for weights; it only ever swapped preempted KV",
        "lowmem: note: the image has vLLM 0.9.0; the plan is for 0.32.0",
        "lowmem: note: --host 0.0.0.0 is the deployment's, not the plan's; use lowmem_host of the inventory,"
        " --host of lowmem plan",
    ]


def test_its_profile_plans_the_same(tmp_path):
    path = tmp_path / "mine.yml"
    pasted = run("--device", "a100-80g", "--json", "--as-profile", str(path), "--", PASTED)
    again = run("--profile", str(path), "--json")
    assert json.loads(again.stdout) == json.loads(pasted.stdout)
    assert yaml.safe_load(path.read_text())["knobs"]["max_lora_rank"]["value"] == 64


def test_a_command_of_stdin_and_of_a_file(tmp_path):
    (tmp_path / "c").write_text(f"vllm serve {LLAMA} --max-model-len 512")
    wanted = [LLAMA, "--max-model-len", "512"]
    for done in (
        run("--json", "--", "-", text=(tmp_path / "c").read_text()),
        run("--json", "--command", "-", text=(tmp_path / "c").read_text()),
        run("--json", "--command", str(tmp_path / "c")),
        run("--json", "--", "vllm", "serve", LLAMA, "--max-model-len", "512"),
    ):
        assert json.loads(done.stdout)["argv"] == wanted
        assert json.loads(done.stdout)["load"]["input_tokens"] == 256


def test_flags_are_checked_without_a_model():
    done = run("--check-flags", "--", "vllm serve nobody/nothing --dtype half --rope-theta 1e6")
    assert (done.exit_code, done.stdout) == (1, "dtype: half\n")
    assert done.stderr.startswith("lowmem: removed: --rope-theta: vLLM 0.32.0 has it no longer")
    assert run("--check-flags", "--", "vllm", "serve", "nobody/nothing").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["--", "vllm serve nobody/nothing --rope-theta 1"],
            [
                "lowmem: removed: --rope-theta: vLLM 0.32.0 has it no longer since 0.12.0 at the latest; use"
                " hf_overrides with rope_parameters",
                "lowmem: model 'nobody/nothing' has no config.json here; give the folder of its config.json"
                " with --model DIR",
            ],
        ),
        (
            ["--", "vllm serve x --tensor-paralel-size 2 --dtype wide"],
            [
                "lowmem: fault: --tensor-paralel-size is no flag of vLLM 0.32.0; did you mean"
                " --tensor-parallel-size",
                "lowmem: fault: dtype='wide' is not one of auto, bfloat16, float, float16, float32, half",
            ],
        ),
        (
            ["--", f"CUDA_VISIBLE_DEVICES=0 vllm serve {LLAMA} -tp 2"],
            [
                "lowmem: CUDA_VISIBLE_DEVICES=0 leaves the engine 1 card(s), and its parallel sizes need 2;"
                " give as many cards or lower a size"
            ],
        ),
        (
            ["--", "vllm serve"],
            ["lowmem: the command names no model; name it in the command, or give --model"],
        ),
        (
            ["--as-profile", "x.yml"],
            ["lowmem: --as-profile and --check-flags need a command: lowmem plan -- vllm serve MODEL …"],
        ),
        (
            ["--as-profile", "x.txt", "--", f"vllm serve {LLAMA}"],
            ["lowmem: --as-profile x.txt is no YAML file; name one that ends in .yml"],
        ),
        (
            ["--command", "x", "--", "vllm serve m"],
            ["lowmem: --command and a command after -- are both given; give one of them"],
        ),
        (["--command", "/nowhere"], ["lowmem: /nowhere: No such file or directory"]),
    ],
    ids=["model", "faults", "cards", "no model", "no command", "no YAML", "two", "no file"],
)
def test_what_cannot_be_planned(arguments, lines):
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == lines
    assert done.stdout == ""
