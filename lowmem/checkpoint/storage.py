"""Says which tensors the engine registers for a module, by the format of its weight.

The layouts are those of vLLM 0.32.0's own quantization methods, before a kernel repacks them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.checkpoint.architectures import Module
from lowmem.errors import BadInput

DTYPE_BITS = {
    "float64": 64, "int64": 64, "float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "int16": 16,
    "float8": 8, "int8": 8, "uint8": 8, "bool": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Tensor of a module on one GPU: the name behind the module's, the shape and the dtype."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Scheme:
    """Storage format of a quantized weight.

    `group` is the number of weights that share a scale; -1 is a whole row. `block` is rows and columns of an
    fp8 block. `static` names the dtype of scales of activations that the checkpoint brings; "" is none.
    """

    layout: str
    bits: int = 4
    group: int = 128
    zeros: bool = False
    strategy: str = "tensor"
    block: tuple[int, int] = (128, 128)
    static: str = ""
    scale: str = "float32"
    stored_zeros: bool = False
    """Quark brings zero points of int8 weights, though they are all zero."""
    padded: tuple[int, int] = (1, 1)
    """Multiples to which the kernel that vLLM takes rounds hidden and inner size of experts up."""
    online: bool = False
    """The engine makes it while it loads: merged parts share a scale, and a block may cross a border."""


def tensors(module: Module, scheme: Scheme | None, dtype: str) -> Iterator[Stored]:
    """Yield the tensors that a module registers as parameters."""
    own = module.dtype or dtype
    if module.kind == "experts":
        if scheme is None:
            yield from _plain_experts(module, dtype)
        else:
            yield from _EXPERTS[scheme.layout](module, scheme, dtype)
    elif module.kind in ("norm", "tensor"):
        yield Stored("weight" if module.kind == "norm" else "", module.shape, own)
        if module.kind == "norm" and module.bias:
            yield Stored("bias", (module.bias_rows,), own)
    elif module.kind in ("column", "row", "replicated", "embedding", "lm_head"):
        rows = sum(module.out)
        if scheme is None:
            yield Stored("weight", (rows, module.inp), own)
        else:
            yield from _LINEAR[scheme.layout](module, scheme, own)
        if module.bias:
            yield Stored("bias", (module.bias_rows,), own)


def _packed(size: int, bits: int) -> int:
    """Return the words of 32 bits that hold `size` numbers."""
    return math.ceil(size * bits / 32)


def _groups(module: Module, scheme: Scheme, inp: int) -> int:
    """Return the scales of one row on one GPU. BadInput where groups do not divide a row."""
    if scheme.group == -1:
        return 1
    if scheme.group < 1 or inp % scheme.group:
        raise BadInput(
            f"quantization group_size {scheme.group} does not divide the {inp} columns of {module.name} on"
            " one GPU; vLLM refuses it: use fewer GPUs, or a checkpoint of smaller groups"
        )
    return inp // scheme.group


def _gptq(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows, groups = sum(module.out), _groups(module, scheme, module.inp)
    yield Stored("qweight", (_packed(module.inp, scheme.bits), rows), "int32")
    yield Stored("scales", (groups, rows), dtype)
    yield Stored("qzeros", (groups, _packed(rows, scheme.bits)), "int32")


def _awq(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows, groups = sum(module.out), _groups(module, scheme, module.inp)
    yield Stored("qweight", (module.inp, _packed(rows, scheme.bits)), "int32")
    yield Stored("qzeros", (groups, _packed(rows, scheme.bits)), "int32")
    yield Stored("scales", (groups, rows), dtype)


def _packed_int(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows, groups = sum(module.out), _groups(module, scheme, module.inp)
    yield Stored("weight_packed", (rows, _packed(module.inp, scheme.bits)), "int32")
    yield Stored("weight_scale", (rows, groups), dtype)
    yield Stored("weight_shape", (2,), "int64")
    if scheme.zeros:
        yield Stored("weight_zero_point", (_packed(rows, scheme.bits), groups), "int32")


def _fp8(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows = sum(module.out)
    yield Stored("weight", (rows, module.inp), "float8")
    if scheme.strategy == "block":
        if not scheme.online:
            _check_blocks(module, scheme.block)
        n, k = scheme.block
        yield Stored("weight_scale_inv", (math.ceil(rows / n), math.ceil(module.inp / k)), scheme.scale)
    elif scheme.strategy == "channel":
        yield Stored("weight_scale", (rows, 1), scheme.scale)
    else:
        yield Stored("weight_scale", (1 if scheme.online else len(module.out),), scheme.scale)
    if scheme.static:
        yield Stored("input_scale", (len(module.out),), scheme.static)


def _check_blocks(module: Module, block: tuple[int, int]) -> None:
    """Refuse what vLLM refuses: a cut that does not fall on the border of a block."""
    n, k = block
    if module.inp != module.whole_inp and module.inp % k:
        raise BadInput(
            f"fp8 blocks of {k} columns do not divide the {module.inp} columns of {module.name} on one GPU;"
            " vLLM refuses it: use fewer GPUs"
        )
    merged = len(module.out) > 1
    cut = sum(module.out) != sum(module.whole_out)
    if cut or merged:
        for rows in module.out[: None if cut else -1]:
            if rows % n:
                raise BadInput(
                    f"fp8 blocks of {n} rows do not divide the {rows} rows of a part of {module.name} on one"
                    " GPU; vLLM refuses it: use fewer GPUs"
                )


def _int8(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows = sum(module.out)
    yield Stored("weight", (rows, module.inp), "int8")
    yield Stored("weight_scale", (rows, 1) if scheme.strategy == "channel" else (len(module.out),), "float32")
    if scheme.stored_zeros:
        yield Stored(
            "weight_zero_point", (rows if scheme.strategy == "channel" else len(module.out),), "int8"
        )
    if scheme.static:
        yield Stored("input_scale", (1,), "float32")
        if scheme.zeros or scheme.stored_zeros:
            yield Stored("input_zero_point", (1,), "int8")


def _nvfp4(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows, parts = sum(module.out), len(module.out)
    if module.inp % 16:
        raise BadInput(
            f"NVFP4 needs columns in multiples of 16, {module.name} has {module.inp} on one GPU; vLLM refuses"
            " it: use fewer GPUs"
        )
    yield Stored("weight", (rows, module.inp // 2), "uint8")
    yield Stored("weight_scale_2", (parts,), "float32")
    yield Stored("weight_scale", (rows, module.inp // scheme.group), "float8")
    if scheme.static:
        yield Stored("input_scale", (parts,), dtype if scheme.static == "model" else scheme.static)


def _mx(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    rows = sum(module.out)
    yield Stored("weight", (rows, module.inp * scheme.bits // 8), "uint8")
    yield Stored("weight_scale", (rows, module.inp // scheme.group), "uint8")


_LINEAR = {"gptq": _gptq, "awq": _awq, "packed": _packed_int, "fp8": _fp8, "int8": _int8, "nvfp4": _nvfp4,
           "mx": _mx}  # fmt: skip


def _plain_experts(module: Module, dtype: str) -> Iterator[Stored]:
    count, hidden, inner = module.experts, module.inp, module.out[0]
    yield Stored("w13_weight", (count, sum(module.out), hidden), dtype)
    yield Stored("w2_weight", (count, hidden, inner), dtype)
    yield from _expert_bias(module, sum(module.out), hidden, dtype)


def _expert_bias(module: Module, rows: int, hidden: int, dtype: str) -> Iterator[Stored]:
    if module.bias:
        yield Stored("w13_bias", (module.experts, rows), dtype)
        yield Stored("w2_bias", (module.experts, hidden), dtype)


def _expert_fp8(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    count, shards = module.experts, len(module.out)
    hidden = -(-module.inp // scheme.padded[0]) * scheme.padded[0]
    inner = -(-module.out[0] // scheme.padded[1]) * scheme.padded[1]
    yield Stored("w13_weight", (count, shards * inner, hidden), "float8")
    yield Stored("w2_weight", (count, hidden, inner), "float8")
    if scheme.strategy == "block":
        n, k = scheme.block
        if inner % n or (inner != module.whole_out[0] and inner % k):
            raise BadInput(
                f"fp8 blocks of {n} rows do not divide the {inner} rows of {module.name} on one GPU; vLLM"
                " refuses it: use fewer GPUs or expert parallelism"
            )
        yield Stored(
            "w13_weight_scale", (count, shards * math.ceil(inner / n), math.ceil(hidden / k)), "float32"
        )
        yield Stored("w2_weight_scale", (count, math.ceil(hidden / n), math.ceil(inner / k)), "float32")
    elif scheme.strategy == "channel":
        yield Stored("w13_weight_scale", (count, sum(module.out)), "float32")
        yield Stored("w2_weight_scale", (count, hidden), "float32")
    else:
        yield Stored("w13_weight_scale", (count,) if scheme.online else (count, shards), "float32")
        yield Stored("w2_weight_scale", (count,), "float32")
    if scheme.static:
        yield Stored("w13_input_scale", (count,), "float32")
        yield Stored("w2_input_scale", (count,), "float32")
    yield from _expert_bias(module, sum(module.out), hidden, dtype)


def _expert_int8(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    count, hidden, inner = module.experts, module.inp, module.out[0]
    yield Stored("w13_weight", (count, sum(module.out), hidden), "int8")
    yield Stored("w2_weight", (count, hidden, inner), "int8")
    yield Stored("w13_weight_scale", (count, sum(module.out), 1), "float32")
    yield Stored("w2_weight_scale", (count, hidden, 1), "float32")
    yield from _expert_bias(module, sum(module.out), hidden, dtype)


def _expert_nvfp4(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    count, hidden, inner, shards = module.experts, module.inp, module.out[0], len(module.out)
    rows = sum(module.out)
    yield Stored("w13_weight", (count, rows, hidden // 2), "uint8")
    yield Stored("w2_weight", (count, hidden, inner // 2), "uint8")
    yield Stored("w13_weight_scale", (count, rows, hidden // scheme.group), "float8")
    yield Stored("w2_weight_scale", (count, hidden, inner // scheme.group), "float8")
    for name in ("weight_scale_2", "input_scale"):
        yield Stored(f"w13_{name}", (count, shards), "float32")
        yield Stored(f"w2_{name}", (count,), "float32")
    yield from _expert_bias(module, rows, hidden, dtype)


def _expert_mx(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    count, shards = module.experts, len(module.out)
    hidden = -(-module.inp // scheme.padded[0]) * scheme.padded[0]
    inner = -(-module.out[0] // scheme.padded[1]) * scheme.padded[1]
    rows = shards * inner
    yield Stored("w13_weight", (count, rows, hidden * scheme.bits // 8), "uint8")
    yield Stored("w13_weight_scale", (count, rows, hidden // scheme.group), "uint8")
    yield Stored("w2_weight", (count, hidden, inner * scheme.bits // 8), "uint8")
    yield Stored("w2_weight_scale", (count, hidden, inner // scheme.group), "uint8")
    yield from _expert_bias(module, rows, hidden, dtype)


def _expert_packed(module: Module, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    """Lay out integer experts: packed along the columns (GPTQ, compressed-tensors) or the rows (AWQ)."""
    count, hidden, inner, rows = module.experts, module.inp, module.out[0], sum(module.out)
    wide, narrow = _groups(module, scheme, hidden), _inner_groups(module, scheme, inner)
    if scheme.layout == "awq":
        yield Stored("w13_qweight", (count, hidden, _packed(rows, scheme.bits)), "int32")
        yield Stored("w2_qweight", (count, inner, _packed(hidden, scheme.bits)), "int32")
    else:
        yield Stored("w13_qweight", (count, _packed(hidden, scheme.bits), rows), "int32")
        yield Stored("w2_qweight", (count, _packed(inner, scheme.bits), hidden), "int32")
    yield Stored("w13_scales", (count, wide, rows), dtype)
    yield Stored("w2_scales", (count, narrow, hidden), dtype)
    if scheme.layout != "packed" or scheme.zeros:
        yield Stored("w13_qzeros", (count, wide, _packed(rows, scheme.bits)), "int32")
        yield Stored("w2_qzeros", (count, narrow, _packed(hidden, scheme.bits)), "int32")
    if scheme.layout == "gptq" and not module.bias:  # vLLM makes room for biases in any case
        yield Stored("w13_bias", (count, rows), dtype)
        yield Stored("w2_bias", (count, hidden), dtype)
    if scheme.layout == "packed":
        yield Stored("w13_weight_shape", (count, 2), dtype)
        yield Stored("w2_weight_shape", (count, 2), dtype)
    yield from _expert_bias(module, rows, hidden, dtype)


def _inner_groups(module: Module, scheme: Scheme, inner: int) -> int:
    return 1 if scheme.group == -1 else max(1, inner // scheme.group)


_EXPERTS = {"gptq": _expert_packed, "awq": _expert_packed, "packed": _expert_packed, "fp8": _expert_fp8,
            "int8": _expert_int8, "nvfp4": _expert_nvfp4, "mx": _expert_mx}  # fmt: skip
