"""The server's key check: what is open, what a key opens, and that a changed file counts at once."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lowmem.service.api_keys import ApiKeys, read_keys

ALICE, BOB = "sk-alice-0123456789abcdef", "sk-bob-0123456789abcdef"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vllm.env"
    monkeypatch.setenv("LOWMEM_API_KEYS", str(path))
    write(path, f"VLLM_API_KEY={ALICE}\nVLLM_API_KEY_alice={ALICE}\n")
    return path


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})
    elif scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "lifespan.startup.complete"})


def ask(
    guard: ApiKeys, path: str = "/v1/completions", authorization: str | None = None, **more: Any
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, **more}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return sent


def status(*arguments: Any, **more: Any) -> int:
    return int(ask(*arguments, **more)[0]["status"])


def test_every_path_but_health_and_metrics_needs_a_key(file: Path) -> None:
    guard = ApiKeys(app)
    paths = [
        "/v1/completions",
        "/inference/v1/generate",
        "/tokenize",
        "/invocations",
        "/scale_elastic_ep",
        "/load",
        "/version",
        "/docs",
    ]
    paths += ["/ping", "/", "/no-such", "/health/", "/healthz", "/v1/../health", "//health", "/metrics/x"]
    assert [path for path in paths if status(guard, path) != 401] == []
    assert [path for path in paths if status(guard, path, f"Bearer {ALICE}") != 200] == []
    assert [status(guard, path) for path in ("/health", "/metrics")] == [200, 200]
    assert status(guard, "/api/health", root_path="/api") == 200
    assert status(guard, "/api/v1/models", root_path="/api") == 401


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        ALICE,
        f"Basic {ALICE}",
        f"Bearer  {ALICE}",
        f"Bearer {ALICE} ",
        f"Bearer {ALICE[:-1]}",
        "Bearer é",
    ],
)
def test_what_is_no_key_opens_nothing(file: Path, sent: str | None) -> None:
    answer = ask(ApiKeys(app), authorization=sent)
    assert answer[0]["status"] == 401
    assert (b"www-authenticate", b"Bearer") in answer[0]["headers"]
    assert answer[1]["body"] == b'{"error":"Unauthorized"}'


def test_the_scheme_is_read_as_vllm_reads_it(file: Path) -> None:
    assert status(ApiKeys(app), authorization=f"bearer {ALICE}") == 200


def test_a_browser_may_ask_first_and_a_server_may_start(file: Path) -> None:
    assert status(ApiKeys(app), method="OPTIONS") == 200
    assert ask(ApiKeys(app), type="lifespan")[0]["type"] == "lifespan.startup.complete"


def test_a_websocket_needs_a_key_too(file: Path) -> None:
    guard = ApiKeys(app)
    for path in ("/v1/realtime", "/health"):
        assert ask(guard, path, type="websocket")[0] == {
            "type": "websocket.close",
            "code": 1008,
            "reason": "Unauthorized",
        }
        assert (
            ask(guard, path, type="websocket", extensions={"websocket.http.response": {}})[0]["status"] == 401
        )
        assert ask(guard, path, f"Bearer {ALICE}", type="websocket")[0]["type"] == "websocket.accept"


def test_a_changed_file_counts_with_the_next_request(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guard = ApiKeys(app)
    assert (status(guard, authorization=f"Bearer {ALICE}"), status(guard, authorization=f"Bearer {BOB}")) == (
        200,
        401,
    )
    write(file, f"VLLM_API_KEY={BOB}\nVLLM_API_KEY_alice={ALICE}\nVLLM_API_KEY_bob={BOB}\n")
    assert (status(guard, authorization=f"Bearer {ALICE}"), status(guard, authorization=f"Bearer {BOB}")) == (
        200,
        200,
    )
    write(file, f"VLLM_API_KEY={BOB}\nVLLM_API_KEY_bob={BOB}\n")
    assert (status(guard, authorization=f"Bearer {ALICE}"), status(guard, authorization=f"Bearer {BOB}")) == (
        401,
        200,
    )
    assert [record.message for record in caplog.records] == [
        "API keys: alice",
        "API keys: alice, bob",
        "API keys: bob",
    ]


def test_a_key_of_the_same_length_written_in_place_counts_too(file: Path) -> None:
    guard = ApiKeys(app)
    assert status(guard, authorization=f"Bearer {ALICE}") == 200
    times = file.stat()
    file.write_text(file.read_text().replace("alice-0", "alice-9"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert status(guard, authorization=f"Bearer {ALICE}") == 401
    assert status(guard, authorization="Bearer sk-alice-9123456789abcdef") == 200


def test_a_file_that_is_gone_or_empty_shuts_nobody_out_and_lets_nobody_in(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = ApiKeys(app)
    assert status(guard, authorization=f"Bearer {ALICE}") == 200
    for change in (
        file.unlink,
        lambda: file.write_text("# nothing\n"),
        lambda: file.write_bytes(b"VLLM_API_KEY=\xff\n"),
    ):
        change()
        assert (status(guard, authorization=f"Bearer {ALICE}"), status(guard, authorization="Bearer ")) == (
            200,
            401,
        )
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 3
    assert ALICE not in caplog.text


def test_without_any_file_nothing_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (str(tmp_path / "none"), ""):
        monkeypatch.setenv("LOWMEM_API_KEYS", value)
        guard = ApiKeys(app)
        assert [status(guard, authorization=sent) for sent in (None, "Bearer ", "Bearer x")] == [
            401,
            401,
            401,
        ]


def test_what_is_read() -> None:
    text = (
        "# VLLM_API_KEY_no=1\nVLLM_API_KEY='a~b'\nVLLM_API_KEY_x=c\n"
        "VLLM_API_KEYS=d\nOTHER=e\nVLLM_API_KEY_empty=\n"
    )
    assert read_keys(text) == {"": "a~b", "x": "c"}
