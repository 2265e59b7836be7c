"""What the options of the deployment promise is so: adapters, tool calls, chat template, drafts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowmem.schema import Plan

CITIES = ["Paris", "Rome"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        # without it vLLM lets the model write any JSON as arguments
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
REPEATED = "one two three four five six seven eight nine ten " * 8


def values(plan: Plan, flag: str) -> list[str]:
    """Return the words that follow a flag in the plan's arguments."""
    found: list[str] = []
    reading = False
    for word in plan.argv:
        if word.startswith("--"):
            reading = word == flag
        elif reading:
            found.append(word)
    return found


def value(plan: Plan, flag: str, why: str) -> str:
    """Return the value of a flag; a deployment without it skips the test."""
    given = values(plan, flag)
    if not given:
        pytest.skip(f"the deployment has no {why}")
    return given[0]


def adapters(plan: Plan) -> list[str]:
    """Return the names of the adapters, given as NAME=PATH or as a JSON object."""
    words = values(plan, "--lora-modules")
    return [json.loads(word)["name"] if word.startswith("{") else word.partition("=")[0] for word in words]


@pytest.fixture
def model(deployment: Any) -> str:
    return str(deployment.deploy.served_model_name)


def logprobs(deployment: Any, name: str) -> list[float]:
    """Return the logarithms of the probabilities of a fixed prompt's tokens."""
    status, text = deployment.http(
        "/v1/completions",
        {"model": name, "prompt": "The sun rises in the east.", "max_tokens": 1, "prompt_logprobs": 0},
    )
    assert status == 200, text
    given = json.loads(text)["choices"][0]["prompt_logprobs"]
    return [next(iter(token.values()))["logprob"] for token in given if token]


def test_each_adapter_is_listed_and_changes_the_model(deployment: Any, model: str, plan: Plan) -> None:
    if not (names := adapters(plan)):
        pytest.skip("the deployment has no adapters")
    status, text = deployment.http("/v1/models")
    assert status == 200, text
    assert {card["id"] for card in json.loads(text)["data"]} >= {model, *names}
    base = logprobs(deployment, model)
    same = [name for name in names if logprobs(deployment, name) == base]
    assert same == [], "these answer as the model itself"


@pytest.mark.parametrize("choice", ["named", "required"])
def test_a_tool_is_called(deployment: Any, model: str, plan: Plan, choice: str) -> None:
    value(plan, "--tool-call-parser", "parser of tool calls")
    named = {"type": "function", "function": {"name": "get_weather"}}
    status, text = deployment.http(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": QUESTION,
            "tools": [TOOL],
            "tool_choice": named if choice == "named" else "required",
            "max_tokens": 256,
            "temperature": 0,
        },
    )
    assert status == 200, text
    call = json.loads(text)["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"])["city"] in CITIES


def test_a_chat_is_written_by_the_planned_template(deployment: Any, model: str, plan: Plan) -> None:
    given = value(plan, "--chat-template", "chat template of its own")
    template = given if re.search(r"[{}\n]", given) else str(deployment.host.file(given).content_string)
    status, text = deployment.http(
        "/tokenize", {"model": model, "messages": QUESTION, "add_generation_prompt": True}
    )
    assert status == 200, text
    status, text = deployment.http("/detokenize", {"model": model, "tokens": json.loads(text)["tokens"]})
    assert status == 200, text
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    wanted = environment.from_string(template).render(messages=QUESTION, add_generation_prompt=True)
    assert json.loads(text)["prompt"].strip() == wanted.strip()


def drafted(deployment: Any) -> float:
    status, text = deployment.http("/metrics")
    assert status == 200, text
    found = re.findall(r"^vllm:spec_decode_num_draft_tokens_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_drafts_are_made(deployment: Any, model: str, plan: Plan) -> None:
    value(plan, "--speculative-config", "drafts")
    before = drafted(deployment)
    status, text = deployment.http(
        "/v1/completions",
        {"model": model, "prompt": REPEATED, "max_tokens": 32, "temperature": 0, "ignore_eos": True},
    )
    assert status == 200, text
    assert drafted(deployment) > before
