"""Whatever JSON a client sends, it is admitted or refused; the count itself never fails."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import AdmissionLimits
from lowmem.service.refusal import Refusal
from lowmem.service.request_work import parse_body, work_of

FIELDS = [
    "prompt", "messages", "input", "n", "best_of", "max_tokens", "logprobs", "prompt_logprobs", "top_k",
    "stop", "stop_token_ids", "allowed_token_ids", "logit_bias",
    "bad_words", "structured_outputs", "response_format",
    "tools", "text", "vllm_xargs", "echo", "seed",
]  # fmt: skip
KEYS = [
    "json", "regex", "grammar", "choice", "structural_tag", "type", "json_schema", "schema", "properties",
    "$ref", "$defs", "anyOf", "allOf",
    "enum", "pattern", "maxLength", "minItems", "format", "function", "parameters",
    "url", "image_url", "content",
]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["#", "#/$defs/a", "a{3,}", "((", "]}", "http://[", "data:x", "json_schema", '{"$ref": "#"}']
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner)
    ),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def limits() -> AdmissionLimits:
    deploy = {"model_path": "/m", "served_model_name": "m"}
    found = make_plan(PlanRequest("demo_cpu", deploy=deploy, search=False)).admission
    assert found is not None
    return found


@settings(max_examples=400, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), values, max_size=6))
def test_any_body_is_counted_or_refused(limits: AdmissionLimits, body: dict[str, Any]) -> None:
    refused: Refusal | None = None
    try:
        work = work_of(parse_body(json.dumps(body).encode()), limits)
    except Refusal as refusal:
        refused = refusal
    if refused:
        assert refused.status == 400
        assert json.loads(refused.body())["error"]["message"] == refused.message
    else:
        assert 1 <= work.sequences <= limits.sequences
        assert 0 <= work.tokens <= limits.request_tokens
        assert 0 <= work.grammar <= limits.grammar_at_once


@pytest.mark.parametrize(
    "unit",
    ["[]", "{}", "1", '{"$ref":"#/a"}', '{"allOf":[{"$ref":"#"}]}', '"a{9}"', '"http://[x"', '"\\ud800"'],
)
@pytest.mark.parametrize("field", ["prompt", "messages", "tools", "response_format", "logit_bias"])
def test_the_largest_body_is_counted_within_two_seconds_of_the_processor(
    limits: AdmissionLimits, field: str, unit: str
) -> None:
    many = ",".join([unit] * ((limits.body_bytes - 100) // (len(unit) + 1)))
    body = f'{{"{field}": {{"type": "json_schema", "schema": [{many}]}}}}'.encode()
    began = time.process_time()
    with contextlib.suppress(Refusal):
        work_of(parse_body(body), limits)
    assert time.process_time() - began < 2
