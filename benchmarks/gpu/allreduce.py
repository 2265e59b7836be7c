"""Times an all-reduce of a decode or prefill step on these cards.

It compares vLLM's custom kernel with NCCL, eager and in a CUDA graph.

    python benchmarks/gpu/allreduce.py --out allreduce.json

Run it with the engine's environment on a host with two GPUs. It takes a few MiB of each card. Times are the
mean of 50 calls on rank 0. `good` in the result says whether the custom kernel is usable here: every size
under 1 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN = 8192
TOKENS = (1, 8, 32, 128, 480)
CALLS = 50
USABLE_MS = 1.0


def timed_ms(call: Callable[[], Any]) -> float:
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(float(begin.elapsed_time(end)) / CALLS, 4)


def rank_main(rank: int, world: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    custom = CustomAllreduce(group=dist.new_group(backend="gloo"), device=device)
    rows = []
    for tokens in TOKENS:
        x = torch.ones(tokens, HIDDEN, dtype=torch.float16, device=device)
        row: dict[str, Any] = {"tokens": tokens, "bytes": x.numel() * 2}
        dist.barrier()
        row["nccl_ms"] = timed_ms(lambda x=x: dist.all_reduce(x))  # type: ignore[misc]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                dist.all_reduce(x)
        row["nccl_graph_ms"] = round(timed_ms(graph.replay) / 8, 4)
        if custom.disabled:
            rows.append(row)
            continue
        y = torch.ones_like(x)
        dist.barrier()
        row["custom_ms"] = timed_ms(lambda y=y: custom.all_reduce(y, registered=False))  # type: ignore[misc]
        graph = torch.cuda.CUDAGraph()
        with custom.capture(), torch.cuda.graph(graph):
            for _ in range(8):
                custom.custom_all_reduce(y)
        dist.barrier()
        row["custom_graph_ms"] = round(timed_ms(graph.replay) / 8, 4)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return {"custom_disabled": custom.disabled, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("allreduce.json"))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--timeout-s", type=float, default=90)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(rank_main(args.rank, 2)), flush=True)
        os._exit(0)  # communicators that hang at exit would hide the result
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "WORLD_SIZE": "2"}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    result: dict[str, Any] = {
        "environment": {k: v for k, v in environment.items() if k.startswith(("NCCL", "TORCH_SYMM", "VLLM"))}
    }
    try:
        said = ranks[0].communicate(timeout=args.timeout_s)[0]
        result |= json.loads(said.splitlines()[-1]) if said.strip() else {"error": "rank 0 said nothing"}
    except subprocess.TimeoutExpired:
        result["error"] = f"no answer in {args.timeout_s:.0f} s"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    rows = result.get("rows", [])
    result["good"] = bool(rows) and all(
        row.get("custom_graph_ms", 99) < USABLE_MS and row.get("custom_ms", 99) < USABLE_MS for row in rows
    )
    result["took_s"] = round(time.monotonic() - began, 1)
    args.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    raise SystemExit(0 if result["good"] else 3)


if __name__ == "__main__":
    main()
