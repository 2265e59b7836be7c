"""What schemathesis holds each answer of the gateway against; loaded as its hooks (fuzz.yml)."""

from __future__ import annotations

from typing import Any

import schemathesis

LISTED = {
    ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"),
}  # fmt: skip


def is_gateways(response: Any) -> bool:
    """Each of its own answers says so; a client cannot make the engine say it."""
    return response.headers.get("x-answered-by") == ["gateway"]


@schemathesis.check
def past_the_list(ctx: Any, response: Any, case: Any) -> None:
    if (case.method.upper(), case.path) not in LISTED:
        assert is_gateways(response), (
            f"{case.method} {case.path} reached the engine, which says {response.status_code}"
        )
        assert response.status_code in (400, 404, 405, 413, 414), response.status_code


@schemathesis.check
def no_gateway_error(ctx: Any, response: Any, case: Any) -> None:
    if is_gateways(response):
        assert response.status_code < 500, (
            f"{case.method} {case.path}: {response.status_code} is the gateway's own"
        )


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """Answers of a few tokens, in every phase: this is about what stands before the engine."""
    body = case.body
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if not isinstance(body.get(name), str | list | dict):
                body[name] = 2
        body |= {
            name: value
            for name, value in {"n": 1, "best_of": 1, "min_tokens": 0}.items()
            if isinstance(body.get(name), int)
        }
