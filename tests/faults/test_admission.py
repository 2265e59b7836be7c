"""Work beyond the plan's limits, to the real engine: it is refused, and one key does not starve another."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import Service
from .ledger import Client, Entry

pytestmark = pytest.mark.engine

MIB = 2**20
OTHER = "sk-polite-0123456789abcdef"


def schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(properties)}}


def formatted(spec: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": spec}}}


TOO_MUCH: dict[str, dict[str, Any]] = {
    "a truncated prompt of 9 MiB": {"prompt": "a 1 " * 2_400_000, "truncate_prompt_tokens": 5},
    "a truncated prompt of 40 KB": {"prompt": "a 1 " * 10_000, "truncate_prompt_tokens": 5},
    "16,384 sequences": {"n": 16384, "max_tokens": 2000, "stream": True},
    "1,024 prompts x 64": {"prompt": ["x"] * 1024, "n": 64},
    "2,000 properties": formatted(schema(2000)),
    "100,000 choices": {"structured_outputs": {"choice": [str(n) for n in range(100_000)]}},
    "an endless reference": formatted({"$ref": "#"}),
    "items without end": {"structured_outputs": {"json": {"type": "array", "minItems": 2**62}}},
    "64 optional parts": {"structured_outputs": {"regex": ".?" * 64}},
    "a grammar that never ends": {"structured_outputs": {"grammar": "root ::= root"}},
    "half of a surrogate pair": {"stop": "\ud800"},
    "an exponent of 1e300": {"use_beam_search": True, "n": 2, "length_penalty": -1e300},
    "top_k of 2^70": {"top_k": 2**70},
    "vllm_xargs": {"vllm_xargs": {"a": "b"}},
}


def memory_mib(service: Service) -> float:
    return sum(process.memory_info().rss for process in service.family().values()) / MIB


def post(
    client: Client, body: bytes, headers: dict[str, str], path: str = "/v1/completions"
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(client.url).netloc, timeout=60)
    named = {"Authorization": f"Bearer {client.key}", "Content-Type": "application/json", **headers}
    connection.request("POST", path, body, named)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.fault("too-much-work")
def test_too_much_work_is_refused_before_the_engine_sees_it(
    service: Service, deployed: Any, fault: Any
) -> None:
    client, before, family = service.client, memory_mib(service), service.family()
    began = time.monotonic()
    entries: dict[str, Entry] = {}
    for name, more in TOO_MUCH.items():
        entries[name] = client.raw(json.dumps({"model": client.model, "prompt": "x", **more}).encode())
    assert {name: e.status for name, e in entries.items() if e.status not in (400, 413)} == {}
    assert [name for name, e in entries.items() if json.loads(e.said)["error"]["message"] == ""] == []
    bomb = gzip.compress(b" " * (100 * MIB))
    assert post(client, bomb, {"Content-Encoding": "gzip"})[0] == 415
    assert post(client, b"{}", {}, "/pause")[0] == 404
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    chat = {"model": client.model, "messages": [{"role": "user", "content": [part]}]}
    status, said = post(client, json.dumps(chat).encode(), {}, "/v1/chat/completions")
    assert status == 400
    assert "lowmem_media_domains names none" in said
    took = time.monotonic() - began
    assert client.complete(4).end == "answer"
    assert service.family() == family
    grown = memory_mib(service) - before
    assert grown < deployed.plan["admission"]["memory_bytes"] / MIB
    fault.saw(
        f"{len(entries) + 3} kinds refused in {max(1, round(took))} s;"
        f" {max(0, round(grown))} MiB more resident"
    )


@pytest.fixture
def polite(service: Service) -> Iterator[Client]:
    """A client with a key of its own, which the server reads without a restart."""
    keys = service.root / "etc/vllm.env"
    text = keys.read_text()
    keys.write_text(f"{text.rstrip()}\nVLLM_API_KEY_polite={OTHER}\n")
    yield replace(service.client, key=OTHER)
    keys.write_text(text)


@pytest.mark.fault("flooding-key")
def test_a_key_that_floods_does_not_starve_another(service: Service, polite: Client, fault: Any) -> None:
    assert polite.complete(2).end == "answer"
    client, family = service.client, service.family()
    body = {
        "model": client.model,
        "prompt": "x",
        "n": 4,
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    connections = [http.client.HTTPConnection(urlsplit(client.url).netloc, timeout=600) for _ in range(16)]
    headers = {"Authorization": f"Bearer {client.key}", "Content-Type": "application/json"}
    ended = threading.Event()

    def read(connection: http.client.HTTPConnection) -> None:
        try:
            connection.getresponse().read()
            ended.set()
        except (OSError, http.client.HTTPException, AttributeError, ValueError):
            return  # the test has closed it

    for connection in connections:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
    readers = [threading.Thread(target=read, args=(one,), daemon=True) for one in connections]
    for reader in readers:
        reader.start()
    client.until_running(4)
    entries = [polite.complete(2) for _ in range(5)]
    assert not ended.is_set(), "the polite client has to be answered while all of the flood is open"
    assert [entry.end for entry in entries] == ["answer"] * 5
    for connection in connections:
        if connection.sock is not None:
            connection.sock.shutdown(2)
    client.until_running(0, timeout_s=120)
    assert service.family() == family
    fault.saw("5 requests of the other key answered while 16 requests for 4 x 2,000 tokens ran or waited")
