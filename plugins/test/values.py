"""Tests of the values that operators set, as in `lowmem_root is config_path`.

Each kind of value has its rule once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any

DOCUMENTATION = r"""
name: config_path
short_description: An absolute path that nginx, systemd and nftables take without quotes
options:
  _input: {description: The value., type: raw, required: true}
"""

PATTERNS = {
    # without quotes in configurations of nginx, systemd and nftables
    "config_path": r"(/[A-Za-z0-9_.+@-]+)+",
    # a part of unit names, tables of nftables and folders
    "instance_name": r"[A-Za-z0-9_]{1,32}",
    "user_name": r"[a-z_][a-z0-9_-]{0,31}",
    # what an HTTP header, a shell and an environment file hold without quotes
    "api_key": r"[A-Za-z0-9._~+/=-]{16,256}",
    "api_key_name": r"[A-Za-z][A-Za-z0-9_]{0,31}",
    "major_minor": r"[0-9]+\.[0-9]+",
    "repository_url": r"(https?|file)://\S+",
}


def matches(pattern: str) -> Callable[[Any], bool]:
    """Return a test of the whole value; a number that YAML read counts as its text."""
    compiled = re.compile(pattern)
    kinds = (str, int, float)
    return lambda value: (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and compiled.fullmatch(str(value)) is not None
    )


def ip_address(value: Any) -> bool:
    """Tell whether the value is one IPv4 or IPv6 address, without a scope."""
    try:
        return isinstance(value, str) and "%" not in value and bool(ipaddress.ip_address(value))
    except ValueError:
        return False


def ip_network(value: Any) -> bool:
    """Tell whether the value is an address or a network in CIDR notation; host bits may be set."""
    if not isinstance(value, str):
        return False
    address, slash, prefix = value.partition("/")
    if slash and not prefix.isdecimal():
        return False
    try:
        return ip_address(address) and bool(ipaddress.ip_interface(value))
    except ValueError:
        return False


def loopback(value: Any) -> bool:
    """Tell whether a server on this address is reached from its own host only."""
    return value == "localhost" or (ip_address(value) and ipaddress.ip_address(value).is_loopback)


class TestModule:
    def tests(self) -> dict[str, Callable[[Any], bool]]:
        return {
            **{name: matches(pattern) for name, pattern in PATTERNS.items()},
            "ip_address": ip_address,
            "ip_network": ip_network,
            "loopback": loopback,
        }
