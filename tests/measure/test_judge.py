"""Limits and physics, on results that can be and on those that cannot."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.measure.engine_log import read
from lowmem.measure.judge import limit_findings, offload_findings, physics_findings, terms
from lowmem.schema import Load, LoadResult, Percentiles

from .conftest import MIB, make_plan

GPU: dict[str, Any] = {
    "device": "a100-40g",
    "device_kind": "cuda",
    "per_gpu": {
        "weights": 17000 * MIB,
        "kv_cache": 1600 * MIB,
        "nccl": 300 * MIB,
        "cuda_context": 500 * MIB,
        "total": 19400 * MIB,
    },
    "load_growth": {"activations": 100 * MIB},
    "peak_bytes": 19500 * MIB,
}


def same(value: float) -> Percentiles:
    return Percentiles(mean=value, p50=value, p90=value, p99=value)


def result(
    clients: int = 8,
    requests: int = 24,
    failed: int = 0,
    tpot_ms: float = 20,
    e2e_ms: float = 6000,
    rate: float | None = None,
) -> LoadResult:
    """A closed loop that obeys Little's law unless `rate` says otherwise."""
    per_s = clients / (e2e_ms / 1000) if rate is None else rate
    return LoadResult(
        load=Load(clients=clients, input_tokens=1024, output_tokens=256),
        requests=requests,
        failed=failed,
        duration_s=(requests - failed) / per_s,
        request_throughput_per_s=per_s,
        output_tokens_per_s=per_s * 256,
        ttft_ms=same(900),
        tpot_ms=same(tpot_ms),
        itl_ms=same(tpot_ms),
        e2e_ms=same(e2e_ms),
    )


def plan(**changes: Any) -> Any:
    latency = {
        "decode_floor": 12,
        "decode_expected": 20,
        "prefill_floor": 100,
        "prefill_expected": 200,
        "terms": {"hbm_weights": 11.5},
    }
    return make_plan(
        load={"clients": 8, "input_tokens": 1024, "output_tokens": 256}, latency_ms=latency, **GPU | changes
    )


def test_all_is_well() -> None:
    assert limit_findings(plan(), [2048 * MIB], [result()]) == []
    assert physics_findings(plan(), [result()], same_device=True) == []


def test_memory_over_the_limit_names_the_gpu() -> None:
    assert limit_findings(plan(), [2048 * MIB, 2050 * MIB], []) == [
        "memory: GPU 1 used 2,050 MiB at its peak, limit 2,048 MiB, 2 MiB over"
    ]


def test_latency_over_the_limit_is_held_against_the_plans_load_only() -> None:
    assert limit_findings(plan(), [1], [result(tpot_ms=201, clients=16)]) == []
    assert limit_findings(plan(), [1], [result(tpot_ms=201)]) == [
        "latency: TPOT p99 201.0 ms at 8 clients, limit 200.0 ms"
    ]


def test_failed_requests() -> None:
    assert limit_findings(plan(), [1], [result(failed=2)]) == [
        "requests: 2 of 24 failed at 8 clients, limit 0"
    ]


def test_faster_than_the_memory_bus() -> None:
    found = physics_findings(plan(), [result(tpot_ms=6)], same_device=True)
    assert found == [
        "roofline: TPOT p50 6.00 ms at 8 clients is below the floor of 12.00 ms: no a100-40g can do this"
    ]


def test_another_card_has_another_floor() -> None:
    assert physics_findings(plan(), [result(tpot_ms=6)], same_device=False) == []


def test_one_client_is_held_against_the_weights_alone() -> None:
    assert physics_findings(plan(), [result(clients=1, tpot_ms=11.6)], same_device=True) == []
    assert len(physics_findings(plan(), [result(clients=1, tpot_ms=11)], same_device=True)) == 1


def test_the_source_articles_figures_break_littles_law() -> None:
    # 125 ms mean latency at 4.9 requests a second, with 8 clients
    found = physics_findings(plan(), [result(e2e_ms=125, rate=4.9)], same_device=True)
    assert found == ["Little's law: 4.900 requests/s x 0.12 s = 0.61 requests in flight, with 8 clients"]


@pytest.mark.parametrize("requests", [8, 9, 12, 24])
def test_an_unfilled_last_wave_is_no_finding(requests: int) -> None:
    waves = -(-requests // 8)
    measured = result(requests=requests, e2e_ms=6000, rate=requests / (waves * 6))
    assert physics_findings(plan(), [measured], same_device=True) == []


def test_one_wave_of_requests_of_unequal_length_is_no_finding() -> None:
    """As seen: four requests of eight clients, the longest 5.2 s, 3.42 s on average."""
    measured = result(requests=4, rate=0.771)
    measured = measured.model_copy(update={"e2e_ms": Percentiles(mean=3420, p50=2829, p90=4700, p99=5150)})
    assert physics_findings(plan(), [measured], same_device=True) == []


def test_clients_that_wait_for_nothing_are_a_finding() -> None:
    """24 requests in 36 s, where 8 clients with 6 s each would have taken 18 s."""
    found = physics_findings(plan(), [result(rate=24 / 36)], same_device=True)
    assert found == ["Little's law: 0.667 requests/s x 6.00 s = 4.00 requests in flight, with 8 clients"]


def test_terms_beside_their_measurement() -> None:
    log = read(
        [
            "Model loading took 17.0 GiB memory and 3.0 seconds",
            "Available KV cache memory: 1.5 GiB",
            "Graph capturing finished in 1 secs, took 0.25 GiB",
        ]
    )
    rows = {
        t.name: (t.planned_bytes, t.measured_bytes)
        for t in terms(plan(), log, 20000 * MIB, 20100 * MIB, 22000 * MIB)
    }
    assert rows == {
        "weights": (17000 * MIB, 17408 * MIB),
        "kv_cache": (1600 * MIB, 1536 * MIB),
        "cuda_graphs": (None, 256 * MIB),
        "nccl": (300 * MIB, None),
        "cuda_context": (500 * MIB, None),
        "rest": (800 * MIB, 800 * MIB),
        "total": (19400 * MIB, 20000 * MIB),
        "load_growth": (100 * MIB, 100 * MIB),
        "peak": (19500 * MIB, 20100 * MIB),
        "start": (None, 22000 * MIB),
    }


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        (
            ["Total CPU offloaded parameters: 19.04", "Model loading took 15.42 GiB memory and 23.8 seconds"],
            [],
        ),
        (
            ["Model loading took 34.91 GiB memory and 3.2 seconds"],
            [
                "offload: the engine's log has neither 'Total CPU offloaded parameters' nor"
                " '[PrefetchOffloader] Initialized'"
            ],
        ),
        (
            ["Total CPU offloaded parameters: 19.04", "Model loading took 34.15 GiB memory and 23.8 seconds"],
            [
                "offload: 34,970 MiB of weights lie on the card, 15,790 MiB planned:"
                " a kernel brought the rest back"
            ],
        ),
    ],
)
def test_offload_is_proved_by_what_was_loaded(lines: list[str], finding: list[str]) -> None:
    offloading = plan(
        per_gpu={"weights": 15790 * MIB, "total": 17000 * MIB}, host_ram={"pinned_offload": 20000 * MIB}
    )
    assert offload_findings(offloading, read(lines)) == finding
