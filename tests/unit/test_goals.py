"""Settings found from a goal: what is chosen, why, what else would do, and what a refusal names."""

import json
import re
import shlex
import subprocess

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards
from lowmem.plan.capacity import capacity_of, largest, maximized, would_do
from lowmem.plan.goals import Goal, described, find
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest, gather
from lowmem.plan.search import suggestions
from lowmem.schema import Limits, Load
from lowmem.text import shell_lines
from lowmem.units import GIB

FIRST = "quantized first by this deployment"


def goal(model="llama-3.1-70b", device="a100-40g", count=2, limit=36 * GIB, clients=16, **more):
    load = Load(clients=clients, input_tokens=more.pop("input_tokens", 4096), output_tokens=512)
    limits = Limits(memory_bytes=limit, tpot_p99_ms=more.pop("tpot", 200), ttft_p99_ms=1e9)
    card, found = model_cards.load_card(model), devices.load_device(device)
    return Goal(card, found, count, limits, load, "0.32.0", model, **more)


def lowmem(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "80"})


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (
            goal(),
            f"4-bit weights, {FIRST}, 2 cards, 16-bit KV cache, steps of 512 tokens",
        ),
        (  # the headline recipe, found again: 20 GiB of each card, a lean step and 2 NCCL channels
            goal("llama-2-70b", limit=20 * GIB, clients=8, input_tokens=768),
            f"4-bit weights, {FIRST}, 2 cards, 16-bit KV cache, steps of 480 tokens",
        ),
        (
            goal("llama-3.1-8b", "rtx-4090", 1, 24207 * 2**20, 8),
            "16-bit weights, 1 card, 16-bit KV cache, steps of 512 tokens",
        ),
        (
            goal("qwen2.5-32b", count=4, limit=40335 * 2**20, clients=32, input_tokens=8192),
            "16-bit weights, 4 cards, 16-bit KV cache, steps of 512 tokens",
        ),
    ],
)
def test_the_best_quality_that_fits_is_chosen(asked, chosen):
    found = find(asked)
    assert found.choice.fits
    assert described(found.choice) == chosen
    assert all(other.fits for other in found.others)
    assert found.choice.plan.peak_bytes <= asked.limits.memory_bytes


def test_why_each_better_choice_was_left():
    why = find(goal()).why
    assert why[0].startswith("chosen: 4-bit weights")
    assert why[1].startswith("not 16-bit weights: weights: CUDA out of memory: 65.74 GiB")
    assert why[2].startswith("not 8-bit weights: kv_cache: the pool holds 1 requests of 4608 tokens")
    assert why[3].startswith("not 1 card: kv_cache: No available memory")


def test_weights_go_to_ram_before_they_get_3_bits():
    chosen = find(goal("llama-2-70b", count=1, limit=32 * GIB, clients=2, input_tokens=512, tpot=400)).choice
    assert (chosen.bits, chosen.offloaded) == (4, True)
    assert (
        find(goal("llama-2-70b", count=1, limit=32 * GIB, clients=2, input_tokens=512, tpot=100)).choice.bits
        == 3
    )


def test_a_published_quantized_checkpoint_is_found_for_its_model():
    done = lowmem("--suggest", "--model", "qwen3-30b-a3b", "--device", "rtx-4090")
    said = " ".join(done.stdout.split())
    assert "4-bit weights as published (Qwen/Qwen3-30B-A3B-GPTQ-Int4), 1 card" in said
    assert commands(done.stdout)[0][2:6] == ["--model", "qwen3-30b-a3b-gptq", "--device", "rtx-4090"]


def test_a_refusal_that_memory_did_not_cause_keeps_the_weights():
    found = find(goal("qwen2.5-7b", "a10", 1, 22 * GIB, 1, overrides={"kv_cache_dtype": "fp8"}))
    assert found.choice.bits == 16
    assert found.why[0].startswith("closest: 16-bit weights")


def test_a_given_knob_is_not_searched():
    chosen = find(goal(overrides={"tensor_parallel_size": 1, "max_num_batched_tokens": 1024})).choice
    assert chosen.plan.tensor_parallel_size == 1
    assert chosen.plan.max_num_batched_tokens == 1024


def test_drafts_are_tried_only_with_an_acceptance():
    assert find(goal()).choice.plan.speculation is None
    asked = goal(count=2)
    load = asked.load.model_copy(update={"clients": 1, "accepted_tokens": 4.0})
    chosen = find(goal(clients=1)).choice
    faster = find(Goal(**{**asked.__dict__, "load": load})).choice
    assert faster.plan.speculation.accepted_tokens == 4.0
    assert faster.plan.latency_ms.decode_expected < chosen.plan.latency_ms.decode_expected


def test_suggestions_hold_the_recipes_and_rank_by_bits_then_cards():
    found = suggestions(goal("llama-2-70b", limit=20 * GIB, clients=8, input_tokens=768))
    assert "low_mem" in [c.profile for c in found]
    assert [c.bits for c in found] == sorted((c.bits for c in found), reverse=True)


def commands(text):
    """The commands of an output, each joined to one line."""
    joined = text.replace(" \\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.lstrip().startswith("lowmem plan ")]


@pytest.mark.parametrize(
    "words",
    [
        ("--suggest", "--device", "a100-40g", "--count", 2),
        ("--suggest", "--model", "llama-3.1-8b", "--device", "l4"),
        ("--suggest", "--model", "qwen3-32b", "--device", "a100-40g"),
        ("--model", "qwen2.5-72b", "--device", "h100", "--count", 2, "--clients", 4, "--accepted-tokens", 3),
        ("--maximize", "context", "--model", "llama-3.1-8b", "--device", "rtx-4090"),
    ],
)
def test_each_row_ends_with_the_command_that_plans_it_again(words):
    done = lowmem(*words)
    assert done.exit_code == 0, done.output
    shown = commands(done.stdout)
    assert len(shown) >= 2
    for command in shown:
        again = CliRunner().invoke(app, [*command[1:], "--json"])
        plan = json.loads(again.stdout)
        assert (again.exit_code, plan["verdict"]) == (0, "fits"), command
        peak = f"{plan['peak_bytes'] / 2**20:,.0f} MiB"
        assert peak in done.stdout


def test_few_bits_are_warned_of():
    said = " ".join(lowmem("--suggest", "--count", 2).stdout.split())
    assert "warning: 2-bit weights answer worse than 4-bit ones; measure their perplexity" in said


def test_a_goal_ends_with_a_command_that_a_shell_reads():
    done = lowmem("--model", "llama-3.1-70b", "--device", "a100-40g", "--count", 2, "--clients", 4)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    serve = done.stdout[done.stdout.rindex("\n\n") :].strip()
    subprocess.run(["bash", "-n"], input=serve, text=True, check=True)
    words = shlex.split(serve.replace("\\\n", " "))
    assert words[words.index("vllm") :][:2] == ["vllm", "serve"]
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert all("=" in word for word in words[: words.index("vllm")])


def test_a_command_in_lines():
    words = ["vllm", "serve", "a b", "--x", "1", "--flag", "--json", '{"a": 1}']
    assert shell_lines(words, 24, ["A=b c"]) == [
        "A='b c' \\",
        "vllm serve 'a b' --x 1 \\",
        "  --flag \\",
        "  --json '{\"a\": 1}'",
    ]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (PlanRequest("low_mem", clients=16), "would do, each alone: 8 clients"),
        (PlanRequest("low_mem", memory_limit_bytes=18 * GIB), "a limit of 20,480 MiB a card"),
        (PlanRequest("low_mem", clients=9, overrides={"max_num_seqs": 9}), "requests of"),
    ],
)
def test_a_refusal_names_what_would_do(request_, sentence):
    assert sentence in would_do(gather(request_))


@pytest.mark.parametrize("clients", [9, 12, 40])
def test_what_would_do_does_and_one_more_does_not(clients):
    refused = PlanRequest("low_mem", clients=clients, overrides={"max_num_seqs": clients}, search=False)
    most = int(re.search(r"([0-9]+) client", would_do(gather(refused)))[1])
    for number, verdict in ((most, True), (most + 1, False)):
        asked = {"clients": number, "overrides": {"max_num_seqs": number}, "search": False}
        assert (make_plan(PlanRequest("low_mem", **asked)).verdict == "fits") == verdict


def test_the_largest_of_a_range():
    assert largest(lambda n: n <= 37, 1, 100) == 37
    assert largest(lambda n: True, 1, 100) == 100
    assert largest(lambda n: False, 1, 100) is None
    assert largest(lambda n: True, 2, 1) is None


@pytest.mark.parametrize("aim", ["requests", "context"])
def test_the_largest_load_fits_and_one_more_does_not(aim):
    asked = goal("llama-3.1-8b", "rtx-4090", 1, 24207 * 2**20, 4, weights="stored", tpot=60)
    best = maximized(asked, aim)[0]
    load, grain = best.choice.plan.load, 16
    amount = load.clients if aim == "requests" else load.input_tokens + load.output_tokens
    assert amount == best.amount
    more = (
        {"clients": load.clients + 1}
        if aim == "requests"
        else {"clients": load.clients, "input_tokens": load.input_tokens + grain}
    )
    kv = {"kv_cache_dtype": best.choice.kv_type, "max_num_batched_tokens": 512}
    larger = goal(
        "llama-3.1-8b", "rtx-4090", 1, 24207 * 2**20, **more, weights="stored", tpot=60, overrides=kv
    )
    assert best.choice.fits
    assert not find(larger).choice.fits


def test_maximize_refuses_another_aim():
    with pytest.raises(BadInput, match="'speed' is not one of requests, context, throughput"):
        maximized(goal(), "speed")


def test_requests_against_context():
    found = capacity_of(gather(PlanRequest("low_mem")))
    assert found.contexts == (1024, 2048, 4096)
    assert found.requests == {
        "auto": (9, 5, 2),
        "int8_per_token_head": (18, 9, 4),
        "int4_per_token_head": (32, 17, 9),
    }


def test_a_count_of_the_table_fits_and_one_more_does_not():
    eight = {"max_model_len": 2048, "kv_cache_dtype": "int8_per_token_head", "max_num_seqs": 9}
    asked = {"input_tokens": 1792, "output_tokens": 256, "search": False}
    assert make_plan(PlanRequest("low_mem", overrides=eight, clients=9, **asked)).max_requests == 9
    ten = {**eight, "max_num_seqs": 10}
    assert make_plan(PlanRequest("low_mem", overrides=ten, clients=10, **asked)).max_requests == 9


def test_capacity_prints_a_table_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "capacity.svg"
    words = ["capacity", "--model", "llama-3.1-8b", "--device", "rtx-4090", "--out", str(picture)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "tokens a request" in done.stdout
    assert re.search(r"^ +131,072 +none +none +none +1$", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.splitlines()[-1] == f"picture: {picture}"
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert "requests that fit at once" in re.sub(r"<!-- (.*?) -->", r"\1", picture.read_text())


def test_capacity_of_a_model_that_is_too_large():
    words = ["capacity", "--model", "llama-3.1-70b", "--device", "l4", "--weights", "stored"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "not one request fits" in done.stdout) == (2, True)


@pytest.mark.parametrize(
    ("count", "split", "words"),
    [
        (1, 1, "follows the 1 card(s) of the host (profile low_mem: 2)"),
        (4, 4, "follows the 4 card(s) of the host (profile low_mem: 2)"),
        (3, 2, "follows the 3 card(s) of the host, of which it can use 2 (profile low_mem: 2)"),
    ],
)
def test_a_profile_follows_the_number_of_cards(count, split, words):
    plan = make_plan(PlanRequest("low_mem", count=count, search=False))
    assert plan.tensor_parallel_size == split
    assert next(a.why for a in plan.arguments if a.flag == "--tensor-parallel-size") == words
    assert f"tensor_parallel_size={split} {words}" in plan.reasons


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "llama-2-7b", "--hosts", 2), "a search plans one host"),
        (("--model", "llama-2-7b", "--weights", "profile"), "--weights profile needs --profile"),
        (("--model", "llama-2-7b", "--weights", "awq-5bit"), "weights='awq-5bit' is not one of stored, "),
        (("--model", "llama-2-7b", "--tpot-ms", 0), "tpot_p99_ms=0 is not from 0.001 to"),
        (("--model", "llama-2-7b", "--maximize", "speed"), "'speed' is not one of requests, context"),
        (("--model", "llama-2-7b", "--clients", 0), "clients=0"),
    ],
)
def test_a_bad_goal_is_one_line(words, message):
    done = lowmem(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
