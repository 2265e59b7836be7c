"""Tells where a host reaches its own server; also for plans of releases that did not say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowmem.units import local_url

DOCUMENTATION = r"""
name: local_url
short_description: URL at which a host reaches its own server
options:
  _input: {description: The C(deploy) part of a plan., type: dict, required: true}
"""


class FilterModule:
    def filters(self) -> dict[str, Callable[[dict[str, Any]], str]]:
        return {"local_url": lambda deploy: local_url(deploy["host"], deploy["port"])}
