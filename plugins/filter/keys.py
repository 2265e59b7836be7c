"""Reads API keys from the text of a key file, by the server's own rules."""

from __future__ import annotations

from collections.abc import Callable

from lowmem.service.api_keys import read_keys

DOCUMENTATION = r"""
name: api_keys
short_description: API keys of a key file by their names
description: A key without a name has the name V(default), if no key has a name.
options:
  _input: {description: Text of the file., type: str, required: true}
"""


def api_keys(text: str) -> dict[str, str]:
    """Return name -> key. The first line repeats a named key, so its own name shows only when it is alone."""
    keys = read_keys(text)
    named = {name: key for name, key in keys.items() if name}
    return named or ({"default": keys[""]} if "" in keys else {})


class FilterModule:
    def filters(self) -> dict[str, Callable[[str], dict[str, str]]]:
        return {"api_keys": api_keys}
