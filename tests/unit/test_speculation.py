"""Speculative decoding: what the plan counts, refuses and promises, held to the runs of 2026-11-27."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import BadInput
from lowmem.plan.engine_config import graph_sizes
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.plan.speculation import Speculation, speculation_of
from lowmem.schema import Plan
from lowmem.units import MIB

MEASUREMENTS = Path(__file__).parents[2] / "docs" / "measurements"
RUNS, LATER_RUNS = MEASUREMENTS / "2026-11-27-2xh200", MEASUREMENTS / "2026-12-01-1xh200"
NGRAM = '{"method": "ngram", "num_speculative_tokens": 7}'
WHOLE = "is not a whole number from 1 to 64"


def settings(**values: Any) -> str:
    """A value of the knob, n-gram drafts with these settings."""
    return json.dumps({"method": "ngram", **values})


def planned(profile: str = "offload_speculative", **changes: Any) -> Plan:
    return make_plan(PlanRequest(profile, search=False, **changes))


def as_measured(accepted: float) -> Plan:
    """The plan of a run of 2026-11-27: PCIe 5 of an H200, Marlin, a pool of 3.4 GB, answers of 64 tokens."""
    knobs = {"linear_backend": "marlin", "kv_cache_memory_bytes": 3_400_000_000}
    return planned(device="h200", overrides=knobs, output_tokens=64, accepted_tokens=accepted)


@pytest.mark.parametrize("accepted", [2, 4, 6])
def test_measured_memory_and_latency(accepted: int) -> None:
    """The runs were played on a card of 40 GiB: the limit is the profile's."""
    run = json.loads((RUNS / f"offload-ngram-{accepted}.json").read_text())
    plan = as_measured(accepted)
    assert plan.peak_bytes / MIB == pytest.approx(run["memory_mib"]["load:8"], rel=0.02)
    assert plan.latency_ms.decode_expected == pytest.approx(run["loads"][0]["tpot_ms"]["p50"], rel=0.15)


@pytest.mark.parametrize("accepted", [1, 4])
def test_measured_with_the_profiles_own_launcher(accepted: int) -> None:
    run = json.loads((LATER_RUNS / f"offload_speculative-{accepted}.json").read_text())
    plan = planned(
        device="h200",
        overrides={"linear_backend": "marlin", "kv_cache_memory_bytes": 3_402_629_120},
        output_tokens=64,
        accepted_tokens=accepted,
    )
    assert plan.peak_bytes / MIB == pytest.approx(run["memory_mib"]["load:8"], rel=0.02)
    assert plan.latency_ms.decode_expected == pytest.approx(run["loads"][0]["tpot_ms"]["mean"], rel=0.15)


@pytest.mark.parametrize(("drafts", "accepted", "clients"), [(3, 2.5, 8), (3, 2.5, 1), (7, 4, 1)])
def test_measured_on_a_card_that_holds_the_model(drafts: int, accepted: float, clients: int) -> None:
    """These runs calibrate. Eight clients with 7 drafts are 23 % slower in the plan: it counts the prompts of
    several waves of requests, and the run had one.
    """
    run = json.loads((LATER_RUNS / f"low_latency-ngram-{drafts}-drafts.json").read_text())
    [load] = [load for load in run["loads"] if load["clients"] == clients]
    knob = json.dumps({"method": "ngram", "num_speculative_tokens": drafts})
    plan = planned(
        "low_latency",
        device="h200",
        overrides={"linear_backend": "marlin", "speculative_config": knob},
        clients=clients,
        accepted_tokens=accepted,
    )
    assert plan.latency_ms.decode_expected == pytest.approx(load["tpot_ms"]["mean"], rel=0.15)


def test_what_the_profile_says_of_itself() -> None:
    plan = planned()
    assert plan.speculation is not None
    assert (plan.verdict, plan.speculation.accepted_tokens) == ("slow", 1.55)
    assert plan.speculation.accepted_source.startswith("Spec-Bench: prompt lookup")
    assert planned(accepted_tokens=4).verdict == "slow"
    assert planned(accepted_tokens=6).verdict == "fits"


def test_the_acceptance_that_a_limit_needs_meets_it() -> None:
    needed = planned().speculation
    assert needed is not None
    assert needed.needed_tokens is not None
    plan = planned(accepted_tokens=needed.needed_tokens)
    assert plan.latency_ms.decode_expected <= 200
    assert planned(accepted_tokens=needed.needed_tokens - 0.05).latency_ms.decode_expected > 200


def test_at_the_break_even_a_token_takes_as_long_as_without() -> None:
    drafted = planned().speculation
    assert drafted is not None
    with_drafts = planned(accepted_tokens=drafted.break_even_tokens).latency_ms.decode_expected
    without = planned("offload").latency_ms.decode_expected
    assert with_drafts == pytest.approx(without, rel=0.01)


def test_no_acceptance_is_enough() -> None:
    """Two drafts give at most three tokens a pass of 818 ms."""
    two = '{"method": "ngram", "num_speculative_tokens": 2}'
    plan = planned(overrides={"speculative_config": two})
    assert plan.speculation is not None
    assert plan.speculation.needed_tokens is None
    assert any("200 ms a token is out of reach even if each draft is accepted" in r for r in plan.reasons)


def test_drafts_of_a_request_have_room_in_the_pool() -> None:
    """1,024 + 249 tokens fill 80 blocks of 16; 7 drafts of the last step take none more, 8 take one."""
    pool = {"kv_cache_memory_bytes": (80 * 8 + 1) * 16 * 327680}
    load = {"input_tokens": 1024, "output_tokens": 249}
    assert planned(overrides=pool, **load).max_requests == 8
    eight = '{"method": "ngram", "num_speculative_tokens": 8}'
    assert planned(overrides={**pool, "speculative_config": eight}, **load).max_requests == 7


def test_it_takes_one_argument_and_no_asynchronous_scheduling() -> None:
    plan = planned()
    value = plan.argv[plan.argv.index("--speculative-config") + 1]
    assert json.loads(value) == {
        "method": "ngram",
        "num_speculative_tokens": 7,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    assert not plan.async_scheduling
    assert planned("low_latency").async_scheduling
    assert not planned("low_latency", overrides={"speculative_config": NGRAM}).async_scheduling


def test_captured_sizes_are_those_that_whole_requests_fill() -> None:
    """Eight requests of four rows: up to 64 tokens, every request count of them (0.32.0, config/vllm.py)."""
    assert graph_sizes(8, 2048, None, None, 4) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert graph_sizes(4, 2048, None, None, 3) == (1, 2, 3, 4, 6, 8, 12, 16, 24)
    assert graph_sizes(8, 2048, None, None) == (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("yes", "is not a JSON object; write it like"),
        ("[1]", "is not a JSON object"),
        ("[" * 5000, "is not a JSON object"),
        ('{"method": "eagle", "num_speculative_tokens": 3}', "names method 'eagle'; the plan counts ngram"),
        ('{"num_speculative_tokens": 3}', "names method 'nothing'"),
        (settings(), "has no num_speculative_tokens"),
        (settings(num_speculative_tokens=0), f"num_speculative_tokens=0 {WHOLE}"),
        (settings(num_speculative_tokens=True), f"num_speculative_tokens=True {WHOLE}"),
        (settings(num_speculative_tokens=3, model="x"), "has 'model', which is not counted"),
        (
            settings(num_speculative_tokens=3, prompt_lookup_min=5, prompt_lookup_max=2),
            "prompt_lookup_min=5 is more than prompt_lookup_max=2",
        ),
    ],
)
def test_wrong_settings_are_one_line(value: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        speculation_of({"speculative_config": value})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accepted_tokens": 9}, "accepted_tokens=9 is more than the 8 tokens that a step with 7 drafts"),
        ({"accepted_tokens": 0.5}, "accepted_tokens=0.5 is not from 1 to 65"),
        ({"accepted_tokens": float("nan")}, "accepted_tokens=nan is not from 1 to 65"),
        ({"profile": "offload", "accepted_tokens": 2}, "accepted_tokens=2 without speculative_config"),
        ({"overrides": {"max_num_seqs": 128}}, "less than the 1024 tokens of a step of max_num_seqs=128"),
        ({"overrides": {"async_scheduling": True}}, "async_scheduling=true with n-gram drafts"),
        ({"profile": "two_hosts", "overrides": {"speculative_config": NGRAM}}, "not modelled with pipeline"),
    ],
)
def test_contradictions_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=r"^[^\n]+$") as error:
        planned(**changes)
    assert said in str(error.value)


def test_without_the_knob_nothing_changes() -> None:
    assert speculation_of({}) is None
    plan = planned("offload")
    assert plan.speculation is None
    assert "accepted_tokens" not in plan.latency_ms.terms


def test_rows_of_a_step() -> None:
    assert speculation_of({"speculative_config": NGRAM}) == Speculation("ngram", 7)
    assert Speculation("ngram", 7).rows == 8
