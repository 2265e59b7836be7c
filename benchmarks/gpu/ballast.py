#!/usr/bin/env python3
"""Plays a smaller card on a larger one: holds all but N MiB of each visible GPU until it gets SIGTERM.

python3 benchmarks/gpu/ballast.py --leave-mib 40960 [--gpus 0,1]

Prints `ready` when the memory is held. The holder's own CUDA context counts as held. Allocations are plain
cudaMalloc, no managed memory. Memory that others use already counts as held too, so start it before the
service.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

# Each tensor its own cudaMalloc: the caching allocator would take 20 MiB for the last 2.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import pynvml
import torch

MIB = 2**20


def used_mib(index: int) -> tuple[int, int]:
    """Used and total, as nvidia-smi prints them."""
    info = pynvml.nvmlDeviceGetMemoryInfo(
        pynvml.nvmlDeviceGetHandleByIndex(index), version=pynvml.nvmlMemory_v2
    )
    return info.used // MIB, info.total // MIB


def hold(index: int, leave_mib: int) -> list[torch.Tensor]:
    torch.ones(1, device=f"cuda:{index}")
    held: list[torch.Tensor] = []
    # In pieces, each after a look: the driver rounds up, and the limit is what NVML shows, not what was asked
    # for.
    for piece_mib in (16384, 4096, 1024, 256, 64, 16, 2):
        while True:
            used, total = used_mib(index)
            if total - used - leave_mib < piece_mib:
                break
            held.append(torch.empty(piece_mib * MIB, dtype=torch.uint8, device=f"cuda:{index}"))
            torch.cuda.synchronize(index)
    used, total = used_mib(index)
    print(f"GPU {index}: {total - used} MiB of {total} MiB left", flush=True)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leave-mib", type=int, required=True, help="free memory to leave on each GPU")
    parser.add_argument("--gpus", help="their numbers, comma-separated (default: all)")
    options = parser.parse_args()
    pynvml.nvmlInit()
    visible = range(torch.cuda.device_count())
    gpus = [int(word) for word in options.gpus.split(",")] if options.gpus else list(visible)
    for index in gpus:
        if index not in visible:
            sys.exit(f"ballast: --gpus {options.gpus}: {len(visible)} are visible, from 0")
        total = used_mib(index)[1]
        if not 0 < options.leave_mib < total:
            sys.exit(
                f"ballast: --leave-mib {options.leave_mib}: GPU {index} has {total} MiB, a number between is"
                " wanted"
            )
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    signal.signal(signal.SIGINT, lambda *_: done.set())
    held = [hold(index, options.leave_mib) for index in gpus]
    print("ready", flush=True)
    done.wait()
    held.clear()


if __name__ == "__main__":
    main()
