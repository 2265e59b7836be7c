"""The plan against runs on a real GPU (tests/data/gpu_runs.json): two of them calibrated it, the others try
it.
"""

from pathlib import Path

import pytest
from reference_runs import load_runs

RUNS = load_runs(Path(__file__).parents[1] / "data" / "gpu_runs.json")
BY_NAME = {f"{r.name}-{r.vllm}": r for r in RUNS}
STARTED = [name for name, r in BY_NAME.items() if r.idle_mib is not None]

# Literal expectations, so that a change of the file or of its reader is seen too.
IDLE_MIB = {
    "awq40-0.26.0": 40321,
    "awq40g-0.26.0": 40133,
    "awq40slow-0.26.0": 40321,
    "tp2-0.26.0": 22087,
    "uva20-0.32.0": 22873,
}
TPOT_MS = {
    "awq40-0.26.0": 38.36,
    "awq40g-0.26.0": 24.58,
    "awq40slow-0.26.0": 35.98,
    "tp2-0.26.0": 55.38,
    "uva20-0.32.0": 495.99,
}
LEFT_FOR_KV_GIB = {"seed-0.26.0": -17.32, "uva20-0.26.0": -15.82, "pre20-0.26.0": -15.33}
LOADED_GIB = {
    "awq40-0.26.0": 34.91,
    "awq40g-0.26.0": 34.91,
    "tp2-0.26.0": 17.49,
    "uva20-0.32.0": 15.42,
    "seed-0.26.0": 34.91,
}


def test_the_file_is_the_one_expected():
    assert {name: BY_NAME[name].idle_mib for name in STARTED} == IDLE_MIB
    assert len(RUNS) == 9


@pytest.mark.parametrize("name", IDLE_MIB)
def test_idle_memory_within_two_percent(name):
    assert BY_NAME[name].planned_idle_mib == pytest.approx(IDLE_MIB[name], rel=0.02)


@pytest.mark.parametrize("name", TPOT_MS)
def test_decode_time_within_fifteen_percent(name):
    assert BY_NAME[name].plan.latency_ms.decode_expected == pytest.approx(TPOT_MS[name], rel=0.15)


@pytest.mark.parametrize("name", LOADED_GIB)
def test_loaded_weights_as_the_engine_logs_them(name):
    assert BY_NAME[name].plan.per_gpu["weights"] / 2**30 == pytest.approx(LOADED_GIB[name], abs=0.02)


@pytest.mark.parametrize("name", [n for n, r in BY_NAME.items() if r.kv_tokens])
def test_kv_tokens_within_five_percent(name):
    assert BY_NAME[name].plan.kv_tokens == pytest.approx(BY_NAME[name].kv_tokens, rel=0.05)


@pytest.mark.parametrize("name", STARTED)
def test_runs_that_started_are_not_refused(name):
    assert BY_NAME[name].plan.verdict != "impossible"


@pytest.mark.parametrize(("name", "gib"), LEFT_FOR_KV_GIB.items())
def test_runs_that_did_not_start_are_refused_for_the_engines_reason(name, gib):
    plan = BY_NAME[name].plan
    assert plan.verdict == "impossible"
    reason = next(r for r in plan.reasons if "No available memory for the cache blocks" in r)
    assert plan.kv_available_bytes / 2**30 == pytest.approx(gib, abs=0.1)
    assert f"{plan.kv_available_bytes / 2**30:.2f} GiB" in reason


@pytest.mark.parametrize("name", ["uva20-0.26.0", "pre20-0.26.0"])
def test_offload_that_a_version_ignores_is_said(name):
    assert any("silently ignored by vLLM 0.24 to 0.27" in r for r in BY_NAME[name].plan.reasons)


def test_verbatim_flags_are_refused_as_the_parser_did():
    reasons = BY_NAME["verbatim-0.26.0"].plan.reasons
    assert [r for r in reasons if r.startswith("unrecognized arguments: --max-batch-size")]
    assert [r for r in reasons if r.startswith("unrecognized arguments: --swap-space: removed in vLLM 0.18")]
