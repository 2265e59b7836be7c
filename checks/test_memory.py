"""Memory under the plan's load stays within the plan's limit, and holds the requests that it promises."""

from __future__ import annotations

import pytest

from lowmem.schema import Plan, Receipt
from lowmem.units import MIB


def test_peak_is_within_the_limit(measurement: Receipt, plan: Plan) -> None:
    peaks, limit = measurement.service_peak_bytes, plan.limits.memory_bytes
    assert peaks, "nothing was sampled"
    over = {i: f"{used / MIB:,.0f} MiB" for i, used in enumerate(peaks) if used > limit}
    assert over == {}, f"limit {limit / MIB:,.0f} MiB ({measurement.memory_source})"


def test_the_kv_pool_holds_the_planned_tokens(measurement: Receipt, plan: Plan) -> None:
    tokens = measurement.engine_values.get("kv_tokens")
    if not tokens:
        pytest.skip("the log of this start is gone")
    planned = plan.kv_tokens
    assert min(tokens) >= planned


def test_offload_took_effect(measurement: Receipt, plan: Plan) -> None:
    if not plan.host_ram.get("pinned_offload"):
        pytest.skip("the plan offloads nothing")
    undone = [f for f in measurement.findings if f.startswith("offload")]
    assert undone == []
