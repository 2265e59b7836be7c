"""Measures the memory that a GPU uses before a model is loaded, and the speed of its memory and host link.

It reads NVML on the host it runs on:

- the CUDA context of one process, then the same process after its first matrix product (cuBLAS workspace and
  kernels);
- the host link: pinned copies of 1 GiB in both directions;
- the HBM: a device-to-device copy, bytes read and written;
- with two or more GPUs: NCCL's memory per GPU for one tensor-parallel group, for each environment in
  NCCL_CASES.

    python benchmarks/gpu/probe.py --out probe.json

Each case runs in processes of its own, because neither a context nor NCCL's buffers are given back before the
process ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20
NCCL_CASES: list[dict[str, str]] = [
    {},
    {"NCCL_MAX_NCHANNELS": "8"},
    {"NCCL_MAX_NCHANNELS": "4"},
    {"NCCL_MAX_NCHANNELS": "2"},
    {"NCCL_MAX_NCHANNELS": "4", "NCCL_BUFFSIZE": "1048576"},
    {"NCCL_MAX_NCHANNELS": "2", "NCCL_BUFFSIZE": "1048576"},
    {"NCCL_MAX_NCHANNELS": "1", "NCCL_BUFFSIZE": "1048576"},
    {"NCCL_CUMEM_ENABLE": "0"},
    {"NCCL_CUMEM_ENABLE": "0", "NCCL_MAX_NCHANNELS": "2", "NCCL_BUFFSIZE": "1048576"},
    {
        "CUDA_MODULE_LOADING": "LAZY",
        "NCCL_MAX_NCHANNELS": "2",
        "NCCL_BUFFSIZE": "1048576",
        "NCCL_RUNTIME_CONNECT": "0",
    },
    {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_MAX_NCHANNELS": "2", "NCCL_BUFFSIZE": "1048576"},
]


def used_mib(index: int) -> float:
    """MiB in use on a GPU, as NVML (and nvidia-smi) shows it, from every process."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).used) / MIB


def single(index: int = 0) -> dict[str, Any]:
    import torch

    base = used_mib(index)
    torch.cuda.init()
    torch.cuda.synchronize()
    out: dict[str, Any] = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0),
        "context_mib": used_mib(index) - base,
    }
    a = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    out["first_tensor_mib"] = used_mib(index) - base
    _ = a @ a
    torch.cuda.synchronize()
    out["first_matmul_mib"] = used_mib(index) - base
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(card)

    def gb_per_s(dst: Any, src: Any, moved: int) -> float:
        best = 0.0
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            dst.copy_(src, non_blocking=True)
            end.record()
            torch.cuda.synchronize()
            best = max(best, moved / (start.elapsed_time(end) / 1e3) / 1e9)
        return round(best, 1)

    out["host_to_device_gb_per_s"] = gb_per_s(card, host, 2**30)
    out["device_to_host_gb_per_s"] = gb_per_s(host, card, 2**30)
    out["hbm_gb_per_s"] = gb_per_s(other, card, 2**31)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(3):
        x @ x
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        x @ x
    end.record()
    torch.cuda.synchronize()
    out["fp16_tflop_per_s"] = round(10 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3) / 1e12)
    return out


def nccl_rank(rank: int, world: int, base: float) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    x = torch.ones(512 * 8192, device="cuda", dtype=torch.float16)
    context = used_mib(rank) - base
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=torch.device("cuda", rank))
    dist.all_reduce(x)
    torch.cuda.synchronize()
    after_all_reduce = used_mib(rank) - base - context
    parts = [torch.empty_like(x) for _ in range(world)]
    torch.cuda.synchronize()
    before_gather = used_mib(rank)
    dist.all_gather(parts, x)
    torch.cuda.synchronize()
    gather = used_mib(rank) - before_gather
    for _ in range(10):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    ms = (time.perf_counter() - start) / 50 * 1e3
    dist.destroy_process_group()
    return {
        "context_mib": context,
        "nccl_mib": after_all_reduce,
        "all_gather_mib": gather,
        "all_reduce_8mib_ms": round(ms, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="probe.json")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--base", type=float, default=0.0)
    parser.add_argument("--single", action="store_true")
    args = parser.parse_args()
    if args.single:
        print(json.dumps(single()))
        return
    if args.rank is not None:
        print(json.dumps(nccl_rank(args.rank, args.world, args.base)))
        return
    me = [sys.executable, str(Path(__file__).resolve())]
    one = subprocess.run([*me, "--single"], capture_output=True, text=True, timeout=120)
    report: dict[str, Any] = {
        "single": json.loads(one.stdout.splitlines()[-1]) if one.returncode == 0 else one.stderr[-2000:],
        "nccl": [],
    }
    print(json.dumps(report["single"]), flush=True)
    import pynvml

    pynvml.nvmlInit()
    if pynvml.nvmlDeviceGetCount() >= args.world > 1:
        for number, case in enumerate(NCCL_CASES):
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29610 + number), **case}
            procs = [
                subprocess.Popen(
                    [*me, "--rank", str(r), "--world", str(args.world), "--base", str(used_mib(r))],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for r in range(args.world)
            ]
            done = [p.communicate(timeout=120) for p in procs]
            ranks = [
                json.loads(said.splitlines()[-1]) if process.returncode == 0 else {"error": errors[-500:]}
                for process, (said, errors) in zip(procs, done, strict=True)
            ]
            report["nccl"].append({"environment": case, "ranks": ranks})
            print(json.dumps(report["nccl"][-1]), flush=True)
    Path(args.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
