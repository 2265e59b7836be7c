"""One server on several hosts: stages, their memory, what passes between them, what the link must be.
Literals are worked out by hand.
"""

import json
import subprocess

import pytest

from lowmem.errors import BadInput
from lowmem.inputs import links
from lowmem.plan.engine_config import layer_partition
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Plan
from lowmem.units import GIB, MIB
from tests.unit.test_knobs import engine_python

DEPLOY = {
    "model_path": "/srv/m",
    "served_model_name": "m",
    "nodes": ["10.0.0.1", "10.0.0.2"],
    "interface": "eth1",
}


@pytest.mark.parametrize(
    ("layers", "stages", "wanted", "parts"),
    [
        (80, 2, "", (40, 40)),
        (81, 2, "", (41, 40)),
        (32, 3, "", (11, 11, 10)),
        (10, 4, "", (2, 3, 3, 2)),
        (80, 2, "38,42", (38, 42)),
    ],
)
def test_layers_are_dealt_as_the_engine_deals_them(layers, stages, wanted, parts):
    assert layer_partition(layers, stages, wanted) == parts


@pytest.mark.engine
def test_the_engine_deals_the_same():
    python = engine_python()
    if python is None:
        pytest.skip("no vLLM environment; `make demo` builds one, $LOWMEM_ENGINE_PYTHON names another")
    script = (
        "import json\nfrom vllm.distributed.utils import get_pp_indices\nprint('\\n' +"
        " json.dumps([[get_pp_indices(n, r, s) for r in range(s)] for n in range(8, 100) for s in (2, 3, 4,"
        " 5, 8)]))"
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [layer_partition(n, s) for n in range(8, 100) for s in (2, 3, 4, 5, 8)]
    assert [tuple(end - start for start, end in stages) for stages in theirs] == ours


def test_weights_of_each_stage():
    plan = make_plan(PlanRequest("two_hosts"))
    first, last = plan.stages
    assert [(s.node, s.first_layer, s.layers) for s in plan.stages] == [(0, 0, 40), (1, 40, 40)]
    # half of 68,451,041,280 weights at 4 bits, 2 bytes of scale and half a byte of zero point for each 128;
    # one end of 32,000 x 8,192
    assert first.weight_terms["sharded"] == 17_112_760_320 + 534_773_760 + 133_693_440 + 524_288_000
    assert last.weight_terms["sharded"] == first.weight_terms["sharded"]
    # two norms a layer, and the last one before lm_head; each stage has a rotary cache of 4,096 positions
    # and the scales of 80 layers
    buffers = 4096 * 128 * 2 + 80 * 16
    assert first.weight_terms["replicated"] == 40 * 2 * 8192 * 2 + buffers
    assert last.weight_terms["replicated"] == 40 * 2 * 8192 * 2 + 8192 * 2 + buffers
    one = make_plan(PlanRequest("low_latency", search=False))
    for term, twice in (("sharded", 0), ("replicated", buffers)):
        assert first.weight_terms[term] + last.weight_terms[term] == one.weight_terms[term] + twice


def test_keys_and_values_of_each_stage_and_one_pool_for_both():
    plan = make_plan(PlanRequest("two_hosts"))
    assert {s.per_gpu["kv_cache"] for s in plan.stages} == {plan.kv_tokens * 160 * 1024}
    assert plan.max_requests == 8
    uneven = make_plan(
        PlanRequest("two_hosts", environment={"VLLM_PP_LAYER_PARTITION": "39,41"}, search=False)
    )
    assert [s.per_gpu["kv_cache"] // uneven.kv_tokens for s in uneven.stages] == [39 * 4096, 41 * 4096]
    assert uneven.argv[uneven.argv.index("--kv-cache-memory-bytes") + 1] == str(uneven.kv_tokens * 41 * 4096)


def test_communication_buffers_as_expected():
    plan = make_plan(PlanRequest("two_hosts"))
    # a base, and three communicators of two channels; a step of 64 tokens is received twice over and kept
    # once while it is sent; the last stage's logits and sampler besides
    assert {s.per_gpu["nccl"] for s in plan.stages} == {(354 + 3 * 2 * 18) * MIB}
    assert [s.per_gpu["pipeline_buffers"] for s in plan.stages] == [64 * 32768, 2 * 64 * 32768 + 78 * MIB]


def test_the_limit_is_held_against_the_fullest_stage():
    plan = make_plan(PlanRequest("two_hosts"))
    assert plan.verdict == "fits"
    assert plan.peak_bytes == max(s.peak_bytes for s in plan.stages) <= 20 * GIB
    assert plan.per_gpu == plan.stages[1].per_gpu
    refused = make_plan(
        PlanRequest("two_hosts", environment={"VLLM_PP_LAYER_PARTITION": "20,60"}, search=False)
    )
    assert refused.verdict == "impossible"
    assert refused.reasons[0].startswith("stage 1: kv_cache: No available memory")


def test_what_passes_between_the_stages():
    pipeline = make_plan(PlanRequest("two_hosts")).pipeline
    assert pipeline is not None
    assert pipeline.bytes_per_token == 2 * 8192 * 2
    assert pipeline.bytes_per_decode_step == 8 * 32768
    assert pipeline.bytes_per_prefill_step == 64 * 32768
    assert pipeline.hop_floor_ms == pytest.approx(262_144 / 2.94e6 + 0.06, abs=1e-3)
    assert pipeline.hop_ms == pytest.approx(262_144 / (0.8 * 2.94e6) + 0.06 + 2 * 2.1, abs=1e-3)


def test_the_floor_is_the_whole_models_reading():
    two = make_plan(PlanRequest("two_hosts"))
    # 17,782,538,240 and 18,306,842,624 bytes read; four of eight clients in each of two steps, which pass the
    # slower stage in turn
    slower = 18_306_842_624 / 1.555e9 + 4 * 1152 * 163_840 / 1.555e9
    assert two.latency_ms.decode_floor == pytest.approx(2 * slower, abs=0.01)
    alone = make_plan(PlanRequest("two_hosts", clients=1)).latency_ms
    way = 32_768 / 2.94e6 + 0.06
    assert alone.decode_floor == pytest.approx(
        (17_782_538_240 + 18_306_842_624) / 1.555e9 + 1152 * 327_680 / 1.555e9 + way, abs=0.01
    )
    assert alone.decode_floor > 1.9 * make_plan(PlanRequest("low_mem", clients=1)).latency_ms.decode_floor


def test_one_client_leaves_each_card_idle_half_of_the_time():
    pipeline = make_plan(PlanRequest("two_hosts")).pipeline
    assert pipeline is not None
    assert 0.55 < pipeline.idle_share_one_client < 0.57
    four = make_plan(
        PlanRequest(
            "low_latency", hosts=4, network="ib", overrides={"pipeline_parallel_size": 4}, search=False
        )
    ).pipeline
    assert four is not None
    assert 0.75 < four.idle_share_one_client < 0.80


def test_a_prompts_steps_follow_one_another_through_the_stages():
    plan = make_plan(PlanRequest("two_hosts", clients=1)).latency_ms
    # sixteen steps of 64 tokens: fifteen at the pace of the slower stage, the last through both
    assert plan.prefill_expected == pytest.approx(
        15 * plan.terms["chunk_step"] + 2 * plan.terms["chunk_step"], rel=0.05
    )
    assert plan.prefill_expected < 0.6 * 16 * 2 * plan.terms["chunk_step"]


def test_the_link_that_the_limits_need_is_where_the_verdict_turns():
    needs = make_plan(PlanRequest("two_hosts")).pipeline
    assert needs is not None
    assert needs.least_gb_per_s is not None
    assert needs.most_round_trip_us is not None
    for gb_per_s, round_trip, verdict in (
        (needs.least_gb_per_s, 60, "fits"),
        (needs.least_gb_per_s * 0.98, 60, "impossible"),
        (2.94, needs.most_round_trip_us, "fits"),
        (2.94, needs.most_round_trip_us * 1.02, "impossible"),
    ):
        assert (
            make_plan(
                PlanRequest("two_hosts", network=links.load_link("25gbe", gb_per_s, round_trip), search=False)
            ).verdict
            == verdict
        )


def test_a_link_too_slow_is_refused_with_the_one_that_would_do():
    plan = make_plan(PlanRequest("two_hosts", network=links.load_link("10gbe", 0.01)))
    assert plan.verdict == "impossible"
    assert plan.reasons[0].startswith(
        "network: 10 Gbit/s Ethernet with 0.01 GB/s and a round trip of 100 us is too slow for 200 ms a token"
    )
    assert "use a link with at least 0.0" in plan.reasons[0]
    assert plan.nearest == "low_mem"
    assert "on 2 cards of one host" in plan.reasons[-1]


def test_a_limit_that_no_link_meets_is_not_the_links_fault():
    plan = make_plan(PlanRequest("two_hosts", input_tokens=1900, output_tokens=100, clients=64, search=False))
    assert plan.pipeline is not None
    assert plan.pipeline.least_gb_per_s is None
    assert plan.verdict == "slow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"overrides": {"tensor_parallel_size": 2}},
            "tensor_parallel_size=2 is more than the 1 card(s) of a host",
        ),
        (
            {"overrides": {"pipeline_parallel_size": 1}},
            "pipeline_parallel_size=1 does not divide its stages evenly among 2 hosts",
        ),
        ({"overrides": {"pipeline_parallel_size": 4}}, "need 2 cards a host, which has 1"),
        (
            {"overrides": {"pipeline_parallel_size": 64}, "count": 64, "model": "smollm2-135m"},
            "is more than the 30 layers",
        ),
        (
            {"environment": {"VLLM_PP_LAYER_PARTITION": "40,39"}},
            "VLLM_PP_LAYER_PARTITION='40,39' is not 2 numbers from 1 that add up to 80",
        ),
        ({"environment": {"VLLM_PP_LAYER_PARTITION": "40;40"}}, "VLLM_PP_LAYER_PARTITION='40;40'"),
        (
            {"network": "token-ring"},
            "network 'token-ring' is not in the table; use one of 10gbe, 25gbe, 100gbe, infiniband",
        ),
        ({"hosts": 0}, "hosts=0 is not from 1 to 64"),
        (
            {"deploy": {**DEPLOY, "nodes": ["10.0.0.1"]}},
            "nodes has 1 addresses and the server spans 2 host(s)",
        ),
        (
            {"deploy": {**DEPLOY, "nodes": ["10.0.0.1", "10.0.0.1"]}},
            "nodes has 10.0.0.1 more than once; give each host its own address",
        ),
        (
            {"deploy": {**DEPLOY, "nodes": ["10.0.0.1", "gpu-2"]}},
            "nodes has 'gpu-2', which is not an IP address",
        ),
        (
            {"deploy": {**DEPLOY, "nodes": ["10.0.0.1", "127.0.1.1"]}},
            "nodes has 127.0.1.1, which no other host can reach",
        ),
        ({"deploy": {**DEPLOY, "rank": 2}}, "rank=2 is not a rank of the 2 host(s) of the server"),
        ({"deploy": {**DEPLOY, "port": 29501}}, "port=29501 and master_port are the same"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(BadInput) as e:
        make_plan(PlanRequest("two_hosts", **arguments))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_several_hosts_need_a_network():
    with pytest.raises(BadInput, match="hosts=2 needs a network between the hosts: name one of 10gbe"):
        make_plan(PlanRequest("low_mem", hosts=2, overrides={"pipeline_parallel_size": 2}))
    for figures in ({"gb_per_s": 0.0}, {"round_trip_us": float("nan")}):
        with pytest.raises(BadInput, match="is not a positive number"):
            links.load_link("10gbe", **figures)


def test_what_each_host_runs():
    plan = make_plan(PlanRequest("two_hosts", deploy=DEPLOY))
    head, worker = plan.nodes
    engine = [
        "--tensor-parallel-size", "1", "--pipeline-parallel-size", "2", "--dtype", "float16",
        "--max-model-len", "2048",
        "--max-num-seqs", "8",
        "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(10256 * 163_840),
        "--gpu-memory-utilization", "0.4799",
        "--distributed-executor-backend", "mp", "--nnodes", "2",
    ]  # fmt: skip
    server = [
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", "8000", "--middleware",
        "lowmem.service.admission.Admission", "--middleware", "lowmem.api_keys.ApiKeys",
        "--allowed-media-domains", "media.invalid", "--structured-outputs-config", '{"backend":"xgrammar"}',
        "--shutdown-timeout", "62",
    ]  # fmt: skip
    meet = ["--master-addr", "10.0.0.1", "--master-port", "29501"]
    assert head.argv == ["/srv/m", *server, *engine, "--node-rank", "0", *meet]
    assert worker.argv == ["/srv/m", *engine, "--node-rank", "1", *meet, "--headless"]
    assert plan.argv == head.argv
    for node in plan.nodes:
        environment = {v.name: v.value for v in node.environment}
        assert environment["VLLM_HOST_IP"] == node.address
        assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "eth1"
        assert environment["NCCL_MAX_NCHANNELS"] == "2"
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_each_host_has_the_same_plan_with_its_own_arguments():
    plans = [make_plan(PlanRequest("two_hosts", deploy={**DEPLOY, "rank": rank})) for rank in (0, 1)]
    assert plans[0].nodes == plans[1].nodes
    assert [plan.argv for plan in plans] == [node.argv for node in plans[0].nodes]
    assert [plan.environment for plan in plans] == [node.environment for node in plans[0].nodes]
    different = {"arguments", "environment", "deploy"}
    assert plans[0].model_dump(exclude=different | {"argv"}) == plans[1].model_dump(
        exclude=different | {"argv"}
    )
    # vLLM's own 600 s would be shorter than what the unit may take
    waits = [{v.name: v.value for v in plan.environment}.get("VLLM_ENGINE_READY_TIMEOUT_S") for plan in plans]
    assert waits == [str(plans[0].service.timeout_start_s), None]


def test_stages_inside_one_host_need_no_network():
    plan = make_plan(
        PlanRequest("low_latency", count=2, overrides={"pipeline_parallel_size": 2}, search=False)
    )
    assert [s.node for s in plan.stages] == [0, 0]
    assert plan.nodes == ()
    assert plan.pipeline is not None
    assert plan.pipeline.network is None
    assert "--nnodes" not in plan.argv


def test_a_host_with_two_cards_cuts_its_stage_in_two():
    plan = make_plan(
        PlanRequest(
            "low_mem", hosts=2, network="25gbe", overrides={"pipeline_parallel_size": 2}, search=False
        )
    )
    whole = make_plan(PlanRequest("two_hosts", search=False))
    assert plan.device_count == 2
    assert plan.stages[0].weight_terms["sharded"] == whole.stages[0].weight_terms["sharded"] // 2
    assert len(plan.nodes) == 2


def test_a_tied_embedding_is_on_both_ends():
    plan = make_plan(
        PlanRequest(
            "demo_cpu", hosts=2, network="10gbe", overrides={"pipeline_parallel_size": 2}, search=False
        )
    )
    first, last = plan.stages
    assert first.weight_terms["sharded"] == last.weight_terms["sharded"]
    assert first.weight_terms["sharded"] > make_plan(PlanRequest("demo_cpu")).weight_terms["sharded"] / 2


def test_older_engines_and_types_that_are_not_modelled_are_refused():
    assert any(
        "use 0.32.0 or later" in r
        for r in make_plan(PlanRequest("two_hosts", vllm_version="0.31.0", search=False)).reasons
    )
    refused = make_plan(
        PlanRequest("two_hosts", overrides={"kv_cache_dtype": "turboquant_4bit_nc"}, search=False)
    )
    assert any("is not modelled with pipeline stages" in r for r in refused.reasons)
