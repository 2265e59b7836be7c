"""Filters that say what `lowmem doctor` thinks of an error, so that an alert and the triage never differ."""

from __future__ import annotations

from collections.abc import Callable

from lowmem.doctor import XID

DOCUMENTATION = r"""
name: xids
short_description: Numbers of the Xid errors that lowmem.doctor grades so
options:
  _input: {description: "A grade: ok, warn or bad.", type: str, required: true}
"""


class FilterModule:
    def filters(self) -> dict[str, Callable[..., list[int]]]:
        return {"xids": lambda grade: [number for number, (graded, _, _) in XID.items() if graded == grade]}
