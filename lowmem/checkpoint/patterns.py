"""Matches names against the patterns that a quantization recipe brings, in bounded time.

A pattern of a config.json may come from anybody, and Python's own matcher needs exponential time for some.
"""

from __future__ import annotations

from functools import lru_cache

from lowmem import text
from lowmem.errors import BadInput


@lru_cache(maxsize=200_000)
def matches(pattern: str, name: str, anywhere: bool = False) -> bool:
    """Tell whether a regular expression matches from the name's start, as `re.match`, or `anywhere`.

    Raises BadInput, one line, for a pattern that `text.matches` refuses.
    """
    try:
        return text.matches(pattern, name, anywhere)
    except BadInput as error:
        raise BadInput(f"config.json: quantization: {error}") from None


def matches_target(target: str, name: str) -> bool:
    """Tell whether a compressed-tensors target names a module: the name itself, or `re:` and a pattern."""
    return matches(target[3:], name) if target.startswith("re:") else target == name
