"""Literal terms of the memory and latency models, worked out by hand."""

import pytest

from lowmem.plan.memory import next_power_of_two
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.units import GIB, MIB


@pytest.mark.parametrize(
    ("asked", "given"),
    [(1, 1), (2, 2), (3, 4), (5 * MIB, 8 * MIB), (8 * MIB, 8 * MIB), (224 * MIB, 256 * MIB)],
)
def test_pinned_allocations_round_up_to_a_power_of_two(asked, given):
    assert next_power_of_two(asked) == given


def test_host_ram_of_an_offloading_plan():
    plan = make_plan(
        PlanRequest(
            "offload", overrides={"offload_group_size": 0, "offload_num_in_group": 1, "cpu_offload_gb": 0.4}
        )
    )
    # 429,496,730 bytes, in MiB: qkv, o and gate_up with weights, zeros and scales each, then down's weights,
    # which meet the budget
    asked = [40, 0.3125, 1.25, 32, 0.25, 1, 224, 1.75, 7, 112]
    pinned = [64, 0.5, 2, 32, 0.25, 1, 256, 2, 8, 128]
    assert plan.weight_terms["offloaded"] == round(sum(asked) * MIB)
    assert plan.host_ram["pinned_offload"] == round(sum(pinned) * MIB)
    assert plan.service.memlock == "infinity"


def test_the_floor_is_the_slowest_of_hbm_link_and_operations():
    fast = make_plan(PlanRequest("low_latency")).latency_ms
    # 36.61 GB stored less the embedding of 0.524 GB, and 8 x 1,152 tokens of 320 KiB, over 1,555 GB/s
    assert fast.terms["hbm_weights"] == pytest.approx((36.6137 - 0.5243) / 1555 * 1e3, abs=0.01)
    assert fast.terms["hbm_kv"] == pytest.approx(8 * 1152 * 320 * 1024 / 1555e9 * 1e3, abs=0.01)
    assert fast.decode_floor == pytest.approx(fast.terms["hbm_weights"] + fast.terms["hbm_kv"], abs=0.001)
    slow = make_plan(PlanRequest("offload")).latency_ms
    assert slow.decode_floor == slow.terms["link_offload"] > 10 * slow.terms["hbm_weights"]
    many = make_plan(
        PlanRequest(
            "low_latency",
            device="h200",
            # a request of 2 tokens takes a block of 16, so that 2,048 of them need 10 GiB
            overrides={
                "max_num_seqs": 2048,
                "max_num_batched_tokens": 2048,
                "kv_cache_memory_bytes": "11GiB",
            },
            clients=2048,
            input_tokens=1,
            output_tokens=1,
        )
    )
    assert many.latency_ms.decode_floor == many.latency_ms.terms["flops"]
    assert many.latency_ms.terms["flops"] == pytest.approx(
        2 * (68_976_648_192 - 262_144_000) * 2048 / 989e12 * 1e3, abs=0.01
    )


def test_two_cards_halve_what_each_reads():
    one, two = make_plan(PlanRequest("low_latency")).latency_ms, make_plan(PlanRequest("low_mem")).latency_ms
    assert two.terms["hbm_weights"] == pytest.approx(one.terms["hbm_weights"] / 2, rel=0.001)
    assert two.terms["all_reduce"] > 0 == one.terms["all_reduce"]


def test_a_prompt_takes_its_operations():
    floor = make_plan(PlanRequest("low_latency")).latency_ms.prefill_floor
    assert floor == pytest.approx(2 * (68_976_648_192 - 262_144_000) * 1024 / 312e12 * 1e3, abs=0.1)


def test_a_pool_too_small_for_one_request_is_impossible():
    plan = make_plan(
        PlanRequest("low_mem", overrides={"kv_cache_memory_bytes": 100 * MIB, "max_model_len": "auto"})
    )
    assert plan.kv_tokens == 640
    assert plan.verdict == "impossible"
    assert "holds no request of the load" in plan.reasons[0]


def test_a_pool_too_small_for_all_clients_is_slow():
    # 2.5 MiB a block of 16 tokens, and 80 blocks a request; block 0 is the engine's own
    assert make_plan(PlanRequest("low_mem", overrides={"kv_cache_memory_bytes": 800 * MIB})).max_requests == 3
    plan = make_plan(PlanRequest("low_mem", overrides={"kv_cache_memory_bytes": 802.5 * MIB}))
    assert (plan.verdict, plan.max_requests) == ("slow", 4)
    assert "the load has 8: 4 wait" in plan.reasons[0]


def test_channels_of_nccl_are_memory():
    few, many = (
        make_plan(PlanRequest("low_mem", environment={"NCCL_MAX_NCHANNELS": n})).per_gpu["nccl"]
        for n in ("2", "8")
    )
    assert many - few == 6 * 18 * MIB
    assert make_plan(PlanRequest("low_latency")).per_gpu["nccl"] == 0


def test_kv_offload_is_host_ram():
    plan = make_plan(PlanRequest("low_mem", overrides={"kv_offloading_size": 8}))
    assert plan.host_ram["kv_offload"] == 8 * GIB
