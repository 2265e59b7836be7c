"""The plan against our own GPU sessions (tests/data/gpu_session.json): memory terms on vLLM 0.32.0."""

from pathlib import Path

import pytest
from reference_runs import load_session

from lowmem.units import MIB

RUNS = {r.name: r for r in load_session(Path(__file__).parents[1] / "data" / "gpu_session.json")}


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("low_latency_2048", 34990.1),
        ("tp2_tight", 17510.4),
        ("extreme_int4", 18370.6),
        ("low_mem_relaxed", 17480),
    ],
)
def test_loaded_weights_within_half_a_percent(name, mib):
    assert RUNS[name].plan.per_gpu["weights"] / MIB == pytest.approx(mib, rel=0.005)


@pytest.mark.parametrize(
    ("name", "mib"),
    [("low_latency_2048", 521), ("tp2_tight", 1053), ("extreme_int4", 521), ("low_mem_relaxed", 1053)],
)
def test_memory_at_the_first_reading_within_a_tenth(name, mib):
    assert RUNS[name].planned_before_start_mib == pytest.approx(mib, rel=0.1)


def test_idle_memory_within_two_percent():
    assert RUNS["low_latency_2048"].plan.per_gpu["total"] / MIB == pytest.approx(39467.6, rel=0.02)


@pytest.mark.parametrize(("name", "mib"), [("tp2_tight", 22610), ("extreme_int4", 23836)])
def test_highest_while_starting_within_three_percent(name, mib):
    assert RUNS[name].plan.start_peak_bytes / MIB == pytest.approx(mib, rel=0.03)


def test_a_pool_that_did_not_fit_is_refused():
    """low_latency: 4,120 MiB of KV on 40,344 MiB: the engine died allocating it."""
    from lowmem.plan.planner import make_plan
    from lowmem.plan.request import PlanRequest

    plan = make_plan(PlanRequest("low_latency", overrides={"kv_cache_memory_bytes": 4320133120}))
    assert plan.verdict == "impossible"
    assert "CUDA out of memory: a pool of 4,120 MiB" in plan.reasons[0]
