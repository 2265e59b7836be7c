"""Runs in a quantization environment: both 4-bit formats dequantized by checkpoint.py and, nibble by nibble,
here.
"""

import json

import checkpoint
import torch

OUT, IN, GROUP = 16, 64, 32
# AutoAWQ 0.2.9, awq/utils/packing_utils.py: column 8c + i of a row is kept in nibble AWQ_NIBBLE[i] of word c
AWQ_NIBBLE = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}

generator = torch.Generator().manual_seed(0)


def values(rows: int, columns: int) -> list[list[int]]:
    return torch.randint(0, 16, (rows, columns), generator=generator).tolist()


q, zero = values(OUT, IN), values(OUT, IN // GROUP)
scale = [[2.0 ** (v % 4 - 2) for v in row] for row in values(OUT, IN // GROUP)]
expected = [[(q[o][i] - zero[o][i // GROUP]) * scale[o][i // GROUP] for i in range(IN)] for o in range(OUT)]
symmetric = [[(q[o][i] - 8) * scale[o][i // GROUP] for i in range(IN)] for o in range(OUT)]


def word(nibbles: dict[int, int]) -> int:
    value = sum(v << (4 * place) for place, v in nibbles.items())
    return value - 2**32 if value >= 2**31 else value


def tensor(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def along_columns(rows: list[list[int]], nibble: dict[int, int]) -> torch.Tensor:
    return tensor(
        [[word({nibble[i]: row[8 * c + i] for i in range(8)}) for c in range(len(row) // 8)] for row in rows]
    )


plain = {i: i for i in range(8)}
transposed = [list(column) for column in zip(*q, strict=True)]
awq = {
    "qweight": along_columns(transposed, AWQ_NIBBLE),
    "qzeros": along_columns([list(column) for column in zip(*zero, strict=True)], AWQ_NIBBLE),
    "scales": torch.tensor(scale).t().half(),
}
compressed = {
    "weight_packed": along_columns(q, plain),
    "weight_scale": torch.tensor(scale).half(),
    "weight_zero_point": (
        along_columns([list(column) for column in zip(*zero, strict=True)], plain).t().contiguous()
    ),
}
print(
    json.dumps(
        {
            "awq": checkpoint.dequantize(awq).tolist() == expected,
            "compressed": checkpoint.dequantize(compressed).tolist() == expected,
            "symmetric": (
                checkpoint.dequantize(
                    {k: v for k, v in compressed.items() if k != "weight_zero_point"}
                ).tolist()
                == symmetric
            ),
        }
    )
)
