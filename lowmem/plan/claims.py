"""Sets the source article's claims beside figures computed from cards, devices and plans.

No result is typed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem.inputs import model_cards
from lowmem.inputs.devices import load_device
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.plan.weights import stored_bytes
from lowmem.schema import Plan, Quantization
from lowmem.units import GB, GIB, MIB, gib, mib

Holds = Literal["by plan", "no", "barely", "harmful"]

AWQ = Quantization(method="awq", bits=4, group_size=128, zero_point=True)

# The article states these figures of its own run. They are inputs of the arithmetic below, not results.
STATED_PEAK_GB = 19

STATED_LATENCY_MS = 125

STATED_QPS = 4.9

# These replace the profile's prefetch back end.
UVA = {"offload_group_size": 0, "offload_num_in_group": 1, "enforce_eager": False}

CLIENTS, INPUT_TOKENS, OUTPUT_TOKENS = 8, 1024, 256


@dataclass(frozen=True)
class Claim:
    """Claim of the article, whether it holds, why, and what the recipe does instead."""

    claim: str
    holds: Holds
    truth: str
    recipe: str


def _plan(profile: str, **more: object) -> Plan:
    return make_plan(PlanRequest(profile, search=False, **more))  # type: ignore[arg-type]


def claims() -> list[Claim]:
    """Compute every claim."""
    article, recipe, offload = _plan("article"), _plan("low_mem"), _plan("offload")
    return [
        *_results(article, recipe, offload),
        *_flags(article, recipe, offload),
        *_pool(recipe),
        *_practices(),
    ]


def _results(article: Plan, recipe: Plan, offload: Plan) -> list[Claim]:
    """Compute the results that the article states."""
    device = load_device("a100-40g")
    card = model_cards.quantized(model_cards.load_card("llama-2-70b"), AWQ)
    extreme = _plan("extreme")
    weight = stored_bytes(card)
    request_s = CLIENTS / STATED_QPS
    per_token_ms = request_s / OUTPUT_TOKENS * 1e3
    floor_ms = weight / (device.hbm_gb_per_s * GB) * 1e3
    active = sum(g.parameters for g in card.groups if g.kind != "embedding")
    prefill_tflops = 2 * active * INPUT_TOKENS * STATED_QPS / 1e12
    return [
        Claim(
            "70B with 4-bit AWQ on one A100 40G peaks at 19 GB",
            "no",
            f"The 4-bit weights alone are {weight / GB:.1f} GB ({gib(weight)}),"
            f" {weight / GB - STATED_PEAK_GB:.1f} GB more. These flags leave the engine"
            f" {gib(article.kv_available_bytes)} for its KV cache, and it stops.",
            f"Use two cards at {mib(recipe.peak_bytes)} each, or about 2 bits on one at"
            f" {mib(extreme.peak_bytes)}. Or stream {gib(offload.weight_terms['offloaded'])} from RAM at"
            f" {offload.latency_ms.decode_expected:.0f} ms a token.",
        ),
        Claim(
            f"{STATED_LATENCY_MS} ms mean latency at {STATED_QPS} requests a second, {CLIENTS} clients",
            "no",
            f"Little's law: {CLIENTS} clients / {STATED_QPS} a second = {request_s:.1f} s a request, so"
            f" {OUTPUT_TOKENS} tokens take at most {per_token_ms:.1f} ms each. Reading the weights once takes"
            f" {floor_ms:.1f} ms at {device.hbm_gb_per_s:,.0f} GB/s. The prompts alone are"
            f" {prefill_tflops:,.0f} TFLOP/s on a card of {device.fp16_tflops:g}.",
            f"It expects {recipe.latency_ms.decode_expected:.0f} ms a token on two cards (floor"
            f" {recipe.latency_ms.decode_floor:.1f}). A measurement that breaks the roofline or Little's law"
            " is refused.",
        ),
    ]


def _flags(article: Plan, recipe: Plan, offload: Plan) -> list[Claim]:
    """Compute the article's claims on batch, swap and utilization."""
    flags = [r for r in article.reasons if r.startswith("unrecognized")]
    lower = _plan("article", overrides={"gpu_memory_utilization": 0.40})
    capped = _plan(
        "low_mem",
        device="h200",
        overrides={"gpu_memory_utilization": 0.1424, "enforce_eager": True},
        vllm_version="0.26.0",
    )
    budget = 0.1424 * load_device("h200").torch_total_mib
    return [
        Claim(
            "--max-batch-size 2 bounds the batch",
            "no",
            next(r for r in flags if "max-batch-size" in r),
            "Use --max-num-seqs and --max-num-batched-tokens.",
        ),
        Claim(
            "--swap-space 20 offloads weights and activations",
            "no",
            next(r for r in flags if "swap-space" in r),
            "Offload weights by --cpu-offload-gb or the prefetch back end. That takes"
            f" {gib(offload.host_ram_bytes)} of host RAM, of which"
            f" {gib(offload.host_ram.get('pinned_offload', 0))} is pinned and cannot be swapped.",
        ),
        Claim(
            "--gpu-memory-utilization 0.45 reserves the rest; lower it when memory runs out",
            "no",
            "Weights, activations and KV cache must fit into this budget. The engine is"
            f" {gib(-article.kv_available_bytes)} short at 0.45 and {gib(-lower.kv_available_bytes)} short at"
            " 0.40. The budget is also no cap, since context and NCCL come on top: a budget of"
            f" {budget:,.0f} MiB shows {capped.per_gpu['total'] / MIB:,.0f} MiB on each of two H200.",
            f"The plan sizes the pool ({recipe.per_gpu['kv_cache'] / MIB:,.0f} MiB), and NVML checks the"
            " limit under load.",
        ),
    ]


def _pool(recipe: Plan) -> list[Claim]:
    """Compute the article's claims on the KV cache and on offload."""
    card = model_cards.quantized(model_cards.load_card("llama-2-70b"), AWQ)
    half = _plan("low_latency", overrides={"max_model_len": 1280, "gpu_memory_utilization": 0.95})
    whole = _plan("low_latency", overrides={"max_model_len": 4096, "gpu_memory_utilization": 0.95})
    token_kib = recipe.per_gpu["kv_cache"] / max(1, recipe.kv_tokens) * recipe.tensor_parallel_size / 1024
    naive_kib = card.layers * card.hidden_size * 2 / 1024
    ignored = _plan(
        "offload",
        device="h200",
        overrides=UVA | {"cpu_offload_gb": 19, "gpu_memory_utilization": 0.1389},
        vllm_version="0.26.0",
    )
    return [
        Claim(
            "--max-model-len 2048 halves the KV cache",
            "no",
            f"The budget sizes the pool: at the same utilization it is {half.kv_tokens:,} tokens with 1,280"
            f" and {whole.kv_tokens:,} with 4,096.",
            "The plan sizes the pool; max_model_len is the longest request.",
        ),
        Claim(
            "KV cache = sequences x length x layers x hidden size",
            "no",
            f"2 x {card.layers} layers x {card.kv_heads} KV heads x {card.head_dim} x 2 bytes ="
            f" {token_kib:.0f} KiB a token. The article's formula gives {naive_kib:,.0f} KiB.",
            "The plan reads config.json and counts grouped-query attention.",
        ),
        Claim(
            "--cpu-offload-gb works since 0.4.0",
            "no",
            "It came with 0.5.3, and 0.24 to 0.27 silently ignore it. With 19 GiB asked for,"
            f" {gib(ignored.per_gpu['weights'])} are loaded and {gib(ignored.kv_available_bytes)} left for"
            " the KV cache.",
            'vLLM is pinned, and the log must say "Total CPU offloaded parameters".',
        ),
    ]


def _practices() -> list[Claim]:
    """Compute what the article advises for every deployment."""
    graphs = _plan("low_latency", device="h200")
    eager = _plan("low_latency", device="h200", overrides={"enforce_eager": True})
    return [
        Claim(
            "--quantization awq is needed",
            "harmful",
            "vLLM reads the method from the checkpoint. Naming it forced a slow kernel before 0.24, and"
            " fails on a directory that is not quantized.",
            "The recipe leaves it out and checks the checkpoint first.",
        ),
        Claim(
            "--enforce-eager saves about 2 GB",
            "barely",
            f"Graphs for up to {2 * CLIENTS} sequences take {graphs.per_gpu['cuda_graphs'] / MIB:,.0f} MiB."
            f" Without them an H200 takes {eager.latency_ms.decode_expected:.0f} ms a token instead of"
            f" {graphs.latency_ms.decode_expected:.0f}.",
            "Graphs are on, for few sizes.",
        ),
        Claim(
            "--disable-log-stats is good practice",
            "harmful",
            "It removes the engine's metrics.",
            "The recipe never sets it.",
        ),
        Claim(
            "the script runs as pasted",
            "no",
            "A comment after a line-continuation backslash ends the command.",
            "The launcher is an array of arguments, each with its reason, checked by bash -n and shellcheck.",
        ),
        Claim(
            "python -m awq.entrypoints.convert quantizes",
            "no",
            "This module does not exist. The Python API quantizes, and AutoAWQ is archived.",
            "AutoAWQ and its successor llm-compressor are pinned, each in its own environment. A perplexity"
            " check follows.",
        ),
        Claim(
            "KeyError: qweight means: quantize again",
            "no",
            "Mostly the quantization_config is missing from config.json.",
            "`lowmem plan --model DIR` reads config.json and the safetensors headers, and names the cause.",
        ),
    ]


def goal() -> Claim:
    """Compute the article's goal, which is the recipe's too."""
    plan = _plan("low_mem")
    holds: Holds = "by plan" if plan.verdict == "fits" else "no"
    return Claim(
        "goal: 20 GB per card, 200 ms a token, throughput loss at most 30 %",
        holds,
        f"Two A100 40G: {plan.peak_bytes / GIB:.2f} GiB a card under load,"
        f" {plan.latency_ms.decode_expected:.0f} ms a token expected at {CLIENTS} clients.",
        "Use profile low_mem. On two H200 that emulated A100-40G it took 20,430 MiB, 17.7 ms p99 and 4 % less"
        " throughput (docs/measurements/README.md).",
    )


def markdown() -> str:
    """Render docs/claims.md."""
    lines = [
        "# The source article's claims",
        "",
        (
            "Generated by `lowmem check-article --markdown`; the plan computes every number when this page is"
            " made (a test compares)."
        ),
        (
            "Figures for an A100 are predictions; the measurements are under `docs/measurements/`, with the"
            " name of the GPU."
        ),
        "",
        "| claim | holds | what is true | what the recipe does |",
        "|---|---|---|---|",
    ]
    lines += [f"| {c.claim} | {c.holds} | {c.truth} | {c.recipe} |" for c in [*claims(), goal()]]
    return "\n".join(lines) + "\n"
