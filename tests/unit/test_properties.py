"""What must hold for every model, device and setting."""

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowmem.errors import BadInput
from lowmem.inputs import devices, model_cards
from lowmem.plan.compute import compute
from lowmem.plan.memory import card_memory, next_power_of_two
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest, gather
from lowmem.plan.resolve import resolve
from lowmem.plan.weights import stored_bytes, weights
from lowmem.schema import Knob, Limits, Load, Plan, Profile, Quantization
from lowmem.units import MIB

# 16-bit models that a width may be made of; published quantized checkpoints are planned as they are
CARDS = [model_cards.load_card(name) for name in model_cards.names()]
MODELS = st.sampled_from([c.name for c in CARDS if c.quantization.method == "none" and not c.counted])
GPUS = st.sampled_from([n for n in devices.names() if n != "cpu"])
WIDTHS = st.sampled_from(
    [
        Quantization(),
        Quantization(method="awq", bits=4, group_size=64, zero_point=True),
        Quantization(method="gptq", bits=8, group_size=64, zero_point=False),
        Quantization(method="auto-round", bits=2, group_size=64, zero_point=False),
    ]
)
LIMITS = Limits(memory_bytes=10**12, tpot_p99_ms=1e6, ttft_p99_ms=1e9)
FEW = settings(max_examples=60, deadline=None)


def plan_of(model, device, count, quantization, load=None, **values) -> Plan:
    p = Profile(
        name="p",
        summary="",
        device=device,
        device_count=count,
        model=model,
        quantization=quantization,
        limits=LIMITS,
        load=load or Load(clients=1, input_tokens=64, output_tokens=64),
        knobs={},
    )
    try:
        return compute(gather(PlanRequest(p, model, device, count, {"max_model_len": 2048, **values})))
    except BadInput:
        assume(False)
        raise


@FEW
@given(MODELS, GPUS, WIDTHS, st.integers(1, 200), st.integers(1, 56))
def test_more_sequences_never_need_less_memory(model, device, width, few, more):
    def peak_without_pool(n):
        p = plan_of(
            model, device, 1, width, max_num_seqs=n, max_num_batched_tokens=2048, kv_cache_memory_bytes="1G"
        )
        return p.peak_bytes - p.per_gpu["kv_cache"]

    assert peak_without_pool(few + more) >= peak_without_pool(few)


@FEW
@given(MODELS, st.integers(1, 64), st.integers(0, 64))
def test_more_clients_never_wait_less(model, few, more):
    def at(n):
        return plan_of(
            model,
            "h200",
            1,
            Quantization(),
            Load(clients=n, input_tokens=256, output_tokens=64),
            max_num_seqs=128,
        ).latency_ms

    assert at(few + more).decode_expected >= at(few).decode_expected
    assert at(few + more).decode_floor >= at(few).decode_floor


@FEW
@given(MODELS, WIDTHS, st.sampled_from([2, 4, 8]))
def test_more_cards_never_raise_the_sharded_weights_of_one(model, width, tp):
    one = plan_of(model, "a100-80g", 8, width, tensor_parallel_size=1)
    many = plan_of(model, "a100-80g", 8, width, tensor_parallel_size=tp)
    assert many.weight_terms["sharded"] <= one.weight_terms["sharded"]
    assert many.weight_terms["sharded"] * tp >= one.weight_terms["sharded"]
    assert many.weight_terms["replicated"] == one.weight_terms["replicated"]


@FEW
@given(MODELS, GPUS, WIDTHS, st.floats(0.05, 0.95), st.booleans(), st.floats(0, 40))
def test_bytes_add_up_and_are_not_negative(model, device, width, utilization, eager, offload):
    p = plan_of(
        model,
        device,
        1,
        width,
        gpu_memory_utilization=utilization,
        enforce_eager=eager,
        cpu_offload_gb=offload,
    )
    assert sum(v for k, v in p.per_gpu.items() if k != "total") == p.per_gpu["total"]
    assert all(v >= 0 for v in p.per_gpu.values())
    assert p.peak_bytes == p.per_gpu["total"] + sum(p.load_growth.values())
    w = p.weight_terms
    assert (
        w["sharded"] + w["replicated"] + w["padding"] + w["repacking"] - w["offloaded"]
        == p.per_gpu["weights"]
    )
    assert sum(p.host_ram.values()) == p.host_ram_bytes
    assert Plan.model_validate_json(p.model_dump_json()) == p


@FEW
@given(MODELS, GPUS, WIDTHS, st.integers(2**30, 60 * 2**30))
def test_the_chosen_pool_keeps_the_limit(model, device, width, limit):
    limits = LIMITS.model_copy(update={"memory_bytes": limit})
    load = Load(clients=1, input_tokens=64, output_tokens=64)
    pool = {"kv_cache_memory_bytes": Knob(value="auto", why="")}
    profile = Profile(
        name="p",
        summary="",
        device=device,
        device_count=1,
        model=model,
        quantization=width,
        limits=limits,
        load=load,
        knobs=pool,
    )
    try:
        p = make_plan(PlanRequest(profile, overrides={"max_model_len": 2048}, search=False))
    except BadInput:
        assume(False)
        raise
    assert p.verdict == "impossible" or p.peak_bytes <= limit


@FEW
@given(MODELS, st.floats(0, 60), st.floats(0, 30))
def test_more_offload_frees_the_card_and_fills_the_host(model, some, more):
    a = plan_of(model, "a100-80g", 1, Quantization(), cpu_offload_gb=some)
    b = plan_of(model, "a100-80g", 1, Quantization(), cpu_offload_gb=some + more)
    assert b.per_gpu["weights"] <= a.per_gpu["weights"]
    assert b.host_ram_bytes >= a.host_ram_bytes
    assert b.latency_ms.decode_expected >= a.latency_ms.decode_expected


@FEW
@given(MODELS, st.floats(0.01, 100))
def test_offload_takes_what_was_asked_or_all_layers(model, gb):
    p = plan_of(model, "a100-80g", 1, Quantization(), cpu_offload_gb=gb)
    layered = sum(g.parameters for g in model_cards.load_card(model).groups if g.layered) * 2
    assert p.weight_terms["offloaded"] >= min(int(gb * 2**30), layered)
    assert p.weight_terms["offloaded"] <= layered


@FEW
@given(st.integers(1, 2**40))
def test_pinned_memory_is_less_than_twice_what_was_asked(n):
    assert n <= next_power_of_two(n) < 2 * n or n == next_power_of_two(n)


@FEW
@given(MODELS, WIDTHS)
def test_fewer_bits_are_fewer_bytes(model, width):
    card = model_cards.load_card(model)
    try:
        assert stored_bytes(model_cards.quantized(card, width)) <= stored_bytes(card)
    except BadInput:
        assume(False)


@FEW
@given(MODELS, GPUS)
def test_memory_is_a_function_of_its_arguments(model, device):
    card, d = model_cards.load_card(model), devices.load_device(device)
    engine = resolve({}, card, d, 1, "0.32.0", {})
    assert card_memory(card, engine, d, 20 * 1024 * MIB) == card_memory(
        card, replace(engine), d, 20 * 1024 * MIB
    )
    assert weights(card, engine) == weights(card, replace(engine))


@FEW
@given(st.text(max_size=20), st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.booleans()))
def test_any_override_is_planned_or_refused_in_one_line(name, value):
    for knob in (
        name,
        "max_num_seqs",
        "gpu_memory_utilization",
        "cpu_offload_gb",
        "kv_cache_memory_bytes",
        "kv_cache_dtype",
        "tensor_parallel_size",
    ):
        try:
            said = make_plan(PlanRequest("low_latency", overrides={knob: value}, search=False)).verdict
        except BadInput as e:
            said = str(e)
        assert said
        assert len(said.splitlines()) == 1
