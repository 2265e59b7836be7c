"""What is read out of a server's /metrics, against figures that are written out here."""

from __future__ import annotations

import pytest

from lowmem.status.metrics import Histogram, Sample, idle_since, parse, window

from .conftest import recorded

HISTOGRAM = Histogram(bounds=(0.1, 0.5, 1.0), counts=(6, 11, 14, 19))
"""6 observations up to 0.1, 5 more up to 0.5, 3 more up to 1, and 5 above."""


@pytest.mark.parametrize(
    ("q", "value"),
    [
        (0.5, 0.1 + 0.4 * (9.5 - 6) / 5),  # rank 9.5 lies in the second bucket
        (6 / 19, 0.1),  # on a bound
        (0.1, 0.1 * 1.9 / 6),  # the first bucket begins at 0
        (0.7, 0.5 + 0.5 * (13.3 - 11) / 3),
        (0.99, 1.0),  # the open bucket gives the highest bound
    ],
)
def test_quantiles_are_those_of_prometheus(q: float, value: float) -> None:
    assert HISTOGRAM.quantile(q) == pytest.approx(value)


def test_nothing_observed_has_no_quantile() -> None:
    assert Histogram().quantile(0.5) is None
    assert Histogram(bounds=(1.0,), counts=(0, 0)).quantile(0.5) is None


def test_an_empty_bucket_is_passed_over() -> None:
    assert Histogram(bounds=(1, 2, 4), counts=(0, 0, 10, 10)).quantile(0.5) == 3


def test_the_difference_of_two_looks() -> None:
    later = Histogram(bounds=HISTOGRAM.bounds, counts=(6, 12, 16, 22))
    assert later.since(HISTOGRAM).counts == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "earlier",
    [Histogram(bounds=(0.1, 0.5, 1.0), counts=(7, 11, 14, 19)), Histogram(bounds=(2.0,), counts=(0, 0))],
)
def test_a_server_that_started_anew_begins_at_zero(earlier: Histogram) -> None:
    assert HISTOGRAM.since(earlier) == HISTOGRAM


def test_a_real_servers_first_requests() -> None:
    """15 health checks of one token and one request of four: the server counts the checks as 0 ms a token,
    which they are not.
    """
    seen = parse(recorded("probes"), at=1795534600.0)
    assert (seen.running, seen.waiting, seen.kv_usage, seen.kv_tokens) == (0, 0, 0.0, 11648)
    assert (seen.prompt_tokens, seen.generation_tokens, seen.preemptions) == (16, 19, 0)
    assert seen.started == 1795534420.99
    assert seen.finished == {"stop": 0, "length": 16, "abort": 0, "error": 0, "repetition": 0}
    assert seen.ttft.total == 16
    assert seen.ttft.quantile(0.5) == 1.0
    assert seen.tpot.total == 1
    assert seen.tpot.quantile(0.5) == 1.75
    assert seen.itl.total == 3


def test_a_known_load_on_a_real_server() -> None:
    """10 clients, 3 requests each of 128 tokens in and 32 out, on a CPU that others used too; one request of
    one token before.
    """
    idle, loaded, after = (
        parse(recorded(name), at)
        for name, at in (("idle", 1795536118.469), ("loaded", 1795536124.604), ("after", 1795536369.777))
    )
    assert (idle.running, loaded.running, after.running) == (0, 1, 0)
    assert loaded.kv_usage == pytest.approx(1 / 90)
    seen = window(after, idle)
    assert (seen.requests, seen.prompt_tokens, seen.output_tokens, seen.preemptions) == (
        30,
        30 * 128,
        30 * 32,
        0,
    )
    assert seen.output_tokens_per_s == pytest.approx(960 / 251.308)
    assert (seen.ttft.total, seen.tpot.total, seen.itl.total) == (30, 30, 30 * 31)
    assert [seen.tpot.quantile(q) for q in (0.5, 0.9, 0.99)] == pytest.approx([1.75, 2.35, 2.485])
    assert [seen.ttft.quantile(q) for q in (0.5, 0.9, 0.99)] == pytest.approx([15.5, 60, 78])
    assert window(after, None).seconds == pytest.approx(after.at - 1795535946.29)


def test_what_is_no_vllm_server_is_said() -> None:
    with pytest.raises(ValueError, match="no vllm:num_requests_running among the metrics"):
        parse("process_start_time_seconds 1.0\n", at=0)


def test_engines_of_one_server_are_taken_together() -> None:
    text = (
        '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"}'
        ' 3\nvllm:num_requests_running{engine="1"} 4\n# TYPE vllm:kv_cache_usage_perc'
        ' gauge\nvllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.25\n# TYPE'
        ' vllm:generation_tokens_total counter\nvllm:generation_tokens_total{engine="0"}'
        ' 10\nvllm:generation_tokens_total{engine="1"} 5\n# TYPE vllm:time_to_first_token_seconds histogram\n'
        + "".join(
            f'vllm:time_to_first_token_seconds_bucket{{engine="{e}",le="{le}"}} {n}\n'
            for e in "01"
            for le, n in (("0.1", 1), ("0.25", 3), ("+Inf", 4))
        )
    )
    seen = parse(text, at=0)
    assert (seen.running, seen.kv_usage, seen.generation_tokens, seen.kv_tokens, seen.started) == (
        7,
        0.375,
        15,
        None,
        None,
    )
    assert seen.ttft == Histogram(bounds=(0.1, 0.25), counts=(2, 6, 8))


def look(at: float, tokens: float = 0, running: int = 0, started: float = 1.0) -> Sample:
    return Sample(
        at=at,
        started=started,
        running=running,
        generation_tokens=tokens,
        prompt_tokens=10,
        finished={"length": tokens / 10},
    )


def test_rates_are_of_the_time_between_two_looks() -> None:
    seen = window(look(130, 500), look(100, 200))
    assert (seen.seconds, seen.output_tokens_per_s, seen.requests) == (30, 10, 30)


@pytest.mark.parametrize("earlier", [None, look(100, 200, started=0.5), look(100, 900)])
def test_without_an_earlier_look_at_the_same_server_they_are_since_its_start(earlier: Sample | None) -> None:
    seen = window(look(101, 500), earlier)
    assert (seen.seconds, seen.output_tokens_per_s, seen.requests) == (100, 5, 50)


def test_an_engine_that_hangs_shows_running_requests_and_no_token() -> None:
    busy = [look(0, 5, 2), look(60, 9, 2)]
    assert idle_since([*busy, look(120, 9, 2), look(180, 9, 2)]) == 60
    assert idle_since([*busy, look(120, 9, 2), look(180, 10, 2)]) is None
    assert idle_since([look(0, 9, 0), look(60, 9, 0)]) is None
    assert idle_since([look(0, 9, 0), look(60, 9, 1)]) is None
    assert idle_since([]) is None


def test_a_step_gives_a_request_its_own_token_and_the_accepted_drafts() -> None:
    """300 tokens of which 200 were drafts took 100 turns of a request: 3 a step."""
    text = (
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n"
        "# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total {tokens}\n"
        "# TYPE vllm:spec_decode_num_accepted_tokens_total counter\n"
        "vllm:spec_decode_num_accepted_tokens_total {drafts}\n"
    )
    earlier = parse(text.format(tokens=100, drafts=10), 0)
    now = parse(text.format(tokens=400, drafts=210), 60)
    assert window(now, earlier).tokens_per_step == 3.0
    assert window(now.model_copy(update={"accepted_tokens": None}), earlier).tokens_per_step is None
    assert window(now, now).tokens_per_step is None
