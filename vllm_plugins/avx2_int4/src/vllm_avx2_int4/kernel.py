"""Implements the kernel, and repacks vLLM's checkpoint layout to PyTorch's."""

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.scalar_type import scalar_types

BITS = 4
VALUES_PER_WORD = 32 // BITS
# aten::_weight_int4pack_mm_for_cpu computes w = (q - 8) * scale + offset
MIDPOINT = 8
# the group sizes and the block of output rows that aten::_convert_weight_to_int4pack_for_cpu takes
GROUP_SIZES = (32, 64, 128, 256)
ROWS_PER_BLOCK = 32


def unpack(words: torch.Tensor, dim: int) -> torch.Tensor:
    """Unpack int32 words along `dim` to int32 values 0..15.

    Each word holds eight values, the first in the lowest bits. The size along `dim` becomes eight times as
    large.
    """
    words = words.movedim(dim, -1)
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2).movedim(-1, dim)


def pack(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack weights to the layout of `aten::_weight_int4pack_mm_for_cpu`, so that w = (values - zeros) *
    scales.

    values are int32 [out, in], 0..15. scales and zeros are [out, groups]; zeros None means MIDPOINT
    everywhere. Returns the packed weight, uint8 [out, in / 2], and scale and offset, bfloat16 [groups, out,
    2].
    """
    scales = scales.float()
    offset = torch.zeros_like(scales) if zeros is None else (MIDPOINT - zeros) * scales
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)
    return packed, torch.stack([scales.t(), offset.t()], dim=-1).to(torch.bfloat16).contiguous()


class Int4PackLinearKernel(MPLinearKernel):
    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8):
            return False, f"weight type {c.weight_type} is not 4-bit"
        inputs, outputs = c.partition_weight_shape
        if c.group_size not in GROUP_SIZES:
            return False, f"group size {c.group_size} is none of {GROUP_SIZES}"
        if inputs % c.group_size or outputs % ROWS_PER_BLOCK:
            return (
                False,
                f"{inputs} inputs, {outputs} outputs: no multiples of {c.group_size} and {ROWS_PER_BLOCK}",
            )
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        def rows_first(parameter: torch.nn.Parameter, data: torch.Tensor) -> torch.Tensor:
            return data if parameter.output_dim == 0 else data.t()

        weight, scales, zeros = self._get_weight_params(layer)
        packed, scales_and_offsets = pack(
            rows_first(weight, unpack(weight.data, weight.packed_dim)),
            rows_first(scales, scales.data),
            rows_first(zeros, unpack(zeros.data, zeros.packed_dim)) if self.config.zero_points else None,
        )
        replace_parameter(layer, self.w_q_name, torch.nn.Parameter(packed, requires_grad=False))
        replace_parameter(layer, self.w_s_name, torch.nn.Parameter(scales_and_offsets, requires_grad=False))
        if zeros is not None:
            setattr(layer, self.w_zp_name, None)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight, scales_and_offsets, _ = self._get_weight_params(layer)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.reshape(-1, x.shape[-1]).to(torch.bfloat16), weight, self.config.group_size, scales_and_offsets
        )
        y = y.to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias
