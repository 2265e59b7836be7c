"""Filters that print bytes with their unit, as everything else here prints them."""

from __future__ import annotations

from collections.abc import Callable

from lowmem.units import gib

DOCUMENTATION = r"""
name: gib
short_description: Bytes as GiB with two decimals
options:
  _input: {description: Bytes., type: int, required: true}
"""


class FilterModule:
    def filters(self) -> dict[str, Callable[..., str]]:
        return {"gib": lambda size: gib(int(size))}
