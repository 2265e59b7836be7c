"""`lowmem oracle`: its question, its record, and the comparison with a plan. No engine is asked here."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.cli.oracle import words_of
from lowmem.errors import BadInput
from lowmem.inputs.devices import load_device
from lowmem.inputs.model_cards import served_files
from lowmem.oracle.compare import problem, terms
from lowmem.oracle.question import (
    Answer,
    Card,
    Record,
    card_of,
    card_of_plan,
    question_of_plan,
    read_record,
    write_record,
)
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest, gather
from lowmem.schema import Plan

RECORDS = Path(__file__).parents[1] / "data/oracle"
REQUESTS = {
    # SmolLM2-135M as role awq_quantize makes it, asked of the CPU build of the demo
    "demo_cpu.json": PlanRequest("demo_cpu"),
    # Llama-2-70B on one of two GPUs, asked with stubs for NVML and CUDA
    "low_mem.json": PlanRequest("low_mem"),
}


def recorded(name: str) -> tuple[Plan, Record]:
    return make_plan(REQUESTS[name]), read_record(RECORDS / name)


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_the_plan_of_a_profile_is_what_the_engine_registers(name: str) -> None:
    plan, record = recorded(name)
    found = terms(plan, record.answer)
    assert [(t.name, t.planned) for t in found] == [(t.name, t.engine) for t in found]
    assert len(found) == 4


def test_a_term_may_differ_by_one_per_cent() -> None:
    plan, record = recorded("demo_cpu.json")
    more = record.answer.model_copy(update={"parameter_bytes": round(113_924_736 * 1.0099)})
    assert all(t.agrees for t in terms(plan, more))
    far = record.answer.model_copy(update={"parameter_bytes": round(113_924_736 / 0.98)})
    (differs,) = [t for t in terms(plan, far) if not t.agrees]
    assert problem(differs) == (
        "checkpoint.parameter_bytes is 113,924,736 in the plan and 116,249,731 in vLLM's own classes, 2.0%"
        " apart (the limit is 1%): the plan counts another model than the engine would load; report it with"
        " the checkpoint's config.json"
    )


def test_an_engine_without_a_cache_differs_from_a_plan_with_one() -> None:
    plan, record = recorded("demo_cpu.json")
    none = record.answer.model_copy(update={"kv_cache": None})
    assert [t.name for t in terms(plan, none) if not t.agrees] == [
        "kv_cache.bytes_per_block",
        "kv_cache.bytes_per_request",
    ]


def test_a_card_has_the_figures_of_the_device_table() -> None:
    assert card_of(load_device("a100-40g"), 2) == Card(
        name="NVIDIA A100 40 GB SXM4",
        capability=(8, 0),
        memory_bytes=load_device("a100-40g").torch_total_mib * 2**20,
        multiprocessors=108,
        count=2,
    )
    assert card_of(load_device("cpu"), 1) is None


def test_the_served_files_name_the_architecture_and_the_recipe_to_come() -> None:
    files = served_files(gather(PlanRequest("demo_cpu")).card)
    assert list(files) == ["config.json"]
    assert files["config.json"]["architectures"] == ["LlamaForCausalLM"]
    assert files["config.json"]["quantization_config"]["quant_method"] == "awq"


@pytest.fixture
def vllm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0+cpu")


def files_of_the_demo() -> dict[str, Any]:
    request = REQUESTS["demo_cpu.json"]
    plan = json.loads(make_plan(request).model_dump_json())
    return {**served_files(gather(request).card), "plan.json": plan}


def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["oracle", *words], input=stdin)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.usefixtures("vllm_here")
def test_an_answer_to_the_same_question_is_taken_from_its_record() -> None:
    status, said, _ = run("-", "--record", str(RECORDS / "demo_cpu.json"), "--reuse",
                          stdin=json.dumps(files_of_the_demo()))  # fmt: skip
    assert status == 0
    assert said.splitlines() == [
        "LlamaForCausalLM in bfloat16, vLLM 0.32.0+cpu, on this machine's CPU",
        "parameters 113,924,736 bytes, buffers 1,049,056 bytes on one GPU",
        "KV cache: 2,949,120 bytes a block; a request of max_model_len holds 16 blocks, 47,185,920 bytes",
        "  FullAttentionSpec: 30 layers, 128 tokens and 98,304 bytes a block",
        "checkpoint.parameter_bytes: planned 113,924,736, vLLM 113,924,736: agrees",
        "checkpoint.buffer_bytes: planned 1,049,056, vLLM 1,049,056: agrees",
        "kv_cache.bytes_per_block: planned 2,949,120, vLLM 2,949,120: agrees",
        "kv_cache.bytes_per_request: planned 47,185,920, vLLM 47,185,920: agrees",
    ]


@pytest.mark.usefixtures("vllm_here")
def test_a_plan_that_differs_ends_with_two(tmp_path: Path) -> None:
    record = read_record(RECORDS / "demo_cpu.json")
    wrong = record.answer.model_copy(update={"parameter_bytes": 1})
    write_record(tmp_path / "r.json", record.model_copy(update={"answer": wrong}))
    status, said, why = run("-", "--record", str(tmp_path / "r.json"), "--reuse", "--json",
                            stdin=json.dumps(files_of_the_demo()))  # fmt: skip
    assert status == 2
    assert json.loads(said)["terms"][0] == {
        "term": "checkpoint.parameter_bytes", "planned": 113_924_736, "engine": 1, "agrees": False,
    }  # fmt: skip
    assert why.startswith("oracle: checkpoint.parameter_bytes is 113,924,736 in the plan and 1 in vLLM's own")


@pytest.mark.usefixtures("vllm_here")
@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["config.json"].update(hidden_size=1152),
        lambda f: f["plan.json"]["arguments"].append({"flag": "--block-size", "value": "32", "why": "-"}),
        lambda f: f["plan.json"]["environment"].append({"name": "VLLM_X", "value": "1", "why": "-"}),
    ],
)
def test_another_question_is_asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any) -> None:
    record = read_record(RECORDS / "demo_cpu.json")
    kept = tmp_path / "r.json"
    write_record(kept, record)
    asked = []

    def ask(folder: Path, question: Any) -> Answer:
        asked.append(question)
        return record.answer

    monkeypatch.setattr("lowmem.oracle.engine.ask", ask)
    files = files_of_the_demo()
    change(files)
    assert run("-", "--record", str(kept), "--reuse", stdin=json.dumps(files))[0] == 0
    assert asked == [read_record(kept).question]
    assert asked != [record.question]


@pytest.mark.parametrize(
    ("words", "stdin", "says"),
    [
        (("-", "--reuse"), "{}", "lowmem: --reuse needs --record, the file with the answer"),
        (("-",), "{", "lowmem: stdin is not JSON ("),
        (("-",), "[]", "lowmem: stdin is no JSON object of files; it may hold config.json,"),
        (("-",), '{"../x": {}}', "lowmem: stdin is no JSON object of files; it may hold config.json,"),
        (("-",), '{"config.json": 1}', "lowmem: stdin is no JSON object of files"),
        (
            ("-",),
            '{"config.json": {}}',
            "lowmem: lowmem oracle asks vLLM's own classes, and this Python has no",
        ),
        (("/nowhere", "--device", "a100-40g"), "", "lowmem: lowmem oracle asks vLLM's own classes"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], stdin: str, says: str) -> None:
    status, said, why = run(*words, stdin=stdin)
    assert (status, said) == (1, "")
    assert why.startswith(says)
    assert len(why.splitlines()) == 1


@pytest.mark.usefixtures("vllm_here")
def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert run(str(tmp_path), "--device", "a100-40g") == (
        1, "", f"lowmem: {tmp_path} has no config.json; give the directory of a checkpoint\n",
    )  # fmt: skip


@pytest.mark.usefixtures("vllm_here")
def test_the_pool_of_an_impossible_plan_is_one_that_holds_a_request(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = make_plan(PlanRequest("low_mem", count=1, overrides={"tensor_parallel_size": 1}, search=False))
    assert plan.verdict == "impossible"
    assert question_of_plan(tmp_path, plan, load_device(plan.device)).pool_bytes == 2**40


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"question": 1, "answer": 2}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"^record .*; remove it$"):
        read_record(path)


def test_a_device_of_no_table_can_be_asked_only_where_its_card_is() -> None:
    plan = make_plan(PlanRequest("low_mem")).model_copy(update={"device": "mine"})
    assert card_of_plan(plan, None) == Card(
        name="mine", capability=(0, 0), memory_bytes=20 * 2**30, multiprocessors=1
    )


def test_knobs_become_the_arguments_that_a_plan_gives_the_engine() -> None:
    knobs = ["enforce_eager=true", "max-num-seqs=8", "compilation_config.mode=3", "enable_prefix_caching=no"]
    assert words_of(knobs) == (
        "--enforce-eager", "--max-num-seqs", "8", "--compilation-config", '{"mode":3}',
        "--no-enable-prefix-caching",
    )  # fmt: skip


def test_an_unknown_knob_is_refused_before_the_engine_is_asked() -> None:
    with pytest.raises(BadInput, match="knob 'max_seqs' is unknown"):
        words_of(["max_seqs=8"])
