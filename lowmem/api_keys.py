"""Keeps the import path that deployed launchers name: `--middleware lowmem.api_keys.ApiKeys`."""

from lowmem.service.api_keys import ApiKeys, read_keys

__all__ = ["ApiKeys", "read_keys"]
