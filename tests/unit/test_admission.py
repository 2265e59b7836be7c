"""The server's admission: what one request, one key and all clients together may ask for.

The middleware is asked as a server asks it (ASGI), without a socket and without an engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import AdmissionLimits
from lowmem.service import admission, pace
from lowmem.service.admission import Admission, read_limits
from lowmem.service.api_keys import CLIENT

DEPLOY = {"model_path": "/m", "served_model_name": "m"}


@pytest.fixture(scope="module")
def limits() -> AdmissionLimits:
    """Those of the demo: 8 places, 2,048 tokens, 3,072 MiB."""
    found = make_plan(PlanRequest("demo_cpu", deploy=DEPLOY, search=False)).admission
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def unpaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests follow each other at once; the tests of the pace itself say what it costs."""
    for name in ("REQUEST_S", "BYTE_S", "REFUSAL_S"):
        monkeypatch.setattr(pace, name, 0.0)


class Engine:
    """An app that answers when the test lets it, and remembers what it got."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.running: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != "POST":
            await answer(send, b"open")
            return
        message = await receive()
        assert message["more_body"] is False
        body = json.loads(message["body"] or b"{}")
        self.bodies.append(body)
        name = body.get("user", "")
        self.running.append(name)
        try:
            if name in self.gates:
                gate = asyncio.ensure_future(self.gates[name].wait())
                gone = asyncio.ensure_future(receive())
                await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
                gate.cancel()
                gone.cancel()
            await answer(send, b"a token")
        finally:
            self.running.remove(name)


async def answer(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


Sends = Callable[[], Awaitable[dict[str, Any]]]


async def post(
    app: Admission,
    body: Any,
    *,
    key: str = "alice",
    path: str = "/v1/completions",
    headers: dict[str, str] | None = None,
    receive: Sends | None = None,
) -> tuple[int, dict[str, Any]]:
    """Status and error of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[dict[str, Any]] = []
    parts: AsyncIterator[dict[str, Any]] = once({"type": "http.request", "body": data})

    async def take() -> dict[str, Any]:
        return await anext(parts)

    async def send(message: Any) -> None:
        sent.append(message)

    named = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": named, CLIENT: key}
    await app(scope, receive or take, send)
    if not sent:
        return 0, {}
    text = sent[1]["body"]
    return sent[0]["status"], json.loads(text)["error"] if sent[0]["status"] >= 400 else {}


async def once(*messages: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for message in messages:
        yield message
    await asyncio.Event().wait()


def build(limits: AdmissionLimits, engine: Any = None, **changes: Any) -> Admission:
    return Admission(engine or Engine(), limits.model_copy(update=changes), CollectorRegistry())


def ask(limits: AdmissionLimits, body: Any, **more: Any) -> tuple[int, dict[str, Any]]:
    return asyncio.run(post(build(limits), body, **more))


def schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property_{n}": {"type": "string"} for n in range(properties)}}


def formatted(spec: Any) -> dict[str, Any]:
    return {
        "prompt": "x",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": spec}},
    }


def structured(**spec: Any) -> dict[str, Any]:
    return {"prompt": "x", "structured_outputs": spec}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **more}


def picture(image_url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": image_url}
    return chat(messages=[{"role": "user", "content": [part]}])


def tool(properties: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema(properties)}}


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


REFUSED: dict[str, tuple[Any, str, str]] = {
    # the issue's own
    "sequences": (
        {"prompt": "x", "n": 16384, "max_tokens": 2000, "stream": True},
        "n",
        "n=16384, more than the limit of 6",
    ),
    "prompts": (
        {"prompt": ["x"] * 1024, "n": 64},
        "prompt",
        "prompt has 1024 prompts x 64 answers, more than the limit of 6",
    ),
    "schema of 2,000 properties": (formatted(schema(700)), "response_format", "more than the limit of 500"),
    "choices": (
        structured(choice=[str(n) for n in range(4_000)]),
        "structured_outputs.choice",
        "4000 items, more than the limit of 500",
    ),
    "enum": (
        formatted({"enum": list(range(4_000))}),
        "response_format",
        "4000 items, more than the limit of 500",
    ),
    "top_k": (
        {"prompt": "x", "top_k": 2**70},
        "top_k",
        "top_k=1180591620717411303424, more than the limit of 9223372036854775807",
    ),
    "xargs": ({"prompt": "x", "vllm_xargs": {"a": "b"}}, "vllm_xargs", "vllm_xargs is not served here"),
    "recursive reference": (formatted({"$ref": "#"}), "response_format", "a $ref that leads to itself"),
    # of the same kinds
    "n as text": ({"prompt": "x", "n": "16384"}, "n", "n=16384, more than the limit of 6"),
    "n as a float": ({"prompt": "x", "n": 1e300}, "n", "more than the limit of 2147483647"),
    "best_of": ({"prompt": "x", "best_of": 400}, "n", "n=400, more than the limit of 6"),
    "product": ({"prompt": ["x"] * 3, "n": 3}, "prompt", "3 prompts x 3 answers"),
    "prompts of ids": (
        {"prompt": [[1], [2], [3], [4], [5], [6], [7]]},
        "prompt",
        "prompt=7, more than the limit of 6",
    ),
    "chat of several": (
        {"messages": [[{"role": "user", "content": "x"}]] * 7},
        "prompt",
        "prompt=7, more than the limit of 6",
    ),
    "tokens": (
        {"prompt": [1] * 2000, "n": 4, "max_tokens": 2000},
        "max_tokens",
        "10000 tokens with the prompts), more than the limit of 8192",
    ),
    "long prompt, truncated": (
        {"prompt": "a 1 " * 8_200, "truncate_prompt_tokens": 5},
        "prompt",
        "32800 bytes of text, more than the limit of 32768",
    ),
    "long chat": (
        chat(messages=[{"role": "user", "content": "a" * 20_000}] * 2),
        "messages",
        "bytes of text, more than the limit of 32768",
    ),
    "long text beside the prompt": (
        {"prompt": "x", "suffix": "a" * 33_000},
        "the body",
        "33000 bytes of text",
    ),
    "long prompt of ids": ({"prompt": [1] * 2049}, "prompt", "2049 tokens, more than the limit of 2048"),
    "token id": ({"prompt": [2**40]}, "prompt", "prompt=1099511627776, more than the limit of 2147483647"),
    "deep schema": (
        structured(json=nested(20)),
        "structured_outputs.json",
        "levels, more than the limit of 32",
    ),
    "schema as text": (
        structured(json=json.dumps(schema(700))),
        "structured_outputs.json",
        "more than the limit of 500",
    ),
    "schema as text, without end": (
        structured(json='{"a":' * 400 + "1" + "}" * 400),
        "structured_outputs.json",
        "levels, more than the limit of 32",
    ),
    "long schema": (
        formatted({"description": "x" * 33_000}),
        "response_format",
        "bytes, more than the limit of 32768",
    ),
    "tools": (chat(tools=[tool(600)]), "tools", "more than the limit of 500"),
    "grammar": (
        structured(grammar="root ::= " + " | ".join('"a"' for _ in range(600))),
        "structured_outputs.grammar",
        "items, more than the limit of 500",
    ),
    "regex": (structured(regex="(a|b)" * 400), "structured_outputs.regex", "items"),
    "regex that unrolls": (
        structured(regex="((a{1,100}){1,100})"),
        "structured_outputs.regex",
        "10000 repetitions, more than the limit of 250",
    ),
    "pattern that unrolls": (
        formatted({"type": "string", "pattern": "a{60000}"}),
        "response_format",
        "60000 repetitions",
    ),
    "lengths that unroll": (
        formatted({"anyOf": [{"type": "string", "maxLength": n} for n in (100, 120, 140)]}),
        "response_format",
        "360 repetitions",
    ),
    "references in a ring": (
        formatted(
            {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
                "$ref": "#/$defs/a",
            }
        ),
        "response_format",
        "a $ref that leads to itself",
    ),
    "reference elsewhere": (
        formatted({"$ref": "https://example.org/s.json"}),
        "response_format",
        "outside of its schema",
    ),
    "stop strings": ({"prompt": "x", "stop": list("abcde")}, "stop", "stop=5, more than the limit of 4"),
    "long stop string": ({"prompt": "x", "stop": "a" * 1025}, "stop", "1025 characters"),
    "bad words": (
        {"prompt": "x", "bad_words": ["a"] * 129},
        "bad_words",
        "bad_words=129, more than the limit of 128",
    ),
    "logit_bias": (
        {"prompt": "x", "logit_bias": {str(n): 1 for n in range(301)}},
        "logit_bias",
        "logit_bias=301, more than the limit of 300",
    ),
    "logit_bias key": ({"prompt": "x", "logit_bias": {"1" * 60: 1}}, "logit_bias", "is no token id"),
    "allowed ids": ({"prompt": "x", "allowed_token_ids": list(range(1025))}, "allowed_token_ids", "1025"),
    "stop id": ({"prompt": "x", "stop_token_ids": [2**33]}, "stop_token_ids", "8589934592"),
    "logprobs": ({"prompt": "x", "logprobs": 21}, "logprobs", "logprobs=21, more than the limit of 20"),
    "all logprobs": ({"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs=-1"),
    "logprobs of all": (
        {"prompt": "x", "logprobs": 20, "n": 2, "max_tokens": 1000},
        "logprobs",
        "42000 values, more than the limit of 16384",
    ),
    "number": ({"prompt": "x", "seed": 2**64}, "seed", "18446744073709551616"),
    "number of many digits": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "", "the body is not JSON"),
    "not a number": (b'{"prompt": "x", "temperature": NaN}', "", "NaN is not a number"),
    "infinity": (
        b'{"prompt": "x", "temperature": 1e999}',
        "temperature",
        "temperature is not a finite number",
    ),
    "deep body": (
        b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
        "the body",
        "levels, more than the limit of 64",
    ),
    "deeper body": (b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "", "nested too deeply"),
    "empty messages": ({"messages": [{}] * 5000}, "the body", "objects, more than the limit of 4096"),
    "no object": (b"[1]", "", "the body is a JSON list and not an object"),
    "no JSON": (b"hello", "", "the body is not JSON"),
    "nothing": (b"", "", "the body is not JSON"),
    "seed": ({"prompt": "x", "seed": -(2**64)}, "seed", "less than the limit of -9223372036854775808"),
    "penalty": (
        {"prompt": "x", "use_beam_search": True, "n": 2, "length_penalty": -1e300},
        "length_penalty",
        "length_penalty=-1e+300, less than the limit of -10",
    ),
    "exponent": (
        {"prompt": "x", "use_beam_search": True, "length_penalty": 1e300},
        "length_penalty",
        "1e+300, more than the limit of 10",
    ),
    "negative id": ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids", "less than the limit of 0"),
    "half a pair": (b'{"prompt": "x", "stop": "\\ud800"}', "", "stop has half of a surrogate pair"),
    "half a pair in a list": (b'{"prompt": ["\\udfff x"]}', "", "prompt has half of a surrogate pair"),
    "half a pair as a name": (b'{"prompt": "x", "\\ud800": 1}', "", "? has half of a surrogate pair"),
    "items without end": (
        structured(json={"type": "array", "minItems": 2**62}),
        "structured_outputs.json: minItems",
        "more than the limit of 2147483647",
    ),
    "lengths without end": (
        structured(json='{"minLength": 1e999}'),
        "structured_outputs.json: minLength",
        "has inf, more than the limit of 2147483647",
    ),
    "properties that are counted": (
        formatted({**schema(100), "minProperties": 50}),
        "response_format",
        "more than the limit of 500",
    ),
    "properties that are counted, of tools": (
        chat(tools=[{"function": {"parameters": {**schema(80), "maxProperties": 60}}}]),
        "tools",
        "more than the limit of 500",
    ),
    "optional parts": (structured(regex=".?" * 32), "structured_outputs.regex", "1032 items"),
    "optional parts behind what is escaped": (
        structured(regex=r"\(?" * 32),
        "structured_outputs.regex",
        "1036 items",
    ),
    "optional parts that repeat": (
        formatted({"patternProperties": {"(.?){30}": {}}}),
        "response_format",
        "items, more than the limit of 500",
    ),
    "optional parts of a property": (
        formatted({"type": "string", "pattern": "[a-z?]?" * 30}),
        "response_format",
        "items, more than the limit of 500",
    ),
    "a repetition of many digits": (
        structured(regex="a{2147483648}"),
        "structured_outputs.regex",
        "214748364 repetitions, more than the limit of 250",
    ),
    "structured outputs as a list": (
        {"prompt": "x", "structured_outputs": [{"choice": ["a"]}]},
        "structured_outputs",
        "structured_outputs is no object",
    ),
    "arguments that are deep": (
        chat(
            messages=[
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 3000}}]}
            ]
        ),
        "arguments",
        "3000 levels, more than the limit of 64",
    ),
    "media": (
        picture({"url": "http://169.254.169.254/x"}),
        "messages",
        "the media URL of host '169.254.169.254' is not fetched: lowmem_media_domains names none",
    ),
    "media file": (picture("file:///etc/passwd"), "messages", "is not fetched"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_exceeds_a_limit_is_refused_by_name_and_value(case: str, limits: AdmissionLimits) -> None:
    body, param, said = REFUSED[case]
    engine = Engine()
    status, error = asyncio.run(post(build(limits, engine), body))
    assert (status, error["param"] or "") == (400, param)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("limit_exceeded", "invalid")
    assert engine.bodies == []


ADMITTED: dict[str, Any] = {
    "plain": {"prompt": "Hello", "max_tokens": 4},
    "three quarters of the places": {"prompt": "x", "n": 6, "max_tokens": 1300, "stream": True},
    "a long prompt": {"prompt": "word " * 2000, "max_tokens": 16},
    "as many ids as fit": {"prompt": [1] * 2040, "max_tokens": 8},
    "an answer that the engine shortens": {"prompt": "x", "max_tokens": 100_000},
    "a chat": chat(temperature=0.7, top_p=0.9, top_k=50, stop=["\n"], logit_bias={"50": -1.5}, seed=-(2**63)),
    "a schema": formatted(schema(400)),
    "a tree": formatted(
        {"properties": {"children": {"type": "array", "items": {"$ref": "#"}}, "not": {"$ref": "#"}}}
    ),
    "shared definitions": formatted(
        {"$defs": {"a": {"type": "string"}}, "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
    ),
    "tools": chat(tools=[tool(5)], tool_choice="auto"),
    "choices": structured(choice=["yes", "no"]),
    "no number in a schema's text": structured(json='{"maxLength": NaN}'),
    "a schema's text that is none": structured(json="{"),
    "a pattern": structured(regex=r"\d{3}-\d{4}"),
    "a telephone's number": structured(regex=r"\+?(\d{1,3})?[ -]?\(?\d{3}\)?[ -]?\d{3}[ -]?\d{4}"),
    "lazy parts": structured(regex="(?:a+?b*?c??)" * 12),
    "arguments": chat(
        messages=[
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1, {}]}'}}]}
        ]
    ),
    "an identifier": structured(regex="[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"),
    "strings of one length": formatted(
        {"properties": {f"p{n}": {"type": "string", "maxLength": 255} for n in range(20)}}
    ),
    "logprobs": {"prompt": "x", "logprobs": 5, "max_tokens": 100},
    "scores of a prompt": {"prompt": [1] * 2000, "max_tokens": 1, "prompt_logprobs": 0},
    "empty extension": {"prompt": "x", "vllm_xargs": None},
    "an inline picture": picture({"url": "data:image/png;base64,AA"}),
    "what the engine itself refuses": {"prompt": 7, "max_tokens": "many"},
}


@pytest.mark.parametrize("case", ADMITTED)
def test_what_is_within_the_limits_reaches_the_engine_unchanged(case: str, limits: AdmissionLimits) -> None:
    engine = Engine()
    assert asyncio.run(post(build(limits, engine), ADMITTED[case])) == (200, {})
    assert engine.bodies == [ADMITTED[case]]


def test_named_hosts_may_be_fetched_from(limits: AdmissionLimits) -> None:
    app = build(limits, media_domains=("img.example.org",))
    urls = {
        "https://img.example.org/a.png": 200,
        "https://IMG.example.org:443/a.png": 200,
        "https://img.example.org.evil.net/a.png": 400,
        "https://img.example.org@evil.net/a.png": 400,
        "file://img.example.org/etc/passwd": 400,
        "http://[::1/": 400,
    }
    assert {url: asyncio.run(post(app, picture({"url": url})))[0] for url in urls} == urls


def test_a_body_is_refused_by_its_length_before_it_is_read(limits: AdmissionLimits) -> None:
    async def never() -> dict[str, Any]:
        raise AssertionError("read")

    status, error = ask(limits, b"", headers={"content-length": "9600000"}, receive=never)
    assert status == 413
    assert (
        error["message"] == "the body has 9600000 bytes, more than the limit of 196608; shorten the request"
    )
    assert ask(limits, b"", headers={"content-length": "9" * 5000}, receive=never)[0] == 413


def test_a_body_in_chunks_is_read_no_further_than_the_limit(limits: AdmissionLimits) -> None:
    read = 0

    async def endless() -> dict[str, Any]:
        nonlocal read
        read += 65536
        return {"type": "http.request", "body": b" " * 65536, "more_body": True}

    app = build(limits)
    assert asyncio.run(post(app, b"", receive=endless))[0] == 413
    assert read == 262144
    assert (app.held.bytes["alice"], app.held.requests["alice"]) == (0, 0)


def test_a_compressed_body_is_refused_unread(limits: AdmissionLimits) -> None:
    status, error = ask(limits, {"prompt": "x"}, headers={"content-encoding": "gzip"})
    assert (status, error["code"]) == (415, "unsupported_encoding")
    assert ask(limits, {"prompt": "x"}, headers={"content-encoding": "identity"})[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(
    limits: AdmissionLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "BODY_S", 0.01)

    async def slow() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    assert ask(limits, b"", receive=slow)[0] == 408


def test_only_paths_that_serve_clients_take_a_post(limits: AdmissionLimits) -> None:
    paths = [
        "/pause",
        "/sleep",
        "/abort_requests",
        "/inference/v1/generate",
        "/v1/load_lora_adapter",
        "/invocations",
    ]
    paths += ["/v1/completions/", "/v1/completions/render", "/scale_elastic_ep", "//v1/completions"]
    assert [ask(limits, {"prompt": "x"}, path=path)[0] for path in paths] == [404] * len(paths)
    paths = ["/v1/chat/completions", "/tokenize", "/v1/responses/resp_1/cancel"]
    assert [ask(limits, {"prompt": "x"}, path=path)[0] for path in paths] == [200, 200, 200]


def test_what_asks_for_no_work_passes(limits: AdmissionLimits) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def none() -> dict[str, Any]:
        raise AssertionError("read")

    app = build(limits)
    asyncio.run(app({"type": "http", "method": "GET", "path": "/health", "headers": []}, none, send))
    assert sent[0]["status"] == 200
    asyncio.run(app({"type": "websocket", "path": "/v1/realtime", "headers": []}, none, send))
    assert sent[2] == {"type": "websocket.close", "code": 1008, "reason": "not served here"}


def body_of(name: str, tokens: int = 100, **more: Any) -> dict[str, Any]:
    return {"prompt": "x", "user": name, "max_tokens": tokens, **more}


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def scenario(limits: AdmissionLimits, play: Callable[[Admission, Engine], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = Engine()
        await play(build(limits, engine), engine)

    asyncio.run(run())


def test_the_engine_gets_no_more_than_it_serves_and_a_newcomer_is_next(limits: AdmissionLimits) -> None:
    """Alice fills the engine and queues 20 more; Bob, who was not here before, waits for one answer."""

    async def play(app: Admission, engine: Engine) -> None:
        for n in range(28):
            engine.gates[f"a{n}"] = asyncio.Event()
        flood = [asyncio.ensure_future(post(app, body_of(f"a{n}"))) for n in range(28)]
        await settle()
        assert engine.running == [f"a{n}" for n in range(8)]
        assert app.metrics.waiting.collect()  # the gauge can be read
        assert app.queue.waiting == 20
        bob = asyncio.ensure_future(post(app, body_of("bob"), key="bob"))
        await settle()
        assert not bob.done()
        engine.gates["a3"].set()
        await settle()
        assert bob.result() == (200, {})
        for gate in engine.gates.values():
            gate.set()
        assert [status for status, _ in await asyncio.gather(*flood)] == [200] * 28

    scenario(limits, play)


def test_a_key_that_was_here_lately_finds_a_place_free_at_once(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        for n in range(20):
            engine.gates[f"a{n}"] = asyncio.Event()
        flood = [asyncio.ensure_future(post(app, body_of(f"a{n}"))) for n in range(20)]
        await settle()
        assert len(engine.running) == 7
        for _ in range(5):
            assert await post(app, body_of("bob"), key="bob") == (200, {})
        app.queue.clock = lambda: 1e12  # Bob has not been seen for long
        engine.gates["a0"].set()
        await settle()
        assert len(engine.running) == 8
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*flood)

    scenario(limits, play)


def test_turns_are_weighed_by_tokens_and_not_by_requests(limits: AdmissionLimits) -> None:
    """Alice asks for 1,000 tokens each and Bob for 100: he has ten turns for one of hers."""

    async def play(app: Admission, engine: Engine) -> None:
        engine.gates["first"] = asyncio.Event()
        first = asyncio.ensure_future(post(app, body_of("first", 1)))
        await settle()
        order: list[str] = []

        async def one(name: str, tokens: int) -> None:
            assert await post(app, body_of(name, tokens), key=name) == (200, {})
            order.append(name)

        turns = [asyncio.ensure_future(one("alice", 1000)) for _ in range(4)]
        turns += [asyncio.ensure_future(one("bob", 100)) for _ in range(20)]
        await settle()
        assert order == []
        engine.gates["first"].set()
        await asyncio.gather(first, *turns)
        assert order[:12].count("alice") == 2
        assert order[:22].count("bob") == 20

    scenario(limits.model_copy(update={"places": 1, "sequences": 1}), play)


def test_a_wide_request_is_not_passed_for_ever(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        for n in range(12):
            engine.gates[f"a{n}"] = asyncio.Event()
        rest = [asyncio.ensure_future(post(app, body_of(f"a{n}"))) for n in range(8)]
        await settle()
        wide = asyncio.ensure_future(post(app, body_of("wide", n=4)))
        rest += [asyncio.ensure_future(post(app, body_of(f"a{n}"))) for n in range(8, 12)]
        await settle()
        for n in range(4):
            assert not wide.done()
            engine.gates[f"a{n}"].set()
            await settle()
        assert wide.result() == (200, {})
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*rest)

    scenario(limits, play)


def test_grammars_that_compile_at_once_are_bounded(
    limits: AdmissionLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "COMPILE_S", 0.05)
    heavy = formatted(schema(400))

    async def play(app: Admission, engine: Engine) -> None:
        for n in range(6):
            engine.gates[f"s{n}"] = asyncio.Event()
        asked = [asyncio.ensure_future(post(app, {**heavy, "user": f"s{n}"})) for n in range(6)]
        await settle()
        assert engine.running == ["s0", "s1", "s2", "s3"]  # 671 items each of 3,024
        assert await post(app, body_of("plain"), key="bob") == (200, {})
        engine.gates["s0"].set()
        await settle()
        assert engine.running == ["s1", "s2", "s3", "s4"]
        asked[1].cancel()  # its client leaves, and the compiler goes on
        await settle()
        assert engine.running == ["s2", "s3", "s4"]
        await asyncio.sleep(0.06)
        await settle()
        assert engine.running == ["s2", "s3", "s4", "s5"]
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0.06)
        await settle()
        assert (app.queue.grammar, app.queue.free) == (0, 8)

    scenario(limits, play)


def test_a_client_that_leaves_the_queue_costs_nothing(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        for n in range(8):
            engine.gates[f"a{n}"] = asyncio.Event()
        flood = [asyncio.ensure_future(post(app, body_of(f"a{n}"))) for n in range(8)]
        await settle()
        messages = once(
            {"type": "http.request", "body": json.dumps(body_of("gone")).encode()},
            {"type": "http.disconnect"},
        )

        async def take() -> dict[str, Any]:
            return await anext(messages)

        assert await post(app, b"", receive=take) == (0, {})
        assert (app.queue.waiting, app.held.requests["alice"]) == (0, 8)
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*flood)
        assert "gone" not in [body["user"] for body in engine.bodies]
        assert (app.queue.free, app.held.bytes["alice"], app.held.requests["alice"]) == (8, 0, 0)

    scenario(limits, play)


def test_a_client_that_does_not_read_loses_its_place(
    limits: AdmissionLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine computes the answer all the same; only its client holds it."""
    monkeypatch.setattr(admission, "READ_S", 0.01)
    stuck = asyncio.Event()

    async def play(app: Admission, engine: Engine) -> None:
        async def send(message: Any) -> None:
            await stuck.wait()

        async def one() -> None:
            messages = once({"type": "http.request", "body": json.dumps(body_of("slow")).encode()})

            async def take() -> dict[str, Any]:
                return await anext(messages)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], CLIENT: "s"}
            await app(scope, take, send)

        slow = [asyncio.ensure_future(one()) for _ in range(8)]
        await settle()
        assert app.queue.free == 0
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        stuck.set()
        await asyncio.gather(*slow)
        assert (app.queue.free, app.held.requests["s"]) == (8, 0)

    scenario(limits, play)


def test_one_key_has_so_many_open_requests_and_another_key_its_own(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        engine.gates["a"] = asyncio.Event()
        flood = [asyncio.ensure_future(post(app, body_of("a"))) for _ in range(128)]
        await settle()
        status, error = await post(app, body_of("a"))
        assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "too_many_requests")
        assert error["message"] == "this key has 128 open requests, the limit; wait for their answers"
        assert app.metrics.refused.labels("429")._value.get() == 1
        bob = asyncio.ensure_future(post(app, body_of("bob"), key="bob"))
        engine.gates["a"].set()
        assert await bob == (200, {})
        await asyncio.gather(*flood)

    scenario(limits, play)


def test_one_key_holds_at_most_half_of_the_open_bodies(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        engine.gates["a"] = asyncio.Event()
        big = {**body_of("a"), "prompt": "x" * 30_000}
        flood = [asyncio.ensure_future(post(app, big)) for _ in range(6)]
        await settle()
        status, error = await post(app, big)
        assert status == 429
        assert "more than the limit of 400000 (half of it for one key)" in error["message"]
        assert (await post(app, {**big, "user": "bob"}, key="bob"))[0] == 200
        engine.gates["a"].set()
        await asyncio.gather(*flood)
        assert app.held.bytes.total() == 0

    scenario(limits.model_copy(update={"held_bytes": 400_000, "body_bytes": 40_000}), play)


class Clock:
    """Time that passes only where something waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waits: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(round(seconds, 4))

    def __call__(self) -> float:
        return self.now


def test_a_keys_refusals_are_spaced_and_another_key_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(pace, "REFUSAL_S", 0.025)
    spaced = pace.Pace(clock)

    async def play() -> None:
        for _ in range(4):
            await spaced.refusal("alice")
        assert clock.waits == [0.025, 0.05, 0.075]
        await spaced.refusal("bob")
        assert clock.waits == [0.025, 0.05, 0.075]
        clock.now += 0.09
        await spaced.refusal("alice")
        assert clock.waits == [0.025, 0.05, 0.075, 0.01]
        for _ in range(1000):  # whose clients have left
            await spaced.refusal("alice")
        assert clock.waits[-1] == 4.0

    asyncio.run(play())


def test_a_keys_bodies_take_half_of_the_loops_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(pace, "REQUEST_S", 0.001)
    monkeypatch.setattr(pace, "BYTE_S", 60e-9)
    spaced = pace.Pace(clock)

    async def play() -> None:
        await spaced.body("alice", 1_000_000)
        await spaced.body("alice", 0)
        await spaced.body("alice", 0)
        assert clock.waits == [0.122, 0.124]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("body", "path"),
    [({"prompt": "x", "n": 100}, "/v1/completions"), ({}, "/pause"), ({"user": "ill"}, "/v1/completions")],
)
def test_every_refusal_waits_its_time_ours_and_the_engines(
    body: dict[str, Any], path: str, limits: AdmissionLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Engine):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            assert app.queue.free == 7
            await send({"type": "http.response.start", "status": 422, "headers": []})
            assert app.queue.free == 8  # its place is not kept while it waits
            await send({"type": "http.response.body", "body": b'{"error": {}}'})

    async def play() -> None:
        for _ in range(3):
            assert (await post(app, body, path=path))[0] >= 400

    app = build(limits, Refusing())
    clock = Clock(monkeypatch)
    app.pace.clock = clock
    monkeypatch.setattr(pace, "REFUSAL_S", 0.025)
    asyncio.run(play())
    assert sorted(set(clock.waits)) == [0.025, 0.05]


@pytest.mark.parametrize(
    ("said", "body", "status"),
    [
        (b'{"error": {"message": "Internal server error"}}', structured(regex="a"), 400),
        (b'{"error": {"message": "EngineCore encountered an issue."}}', structured(regex="a"), 500),
        (b'{"error": {"message": "Internal server error"}}', {"prompt": "x"}, 500),
    ],
)
def test_a_grammar_that_the_engine_cannot_compile_is_the_clients_fault(
    said: bytes, body: dict[str, Any], status: int, limits: AdmissionLimits
) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": said})

    seen, error = asyncio.run(post(build(limits, failing), body))
    assert seen == status
    assert ("cannot compile what has to constrain the answer" in error["message"]) == (status == 400)


def test_a_path_that_this_model_does_not_serve_is_refused_in_openais_shape(limits: AdmissionLimits) -> None:
    class App:
        routes = (type("Route", (), {"path": "/v1/completions"}), object())

    async def play() -> None:
        engine = Engine()
        app = build(limits, engine)
        for path, status in (("/v1/completions", 200), ("/pooling", 404)):
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            messages = once({"type": "http.request", "body": b'{"prompt": "x"}'})
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": App}
            await app(scope, messages.__anext__, send)
            assert sent[0]["status"] == status
        assert json.loads(sent[1]["body"])["error"]["message"] == "POST /pooling is not served here"
        assert len(engine.bodies) == 1

    asyncio.run(play())


def test_a_key_lists_models_at_its_pace(limits: AdmissionLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async def send(message: Any) -> None: ...

        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], CLIENT: "alice"}
        for _ in range(3):
            await app(scope, once().__anext__, send)

    app = build(limits)
    clock = Clock(monkeypatch)
    app.pace.clock = clock
    monkeypatch.setattr(pace, "REQUEST_S", 0.001)
    asyncio.run(play())
    assert clock.waits == [0.002, 0.004]


def long_prompt(name: str, tokens: int = 1500, **more: Any) -> dict[str, Any]:
    return {"prompt": [1] * tokens, "user": name, "max_tokens": 4, **more}


def test_one_long_prompt_of_a_key_is_computed_at_a_time_while_others_are_here(
    limits: AdmissionLimits,
) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        for n in range(4):
            engine.gates[f"a{n}"] = asyncio.Event()
        alone = [asyncio.ensure_future(post(app, long_prompt(f"a{n}"))) for n in range(2)]
        await settle()
        assert engine.running == ["a0", "a1"]  # nobody else is here
        engine.gates["a0"].set()
        engine.gates["a1"].set()
        await asyncio.gather(*alone)
        engine.gates["a0"].clear()
        engine.gates["a1"].clear()
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        flood = [asyncio.ensure_future(post(app, long_prompt(f"a{n}"))) for n in range(4)]
        await settle()
        assert engine.running == ["a0"]
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        engine.gates["a0"].set()
        await settle()
        assert engine.running == ["a1"]
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*flood)
        assert app.queue.clients["alice"].prompt == 0

    scenario(limits, play)


def test_short_prompts_of_a_key_are_computed_together(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        for n in range(6):
            engine.gates[f"a{n}"] = asyncio.Event()
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        flood = [asyncio.ensure_future(post(app, long_prompt(f"a{n}", 40))) for n in range(6)]
        await settle()
        assert engine.running == ["a0", "a1", "a2"]  # of 40 tokens each, of 128
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*flood)

    scenario(limits, play)


def test_an_answer_that_is_no_stream_holds_the_next_prompt_for_the_planned_time(
    limits: AdmissionLimits,
) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        for n in range(2):
            engine.gates[f"a{n}"] = asyncio.Event()
        assert await post(app, body_of("bob"), key="bob") == (200, {})
        flood = [asyncio.ensure_future(post(app, long_prompt(f"a{n}"))) for n in range(2)]
        await settle()
        assert engine.running == ["a0"]
        await asyncio.sleep(0.1)  # 1,500 tokens of 20 us
        assert engine.running == ["a0", "a1"]
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*flood)

    scenario(limits.model_copy(update={"prompt_token_s": 2e-5}), play)


def test_a_wide_request_that_waits_leaves_the_kept_places_to_others(limits: AdmissionLimits) -> None:
    """Alice holds three places of eight and waits for six; Bob and Carol find the two that are kept."""

    async def play(app: Admission, engine: Engine) -> None:
        names = ["a0", "wide", "b", "c", "d"]
        for name in names:
            engine.gates[name] = asyncio.Event()
        asked = [asyncio.ensure_future(post(app, body_of("a0", n=3), key="alice"))]
        await settle()
        asked.append(asyncio.ensure_future(post(app, body_of("wide", 1, n=6), key="dave")))
        await settle()
        assert engine.running == ["a0"]
        for name in "bcd":
            asked.append(asyncio.ensure_future(post(app, body_of(name), key=name)))
            await settle()
        assert engine.running == ["a0", "b", "c"]  # a third would keep the wide one out
        engine.gates["a0"].set()
        await settle()
        assert engine.running == ["b", "c", "wide"]
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*asked)
        assert (app.queue.free, app.queue.passing) == (8, 0)

    scenario(limits, play)


def test_bodies_that_arrive_slowly_leave_half_of_a_keys_requests(limits: AdmissionLimits) -> None:
    async def play(app: Admission, engine: Engine) -> None:
        stuck = asyncio.Event()

        async def slow() -> dict[str, Any]:
            await stuck.wait()
            return {"type": "http.disconnect"}

        asked = [asyncio.ensure_future(post(app, b"", receive=slow)) for _ in range(64)]
        await settle()
        status, error = await post(app, b"", receive=slow)
        assert (status, error["message"]) == (
            429,
            "the bodies of 64 requests of this key are arriving, the limit; send them faster",
        )
        stuck.set()
        await asyncio.gather(*asked)
        assert await post(app, body_of("a")) == (200, {})

    scenario(limits, play)


def test_the_demos_limits(limits: AdmissionLimits) -> None:
    assert limits.model_dump() == {
        "places": 8,
        "kept_places": 2,
        "prompt_at_once": 128,
        "prompt_token_s": 0.0054,
        "max_model_len": 2048,
        "body_bytes": 196_608,
        "held_bytes": 2_796_202,
        "open_requests": 128,
        "sequences": 6,
        "request_tokens": 8192,
        "prompt_bytes": 32_768,
        "json_depth": 64,
        "json_objects": 4096,
        "json_values": 73_728,
        "grammar_items": 500,
        "grammar_bytes": 32_768,
        "grammar_depth": 32,
        "grammar_repeats": 250,
        "grammar_at_once": 3024,
        "grammar_cache_bytes": 25_165_824,
        "stop_strings": 4,
        "bad_words": 128,
        "token_ids": 1024,
        "logit_bias": 300,
        "logprobs": 20,
        "logprob_values": 16_384,
        "media_domains": (),
        "memory_bytes": 81_788_922,
    }


def test_the_plan_counts_what_open_requests_cost_and_tells_server_and_engine() -> None:
    plan = make_plan(
        PlanRequest("demo_cpu", deploy={**DEPLOY, "media_domains": ["a.org", "b.org"]}, search=False)
    )
    assert plan.load_growth["admission"] == 81_788_922
    named = {v.name: v.value for v in plan.environment}
    assert AdmissionLimits.model_validate_json(named["LOWMEM_ADMISSION"]) == plan.admission
    engine = {
        name: value for name, value in named.items() if name.startswith(("VLLM_MAX", "VLLM_XG", "VLLM_MED"))
    }
    assert engine == {
        "VLLM_MAX_N_SEQUENCES": "6",
        "VLLM_MAX_COMPLETION_PROMPTS": "6",
        "VLLM_MAX_STOP_STRINGS": "4",
        "VLLM_MAX_NUM_BAD_WORDS": "128",
        "VLLM_XGRAMMAR_CACHE_MB": "24",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    at = plan.argv.index("--middleware")
    assert plan.argv[at : at + 7] == [
        "--middleware",
        "lowmem.service.admission.Admission",
        "--middleware",
        "lowmem.api_keys.ApiKeys",
        "--allowed-media-domains",
        "a.org",
        "b.org",
    ]


def test_one_key_may_always_send_the_whole_load() -> None:
    plan = make_plan(PlanRequest("demo_cpu", deploy=DEPLOY, clients=400, input_tokens=1000, search=False))
    assert plan.admission is not None
    assert (plan.admission.open_requests, plan.admission.held_bytes) == (800, 7_219_200)


def test_on_a_gpu_open_requests_cost_the_host() -> None:
    plan = make_plan(PlanRequest("low_mem", deploy=DEPLOY, search=False))
    assert plan.host_ram["admission"] == 354_417_664
    assert "admission" not in plan.load_growth


def test_without_limits_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "start the server by the deployment's low_mem.sh, whose environment has the plan's limits"
    monkeypatch.delenv("LOWMEM_ADMISSION", raising=False)
    with pytest.raises(RuntimeError, match=advice):
        read_limits()
    monkeypatch.setenv("LOWMEM_ADMISSION", '{"places": 0}')
    with pytest.raises(
        RuntimeError, match="LOWMEM_ADMISSION: places: Input should be greater than or equal to 1"
    ):
        read_limits()
