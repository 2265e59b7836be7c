"""docs/planning.md: the text stands here, the numbers and tables are computed. `python -m lowmem.planning_page` prints it; a test compares."""

from __future__ import annotations

import sys
from pathlib import Path

from lowmem import cards, profiles
from lowmem.data import load_yaml
from lowmem.memory import stored_bytes
from lowmem.planner import make_plan
from lowmem.reference import load_runs
from lowmem.schema import Quantization
from lowmem.units import GB, GIB, MIB

RUNS = Path(__file__).parent.parent / "tests" / "data" / "gpu_runs.json"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _error(planned: float, measured: float | None) -> str:
    return "–" if not measured else f"{(planned - measured) / measured * 100:+.1f} %"


def reference_table() -> list[str]:
    """Prediction beside measurement for every reference run."""
    used = set(load_yaml("calibration.yml")["calibrated_on"])
    lines = [
        "| run | vLLM | idle MiB planned | measured | error | KV tokens planned | measured | ms a token planned | measured | error | outcome |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in load_runs(RUNS):
        p, started = r.plan, r.idle_mib is not None
        idle = _number(r.planned_idle_mib) if started else "–"
        tpot = _number(p.latency_ms.decode_expected, 1) if started else "–"
        if started:
            outcome = "started, as planned" if p.verdict != "impossible" else "started, refused by the plan"
        else:
            said = (
                f"{p.kv_available_bytes / GIB:.2f} GiB for KV planned"
                if r.kv_gib is None
                else f"{p.kv_available_bytes / GIB:.2f} GiB for KV planned, {r.kv_gib:.2f} logged"
            )
            outcome = f"refused as planned: {r.error.split(':')[0] if r.error else ''}; {said}"
        lines.append(
            f"| {r.name}{' (calibrates)' if f'{r.name}-{r.vllm}' in used else ''} | {r.vllm} | {idle} | {_number(r.idle_mib)} | {_error(r.planned_idle_mib, r.idle_mib)} "
            f"| {_number(p.kv_tokens) if started else '–'} | {_number(r.kv_tokens)} | {tpot} | {_number(r.tpot_ms, 1)} | {_error(p.latency_ms.decode_expected, r.tpot_ms)} | {outcome} |"
        )  # fmt: skip
    return lines


def profile_table() -> list[str]:
    """The plan of each profile as it stands."""
    lines = [
        "| profile | on | verdict | MiB a card under load | limit | KV tokens | requests | ms a token expected | floor | host RAM GiB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in profiles.names():
        p = make_plan(name, search=False)
        lines.append(
            f"| {name} | {p.device_count} x {p.device} | {p.verdict} | {p.peak_bytes / MIB:,.0f} | {p.limit_bytes / MIB:,.0f} | {p.kv_tokens:,} | {p.max_requests} "
            f"| {p.latency_ms.decode_expected:,.0f} | {p.latency_ms.decode_floor:,.1f} | {p.host_ram_bytes / GIB:.1f} |"
        )  # fmt: skip
    return lines


def calibration_table() -> list[str]:
    """Every constant that no formula gives, with its source."""
    lines = ["| constant | value | source |", "|---|---|---|"]
    for section, entries in load_yaml("calibration.yml").items():
        if section == "calibrated_on":
            continue
        for name, entry in entries.items():
            value = entry["value"]
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"| {section}.{name} | {shown} | {entry['source']} |")
    return lines


def page() -> str:
    """The whole page."""
    awq = cards.quantized(cards.load_card("llama-2-70b"), Quantization(method="awq", bits=4, group_size=128, zero_point=True))
    total, stored = awq.parameters, stored_bytes(awq)
    linear = sum(g.parameters for g in awq.groups if g.kind == "linear")
    ends = sum(g.parameters for g in awq.groups if g.kind in ("embedding", "lm_head"))
    text = f"""# The plan: what will fit, how fast it can be

`lowmem plan` takes a profile, a model card and a device and says, before a host is touched, what every term of memory will be, how fast a token can
be and is expected to be, and whether to deploy at all. This page is made by `python -m lowmem.planning_page`; its numbers are computed.

```
lowmem plan --profile low_mem                     # the profile's own model, device and number of cards
lowmem plan --profile low_mem --model ./checkpoint --device h100 --count 2 --set max_num_seqs=16 --clients 16 --json
lowmem plan --suggest --count 1                   # which settings meet the limits, best first
lowmem explain low_mem                            # each flag, why, and what it costs or saves
lowmem frontier --model llama-2-70b --out f.svg   # memory against latency
lowmem check-article                              # the source article's claims, computed
```

Exit status: 0 fits, 3 slow (it starts and misses a latency limit, or some clients wait for KV), 2 impossible, 1 bad input (one line on stderr).

## Units
MiB and GiB are powers of two (NVML, vLLM's log); MB and GB are powers of ten (datasheets). Names carry their unit.

## Memory of one card

```
total = weights + kv_cache + activations + cuda_context + nccl + cuda_graphs + offload_buffers     what NVML shows at idle
peak  = total + load_growth                                                                        held against the limit
```

- **weights**, what the engine logs as "Model loading took". Every tensor is counted from config.json: embedding, lm_head and norms at 16 bits, each
  quantized linear of `out x in` weights as `out x in x bits / 8` + `ceil(in / group) x out` scales of 2 bytes + as many zero points of `bits` bits where
  the method has them. Llama-2-70B: {total:,} parameters, of which {linear:,} in linears at 4 bits and {ends:,} in embedding and lm_head:
  {stored / GB:.2f} GB. Tensor parallelism cuts linears, embedding and lm_head (the vocabulary is padded to a multiple of 64 first) and copies norms.
  Key/value heads are cut too, and repeated once there are more cards than heads. Kernels repack: Marlin keeps the size; Machete (Hopper) holds zero
  points in 16 bits. `weight_terms` of the JSON has the parts.
- **kv_cache**: blocks of 16 tokens, `2 x layers x kv_heads / TP x head_dim x bytes` a token. `int8_per_token_head` and `int4_per_token_head` add 8 bytes of
  scales a token and head; TurboQuant keeps the first and last two layers at 16 bits.
  - `kv_cache_memory_bytes: auto` (the profiles): what the limit leaves after every other term and a margin, at most `max_num_seqs` requests of
    `max_model_len`. The plan writes it as `--kv-cache-memory-bytes`, and beside it a `--gpu-memory-utilization` that only serves vLLM's start-up check.
  - `kv_cache_memory_bytes` given: that, in whole blocks.
  - `gpu_memory_utilization` given: `utilization x total - weights - peak activations - growth - graph estimate`, as the engine computes it, where
    *total* is what cudaMemGetInfo says (less than memory.total of nvidia-smi). Context and NCCL are **not** inside this budget: the engine takes its first
    snapshot after both exist. Below zero the engine stops with "No available memory for the cache blocks", and the plan says so with the same number.
- **activations** is what the allocator still holds at idle; the peak, `tokens x (2 x hidden + max(3 x intermediate / TP, attention)) x bytes` at
  `max_num_batched_tokens` or the logits of `max_num_seqs` rows, comes back under load (`load_growth`), with kernels loaded at their first use.
- **cuda_context**: context, kernels and library handles. **nccl**: NCCL's and the custom all-reduce's buffers. **cuda_graphs**: a base and a share for
  each captured size. These have no formula; they are measured (table below).
- **offload**: UVA (`cpu_offload_gb`) takes whole parameters of decoder layers in order until the number is reached; prefetch takes the last N of every G
  layers and holds `offload_prefetch_step` of them in buffers on the card. vLLM 0.24 to 0.27 ignore both without a word: the plan for such a version says so.
- **While starting** the card can show more than `peak`: the allocator caches what loading and repacking free. It gives that back when the card is
  short, so it is no reason to refuse; a receipt states it apart (`memory_peak_start_bytes`).

## Host RAM
`host_ram` is the running service: API server, one worker a card, pinned offload, KV offload. PyTorch's pinned allocator rounds each tensor up to a power
of two, so 19 GiB of offload can take up to twice that. Pinned memory is neither swapped nor dropped. `stage_ram` is what stages before need: quantization
holds the 16-bit model (swap can back most of it), loading reads through the page cache (droppable).

## Latency
For one decode step of `c` sequences, in ms:

```
hbm_weights  = (weights read) / HBM bandwidth          hbm_kv = c x context x KV bytes a token / HBM bandwidth
link_offload = bytes offloaded / host link bandwidth   flops  = 2 x active parameters x c / (FLOP rate x TP)
decode_floor = max(hbm_weights + hbm_kv, link_offload, flops)
```

No engine can be under the floor; a receipt that is has a mistake in it. The expectation divides each by the efficiency seen of its kernel, adds launches
(eager: a decoder layer costs host time, whatever the card), the all-reduces, a constant per step, and the steps in which other clients' prompts pass: while a request
makes `output` tokens each of the other `c - 1` clients sends one prompt of `ceil(input / max_num_batched_tokens)` steps. `prefill` is one prompt alone;
`terms.ttft_all_at_once` is the last of `c` prompts that arrive together.

## The profiles as planned

{chr(10).join(profile_table())}

## Prediction beside measurement
Llama-2-70B shapes on NVIDIA H200 (`tests/data/gpu_runs.json`). Rows marked "calibrates" were used for the constants; the others are tests
(`tests/unit/test_reference.py`: idle memory within 2 %, decode within 15 %).

{chr(10).join(reference_table())}

## Constants

{chr(10).join(calibration_table())}

Devices and the source of each of their figures: `lowmem/data/devices.yml`.
"""
    return text


if __name__ == "__main__":
    sys.stdout.write(page())
