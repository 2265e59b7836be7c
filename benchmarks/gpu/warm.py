"""Compiles FlashAttention 2 for a Hopper card ahead of the engine's start, into the driver's cache.

    python benchmarks/gpu/warm.py &

vLLM's FlashAttention 2 holds machine code for Ampere only. On a Hopper card that emulates an A100, the driver
compiles it at first use. That takes 20 to 75 s for each of its modules, in the middle of the engine's start.
It was seen with py-spy (docs/measurements). Two processes do it beside the loading instead. An A100 needs
none of this.
"""

from __future__ import annotations

import subprocess
import sys
import time


def attend(query_tokens: int) -> None:
    """Run one paged call with Llama-2-70B's head shapes at TP=2.

    A single query token per request takes the decode module.
    """
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    requests, blocks, block = 8, 64, 16
    cache = torch.zeros(2, blocks, block, 4, 128, dtype=torch.float16, device="cuda")
    flash_attn_varlen_func(
        q=torch.zeros(requests * query_tokens, 32, 128, dtype=torch.float16, device="cuda"),
        k=cache[0],
        v=cache[1],
        out=torch.empty(requests * query_tokens, 32, 128, dtype=torch.float16, device="cuda"),
        cu_seqlens_q=torch.arange(
            0, (requests + 1) * query_tokens, query_tokens, dtype=torch.int32, device="cuda"
        ),
        max_seqlen_q=query_tokens,
        seqused_k=torch.full((requests,), 64, dtype=torch.int32, device="cuda"),
        max_seqlen_k=64,
        softmax_scale=0.1,
        causal=True,
        block_table=torch.arange(requests * 4, dtype=torch.int32, device="cuda").view(requests, 4),
        fa_version=2,
    )
    torch.cuda.synchronize()


def main() -> None:
    if len(sys.argv) > 1:
        began = time.monotonic()
        attend(int(sys.argv[1]))
        print(f"FlashAttention 2, {sys.argv[1]} query tokens: {time.monotonic() - began:.0f} s", flush=True)
        return
    for process in [subprocess.Popen([sys.executable, __file__, tokens]) for tokens in ("1", "32")]:
        process.wait()


if __name__ == "__main__":
    main()
