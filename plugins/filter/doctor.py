"""Filters that say what `lowmem doctor` thinks of an error, so that an alert and the triage never differ."""

from __future__ import annotations

from collections.abc import Callable

DOCUMENTATION = r"""
name: xids
short_description: Numbers of the Xid errors that lowmem.doctor grades so
options:
  _input: {description: "A grade: ok, warn or bad.", type: str, required: true}
"""


def xids(grade: str) -> list[int]:
    # Not at the top: Ansible loads every filter anew for each task of each host, and this import takes longer
    # than most tasks.
    from lowmem.status.doctor import XID

    return [number for number, (graded, _, _) in XID.items() if graded == grade]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., list[int]]]:
        return {"xids": xids}
