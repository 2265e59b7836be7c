"""The API answers as a client expects, and refuses what it must."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lowmem.schema import Plan


@pytest.fixture
def model(deployment: Any) -> str:
    return str(deployment.deploy.served_model_name)


def max_model_len(plan: Plan) -> int:
    return plan.max_model_len


def test_models_lists_the_served_name(deployment: Any, model: str, plan: Plan) -> None:
    status, text = deployment.http("/v1/models")
    assert status == 200, text
    card = json.loads(text)["data"][0]
    assert (card["id"], card["max_model_len"]) == (model, max_model_len(plan))


def test_completion(deployment: Any, model: str) -> None:
    status, text = deployment.http(
        "/v1/completions",
        {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    )
    assert status == 200, text
    answer = json.loads(text)
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["text"].strip()


def test_chat(deployment: Any, model: str) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    status, text = deployment.http("/v1/chat/completions", body)
    assert status == 200, text
    assert json.loads(text)["choices"][0]["message"]["content"].strip()


def test_streaming_comes_in_pieces_and_ends(deployment: Any, model: str) -> None:
    body = {
        "model": model,
        "prompt": "One, two, three,",
        "max_tokens": 8,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    status, text = deployment.http("/v1/completions", body)
    assert status == 200, text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert len([e for e in events[:-1] if json.loads(e)["choices"]]) >= 2


def test_the_model_knows_english(deployment: Any, model: str, plan: Plan) -> None:
    """Quantization or a kernel gone wrong gives a server that answers noise: every other check passes."""
    if plan.dummy_weights:
        pytest.skip("random weights")
    prompt = (
        "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at one"
        " hundred degrees."
    )
    status, text = deployment.http(
        "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    )
    assert status == 200, text
    given = [
        next(iter(token.values()))["logprob"]
        for token in json.loads(text)["choices"][0]["prompt_logprobs"]
        if token
    ]
    perplexity = math.exp(-sum(given) / len(given))
    # a model of 135M parameters gives about 15 for this text, a broken one thousands
    assert perplexity < 100, f"perplexity of a plain English sentence is {perplexity:,.0f}"


@pytest.mark.parametrize("key", [None, "wrong-key"])
def test_without_the_key_nothing_is_answered(deployment: Any, model: str, key: str | None) -> None:
    status, _ = deployment.http(
        "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1}, key=key
    )
    assert status == 401


def test_an_oversize_request_is_a_clear_refusal(deployment: Any, model: str, plan: Plan) -> None:
    limit = max_model_len(plan)
    status, text = deployment.http(
        "/v1/completions", {"model": model, "prompt": [100] * (limit + 1), "max_tokens": 1}
    )
    assert 400 <= status < 500, f"{status}: {text[:500]}"
    assert str(limit) in json.loads(text)["error"]["message"]


def test_an_unknown_model_is_a_clear_refusal(deployment: Any) -> None:
    status, text = deployment.http(
        "/v1/completions", {"model": "no-such-model", "prompt": "Hello", "max_tokens": 1}
    )
    assert status == 404, text
    assert "no-such-model" in text
