"""Latency under the plan's load stays within the plan's limits, and the figures are possible."""

from __future__ import annotations

import pytest

from lowmem.schema import LoadResult, Plan, Receipt


@pytest.fixture
def load(measurement: Receipt, plan: Plan) -> LoadResult:
    found = [r for r in measurement.loads if r.load == plan.load]
    assert found, f"no load of {plan.load} in the measurement: {measurement.findings}"
    return found[0]


def test_no_request_failed(load: LoadResult) -> None:
    assert load.failed == 0


def test_tpot_p99(load: LoadResult, plan: Plan) -> None:
    assert load.tpot_ms.p99 <= plan.limits.tpot_p99_ms


def test_ttft_p99(load: LoadResult, plan: Plan) -> None:
    assert load.ttft_ms.p99 <= plan.limits.ttft_p99_ms


def test_the_figures_are_possible(measurement: Receipt) -> None:
    assert [f for f in measurement.findings if f.startswith(("roofline", "Little"))] == []
