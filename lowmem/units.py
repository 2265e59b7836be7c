"""Reads and writes sizes, compute capabilities and addresses.

MiB and GiB are powers of two, GB and MB powers of ten; the names never mix.
"""

from __future__ import annotations

import re

MIB = 2**20
GIB = 2**30
GB = 10**9

# vLLM's human_readable_int: lower case is decimal, upper case binary (0.32.0, vllm/utils/argparse_utils.py).
SUFFIX = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int | float) -> int:
    """Convert `256M`, `2GiB`, `1.5G` or a plain number to bytes. Raises ValueError for anything else."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return int(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2] not in SUFFIX:
        raise ValueError(
            f"{text!r} is not a size; write bytes, or a number with M, MiB, G, GiB (binary) or m, MB, g, GB"
            " (decimal)"
        )
    return int(float(match[1]) * SUFFIX[match[2]])


def mib(value: int | float) -> str:
    """Format bytes as MiB with thousands separators, the unit of nvidia-smi."""
    return f"{value / MIB:,.0f} MiB"


def gib(value: int | float) -> str:
    """Format bytes as GiB with two decimals, the unit of vLLM's log."""
    return f"{value / GIB:.2f} GiB"


def number(value: float | None) -> str:
    """Format a number with one decimal below 100 and none above; None is a dash."""
    return "-" if value is None else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def capability_tuple(text: str) -> tuple[int, int]:
    """Parse a compute capability such as 8.6, so that two can be compared; empty text is that of a CPU."""
    major, _, minor = text.partition(".")
    return int(major or 0), int(minor or 0)


# A server that listens on every address is asked at the loopback address of its family: a socket
# of `::` may be closed to IPv4 (net.ipv6.bindv6only).
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound


def local_url(host: str, port: int) -> str:
    """Return the URL at which a host reaches its own server that listens on this address and port."""
    address = _LOOPBACK.get(host, host)
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"
