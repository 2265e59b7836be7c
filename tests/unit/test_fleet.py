"""The simulation against what real cards did, and what it says of loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import simpy
from typer.testing import CliRunner

from lowmem.artefacts import read
from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.fleet.simulation import Arrivals, Host, Request, closed_loop, hosts_needed, open_loop
from lowmem.fleet.speed import Speed, measured, planned
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest

RECEIPTS = Path(__file__).parents[2] / "docs" / "measurements" / "2026-11-23-2xh200"
SIMPLE = Speed(
    steps_ms={1: 10.0, 5: 14.0}, chunk_extra_ms=100.0, chunk_tokens=512, max_num_batched_tokens=512,
    max_num_seqs=2, kv_tokens=4096,
    async_scheduling=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("decoding", "prompt", "ms"),
    [(1, 0, 10.0), (0, 0, 10.0), (3, 0, 12.0), (5, 0, 14.0), (9, 0, 14.0), (1, 512, 110.0), (1, 128, 35.0)],
)
def test_a_step_lies_between_the_batches_known(decoding, prompt, ms):
    assert SIMPLE.step_ms(decoding, prompt) == ms


def test_one_request_by_hand():
    """Two chunks of a prompt, the second gives the first token, then two decodes."""
    seen = closed_loop(SIMPLE, 1, 1024, 3, 2)
    assert (seen.ttft_p50_ms, seen.tpot_p50_ms) == (220.0, 10.0)
    assert seen.tokens_per_s == pytest.approx(3 / 0.240)


@pytest.mark.parametrize(("ahead", "first_ms"), [(False, 190.0), (True, 200.0)])
def test_who_comes_during_a_step_waits_for_the_next_one_to_be_decided(ahead, first_ms):
    """A lone request has its first token after 110 ms and decodes by 10; another comes at 125 and takes a
    step of 60.
    """
    clock = simpy.Environment()
    host = Host(clock, replace(SIMPLE, async_scheduling=ahead))
    one, other = Request(0, 512, 100), Request(125, 256, 2)

    def come(request):
        yield clock.timeout(request.arrived)
        yield host.submit(request)

    ended = [clock.process(come(one)), clock.process(come(other))]
    clock.run(clock.all_of(ended))
    assert (one.first, other.first) == (110.0, first_ms)


def test_those_that_decode_take_their_token_of_a_step_first():
    """A prompt of 512 tokens beside one that decodes: 511 in a step of 512, the last in another."""
    clock = simpy.Environment()
    host = Host(clock, replace(SIMPLE, chunk_extra_ms=512.0))
    one, other = Request(0, 256, 100), Request(0, 512, 2)
    clock.run(clock.all_of([host.submit(one), host.submit(other)]))
    # 512 tokens of both prompts, then 256 of the second beside the first's token
    assert (one.first, other.first) == (522.0, 522.0 + 10 + 256)
    assert closed_loop(replace(SIMPLE, max_num_batched_tokens=1024), 1, 512, 2, 2).ttft_p50_ms == 110.0


def test_a_third_request_waits_for_a_seat():
    alone, third = closed_loop(SIMPLE, 2, 512, 100, 2), closed_loop(SIMPLE, 3, 512, 100, 3)
    assert alone.ttft_p99_ms < 250
    assert third.ttft_p99_ms > 1000


def test_a_request_waits_for_room_in_the_pool():
    small = replace(SIMPLE, steps_ms={1: 10.0}, chunk_extra_ms=0.0, max_num_seqs=8, kv_tokens=700)
    seen = closed_loop(small, 2, 500, 100, 2)
    assert seen.ttft_p99_ms == pytest.approx(10 + 0.99 * 1000, rel=0.01)


@pytest.mark.parametrize(
    ("receipt", "clients", "tokens_per_s", "tpot_p99", "ttft_p99"),
    [
        ("low_mem-4-channels", 8, 419.6, 17.6, 1874), ("low_mem-4-channels", 4, 262.0, 13.9, 926),
        ("low_latency", 16, 277.1, 27.1, 10389),
        ("low_latency", 8, 274.6, 27.2, 3128), ("low_latency", 4, 177.1, 20.9, 1560),
        ("extreme_uncapped", 8, 271.1, 27.9, 2210),
    ],
)  # fmt: skip
def test_a_measured_host_is_simulated_as_it_was(receipt, clients, tokens_per_s, tpot_p99, ttft_p99):
    """Steps from the medians, the queue and the tails from the simulation.

    Throughput and TPOT within 3 %, p99 TTFT within 7 %, its median within 8 %.
    """
    found = read(RECEIPTS / f"{receipt}.json")
    load = next(r for r in found.loads if r.load.clients == clients)
    assert load.output_tokens_per_s == pytest.approx(tokens_per_s, abs=0.1)
    seen = closed_loop(
        measured(found), clients, load.load.input_tokens, load.load.output_tokens, load.requests
    )
    assert seen.tokens_per_s == pytest.approx(tokens_per_s, rel=0.03)
    assert seen.tpot_p99_ms == pytest.approx(tpot_p99, rel=0.03)
    assert seen.tpot_p50_ms == pytest.approx(load.tpot_ms.p50, rel=0.03)
    assert seen.ttft_p99_ms == pytest.approx(ttft_p99, rel=0.07)
    assert seen.ttft_p50_ms == pytest.approx(load.ttft_ms.p50, rel=0.08)


def test_a_receipt_without_a_lone_client_is_refused():
    with pytest.raises(BadInput, match="no load of one client"):
        measured(read(RECEIPTS / "low_mem.json"))


def test_a_plan_gives_the_same_steps_as_it_says():
    plan = make_plan(PlanRequest("low_latency", search=False))
    speed = planned(plan)
    assert speed.step_ms(8, 0) == plan.latency_ms.terms["steady_step"]
    assert speed.step_ms(8, 512) == pytest.approx(plan.latency_ms.terms["chunk_step"])
    assert (speed.max_num_seqs, speed.chunk_tokens, speed.kv_tokens) == (8, 512, plan.kv_tokens)


def test_more_hosts_for_more_load_and_for_tighter_limits():
    speed = measured(read(RECEIPTS / "low_latency.json"))
    counts = [hosts_needed(speed, qps, 1024, 256, 200, 10_000)[0] for qps in (0.5, 2, 8)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert hosts_needed(speed, 2, 1024, 256, 200, 800)[0] > counts[1]


def test_the_first_requests_are_not_counted_unless_asked_for():
    assert [
        open_loop(SIMPLE, 1, Arrivals(0.5, 50), 512, 256, **asked).requests
        for asked in ({}, {"left_out": 0.0})
    ] == [40, 50]


def test_two_hosts_shorten_the_queue_of_one():
    speed = measured(read(RECEIPTS / "low_latency.json"))
    one, two = (open_loop(speed, hosts, Arrivals(0.9, 300), 1024, 256) for hosts in (1, 2))
    assert two.ttft_p99_ms < one.ttft_p99_ms / 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((1.0, 5000, 256, 200, 10_000), "one request of 5256 tokens does not fit its pool of 4096"),
        (
            (1.0, 512, 256, 5, 10_000),
            "a lone request takes 10 ms a token, the limit is 5: more hosts do not help",
        ),
        (
            (1.0, 512, 256, 200, 50),
            "a lone request takes 110 ms to its first token, the limit is 50: more hosts do not help",
        ),
        ((1000.0, 512, 256, 200, 10_000), "more than 64 hosts"),
    ],
)
def test_why_no_number_of_hosts_is_enough(arguments, line):
    assert hosts_needed(SIMPLE, *arguments) == line


def test_request_times():
    request = Request(arrived=5.0, input_tokens=4, output_tokens=3)
    request.first, request.done = 25.0, 45.0
    assert (request.ttft, request.tpot) == (20.0, 10.0)


def test_the_command():
    done = CliRunner().invoke(
        app, ["fleet", "--qps", "0.5", "--profile", "low_mem", "--profile", "offload", "--json"]
    )
    assert done.exit_code == 0, done.output
    low_mem, offload = json.loads(done.stdout)
    assert (low_mem["hosts"], low_mem["cards"]) == (1, 2)
    assert offload["reason"].startswith("a lone request takes 8")
    done = CliRunner().invoke(app, ["fleet", "--qps", "0"])
    assert (done.exit_code, done.stderr) == (1, "lowmem: --qps 0 is not from 0.001 to 10,000; correct it\n")
    done = CliRunner().invoke(app, ["fleet", "--qps", "1", "--p99-tpot", "1", "--profile", "low_mem"])
    assert done.exit_code == 2
    assert "more hosts do not help" in done.stdout
