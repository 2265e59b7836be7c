"""Adds 4-bit linear layers (AWQ, GPTQ, compressed-tensors) to vLLM on CPUs without AVX-512.

vLLM 0.32.0 compiles its own CPU kernel, `torch.ops._C.cpu_gemm_wna16`, into its AVX-512 library only. On an
AVX2 machine the server starts, `/health` answers, and the first request ends the engine. This plugin puts a
kernel before it that keeps the weights in 4 bits. The kernel calls `aten::_weight_int4pack_mm_for_cpu`, which
PyTorch builds for AVX2 as well.
"""

import logging

log = logging.getLogger(__name__)


def register() -> None:
    """Entry point of `vllm.general_plugins`; called once in every vLLM process, and free to
    be called again.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or torch.cpu._is_avx512_supported():
        return

    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    from vllm_avx2_int4.kernel import Int4PackLinearKernel

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if Int4PackLinearKernel not in kernels:
        kernels.insert(0, Int4PackLinearKernel)
        log.info("no AVX-512: 4-bit layers run on PyTorch's int4 kernel")
