"""Latency under the plan's load stays within the plan's limits, and the figures are possible."""

from __future__ import annotations

import pytest

from lowmem.schema import LoadResult, Plan, Receipt


@pytest.fixture
def load(measurement: Receipt, plan: Plan) -> LoadResult:
    found = [r for r in measurement.loads if r.load == plan.load]
    assert found, f"no load of {plan.load} in the measurement: {measurement.findings}"
    return found[0]


def within(name: str, value_ms: float, limit_ms: float) -> None:
    """A line a person can read, in place of pytest's print of a whole plan."""
    assert value_ms <= limit_ms, f"{name} is {value_ms:,.1f} ms, the limit {limit_ms:,.1f} ms"


def test_no_request_failed(load: LoadResult) -> None:
    failed = load.failed
    assert failed == 0, f"{failed} of {load.requests} requests failed"


def test_tpot_p99(load: LoadResult, plan: Plan) -> None:
    within("TPOT p99", load.tpot_ms.p99, plan.limits.tpot_p99_ms)


def test_ttft_p99(load: LoadResult, plan: Plan) -> None:
    within("TTFT p99", load.ttft_ms.p99, plan.limits.ttft_p99_ms)


def test_the_figures_are_possible(measurement: Receipt) -> None:
    impossible = [f for f in measurement.findings if f.startswith(("roofline", "Little"))]
    assert impossible == []
