"""Tests of the values that operators set, as in `lowmem_root is config_path`.

Each kind of value has its rule once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowmem.values import kinds

DOCUMENTATION = r"""
name: config_path
short_description: An absolute path that nginx, systemd and nftables take without quotes
options:
  _input: {description: The value., type: raw, required: true}
"""

NAMES = (
    "api_key",
    "api_key_name",
    "config_path",
    "instance_name",
    "ip_address",
    "ip_network",
    "major_minor",
    "repository_url",
    "user_name",
)


class TestModule:
    def tests(self) -> dict[str, Callable[[Any], bool]]:
        return {**{name: kinds.KINDS[name].accepts for name in NAMES}, "loopback": kinds.loopback}
