"""When the gateway says that a request can be completed: the judgement, with a clock of the test's own."""

from __future__ import annotations

import math

import pytest

from lowmem.service.gateway_health import Health, metrics


class Engine:
    """What a server answers next."""

    def __init__(self) -> None:
        self.seen: tuple[str, ...] | None = ("0",)
        self.running = False
        self.answer = "tokens"
        self.asked = 0

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        return self.seen

    def busy(self) -> bool:
        return self.running

    def tokens(self) -> float | None:
        return None

    def complete(self, timeout_s: float) -> str:
        self.asked += 1
        return self.answer


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def health(engine: Engine) -> Health:
    return Health(engine, 60)  # type: ignore[arg-type]


def test_nothing_is_said_before_a_completion(engine: Engine, health: Health) -> None:
    assert health.trouble(0) == "not asked yet"
    engine.answer = "nothing"
    health.look(0)
    assert health.trouble(0) == "starting"
    engine.answer = "tokens"
    health.look(2)
    assert health.trouble(2) == ""


def test_a_busy_engine_is_never_asked(engine: Engine, health: Health) -> None:
    health.look(0)
    engine.running = True
    for second in range(2, 200, 2):
        engine.seen = (str(second),)
        health.look(second)
        assert health.trouble(second) == ""
    assert engine.asked == 1


def test_an_idle_engine_is_asked_once_in_a_quarter_of_the_limit(engine: Engine, health: Health) -> None:
    for second in range(0, 61, 2):
        health.look(second)
        assert health.trouble(second) == ""
    assert engine.asked == 4


def test_a_hung_engine_is_a_no_after_the_limit_and_a_yes_when_it_moves(
    engine: Engine, health: Health
) -> None:
    health.look(0)
    engine.running, engine.answer = True, "nothing"
    health.look(58)
    assert health.trouble(58) == ""
    health.look(60)
    assert health.trouble(60) == "hung"
    engine.seen = ("1",)
    health.look(62)
    assert health.trouble(62) == ""


def test_a_server_that_is_gone_is_a_no_at_once(engine: Engine, health: Health) -> None:
    health.look(0)
    engine.seen, engine.answer = None, "nothing"
    health.look(2)
    assert health.trouble(2) == "starting"
    assert health.sign_age_s(2) == math.inf


def test_a_refused_key_is_a_no(engine: Engine, health: Health) -> None:
    engine.answer = "refused"
    health.look(0)
    assert health.trouble(0) == "the server refuses this key or model: its engine cannot be judged"


def test_a_judgement_that_is_too_old_is_a_no(health: Health) -> None:
    health.look(0)
    assert health.trouble(60) == ""
    assert health.trouble(61) == "last looked 61 s ago"


def test_the_same_in_prometheus_words(engine: Engine, health: Health) -> None:
    assert "\nlowmem_gateway_can_complete 0\n" in metrics(health, 0, "")
    assert "\nlowmem_gateway_engine_sign_age_seconds +Inf\n" in metrics(health, 0, "")
    health.look(0)
    text = metrics(health, 3.5, "more 1\n")
    assert "\nlowmem_gateway_can_complete 1\n" in text
    assert text.endswith("\nlowmem_gateway_engine_sign_age_seconds 3.5\nmore 1\n")
