"""What clients do wrong, to the real engine: it refuses them, goes on, and loses nobody else's request."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from .conftest import Service
from .ledger import Entry, Ledger, SlowReader

pytestmark = pytest.mark.engine


@pytest.fixture
def same_engine(service: Service) -> Iterator[Service]:
    """The service; after the test the same processes must be there, and answer."""
    before = service.family()
    yield service
    assert service.family() == before
    assert service.client.complete(4).end == "answer"


def body(service: Service, **more: Any) -> bytes:
    return json.dumps({"model": service.client.model, "prompt": "Hello", "max_tokens": 4, **more}).encode()


def malformed(service: Service) -> dict[str, bytes]:
    return {
        "nothing": b"",
        "no JSON": b"hello",
        "cut JSON": body(service)[:-5],
        "not UTF-8": b'{"model": "\xff\xfe"}',
        "an array": b"[1, 2, 3]",
        "null": b"null",
        "nested": b"[" * 2000 + b"]" * 2000,
        "no prompt": json.dumps({"model": service.client.model}).encode(),
        "a number for a prompt": body(service, prompt=7),
        "an empty prompt": body(service, prompt=[]),
        "tokens beyond the vocabulary": body(service, prompt=[10**9]),
        "negative tokens": body(service, prompt=[-1]),
        "no tokens wanted": body(service, max_tokens=-1),
        "a word for a number": body(service, max_tokens="many"),
        "a temperature below zero": body(service, temperature=-1),
        "top_p above one": body(service, top_p=7),
        "too many logprobs": body(service, logprobs=10_000),
        "another model": body(service, model="no-such-model"),
        "an unknown schema": body(service, structured_outputs={"json": "{"}),
        "a broken expression": body(service, structured_outputs={"regex": "(["}),
    }


@pytest.mark.fault("malformed-requests")
def test_malformed_requests_are_refused(same_engine: Service, fault: Any) -> None:
    statuses = {name: same_engine.client.raw(bad).status for name, bad in malformed(same_engine).items()}
    assert {name: status for name, status in statuses.items() if not 400 <= status < 500} == {}
    fault.saw(f"{len(statuses)} kinds refused: {tally(statuses.values())}")


@pytest.mark.fault("huge-prompts")
def test_huge_prompts_are_refused(same_engine: Service, fault: Any) -> None:
    prompts: dict[str, Any] = {
        "3,000 tokens": [11] * 3000,
        "1 MB": "word " * 200_000,
        "20 MB": "word " * 4_000_000,
    }
    entries = {
        name: same_engine.client.raw(body(same_engine, prompt=prompt)) for name, prompt in prompts.items()
    }
    assert {name: entry.status for name, entry in entries.items() if not 400 <= entry.status < 500} == {}
    fault.saw(", ".join(f"{name}: {entry.status}" for name, entry in entries.items()))


@pytest.mark.fault("invalid-storm")
def test_a_thousand_invalid_requests_do_not_touch_a_valid_one(same_engine: Service, fault: Any) -> None:
    client = same_engine.client
    kinds = [
        b"hello",
        body(same_engine, model="no-such-model"),
        body(same_engine, max_tokens=-1),
        body(same_engine, prompt=[11] * 3000),
    ]
    with ThreadPoolExecutor(17) as pool:
        stream = pool.submit(client.complete, 300, "A long story: ", True)
        client.until_running(1)
        entries = list(pool.map(lambda n: client.raw(kinds[n % 4]), range(1000)))
        streaming = not stream.done()
        valid = stream.result()
    assert len(entries) == 1000
    assert {entry.status for entry in entries} <= {400, 404, 422}
    assert (valid.end, valid.tokens) == ("answer", 300)
    fault.saw(f"1,000 requests refused: {tally(e.status for e in entries)}; the stream had its 300 tokens")
    if not streaming:
        fault.saw("the stream was complete before the last of them")


@pytest.mark.fault("wrong-key")
def test_a_wrong_key_opens_nothing(same_engine: Service, fault: Any) -> None:
    client = same_engine.client
    wrong = "sk-wrong-0123456789abcdef"
    with ThreadPoolExecutor(9) as pool:
        stream = pool.submit(client.complete, 100, "A story: ", True)
        client.until_running(1)
        keys = [wrong, "", client.key[:20]] * 20
        entries = list(pool.map(lambda key: client.raw(body(same_engine), key=key), keys))
        valid = stream.result()
    assert Counter(entry.status for entry in entries) == {401: 60}
    assert (valid.end, valid.tokens) == ("answer", 100)
    assert wrong not in same_engine.log()
    assert client.key not in same_engine.log()
    fault.saw("60 times 401; the stream had its 100 tokens; no key in the log")


@pytest.mark.fault("slow-client")
def test_slow_and_vanished_clients_hold_nobody_up(same_engine: Service, fault: Any) -> None:
    client = same_engine.client
    slow = SlowReader(client, tokens=100, sip_bytes=512, pause_s=0.1)
    slow.start()
    gone = SlowReader(client, tokens=2000, sip_bytes=1, pause_s=0)
    client.until_running(2)
    assert client.complete(8).end == "answer"
    gone.socket.close()
    slow.join(120)
    assert not slow.is_alive()
    assert slow.text.rstrip().endswith(b"0") or b"data: [DONE]" in slow.text
    assert slow.text.count(b'"text":') >= 100
    began = time.monotonic()
    client.until_running(0, timeout_s=30)
    fault.saw(
        "the slow client had its 100 tokens, another was answered meanwhile, the vanished one's place was"
        f" free within {seconds(began)}"
    )


def seconds(began: float) -> str:
    return f"{max(1, round(time.monotonic() - began))} s"


@pytest.mark.fault("too-many-requests")
def test_ten_times_the_concurrency_waits_its_turn(
    same_engine: Service, watched: Callable[[Service, float], Any], fault: Any
) -> None:
    """A watchdog with a limit far below what the last of them waits leaves the busy engine alone."""
    with watched(same_engine, 10) as said:
        ledger = flood(same_engine)
        assert ledger.ends == {"answer": 80}
        assert "ended" not in said.read_text()
    fault.saw(f"{ledger}; the watchdog said nothing")


def flood(service: Service) -> Ledger:
    """80 requests at once, each with a prompt of its own of up to 1,000 tokens."""
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 1000) for _ in range(rng.choice([10, 50, 200]))] for _ in range(80)]
    ledger = Ledger()
    with ThreadPoolExecutor(80) as pool:
        ledger.entries = list(
            pool.map(lambda n: service.client.complete(8, prompts[n], n % 2 == 0), range(80))
        )
    return ledger


def tally(statuses: Any) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(Counter(statuses).items()))


def test_the_ledger_knows_a_short_answer_from_a_complete_one(service: Service) -> None:
    """The end of the context comes before the wanted tokens: a request that is answered, and not as it was
    asked.
    """
    entry: Entry = service.client.raw(body(service, max_tokens=2))
    assert (entry.end, entry.tokens) == ("answer", 2)
