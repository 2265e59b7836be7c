"""Keeps the import path that deployed launchers name: `--middleware lowmem.api_keys.ApiKeys`."""

from lowmem.service.api_keys import ApiKeys

__all__ = ["ApiKeys"]
